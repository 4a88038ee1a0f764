"""What a benchmark asks of a task: a base model, pairs to train on, rows to measure on, and somebody who scores."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from trl_cwdpo.benchmarks.matrix import Base, Data


class Task(Protocol):
    """A task. Its methods return the same for the same arguments."""

    name: str
    # What the rows of its tables are scored by, for headlines
    score_name: str
    # Measures of its own that tables show, with headline and decimals
    own_measures: Mapping[str, tuple[str, int]]
    # Scores sampled responses in training, in the signature of TRL's reward functions
    reward: Callable[..., list[float]]

    def build_base(self, folder: Path, base: Base) -> Path:
        """The folder of the pretrained model and its processor, built below `folder` unless it is there."""
        ...

    def training_pairs(self, data: Data, seed: int) -> tuple[Dataset, Dataset]:
        """Preference pairs of stage 1 and of stage 2, without label noise."""
        ...

    def held_out(self, data: Data) -> dict[str, Dataset]:
        """The splits `validation` and `test`, the same for every seed, with no picture of the training pairs."""
        ...

    def respond(self, model: Any, processor: Any, rows: Dataset) -> list[str]:  # noqa: ANN401 (model and processor)
        """One greedy response a row."""
        ...

    def score(self, responses: Sequence[str], rows: Dataset) -> list[float]:
        """How good each response is, in [0, 1]."""
        ...

    def measure(self, model: Any, processor: Any, rows: Dataset, responses: Sequence[str]) -> Mapping[str, float]:  # noqa: ANN401
        """Measures of its own, by name; may be empty."""
        ...
