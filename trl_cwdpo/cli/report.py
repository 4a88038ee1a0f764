"""`trl-cwdpo report`: what training did, from what runs have left on disk.

This module stays light, so that `--help` answers at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_cwdpo.cli.errors import CommandError

if TYPE_CHECKING:
    from trl_cwdpo.report import Runs

FILE = "report.html"


def main(argv: Sequence[str]) -> int:
    """
    Write a report.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.runs:  # not left to argparse, which would say this first where an option is misspelt
        parser.error("no RUN given: name the output directory of a training")
    output = arguments.output or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / FILE
    quiet = arguments.json == "-"

    from trl_cwdpo import report  # takes seconds: torch

    missing = report.missing_packages()
    if missing:
        raise CommandError(f"A report needs {', '.join(missing)}. Install what is missing: {report.INSTALL}")
    try:
        runs = report.read_runs(arguments.runs)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    try:
        report.write_text(output, report.render_report(runs))
        pictures = report.save_pngs(runs, arguments.png) if arguments.png is not None else []
        if arguments.json is not None:
            write_json(report.summary_of(runs), arguments.json)
    except OSError as error:
        raise CommandError(f"The report cannot be written: {error}. Name another place with --output.") from error
    if not quiet:
        print(f"{summary(runs)}\n\nReport: {output}")
        if arguments.json is not None:
            print(f"Numbers: {arguments.json}")
        if arguments.png is not None:
            print(f"Pictures: {len(pictures)} in {arguments.png}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cwdpo report",
        usage="trl-cwdpo report [-h] [-o FILE] [--png DIR] [--json FILE] RUN [RUN ...]",
        description=(
            "Write one HTML file that says what training did to the responses, what is wrong and what to change, with "
            "interactive charts. It needs no network and no server. Several runs are laid over each other."
        ),
        epilog='Needs the extra `report`: pip install "trl-cwdpo[report]"',
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="output directory of a training, or of `trl-cwdpo run`"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help=f"the HTML file (default: {FILE} in the folder of the run; of several runs, in this folder)",
    )
    parser.add_argument("--png", metavar="DIR", type=Path, help="also write every chart as a PNG for a paper")
    parser.add_argument(
        "--json", metavar="FILE", help="also write all numbers as JSON; - writes them here and prints nothing else"
    )
    return parser


def write_json(value: Any, file: str) -> None:  # noqa: ANN401 (any JSON value)
    """Write JSON to a file, or to the standard output if its name is `-`."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")


def summary(runs: "Runs") -> str:
    """What the terminal shows: of each training its diagnosis, what to do, what is flagged, and what is missing."""
    from trl_cwdpo.report import judge
    from trl_cwdpo.report.tracks import STAGES

    blocks = []
    for track in runs.tracks:
        verdict = judge(track)
        lines = [f"{track.name}, {STAGES[track.stage].lower()}: {verdict.title}. {verdict.advice}"]
        lines += [f"  {sentence}" for sentence in verdict.sentences]
        lines += [f"  flag {flag.name}: {flag.reason}" for flag in verdict.flags if flag.is_raised]
        lines += [f"  {line}" for line in verdict.missing]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
