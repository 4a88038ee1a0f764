"""Which of the probed rows a report shows: the hardest negatives and those that have cooled the most."""

import math
from dataclasses import dataclass
from typing import Any

from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.report.tracks import Track

SHOWN = 4
# What the examples may be: pictures written by the probes, nothing that a page would fetch or run
PICTURE = ("data:image/png;base64,", "data:image/jpeg;base64,")


@dataclass(frozen=True)
class Example:
    """
    One row of the probes.

    Args:
        index (`int`, *optional*):
            Its number in the dataset.
        prompt, chosen, rejected (`str`):
            Its texts.
        pictures (`tuple[str, ...]`):
            `data:` URLs.
        numbers (`tuple[tuple[str, str], ...]`):
            What was measured, by name.
    """

    index: int | None
    prompt: str
    chosen: str
    rejected: str
    pictures: tuple[str, ...]
    numbers: tuple[tuple[str, str], ...]


def notable_examples(track: Track, count: int = SHOWN) -> list[tuple[str, str, list[Example]]]:
    """
    The rows at both ends of the last probe.

    Args:
        track ([`~trl_cwdpo.report.tracks.Track`]):
            The training.
        count (`int`, *optional*, defaults to `4`):
            Rows of each kind.

    Returns:
        `list[tuple[str, str, list[Example]]]`: Title, explanation and rows of each kind; empty where texts or probes
        are missing.
    """
    if not track.records or not track.examples:
        return []
    last = track.records[-1]
    by_weight = bool(last.row_weights) and len(set(last.row_weights)) > 1
    values = _by_row(last)[1] if not by_weight else dict(enumerate(last.row_weights))
    ranked = sorted(
        (row for row, value in values.items() if row < len(track.examples) and math.isfinite(value)),
        key=lambda row: (-values[row], row),
    )
    hardest = ranked[:count]
    easiest = [row for row in reversed(ranked) if row not in hardest][:count]
    measure = "cooling weight" if by_weight else "average log-probability"
    kinds = [
        ("Hardest negatives", f"The rejected responses with the largest {measure}. Look whether "
         "they are really worse than the chosen ones: the hardest are often mislabelled.", hardest),
        ("Most cooled negatives" if by_weight else "Easiest negatives", f"Those with the smallest {measure}: they "
         "teach the model nothing any more. Look whether they were worth having.", easiest),
    ]  # fmt: skip
    return [(title, note, [_example(track, row) for row in rows]) for title, note, rows in kinds if rows]


def _by_row(record: ProbeRecord) -> tuple[dict[int, float], dict[int, float]]:
    """ℓ̄ of chosen and rejected, by position of the row."""
    chosen, rejected = (record.families[side] for side in ("chosen", "rejected"))
    return (
        dict(zip(chosen.rows, chosen.row_avg_logps, strict=True)),
        dict(zip(rejected.rows, rejected.row_avg_logps, strict=True)),
    )


def _example(track: Track, row: int) -> Example:
    first, last = track.records[0], track.records[-1]
    raw: dict[str, Any] = track.examples[row]
    numbers = []
    if last.row_weights:
        before = first.row_weights[row] if row < len(first.row_weights) else None
        numbers.append(("weight w", _change(before, last.row_weights[row], 2)))
    for name, old, new in zip(("chosen", "rejected"), _by_row(first), _by_row(last), strict=True):
        numbers.append((f"log p / token, {name}", _change(old.get(row), new.get(row), 2)))
    if row < len(last.row_margins):
        numbers.append(("margin", f"{last.row_margins[row]:+.2f}"))
    if raw.get("hardness"):
        numbers.append(("marked as", str(raw["hardness"])))
    return Example(
        index=raw.get("index"),
        prompt=str(raw.get("prompt", "")),
        chosen=str(raw.get("chosen", "")),
        rejected=str(raw.get("rejected", "")),
        pictures=tuple(url for url in raw.get("pictures", ()) if str(url).startswith(PICTURE)),
        numbers=tuple(numbers),
    )


def _change(before: float | None, after: float | None, digits: int) -> str:
    if after is None:
        return "–"
    return f"{after:.{digits}f}" if before is None else f"{before:.{digits}f} → {after:.{digits}f}"
