"""What a probe found: one record a probe, one line of JSON a record in `probes.jsonl` of the output directory.

A line is an object with the fields of [`ProbeRecord`]. `schema_version` grows when a field changes its meaning or
goes; a reader ignores fields that it does not know. Numbers that are not defined (no reference, no pair loss, no
earlier probe) are null. All log-probabilities are in nats.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .probe_measures import Interval

SCHEMA_VERSION = 1
RECORDS_FILE = "probes.jsonl"
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class FamilyMeasure:
    """
    One response family in one probe.

    Args:
        avg_logp ([`Interval`]):
            ℓ̄, mean over the rows, nats per token.
        rows (`tuple[int, ...]`):
            Positions, among the probe's rows, of those that have this response.
        row_avg_logps (`tuple[float, ...]`):
            ℓ̄ of each of these rows, nats per token.
        delta0 ([`Interval`], *optional*):
            Change since the first probe, paired by row; zero in the first probe itself.
        delta_prev ([`Interval`], *optional*):
            Change since the probe before.
    """

    avg_logp: Interval
    rows: tuple[int, ...]
    row_avg_logps: tuple[float, ...]
    delta0: Interval | None = None
    delta_prev: Interval | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FamilyMeasure":
        """Inverse of `dataclasses.asdict`."""
        return cls(
            avg_logp=Interval.from_dict(data["avg_logp"]) or UNKNOWN,
            rows=tuple(data["rows"]),
            row_avg_logps=tuple(math.nan if value is None else value for value in data["row_avg_logps"]),
            delta0=Interval.from_dict(data.get("delta0")),
            delta_prev=Interval.from_dict(data.get("delta_prev")),
        )


def _mean(interval: Interval | None) -> float | None:
    return None if interval is None else interval.mean


@dataclass(frozen=True)
class ProbeRecord:
    """
    What one probe found.

    Args:
        step (`int`):
            Optimizer steps done.
        num_rows (`int`):
            Rows measured.
        families (`dict[str, FamilyMeasure]`):
            By name: `chosen`, `rejected`, `rejected_hard`, `rejected_easy`, `rephrase`, `mismatched`, `shuffled`,
            `argmax`.
        entropy (`float`):
            Mean over the chosen tokens, nats.
        top1_mass (`float`):
            Mean probability of the most likely token at the chosen positions.
        brier (`float`):
            Mean of ‖e_y − p‖² at the chosen positions, in [0, 2].
        ece (`float`):
            Expected calibration error there, 15 bins.
        smooth_ece (`float`):
            Smooth calibration error there.
        margin ([`Interval`]):
            Δ_w − Δ_l, uncooled, against the reference (without one, against the first probe), nats per sequence.
        epoch (`float`, *optional*):
            Epochs done.
        baseline_step (`int`, *optional*):
            Step of the first probe, which Δ0 refers to.
        previous_step (`int`, *optional*):
            Step of the probe before, which Δprev refers to.
        squeezing_index ([`Interval`], *optional*):
            See [`~trl_cwdpo.probe_measures.squeezing_index`], nats per token.
        displacement (`bool`, *optional*):
            See [`~trl_cwdpo.probe_measures.is_displaced`].
        total_variation (`float`, *optional*):
            To the reference, mean over the chosen tokens.
        jensen_shannon (`float`, *optional*):
            Distance to the reference (base 2), mean over the chosen tokens.
        kullback_leibler (`float`, *optional*):
            KL of the policy from the reference, mean over the chosen tokens, nats.
        loser_share (`float`, *optional*):
            Mean share of the rejected side in a pair's push.
        saturated_fraction (`float`, *optional*):
            Share of pairs with a′ > 0.9 (a in `"gate"` mode and without cooling), or above another
            `saturated_preference` of the run.
        weight (`float`, *optional*):
            Mean cooling weight w of the rows.
        trained_weight (`float`, *optional*):
            Mean cooling weight of the pairs trained on since the probe before, as logged; where nothing was, that of
            the probe before; in the first probe, that of the sample that `"auto"` was solved on, from its quantiles.
        easy_fraction (`float`, *optional*):
            Share of pairs with w < 0.1, or below another `easy_weight` of the run.
        accuracy (`float`, *optional*):
            Share of pairs with Δ_w > Δ_l.
        row_margins (`tuple[float, ...]`):
            Δ_w − Δ_l of each row, nats per sequence.
        row_weights (`tuple[float, ...]`):
            Cooling weight w of each row; empty without cooling.
        row_preferences (`tuple[float, ...]`):
            a′ of each row (a in `"gate"` mode and without cooling); empty without a pair loss.
        reliability (`tuple[tuple[int, float, float], ...]`):
            Of each bin of the calibration error that is not empty: tokens, mean confidence, accuracy.
        grad_spikes (`int`, *optional*):
            Spikes among the logged gradient norms since the probe before.
        seconds (`float`, *optional*):
            Time the probe took.
        schema_version (`int`):
            Version of this layout.
    """

    step: int
    num_rows: int
    families: dict[str, FamilyMeasure]
    entropy: float
    top1_mass: float
    brier: float
    ece: float
    smooth_ece: float
    margin: Interval
    epoch: float | None = None
    baseline_step: int | None = None
    previous_step: int | None = None
    squeezing_index: Interval | None = None
    displacement: bool | None = None
    total_variation: float | None = None
    jensen_shannon: float | None = None
    kullback_leibler: float | None = None
    loser_share: float | None = None
    saturated_fraction: float | None = None
    weight: float | None = None
    trained_weight: float | None = None
    easy_fraction: float | None = None
    accuracy: float | None = None
    row_margins: tuple[float, ...] = ()
    row_weights: tuple[float, ...] = ()
    row_preferences: tuple[float, ...] = ()
    reliability: tuple[tuple[int, float, float], ...] = ()
    grad_spikes: int | None = None
    seconds: float | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no NaN or infinity: such numbers become null."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ProbeRecord":
        """
        Inverse of [`~ProbeRecord.to_dict`].

        Raises:
            ValueError: If the record was written by a later version of the layout.
        """
        version = data.get("schema_version", SCHEMA_VERSION)
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"The probe record of step {data.get('step')} has schema_version={version}, this version of "
                f"trl-cwdpo reads up to {SCHEMA_VERSION}. Update trl-cwdpo."
            )
        known = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        values["families"] = {name: FamilyMeasure.from_dict(family) for name, family in data["families"].items()}
        values["margin"] = Interval.from_dict(data["margin"]) or UNKNOWN
        values["squeezing_index"] = Interval.from_dict(data.get("squeezing_index"))
        for name in ("row_margins", "row_weights", "row_preferences"):
            values[name] = tuple(math.nan if value is None else value for value in data.get(name, ()))
        values["reliability"] = tuple((int(n), sure, right) for n, sure, right in data.get("reliability", ()))
        for name in ("entropy", "top1_mass", "brier", "ece", "smooth_ece"):
            values[name] = math.nan if data[name] is None else data[name]
        return cls(**values)

    @property
    def mean_weight(self) -> float | None:
        """Mean cooling weight of the pairs trained on or, where that has not been logged, of the rows."""
        return self.weight if self.trained_weight is None else self.trained_weight

    def without_rows(self) -> "ProbeRecord":
        """The record without what it says of single rows and bins: all that decisions rest on, and small."""
        families = {name: replace(family, rows=(), row_avg_logps=()) for name, family in self.families.items()}
        return replace(self, families=families, row_margins=(), row_weights=(), row_preferences=(), reliability=())

    def delta0(self, family: str) -> Interval | None:
        """Change of a family since the first probe, or `None` where it is not known."""
        measured = self.families.get(family)
        return None if measured is None else measured.delta0

    def metrics(self) -> dict[str, float]:
        """The metrics that are logged, those that are defined."""
        values: dict[str, float | None] = {}
        for name, family in self.families.items():
            values[f"probe/{name}/avg_logp"] = family.avg_logp.mean
            values[f"probe/{name}/delta0"] = _mean(family.delta0)
            values[f"probe/{name}/delta_prev"] = _mean(family.delta_prev)
        values |= {
            "probe/squeezing_index": _mean(self.squeezing_index),
            "probe/displacement": None if self.displacement is None else float(self.displacement),
            "probe/accuracy": self.accuracy,
            "probe/loser_share": self.loser_share,
            "probe/ece": self.ece,
            "probe/brier": self.brier,
            "probe/entropy": self.entropy,
            "probe/top1_mass": self.top1_mass,
            "probe/tv": self.total_variation,
            "probe/js": self.jensen_shannon,
            "probe/kl": self.kullback_leibler,
            "probe/grad_spikes": None if self.grad_spikes is None else float(self.grad_spikes),
        }
        return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:  # noqa: ANN401 (a record, or a value in it)
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: str | os.PathLike[str]) -> list[ProbeRecord]:
    """
    Read the records of a run.

    Args:
        path (`str` or `Path`):
            `probes.jsonl`, or the output directory that holds it.

    Returns:
        `list[ProbeRecord]`, in the order of the file. A last line cut off by a crash is left out.

    Raises:
        ValueError: If another line is no record.
    """
    path = Path(path)
    path = path / RECORDS_FILE if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            continue
        try:
            records.append(ProbeRecord.from_dict(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no probe record: {error!r}. Remove the line.") from error
    return records


def append_record(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Add what [`~ProbeRecord.to_dict`] returned to the file at `path`, which is created where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def write_records(path: str | os.PathLike[str], records: Iterable[ProbeRecord]) -> None:
    """Replace the file at `path` by these records, in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    lines = [json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records]
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
