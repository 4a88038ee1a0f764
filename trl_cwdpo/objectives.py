"""The method: every loss of Cooling-Weighted DPO as a pure function of tensors.

Source: *Learning Dynamics of VLM Finetuning* (arXiv 2510.11978), the "paper" below. What the paper leaves open, and
what this project adds, is marked **ours** where it stands. Notation: a batch holds `B` preference pairs (x, y_w, y_l)
of context, chosen and rejected response; S is the log-probability of a response (nats per sequence), L its number of
tokens, ℓ̄ = S / L (nats per token), Δ = S_policy − S_reference, w the cooling weight of the rejected response.

Nothing here depends on a trainer. All functions are differentiable unless they say otherwise.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

CoolingMode = Literal["loss", "gate", "constant", "off"]
NegativeLossType = Literal["smoothed", "hinge", "band", "none"]


def sequence_logps(
    per_token_logps: torch.Tensor, completion_mask: torch.Tensor, ld_alpha: float | None = None
) -> torch.Tensor:
    r"""
    Log-probability of each response, \\( S = \sum_t \log \pi(y_t) \\).

    Args:
        per_token_logps (`torch.Tensor` of shape `(2B, T)`):
            Log-probability of each token in nats, zero outside the completion; chosen rows first.
        completion_mask (`torch.Tensor` of shape `(2B, T)`):
            1 on completion tokens, 0 elsewhere, aligned with `per_token_logps`.
        ld_alpha (`float`, *optional*):
            Weight of the tokens past the length of the shorter response of the pair (LD-DPO, arXiv 2409.06411).

    Returns:
        `torch.Tensor` of shape `(2B,)`: nats per sequence.
    """
    if ld_alpha is None:
        return per_token_logps.sum(dim=1)
    position = completion_mask.cumsum(dim=1)
    chosen_lengths, rejected_lengths = completion_mask.sum(dim=1).chunk(2)
    beyond = position > torch.minimum(chosen_lengths, rejected_lengths).repeat(2).unsqueeze(1)
    # Two sums, as `DPOTrainer` takes them, so that both agree to the last bit
    shared = (per_token_logps * ((position > 0) & ~beyond)).sum(dim=1)
    return shared + ld_alpha * (per_token_logps * beyond).sum(dim=1)


def average_logps(per_token_logps: torch.Tensor, completion_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Average token log-probability of each response, \\( \bar\ell = S / L \\), and its length.

    Args:
        per_token_logps (`torch.Tensor` of shape `(N, T)`):
            Log-probability of each token in nats. Values outside the mask do not count.
        completion_mask (`torch.Tensor` of shape `(N, T)`):
            1 on completion tokens, 0 elsewhere.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: ℓ̄ of shape `(N,)` in nats per token, summed in float32 or wider, and L of
        shape `(N,)` in tokens, at least 1.
    """
    mask = completion_mask.bool()
    lengths = mask.sum(dim=1).clamp(min=1)
    wide = per_token_logps if per_token_logps.dtype == torch.float64 else per_token_logps.float()
    return wide.masked_fill(~mask, 0.0).sum(dim=1) / lengths, lengths


def cooling_weight(
    avg_logps: torch.Tensor,
    floor: float | torch.Tensor,
    temperature: float | torch.Tensor,
    min_weight: float = 0.0,
    *,
    stop_gradient: bool = True,
) -> torch.Tensor:
    r"""
    Cooling weight of each rejected response, \\( w = \sigma((\bar\ell_\theta(y_l|x) - \ell_{floor}) / \tau) \\).

    A response far below the floor is an easy negative and gets a weight near 0; one above it is hard and gets a weight
    near 1; at the floor the weight is exactly ½. The paper's derivation treats w as a constant; whether its code
    detaches is unknown.

    Args:
        avg_logps (`torch.Tensor` of shape `(B,)`):
            ℓ̄ of the rejected responses under the current policy, nats per token.
        floor (`float` or `torch.Tensor`):
            Easiness floor ℓ_floor, nats per token.
        temperature (`float` or `torch.Tensor`):
            Temperature τ > 0, nats per token.
        min_weight (`float`, *optional*, defaults to `0.0`):
            Weights below it become exactly 0, so that these rejected responses are filtered out of the loss.
        stop_gradient (`bool`, *optional*, defaults to `True`):
            Whether to detach the weight from the policy.

    Returns:
        `torch.Tensor` of shape `(B,)`: weights in (0, 1), or 0 where filtered.

    Raises:
        ValueError: If `temperature` is not positive.
    """
    if not torch.all(torch.as_tensor(temperature) > 0):
        raise ValueError(f"`temperature` must be positive (nats per token), got {temperature}.")
    if stop_gradient:
        avg_logps = avg_logps.detach()
    weights = torch.sigmoid((avg_logps - floor) / temperature)
    return filter_weights(weights, min_weight)


