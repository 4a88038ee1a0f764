"""Batches of the runs of one start: the same rows in the same order, and so collated once for all of them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
# Batches of large pictures are not worth their memory
MEMORY = 256 * 2**20


class Memory:
    """
    Batches by the rows that they were collated from.

    Args:
        size (`int`, *optional*, defaults to `MEMORY`):
            Bytes of tensors to keep; what comes after that is not kept.
    """

    def __init__(self, size: int = MEMORY) -> None:
        self.left = size
        self.batches: dict[bytes, dict[str, Any]] = {}

    def add(self, key: bytes, batch: dict[str, Any]) -> None:
        """Keep a batch, if there is room."""
        needed = sum(value.nbytes for value in batch.values() if torch.is_tensor(value))
        if needed <= self.left:
            self.left -= needed
            self.batches[key] = dict(batch)


class RememberingCollator:
    """
    Collates as another collator does, each set of rows once. Tensors of its batches must not be written to.

    Args:
        collator (`Callable`):
            The other collator, which must return the same for the same rows.
        memory ([`Memory`]):
            What is known already, by any collator that would return the same.
    """

    def __init__(self, collator: Collator, memory: Memory) -> None:
        self.collator, self.memory = collator, memory

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the collator has)
        if name == "collator":  # while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        key = _digest(examples)
        if key not in self.memory.batches:
            batch = self.collator(examples)
            self.memory.add(key, batch)
            return batch
        return dict(self.memory.batches[key])


def _digest(examples: Sequence[dict[str, Any]]) -> bytes:
    found = hashlib.sha256()
    for example in examples:
        for name, value in example.items():
            found.update(name.encode())
            # The text form of a picture is its address
            for part in value if name == "images" else [value]:
                pixels = getattr(part, "tobytes", None)
                found.update(repr((part.size, part.mode)).encode() + pixels() if pixels else repr(part).encode())
    return found.digest()
