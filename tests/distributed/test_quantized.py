"""Adapters on nf4 and int8 weights: both stages train, and continue from a checkpoint as if nothing had happened."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).parent))
import engines
import quantized

from trl_cwdpo.reference_store import ReferenceCacheError
from trl_cwdpo.upstream.quantized import keep_trainable

# Looked for, not imported: the import takes its time
pytestmark = pytest.mark.skipif(
    not quantized.bitsandbytes_is_installed(), reason="bitsandbytes (the extra `quantization`) is not installed"
)
FROZEN = {
    "nf4": "Tensor Params4bit torch.uint8",
    "nf4 in floats": "DTensor DTensor torch.float32",
    "int8": "Tensor Int8Params torch.int8",
}
# Engines round sums of gradients otherwise, and adapters are rounded to bfloat16 after each step
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """As wide as a block of 4-bit weights."""
    return tiny.save_text_model(tmp_path_factory.mktemp("model"), hidden_size=64)


@pytest.fixture(scope="module")
def several(model, tmp_path_factory):
    """Results of all runs on an engine of two processes, on demand."""
    found = {}

    def results(engine):
        if engine not in found:
            output, names = tmp_path_factory.mktemp(engine), quantized.ON_ENGINES[engine]
            process = engines.run(engines.ENGINES[engine], output, quantized.__file__, model, output, *names)
            files = {name: [output / f"{name}-rank{rank}.json" for rank in range(2)] for name in names}
            missing = [file.name for pair in files.values() for file in pair if not file.exists()]
            assert not missing, f"{missing}\n{process.stderr[-6000:]}"
            found[engine] = {name: [json.loads(file.read_text()) for file in pair] for name, pair in files.items()}
        return found[engine]

    return results


def assert_continued_exactly(name, result, engine):
    whole, resumed = result["whole"], result["resumed"]
    assert result["moved"]
    expected = FROZEN[name.split(", ")[1]]
    assert (expected.replace("Tensor", "ds_id", 1) if engine == "zero3" else expected) in whole["frozen"]
    assert whole["identity"] == engines.expected_identity(engines.ENGINES[engine], reference=False)
    assert whole["dtypes"] == resumed["dtypes"] == ["torch.bfloat16"]
    assert len(losses_of(whole)) == quantized.STEPS
    assert resumed["log"] == whole["log"]
    assert resumed["weights"] == whole["weights"]


def losses_of(result):
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


@pytest.mark.parametrize("name", quantized.RUNS)
def test_one_process(model, tmp_path, name):
    assert_continued_exactly(name, quantized.run(name, model, tmp_path), "one")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine, names in quantized.ON_ENGINES.items() for name in names]
)
def test_two_processes(several, engine, name):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    first, second = several(engine)[name]
    # One process draws other dropout
    expected = several("ddp")[name.removesuffix(" in floats")][0]["whole"]
    for result in (first, second):
        assert_continued_exactly(name, result, engine)
        assert losses_of(result["whole"]) == pytest.approx(losses_of(expected), abs=TOLERANCE)
        share = result["whole"]["frozen_bytes"] / expected["frozen_bytes"]
        if engine == "zero3" or "floats" in name:
            assert share == pytest.approx(0.5, abs=0.02)
        else:
            assert share == 1 or engine == "fsdp2"
    assert first["whole"]["weights"] == second["whole"]["weights"]


REFUSAL = "`load_in_8bit=True` cannot be trained under FSDP"


def test_int8_weights_under_fsdp_are_refused(model, tmp_path, monkeypatch):
    trainer = quantized.build("stage 1, int8", model, tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=REFUSAL):
        keep_trainable(trainer.model)


@pytest.mark.slow
@pytest.mark.distributed
def test_int8_weights_on_fsdp2_are_refused(model, tmp_path):
    process = engines.run(engines.ENGINES["fsdp2"], tmp_path, quantized.__file__, model, tmp_path, "stage 2, int8")
    assert process.returncode != 0
    assert f"ValueError: {REFUSAL}" in process.stderr, process.stderr[-3000:]


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_gradients_are_those_of_the_same_weights_in_float32(model, tmp_path, form):
    """Also after an evaluation, for which bitsandbytes would pack 4-bit weights where the processor can."""
    trainer = quantized.build(f"stage 1, {form}", model, tmp_path)
    ours = trainer.model
    settings = BitsAndBytesConfig(**quantized.FORMATS[form])
    plain = AutoModelForCausalLM.from_pretrained(model, quantization_config=settings).dequantize().float()
    theirs = get_peft_model(plain, quantized.ADAPTER)
    torch.manual_seed(1)
    for (name, mine), (other, value) in zip(trained(ours).items(), trained(theirs).items(), strict=True):
        assert name == other
        start = torch.randn_like(value) / 10
        mine.data.copy_(start)
        value.data.copy_(mine)  # rounded to bfloat16
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def gradients(network):
        network.eval()
        with torch.no_grad():
            network(**batch)
        # Dropout stays off; in training mode bitsandbytes does not round what goes into 8-bit weights on CPU
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        network(**batch).logits.float().logsumexp(-1).sum().backward()
        return {name: value.grad.double().flatten() for name, value in trained(network).items()}

    for (name, mine), value in zip(gradients(ours).items(), gradients(theirs).values(), strict=True):
        assert float(value.norm()) > 1e-3, name
        # Of bfloat16 the gradients of the adapters are rounded, and those of int8 weights come from float16
        assert float((mine - value).norm() / value.norm()) < 0.02, name


def trained(network):
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def test_weights_packed_for_inference_are_refused(model):
    import bitsandbytes

    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16")
    settings = BitsAndBytesConfig(**quantized.FORMATS["nf4"])
    network = AutoModelForCausalLM.from_pretrained(model, quantization_config=settings)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        exact = network.train()(input_ids=ids).logits
        network.eval()(input_ids=ids)
    with pytest.raises(ValueError, match="packed for inference"):
        keep_trainable(network)
    network = AutoModelForCausalLM.from_pretrained(model, quantization_config=settings)
    keep_trainable(network)
    with torch.no_grad():
        assert torch.equal(network.eval()(input_ids=ids).logits, exact)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_reference_cache_is_for_weights_that_give_the_same_twice(model, tmp_path):
    cache = {"reference_cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    with pytest.raises(ReferenceCacheError, match="load_in_8bit"):
        quantized.build("stage 2, int8", model, tmp_path, **cache)
    losses = []
    for settings in ({"max_steps": 2}, cache, cache):
        trainer = quantized.build("stage 2, nf4", model, tmp_path, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == losses[2] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_negatives_are_sampled_from_quantised_weights(model, tmp_path, form):
    sampled = {"dataset_negative_fraction": 0.0, "negative_max_completion_length": 6, "max_steps": 2}
    trainer = quantized.build(f"stage 2, {form}", model, tmp_path, **sampled)
    trainer.train()
    assert [entry["negatives/on_policy_fraction"] for entry in trainer.state.log_history if "loss" in entry] == [1, 1]


@pytest.mark.parametrize(("form", "is_the_same"), [("nf4", True), ("int8", False)])
def test_where_evaluation_computes_as_training_does(model, tmp_path, form, is_the_same):
    """bitsandbytes on CPU; the documentation says so."""
    network = quantized.build(f"stage 1, {form}", model, tmp_path).model
    ids = torch.arange(6).view(1, 6)
    with network.disable_adapter(), torch.no_grad():
        outputs = [network.train(mode)(input_ids=ids).logits for mode in (True, False)]
    assert torch.equal(*outputs) is is_the_same
