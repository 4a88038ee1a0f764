"""What is assumed of transformers' `Trainer`: it asks `_get_grad_norm` for the norm of each step's gradient, on all
processes and before anything of the step is logged or saved."""

import math
from typing import Any

__all__ = ["SeesGradientNorms"]


class SeesGradientNorms:
    """Mixin for a [`~transformers.Trainer`]: hands a gradient norm that is not finite to `on_bad_gradient`."""

    args: Any

    def on_bad_gradient(self, norm: float) -> None:
        """
        Called where the gradient of a step is not finite; does nothing.

        Args:
            norm (`float`):
                Its norm, infinite or NaN, the same on all processes.
        """

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:  # noqa: ANN401 (transformers' signature)
        parent: Any = super()
        norm = parent._get_grad_norm(model, grad_norm=grad_norm)
        # With float16, gradients overflow in the ordinary course of things, and such a step is left out
        if norm is not None and not self.args.fp16 and not math.isfinite(norm):
            self.on_bad_gradient(float(norm))
        return norm
