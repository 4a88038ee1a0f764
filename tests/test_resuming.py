"""Runs that are resumed: at their end, or with weights that are saved under other names than those of the modules."""

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, Trainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.upstream.resuming import saved_names

STAGES = [
    (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, {}),
    (CWDPOTrainer, CWDPOConfig, {"cooling_floor": -3.0, "cooling_temperature": 0.5}),
]


@pytest.mark.parametrize("hook", ["_init_training_state", "_load_from_checkpoint", "_load_best_model"])
def test_transformers_has_the_hooks(hook):
    """A new transformers without them would bring back the step too many, or the weights from before training."""
    assert callable(getattr(Trainer, hook))


@pytest.mark.parametrize(("trainer_class", "config_class", "options"), STAGES, ids=["stage 1", "stage 2"])
def test_a_finished_run_stays_finished(trainer_class, config_class, options, text_model, tmp_path):
    def train(resume_from):
        options_now = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = trainer_class(
            model=text_model,
            args=config_class(**tiny.training_options(tmp_path / "out", **options_now, **options)),
            # Six steps an epoch: the fourth does not end one
            train_dataset=tiny.pairs(24),
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    first = train(None)
    again = train(str(tmp_path / "out" / "checkpoint-4"))
    assert again.state.global_step == 4
    logged = [[entry["step"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (first, again)]
    assert logged == [[1, 2, 3, 4], [1, 2, 3, 4]]
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize(("trainer_class", "config_class", "options"), STAGES, ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("kind", ["pictures", "pictures, adapter", "mixture of experts"])
def test_weights_saved_under_other_names(
    kind, trainer_class, config_class, options, vision_model, vision_pairs, moe_model, tmp_path
):
    model = moe_model if kind == "mixture of experts" else vision_model
    data = tiny.pairs(24) if kind == "mixture of experts" else vision_pairs["train"]

    def train(resume_from=None):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_length": None}
        trainer = trainer_class(
            model=model,
            args=config_class(**tiny.training_options(tmp_path / "out", **settings, **options)),
            train_dataset=data,
            peft_config=LORA if "adapter" in kind else None,
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    whole = train()
    if "adapter" not in kind:
        names = saved_names(tmp_path / "out" / "checkpoint-2")
        assert not names <= whole.model.state_dict().keys(), "the case is not one"
    again = train(str(tmp_path / "out" / "checkpoint-2"))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, again)]
    assert losses[0] == losses[1]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize(("trainer_class", "config_class", "options"), STAGES, ids=["stage 1", "stage 2"])
def test_adapters_keep_their_type(trainer_class, config_class, options, text_model, tmp_path):
    """On quantised weights TRL trains adapters in bfloat16; PEFT loads them in float32."""

    def train(resume_from=None, **best):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **best}
        torch.manual_seed(0)
        trainer = trainer_class(
            model=text_model,
            args=config_class(**tiny.training_options(tmp_path / "out", **settings, **options)),
            train_dataset=tiny.pairs(24),
            eval_dataset=tiny.pairs(4, seed=1),
            peft_config=LORA,
        )
        for value in trained(trainer).values():
            value.data = value.data.to(torch.bfloat16)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    def trained(trainer):
        return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}

    whole, again = train(), train(str(tmp_path / "out" / "checkpoint-2"))
    best = train(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    for run in (whole, again, best):
        assert {value.dtype for value in trained(run).values()} == {torch.bfloat16}
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(again)[name]), name
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, again)]
    assert losses[0] == losses[1]


def test_the_best_weights_are_restored(vision_model, vision_pairs, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_length": None, "learning_rate": 0.05}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    trainer = GentleNegativeSFTTrainer(
        model=vision_model,
        args=GentleNegativeSFTConfig(
            **tiny.training_options(tmp_path / "out", **settings, **best, greater_is_better=True, probe_steps=0)
        ),
        train_dataset=vision_pairs["train"],
        eval_dataset=vision_pairs["test"],
    )
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step, "nothing had to be restored"
    kept = AutoModelForImageTextToText.from_pretrained(trainer.state.best_model_checkpoint, dtype=torch.float32)
    for name, weight in kept.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


def test_names_of_several_files(vision_model, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(vision_model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="300KB")
    assert (tmp_path / "several" / "model.safetensors.index.json").is_file()
    assert saved_names(tmp_path / "several") == saved_names(tmp_path / "one") != set()
    assert saved_names(tmp_path) == set()
