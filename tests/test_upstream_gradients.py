"""What `upstream.gradients` assumes of transformers' `Trainer`."""

import pytest
import tiny
import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cwdpo.upstream.gradients import SeesGradientNorms


class Order(TrainerCallback):
    """Notes when a step's gradient is used, and when a step is over."""

    def __init__(self, calls):
        self.calls = calls

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.calls.append("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.calls.append("end")


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_norm_of_a_step_is_asked_for_before_its_gradient_is_used(text_model, tmp_path, max_grad_norm):
    calls, norms, bad = [], [], []

    class Watched(SeesGradientNorms, DPOTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            calls.append("norm")
            norms.append(float(super()._get_grad_norm(model, grad_norm=grad_norm)))
            return norms[-1]

        def on_bad_gradient(self, norm):
            bad.append(norm)

    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    args = DPOConfig(**tiny.training_options(tmp_path, max_grad_norm=max_grad_norm, **options))
    trainer = Watched(text_model, args=args, train_dataset=tiny.pairs(), callbacks=[Order(calls)])
    trainer.train()
    assert calls == ["norm", "optimizer", "end"] * 2
    assert norms == [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert bad == []
    for number in (float("inf"), float("nan")):
        trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(number))
    assert str(bad) == "[inf, nan]"
    # A scaled float16 loss overflows now and then, and such a step is left out
    args.fp16 = True
    trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(float("inf")))
    assert len(bad) == 2
