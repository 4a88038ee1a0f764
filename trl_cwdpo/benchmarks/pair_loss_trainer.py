"""A trainer for losses that are functions of a pair's two log-ratios.

The only change with respect to [`~trl_cwdpo.CWDPOTrainer`] is the loss: metrics, references, negatives and everything
else are its own. It runs in constant mode with weight 1, which is DPO, and the loss that comes out is replaced.
"""

from collections.abc import Callable
from typing import Any, cast

import torch

from trl_cwdpo import objectives, upstream
from trl_cwdpo.cwdpo_trainer import CWDPOTrainer

PairLoss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
# What the configuration of a [`PairLossTrainer`] must say, so that the metrics are those of uncooled pairs
OPTIONS: dict[str, Any] = {"cooling_mode": "constant", "cooling_constant": 1.0}


class PairLossTrainer(CWDPOTrainer):
    """
    [`~trl_cwdpo.CWDPOTrainer`] with another loss.

    Args:
        pair_loss (`Callable`):
            Takes Δ_w and Δ_l of shape `(B,)`, nats per sequence, and β; returns losses of shape `(B,)`.
        **kwargs (`Any`):
            Arguments of [`~trl_cwdpo.CWDPOTrainer`]; `args` with `OPTIONS`.

    Raises:
        ValueError: If `args` says otherwise, or the model has an auxiliary loss, which would be lost.
    """

    def __init__(self, *, pair_loss: PairLoss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in OPTIONS.items():
            if getattr(self.args, name) != value:
                raise ValueError(
                    f"`{name}`={getattr(self.args, name)!r} would cool a loss that replaces the cooled one; a "
                    f"PairLossTrainer needs `{name}={value!r}`."
                )
        if self.aux_loss_enabled:
            raise ValueError("The model adds an auxiliary loss, which a PairLossTrainer would leave out; turn it off.")
        self.pair_loss = pair_loss
        self._logratios: tuple[torch.Tensor, torch.Tensor] | None = None

    def _cool_pairs(
        self,
        outputs: upstream.FusedCausalLMOutput,
        completion_mask: torch.Tensor,
        references: tuple[torch.Tensor, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        mask = completion_mask[..., 1:]
        logps = objectives.sequence_logps(upstream.per_token_logps(outputs, mask.size(1)), mask, self.ld_alpha)
        chosen, rejected = logps.chunk(2)
        self._logratios = chosen - references[0], rejected - references[1]
        return super()._cool_pairs(outputs, completion_mask, references)

    def _compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,  # noqa: FBT001 (TRL's signature)
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        result = super()._compute_loss(model, inputs, return_outputs)
        chosen, rejected = cast(tuple[torch.Tensor, torch.Tensor], self._logratios)
        self._logratios = None
        loss = self.pair_loss(chosen, rejected, self.beta).mean()
        return (loss, result[1]) if isinstance(result, tuple) else loss
