"""One row for each pair gives what two rows give: outputs, gradients, and whole runs of both trainers."""

import gc
import json
import logging
import random
import weakref

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_prefix_layout import batch_of, pairs
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer, upstream
from trl_cwdpo.prefix_layout import find_layout
from trl_cwdpo.shared_prefix import SharedPrefixError, batch_layout, model_obstacle, run_rows
from trl_cwdpo.upstream.shared_prefix import register_split_attention

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mistral, window not reached": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)),
}
# The longer prompt, the longer chosen and the longer rejected response in different pairs, and without padding
BATCHES = {
    "padded": ([[3, 4, 5, 6, 7], [8, 9]], [[10, 11, 12], [13, 14, 15, 16]], [[17], [18, 19, 20, 21, 22, 23]]),
    "prompts of one length": ([[3, 4, 5], [8, 9, 6]], [[10, 11], [13]], [[17], [18, 19, 20]]),
    "one pair": ([[3, 4, 5]], [[10, 11, 12, 13]], [[17, 18]]),
    "shortest": ([[3]], [[10]], [[17]]),
}


def fused(model):
    add_fused_lm_head(model, outputs=FIELDS)
    register_split_attention()
    return model.eval()


def inputs_of(tokens, extra_columns=0):
    ids, attention, labels = batch_of(*tokens, extra_columns=extra_columns)
    call = {"use_cache": False, "fused_lm_head": True}
    return {"input_ids": ids, "attention_mask": attention, "labels": labels, **call}


def outputs_and_gradients(model, forward):
    model.zero_grad()
    outputs = forward()
    # Different weights for all tokens, so that mixing them up shows
    weights = torch.arange(1.0, outputs.log_probs.numel() + 1, dtype=outputs.log_probs.dtype)
    ((outputs.log_probs + outputs.entropy).flatten() * weights).sum().backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, *, logps=1e-4, gradients=1e-5):
    """The requirement: 1e-4 nats per sequence, gradients to 1e-5 relative, in float32."""
    assert model_obstacle(model) is None
    layout = batch_layout(model, inputs)
    usual, expected = outputs_and_gradients(model, lambda: model(**inputs))
    shared, found = outputs_and_gradients(model, lambda: run_rows(model, layout, inputs))
    assert (shared.log_probs.sum(1) - usual.log_probs.sum(1)).abs().max() <= logps
    for name in (*FIELDS, "label_mask"):
        theirs, ours = getattr(usual, name).double(), getattr(shared, name).double()
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), name
    assert torch.allclose(shared.loss, usual.loss, rtol=1e-5)
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    difference = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
    assert difference <= gradients * total


