"""What a report says: from runs to the parts of its page, and to plain data for JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trl_cwdpo._version import __version__
from trl_cwdpo.report.catalogue import color_of, sections_of
from trl_cwdpo.report.charts import Chart
from trl_cwdpo.report.examples import notable_examples
from trl_cwdpo.report.page import Part
from trl_cwdpo.report.tracks import STAGES, Runs, Track
from trl_cwdpo.report.verdicts import BAD, GOOD, NEUTRAL, WATCH, judge

SCHEMA_VERSION = 1
TONE_WORDS = {GOOD: "good", WATCH: "watch", BAD: "act", NEUTRAL: "note"}
DASH = "–"
# Options that make a run what it is, before the hundred others
TELLING = frozenset(
    {
        "model_name_or_path",
        "dataset_name",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "max_length",
        "beta",
        "loss_type",
        "bf16",
        "fp16",
        "seed",
    }
)
# What only a preference loss defines
LOSS_COLUMNS = {"weight": "mean w", "easy_fraction": "easy", "loser_share": "loser share"}
TELLING_PREFIXES = ("cooling", "negative_", "dataset_negative", "lora_", "use_peft", "load_in_")


def page_of(runs: Runs) -> tuple[str, str, list[Part]]:
    """Title, subtitle and parts of a report's page."""
    names = list(dict.fromkeys(track.name for track in runs.tracks))
    title = f"Training report: {names[0]}" if len(names) == 1 else f"Training report: {len(names)} runs compared"
    parts = [_stage_part(stage, tracks) for stage, tracks in runs.stages()]
    parts += [_evaluation_part(i, name, result) for i, (name, result) in enumerate(runs.evaluations.items())]
    return title, _subtitle(runs, names), parts


def charts_of(runs: Runs) -> list[Chart]:
    """All charts of a report."""
    return [
        chart for stage, tracks in runs.stages() for section in sections_of(stage, tracks) for chart in section.charts
    ]


