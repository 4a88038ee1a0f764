"""The page of a comparison of models on held-out pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.report.catalogue import FAMILY_ORDER, PER_TOKEN, color_of, reliability_line
from trl_cwdpo.report.charts import Chart, Guide, Line, Section
from trl_cwdpo.report.examples import notable_examples
from trl_cwdpo.report.page import Part
from trl_cwdpo.report.tracks import Track
from trl_cwdpo.report.verdicts import FAMILY_NAMES

# How far models are set apart within a family
SPREAD = 0.5


def comparison_part(
    records: Mapping[str, ProbeRecord],
    reference: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    note: str,
    examples: Sequence[Any] = (),
) -> Part:
    """
    What a page says of models that were measured on the same pairs.

    Args:
        records (`Mapping[str, ProbeRecord]`):
            The measurement of each model.
        reference (`str`):
            The model that changes and distances refer to.
        table (`tuple[Sequence[str], Sequence[Sequence[str]]]`):
            Headers and rows.
        note (`str`):
            What they say.
        examples (`Sequence[ProbeExample]`, *optional*):
            The pairs, for people.

    Returns:
        [`~trl_cwdpo.report.page.Part`].
    """
    others = [name for name in records if name != reference]
    shown = [
        (name, found)
        for name in others
        if (found := notable_examples(_as_track(name, records[reference], records[name], examples)))
    ]
    charts = tuple(chart for chart in (_deltas(records, others), _reliability(records)) if not chart.is_empty)
    sections = (Section("measured", "What differs", charts),)
    return Part("comparison", f"Against {reference}", table=table, table_note=f"{note}.", sections=sections,
                examples=shown)  # fmt: skip


def _as_track(name: str, first: ProbeRecord, last: ProbeRecord, examples: Sequence[Any]) -> Track:
    return Track(name, Path(), records=(first, last), examples=tuple(asdict(example) for example in examples))


def _deltas(records: Mapping[str, ProbeRecord], names: Sequence[str]) -> Chart:
    families = [family for family in FAMILY_ORDER if any(records[name].delta0(family) for name in names)]
    lines = []
    for position, name in enumerate(names):
        shift = 0.0 if len(names) == 1 else SPREAD * (position / (len(names) - 1) - 0.5)
        points = [(place + shift, records[name].delta0(family)) for place, family in enumerate(families)]
        lines.append(Line.of_intervals(name, color_of(position + 1), points))
    return Chart(
        "families",
        "Δ log p by kind of response",
        "Change of the average token log-probability from the reference, with 95 % intervals over the pairs.",
        "",
        f"Δ log p, {PER_TOKEN}",
        tuple(lines),
        (Guide("no change", 0.0),),
        categories=tuple(FAMILY_NAMES[family] for family in families),
    )


def _reliability(records: Mapping[str, ProbeRecord]) -> Chart:
    return Chart(
        "reliability",
        "Reliability",
        "Of the tokens predicted with some confidence, how many were right. Below the diagonal a model is "
        "overconfident.",
        "confidence",
        "accuracy",
        tuple(reliability_line(record, name, color_of(i)) for i, (name, record) in enumerate(records.items())),
        (Guide("perfect"),),
        y_range=(-0.03, 1.03),
    )
