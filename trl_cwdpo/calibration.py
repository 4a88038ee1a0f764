"""Where the cooling's floor and temperature come from: quantiles of the rejected responses before training (ours).

The paper calls both numbers hyperparameters of a dataset and gives no values. Here they are solved from a sample of
average token log-probabilities ℓ̄ so that two quantiles of it get two target weights, then frozen: a response that
drifts below the floor during training *is* the cooling, so recalibrating would undo it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# (q_a, p_a), (q_b, p_b): quantile of the sample → target weight
PRESETS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "head": ((0.50, 0.25), (0.90, 0.75)),
    "tail": ((0.25, 0.50), (0.75, 0.90)),
    "paper": ((0.25, 0.25), (0.75, 0.75)),
}
# What trained best on drawn shapes, and kept training at learning rates at which the others no longer did
DEFAULT_PRESET = "head"
TEMPERATURE_BOUNDS = (0.1, 1.0)
# In "loss" mode τ is kept where β·L·τ stays below 1, with some room
MAX_AMPLIFICATION = 0.8
# Ashman's D of the best two-way split; a normal sample scores about 2.7, a uniform one 3.5. With fewer values than the
# minimum, unimodal samples reach the threshold by chance
BIMODALITY_THRESHOLD = 4.0
BIMODALITY_MIN_SAMPLE = 64
MIN_CLUSTER_SHARE = 0.1


@dataclass(frozen=True)
class CoolingCalibration:
    """
    The frozen result of a calibration, as logged, stored in checkpoints and shown in reports.

    Args:
        floor (`float`):
            ℓ_floor, nats per token.
        temperature (`float`):
            τ, nats per token.
        preset (`str`):
            `"head"`, `"tail"` or `"paper"`.
        sample_size (`int`):
            Number of rejected responses measured.
        quantiles (`dict[str, float]`):
            Quantiles of ℓ̄ (`"q05"`, `"q25"`, `"q50"`, `"q75"`, `"q95"`), nats per token.
        median_length (`float`):
            Median number of tokens of the rejected responses.
        warnings (`tuple[str, ...]`):
            What the user should know about this sample.
    """

    floor: float
    temperature: float
    preset: str
    sample_size: int
    quantiles: dict[str, float]
    median_length: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CoolingCalibration":
        """Inverse of [`~CoolingCalibration.to_dict`]."""
        return cls(**{**data, "warnings": tuple(data.get("warnings", ()))})


def number_or_auto(name: str, value: float | str | None) -> float | str:
    """
    Read an option that is a number or `"auto"`, as it comes from Python, a command line or YAML.

    Args:
        name (`str`):
            Name of the option, for the error.
        value (`float` or `str`):
            What the user gave.

    Returns:
        `float` or `"auto"`.

    Raises:
        ValueError: If it is neither, or not finite.
    """
    if value == "auto":
        return value
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be a finite number or 'auto', got {value!r}.")
    return number


def _logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def solve_floor_and_temperature(
    quantile_a: float, quantile_b: float, weight_a: float, weight_b: float
) -> tuple[float, float]:
    """
    The floor and temperature that give two values of ℓ̄ two target weights.

    τ = (q_b − q_a)/(logit p_b − logit p_a), ℓ_floor = q_a − τ·logit p_a.

    Args:
        quantile_a (`float`):
            q_a, nats per token.
        quantile_b (`float`):
            q_b ≥ q_a, nats per token.
        weight_a (`float`):
            p_a in (0, 1), the weight at q_a.
        weight_b (`float`):
            p_b in (p_a, 1), the weight at q_b.

    Returns:
        `tuple[float, float]`: ℓ_floor and τ (0 if the quantiles coincide), nats per token.
    """
    temperature = (quantile_b - quantile_a) / (_logit(weight_b) - _logit(weight_a))
    return quantile_a - temperature * _logit(weight_a), temperature


def clamp_temperature(temperature: float, *, beta: float | None, median_length: float) -> tuple[float, str | None]:
    """
    Keep τ in [0.1, 1] and, in `"loss"` mode, below 0.8/(β·median L) so that the loss cools rather than amplifies.

    Args:
        temperature (`float`):
            τ as solved, nats per token.
        beta (`float` or `None`):
            β of the loss in `"loss"` mode, `None` in the other modes, where τ cannot amplify.
        median_length (`float`):
            Median number of tokens of the rejected responses.

    Returns:
        `tuple[float, str | None]`: τ, and a warning where 0.8/(β·median L) lies below the smallest τ.
    """
    low, high = TEMPERATURE_BOUNDS
    warning = None
    if beta:
        limit = MAX_AMPLIFICATION / (beta * median_length)
        if limit < low:
            warning = (
                f"With `cooling_mode='loss'`, `beta`={beta:g} and a median rejected length of {median_length:g} "
                f"tokens, cooling easy negatives with some room takes a temperature of {limit:.3g} nats/token, less "
                f"than the smallest useful one; {low:g} is used. Set `cooling_mode='gate'`, which cools at any "
                "length, or lower `beta`."
            )
        high = max(low, min(high, limit))
    return min(max(temperature, low), high), warning


def looks_bimodal(sample: Sequence[float] | np.ndarray) -> bool:
    """
    Whether a sample falls into two well separated groups.

    Splits the sorted sample in two where the variance within the groups is smallest and asks whether the groups' means
    lie more than 4 pooled deviations apart (Ashman's D), each group holding at least a tenth of the sample. Samples of
    fewer than 64 values are never called bimodal.

    Args:
        sample (`Sequence[float]` or `np.ndarray` of shape `(n,)`):
            ℓ̄ of the rejected responses, nats per token.

    Returns:
        `bool`.
    """
    x = np.sort(np.asarray(sample, dtype=np.float64))
    n = x.size
    if n < BIMODALITY_MIN_SAMPLE:
        return False
    smallest = math.ceil(MIN_CLUSTER_SHARE * n)
    sizes = np.arange(smallest, n - smallest + 1)
    sums, squares = np.cumsum(x), np.cumsum(x * x)
    left_mean, right_mean = sums[sizes - 1] / sizes, (sums[-1] - sums[sizes - 1]) / (n - sizes)
    left_var = squares[sizes - 1] / sizes - left_mean**2
    right_var = (squares[-1] - squares[sizes - 1]) / (n - sizes) - right_mean**2
    best = int(np.argmin(sizes * left_var + (n - sizes) * right_var))
    pooled = math.sqrt(max(left_var[best] + right_var[best], 1e-12))
    return bool(math.sqrt(2.0) * (right_mean[best] - left_mean[best]) / pooled > BIMODALITY_THRESHOLD)


def calibrate(
    avg_logps: Sequence[float] | np.ndarray,
    lengths: Sequence[float] | np.ndarray,
    *,
    preset: str = DEFAULT_PRESET,
    beta: float | None = None,
) -> CoolingCalibration:
    """
    Floor and temperature from a sample of rejected responses taken before the first update.

    Where τ is clamped, the floor stays where the unclamped solution put it, so that `"paper"` keeps its floor near the
    median, `"tail"` at the first quartile and `"head"` halfway between the median and the ninth decile.

    Args:
        avg_logps (`Sequence[float]` or `np.ndarray` of shape `(n,)`):
            ℓ̄ of the rejected responses under the initial policy, nats per token.
        lengths (`Sequence[float]` or `np.ndarray` of shape `(n,)`):
            Their lengths in tokens.
        preset (`str`, *optional*, defaults to `"head"`):
            `"head"`: (q50 → 0.25), (q90 → 0.75), so that the hardest third stays active and the rest cools;
            `"tail"`: (q25 → 0.5), (q75 → 0.9), so that typical negatives stay active and the tail cools;
            `"paper"`: (q25 → 0.25), (q75 → 0.75).
        beta (`float`, *optional*):
            β of the loss, given in `"loss"` mode only.

    Returns:
        [`CoolingCalibration`].

    Raises:
        ValueError: If the preset is unknown, or the sample is empty or holds a value that is not finite.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {sorted(PRESETS)}, got {preset!r}.")
    sample = np.asarray(avg_logps, dtype=np.float64)
    if len(lengths) != sample.size:
        raise ValueError(f"`lengths` has {len(lengths)} values for {sample.size} average log-probabilities.")
    if sample.size == 0:
        raise ValueError("`avg_logps` is empty: no rejected response was measured, so nothing can be calibrated.")
    if not np.isfinite(sample).all():
        raise ValueError(
            f"{int((~np.isfinite(sample)).sum())} of {sample.size} average log-probabilities of rejected responses "
            "are not finite: the model produces NaN or infinite logits before the first update. Check its weights and "
            "dtype, or set `cooling_floor` and `cooling_temperature` to numbers."
        )
    (level_a, weight_a), (level_b, weight_b) = PRESETS[preset]
    quantile_a, quantile_b = np.quantile(sample, [level_a, level_b])
    floor, raw_temperature = solve_floor_and_temperature(float(quantile_a), float(quantile_b), weight_a, weight_b)
    median_length = float(np.median(np.asarray(lengths, dtype=np.float64)))
    temperature, warning = clamp_temperature(raw_temperature, beta=beta, median_length=median_length)
    warnings = [] if warning is None else [warning]
    if looks_bimodal(sample):
        warnings.append(
            "The rejected responses fall into two separate groups of log-probability, so one floor from quantiles may "
            "sit between or inside them. Look at the quantiles, and set `cooling_floor` by hand if it does."
        )
    levels = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
    return CoolingCalibration(
        floor=floor,
        temperature=temperature,
        preset=preset,
        sample_size=int(sample.size),
        quantiles={name: float(np.quantile(sample, level)) for name, level in levels.items()},
        median_length=median_length,
        warnings=tuple(warnings),
    )
