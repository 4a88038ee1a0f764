"""The order in which a run meets its pairs, by how hard their rejected responses are."""

import base64
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class OrderSampler(Sampler[int]):
    """
    Goes through pairs in an order that is asked for when an epoch begins.

    Where the order leaves pairs out, it is gone through again until an epoch has as many pairs as ever, so that the
    number of steps and the learning rate's schedule stay what they are.

    Args:
        length (`int`):
            Pairs an epoch.
        order (`Callable`):
            Returns the indices of the pairs to train on, in order.
    """

    def __init__(self, length: int, order: Callable[[], np.ndarray]) -> None:
        self.length, self.order = length, order

    def __len__(self) -> int:
        """Pairs an epoch."""
        return self.length

    def __iter__(self) -> Iterator[int]:
        """Indices of the pairs."""
        order = self.order()
        return iter(np.resize(order, self.length).tolist())


def packed(values: np.ndarray) -> str:
    """Numbers as text for JSON, four bytes each."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """Inverse of [`packed`]."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)
