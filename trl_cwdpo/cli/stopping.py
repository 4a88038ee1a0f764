"""The trainer's side of interruptions, and the checkpoints to continue from."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.interrupts import SignalWatch

TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0", "none", "")
STATE_FILE = "trainer_state.json"


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


def checkpoint_to_resume(output_dir: str, value: Any) -> str | None:  # noqa: ANN401 (YAML gives text or a boolean)
    """
    The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir (`str`):
            The output folder.
        value (`str` or `bool`, *optional*):
            The option: a folder, or `true` for the last checkpoint in the output folder.

    Returns:
        `str` or `None`: Its folder, or `None` to start anew.

    Raises:
        CommandError: If it is not there.
    """
    text = str(value).lower()
    if value is None or text in FALSE:
        return None
    if text not in TRUE:
        return _complete(Path(str(value)))
    last = last_checkpoint(output_dir)
    if last is None:
        raise CommandError(
            f"`resume_from_checkpoint`={value}, but {output_dir} holds no complete checkpoint. Leave the option out "
            "to start anew, or name the folder of a checkpoint."
        )
    return str(last)


def last_checkpoint(output_dir: str) -> Path | None:
    """The last checkpoint that was written to its end: the trainer's state is its last file."""
    found = [
        (int(match[1]), folder)
        for folder in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / STATE_FILE).is_file()
    ]
    return max(found)[1] if found else None


def _complete(folder: Path) -> str:
    if not folder.is_dir():
        raise CommandError(
            f"`resume_from_checkpoint`={folder} is no folder. Name the folder of a checkpoint, or `true` for the last "
            "one in the output folder."
        )
    if not (folder / STATE_FILE).is_file():
        raise CommandError(
            f"`resume_from_checkpoint`={folder} holds no {STATE_FILE}, so it is no complete checkpoint. Name another, "
            "or `true` for the last complete one in the output folder."
        )
    return str(folder)
