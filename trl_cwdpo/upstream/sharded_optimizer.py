"""
What resuming under FSDP2 takes so that each weight's optimizer state is exactly what was saved, be it none.

An optimizer holds no state for a weight that has had no gradient: one behind the layer that is used, as in LLaVA's
vision tower, or that only pictures reach. PyTorch (`torch.distributed.checkpoint.state_dict`) fills an optimizer that
has no state yet by a step with zero gradients for all weights that require them, which
- before loading asks the checkpoint for states that it does not hold, and stops at the first. Weights that require no
  gradient are left out, so these weights require none meanwhile;
- before a checkpoint of the very beginning counts a step that has not been taken. It is taken back, after loading too.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.constants import OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

__all__ = ["KeepsOptimizerStates", "frozen", "owners_of_states", "weights_without_state"]

STATE = "optimizer.state."
# What wrappers add to the names of weights; PyTorch saves without it
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class KeepsOptimizerStates:
    """
    Mixin for a [`~transformers.Trainer`]: under FSDP2, a checkpoint can be resumed from whichever weights have got
    gradients before it, and saving one changes nothing. Elsewhere nothing is done.
    """

    accelerator: Any
    model: Any
    optimizer: Any
    state: Any
    is_fsdp_enabled: bool

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parent: Any = super()
        nothing_yet = self._has_fsdp2_optimizer() and not self.optimizer.state
        parent._save_optimizer_and_scheduler(output_dir)
        if nothing_yet:
            self.optimizer.state.clear()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        if checkpoint is None or not self._has_fsdp2_optimizer():
            parent._load_optimizer_and_scheduler(checkpoint)
            return
        saved = [owners_of_states(Path(checkpoint)) if self.accelerator.is_main_process else None]
        saved = broadcast_object_list(saved)
        with frozen([] if saved[0] is None else weights_without_state(self.model, saved[0])):
            parent._load_optimizer_and_scheduler(checkpoint)
        if self.state.global_step == 0:
            self.optimizer.state.clear()

    def _has_fsdp2_optimizer(self) -> bool:
        return bool(self.is_fsdp_enabled) and self.accelerator.state.fsdp_plugin.fsdp_version == 2


def owners_of_states(checkpoint: Path) -> list[str] | None:
    """
    The optimizer states that an FSDP2 checkpoint holds.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint, with shards or with whole states.

    Returns:
        `list[str]` or `None`: `<weight>.<state>` for each, or `<weight>` where states are whole; `None` if there are
        none to be found.
    """
    shards, whole = checkpoint / f"{OPTIMIZER_NAME}_0", checkpoint / f"{OPTIMIZER_NAME}.bin"
    if shards.is_dir():
        saved = FileSystemReader(shards).read_metadata().state_dict_metadata
        return [name.removeprefix(STATE) for name in saved if name.startswith(STATE)]
    if whole.is_file():
        return list(torch.load(whole, map_location="cpu", weights_only=True, mmap=True)["state"])
    return None


def weights_without_state(model: nn.Module, saved: Iterable[str]) -> list[nn.Parameter]:
    """
    Weights that are trained, but had no optimizer state yet when a checkpoint was saved.

    Args:
        model (`nn.Module`):
            The model that is about to be resumed.
        saved (`Iterable[str]`):
            As from [`owners_of_states`].

    Returns:
        `list[nn.Parameter]`: These weights; none of them if a state belongs to no weight of this model, which PyTorch
        is left to report.
    """
    weights = {_unwrapped(name): value for name, value in model.named_parameters() if value.requires_grad}
    owners = {_owner(name, weights) for name in saved}
    return [] if None in owners else [value for name, value in weights.items() if name not in owners]


@contextlib.contextmanager
def frozen(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let weights require no gradients within the context; those that required none stay so after it."""
    trained = [weight for weight in weights if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad = False
        yield
    finally:
        for weight in trained:
            weight.requires_grad = True


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _owner(name: str, weights: dict[str, nn.Parameter]) -> str | None:
    """The weight that a saved state is of."""
    while name and name not in weights:
        name = name.rpartition(".")[0]
    return name or None
