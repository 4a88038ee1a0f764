r"""What a probe computes, as pure functions: token statistics, calibration, intervals, squeezing, loser share.

Sources: squeezing, displacement and the response families after *Learning Dynamics of LLM Finetuning* (arXiv
2407.10490); smooth ECE after *Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing* (arXiv 2309.12236).
What is called "ours" is neither there nor in the CW-DPO paper. Notation as in `objectives`: ℓ̄ is an average token
log-probability (nats per token), Δ a log-ratio to the reference (nats per sequence), p the next-token distribution of
the policy, q that of the reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# Logits held at one time, in numbers: 64 MB in float32, some ten such tensors live at once
CHUNK_NUMBERS = 2**24
# Modes of the cosine series of the smooth ECE; they resolve kernels down to a width of 0.004
SMOOTH_MODES, SMOOTH_GRID = 512, 2001
# Rows drawn by a bootstrap, up to which they are kept for the next one: 8 MB
KEPT_PICKS = 2**20


@dataclass(frozen=True)
class OutputHead:
    """
    What turns hidden states into logits: z = cap·tanh(scale·(hW^T + b)/cap), without a cap scale·(hW^T + b).

    Args:
        weight (`torch.Tensor` of shape `(V, D)`):
            Output embeddings.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Their bias.
        scale (`float`, *optional*, defaults to `1.0`):
            Logit scale.
        softcap (`float`, *optional*):
            Cap of the logits.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (nats, float32 or wider) of shape `(N, V)` from hidden states of shape `(N, D)`."""
        weight = self.weight.to(hidden.device, hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.device, hidden.dtype)
        logits = F.linear(hidden, weight, bias)
        logits = self.scale * (logits if logits.dtype == torch.float64 else logits.float())
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(dim=-1)


@dataclass(frozen=True)
class TokenStatistics:
    """
    One number per token; each a tensor of shape `(N,)`.

    Args:
        logp (`torch.Tensor`):
            log p_y of the target, nats.
        entropy (`torch.Tensor`):
            −Σ p log p, nats.
        sum_of_squares (`torch.Tensor`):
            Σ p², in (0, 1].
        top1_logp (`torch.Tensor`):
            Log-probability of the most likely token, nats.
        argmax (`torch.Tensor`):
            Its index.
        total_variation (`torch.Tensor`, *optional*):
            ½ Σ |p − q|, in [0, 1]; given a reference.
        jensen_shannon (`torch.Tensor`, *optional*):
            Jensen-Shannon distance √JSD with logarithms to base 2, in [0, 1]; given a reference.
        kullback_leibler (`torch.Tensor`, *optional*):
            KL(p ‖ q) = Σ p (log p − log q), nats; given a reference.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    sum_of_squares: torch.Tensor
    top1_logp: torch.Tensor
    argmax: torch.Tensor
    total_variation: torch.Tensor | None = None
    jensen_shannon: torch.Tensor | None = None
    kullback_leibler: torch.Tensor | None = None


