"""Which charts a report has: those of one training, or the same of several laid over each other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from trl_cwdpo.probe_measures import Interval
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.report.charts import Chart, Guide, HeatMap, Line, Section, Stack
from trl_cwdpo.report.colors import RUN_COLORS
from trl_cwdpo.report.tracks import Track
from trl_cwdpo.report.verdicts import FAMILY_NAMES
from trl_cwdpo.signal_thresholds import SignalThresholds
from trl_cwdpo.signals import settled

STEP = "optimizer step"
PER_TOKEN = "nats per token"
DIAGNOSED = ("chosen", "rejected_hard", "rejected_easy", "argmax")
CONTROLS = ("rejected", "rephrase", "mismatched", "shuffled")
FAMILY_ORDER = ("chosen", "rephrase", "rejected", "rejected_hard", "rejected_easy", "mismatched", "shuffled", "argmax")
STYLES = {"rejected_hard": "dash", "rejected_easy": "dot", "mismatched": "dash", "shuffled": "dot"}
FAMILY_NOTES = {
    "chosen": "Should rise, or at least hold. A fall while the margin grows is displacement.",
    "rejected_hard": "Should fall: these are the negatives that still teach something.",
    "rejected_easy": "Should stay: pushing what is already unlikely only distorts the model.",
    "argmax": "What the model would say anyway. Rising while the others fall is squeezing.",
    "rejected": "All rejected responses together.",
    "rephrase": "Other wordings of the chosen responses: should move with them.",
    "mismatched": "Good answers to other rows: a rise means that answers no longer depend on the prompt or picture.",
    "shuffled": "The chosen tokens in disorder: should stay low.",
}
WEIGHT_BINS = 20


def sections_of(stage: str, tracks: Sequence[Track], thresholds: SignalThresholds | None = None) -> list[Section]:
    """
    The charts of one stage.

    Args:
        stage (`str`):
            `"stage1"` or `"stage2"`; part of the charts' keys.
        tracks (`Sequence[Track]`):
            The trainings, laid over each other.
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            Numbers that some charts show as lines to compare with; by default, those of the first training.

    Returns:
        `list[Section]`, without charts and sections that would be empty.
    """
    thresholds = thresholds or tracks[0].thresholds
    sections = [
        Section("responses", "What happened to the responses", _responses(tracks)),
        Section("pairs", "Chosen against rejected", _pairs(tracks)),
        Section("cooling", "Cooling", _cooling(tracks, thresholds)),
        Section("calibration", "Sharpness and calibration", _calibration(tracks, thresholds)),
        Section("optimization", "Optimization", _optimization(tracks)),
    ]
    filled = []
    for section in sections:
        charts = tuple(
            _with_range(replace(chart, key=f"{stage}-{chart.key}", lines=_filled(chart.lines)))
            for chart in section.charts
            if not chart.is_empty
        )
        if charts:
            filled.append(replace(section, key=f"{stage}-{section.key}", charts=charts))
    return filled


def _filled(lines: Sequence[Line]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line.x)


def _with_range(chart: Chart) -> Chart:
    """Limits of the axis that hold all curves and guides, and do not blow a tiny change up to a large one."""
    if chart.y_range is not None or chart.log_y or chart.stack is not None or not chart.lines:
        return chart
    ends = [y for line in chart.lines for y in (*line.y, *line.low, *line.high) if y is not None and math.isfinite(y)]
    ends += [guide.value for guide in chart.guides if guide.value is not None]
    if not ends:
        return chart
    low, high = min(ends), max(ends)
    missing = max(0.0, chart.min_span - (high - low))
    # Room is given where the quantity can go: nothing here that starts at zero goes below it for want of room
    below = min(missing / 2, low) if low >= 0 else missing / 2
    low, high = low - below, high + missing - below
    air = 0.05 * (high - low) or 0.5
    return replace(chart, y_range=(low - air, high + air))


def color_of(position: int) -> str:
    """The colour of a run, by its place in the list."""
    return RUN_COLORS[position % len(RUN_COLORS)]


def _curves(
    tracks: Sequence[Track], value: Callable[[ProbeRecord], Interval | float | None], name: str, color: str
) -> tuple[Line, ...]:
    """One quantity over the steps: of one run in the colour of the quantity, of several in those of the runs."""
    lines = []
    for position, track in enumerate(tracks):
        points = [(float(record.step), _as_interval(value(record))) for record in track.records]
        label, shade = (name, color) if len(tracks) == 1 else (track.name, color_of(position))
        lines.append(Line.of_intervals(label, shade, points))
    return tuple(lines)


def _as_interval(value: Interval | float | None) -> Interval | None:
    if isinstance(value, Interval):
        return value if math.isfinite(value.mean) else None
    return None if value is None or not math.isfinite(value) else Interval(value, value, value)


def _family_line(track: Track, family: str, label: str, color: str) -> Line:
    points = [(float(record.step), record.delta0(family)) for record in track.records]
    return Line.of_intervals(label, color, points, STYLES.get(family, "solid"))  # type: ignore[arg-type]


def _responses(tracks: Sequence[Track]) -> tuple[Chart, ...]:
    unit = f"Δ log p, {PER_TOKEN}"
    none = (Guide("no change", 0.0),)
    if len(tracks) == 1:
        groups = {
            "delta-logp": (
                DIAGNOSED,
                "Δ log p: what the diagnosis reads",
                "Change of the average token log-probability since the first probe, with 95 % intervals over the "
                "probed rows. Healthy: chosen up or flat, hard negatives down, easy negatives and greedy tokens flat.",
            ),
            "delta-logp-controls": (
                CONTROLS,
                "Δ log p: the controls",
                "Responses that training does not name. They show whether a change belongs to the responses meant or "
                "to everything: shuffled and mismatched ones should not rise.",
            ),
        }
        return tuple(
            Chart(
                key,
                title,
                note,
                STEP,
                unit,
                tuple(_family_line(tracks[0], family, FAMILY_NAMES[family], family) for family in families),
                none,
                min_span=0.1,
            )
            for key, (families, title, note) in groups.items()
        )
    return tuple(
        Chart(
            f"delta-logp-{family.replace('_', '-')}",
            f"Δ log p: {FAMILY_NAMES[family]}",
            FAMILY_NOTES[family],
            STEP,
            unit,
            tuple(
                replace(_family_line(track, family, track.name, color_of(i)), style="solid")
                for i, track in enumerate(tracks)
            ),
            none,
            min_span=0.1,
        )
        for family in (*DIAGNOSED, *CONTROLS)
    )


def _pairs(tracks: Sequence[Track]) -> tuple[Chart, ...]:
    return (
        Chart(
            "margin",
            "Margin",
            "How much further the chosen responses have moved from the reference than the rejected ones, uncooled, "
            "with 95 % intervals. It can grow while both fall: read it together with Δ log p.",
            STEP,
            "nats per response",
            _curves(tracks, lambda record: record.margin, "margin", "chosen"),
            (Guide("none", 0.0),),
            min_span=0.5,
        ),
        Chart(
            "pairs-won",
            "Pairs won",
            "Share of held-out pairs whose chosen response gained more than the rejected one. 0.5 is chance.",
            STEP,
            "share of pairs",
            _curves(tracks, _pairs_won, "pairs won", "good"),
            (Guide("chance", 0.5),),
            y_range=(0.0, 1.0),
        ),
        Chart(
            "loser-share",
            "Loser share",
            "How much of the push of a pair comes from its rejected response. Above one half, training is mostly "
            "pushing down.",
            STEP,
            "share of the push",
            _curves(tracks, lambda record: record.loser_share, "loser share", "rejected"),
            (Guide("even", 0.5),),
            y_range=(0.0, 1.0),
        ),
        Chart(
            "squeezing",
            "Squeezing index",
            "Change of the greedy tokens minus that of the responses in the data. Above zero, probability gathers on "
            "what the model would say anyway; together with a rising top-1 mass this is squeezing.",
            STEP,
            PER_TOKEN,
            _curves(tracks, lambda record: record.squeezing_index, "squeezing index", "argmax"),
            (Guide("none", 0.0),),
            min_span=0.1,
        ),
    )


def _pairs_won(record: ProbeRecord) -> float | None:
    # A model that is its own reference has no winners yet
    return record.accuracy if any(record.row_margins) else None


def _cooling(tracks: Sequence[Track], thresholds: SignalThresholds) -> tuple[Chart, ...]:
    weights = Chart(
        "cooling-weight",
        "Mean cooling weight",
        "1: rejected responses push at full strength; 0: they have cooled out. Below the line, negatives are used up; "
        "what counts is the weight of the pairs trained on, which may be harder or easier than the probed ones.",
        STEP,
        "weight w",
        _curves(tracks, lambda record: record.weight, "mean weight", "rejected_hard"),
        (Guide("used up", thresholds.cooled_weight),),
        y_range=(0.0, 1.0),
    )
    if len(tracks) == 1:
        weights = replace(weights, lines=_probed_and_trained(tracks, weights.lines))
    easy = Chart(
        "easy-share",
        "Easy negatives",
        f"Share of the pairs whose negative has cooled out (w < {thresholds.easy_weight:.3g}). Above the line, take "
        "fresh negatives.",
        STEP,
        "share of pairs",
        _curves(tracks, lambda record: settled(record, thresholds).easy_fraction, "easy", "rejected_easy"),
        (Guide("too many", thresholds.easy_fraction),),
        y_range=(0.0, 1.0),
    )
    if len(tracks) > 1:
        return (weights, easy, *(_weight_map(track, f"-{i + 1}", f": {track.name}") for i, track in enumerate(tracks)))
    return (weights, _weight_map(tracks[0], "", ""), _grades(tracks[0], thresholds))


def _probed_and_trained(tracks: Sequence[Track], probed: Sequence[Line]) -> tuple[Line, ...]:
    """The weight of the probed rows and, where it was logged, that of the pairs trained on, which the flag goes by."""
    trained = _filled(_curves(tracks, lambda record: record.trained_weight, "pairs trained on", "rejected_easy"))
    if not trained:
        return tuple(probed)
    return (
        *(replace(line, name="probed pairs") for line in probed),
        *(replace(line, style="dash") for line in trained),
    )


def _weighted(track: Track) -> list[ProbeRecord]:
    return [record for record in track.records if record.row_weights]


def _weight_map(track: Track, suffix: str, of: str) -> Chart:
    records = _weighted(track)
    edges = np.linspace(0.0, 1.0, WEIGHT_BINS + 1)
    counts = [np.histogram(np.nan_to_num(record.row_weights), edges)[0] / record.num_rows for record in records]
    heat_map = HeatMap(
        tuple(float(record.step) for record in records),
        tuple(edges.tolist()),
        tuple(tuple(float(column[row]) for column in counts) for row in range(WEIGHT_BINS)),
    )
    return Chart(
        f"weight-distribution{suffix}",
        f"Distribution of cooling weights{of}",
        "Each column is one probe; the darker a cell, the more pairs have a weight in that range. Mass sinking to the "
        "bottom is cooling at work; all of it there is a run without anything left to learn from.",
        STEP,
        "weight w",
        heat_map=heat_map if records else None,
        y_range=(0.0, 1.0),
    )


def _grades(track: Track, thresholds: SignalThresholds) -> Chart:
    records = _weighted(track)
    easy, hard = thresholds.easy_weight, thresholds.hard_weight
    bounds = {
        f"easy (w < {easy:.3g})": ("rejected_easy", 0.0, easy),
        f"between ({easy:.3g} to {hard:.3g})": ("mismatched", easy, hard),
        f"hard (w ≥ {hard:.3g})": ("rejected_hard", hard, math.inf),
    }
    parts = tuple(
        (name, color, tuple(float(sum(low <= w < high for w in record.row_weights)) for record in records))
        for name, (color, low, high) in bounds.items()
    )
    return Chart(
        "easy-and-hard",
        "Easy and hard negatives",
        "How many of the probed pairs have an easy, a middling and a hard negative, by the weight of the moment.",
        STEP,
        "pairs",
        stack=Stack(tuple(float(record.step) for record in records), parts) if records else None,
    )


def _calibration(tracks: Sequence[Track], thresholds: SignalThresholds) -> tuple[Chart, ...]:
    firsts = [track.records[0].ece for track in tracks if track.records]
    limit = (Guide("limit", firsts[0] + thresholds.ece_increase),) if len(firsts) == 1 else ()
    return (
        Chart(
            "top1-mass",
            "Top-1 mass",
            "Mean probability of the most likely token along the chosen responses. Rising towards 1, the model "
            "gathers everything on one continuation.",
            STEP,
            "probability",
            _curves(tracks, lambda record: record.top1_mass, "top-1 mass", "argmax"),
            min_span=0.05,
        ),
        Chart(
            "entropy",
            "Entropy",
            "Of the next token along the chosen responses. A steep fall is lost diversity.",
            STEP,
            PER_TOKEN,
            _curves(tracks, lambda record: record.entropy, "entropy", "rephrase"),
            min_span=0.1,
        ),
        Chart(
            "ece",
            "Calibration error",
            "How far confidence is from being right, at the tokens of the chosen responses. One reference answer "
            "understates accuracy: read the change, not the level.",
            STEP,
            "ECE",
            _calibration_errors(tracks),
            limit,
            min_span=0.02,
        ),
        _reliability(tracks),
        Chart(
            "distance",
            "Distance to the reference",
            "Mean distance between the next-token distributions of model and reference: total variation and, where "
            "there is one run, Jensen-Shannon distance. Above the line the model has drifted far.",
            STEP,
            "distance",
            _distances(tracks),
            (Guide("limit", thresholds.total_variation),),
            min_span=0.02,
        ),
    )


def _calibration_errors(tracks: Sequence[Track]) -> tuple[Line, ...]:
    errors = _curves(tracks, lambda record: record.ece, "15 bins", "chosen")
    if len(tracks) > 1:
        return errors
    smooth = _curves(tracks, lambda record: record.smooth_ece, "smooth", "rephrase")
    return errors + tuple(replace(line, style="dash") for line in smooth)


def _distances(tracks: Sequence[Track]) -> tuple[Line, ...]:
    total = _curves(tracks, lambda record: record.total_variation, "total variation", "chosen")
    if len(tracks) > 1:
        return total
    return total + tuple(
        replace(line, style="dash")
        for line in _curves(tracks, lambda record: record.jensen_shannon, "Jensen-Shannon", "argmax")
    )


def _reliability(tracks: Sequence[Track]) -> Chart:
    lines = []
    for position, track in enumerate(tracks):
        if not track.records:
            continue
        first, last = track.records[0], track.records[-1]
        if len(tracks) == 1:
            if first is not last:
                lines.append(reliability_line(first, f"step {first.step}", "mismatched", "dash"))
            lines.append(reliability_line(last, f"step {last.step}", "chosen"))
        else:
            lines.append(reliability_line(last, f"{track.name}, step {last.step}", color_of(position)))
    return Chart(
        "reliability",
        "Reliability",
        "Of the tokens predicted with some confidence, how many were right. Below the diagonal the model is "
        "overconfident. Compare the last probe with the first, or runs with each other.",
        "confidence",
        "accuracy",
        tuple(lines),
        (Guide("perfect"),),
        y_range=(-0.03, 1.03),
    )


def reliability_line(record: ProbeRecord, name: str, color: str, style: str = "solid") -> Line:
    """The reliability diagram of one probe as a curve."""
    bins = [(confidence, accuracy) for count, confidence, accuracy in record.reliability if count]
    xs, ys = tuple(x for x, _ in bins), tuple(y for _, y in bins)
    return Line(name, color, xs, ys, style=style)  # type: ignore[arg-type]


def _optimization(tracks: Sequence[Track]) -> tuple[Chart, ...]:
    return (
        Chart(
            "loss",
            "Training loss",
            "Of the batches, as logged. It falls in good and in bad runs alike.",
            STEP,
            "loss",
            _logged(tracks, "loss", "muted"),
        ),
        Chart(
            "gradient-norm",
            "Gradient norm",
            "Before clipping. Points are spikes: norms far above the median of those before. Many of them call for a "
            "lower learning rate, or for clipping.",
            STEP,
            "norm",
            (*_logged(tracks, "grad_norm", "muted"), *_spikes(tracks)),
            log_y=_spans_decades(tracks),
        ),
    )


def _logged(tracks: Sequence[Track], metric: str, color: str) -> tuple[Line, ...]:
    lines = []
    for position, track in enumerate(tracks):
        steps, values = track.logged(metric)
        label, shade = ("training", color) if len(tracks) == 1 else (track.name, color_of(position))
        ys = tuple(value if math.isfinite(value) else None for value in values)
        lines.append(Line(label, shade, tuple(map(float, steps)), ys))
    return tuple(lines)


def _spikes(tracks: Sequence[Track]) -> tuple[Line, ...]:
    lines = []
    for position, track in enumerate(tracks):
        steps, norms = track.spikes()
        label, shade = ("spikes", "bad") if len(tracks) == 1 else (f"{track.name}: spikes", color_of(position))
        ys = tuple(norm if math.isfinite(norm) else None for norm in norms)
        lines.append(Line(label, shade, tuple(map(float, steps)), ys, style="points"))
    return tuple(lines)


def _spans_decades(tracks: Sequence[Track]) -> bool:
    norms = [norm for track in tracks for norm in track.logged("grad_norm")[1] if 0 < norm < math.inf]
    return bool(norms) and max(norms) > 30 * min(norms)