@pytest.mark.parametrize("tokens", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_outputs_and_gradients(build, tokens):
    torch.manual_seed(0)
    assert_same(fused(build()), inputs_of(tokens, extra_columns=1))


@pytest.fixture(scope="module")
def double_model():
    torch.manual_seed(0)
    return fused(MODELS["llama"]()).double()


@settings(max_examples=20, deadline=None)
@given(tokens=pairs(longest=9), extra_columns=st.integers(0, 3))
def test_any_lengths_in_double_precision(double_model, tokens, extra_columns):
    # The head computes in float32 whatever the model's dtype
    assert_same(double_model, inputs_of(tokens, extra_columns), logps=1e-5, gradients=1e-6)


def test_the_other_response_does_not_matter():
    torch.manual_seed(0)
    model = fused(MODELS["qwen3"]())
    prompts, chosen, rejected = BATCHES["padded"]
    first, second = inputs_of((prompts, chosen, rejected)), inputs_of((prompts, chosen, [[40, 41], [50]]))
    results = [run_rows(model, batch_layout(model, inputs), inputs) for inputs in (first, second)]
    halves = [result.log_probs[:2].sum(1) for result in results]
    assert torch.allclose(*halves, atol=1e-5)
    assert not torch.allclose(results[0].log_probs[2:].sum(1), results[1].log_probs[2:].sum(1), atol=1e-2)


def test_models_are_unwrapped_once_and_not_kept_alive(monkeypatch):
    def unwrap(model):
        calls.append(model)
        return model

    calls = []
    monkeypatch.setattr(upstream, "extract_model_from_parallel", unwrap)
    model = MODELS["llama"]()
    adapted = get_peft_model(model, LoraConfig(r=2))
    assert [upstream.unwrapped(each) for each in (adapted, model, adapted, model)] == [model] * 4
    assert calls == [adapted, model]
    calls.clear()
    gone = weakref.ref(model), weakref.ref(adapted)
    del model, adapted
    gc.collect()
    assert [each() for each in gone] == [None, None]


# --- runs ---


def run(trainer_class, config_class, model, tmp_path, trainer_kwargs=None, data=None, **options):
    trainer = trainer_class(
        model=model,
        args=config_class(**tiny.training_options(tmp_path, max_steps=3, **options)),
        train_dataset=tiny.pairs() if data is None else data,
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer


def is_shared(trainer):
    """Whether every model of a run was found to give the same, and was run so."""
    verdicts = trainer._shared_prefix.verdicts
    return bool(verdicts) and all(verdict is None for verdict in verdicts.values())


def assert_equal_runs(usual, shared, tolerance=1e-4):
    for theirs, ours in zip(usual.state.log_history, shared.state.log_history, strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            # Where policy and reference are equal, rounding decides whose reward is larger
            is_tie = name.endswith("rewards/accuracies") and abs(theirs[name.replace("accuracies", "margins")]) < 1e-4
            if "runtime" not in name and "per_second" not in name and not is_tie:
                assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


COOLED = {"cooling_mode": "gate", "cooling_floor": -3.0, "cooling_temperature": 0.5}
OPTIONS = {
    "plain DPO": {"cooling_mode": "off"},
    "cooled": {},
    "gate": {"cooling_mode": "gate"},
    "ld_alpha and WPO": {"ld_alpha": 0.5, "use_weighting": True},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "precompute": {"precompute_ref_log_probs": True},
    "plain DPO, precompute": {"precompute_ref_log_probs": True, "cooling_mode": "off"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "truncation": {"max_length": 9},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_stage_2(text_model, tmp_path, options):
    kwargs = {"eval_dataset": tiny.pairs(8, seed=1)} if "eval_strategy" in options else {}
    usual, shared = (
        run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, kwargs, share_prefix=share, **options)
        for share in (False, True)
    )
    assert is_shared(shared)
    assert_equal_runs(usual, shared)


def test_policy_and_reference_use_one_layout(text_model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "trl_cwdpo.shared_prefix.find_layout", lambda *tensors: calls.append(tensors) or find_layout(*tensors)
    )
    trainer = run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, share_prefix=True, **COOLED)
    assert is_shared(trainer)
    assert len(calls) == 3, "one for each step"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_loss_type": "hinge"},
        {"gradient_checkpointing": True},
        {"max_length": 9},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
)
def test_stage_1(text_model, tmp_path, options):
    stage = (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, text_model, tmp_path)
    kwargs = {"eval_dataset": tiny.pairs(8, seed=1)} if "eval_strategy" in options else {}
    usual, shared = (run(*stage, kwargs, share_prefix=share, **options) for share in (False, True))
    assert is_shared(shared)
    assert_equal_runs(usual, shared)


@pytest.mark.parametrize("trainer_class", [CWDPOTrainer, GentleNegativeSFTTrainer])
def test_adapter(text_model, tmp_path, trainer_class):
    config_class = CWDPOConfig if trainer_class is CWDPOTrainer else GentleNegativeSFTConfig
    kwargs = {"peft_config": LoraConfig(r=4, init_lora_weights=False)}
    usual, shared = (
        run(trainer_class, config_class, text_model, tmp_path, kwargs, share_prefix=share) for share in (False, True)
    )
    assert is_shared(shared)
    assert_equal_runs(usual, shared)


@pytest.mark.parametrize("trainer_class", [CWDPOTrainer, GentleNegativeSFTTrainer])
def test_probes(text_model, tmp_path, trainer_class):
    config_class = CWDPOConfig if trainer_class is CWDPOTrainer else GentleNegativeSFTConfig
    options = {"probe_steps": 2, "probe_dataset_size": 6}
    measured = []
    for share in (False, True):
        folder, kwargs = tmp_path / str(share), {"eval_dataset": tiny.pairs(8, seed=1)}
        trainer = run(trainer_class, config_class, text_model, folder, kwargs, share_prefix=share, **options)
        assert is_shared(trainer) or not share
        lines = (folder / "probes.jsonl").read_text(encoding="utf-8").splitlines()
        measured.append([json.loads(line)["families"] for line in lines])
    usual, shared = measured
    assert len(usual) == len(shared) >= 2
    for theirs, ours in zip(usual, shared, strict=True):
        assert ours.keys() == theirs.keys()
        for family in theirs:
            assert ours[family]["avg_logp"] == pytest.approx(theirs[family]["avg_logp"], abs=1e-4), family


def padded_on_the_left(inputs, columns):
    pad = {name: -100 if name == "labels" else 0 for name, value in inputs.items() if torch.is_tensor(value)}
    moved = {name: nn.functional.pad(inputs[name], (columns, 0), value=value) for name, value in pad.items()}
    return {**inputs, **moved, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def test_bf16_differs_as_by_other_padding():
    """Nats per sequence, root mean square: no more than what padding elsewhere does, and no further from float32."""
    generator, words = random.Random(0), range(3, SIZES["vocab_size"])
    found = {"shared": [], "padding": [], "usual": [], "precise": []}
    for seed in range(2):
        torch.manual_seed(seed)
        model = fused(MODELS["llama"]()).bfloat16()
        precise = fused(MODELS["llama"]()).float()
        precise.load_state_dict(model.state_dict())
        for _ in range(8):
            lengths = ((10, 40), (5, 20), (5, 20))
            tokens = [[generator.choices(words, k=generator.randint(*size)) for _ in range(2)] for size in lengths]
            inputs = inputs_of(tokens)
            with torch.no_grad():
                usual, right, left = (
                    model(**given).log_probs.sum(1)
                    for given in (inputs, inputs_of(tokens, extra_columns=33), padded_on_the_left(inputs, 8))
                )
                shared = run_rows(model, batch_layout(model, inputs), inputs).log_probs.sum(1)
                exact = precise(**inputs).log_probs.sum(1)
            found["shared"].append(shared - usual)
            found["padding"] += [right - usual, left - usual]
            found["usual"].append(usual - exact)
            found["precise"].append(shared - exact)
    rms = {name: torch.cat(values).square().mean().sqrt().item() for name, values in found.items()}
    assert 0 < rms["shared"] < rms["padding"], rms
    assert rms["shared"] < 0.1 * rms["usual"], rms
    assert rms["precise"] < 1.05 * rms["usual"], rms


def test_a_run_in_bf16(text_model, tmp_path):
    usual, shared = (
        run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, share_prefix=share, bf16=True, **COOLED)
        for share in (False, True)
    )
    assert is_shared(shared)
    assert_equal_runs(usual, shared, tolerance=0.05)


def test_the_comparison_leaves_the_run_as_it_was(text_model, tmp_path):
    # Dropout draws are those of a run that never compared: the first loss is that of the same seed
    options = {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.3}, "cooling_mode": "gate"}
    options |= {"cooling_floor": -3.0, "cooling_temperature": 0.5, "share_prefix": True}
    first = run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, **options)

    class Trusting(CWDPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            inner = self.accelerator.unwrap_model(model)
            self._shared_prefix.verdicts |= {id(inner): None, id(self.ref_model): None}
            return super()._compute_loss(model, inputs, return_outputs)

    second = run(Trusting, CWDPOConfig, text_model, tmp_path, **options)
    assert [entry.get("loss") for entry in first.state.log_history] == [
        entry.get("loss") for entry in second.state.log_history
    ]


# --- where it falls back ---


def warnings_of(caplog):
    return [record.message for record in caplog.records if "share_prefix" in record.message]


def save_bloom(folder):
    """Its positions are a bias of the attention, which a row with three blocks gets wrong."""
    config = BloomConfig(vocab_size=len(tiny.tokenizer()), hidden_size=32, n_layer=2, n_head=4, eos_token_id=2)
    BloomForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", ["no positions", "mixture of experts", "prompt tuning"])
def test_a_model_that_cannot_is_run_as_usual_and_said_so_once(text_model, moe_model, tmp_path, caplog, case):
    caplog.set_level(logging.WARNING)
    model = {"no positions": save_bloom(tmp_path / "bloom"), "mixture of experts": moe_model}.get(case, text_model)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    kwargs = {"peft_config": tuning} if case == "prompt tuning" else {}
    options = {"cooling_mode": "gate"}
    trainer = run(CWDPOTrainer, CWDPOConfig, model, tmp_path, kwargs, share_prefix="auto", **options)
    usual = run(CWDPOTrainer, CWDPOConfig, model, tmp_path, kwargs, share_prefix=False, **options)
    assert [entry.get("loss") for entry in trainer.state.log_history] == [
        entry.get("loss") for entry in usual.state.log_history
    ]
    reason = {"no positions": "Bloom", "mixture of experts": "load-balancing", "prompt tuning": "virtual tokens"}[case]
    (warning,) = warnings_of(caplog)
    assert reason in warning
    with pytest.raises(SharedPrefixError, match=reason):
        run(CWDPOTrainer, CWDPOConfig, model, tmp_path, kwargs, share_prefix=True, **options)


def test_obstacles_that_the_configuration_tells():
    def obstacle(**options):
        return model_obstacle(LlamaForCausalLM(LlamaConfig(**SIZES, **options)))

    assert obstacle() is None
    assert obstacle(attn_implementation="flex_attention") is None
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config._attn_implementation = "flash_attention_2"
    assert "`attn_implementation='flash_attention_2'` takes no mask" in model_obstacle(model)
    assert "'linear_attention'" in obstacle(layer_types=["full_attention", "linear_attention"])


def test_a_wrong_result_is_noticed(text_model, tmp_path, caplog, monkeypatch):
    from trl_cwdpo.prefix_layout import PrefixLayout

    right = PrefixLayout.positions
    monkeypatch.setattr(PrefixLayout, "positions", lambda self, axes=None: right(self, axes) // 2)
    trainer = run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, cooling_mode="gate")
    assert not is_shared(trainer)
    (warning,) = set(warnings_of(caplog))
    assert "nats per token" in warning


def test_rows_beyond_the_attention_window_are_run_as_usual(caplog):
    torch.manual_seed(0)
    model = fused(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))
    reason = batch_layout(model, inputs_of(BATCHES["padded"]))
    assert reason == "rows of 8 tokens exceed the attention window of 4"