@torch.no_grad()
def token_statistics(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: OutputHead,
    reference: tuple[torch.Tensor, OutputHead] | None = None,
    chunk_size: int | None = None,
) -> TokenStatistics:
    """
    Statistics of next-token distributions, a chunk of tokens at a time.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`):
            Hidden states that the head reads.
        targets (`torch.Tensor` of shape `(N,)`):
            Index of the token that follows each.
        head ([`OutputHead`]):
            The policy's.
        reference (`tuple[torch.Tensor, OutputHead]`, *optional*):
            Hidden states of the same tokens under the reference, `(N, D')`, and its head.
        chunk_size (`int`, *optional*):
            Tokens whose logits exist at one time; by default as many as hold 2²⁴ numbers.

    Returns:
        [`TokenStatistics`].
    """
    size = chunk_size or max(1, CHUNK_NUMBERS // head.weight.shape[0])
    parts: list[TokenStatistics] = []
    # At least one part, so that no token at all still gives empty tensors
    for start in range(0, max(len(hidden), 1), size):
        span = slice(start, start + size)
        log_p = head.log_probabilities(hidden[span])
        log_q = None if reference is None else reference[1].log_probabilities(reference[0][span])
        parts.append(_statistics_of_chunk(log_p, targets[span], log_q))
    names = [field.name for field in fields(TokenStatistics)]
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    joined: dict[str, Any] = {
        name: None if column[0] is None else torch.cat(column) for name, column in columns.items()
    }
    return TokenStatistics(**joined)


def _statistics_of_chunk(log_p: torch.Tensor, targets: torch.Tensor, log_q: torch.Tensor | None) -> TokenStatistics:
    p = log_p.exp()
    top1_logp, argmax = log_p.max(dim=-1)
    total_variation = jensen_shannon = kullback_leibler = None
    if log_q is not None:
        log_q = log_q.to(log_p)
        total_variation, jensen_shannon = distances(log_p, log_q)
        # Rounding may leave equal distributions slightly below zero
        kullback_leibler = _divergence_terms(p, log_p, log_q).sum(dim=-1).clamp(min=0.0)
    return TokenStatistics(
        logp=log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        # A probability that rounds to zero has a finite logarithm here, except behind a mask of -inf
        entropy=-(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1),
        sum_of_squares=(p * p).sum(dim=-1),
        top1_logp=top1_logp,
        argmax=argmax,
        total_variation=total_variation,
        jensen_shannon=jensen_shannon,
        kullback_leibler=kullback_leibler,
    )


def distances(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Total variation and Jensen-Shannon distance of distributions.

    Args:
        log_p (`torch.Tensor` of shape `(N, V)`):
            Log-probabilities, nats.
        log_q (`torch.Tensor` of shape `(N, V)`):
            Log-probabilities, nats.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: ½ Σ |p − q|, and √JSD with logarithms to base 2; both of shape `(N,)`, in
        [0, 1].
    """
    p, q = log_p.exp(), log_q.exp()
    middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
    divergence = 0.5 * (_divergence_terms(p, log_p, middle) + _divergence_terms(q, log_q, middle)).sum(dim=-1)
    return 0.5 * (p - q).abs().sum(dim=-1), (divergence.clamp(min=0.0) / math.log(2.0)).sqrt().clamp(max=1.0)


def _divergence_terms(p: torch.Tensor, log_p: torch.Tensor, log_m: torch.Tensor) -> torch.Tensor:
    return torch.where(p > 0, p * (log_p - log_m), torch.zeros_like(p))


def brier_terms(logp: torch.Tensor, sum_of_squares: torch.Tensor) -> torch.Tensor:
    """
    ‖e_y − p‖² = 1 − 2p_y + Σp² of each token, in [0, 2]: its Brier score, and the squared norm of ∂log p_y/∂z.

    Args:
        logp (`torch.Tensor`):
            log p_y, nats.
        sum_of_squares (`torch.Tensor`, same shape):
            Σp².

    Returns:
        `torch.Tensor`, same shape.
    """
    # Rounding may leave a certain token slightly below zero
    return (1.0 - 2.0 * logp.exp() + sum_of_squares).clamp(min=0.0)


def loser_share(
    chosen_coefficients: np.ndarray,
    rejected_coefficients: np.ndarray,
    chosen_brier: np.ndarray,
    rejected_brier: np.ndarray,
) -> np.ndarray:
    """
    How much of a pair's push comes from its rejected response, without a backward pass (ours).

    g = |coef|·√(Σ_t ‖e_y − p‖²) for each side, share = g_l / (g_l + g_w).

    Args:
        chosen_coefficients (`np.ndarray` of shape `(B,)`):
            Factor in front of ∇S_w, see [`~trl_cwdpo.objectives.gradient_coefficients`].
        rejected_coefficients (`np.ndarray` of shape `(B,)`):
            Factor in front of ∇S_l.
        chosen_brier (`np.ndarray` of shape `(B,)`):
            Sum of [`brier_terms`] over the tokens of the chosen responses.
        rejected_brier (`np.ndarray` of shape `(B,)`):
            The same of the rejected responses.

    Returns:
        `np.ndarray` of shape `(B,)`, in [0, 1]; ½ where nothing pushes at all.
    """
    chosen = np.abs(chosen_coefficients) * np.sqrt(chosen_brier)
    rejected = np.abs(rejected_coefficients) * np.sqrt(rejected_brier)
    total = chosen + rejected
    return np.divide(rejected, total, out=np.full_like(total, 0.5), where=total > 0)


# --- calibration ----------------------------------------------------------------------------------------------------


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """
    ECE over equally wide bins (k/bins, (k+1)/bins]: Σ share of the bin × |accuracy − mean confidence|.

    Args:
        confidence (`np.ndarray` of shape `(N,)`):
            Probability of the most likely token.
        correct (`np.ndarray` of shape `(N,)`):
            Whether it was the target.
        bins (`int`, *optional*, defaults to `15`):
            Number of bins.

    Returns:
        `float` in [0, 1]; NaN for no token.
    """
    if confidence.size == 0:
        return math.nan
    return sum(count * abs(right - sure) for count, sure, right in reliability(confidence, correct, bins)) / len(
        correct
    )


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> list[tuple[int, float, float]]:
    """
    The points of a reliability diagram, over the bins of [`expected_calibration_error`].

    Args:
        confidence (`np.ndarray` of shape `(N,)`):
            Probability of the most likely token.
        correct (`np.ndarray` of shape `(N,)`):
            Whether it was the target.
        bins (`int`, *optional*, defaults to `15`):
            Number of bins.

    Returns:
        `list[tuple]`: Of each bin that is not empty: number of tokens, mean confidence, accuracy.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, sure, right = (
        np.bincount(index, weights=weights, minlength=bins) for weights in (None, confidence, correct.astype(float))
    )
    return [(int(n), float(s / n), float(r / n)) for n, s, r in zip(counts, sure, right, strict=True) if n]


def smooth_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    r"""
    Smooth ECE: \\( \int_0^1 |\frac1N\sum_i K_\sigma(t, f_i)(y_i - f_i)| dt \\), at the width σ that equals it.

    K is the Gaussian kernel reflected at 0 and 1. In the cosine basis reflection costs nothing: smoothing with it
    multiplies the k-th coefficient by exp(−(πkσ)²/2).

    Args:
        confidence (`np.ndarray` of shape `(N,)`):
            Probability f of the most likely token.
        correct (`np.ndarray` of shape `(N,)`):
            Whether it was the target, y.

    Returns:
        `float` in [0, 1]; NaN for no token.
    """
    if confidence.size == 0:
        return math.nan
    nearest = np.rint(np.clip(confidence, 0.0, 1.0) * (SMOOTH_GRID - 1)).astype(int)
    residuals = np.bincount(nearest, weights=correct.astype(float) - confidence, minlength=SMOOTH_GRID)
    modes = np.arange(SMOOTH_MODES)
    coefficients = _cosine_sums(residuals)[:SMOOTH_MODES] / confidence.size * np.where(modes == 0, 1.0, 2.0)

    def error(sigma: float) -> float:
        smoothed = _cosine_sums(coefficients * np.exp(-0.5 * (np.pi * modes * sigma) ** 2))
        return float(np.trapezoid(np.abs(smoothed), dx=1.0 / (SMOOTH_GRID - 1)))

    # It falls as σ grows, so it meets σ once
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return 0.5 * (low + high)


def _cosine_sums(values: np.ndarray) -> np.ndarray:
    # Of all k at once: Σ_j values_j cos(πkj/(G − 1)), G the size of the grid; from places to modes and back
    return np.fft.rfft(values, 2 * (SMOOTH_GRID - 1)).real


# --- intervals ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """
    A mean with its bootstrap interval.

    Args:
        mean (`float`):
            Mean over the rows.
        low (`float`):
            Lower end.
        high (`float`):
            Upper end.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def from_dict(cls, data: dict[str, Any] | None) -> "Interval | None":
        """Inverse of `dataclasses.asdict`, for a value that may be missing; JSON has null for NaN."""
        if data is None:
            return None
        return cls(**{name: math.nan if value is None else value for name, value in data.items()})


@lru_cache(maxsize=8)
def _shares(seed: int, samples: int, size: int) -> np.ndarray:
    # Of each row in each resample. A probe draws the same ones for each of its quantities
    picks = np.random.default_rng(seed).integers(0, size, size=(samples, size)) + size * np.arange(samples)[:, None]
    return np.bincount(picks.ravel(), minlength=samples * size).reshape(samples, size) / size


def bootstrap(
    values: np.ndarray | Sequence[float], seed: int = 0, samples: int = 2000, level: float = 0.95
) -> Interval:
    """
    Percentile bootstrap of a mean over rows.

    Arrays of one length and seed are resampled with the same rows: give it the differences of two measurements of the
    same rows, and the interval is the paired one.

    Args:
        values (`np.ndarray` of shape `(N,)`):
            One value a row, N ≥ 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        samples (`int`, *optional*, defaults to `2000`):
            Number of resamples.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage.

    Returns:
        [`Interval`].
    """
    values = np.asarray(values, dtype=float)
    is_small = samples * values.size <= KEPT_PICKS
    shares = (_shares if is_small else _shares.__wrapped__)(seed, samples, values.size)
    low, high = np.quantile(shares @ values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(values.mean()), float(low), float(high))


# --- what the changes mean ------------------------------------------------------------------------------------------


def squeezing_index(argmax: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """
    Δ0(argmax) − mean of Δ0(chosen, rejected, mismatched), row by row (ours): mass that leaves every observed response
    and gathers on what the model would say anyway.

    Args:
        argmax (`np.ndarray` of shape `(N,)`):
            Change of ℓ̄ of the greedy tokens since step 0, nats per token.
        others (`Sequence[np.ndarray]`, each of shape `(N,)`):
            The changes of the other families.

    Returns:
        `np.ndarray` of shape `(N,)`, nats per token.
    """
    return argmax - np.mean(np.stack(list(others)), axis=0)


def is_displaced(chosen_delta_high: float, margin_change: float, threshold: float) -> bool:
    """
    Displacement (ours): the chosen responses have surely lost probability although the margin grows.

    Args:
        chosen_delta_high (`float`):
            Upper end of the interval of Δ0(chosen), nats per token.
        margin_change (`float`):
            Change of the mean margin Δ_w − Δ_l since step 0, nats per sequence.
        threshold (`float`):
            Nats per token.

    Returns:
        `bool`.
    """
    return chosen_delta_high < threshold and margin_change > 0.0
