"""The trainer's side of interruptions."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_cwdpo.cli.interrupts import SignalWatch


class StopOnSignal(TrainerCallback):
    """
    Saves a checkpoint and stops at the end of the step in which any process has got a signal.

    Args:
        watch ([`SignalWatch`]):
            Where signals of this process are noted.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's, to agree with the other processes.
    """

    def __init__(self, watch: SignalWatch, accelerator: Any) -> None:  # noqa: ANN401 (untyped library)
        self.watch = watch
        self.accelerator = accelerator
        self.stopped_by: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide, on all processes alike."""
        number = self._agreed()
        # After the last step there is nothing left to interrupt
        if not number or state.global_step >= state.max_steps:
            return
        self.stopped_by = number
        control.should_training_stop = control.should_save = control.should_log = True
        control.should_evaluate = False
        # No earlier checkpoint goes for this one, nor this one for the best
        args.save_total_limit = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing more is due after the checkpoint."""
        if self.stopped_by is not None:
            control.should_save = control.should_evaluate = False

    def _agreed(self) -> int:
        received = self.watch.received or 0
        if self.accelerator.num_processes == 1:
            return received
        everywhere = self.accelerator.gather(torch.tensor([received], device=self.accelerator.device))
        return int(everywhere.max())
