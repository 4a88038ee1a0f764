"""Checkpoints that are complete or passed over, and runs that take exactly the steps they are to take.

What is assumed of transformers' `Trainer`: `train` takes the folder of a checkpoint; `_save_checkpoint` writes
`trainer_state.json` last, after each process has saved its random state with `_save_rng_state`, and only then deletes
older checkpoints; `_load_from_checkpoint` and `_load_best_model` hand the saved names to `load_state_dict`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from trl_cwdpo.checkpoints import CheckpointError, broken_checkpoints, checkpoint_to_resume, last_checkpoint

from .quantized import kept_dtypes
from .sharded_optimizer import KeepsOptimizerStates

logger = logging.getLogger(__name__)


class FinishedRunStaysFinished:
    """
    Mixin for a [`~transformers.Trainer`]: a run resumed from the checkpoint of its last step trains no further.

    transformers looks at the number of steps after each step only, so that such a run would take one step too many,
    unless its last step ends an epoch. A run killed between its last checkpoint and the end of the program is resumed
    in just this way.
    """

    state: Any

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        parent: Any = super()
        trained = parent._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained


class LoadsWhatWasSaved:
    """
    Mixin for a [`~transformers.Trainer`]: a checkpoint is loaded under the names that it was saved with, and what is
    trained keeps its type.

    `save_pretrained` writes weights under the names of an architecture's published checkpoints, which are not those of
    the modules for many vision-language models and mixtures of experts. `Trainer` looks for the modules' names only,
    warns of missing keys and goes on with the weights that it happens to have: those from before training.
    """

    args: Any
    model: Any
    state: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401
        parent: Any = super()
        target = self.model if model is None else model
        with kept_dtypes(target):
            if not self._load_renamed(resume_from_checkpoint, target):
                parent._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        parent: Any = super()
        with kept_dtypes(self.model):
            if not self._load_renamed(self.state.best_model_checkpoint, self.model):
                parent._load_best_model()

    def _load_renamed(self, folder: str, model: Any) -> bool:  # noqa: ANN401 (a model of transformers)
        # Sharded runs and adapters keep the names of the modules
        if is_peft_model(model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        if saved_names(Path(folder)) <= model.state_dict().keys():
            return False
        model.load_state_dict(type(model).from_pretrained(folder, dtype="auto").state_dict())
        return True


def saved_names(folder: Path) -> set[str]:
    """The names of the weights in a folder of safetensors, in one file or in several."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())


class CompleteCheckpoints(LoadsWhatWasSaved, KeepsOptimizerStates):
    """
    Mixin for a [`~transformers.Trainer`]: what it resumes from, and leaves behind, are complete checkpoints.

    `resume_from_checkpoint=True` takes the last checkpoint that was written to its end and names the broken ones it
    passes over; `"auto"` does the same and starts anew where there is none, so that the same script can be started
    again and again. A checkpoint is complete only when every process has written its part.
    """

    args: Any
    accelerator: Any
    state: Any

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 (transformers' signature)
        *args: Any,
        **kwargs: Any,
    ) -> Any:  # noqa: ANN401 (the parent's own)
        """
        As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint; `True` for the last complete one in `output_dir`; `"auto"` for the same, or a
                new run where there is none.
            *args (`Any`):
                For the parent.
            **kwargs (`Any`):
                For the parent.

        Raises:
            CheckpointError: If there is no such checkpoint, or it was not written to its end, or one of this run
                cannot be written.
        """
        parent: Any = super()
        return parent.train(self._agreed_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def _agreed_checkpoint(self, value: Any) -> str | None:  # noqa: ANN401
        """One decision for all processes, which may see the folder at different moments."""
        decision: list[Any] = [None, None]
        if value and self.accelerator.is_main_process:
            try:
                decision[0] = checkpoint_to_resume(self.args.output_dir, value, self.accelerator.num_processes)
            except CheckpointError as error:
                decision[1] = str(error)
            if str(value) != decision[0]:
                for folder, fault in broken_checkpoints(self.args.output_dir, self.accelerator.num_processes).items():
                    logger.warning("Passing over the checkpoint %s: %s.", folder, fault)
        folder, fault = broadcast_object_list(decision) if value else decision
        if fault is not None:
            raise CheckpointError(fault)
        return folder

    def _save_rng_state(self, output_dir: str) -> None:
        parent: Any = super()
        parent._save_rng_state(output_dir)
        # What comes next says that the checkpoint is complete, and deletes older ones
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        try:
            parent._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_about_writing(error):
                raise
            good = last_checkpoint(self.args.output_dir, self.accelerator.num_processes)
            advice = f"The last complete one is {good}" if good else "There is no complete one"
            raise CheckpointError(
                f"The checkpoint of step {self.state.global_step} cannot be written to "
                f"{Path(self.args.output_dir).absolute()}: {error}. {advice}. Make room, or the folder writable, and "
                "continue with `resume_from_checkpoint='auto'`; `save_total_limit` and `save_only_model` need less "
                "room."
            ) from error


def _is_about_writing(error: BaseException | None) -> bool:
    """Whether an error of saving comes from the disk; torch and safetensors wrap those of the system in their own."""
    marks = ("PytorchStreamWriter", "inline_container", "iostream error")
    while error is not None:
        if isinstance(error, OSError | SafetensorError) or any(mark in str(error) for mark in marks):
            return True
        error = error.__cause__ or error.__context__
    return False
