"""What probe records mean: flags, early stopping, curriculum and diagnosis, as pure functions (all rules ours).

Every number of every rule stands in [`SignalThresholds`]. Every decision says in words which rules fired and with what
numbers. "Two probes in a row" and the like count the records given, whose first one is the probe before training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .probe_measures import is_displaced
from .probe_records import ProbeRecord

PairOrder = Literal["easy_to_hard", "weighted", "random"]


@dataclass(frozen=True)
class SignalThresholds:
    """
    The numbers of all rules.

    Args:
        patience (`int`, *optional*, defaults to `2`):
            Probes in a row that must raise a flag before it stops a run.
        displacement (`float`, *optional*, defaults to `-0.02`):
            Upper end of Δ0(chosen) below which chosen responses count as displaced, nats per token.
        ece_increase (`float`, *optional*, defaults to `0.05`):
            Largest increase of the calibration error.
        total_variation (`float`, *optional*, defaults to `0.25`):
            Largest distance to the reference.
        saturated_fraction (`float`, *optional*, defaults to `0.8`):
            Share of pairs with a′ > 0.9 from which a run counts as saturated …
        margin_gain (`float`, *optional*, defaults to `0.01`):
            … if the margin has grown by a smaller part of itself since the probe before.
        cooled_weight (`float`, *optional*, defaults to `0.1`):
            Mean cooling weight below which negatives count as used up.
        easy_fraction (`float`, *optional*, defaults to `0.5`):
            Share of pairs with w < 0.1 above which the curriculum asks for more on-policy negatives.
        on_policy_increment (`float`, *optional*, defaults to `0.1`):
            By how much it raises their share.
        filter_weight (`float`, *optional*, defaults to `0.03`):
            Weight below which pairs are filtered.
        flat (`float`, *optional*, defaults to `0.02`):
            Changes up to this size count as none, nats per token …
        relative_flat (`float`, *optional*, defaults to `0.03`):
            … and so do changes up to this share of a family's first negative log-likelihood: the less likely a
            response, the further the same change of the weights moves it.
        strong (`float`, *optional*, defaults to `0.5`):
            Falls from this size on count as strong in the diagnosis, nats per token.
        low_weight (`float`, *optional*, defaults to `0.3`):
            Mean cooling weight below which it counts as low.
        high_weight (`float`, *optional*, defaults to `0.7`):
            Mean cooling weight above which it counts as high.
    """

    patience: int = 2
    displacement: float = -0.02
    ece_increase: float = 0.05
    total_variation: float = 0.25
    saturated_fraction: float = 0.8
    margin_gain: float = 0.01
    cooled_weight: float = 0.1
    easy_fraction: float = 0.5
    on_policy_increment: float = 0.1
    filter_weight: float = 0.03
    flat: float = 0.02
    relative_flat: float = 0.03
    strong: float = 0.5
    low_weight: float = 0.3
    high_weight: float = 0.7

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1 probe, got {self.patience}.")
        if not 0 <= self.flat <= self.strong:
            raise ValueError(f"`flat`={self.flat} must lie between 0 and `strong`={self.strong}.")
        if self.relative_flat < 0:
            raise ValueError(f"`relative_flat` must not be negative, got {self.relative_flat}.")
        if not self.low_weight <= self.high_weight:
            raise ValueError(f"`low_weight`={self.low_weight} must not exceed `high_weight`={self.high_weight}.")


DEFAULTS = SignalThresholds()


# --- flags and early stopping ---------------------------------------------------------------------------------------


def raised_flags(records: Sequence[ProbeRecord], thresholds: SignalThresholds = DEFAULTS) -> dict[str, str]:
    """
    The flags that the last record raises.

    Args:
        records (`Sequence[ProbeRecord]`):
            Records up to it, the first of the run first.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        `dict[str, str]`: By name (`displacement`, `squeezing`, `miscalibration`, `drift`, `saturation`,
        `cooled_out`), the reason in words. The first record raises none but `cooled_out`.
    """
    if not records:
        return {}
    first, record = records[0], records[-1]
    flags: dict[str, str | None] = {}
    if len(records) > 1:
        flags["displacement"] = _displacement(first, record, thresholds)
        flags["squeezing"] = _squeezing(first, record, thresholds)
        flags["miscalibration"] = _miscalibration(first, record, thresholds)
        flags["drift"] = _drift(record, thresholds)
        flags["saturation"] = _saturation(records[-2], record, thresholds)
    if record.mean_weight is not None and record.mean_weight < thresholds.cooled_weight:
        flags["cooled_out"] = f"mean cooling weight {record.mean_weight:.3g} < {thresholds.cooled_weight:.3g}"
    return {name: f"step {record.step}: {reason}" for name, reason in flags.items() if reason is not None}


def _displacement(first: ProbeRecord, record: ProbeRecord, thresholds: SignalThresholds) -> str | None:
    chosen, rise = record.delta0("chosen"), record.margin.mean - first.margin.mean
    if chosen is None or not is_displaced(chosen.high, rise, thresholds.displacement):
        return None
    return (
        f"chosen responses lost {-chosen.mean:.3g} nats per token since step {first.step} (upper bound of the change "
        f"{chosen.high:.3g} < {thresholds.displacement:.3g}) while the margin rose by {rise:.3g}"
    )


def _squeezing(first: ProbeRecord, record: ProbeRecord, thresholds: SignalThresholds) -> str | None:
    # The index alone rises in every run that lowers rejected responses: the mass must have gone to the argmax
    index, argmax = record.squeezing_index, record.delta0("argmax")
    if index is None or index.low <= 0 or record.top1_mass <= first.top1_mass:
        return None
    if argmax is None or _sign(record, "argmax", thresholds) != "+":
        return None
    return (
        f"squeezing index {index.mean:.3g} [{index.low:.3g}, {index.high:.3g}] nats per token above 0, greedy tokens "
        f"up by {argmax.mean:.3g} nats per token and top-1 mass from {first.top1_mass:.3g} to {record.top1_mass:.3g}"
    )


def _miscalibration(first: ProbeRecord, record: ProbeRecord, thresholds: SignalThresholds) -> str | None:
    change = record.ece - first.ece
    if not change > thresholds.ece_increase:
        return None
    return f"calibration error up by {change:.3g} > {thresholds.ece_increase:.3g}, to {record.ece:.3g}"


def _drift(record: ProbeRecord, thresholds: SignalThresholds) -> str | None:
    distance = record.total_variation
    if distance is None or distance <= thresholds.total_variation:
        return None
    return f"total variation to the reference {distance:.3g} > {thresholds.total_variation:.3g}"


def _saturation(before: ProbeRecord, record: ProbeRecord, thresholds: SignalThresholds) -> str | None:
    gain = record.margin.mean - before.margin.mean
    enough = thresholds.margin_gain * abs(before.margin.mean)
    if record.saturated_fraction is None or record.saturated_fraction < thresholds.saturated_fraction:
        return None
    if gain >= enough:
        return None
    return (
        f"{record.saturated_fraction:.0%} of the pairs have a′ > 0.9 (limit {thresholds.saturated_fraction:.0%}) and "
        f"the margin gained {gain:.3g} since step {before.step}, less than {enough:.3g} "
        f"({thresholds.margin_gain:.2%} of it)"
    )


# The flags that stop a run, in the order in which reasons are given; `squeezing` alone only warns
STOPPING = ("displacement", "miscalibration", "drift", "saturation", "cooled_out")


@dataclass(frozen=True)
class StopDecision:
    """
    What early stopping says after a probe.

    Args:
        stop (`bool`):
            Whether to stop.
        refresh_negatives (`bool`):
            Whether to sample new negatives first, and go on.
        reasons (`tuple[str, ...]`):
            The rules that fired, in words; empty where none did.
        best_step (`int`, *optional*):
            Step of the probe with the largest held-out margin among those that raised no flag.
    """

    stop: bool
    refresh_negatives: bool
    reasons: tuple[str, ...]
    best_step: int | None


def early_stop(
    records: Sequence[ProbeRecord],
    thresholds: SignalThresholds = DEFAULTS,
    *,
    on_policy: bool = False,
    refreshed_at: int | None = None,
) -> StopDecision:
    """
    Whether to stop after the last record: some flag was raised by each of the last `patience` probes.

    Args:
        records (`Sequence[ProbeRecord]`):
            All records of the run.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.
        on_policy (`bool`, *optional*, defaults to `False`):
            Whether negatives can be sampled anew. If so, a mean weight that is too small asks for that once.
        refreshed_at (`int`, *optional*):
            Step at which that was done, if it was; only later probes count for this rule then.

    Returns:
        [`StopDecision`].
    """
    raised = [raised_flags(records[: end + 1], thresholds) for end in range(len(records))]
    reasons: list[str] = []
    refresh = False
    for name in STOPPING:
        since = refreshed_at if name == "cooled_out" and refreshed_at is not None else -1
        counted = [flags for flags, record in zip(raised, records, strict=True) if record.step > since]
        recent = counted[-thresholds.patience :]
        if len(recent) < thresholds.patience or not all(name in flags for flags in recent):
            continue
        message = f"{name}, {thresholds.patience} probe{'s' * (thresholds.patience > 1)} in a row; {recent[-1][name]}"
        if name == "cooled_out" and on_policy and refreshed_at is None:
            refresh = True
            message += "; new negatives first"
        reasons.append(message)
    stop = len(reasons) > int(refresh)
    return StopDecision(stop, refresh and not stop, tuple(reasons), _best_step(records, raised))


def _best_step(records: Sequence[ProbeRecord], raised: Sequence[dict[str, str]]) -> int | None:
    clean = [record for record, flags in zip(records, raised, strict=True) if not flags]
    return max(clean, key=lambda record: record.margin.mean).step if clean else None


# --- curriculum -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurriculumDecision:
    """
    What the curriculum says after a probe.

    Args:
        dataset_negative_fraction (`float`):
            Share of pairs that keep the dataset's negative from now on.
        reasons (`tuple[str, ...]`):
            The rules that fired, in words; empty where none did.
    """

    dataset_negative_fraction: float
    reasons: tuple[str, ...]


def curriculum(
    record: ProbeRecord, dataset_negative_fraction: float, thresholds: SignalThresholds = DEFAULTS
) -> CurriculumDecision:
    """
    Ask for more on-policy negatives where most of the pairs have become easy.

    Args:
        record ([`ProbeRecord`]):
            The last probe.
        dataset_negative_fraction (`float`):
            Share of pairs that keep the dataset's negative now.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        [`CurriculumDecision`].
    """
    easy = record.easy_fraction
    if easy is None or easy <= thresholds.easy_fraction or dataset_negative_fraction <= 0.0:
        return CurriculumDecision(dataset_negative_fraction, ())
    share = max(0.0, round(dataset_negative_fraction - thresholds.on_policy_increment, 10))
    reason = (
        f"step {record.step}: {easy:.0%} of the pairs have w < 0.1 (limit {thresholds.easy_fraction:.0%}), so the "
        f"on-policy share rises from {1 - dataset_negative_fraction:.2g} to {1 - share:.2g}"
    )
    return CurriculumDecision(share, (reason,))


def order_by_hardness(
    rejected_avg_logps: np.ndarray,
    order: PairOrder = "easy_to_hard",
    weights: np.ndarray | None = None,
    seed: int = 0,
    thresholds: SignalThresholds = DEFAULTS,
) -> np.ndarray:
    """
    In which order to train on pairs.

    Args:
        rejected_avg_logps (`np.ndarray` of shape `(N,)`):
            ℓ̄ of the rejected responses, nats per token: the likelier, the harder.
        order (`str`, *optional*, defaults to `"easy_to_hard"`):
            `"easy_to_hard"` sorts; `"weighted"` draws without replacement, in proportion to `weights`; `"random"`
            draws all alike.
        weights (`np.ndarray` of shape `(N,)`, *optional*):
            Cooling weights. Pairs with a weight below `filter_weight` are left out. Needed by `"weighted"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        `np.ndarray`: Indices of the pairs to train on, in order.

    Raises:
        ValueError: If `order` is unknown, or `"weighted"` gets no weights.
    """
    kept = np.arange(len(rejected_avg_logps))
    if weights is not None:
        kept = kept[np.asarray(weights) >= thresholds.filter_weight]
    if order == "easy_to_hard":
        return kept[np.argsort(np.asarray(rejected_avg_logps)[kept], kind="stable")]
    if order == "random":
        return np.random.default_rng(seed).permutation(kept)
    if order != "weighted":
        raise ValueError(f"`order` must be one of {list(get_args(PairOrder))}, got {order!r}.")
    if weights is None:
        raise ValueError("`order='weighted'` needs `weights`.")
    # Exponential keys: sorting by them draws without replacement in proportion to the weights
    with np.errstate(divide="ignore"):
        keys = np.random.default_rng(seed).exponential(size=kept.size) / np.asarray(weights)[kept]
    return kept[np.argsort(keys, kind="stable")]


# --- diagnosis ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """
    What the signs of the changes since the first probe say.

    Args:
        name (`str`):
            `"healthy"`, `"squeezing"`, `"entangled pairs"`, `"easy negatives dominate"`, `"cooled out"`, `"SFT-like
            drift"`, `"labels swapped or mask wrong"`, or `"unclear"`.
        advice (`str`):
            What to do.
        reason (`str`):
            The numbers it rests on.
    """

    name: str
    advice: str
    reason: str


@dataclass(frozen=True)
class _Row:
    # Signs: "+" rise, "-" fall (also a strong one), "--" strong fall, "0" none, "*" any, "0+" none or rise, "0-" none
    # or a fall that is not strong; weight: a kind, or "*"
    name: str
    chosen: str
    hard: str
    easy: str
    argmax: str
    weight: str
    advice: str


SWAPPED = "Check the data: chosen against rejected, masks."
# A model that has learnt its chosen responses cannot raise them much, easy responses fall a little with the hard ones
# that they share words with, and where only easy ones are pushed down, hard ones gain: no fault of their own
TABLE = (
    _Row("healthy", "0+", "-", "0-", "0", "not low", "Go on."),
    _Row(
        "squeezing",
        "-",
        "-",
        "--",
        "+",
        "*",
        "Set `cooling_mode='gate'`, lower `cooling_temperature` or the learning rate, or add an NLL term.",
    ),
    _Row("entangled pairs", "-", "-", "0", "0", "high", "Filter pairs that are too similar; anchor the chosen."),
    _Row(
        "easy negatives dominate",
        "0+",
        "0+",
        "--",
        "0",
        "low",
        "Check that β·L·τ < 1; filter easy pairs with `cooling_min_weight`, or take fresh negatives.",
    ),
    _Row("cooled out", "0", "0", "0", "0", "cooled", "Take fresh negatives, or lower `cooling_floor`."),
    _Row("SFT-like drift", "+", "+", "+", "+", "high", "Raise `beta`, or give the NLL term less weight."),
    _Row("labels swapped or mask wrong", "-", "+", "*", "*", "high", SWAPPED),
    # Hard responses share words with the chosen one, which holds them back; nothing else makes easy ones gain
    _Row("labels swapped or mask wrong", "-", "0+", "+", "*", "high", SWAPPED),
)


def diagnose(record: ProbeRecord, thresholds: SignalThresholds = DEFAULTS) -> Diagnosis:
    """
    Read the diagnosis off the signs of Δ0.

    Args:
        record ([`ProbeRecord`]):
            A later probe than the first.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        [`Diagnosis`]: the first row of the table that fits, or `"unclear"`. A run without cooling weights fits rows of
        any weight.
    """
    names = ("chosen", "rejected_hard", "rejected_easy", "argmax")
    deltas = [record.delta0(name) for name in names]
    signs = [_sign(record, name, thresholds) for name in names]
    numbers = [
        f"Δ0({name}) {'unknown' if delta is None else f'{delta.mean:+.3g} [{delta.low:+.3g}, {delta.high:+.3g}]'}"
        for name, delta in zip(names, deltas, strict=True)
    ]
    weight = "none" if record.mean_weight is None else f"{record.mean_weight:.3g}"
    reason = f"step {record.step}: {', '.join(numbers)} nats per token; mean cooling weight {weight}"
    for row in TABLE:
        wanted = (row.chosen, row.hard, row.easy, row.argmax)
        if all(map(_fits, signs, wanted)) and _weight_fits(record.mean_weight, row.weight, thresholds):
            return Diagnosis(row.name, row.advice, reason)
    return Diagnosis("unclear", "No known pattern: look at the single families.", reason)


def _sign(record: ProbeRecord, family: str, thresholds: SignalThresholds) -> str:
    delta = record.delta0(family)
    if delta is None:
        return "?"
    first = record.families[family].avg_logp.mean - delta.mean
    flat = max(thresholds.flat, thresholds.relative_flat * abs(first))
    if abs(delta.mean) <= flat or delta.low <= 0.0 <= delta.high:
        return "0"
    if delta.mean > 0:
        return "+"
    return "--" if delta.mean <= -thresholds.strong else "-"


def _fits(sign: str, wanted: str) -> bool:
    return sign in {"*": ("+", "-", "--", "0", "?"), "-": ("-", "--"), "0+": ("0", "+"), "0-": ("0", "-")}.get(
        wanted, (wanted,)
    )


def _weight_fits(weight: float | None, wanted: str, thresholds: SignalThresholds) -> bool:
    if weight is None or wanted == "*":
        return True
    return {
        "cooled": weight < thresholds.cooled_weight,
        "low": weight < thresholds.low_weight,
        "not low": weight >= thresholds.low_weight,
        "high": weight > thresholds.high_weight,
    }[wanted]
