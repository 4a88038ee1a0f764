"""A loss that is not finite stops the run before it reaches the weights, and says where it comes from."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.faults import NonFiniteGradientError, NonFiniteLossError

POISON = "snow"  # its embedding is made infinite, so only the pairs that hold it are bad
STAGES = {
    "cooled": (CWDPOTrainer, CWDPOConfig, {"cooling_floor": -3.9, "cooling_temperature": 0.3}),
    "uncooled": (CWDPOTrainer, CWDPOConfig, {"cooling_mode": "off"}),
    "stage 1": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, {}),
    "stage 1, chosen only": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, {"negative_weight": 0.0}),
}


class Poison(TrainerCallback):
    """Breaks the model before a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step == self.step:
            token = processing_class.convert_tokens_to_ids(POISON)
            with torch.no_grad():
                model.get_input_embeddings().weight[token] = float("nan")


def pairs_with_poison(row: int) -> tiny.Dataset:
    rows = [row for row in tiny.pairs(60).to_list() if POISON not in str(row)][:24]
    rows[row]["chosen"][0]["content"] = f"looks {POISON} looks"
    return tiny.Dataset.from_list(rows)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_names_step_rows_and_checkpoint(text_model, tmp_path, stage):
    trainer_class, config_class, options = stage
    row = 9  # third step of batches of 4, in order
    args = config_class(
        **tiny.training_options(tmp_path, save_strategy="steps", save_steps=1, train_sampling_strategy="sequential"),
        **options,
    )
    data = pairs_with_poison(row)
    trainer = trainer_class(text_model, args=args, train_dataset=data, callbacks=[Poison(0)])
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    message = str(error.value)
    assert "step 3 is nan" in message
    assert f"row {row} of the training dataset" in message
    assert f"looks {POISON} looks" in message
    assert "row 8" not in message
    assert str(tmp_path / "checkpoint-2") in message
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    assert all("embed" in name or "lm_head" in name for name in bad), "the step must not have reached the weights"


def test_a_pair_with_a_sampled_negative_is_named_by_its_prompt_and_chosen_response(text_model, tmp_path):
    args = CWDPOConfig(
        **tiny.training_options(tmp_path, train_sampling_strategy="sequential"),
        cooling_mode="off",
        dataset_negative_fraction=0.0,
        negative_max_completion_length=6,
    )
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=pairs_with_poison(5))
    sampled = trainer._negatives._sampled

    def then_poison(rows):
        pairs = sampled(rows)
        Poison(trainer.state.global_step).on_step_begin(
            args, trainer.state, None, model=trainer.model, processing_class=trainer._tokenizer
        )
        return pairs

    trainer._negatives._sampled = then_poison
    with pytest.raises(NonFiniteLossError, match=rf"row \d of the training dataset.*looks {POISON} looks") as error:
        trainer.train()
    assert "row 5 of the training dataset" in str(error.value)
    assert "not found" not in str(error.value)
    assert trainer.train_dataset[5]["rejected"][0]["content"] not in str(error.value)


class BreakGradient(TrainerCallback):
    """Makes the gradient of one step infinite or NaN, and leaves the loss alone."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value, self.hook = step, value, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            weight = model.lm_head.weight
            self.hook = weight.register_hook(lambda gradient: torch.full_like(gradient, self.value))


@pytest.mark.parametrize("stage", ["uncooled", "stage 1"])
@pytest.mark.parametrize(("value", "max_grad_norm"), [(float("inf"), 1.0), (float("nan"), 0.0)])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(text_model, tmp_path, stage, value, max_grad_norm):
    trainer_class, config_class, options = STAGES[stage]
    saving = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": max_grad_norm}
    args = config_class(**tiny.training_options(tmp_path, **saving), **options)
    breaks = BreakGradient(2, value)
    trainer = trainer_class(text_model, args=args, train_dataset=tiny.pairs(), callbacks=[breaks])
    with pytest.raises(NonFiniteGradientError, match=f"training step 3 is not finite .its norm is {value}") as error:
        trainer.train()
    assert breaks.hook is not None
    assert str(tmp_path / "checkpoint-2") in str(error.value)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not (tmp_path / "checkpoint-3").exists()


def test_no_checkpoint_yet(text_model, tmp_path):
    args = CWDPOConfig(**tiny.training_options(tmp_path / "none"), cooling_mode="off")
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet"):
        trainer.train()


def test_overflow_of_the_loss_alone_names_every_row(text_model, tmp_path):
    args = CWDPOConfig(**tiny.training_options(tmp_path), cooling_mode="off", loss_type=["sppo_hard"], beta=1e-30)
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert str(error.value).count("of the training dataset") == 4


def test_stream_names_the_text(text_model, tmp_path):
    args = CWDPOConfig(**tiny.training_options(tmp_path), cooling_mode="off")
    data = pairs_with_poison(0).to_iterable_dataset()
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=data, callbacks=[Poison(0)])
    with pytest.raises(NonFiniteLossError, match=rf"not found in the dataset \(chosen 'looks {POISON} looks'"):
        trainer.train()


def test_calibration_on_a_broken_model(text_model, tmp_path):
    args = CWDPOConfig(**tiny.training_options(tmp_path))
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        trainer.train()


def test_evaluation_does_not_stop(text_model, tmp_path):
    args = CWDPOConfig(**tiny.training_options(tmp_path), cooling_mode="off")
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    assert trainer.evaluate(tiny.pairs(4)).keys() >= {"eval_loss"}