def summary_of(runs: Runs) -> dict[str, Any]:
    """All that a report shows, as plain data for JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "trl_cwdpo": __version__,
        "runs": [_track_summary(track) for track in runs.tracks],
        "evaluations": runs.evaluations,
    }


def _track_summary(track: Track) -> dict[str, Any]:
    verdict = judge(track)
    spikes, norms = track.spikes()
    return {
        "name": track.name,
        "folder": str(track.folder),
        "stage": track.stage,
        "diagnosis": {"name": verdict.title, "advice": verdict.advice, "reason": verdict.reason, "tone": verdict.tone},
        "summary": list(verdict.sentences),
        "flags": [asdict(flag) for flag in verdict.flags],
        "missing": list(verdict.missing),
        "probes": [record.to_dict() for record in track.records],
        "gradient_spikes": [
            {"step": step, "norm": norm if math.isfinite(norm) else None}
            for step, norm in zip(spikes, norms, strict=True)
        ],
        "log": [_finite(entry) for entry in track.log],
        "examples": [
            {"kind": kind, "rows": [{**asdict(row), "pictures": len(row.pictures)} for row in rows]}
            for kind, _, rows in notable_examples(track)
        ],
        "options": track.options,
        "facts": track.facts,
    }


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def _subtitle(runs: Runs, names: Sequence[str]) -> str:
    parts = [", ".join(names)] if len(names) > 1 else []
    for stage, tracks in runs.stages():
        steps = sorted({_last_step(track) for track in tracks})
        span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        parts.append(f"{STAGES[stage].split(':')[0].lower()}: {span} steps")
    versions: dict[str, str] = next(
        (track.facts["versions"] for track in runs.tracks if track.facts.get("versions")), {}
    )
    known = [f"{name} {versions[name]}" for name in ("trl-cwdpo", "trl", "transformers", "torch") if name in versions]
    return " · ".join([*parts, *([", ".join(known)] if known else [])])


def _last_step(track: Track) -> int:
    return max([0, *(record.step for record in track.records[-1:]), *(entry["step"] for entry in track.log[-1:])])


def _stage_part(stage: str, tracks: Sequence[Track]) -> Part:
    several = len(tracks) > 1
    verdicts = [judge(track) for track in tracks]
    return Part(
        key=stage,
        title=STAGES[stage],
        cards=[
            {
                "name": track.name,
                "verdict": verdict,
                "tone_word": TONE_WORDS[verdict.tone],
                "color": color_of(i) if several else "",
            }
            for i, (track, verdict) in enumerate(zip(tracks, verdicts, strict=True))
        ],
        table=_comparison(tracks, [verdict.title for verdict in verdicts]) if several else None,
        table_note="Of the last probe of each run. Δ: change since its first probe, nats per token."
        if several
        else "",
        sections=sections_of(stage, tracks),
        examples=[(track.name, found) for track in tracks if (found := notable_examples(track))],
        options=_options(tracks),
        num_telling=sum(_is_telling(name) or differs for name, _, differs in (_options(tracks) or ((), ()))[1]),
    )


def _comparison(tracks: Sequence[Track], titles: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    headers = ["run", "diagnosis", "step", "margin", "pairs won", "Δ chosen", "Δ hard", "Δ easy", "Δ greedy",
               "weight", "top-1", "ECE", "TV"]  # fmt: skip
    rows = []
    for track, title in zip(tracks, titles, strict=True):
        if not track.records:
            rows.append([track.name, title, str(_last_step(track)), *([DASH] * (len(headers) - 3))])
            continue
        last = track.records[-1]
        deltas = [last.delta0(family) for family in ("chosen", "rejected_hard", "rejected_easy", "argmax")]
        rows.append(
            [
                track.name,
                title,
                str(last.step),
                _number(last.margin.mean, 2),
                DASH if last.accuracy is None else f"{last.accuracy:.0%}",
                *(_number(None if delta is None else delta.mean, 3, signed=True) for delta in deltas),
                _number(last.weight, 2),
                _number(last.top1_mass, 3),
                _number(last.ece, 3),
                _number(last.total_variation, 3),
            ]
        )
    return headers, rows


def _number(value: float | None, digits: int, *, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _options(tracks: Sequence[Track]) -> tuple[list[str], list[tuple[str, list[str], bool]]] | None:
    names = list(dict.fromkeys(name for track in tracks for name in track.options))
    if not names:
        return None
    rows = []
    for name in names:
        values = [_written(track.options.get(name)) for track in tracks]
        rows.append((name, values, len(set(values)) > 1))
    # What differs is what a comparison is about
    rows.sort(key=lambda row: (not row[2], not _is_telling(row[0])))
    return [track.name for track in tracks], rows


def _is_telling(option: str) -> bool:
    return option in TELLING or option.startswith(TELLING_PREFIXES)


def _written(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    return DASH if value is None else str(value)


def _evaluation_part(position: int, name: str, result: dict[str, Any]) -> Part:
    models = result.get("models", {})
    of_loss = [key for key in LOSS_COLUMNS if any(numbers.get(key) is not None for numbers in models.values())]
    rows = []
    for model, numbers in models.items():
        families = numbers.get("families", {})
        deltas = [(families.get(side) or {}).get("delta0") or {} for side in ("chosen", "rejected")]
        is_reference = model == result.get("reference")
        won = numbers.get("accuracy")
        rows.append(
            [
                model,
                DASH if is_reference or won is None else f"{won:.1%}",
                _number((numbers.get("margin") or {}).get("mean"), 2),
                *(_number(delta.get("mean"), 3, signed=True) for delta in deltas),
                *(_number(numbers.get(key), 3) for key in ("top1_mass", "ece", "brier", "tv")),
                *(_number(numbers.get(key), 2) for key in of_loss),
            ]
        )
    headers = ["model", "pairs won", "margin", "Δ chosen", "Δ rejected", "top-1", "ECE", "Brier", "TV"]
    headers += [LOSS_COLUMNS[key] for key in of_loss]
    note = (
        f"{result.get('num_pairs', DASH)} held-out pairs; changes, margins and distances from "
        f"{result.get('reference', DASH)}."
    )
    return Part(f"evaluation-{position + 1}", f"Evaluation on held-out pairs: {name}", table=(headers, rows),
                table_note=note)  # fmt: skip
