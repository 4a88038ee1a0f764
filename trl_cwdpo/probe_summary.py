"""From the sums of a probe's forward passes to its record: families, changes, intervals and what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import objectives, probe_measures
from .probe_measures import Interval, bootstrap
from .probe_options import FAMILIES, FORWARD_FAMILIES
from .probe_records import FamilyMeasure, ProbeRecord
from .probe_rows import ProbeRows
from .signal_thresholds import DEFAULTS, SignalThresholds


@dataclass(frozen=True)
class PairLoss:
    """
    The preference loss in force, for cooling weights and the loser share.

    Args:
        beta (`float`):
            β.
        mode (`str`, *optional*, defaults to `"off"`):
            Cooling mode.
        floor (`float`, *optional*, defaults to `0.0`):
            ℓ_floor, nats per token; `"loss"` and `"gate"` read it.
        temperature (`float`, *optional*, defaults to `1.0`):
            τ, nats per token.
        constant (`float`, *optional*, defaults to `0.5`):
            w of `"constant"`.
        min_weight (`float`, *optional*, defaults to `0.0`):
            Weights below it are 0.
    """

    beta: float
    mode: objectives.CoolingMode = "off"
    floor: float = 0.0
    temperature: float = 1.0
    constant: float = 0.5
    min_weight: float = 0.0

    @property
    def grades(self) -> bool:
        """Whether weights differ between responses."""
        return self.mode in ("loss", "gate")

    def weights(self, rejected_avg_logps: np.ndarray) -> np.ndarray:
        """Cooling weight of each rejected response, from its ℓ̄ (nats per token)."""
        avg_logps = torch.as_tensor(rejected_avg_logps)
        if self.grades:
            return objectives.cooling_weight(avg_logps, self.floor, self.temperature, self.min_weight).numpy()
        constant = torch.full_like(avg_logps, self.constant if self.mode == "constant" else 1.0)
        return objectives.filter_weights(constant, self.min_weight if self.mode == "constant" else 0.0).numpy()


def summarise(
    found: list[dict[str, Any]],
    rows: ProbeRows,
    families: Sequence[str],
    pair_loss: PairLoss | None,
    baseline: ProbeRecord | None,
    previous: ProbeRecord | None,
    thresholds: SignalThresholds = DEFAULTS,
) -> ProbeRecord:
    """
    Make the record of one probe.

    Args:
        found (`list[dict]`):
            What [`~trl_cwdpo.probe_passes.Passes.all_rows`] returned.
        rows ([`ProbeRows`]):
            The rows that were measured.
        families (`Sequence[str]`):
            Families to report; `"chosen"` and `"rejected"` are in any case.
        pair_loss ([`PairLoss`], *optional*):
            The preference loss, if there is one.
        baseline ([`ProbeRecord`], *optional*):
            The first probe of the run.
        previous ([`ProbeRecord`], *optional*):
            The probe before.
        thresholds ([`SignalThresholds`], *optional*):
            What counts as easy, saturated and displaced.

    Returns:
        [`ProbeRecord`], of step 0.
    """
    values = _row_values(found, rows, pair_loss, baseline, thresholds)
    measures = {
        name: _family_measure(name, values[name], baseline, previous, rows.seed)
        for name in FAMILIES
        if values.get(name) and name in {*families, "chosen", "rejected"}
    }
    margins, pair_values = _pairs(found, pair_loss, baseline, thresholds)
    margin = bootstrap(margins, rows.seed)
    chosen = [row["chosen"] for row in found]
    tokens = sum(row["length"] for row in chosen)
    confidence = np.concatenate([row["confidence"] for row in chosen])
    correct = np.concatenate([row["correct"] for row in chosen])

    def mean(name: str) -> float | None:
        return sum(row[name] for row in chosen) / tokens if name in chosen[0] else None

    delta0 = measures["chosen"].delta0
    displaced = None
    if baseline is not None and delta0 is not None:
        rise = margin.mean - baseline.margin.mean
        displaced = probe_measures.is_displaced(delta0.high, rise, thresholds.displacement)
    return ProbeRecord(
        step=0,
        num_rows=len(found),
        families=measures,
        entropy=mean("entropy") or 0.0,
        top1_mass=float(confidence.mean()),
        brier=mean("brier") or 0.0,
        ece=probe_measures.expected_calibration_error(confidence, correct),
        smooth_ece=probe_measures.smooth_calibration_error(confidence, correct),
        margin=margin,
        accuracy=None if pair_loss is None and baseline is None else float((margins > 0).mean()),
        row_margins=tuple(margins.tolist()),
        reliability=tuple(probe_measures.reliability(confidence, correct)),
        squeezing_index=_squeezing(measures, baseline, rows.seed),
        displacement=displaced,
        total_variation=mean("total_variation"),
        jensen_shannon=mean("jensen_shannon"),
        kullback_leibler=mean("kullback_leibler"),
        **pair_values,
    )


def _row_values(
    found: list[dict[str, Any]],
    rows: ProbeRows,
    pair_loss: PairLoss | None,
    baseline: ProbeRecord | None,
    thresholds: SignalThresholds,
) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {}
    for family in FORWARD_FAMILIES:
        values[family] = {
            row["position"]: row[family]["logp"] / row[family]["length"]
            for row in found
            if family in row and family in rows.rows[row["position"]].completions
        }
    values["argmax"] = {row["position"]: row["chosen"]["argmax"] / row["chosen"]["length"] for row in found}
    hard, easy = _split(values["rejected"], rows, pair_loss, baseline, thresholds)
    for name, members in (("rejected_hard", hard), ("rejected_easy", easy)):
        values[name] = {position: values["rejected"][position] for position in members}
    return values


def _split(
    rejected: dict[int, float],
    rows: ProbeRows,
    pair_loss: PairLoss | None,
    baseline: ProbeRecord | None,
    thresholds: SignalThresholds,
) -> tuple[list[int], list[int]]:
    # Once and for all in the first probe: a response that is cooled down stays what it was
    if baseline is not None:
        known = [baseline.families.get(name) for name in ("rejected_hard", "rejected_easy")]
        hard, easy = (list(family.rows) if family else [] for family in known)
        return hard, easy
    if rows.has_hardness:
        grades = {position: rows.rows[position].hardness for position in rejected}
        hard, easy = ([p for p, grade in grades.items() if grade == wanted] for wanted in ("hard", "easy"))
        return hard, easy
    positions, avg_logps = list(rejected), np.array(list(rejected.values()))
    if pair_loss is not None and pair_loss.grades:
        is_hard = pair_loss.weights(avg_logps) >= thresholds.hard_weight
    else:
        is_hard = avg_logps >= np.quantile(avg_logps, thresholds.easy_quantile)
    return [p for p, h in zip(positions, is_hard, strict=True) if h], [
        p for p, h in zip(positions, is_hard, strict=True) if not h
    ]


def _family_measure(
    name: str, values: dict[int, float], baseline: ProbeRecord | None, previous: ProbeRecord | None, seed: int
) -> FamilyMeasure:
    def delta(record: ProbeRecord | None) -> Interval | None:
        changes = _changes(name, values, record)
        return bootstrap(list(changes.values()), seed) if changes else None

    return FamilyMeasure(
        avg_logp=bootstrap(list(values.values()), seed),
        rows=tuple(values),
        row_avg_logps=tuple(values.values()),
        delta0=Interval(0.0, 0.0, 0.0) if baseline is None else delta(baseline),
        delta_prev=delta(previous),
    )


def _changes(name: str, values: dict[int, float], record: ProbeRecord | None) -> dict[int, float]:
    before = None if record is None else record.families.get(name)
    if before is None:
        return {}
    old = dict(zip(before.rows, before.row_avg_logps, strict=True))
    return {position: value - old[position] for position, value in values.items() if position in old}


def _squeezing(measures: dict[str, FamilyMeasure], baseline: ProbeRecord | None, seed: int) -> Interval | None:
    names = ("argmax", "chosen", "rejected", "mismatched")
    if baseline is None or any(name not in measures for name in names):
        return None
    changes = [
        _changes(name, dict(zip(measures[name].rows, measures[name].row_avg_logps, strict=True)), baseline)
        for name in names
    ]
    common = sorted(set.intersection(*(set(change) for change in changes)))
    if not common:
        return None
    argmax, *others = (np.array([change[position] for position in common]) for change in changes)
    return bootstrap(probe_measures.squeezing_index(argmax, others), seed)


def _pairs(
    found: list[dict[str, Any]],
    pair_loss: PairLoss | None,
    baseline: ProbeRecord | None,
    thresholds: SignalThresholds,
) -> tuple[np.ndarray, dict[str, Any]]:
    # Margins Δ_w − Δ_l of the pairs, and what depends on the loss
    ratios = {side: _log_ratios(found, side, baseline) for side in ("chosen", "rejected")}
    margins = ratios["chosen"] - ratios["rejected"]
    if pair_loss is None:
        return margins, {}
    weights = pair_loss.weights(np.array([row["rejected"]["logp"] / row["rejected"]["length"] for row in found]))
    coefficients = objectives.gradient_coefficients(
        torch.as_tensor(ratios["chosen"]),
        torch.as_tensor(ratios["rejected"]),
        torch.as_tensor(weights),
        pair_loss.beta,
        pair_loss.mode,
    )
    chosen, rejected = (coefficient.numpy() for coefficient in coefficients)
    brier = [np.array([row[side]["brier"] for row in found]) for side in ("chosen", "rejected")]
    preferences = 1.0 + chosen / pair_loss.beta
    values: dict[str, Any] = {
        "loser_share": float(probe_measures.loser_share(chosen, rejected, *brier).mean()),
        "saturated_fraction": float((preferences > thresholds.saturated_preference).mean()),
        "row_preferences": tuple(preferences.tolist()),
    }
    if pair_loss.mode != "off":
        values |= {
            "weight": float(weights.mean()),
            "easy_fraction": float((weights < thresholds.easy_weight).mean()),
            "row_weights": tuple(weights.tolist()),
        }
    return margins, values


def _log_ratios(found: list[dict[str, Any]], side: str, baseline: ProbeRecord | None) -> np.ndarray:
    logps = np.array([row[side]["logp"] for row in found])
    if "reference" in found[0][side]:
        return logps - np.array([row[side]["reference"] for row in found])
    if baseline is None:
        return np.zeros_like(logps)
    before = baseline.families[side]
    old = dict(zip(before.rows, before.row_avg_logps, strict=True))
    return logps - np.array([old[row["position"]] * row[side]["length"] for row in found])
