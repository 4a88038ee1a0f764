"""Runs that stop on a signal and lose nothing: a checkpoint after the step, one decision for all processes."""

import signal
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .interrupts import SignalWatch


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


class StopsOnSignals:
    """
    Mixin for a [`~transformers.Trainer`]: what `enable_jit_checkpoint=True` does.

    On SIGTERM, SIGUSR1 or Ctrl-C the step that is going on is finished, a checkpoint saved, and `train` returns, with
    the name of the signal in `stopped_by`. One process that has got a signal stops all, after the same step. It takes
    the place of transformers' own way, which knows SIGTERM only, waits three seconds, and lets each process stop by
    itself.
    """

    args: Any
    accelerator: Any
    # Name of the signal that has stopped the last call of `train`, such as "SIGTERM", or None
    stopped_by: str | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the parent's own)
        """As the parent."""
        parent: Any = super()
        self.stopped_by = None
        if not self.args.enable_jit_checkpoint:
            return parent.train(*args, **kwargs)
        trainer: Any = self
        watch = SignalWatch(announces=self.accelerator.is_main_process)
        stopper = StopOnSignal(watch, self.accelerator)
        trainer.add_callback(stopper)
        try:
            with watch.listening():
                return parent.train(*args, **kwargs)
        finally:
            trainer.remove_callback(stopper)
            if stopper.stopped_by is not None:
                self.stopped_by = signal.Signals(stopper.stopped_by).name
