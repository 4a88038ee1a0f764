"""Runs that are resumed at their end, in the middle of an epoch."""

import pytest
import tiny
import torch
from transformers import Trainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer

STAGES = [
    (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, {}),
    (CWDPOTrainer, CWDPOConfig, {"cooling_floor": -3.0, "cooling_temperature": 0.5}),
]


def test_transformers_has_the_hook():
    """A new transformers without it would bring the step too many back."""
    assert callable(Trainer._init_training_state)


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
