"""`trl-cwdpo demo`: both stages beside plain DPO on a toy task, from nothing, offline, in minutes.

This module stays light, so that `--help` answers at once; the work is in `demo_run.py`.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_cwdpo._version import __version__
from trl_cwdpo.cli.demo_settings import DemoSettings
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.output_folder import OutputFolder
from trl_cwdpo.cli.table import MISSING, format_table, number, percent

RECORD = "demo.json"
TEXT_WIDTH = 90
MODEL_FOLDERS = ("stage1", "dpo", "cw-dpo")
LABELS = {"pretrained": "pretrained", "stage1": "stage 1", "dpo": "DPO", "cw-dpo": "CW-DPO"}
COLUMNS = (
    "model",
    "attributes\nright",
    "captions\nexact",
    "log-prob.\nchosen",
    "log-prob.\nrejected",
    "calibr.\nerror",
    "cooling\nweight",
    "gradient\npeak",
)
LEGEND = """\
attributes right, captions exact: greedy captions, checked against what was drawn
log-prob.: mean log-probability of the given responses, nats per token
calibr. error: top-1 confidence against accuracy at the chosen responses' tokens (ECE, 15 bins)
cooling weight: mean over training (1 = plain DPO); gradient peak: largest norm before clipping"""


def main(argv: Sequence[str]) -> int:
    """
    Run the demonstration.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    arguments = _parser().parse_args(argv)
    settings = DemoSettings(seed=arguments.seed)
    settings = settings.shortened() if arguments.fast else settings
    report = run_demo(settings, output_dir=arguments.output_dir, cache_dir=arguments.cache_dir or default_cache_dir())
    return 0 if report else 1


def run_demo(settings: DemoSettings, *, output_dir: Path, cache_dir: Path) -> dict[str, Any]:
    """
    Run the demonstration, print its results and write them to `demo.json`.

    Args:
        settings (`DemoSettings`):
            Its settings.
        output_dir (`Path`):
            Where models and results go.
        cache_dir (`Path`):
            Where dataset and pretrained model are kept for later runs.

    Returns:
        `dict[str, Any]`: What was written.
    """
    start = time.perf_counter()
    _prepare_environment()
    output = OutputFolder(output_dir, "demo", (RECORD, *MODEL_FOLDERS))
    if output.claim():
        print(f"Replacing the results of an earlier demo in {output_dir}; other files there stay.")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The cache folder cannot be used: {error}. Name another with --cache_dir.") from error
    print(f"trl-cwdpo {__version__} demo: two-stage finetuning of a tiny vision-language model", flush=True)

    from trl_cwdpo.cli.demo_run import Demo  # takes seconds: torch, transformers, TRL

    report = Demo(settings, cache_dir=cache_dir, output=output, bars=sys.stderr.isatty()).run()
    report["seconds"]["total"] = round(time.perf_counter() - start, 1)
    record = output.write(RECORD, json.dumps(report, indent=2) + "\n")
    print(f"\n{summary(report)}\n\nNumbers, settings, captions: {record}")
    print(f"Models: {', '.join(str(output_dir / name) for name in MODEL_FOLDERS)}")
    print(f"Done in {report['seconds']['total']:.0f} s.")
    return report


def default_cache_dir() -> Path:
    """
    Where generated data and models are kept: `$XDG_CACHE_HOME/trl-cwdpo`, or `~/.cache/trl-cwdpo`.

    Returns:
        `Path`: The folder, which need not exist.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-cwdpo"


def summary(report: Mapping[str, Any]) -> str:
    """
    What the demonstration prints at its end.

    Args:
        report (`Mapping[str, Any]`):
            What [`run_demo`] returns.

    Returns:
        `str`: The table, its legend, warnings, and how much it means.
    """
    rows = [_row(LABELS[name], scores) for name, scores in report["models"].items()]
    legend = "\n".join(f"  {line}" for line in LEGEND.splitlines())
    texts = [*(f"Warning of the trainers: {note}" for note in report["notes"]), _comparison(report), _caution(report)]
    return "\n\n".join([format_table(COLUMNS, rows), legend, *map(_wrapped, texts)])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, TEXT_WIDTH, break_long_words=False, break_on_hyphens=False)


def _comparison(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    first, second = (report["models"][name]["training"]["first_loss"] for name in ("dpo", "cw-dpo"))
    return (
        f"DPO and CW-DPO started from the same saved stage-1 weights (first losses {first:.4f} and {second:.4f}; "
        f"ln 2 = {math.log(2):.4f}) and share pairs, seed, steps, learning rate "
        f"({settings['stage2_learning_rate']:g}) and β ({settings['beta']:g})."
    )


def _caution(report: Mapping[str, Any]) -> str:
    scores = report["models"]["dpo"]
    error = math.sqrt(scores["exact_rate"] * (1 - scores["exact_rate"]) / scores["num_scenes"])
    return (
        f"This is one seed ({report['settings']['seed']}) of a toy task: with {scores['num_scenes']} pictures alone "
        f"the standard error of the share of exact captions is {100 * error:.1f} points, and seeds differ on top of "
        "that. The demo shows that everything runs, not which method is better."
    )


def _row(label: str, scores: Mapping[str, Any]) -> list[str]:
    training = scores["training"] or {}
    return [
        label,
        percent(scores["attribute_accuracy"]),
        percent(scores["exact_rate"]),
        number(scores["chosen_avg_logp"], 3),
        number(scores["rejected_avg_logp"], 3),
        number(scores["ece"], 3),
        number(training.get("mean_cooling_weight"), 2),
        number(training.get("gradient_norm_peak"), 2) if training else MISSING,
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cwdpo demo",
        description=(
            "Draw a small image-preference dataset, pretrain a tiny vision-language model on it, train stage 1 (SFT "
            "with gentle negatives), then CW-DPO and TRL's DPO from there, and compare all four models on held-out "
            "pictures. Needs no network; uses the accelerator if there is one. Takes up to 5 minutes on two CPU cores."
        ),
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/demo"),
        help="folder for models and results (default: %(default)s); of an existing one, only an earlier demo's own "
        "files are replaced",
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help="folder that keeps dataset and pretrained model for later runs (default: $XDG_CACHE_HOME/trl-cwdpo or "
        "~/.cache/trl-cwdpo)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="fewer steps and pictures: under 90 seconds")
    return parser


def _prepare_environment() -> None:
    """Set what libraries read when they are imported; the user's own values go first."""
    # Nothing is fetched, so nothing should try to.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Several GPUs would wrap the tiny model for data parallelism, which only slows it down.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
