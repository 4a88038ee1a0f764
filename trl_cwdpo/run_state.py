"""What a run found out at its start and must not find out again: kept in `trainer_state.json` of every checkpoint."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

TOKENS = "train_tokens"


class RunState(TrainerCallback, ExportableState):
    """
    Numbers frozen at the start of a run, such as a calibration, saved and restored with the trainer's own state.

    The trainer's state is the last file of a checkpoint to be written and is loaded on all ranks, so these numbers are
    there exactly where the checkpoint is complete.

    Args:
        values (`dict[str, Any]`, *optional*):
            Plain data for JSON.
    """

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        self.values = dict(values or {})

    def state(self) -> dict[str, Any]:
        """What transformers writes to `trainer_state.json`."""
        return {"args": {"values": self.values}, "attributes": {}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take over the values of the checkpoint that is resumed, if any."""
        callbacks: Any = state.stateful_callbacks  # declared as a list, which it is only before it is filled
        stored = (callbacks or {}).get(type(self).__name__)
        # A list where transformers found several callbacks of one name
        stored = stored[0] if isinstance(stored, list) else stored
        if stored:
            self.values.update(stored["args"]["values"])

    @classmethod
    def of(cls, trainer: Any) -> "RunState":  # noqa: ANN401 (any transformers trainer)
        """The trainer's own; looked up each time, since transformers may replace its callbacks on resume."""
        return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, cls))


class KeptTokenCount(TrainerCallback):
    """
    Lets `num_tokens` go on where a resumed run had got to: TRL counts it in memory only.

    Args:
        trainer ([`~transformers.Trainer`]):
            A TRL trainer that already has a [`RunState`].
    """

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the count of the checkpoint that is resumed, if any."""
        kept = RunState.of(self.trainer).values.get(TOKENS)
        if kept is not None:
            self.trainer._total_train_tokens = kept

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the count, before a checkpoint may be written."""
        RunState.of(self.trainer).values[TOKENS] = int(self.trainer._total_train_tokens)
