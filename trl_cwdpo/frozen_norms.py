"""Keep the statistics of frozen batch norms as they were loaded.

`model.train()` also puts a frozen vision tower in training mode, where a batch norm uses the statistics of the batch
and mixes them into its own, which are buffers: no gradient is needed. The tower drifts, the policy differs from a
reference that is in evaluation mode, and an adapter that is saved without the buffers does not fit the model it is
loaded on.
"""

import types
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class KeepsFrozenStatistics:
    """Mixin for a [`~transformers.Trainer`]: trains with [`keep_frozen_statistics`]."""

    model: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (transformers' arguments and output)
        """As [`~transformers.Trainer`]."""
        keep_frozen_statistics(self.model)
        parent: Any = super()
        return parent.train(*args, **kwargs)


def keep_frozen_statistics(model: nn.Module) -> int:
    """
    Let every batch norm whose weights are frozen stay in evaluation mode, whatever mode the model is put in.

    It is asked each time the mode changes: one that is unfrozen later trains again.

    Args:
        model (`nn.Module`):
            Model, wrapped or not.

    Returns:
        `int`: How many are frozen now.
    """
    frozen = 0
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            # On the instance: `nn.Module.train` asks each child
            module.train = types.MethodType(_train, module)  # type: ignore[method-assign]
            module.train(module.training)
            frozen += _is_frozen(module)
    return frozen


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _train(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 (torch's signature)
    return nn.Module.train(module, mode and not _is_frozen(module))
