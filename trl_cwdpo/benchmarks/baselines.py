r"""Losses that others propose against the same collapse, as pure functions of a pair's log-ratios.

Only what TRL has no loss type for stands here; RPO and MPO are sums of TRL's own (see `methods`). Notation as in
`objectives`: Δ_w and Δ_l are the log-ratios of chosen and rejected response to the reference, nats per sequence.
"""

import math

import torch
import torch.nn.functional as F


def bdpo_loss(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float, mixture: float = 0.5
) -> torch.Tensor:
    """
    Bounded DPO: −log σ(β(Δ_w − log((λπ + (1−λ)π_ref)/π_ref))), of *Rethinking DPO: The Role of Rejected Responses in
    Preference Misalignment* (arXiv 2506.12725).

    The mixture with the reference keeps the rejected term above log(1−λ): pushing the rejected response down further
    gains nothing.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_w, nats per sequence.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_l, nats per sequence.
        beta (`float`):
            β.
        mixture (`float`, *optional*, defaults to `0.5`):
            λ in (0, 1).

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    bounded = torch.logaddexp(
        rejected_logratios + math.log(mixture), torch.full_like(rejected_logratios, math.log1p(-mixture))
    )
    return -F.logsigmoid(beta * (chosen_logratios - bounded))


def dpop_loss(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float, penalty: float = 50.0
) -> torch.Tensor:
    """
    DPO-Positive: −log σ(β(Δ_w − Δ_l − λ·max(0, −Δ_w))), of *Smaug: Fixing Failure Modes of Preference Optimisation
    with DPO-Positive* (arXiv 2402.13228).

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_w, nats per sequence.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_l, nats per sequence.
        beta (`float`):
            β.
        penalty (`float`, *optional*, defaults to `50.0`):
            λ, the paper's choice.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    margin = chosen_logratios - rejected_logratios - penalty * torch.relu(-chosen_logratios)
    return -F.logsigmoid(beta * margin)


def cal_dpo_loss(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Calibrated DPO: −log σ(Δ_w − Δ_l) + (Δ_w − 1/(2β))² + (Δ_l + 1/(2β))², of *Cal-DPO: Calibrated Direct Preference
    Optimization for Language Model Alignment* (arXiv 2412.14516).

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_w, nats per sequence.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_l, nats per sequence.
        beta (`float`):
            β: the log-ratios are drawn to ±1/(2β).

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    target = 0.5 / beta
    contrast = -F.logsigmoid(chosen_logratios - rejected_logratios)
    return contrast + (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2
