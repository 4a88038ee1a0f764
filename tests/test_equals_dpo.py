"""Cooling switched off, or with every weight forced to 1, is `trl.DPOTrainer` bit for bit."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer

UNCOOLED = {
    "off": {"cooling_mode": "off"},
    "weights of 1": {"cooling_mode": "constant", "cooling_constant": 1.0},
    "weights of 1, gated": {"cooling_mode": "gate", "cooling_floor": -1e6, "cooling_temperature": 0.1},
    "weights of 1, computed": {"cooling_mode": "loss", "cooling_floor": -1e6, "cooling_temperature": 0.1},
}
TIMES = ("runtime", "per_second")
LOSSES = {
    **{
        loss: {"loss_type": [loss]}
        for loss in (
            "sigmoid",
            "hinge",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
            "sigmoid_norm",
        )
    },
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
OPTIONS = {
    "forward kl": {"f_divergence_type": "forward_kl"},
    "js divergence": {"f_divergence_type": "js_divergence"},
    "alpha divergence": {"f_divergence_type": "alpha_divergence"},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "precompute": {"precompute_ref_log_probs": True},
    "precompute with ld_alpha": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "dropout": {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.1}},
    "truncation": {"max_length": 8},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
}


class GradientRecorder(TrainerCallback):
    """Keeps a copy of the gradients of every step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def run(trainer_class, config_class, folder, tmp_path, data=None, model=None, trainer_kwargs=None, **options):
    recorder = GradientRecorder()
    data = tiny.pairs() if data is None else data
    if "eval_strategy" in options:
        trainer_kwargs = {**(trainer_kwargs or {}), "eval_dataset": tiny.pairs(8, seed=1)}
    trainer = trainer_class(
        model=folder if model is None else model(),
        args=config_class(**tiny.training_options(tmp_path, **options)),
        train_dataset=data,
        callbacks=[recorder],
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer, recorder


EXPECTED = {}


def dpo_run(key, folder, tmp_path, *args, **kwargs):
    """The run of `DPOTrainer`, the same for all ways to switch cooling off."""
    if key not in EXPECTED:
        EXPECTED[key] = run(DPOTrainer, DPOConfig, folder, tmp_path / "dpo", *args, **kwargs)
    return EXPECTED[key]


def cwdpo_run(folder, tmp_path, *args, **kwargs):
    # Sharing prompts changes results by rounding
    return run(CWDPOTrainer, CWDPOConfig, folder, tmp_path / "cwdpo", *args, **{"share_prefix": False, **kwargs})


def assert_same_run(expected, actual):
    """Every number TRL logs, every gradient and every weight."""
    (dpo, dpo_gradients), (cwdpo, cwdpo_gradients) = expected, actual
    assert len(dpo_gradients.gradients) == len(cwdpo_gradients.gradients) == 5
    for step, (ours, theirs) in enumerate(zip(cwdpo_gradients.gradients, dpo_gradients.gradients, strict=True)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"gradients of step {step + 1}"
    assert any(gradient.abs().max() > 0 for gradient in dpo_gradients.gradients[-1].values())
    # Probes of the evaluation data are logged beside, and change nothing
    ours_without_probes = [entry for entry in cwdpo.state.log_history if "probe/ece" not in entry]
    for theirs, ours in zip(dpo.state.log_history, ours_without_probes, strict=True):
        for name, value in theirs.items():
            if not any(time in name for time in TIMES):
                assert ours[name] == value, f"{name} of step {theirs['step']}"
    parameters = dict(cwdpo.model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in dpo.model.named_parameters())


@pytest.mark.parametrize("uncooled", UNCOOLED.values(), ids=UNCOOLED.keys())
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_loss_types(text_model, tmp_path, options, uncooled):
    expected = dpo_run(str(options), text_model, tmp_path, **options)
    assert_same_run(expected, cwdpo_run(text_model, tmp_path, **options, **uncooled))


@pytest.mark.parametrize("uncooled", UNCOOLED.values(), ids=UNCOOLED.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(text_model, tmp_path, options, uncooled):
    data = tiny.pairs(conversational="max_length" not in options)
    expected = dpo_run(str(options), text_model, tmp_path, data, **copy.deepcopy(options))
    ours = cwdpo_run(text_model, tmp_path, data, **copy.deepcopy(options), **uncooled)
    assert_same_run(expected, ours)


@pytest.mark.gpu
@pytest.mark.parametrize("uncooled", UNCOOLED.values(), ids=UNCOOLED.keys())
def test_activation_offloading(text_model, tmp_path, uncooled):
    options = {"activation_offloading": True, "use_cpu": False}
    expected = dpo_run("activation offloading", text_model, tmp_path, **options)
    assert_same_run(expected, cwdpo_run(text_model, tmp_path, **options, **uncooled))


def test_aot_with_cooling_off(text_model, tmp_path):
    options = {"loss_type": ["aot"]}
    expected = dpo_run(str(options), text_model, tmp_path, **options)
    ours = cwdpo_run(text_model, tmp_path, **options, cooling_mode="off")
    assert_same_run(expected, ours)


@pytest.mark.parametrize("uncooled", UNCOOLED.values(), ids=UNCOOLED.keys())
class TestModels:
    def test_mixture_of_experts(self, moe_model, tmp_path, uncooled):
        expected = dpo_run("mixture of experts", moe_model, tmp_path)
        ours = cwdpo_run(moe_model, tmp_path, **uncooled)
        assert "aux_loss" in ours[0].state.log_history[0]
        assert_same_run(expected, ours)

    def test_new_adapter(self, text_model, tmp_path, uncooled):
        kwargs = {"trainer_kwargs": {"peft_config": LoraConfig(r=4, init_lora_weights=False)}}
        expected = dpo_run("new adapter", text_model, tmp_path, **kwargs)
        assert_same_run(expected, cwdpo_run(text_model, tmp_path, **kwargs, **uncooled))

    def test_prompt_tuning(self, text_model, tmp_path, uncooled):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        kwargs = {"trainer_kwargs": {"peft_config": config}}
        expected = dpo_run("prompt tuning", text_model, tmp_path, **kwargs)
        assert_same_run(expected, cwdpo_run(text_model, tmp_path, **kwargs, **uncooled))

    def test_existing_adapter_with_frozen_copy(self, text_model, tmp_path, uncooled):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(text_model)
        get_peft_model(base, LoraConfig(r=4, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")

        def model():
            base = AutoModelForCausalLM.from_pretrained(text_model)
            return PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)

        expected = dpo_run("existing adapter with frozen copy", text_model, tmp_path, model=model)
        ours = cwdpo_run(text_model, tmp_path, model=model, **uncooled)
        assert "ref" in ours[0].model.peft_config
        assert_same_run(expected, ours)

    def test_given_reference_model(self, text_model, tmp_path, uncooled):
        other = tiny.save_text_model(tmp_path / "reference", seed=1)

        def kwargs():
            return {"trainer_kwargs": {"ref_model": AutoModelForCausalLM.from_pretrained(other)}}

        expected = dpo_run("given reference model", text_model, tmp_path, **kwargs())
        assert_same_run(expected, cwdpo_run(text_model, tmp_path, **kwargs(), **uncooled))

    def test_stream(self, text_model, tmp_path, uncooled):
        expected = dpo_run("stream", text_model, tmp_path, tiny.pairs().to_iterable_dataset())
        data = tiny.pairs().to_iterable_dataset()
        assert_same_run(expected, cwdpo_run(text_model, tmp_path, data, **uncooled))

    def test_standard_format(self, text_model, tmp_path, uncooled):
        data = tiny.pairs(conversational=False)
        expected = dpo_run("standard format", text_model, tmp_path, data)
        assert_same_run(expected, cwdpo_run(text_model, tmp_path, data, **uncooled))

    def test_vision(self, vision_model, vision_pairs, tmp_path, uncooled):
        data = vision_pairs["train"]
        expected = dpo_run("vision", vision_model, tmp_path, data, max_length=None)
        ours = cwdpo_run(vision_model, tmp_path, data, max_length=None, **uncooled)
        assert_same_run(expected, ours)

    def test_vision_stream_with_adapter_in_bf16(self, vision_model, vision_pairs, tmp_path, uncooled):
        kwargs = {
            "max_length": None,
            "bf16": True,
            "trainer_kwargs": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
        }
        data = vision_pairs["train"]
        expected = dpo_run(
            "vision stream with adapter in bf16", vision_model, tmp_path, data.to_iterable_dataset(), **kwargs
        )
        stream = data.to_iterable_dataset()
        ours = cwdpo_run(vision_model, tmp_path, stream, **kwargs, **uncooled)
        assert_same_run(expected, ours)


def test_metrics_of_an_evaluation_with_logits(text_model, tmp_path):
    def compute_metrics(prediction):
        return {"mean_logit": float(prediction.predictions.mean())}

    kwargs = {"eval_strategy": "steps", "eval_steps": 5, "trainer_kwargs": {"compute_metrics": compute_metrics}}
    expected = dpo_run("metrics of an evaluation with logits", text_model, tmp_path, **kwargs)
    ours = cwdpo_run(text_model, tmp_path, **kwargs, **UNCOOLED["weights of 1"])
    assert_same_run(expected, ours)
    assert any("eval_mean_logit" in entry for entry in ours[0].state.log_history)


def test_off_does_not_share_prompts_by_itself(text_model, tmp_path):
    expected = dpo_run("plain", text_model, tmp_path)
    assert_same_run(expected, cwdpo_run(text_model, tmp_path, cooling_mode="off", share_prefix="auto"))
