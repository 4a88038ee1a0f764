"""Read what a training run has left on disk: the records of its probes, its log, its options, what was evaluated."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_cwdpo.probe_records import RECORDS_FILE, ProbeRecord, read_records
from trl_cwdpo.signal_thresholds import SignalThresholds
from trl_cwdpo.signals import gradient_spikes

STAGES = {"stage1": "Stage 1: supervised finetuning", "stage2": "Stage 2: preference optimization"}
ROUND = re.compile(r"round([1-9]\d*)")
ROWS_FILE, STATE_FILE, RUN_FILE = "probe_rows.json", "trainer_state.json", "run.json"
EVALUATION_FILE = "evaluation.json"
# Metrics that only preference optimization logs
PREFERENCE_METRICS = ("rewards/margins", "cooling/weight")


class NoRunError(ValueError):
    """A folder does not hold a training run that can be reported."""


@dataclass(frozen=True)
class Track:
    """
    One training: what a stage of `trl-cwdpo run`, or any trainer, wrote to its output directory.

    Args:
        name (`str`):
            What it is called, unique in a report.
        folder (`Path`):
            Its output directory.
        stage (`str`):
            `"stage1"` (supervised) or `"stage2"` (preferences).
        records (`tuple[ProbeRecord, ...]`):
            Its probes.
        log (`tuple[dict, ...]`):
            Its log, one entry a logging step.
        examples (`tuple[dict, ...]`):
            The rows of its probes, for people: `prompt`, `chosen`, `rejected`, `pictures`, `hardness`.
        options (`dict`):
            Its options by name.
        facts (`dict`):
            What else `run.json` knows, such as versions.
    """

    name: str
    folder: Path
    stage: str = "stage2"
    records: tuple[ProbeRecord, ...] = ()
    log: tuple[dict[str, Any], ...] = ()
    examples: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_supervised(self) -> bool:
        """Whether it learns from chosen responses rather than from preferences."""
        return self.stage == "stage1"

    def logged(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged metric."""
        entries = [entry for entry in self.log if isinstance(entry.get(metric), int | float)]
        return [entry["step"] for entry in entries], [float(entry[metric]) for entry in entries]

    @property
    def thresholds(self) -> SignalThresholds:
        """The numbers of the rules, those that the run has set among them."""
        return SignalThresholds.of(self.options.get("probe_thresholds") or {})

    def spikes(self) -> tuple[list[int], list[float]]:
        """Steps and gradient norms of those that stick out."""
        steps, norms = self.logged("grad_norm")
        found = gradient_spikes(norms, self.thresholds)
        return (
            [step for step, spike in zip(steps, found, strict=True) if spike],
            [norm for norm, spike in zip(norms, found, strict=True) if spike],
        )


@dataclass(frozen=True)
class Runs:
    """
    All that a report is about.

    Args:
        tracks (`tuple[Track, ...]`):
            The trainings.
        evaluations (`dict[str, dict]`):
            By run, what `evaluation.json` of `trl-cwdpo run` or `trl-cwdpo evaluate` holds.
    """

    tracks: tuple[Track, ...]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stages(self) -> list[tuple[str, list[Track]]]:
        """The trainings of each stage, stage 1 first."""
        return [
            (stage, found) for stage in STAGES if (found := [track for track in self.tracks if track.stage == stage])
        ]


def read_runs(folders: Iterable[str | os.PathLike[str]]) -> Runs:
    """
    Read the runs of a report.

    Args:
        folders (`Iterable[str or Path]`):
            Output directories of trainers, or folders of `trl-cwdpo run`.

    Returns:
        [`Runs`].

    Raises:
        NoRunError: If a folder is not there, or holds no run.
        ValueError: If a file in it cannot be understood.
    """
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    tracks: list[Track] = []
    evaluations: dict[str, dict[str, Any]] = {}
    for path, name in zip(paths, distinct_names(paths), strict=True):
        found = _read_folder(path, name)
        if not found:
            raise NoRunError(_no_run(path))
        tracks += found
        evaluation = _read_json(path / EVALUATION_FILE)
        if evaluation:
            evaluations[name] = evaluation
    return Runs(tuple(tracks), evaluations)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        if len(set(names)) == len(names):
            break
        repeated = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(part[-length:]) if name in repeated else name for name, part in zip(names, parts, strict=True)
        ]
    return names


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is no folder. Name the output directory of a training run, or the folder of `trl-cwdpo run`."
    return (
        f"{path} holds no training run: neither {RECORDS_FILE} nor {STATE_FILE}, nor a checkpoint, nor the stages of "
        "`trl-cwdpo run`. Name the `output_dir` of a run."
    )


