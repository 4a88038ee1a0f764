"""Context managers that leave a run exactly as they found it: random state and train/eval mode."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and its CUDA or XPU devices on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    kind = "xpu" if torch.xpu.is_available() else "cuda"
    devices = list(range(torch.accelerator.device_count())) if torch.get_device_module(kind).is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Put `model` in eval mode, and every module back in the mode it was in on exit.

    Args:
        model (`nn.Module`):
            Model, wrapped or not.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