def test_prompts_that_truncation_cuts_differently_are_run_as_usual(text_model, tmp_path, caplog):
    options = {"max_length": 9, "truncation_mode": "keep_end", "cooling_mode": "gate"}
    data = tiny.pairs(conversational=False)
    usual, shared = (
        run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, data=data, share_prefix=share, **options)
        for share in (False, True)
    )
    assert_equal_runs(usual, shared)
    assert sum("keep_end" in warning for warning in warnings_of(caplog)) == 1


def test_auto_does_not_share_what_costs_more(text_model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("trl_cwdpo.shared_prefix.relative_cost", lambda model, layout: calls.append(layout) or 1.2)
    usual, auto = (
        run(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, share_prefix=share, cooling_mode="gate")
        for share in (False, "auto")
    )
    assert calls
    assert [entry.get("loss") for entry in usual.state.log_history] == [
        entry.get("loss") for entry in auto.state.log_history
    ]


@pytest.mark.parametrize("config_class", [CWDPOConfig, GentleNegativeSFTConfig])
def test_option(config_class, tmp_path):
    for given_value, value in ((True, True), ("false", False), ("True", True), ("auto", "auto")):
        assert config_class(**tiny.training_options(tmp_path, share_prefix=given_value)).share_prefix is value
    with pytest.raises(ValueError, match="`share_prefix` must be 'auto', True or False, got 'yes'"):
        config_class(**tiny.training_options(tmp_path, share_prefix="yes"))