def filter_weights(weights: torch.Tensor, min_weight: float) -> torch.Tensor:
    """
    Negative filtering: set weights below `min_weight` to exactly 0. The chosen side of those pairs still trains.

    Args:
        weights (`torch.Tensor` of shape `(B,)`):
            Cooling weights.
        min_weight (`float`):
            Threshold; 0 filters nothing.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    if min_weight <= 0.0:
        return weights
    return torch.where(weights < min_weight, torch.zeros_like(weights), weights)


def cooled_logratios(
    rejected_logratios: torch.Tensor, weights: torch.Tensor | float, mode: CoolingMode = "loss"
) -> torch.Tensor:
    r"""
    The rejected log-ratio as the loss sees it after cooling.

    - `"loss"` (the paper) and `"constant"` (the ablation "fixed w", equal to DPO-Shift): \\( w \Delta_l \\);
    - `"gate"` (ours): \\( sg(\Delta_l) + sg(w)(\Delta_l - sg(\Delta_l)) \\), whose value is \\( \Delta_l \\) and
      whose gradient is \\( w \nabla\Delta_l \\), so that the loss value and the chosen gradient are DPO's own and the
      rejected gradient is exactly w times DPO's;
    - `"off"`: \\( \Delta_l \\).

    `weights` keeps its graph in `"loss"` mode: detach it (see [`cooling_weight`]) for the paper's form.

    Args:
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_l, nats per sequence.
        weights (`torch.Tensor` of shape `(B,)` or `float`):
            Cooling weights w.
        mode (`str`, *optional*, defaults to `"loss"`):
            One of `"loss"`, `"gate"`, `"constant"`, `"off"`.

    Returns:
        `torch.Tensor` of shape `(B,)`, nats per sequence.

    Raises:
        ValueError: If `mode` is unknown.
    """
    if mode == "off":
        return rejected_logratios
    if mode in ("loss", "constant"):
        return weights * rejected_logratios
    if mode == "gate":
        frozen = rejected_logratios.detach()
        return frozen + torch.as_tensor(weights).detach() * (rejected_logratios - frozen)
    raise ValueError(f"`mode` must be 'loss', 'gate', 'constant' or 'off', got {mode!r}.")


def cooled_reference(
    rejected_logps: torch.Tensor, ref_rejected_logps: torch.Tensor, weights: torch.Tensor, mode: CoolingMode = "loss"
) -> torch.Tensor:
    r"""
    The reference that makes any DPO-type loss a cooled one (ours).

    Every loss reads the rejected response through \\( S_l - S^{ref}_l \\). Replacing the reference by
    \\( S^{ref}_l + (1-w)(S_l - S^{ref}_l) \\), graph included, turns that difference into [`cooled_logratios`] in
    value and gradient. With w = 1 the reference is returned unchanged, bit for bit.

    Args:
        rejected_logps (`torch.Tensor` of shape `(B,)`):
            S_l under the policy, nats per sequence, with its graph.
        ref_rejected_logps (`torch.Tensor` of shape `(B,)`):
            S_l under the reference, nats per sequence.
        weights (`torch.Tensor` of shape `(B,)`):
            Cooling weights w.
        mode (`str`, *optional*, defaults to `"loss"`):
            `"loss"`, `"constant"` or `"gate"`; `"off"` returns the reference.

    Returns:
        `torch.Tensor` of shape `(B,)`, nats per sequence.
    """
    if mode == "off":
        return ref_rejected_logps
    if mode == "gate":
        # The bracket is zero in value: only its gradient, (1 - w) times that of the policy, acts
        return ref_rejected_logps + (1.0 - weights.detach()) * (rejected_logps - rejected_logps.detach())
    return ref_rejected_logps + (1.0 - weights) * (rejected_logps - ref_rejected_logps)


@dataclass(frozen=True)
class CWDPOLoss:
    """
    What [`cwdpo_loss`] returns.

    Args:
        loss (`torch.Tensor` of shape `()`):
            Mean over the pairs.
        per_pair_loss (`torch.Tensor` of shape `(B,)`):
            Loss of each pair.
        margin (`torch.Tensor` of shape `(B,)`):
            β(Δ_w − wΔ_l), detached.
    """

    loss: torch.Tensor
    per_pair_loss: torch.Tensor
    margin: torch.Tensor


def cwdpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    weights: torch.Tensor | float,
    beta: float = 0.1,
    mode: CoolingMode = "loss",
) -> CWDPOLoss:
    r"""
    The Cooling-Weighted DPO loss, \\( L = -\log\sigma(\beta(\Delta_w - w\Delta_l)) \\).

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_w, nats per sequence.
        rejected_logratios (`torch.Tensor` of shape `(B,)`):
            Δ_l, nats per sequence.
        weights (`torch.Tensor` of shape `(B,)` or `float`):
            Cooling weights w; pass them detached for the paper's form.
        beta (`float`, *optional*, defaults to `0.1`):
            Strength of the pull towards the reference.
        mode (`str`, *optional*, defaults to `"loss"`):
            See [`cooled_logratios`].

    Returns:
        [`CWDPOLoss`].
    """
    cooled = cooled_logratios(rejected_logratios, weights, mode)
    per_pair_loss = -F.logsigmoid(beta * (chosen_logratios - cooled))
    return CWDPOLoss(
        loss=per_pair_loss.mean(),
        per_pair_loss=per_pair_loss,
        margin=cooled_margin(chosen_logratios, rejected_logratios, 1.0 if mode == "off" else weights, beta),
    )


@torch.no_grad()
def cooled_margin(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, weights: torch.Tensor | float, beta: float
) -> torch.Tensor:
    """
    β(Δ_w − wΔ_l) of each pair, detached; the metric `cooling/margin`, in every mode.

    Arguments as in [`cwdpo_loss`].

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return beta * (chosen_logratios - weights * rejected_logratios)


