"""`GentleNegativeSFTTrainer`: equals `SFTTrainer` without negatives, and an implementation from logits with them."""

import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTConfig, SFTTrainer

from trl_cwdpo import GentleNegativeSFTConfig, GentleNegativeSFTTrainer

TIMES = ("runtime", "per_second")


def run(folder, tmp_path, data=None, trainer_kwargs=None, **options):
    trainer = GentleNegativeSFTTrainer(
        folder,
        args=GentleNegativeSFTConfig(**tiny.training_options(tmp_path, **options)),
        train_dataset=tiny.pairs() if data is None else data,
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer


def run_sft(folder, tmp_path, data, trainer_kwargs=None, **options):
    trainer = SFTTrainer(
        folder,
        args=SFTConfig(**tiny.training_options(tmp_path, **options)),
        train_dataset=data,
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer


def chosen_completions(data):
    return data.rename_column("chosen", "completion").remove_columns("rejected")


def assert_same_run(sft, gentle, tolerance=0.0):
    for theirs, ours in zip(sft.state.log_history, gentle.state.log_history, strict=True):
        for name, value in theirs.items():
            if not any(time in name for time in TIMES):
                assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for ours, theirs in zip(gentle.model.parameters(), sft.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


WITHOUT_NEGATIVES = [{"negative_weight": 0.0}, {"negative_loss_type": "none"}]
SFT_OPTIONS = {
    "default": {},
    "dft": {"loss_type": "dft"},
    "bf16": {"bf16": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "shuffled": {"shuffle_dataset": True},
    "checkpointing": {"gradient_checkpointing": True},
    "truncated": {"max_length": 9},
}


@pytest.mark.parametrize("without", WITHOUT_NEGATIVES, ids=["weight 0", "none"])
@pytest.mark.parametrize("options", SFT_OPTIONS.values(), ids=SFT_OPTIONS.keys())
def test_without_negatives_equals_sft_bit_for_bit(text_model, tmp_path, options, without):
    data = tiny.pairs()
    sft = run_sft(text_model, tmp_path / "a", chosen_completions(data), **options)
    assert_same_run(sft, run(text_model, tmp_path / "b", data, **options, **without))


@pytest.mark.parametrize("without", WITHOUT_NEGATIVES, ids=["weight 0", "none"])
def test_without_negatives_equals_sft_on_other_models(text_model, moe_model, tmp_path, without):
    data = tiny.pairs()
    sft = run_sft(moe_model, tmp_path / "a", chosen_completions(data))
    assert_same_run(sft, run(moe_model, tmp_path / "b", data, **without))
    kwargs = {"trainer_kwargs": {"peft_config": LoraConfig(r=4, init_lora_weights=False)}}
    sft = run_sft(text_model, tmp_path / "c", chosen_completions(data), **kwargs)
    assert_same_run(sft, run(text_model, tmp_path / "d", data, **kwargs, **without))


def test_without_negatives_equals_sft_on_pictures(vision_model, vision_pairs, tmp_path):
    data = vision_pairs["train"]
    sft = run_sft(vision_model, tmp_path / "a", chosen_completions(data), max_length=None)
    # Collators place the padding differently, which moves the last bit
    ours = run(vision_model, tmp_path / "b", data, max_length=None, negative_weight=0.0)
    assert_same_run(sft, ours, tolerance=2e-6)


def logits_and_batch(trainer, rows=4):
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(rows)])
    model = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path).double()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits, batch


def token_nlls(logits, batch):
    """NLL of each completion token, row by row, from plain logits."""
    log_probs = F.log_softmax(logits, dim=-1)
    rows = []
    for row, ids in enumerate(batch["input_ids"]):
        positions = [t for t in range(1, len(ids)) if batch["completion_mask"][row, t]]
        rows.append(torch.stack([-log_probs[row, t - 1, ids[t]] for t in positions]))
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def trainer_for(folder, tmp_path, **options):
    return GentleNegativeSFTTrainer(
        folder,
        args=GentleNegativeSFTConfig(**tiny.training_options(tmp_path, **options)),
        train_dataset=tiny.pairs(),
    )


@pytest.mark.parametrize("reduction", ["sequence", "batch"])
@pytest.mark.parametrize(("kind", "floor", "ceiling"), [("hinge", 4.2, 9.0), ("band", 3.5, 3.9), ("band", 4.5, 5.0)])
def test_hinge_and_band_equal_an_implementation_from_logits(text_model, tmp_path, kind, floor, ceiling, reduction):
    trainer = trainer_for(
        text_model,
        tmp_path,
        negative_loss_type=kind,
        negative_weight=0.3,
        negative_nll_floor=floor,
        negative_nll_ceiling=ceiling,
        negative_reduction=reduction,
    )
    logits, batch = logits_and_batch(trainer)
    chosen, rejected = token_nlls(logits, batch)
    means = [row.mean() for row in rejected] if reduction == "sequence" else [torch.cat(rejected).mean()]
    penalties = [max(floor - mean, 0) + (max(mean - ceiling, 0) if kind == "band" else 0) for mean in means]
    expected = torch.cat(chosen).mean() + 0.3 * sum(penalties) / len(penalties)
    assert sum(penalties) > 0
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_smoothed_loss_equals_label_smoother(text_model, tmp_path, epsilon):
    trainer = trainer_for(text_model, tmp_path, negative_weight=0.2, negative_label_smoothing=epsilon)
    logits, batch = logits_and_batch(trainer)
    chosen, _ = token_nlls(logits, batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rejected_logits, rejected_labels = logits.chunk(2)[1], labels.chunk(2)[1]
    smoothed = LabelSmoother(epsilon)({"logits": rejected_logits}, rejected_labels, shift_labels=True)
    expected = torch.cat(chosen).mean() + 0.2 * smoothed
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(float(expected), rel=1e-6)


def smoothed_gradients(trainer, folder_model, batch, epsilon, weight):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rows = len(labels) // 2
    logits = folder_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:rows, :-1].transpose(1, 2), labels[:rows, 1:])
    loss = loss + weight * F.cross_entropy(
        logits[rows:, :-1].transpose(1, 2), labels[rows:, 1:], label_smoothing=epsilon
    )
    loss.backward()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    theirs = dict(folder_model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("kind", ["llama", "tied", "bias", "softcap"])
def test_smoothed_gradients_equal_cross_entropy_on_logits(tmp_path, kind):
    folder = tmp_path / "model"
    if kind == "softcap":
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=len(tiny.SPECIAL) + len(tiny.WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
            final_logit_softcapping=2.0,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
        )
        Gemma2ForCausalLM(config).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    else:
        tiny.save_text_model(folder, tie_word_embeddings=kind == "tied")

    def load():
        model = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
        if kind == "bias":
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.config.vocab_size))
        return model

    epsilon, weight = 0.3, 0.7
    args = GentleNegativeSFTConfig(
        **tiny.training_options(tmp_path), negative_weight=weight, negative_label_smoothing=epsilon
    )
    trainer = GentleNegativeSFTTrainer(load(), args=args, train_dataset=tiny.pairs())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    smoothed_gradients(trainer, load(), batch, epsilon, weight)


