"""What sampling assumes of TRL and transformers; a failure says which assumption a new release broke."""

import inspect
from importlib.metadata import PackageNotFoundError

import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer
from trl import import_utils
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_config
from trl.trainer.utils import add_fused_lm_head

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.upstream import vllm
from trl_cwdpo.upstream.generation import GeneratingPolicy, image_token_ids, stop_token_ids


@pytest.fixture
def model(text_model):
    return AutoModelForCausalLM.from_pretrained(text_model)


def test_explicit_options_win_over_the_models_own(model):
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, max_length=5)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    options |= {"repetition_penalty": 1.0, "eos_token_id": [2], "pad_token_id": 0}
    policy = GeneratingPolicy(model, Accelerator(cpu=True))
    inputs = {"input_ids": torch.full((64, 2), 7), "attention_mask": torch.ones(64, 2, dtype=torch.long)}
    torch.manual_seed(0)
    sampled = policy.generate(inputs, options)
    assert sampled.shape[1] > 5
    # With `top_k=1` all rows would be one
    assert len({tuple(row) for row in sampled.tolist()}) > 32


def test_generation_restores_gradient_checkpointing_and_needs_no_gradient(model):
    model.gradient_checkpointing_enable()
    policy = GeneratingPolicy(model, Accelerator(cpu=True))
    with policy.unwrapped() as unwrapped:
        assert not unwrapped.is_gradient_checkpointing
        assert not torch.is_grad_enabled()
    assert model.is_gradient_checkpointing


