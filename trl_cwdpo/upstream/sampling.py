"""What this package assumes about how transformers orders training rows."""

from typing import Any

from torch.utils.data import Sampler

__all__ = ["use_sampler"]


def use_sampler(trainer: Any, sampler: Sampler[int]) -> None:  # noqa: ANN401 (any transformers trainer)
    """Let a trainer's next dataloader for training take its rows in the order of `sampler`."""
    trainer._get_train_sampler = lambda dataset=None: sampler
