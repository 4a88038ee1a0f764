"""What probe records mean: flags, early stopping, curriculum and diagnosis, as pure functions (all rules ours).

Every number of every rule stands in [`~trl_cwdpo.signal_thresholds.SignalThresholds`]. Every decision says in words
which rules fired and with what numbers. "Two probes in a row" and the like count the records given, whose first one is
the probe before training.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from .probe_measures import Interval, is_displaced
from .probe_records import ProbeRecord
from .signal_thresholds import DEFAULTS as DEFAULTS
from .signal_thresholds import SignalThresholds as SignalThresholds

PairOrder = Literal["easy_to_hard", "weighted", "random"]

# Scales the median absolute deviation to a standard deviation of a normal sample
MAD_TO_STD = 1.48


def settled(record: ProbeRecord, thresholds: SignalThresholds = DEFAULTS) -> ProbeRecord:
    """
    A record without its rows, whose shares of saturated and easy pairs are those by these numbers.

    Args:
        record ([`ProbeRecord`]):
            A record. One that has lost its rows keeps the shares that were measured.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        [`ProbeRecord`], all that decisions rest on, and small.
    """
    saturated, easy = _saturated_fraction(record, thresholds), _easy_fraction(record, thresholds)
    return replace(record, saturated_fraction=saturated, easy_fraction=easy).without_rows()


def _saturated_fraction(record: ProbeRecord, thresholds: SignalThresholds) -> float | None:
    found = np.asarray(record.row_preferences)
    return float((found > thresholds.saturated_preference).mean()) if found.size else record.saturated_fraction


def _easy_fraction(record: ProbeRecord, thresholds: SignalThresholds) -> float | None:
    found = np.asarray(record.row_weights)
    return float((found < thresholds.easy_weight).mean()) if found.size else record.easy_fraction


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
    fraction = _saturated_fraction(record, thresholds)
    if fraction is None or fraction < thresholds.saturated_fraction or gain >= enough:
        return None
    return (
        f"{fraction:.0%} of the pairs have a′ > {thresholds.saturated_preference:.3g} (limit "
        f"{thresholds.saturated_fraction:.0%}) and the margin gained {gain:.3g} since step {before.step}, less than "
        f"{enough:.3g} ({thresholds.margin_gain:.2%} of it)"
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
    easy = _easy_fraction(record, thresholds)
    if easy is None or easy <= thresholds.easy_fraction or dataset_negative_fraction <= 0.0:
        return CurriculumDecision(dataset_negative_fraction, ())
    share = max(0.0, round(dataset_negative_fraction - thresholds.on_policy_increment, 10))
    reason = (
        f"step {record.step}: {easy:.0%} of the pairs have w < {thresholds.easy_weight:.3g} (limit "
        f"{thresholds.easy_fraction:.0%}), so the on-policy share rises from {1 - dataset_negative_fraction:.2g} to "
        f"{1 - share:.2g}"
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


# --- gradient spikes ------------------------------------------------------------------------------------------------


def gradient_spikes(norms: Sequence[float] | np.ndarray, thresholds: SignalThresholds = DEFAULTS) -> np.ndarray:
    """
    Gradient norms far above those before them: by default above median + 6·1.48·MAD and above 3 × median of 50.

    Args:
        norms (`Sequence[float]` of length `N`):
            Gradient norms in the order of training.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        `np.ndarray` of shape `(N,)`, of booleans. A norm that is not finite is a spike, and no part of a window.
    """
    return np.fromiter(_spikes(norms, thresholds), dtype=bool)


def _spikes(norms: Sequence[float] | np.ndarray, thresholds: SignalThresholds) -> Iterator[bool]:
    before: list[float] = []
    for norm in map(float, norms):
        if not math.isfinite(norm):
            yield True
            continue
        recent = np.asarray(before[-thresholds.spike_window :])
        if recent.size < thresholds.spike_minimum:
            yield False
        else:
            median = float(np.median(recent))
            deviation = MAD_TO_STD * float(np.median(np.abs(recent - median)))
            far = norm > median + thresholds.spike_deviations * deviation
            yield far and norm > thresholds.spike_ratio * median
        before.append(norm)


# --- diagnosis ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """
    What the signs of the changes since the first probe say.

    Args:
        name (`str`):
            `"healthy"`, `"squeezing"`, `"entangled pairs"`, `"easy negatives dominate"`, `"cooled out"`, `"SFT-like
            drift"`, `"labels swapped or mask wrong"`, `"nothing moved yet"`, or `"unclear"`.
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
STILL = (
    "Train for more steps or raise `learning_rate`; a smaller `beta` lets the policy go further before a pair counts "
    "as learned."
)
MOVING = ("chosen", "rejected", "rejected_hard", "rejected_easy", "argmax")
# Where the method's table wants a middle or high weight, any will do that is not cooled out: how high a healthy one is
# depends on the preset. A model that has learnt its chosen responses cannot raise them much, easy responses fall a
# little with the hard ones that they share words with, and where only easy ones are pushed down, hard ones gain: no
# fault of their own
TABLE = (
    _Row("healthy", "0+", "-", "0-", "0", "not cooled", "Go on."),
    _Row(
        "squeezing",
        "-",
        "-",
        "--",
        "+",
        "*",
        "Set `cooling_mode='gate'`, lower `cooling_temperature` or the learning rate, or add an NLL term.",
    ),
    _Row("entangled pairs", "-", "-", "0", "0", "not cooled", "Filter pairs that are too similar; anchor the chosen."),
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
    _Row("SFT-like drift", "+", "+", "+", "+", "not cooled", "Raise `beta`, or give the NLL term less weight."),
    _Row("labels swapped or mask wrong", "-", "+", "*", "*", "not cooled", SWAPPED),
    # Hard responses share words with the chosen one, which holds them back; nothing else makes easy ones gain
    _Row("labels swapped or mask wrong", "-", "0+", "+", "*", "not cooled", SWAPPED),
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
        [`Diagnosis`]: the first row of the table that fits; `"nothing moved yet"` if none does and all families are
        about where they were; or `"unclear"`. A run without cooling weights fits rows of any weight, but is not cooled
        out.
    """
    names = ("chosen", "rejected_hard", "rejected_easy", "argmax")
    deltas = [record.delta0(name) for name in names]
    signs = [_sign(record, name, thresholds) for name in names]
    numbers = [
        f"Δ0({name}) {'unknown' if delta is None else f'{delta.mean:+.3f} [{delta.low:+.3f}, {delta.high:+.3f}]'}"
        for name, delta in zip(names, deltas, strict=True)
    ]
    weight = "none" if record.mean_weight is None else f"{record.mean_weight:.3g}"
    reason = f"step {record.step}: {', '.join(numbers)} nats per token; mean cooling weight {weight}"
    for row in TABLE:
        wanted = (row.chosen, row.hard, row.easy, row.argmax)
        if all(map(_fits, signs, wanted)) and _weight_fits(record.mean_weight, row.weight, thresholds):
            return Diagnosis(row.name, row.advice, reason)
    if is_still(record, thresholds):
        return Diagnosis("nothing moved yet", STILL, reason)
    return Diagnosis("unclear", "No known pattern: look at the single families.", reason)


def is_still(record: ProbeRecord, thresholds: SignalThresholds = DEFAULTS) -> bool:
    """
    Whether training has hardly moved anything: too short, too small a learning rate, or nothing left to learn.

    Args:
        record ([`ProbeRecord`]):
            A later probe than the first.
        thresholds ([`SignalThresholds`], *optional*):
            The numbers.

    Returns:
        `bool`: False where chosen responses are displaced or the negatives are cooled out all the same.
    """
    chosen, weight = record.delta0("chosen"), record.mean_weight
    if chosen is None or chosen.high < thresholds.displacement:
        return False
    if weight is not None and weight < thresholds.cooled_weight:
        return False
    known = ((name, delta) for name in MOVING if (delta := record.delta0(name)) is not None)
    return all(abs(delta.mean) <= thresholds.still * _flat(record, name, delta, thresholds) for name, delta in known)


def _flat(record: ProbeRecord, family: str, delta: Interval, thresholds: SignalThresholds) -> float:
    # Up to which change, in nats per token, a family counts as unmoved
    first = record.families[family].avg_logp.mean - delta.mean
    return max(thresholds.flat, thresholds.relative_flat * abs(first))


def _sign(record: ProbeRecord, family: str, thresholds: SignalThresholds) -> str:
    delta = record.delta0(family)
    if delta is None:
        return "?"
    if abs(delta.mean) <= _flat(record, family, delta, thresholds) or delta.low <= 0.0 <= delta.high:
        return "0"
    if delta.mean > 0:
        return "+"
    return "--" if delta.mean <= -thresholds.strong else "-"


def _fits(sign: str, wanted: str) -> bool:
    return sign in {"*": ("+", "-", "--", "0", "?"), "-": ("-", "--"), "0+": ("0", "+"), "0-": ("0", "-")}.get(
        wanted, (wanted,)
    )


def _weight_fits(weight: float | None, wanted: str, thresholds: SignalThresholds) -> bool:
    if weight is None:
        return wanted != "cooled"
    if wanted == "*":
        return True
    return {
        "cooled": weight < thresholds.cooled_weight,
        "low": weight < thresholds.low_weight,
        "not cooled": weight >= thresholds.cooled_weight,
    }[wanted]