def test_a_model_with_a_fused_head_generates_as_before(model):
    inputs = {"input_ids": torch.tensor([[3, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    before = model.generate(**inputs, **options)
    add_fused_lm_head(model, outputs=("log_probs",))
    assert torch.equal(model.generate(**inputs, **options), before)


def test_stop_and_image_tokens(model):
    tokenizer = tiny.tokenizer()
    model.generation_config.eos_token_id = [9, 8]
    assert stop_token_ids(model, tokenizer) == [2, 8, 9]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [2]
    assert image_token_ids(model.config) == []
    model.config.image_token_id = 11
    assert image_token_ids(model.config) == [11]


def test_the_trainer_fetches_the_micro_batches_of_a_step_at_once():
    assert list(inspect.signature(Trainer.get_batch_samples).parameters) == [
        "self",
        "epoch_iterator",
        "num_batches",
        "device",
    ]
    assert {"is_fsdp", "is_zero3"} <= vars(DistributedBackend).keys()


# --- vLLM, which is not installed where these tests run: the contract, and a stand-in that keeps it ---


def test_the_versions_are_those_that_trl_names():
    source = inspect.getsource(import_utils.is_vllm_available)
    assert all(f'Version("{version}")' in source for version in vllm.SUPPORTED_VERSIONS)


def test_our_vllm_options_are_trls():
    ours, theirs = (config.__dataclass_fields__ for config in (CWDPOConfig, grpo_config.GRPOConfig))
    names = [name for name in ours if "vllm" in name or name == "ds3_gather_for_generation"]
    assert len(names) == 14
    for name in names:
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize(
    ("installed", "message"),
    [(None, "it is not installed"), ("0.10.2", "0.10.2 is installed"), ("0.32.0", "0.32.0 is installed")],
)
def test_missing_and_unsupported_versions_are_one_clear_error(text_model, tmp_path, monkeypatch, installed, message):
    def version(name):
        assert name == "vllm"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(vllm, "version", version)
    with pytest.raises(ImportError, match=rf"vLLM 0\.22\.0 to 0\.31\.0.*{message}.*trl-cwdpo\[vllm\].*use_vllm=False"):
        trainer_with_vllm(text_model, tmp_path)


@pytest.mark.parametrize("installed", ["0.22.0", "0.24.0+cu129", "0.31.0"])
def test_supported_versions_pass(monkeypatch, installed):
    monkeypatch.setattr(vllm, "version", lambda _: installed)
    vllm.check_vllm()


def trainer_with_vllm(model, output, data=None, **options):
    options = {"dataset_negative_fraction": 0.0, "use_vllm": True, "max_steps": 2, "cooling_mode": "off", **options}
    args = CWDPOConfig(**tiny.training_options(output, **options))
    return CWDPOTrainer(model, args=args, train_dataset=tiny.pairs() if data is None else data)


class FakeVLLM:
    """Takes TRL's arguments and answers from a list; counts what is asked of it."""

    instances: list = []  # noqa: RUF012 (reset by the fixture)

    def __init__(self, *args, **kwargs):
        bound = inspect.signature(VLLMGeneration.__init__).bind(self, *args, **kwargs)
        self.arguments = bound.arguments
        self.generation_kwargs = kwargs.get("generation_kwargs") or {}
        self.calls, self.syncs = [], 0
        FakeVLLM.instances.append(self)

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        self.calls.append((prompts, images, num_generations))
        # Beyond the stop token, as an engine with other stop tokens would go on
        return prompts, [[7 + index % 4, 8, 2, 9] for index in range(len(prompts))], None, None


def test_the_stand_in_has_trls_methods():
    for name in ("generate", "sync_weights"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (FakeVLLM, VLLMGeneration))
        assert list(ours.parameters) == list(theirs.parameters)
    assert "self.generation_kwargs = generation_kwargs or {}" in inspect.getsource(VLLMGeneration.__init__)
    assert inspect.getsource(VLLMGeneration.generate).count("self.generation_kwargs") >= 2


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setattr(vllm, "version", lambda _: "0.24.0")
    monkeypatch.setattr(vllm, "VLLMGeneration", FakeVLLM)
    FakeVLLM.instances = []
    return FakeVLLM.instances


def test_vllm_samples_once_a_step_after_one_synchronization(text_model, tmp_path, fake_vllm):
    trainer = trainer_with_vllm(
        text_model,
        tmp_path,
        gradient_accumulation_steps=2,
        num_negative_generations=2,
        vllm_mode="server",
        vllm_server_base_url="http://localhost:8001",
        negative_temperature=0.7,
        negative_max_completion_length=33,
    )
    trainer.train()
    (engine,) = fake_vllm
    assert engine.syncs == len(engine.calls) == 2
    prompts, images, copies = engine.calls[0]
    assert (len(prompts), images, copies) == (16, None, 2)
    # The copies of a prompt stand side by side, and prompts are what the loss sees
    assert prompts[::2] == prompts[1::2]
    assert set(map(tuple, prompts)) <= set(map(tuple, trainer.train_dataset["prompt_ids"]))
    assert engine.generation_kwargs == {"stop_token_ids": [2]}
    arguments = engine.arguments
    assert (arguments["mode"], arguments["server_base_url"]) == ("server", "http://localhost:8001")
    assert (arguments["temperature"], arguments["max_completion_length"], arguments["top_k"]) == (0.7, 33, 0)
    assert arguments["max_num_seqs"] == 16
    logs = [entry for entry in trainer.state.log_history if "negatives/completion_length" in entry]
    assert [entry["negatives/completion_length"] for entry in logs] == [3.0, 3.0]
    assert [entry["negatives/truncated_fraction"] for entry in logs] == [0.0, 0.0]


def test_vllm_gets_the_pictures(vision_model, vision_pairs, tmp_path, fake_vllm):
    trainer = trainer_with_vllm(
        vision_model, tmp_path, vision_pairs["train"], max_steps=1, max_length=None, num_negative_generations=2
    )
    trainer.train()
    prompts, images, _ = fake_vllm[0].calls[0]
    assert len(prompts) == len(images) == 8
    assert all(len(row) == 1 and row[0].size == vision_pairs["train"][0]["images"][0].size for row in images)
    assert images[0] is images[1]
