"""What a long command shows: a headline and the time of each phase, a bar while it runs, and no library's chatter."""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import datasets
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

# Of our own package nothing is silenced: its warnings are collected and shown.
CHATTY = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "trl")
PACKAGE = "trl_cwdpo"
HEADLINE_WIDTH = 84


class Phases:
    """
    Headlines of the phases of a command, and how long each took.

    Args:
        bars (`bool`):
            Whether progress bars are shown. A headline is then printed when its phase ends, so that the bar has the
            line to itself; otherwise it is printed when the phase begins and the time follows.
    """

    def __init__(self, *, bars: bool) -> None:
        self.bars = bars
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, headline: str) -> Iterator[list[str]]:
        """
        One phase.

        Args:
            name (`str`):
                Key of its time in `seconds`.
            headline (`str`):
                What it does, in some words.

        Yields:
            `list[str]`: Lines to print below the headline, to be filled in the block.
        """
        start, details = time.perf_counter(), list[str]()
        if not self.bars:
            print(headline, end=" ", flush=True)
        yield details
        self.seconds[name] = round(time.perf_counter() - start, 1)
        duration = f"{self.seconds[name]:.1f} s"
        dots = "." * max(3, HEADLINE_WIDTH - len(headline) - len(duration) - 2)
        print(f"{headline} {dots} {duration}" if self.bars else f"{dots} {duration}")
        for line in details:
            print(f"  {line}")
        sys.stdout.flush()


class ProgressBar(TrainerCallback):
    """
    A bar over the optimizer steps of a trainer, in place of the one by transformers, which prints what is logged.

    Args:
        label (`str`):
            What is being trained.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar = progress_bar(state.max_steps, self.label)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move it."""
        self.bar.update(1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close it."""
        self.bar.close()


def progress_bar(total: int, label: str) -> Any:  # noqa: ANN401 (a tqdm, or a stand-in)
    """A bar of our own, subject to [`quiet`]."""
    return transformers_logging.tqdm(total=total, desc=label, unit="step")


@contextmanager
def quiet(*, bars: bool) -> Iterator[list[str]]:
    """
    Silence the libraries and restore them afterwards. Errors are still raised.

    Args:
        bars (`bool`):
            Whether progress bars that have a step for unit are shown: ours and the pretraining's. Those of loading and
            saving never are.

    Yields:
        `list[str]`: The warnings of this package, as they come.
    """
    notes = _Notes()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in CHATTY:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        stack.callback(transformers_logging.set_tqdm_hook, transformers_logging.set_tqdm_hook(_bar_filter(shown=bars)))
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        stack.enter_context(notes.attached())
        yield notes.texts


def _bar_filter(*, shown: bool) -> Callable[..., Any]:
    def create(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        ours = kwargs.get("unit") == "step" and not kwargs.get("disable")
        return factory(*args, **{**kwargs, "disable": not (shown and ours), "leave": False})

    return create


class _Notes(logging.Handler):
    """Collects the warnings of this package instead of printing them in the middle of a bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    @contextmanager
    def attached(self) -> Iterator[None]:
        logger = logging.getLogger(PACKAGE)
        propagates = logger.propagate
        logger.addHandler(self)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = propagates
            logger.removeHandler(self)