def _read_folder(path: Path, name: str) -> list[Track]:
    if not path.is_dir():
        return []
    rounds = sorted(int(found[1]) for folder in path.iterdir() if (found := ROUND.fullmatch(folder.name)))
    # Iterative rounds of stage 2 are drawn beside one another
    folders = {stage: (stage, name) for stage in STAGES} | {
        f"round{number}": ("stage2", f"{name}, round {number}") for number in rounds
    }
    tracks = [
        replace(_read_track(path / folder, label), stage=stage)
        for folder, (stage, label) in folders.items()
        if _has_run(path / folder)
    ]
    if tracks:
        return tracks
    return [_read_track(path, name)] if _has_run(path) else []


def _has_run(folder: Path) -> bool:
    return (folder / RECORDS_FILE).is_file() or _state_file(folder) is not None


def _state_file(folder: Path) -> Path | None:
    """The newest state of the trainer: that of the end, or of the last checkpoint."""
    checkpoints = (file for file in folder.glob(f"checkpoint-*/{STATE_FILE}") if _number(file.parent) >= 0)
    candidates = [folder / STATE_FILE, *sorted(checkpoints, key=lambda file: _number(file.parent), reverse=True)]
    readable = [file for file in candidates if file.is_file()]
    return max(readable, key=_last_step, default=None)


def _number(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _last_step(file: Path) -> int:
    try:
        return int(_read_json(file)["global_step"])
    except (KeyError, TypeError, ValueError):
        return -1  # cut off by a crash: an older one is better


def _read_track(folder: Path, name: str) -> Track:
    records = tuple(read_records(folder)) if (folder / RECORDS_FILE).is_file() else ()
    state_file = _state_file(folder)
    state = _read_json(state_file) if state_file is not None else {}
    log = tuple(entry for entry in state.get("log_history", ()) if "step" in entry)
    facts = _read_json(folder / RUN_FILE) or {}
    rows = _read_json(folder / ROWS_FILE) or {}
    described = rows.get("run") or {}
    options = {**described.get("options", {}), **facts.pop("options", {}), **_calibrated(log)}
    command = facts.get("command")
    is_stage1 = command == "sft" if command else _looks_supervised(records, log)
    return Track(
        name=name,
        folder=folder,
        stage="stage1" if is_stage1 else "stage2",
        records=records,
        log=log,
        examples=_examples(rows),
        options=options,
        facts={"trainer": described.get("trainer"), **facts},
    )


def _calibrated(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What "auto" was solved to."""
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if "cooling/floor" in entry), {})
    names = ("cooling/floor", "cooling/temperature")
    return {f"{name} (solved)": last[name] for name in names if name in last}


def _looks_supervised(records: Sequence[ProbeRecord], log: Sequence[Mapping[str, Any]]) -> bool:
    if any(metric in entry for entry in log for metric in PREFERENCE_METRICS):
        return False
    return all(record.loser_share is None for record in records)


def _examples(rows: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    examples = rows.get("examples") or ()
    return tuple(
        {**example, "hardness": row.get("hardness"), "index": row.get("index")}
        for example, row in zip(examples, rows.get("rows", ()), strict=False)
    )


def _read_json(file: Path) -> Any:  # noqa: ANN401 (any JSON value)
    """What a file holds, or None where it is not there."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}. Remove the file, or restore it.") from error
