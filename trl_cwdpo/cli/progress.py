"""What a run shows of itself: a bar, one line a log, notes as they come, and a table at the end."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_cwdpo.cli.table import MISSING, format_table
from trl_cwdpo.cli.terminal import PACKAGE, progress_bar

Log = Mapping[str, Any]


class Column(NamedTuple):
    """
    A number that is shown of each log.

    Args:
        label (`str`):
            Its name.
        format (`str`):
            How it is written.
        keys (`tuple[str, ...]`):
            Metrics it is read from; the first that is there.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor to show it in its unit.
    """

    label: str
    format: str
    keys: tuple[str, ...]
    scale: float = 1.0

    def value(self, log: Log, prefix: str = "") -> float | None:
        """The number in a log, if it is there."""
        found = next((log[prefix + key] for key in self.keys if prefix + key in log), None)
        return None if found is None else float(found) * self.scale

    def text(self, value: float | None) -> str:
        """How it is written."""
        return MISSING if value is None or math.isnan(value) else format(value, self.format)


LEARNING_RATE = Column("lr", ".1e", ("learning_rate",))


def columns_of(command: str, args: Any) -> tuple[Column, ...]:  # noqa: ANN401 (either configuration)
    """
    What is shown of a stage's logs.

    Args:
        command (`str`):
            `"sft"` or `"cwdpo"`.
        args ([`~transformers.TrainingArguments`]):
            Its configuration.

    Returns:
        `tuple[Column, ...]`.
    """
    loss = Column("loss", ".4f", ("loss",))
    if command == "sft":
        return (
            loss,
            Column("chosen nll", ".4f", ("gentle/chosen_nll",)),
            Column("rejected nll", ".4f", ("gentle/rejected_nll",)),
        )
    # TRL's rewards are β times log-ratios; the log-ratio itself is in nats whatever β is
    inverse = 1.0 / args.beta if args.beta else math.nan
    return (
        loss,
        Column("margin", "+.4f", ("cooling/margin", "rewards/margins")),
        Column("chosen Δ", "+.3f", ("rewards/chosen",), inverse),
        Column("weight", ".3f", ("cooling/weight",)),
    )


class RunLog(TrainerCallback):
    """
    Shows a run on the main process.

    Args:
        columns (`Sequence[Column]`):
            What is shown of each log.
        label (`str`):
            What the bar is called.
    """

    def __init__(self, columns: Sequence[Column], label: str) -> None:
        self.columns = columns
        self.label = label
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = progress_bar(state.max_steps, self.label)
            self._bar.update(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line a log."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.say(f"step {_count(state)}  {self._cells(logs, (*self.columns, LEARNING_RATE))}")
        elif any(key.startswith("eval_") for key in logs):
            self.say(f"eval {_count(state)}  {self._cells(logs, self.columns, 'eval_')}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar; an error leaves it open otherwise."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _cells(self, logs: Log, columns: Sequence[Column], prefix: str = "") -> str:
        return "  ".join(f"{column.label} {column.text(column.value(logs, prefix))}" for column in columns)

    @contextmanager
    def showing_notes(self) -> Iterator[None]:
        """Show what this package logs, as it comes, for the duration."""
        handler = _Notes(self.say)
        logger = logging.getLogger(PACKAGE)
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self.say(f"{prefix}{record.getMessage()}")


def summary(history: Sequence[Log], columns: Sequence[Column]) -> str:
    """
    First, last and mean of what was logged.

    Args:
        history (`Sequence[Mapping]`):
            The trainer's logs.
        columns (`Sequence[Column]`):
            What to show of them.

    Returns:
        `str`: A table, or nothing where nothing was logged.
    """
    numbers = final_numbers(history, columns)
    evaluated = any("eval" in row for row in numbers.values())
    headers = ["", "first", "last", "mean", *(["last eval"] if evaluated else [])]
    names = ["first", "last", "mean", *(["eval"] if evaluated else [])]
    rows = [
        [column.label, *(column.text(numbers[column.label].get(name)) for name in names)]
        for column in columns
        if column.label in numbers
    ]
    return format_table(headers, rows) if rows else ""


def final_numbers(history: Sequence[Log], columns: Sequence[Column]) -> dict[str, dict[str, float]]:
    """
    The numbers of [`summary`].

    Args:
        history (`Sequence[Mapping]`):
            The trainer's logs.
        columns (`Sequence[Column]`):
            What to take of them.

    Returns:
        `dict[str, dict[str, float]]`: `first`, `last`, `mean` and, where there was an evaluation, `eval`, by label.
    """
    steps = [log for log in history if "loss" in log]
    found = {}
    for column in columns:
        values = [value for log in steps if (value := column.value(log)) is not None]
        evaluations = [value for log in history if (value := column.value(log, "eval_")) is not None]
        if values:
            row = {"first": values[0], "last": values[-1], "mean": math.fsum(values) / len(values)}
            found[column.label] = row | ({"eval": evaluations[-1]} if evaluations else {})
    return found


def _count(state: TrainerState) -> str:
    total = str(state.max_steps)
    return f"{state.global_step:>{len(total)}}/{total}"