@torch.no_grad()
def gradient_coefficients(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    weights: torch.Tensor | float,
    beta: float,
    mode: CoolingMode = "loss",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The factors in front of ∇S_w and ∇S_l in the gradient of a pair's loss, with w detached.

    DPO: −β(1−a) and +β(1−a), a = σ(β(Δ_w − Δ_l)). `"loss"`: −β(1−a′) and +wβ(1−a′), a′ = σ(β(Δ_w − wΔ_l)).
    `"gate"`: −β(1−a) and +wβ(1−a).

    Arguments as in [`cwdpo_loss`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: two tensors of shape `(B,)`, per nat.
    """
    weights = torch.ones_like(rejected_logratios) * (1.0 if mode == "off" else weights)
    seen = cooled_logratios(rejected_logratios, weights, mode)
    push = beta * torch.sigmoid(-beta * (chosen_logratios - seen))
    return -push, weights * push


@torch.no_grad()
def rejected_gradient_ratio(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, weights: torch.Tensor | float, beta: float
) -> torch.Tensor:
    """
    How much `"loss"` mode changes the rejected gradient against DPO (ours): R = w(1−a′)/(1−a).

    R < 1 cools, R > 1 amplifies. In the tail of easy negatives R behaves like ½·exp(|d|(βL − 1/τ)), d = Δ_l/L: the
    literal loss cools only where β·L·τ < 1, because shrinking Δ_l also removes DPO's own saturation.

    Arguments as in [`cwdpo_loss`].

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    # 1 − σ(z) = σ(−z); the ratio in log space stays finite where both saturate
    log_cooled = F.logsigmoid(-beta * (chosen_logratios - weights * rejected_logratios))
    log_plain = F.logsigmoid(-beta * (chosen_logratios - rejected_logratios))
    return torch.exp(torch.as_tensor(weights).log() + log_cooled - log_plain)


@torch.no_grad()
def undetached_gradient_factor(
    rejected_logratios: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    What replaces w in front of ∇S_l when w keeps its graph: w·[1 + (1−w)·d/τ], d = Δ_l/L.

    Its sign flips where d < −τ/(1−w): the loss then *raises* the rejected response.
    Takes Δ_l (nats per sequence), L (tokens) and w of shape `(B,)`, and τ (nats per token).
    """
    return weights * (1.0 + (1.0 - weights) * rejected_logratios / lengths / temperature)


def amplification_risk(beta: float, length: float, temperature: float) -> float:
    """
    β·L·τ, the number that decides whether `"loss"` mode cools (< 1) or amplifies (≥ 1) easy negatives (ours).
    Takes β (per nat), a typical length L of the rejected responses (tokens) and τ (nats per token).
    """
    return beta * length * temperature


def smoothed_nll(nll: torch.Tensor, smoothing_gap: torch.Tensor, epsilon: float) -> torch.Tensor:
    r"""
    Label-smoothed negative log-likelihood without the full distribution.

    \\( CE_\varepsilon = -[(1-\varepsilon)\log p_y + \tfrac{\varepsilon}{V}\sum_v \log p_v]
    = NLL + \varepsilon (z_y - \bar z) \\), where z are the logits and \\( \bar z \\) their mean over the vocabulary:
    the normaliser cancels, and what is left is linear in the logits.

    Args:
        nll (`torch.Tensor`):
            −log p_y of each token, nats.
        smoothing_gap (`torch.Tensor`, same shape):
            z_y − mean_v z_v of each token, nats.
        epsilon (`float`):
            Smoothing ε in [0, 1).

    Returns:
        `torch.Tensor`, same shape, nats per token.
    """
    return nll + epsilon * smoothing_gap


def band_penalty(
    nll: torch.Tensor,
    floor: float | torch.Tensor,
    ceiling: float = math.inf,
    weight: float = 1.0,
    ceiling_weight: float | None = None,
) -> torch.Tensor:
    """
    λ·ReLU(C_lo − n⁻) + γ·ReLU(n⁻ − C_hi): keeps rejected responses neither too likely nor vanishing (ours).

    With an infinite ceiling it is the hinge λ·ReLU(C − n⁻) of the paper's body.

    Args:
        nll (`torch.Tensor`):
            Mean NLL n⁻, nats per token.
        floor (`float` or `torch.Tensor`):
            C_lo, nats per token.
        ceiling (`float`, *optional*, defaults to infinity):
            C_hi ≥ C_lo, nats per token.
        weight (`float`, *optional*, defaults to `1.0`):
            λ.
        ceiling_weight (`float`, *optional*):
            γ; defaults to `weight`.

    Returns:
        `torch.Tensor`, same shape.
    """
    ceiling_weight = weight if ceiling_weight is None else ceiling_weight
    below = weight * torch.relu(floor - nll)
    return below if ceiling == math.inf else below + ceiling_weight * torch.relu(nll - ceiling)


def linearised_band_penalty(
    nll: torch.Tensor,
    mask: torch.Tensor,
    batch_nll: torch.Tensor,
    floor: float,
    ceiling: float = math.inf,
) -> torch.Tensor:
    """
    A micro-batch's part of the penalty on the mean NLL of the *global* batch (the paper's hinge of the batch mean).

    Whether the penalty acts is decided by the global mean, detached; where it acts it is linear, so the parts of all
    micro-batches and ranks, divided by the number of tokens of the global batch, add up to it in value and gradient.

    Args:
        nll (`torch.Tensor` of shape `(B, T)`):
            NLL of the rejected tokens, nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on completion tokens.
        batch_nll (`torch.Tensor` of shape `()`):
            Mean over all rejected tokens of the global batch, nats per token, without graph.
        floor (`float`):
            C or C_lo, nats per token.
        ceiling (`float`, *optional*, defaults to infinity):
            C_hi, nats per token.

    Returns:
        `torch.Tensor` of shape `()`: a sum over tokens.
    """
    mask = mask.bool()
    if batch_nll < floor:
        return (floor - nll)[mask].sum()
    if batch_nll > ceiling:
        return (nll - ceiling)[mask].sum()
    return nll[mask].sum() * 0.0


def gentle_negative_loss(
    chosen_nll: torch.Tensor,
    rejected_nll: torch.Tensor,
    negative_loss_type: NegativeLossType = "smoothed",
    negative_weight: float = 0.05,
    smoothing_gap: torch.Tensor | None = None,
    epsilon: float = 0.1,
    floor: float | None = None,
    ceiling: float | None = None,
) -> torch.Tensor:
    """
    The stage 1 loss of each pair: n⁺ plus a low-weight term on the gentle negative.

    - `"smoothed"` (the paper's abstract): n⁺ + γ·CE_ε(y⁻). At a token where the responses part, with ε = 0, the
      equilibrium is p(y⁻) = γ/(1+γ), see [`equilibrium_negative_nll`].
    - `"hinge"` (the formula in the paper's body): n⁺ + λ·ReLU(C − n⁻).
    - `"band"` (ours): n⁺ + λ·[ReLU(C_lo − n⁻) + ReLU(n⁻ − C_hi)].
    - `"none"`: n⁺.

    The two forms of the paper pull in opposite directions; which one its authors ran is not public.

    Args:
        chosen_nll (`torch.Tensor`):
            n⁺, mean NLL of the chosen responses, nats per token.
        rejected_nll (`torch.Tensor`, same shape):
            n⁻, mean NLL of the rejected responses, nats per token.
        negative_loss_type (`str`, *optional*, defaults to `"smoothed"`):
            One of `"smoothed"`, `"hinge"`, `"band"`, `"none"`.
        negative_weight (`float`, *optional*, defaults to `0.05`):
            γ for `"smoothed"`, λ for `"hinge"` and `"band"`.
        smoothing_gap (`torch.Tensor`, *optional*):
            Mean over the tokens of z_y − mean_v z_v of the rejected responses; needed by `"smoothed"` with ε > 0.
        epsilon (`float`, *optional*, defaults to `0.1`):
            Smoothing ε of `"smoothed"`.
        floor (`float`, *optional*):
            C (`"hinge"`) or C_lo (`"band"`), nats per token.
        ceiling (`float`, *optional*):
            C_hi (`"band"`), nats per token.

    Returns:
        `torch.Tensor`, shape of `chosen_nll`.

    Raises:
        ValueError: If a value that the type needs is missing, or the type is unknown.
    """
    if negative_loss_type == "none":
        return chosen_nll
    if negative_loss_type == "smoothed":
        if epsilon > 0 and smoothing_gap is None:
            raise ValueError(
                f"`smoothing_gap` is required by 'smoothed' with `epsilon`={epsilon}; or set `epsilon=0`."
            )
        negative = rejected_nll if smoothing_gap is None else smoothed_nll(rejected_nll, smoothing_gap, epsilon)
        return chosen_nll + negative_weight * negative
    if negative_loss_type not in ("hinge", "band"):
        raise ValueError(
            f"`negative_loss_type` must be 'smoothed', 'hinge', 'band' or 'none', got {negative_loss_type!r}."
        )
    if floor is None or (negative_loss_type == "band" and ceiling is None):
        raise ValueError(f"{negative_loss_type!r} needs `floor`{' and `ceiling`' * (negative_loss_type == 'band')}.")
    high = math.inf if ceiling is None or negative_loss_type == "hinge" else ceiling
    return chosen_nll + band_penalty(rejected_nll, floor, high, negative_weight)


def equilibrium_negative_nll(negative_weight: float) -> float:
    """
    NLL of the rejected token at the minimum of −log p⁺ − γ·log p⁻ with p⁺ + p⁻ = 1: ln((1+γ)/γ).

    The smoothed loss (ε = 0) settles there at a token where chosen and rejected part, which caps how far stage 1 lets
    a negative collapse: 3.04 nats for γ = 0.05.

    Args:
        negative_weight (`float`):
            γ > 0.

    Returns:
        `float`: nats per token.
    """
    return math.log((1.0 + negative_weight) / negative_weight)