LOSSES = {
    "smoothed": {"negative_weight": 0.5},
    "unsmoothed": {"negative_weight": 0.5, "negative_label_smoothing": 0.0},
    "hinge": {"negative_loss_type": "hinge", "negative_weight": 0.5},
    "hinge of the batch": {
        "negative_loss_type": "hinge",
        "negative_weight": 0.5,
        "negative_reduction": "batch",
        "negative_nll_floor": 4.2,
    },
    "band of the batch": {
        "negative_loss_type": "band",
        "negative_weight": 0.5,
        "negative_reduction": "batch",
        "negative_nll_floor": 3.0,
        "negative_nll_ceiling": 3.9,
    },
    "band": {"negative_loss_type": "band", "negative_weight": 0.5},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_gradient_accumulation_changes_nothing(text_model, tmp_path, options):
    runs = [
        run(
            text_model,
            tmp_path / str(steps),
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            # Adam would blow up the last bit of gradients near zero
            optim="sgd",
            learning_rate=0.05,
            **options,
        )
        for steps in (1, 2, 4)
    ]
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in runs]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)
    for trainer in runs[1:]:
        for ours, theirs in zip(trainer.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_metrics(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, negative_weight=0.2, negative_label_smoothing=0.0)
    logits, batch = logits_and_batch(trainer)
    chosen, rejected = (torch.cat(rows).mean().item() for rows in token_nlls(logits, batch))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["gentle/chosen_nll"] == pytest.approx(chosen, rel=1e-6)
    assert metrics["gentle/rejected_nll"] == pytest.approx(rejected, rel=1e-6)
    assert metrics["gentle/negative_loss"] == pytest.approx(0.2 * rejected, rel=1e-6)


def test_auto_floor_and_ceiling_are_quartiles_of_the_initial_policy(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, negative_loss_type="band")
    logits, batch = logits_and_batch(trainer, rows=24)
    _, rejected = token_nlls(logits, batch)
    nll = [row.mean().item() for row in rejected]
    trainer.train()
    assert trainer.negative_nll_floor == pytest.approx(np.quantile(nll, 0.25), rel=1e-5)
    assert trainer.negative_nll_ceiling == pytest.approx(np.quantile(nll, 0.75), rel=1e-5)


def test_auto_floor_survives_a_resume(text_model, tmp_path):
    options = {"negative_loss_type": "hinge", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = run(text_model, tmp_path, **options)
    resumed = trainer_for(text_model, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.negative_nll_floor == whole.negative_nll_floor
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("stream", [False, True])
def test_trains_on_pictures(vision_model, vision_pairs, tmp_path, options, stream):
    data = vision_pairs["train"].to_iterable_dataset() if stream else vision_pairs["train"]
    trainer = run(vision_model, tmp_path, data, max_length=None, max_steps=2, **options)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("config", [LoraConfig(r=4), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)])
def test_adapters_train(text_model, tmp_path, config):
    trainer = run(text_model, tmp_path, trainer_kwargs={"peft_config": config}, learning_rate=0.05)
    losses = [entry["gentle/chosen_nll"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] != losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_mixture_of_experts_keeps_its_balancing_loss(moe_model, tmp_path):
    trainer = run(moe_model, tmp_path)
    assert all("aux_loss" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_evaluates_with_its_own_normalisation(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, per_device_eval_batch_size=4, negative_weight=0.2)
    metrics = trainer.evaluate(tiny.pairs(4))
    expected = metrics["eval_gentle/chosen_nll"] + metrics["eval_gentle/negative_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_smoothing_keeps_negatives_from_vanishing(text_model, tmp_path):
    """Trained long on one pair, the smoothed negative ends near its equilibrium while plain SFT lets it collapse."""
    row = {
        "prompt": [{"role": "user", "content": "what colour is the sky"}],
        "chosen": [{"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "assistant", "content": "green"}],
    }
    data = tiny.Dataset.from_list([row] * 4)
    options = {"max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 10}
    smoothed = run(text_model, tmp_path / "a", data, negative_label_smoothing=0.0, **options)
    plain = run(text_model, tmp_path / "b", data, negative_weight=1e-9, **options)

    def final_nll(trainer):
        return trainer.state.log_history[-2]["gentle/rejected_nll"]

    # Two tokens: "green", which settles at ln((1+γ)/γ) = 3.04, and the end token, which both responses share
    assert final_nll(smoothed) * 2 == pytest.approx(math.log(1.05 / 0.05), abs=0.15)
    assert final_nll(plain) > final_nll(smoothed) + 0.5


@pytest.mark.parametrize("argument", ["compute_loss_func", "formatting_func"])
def test_refuses_what_cannot_work(text_model, tmp_path, argument):
    args = GentleNegativeSFTConfig(**tiny.training_options(tmp_path))
    with pytest.raises(ValueError, match=argument):
        GentleNegativeSFTTrainer(text_model, args=args, train_dataset=tiny.pairs(), **{argument: lambda *a: None})
