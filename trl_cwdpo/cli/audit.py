"""`trl-cwdpo audit`: what is wrong with a dataset, before any training.

This module stays light, so that `--help` answers at once; reading and counting are in `audit_run.py`.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.table import MISSING, format_table, number, percent
from trl_cwdpo.formats import LAYOUTS, parse_columns
from trl_cwdpo.redaction import printable

ROWS_SHOWN = 5


def main(argv: Sequence[str]) -> int:
    """
    Audit a dataset.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: 0 if there is no error, 1 otherwise.
    """
    arguments = _parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from trl_cwdpo.cli.audit_run import audit  # takes seconds: torch, transformers, TRL

    report = audit(
        arguments.data,
        config=arguments.dataset_config,
        columns=arguments.columns,
        image_folder=arguments.image_folder,
        split=arguments.split,
        model=arguments.model,
        max_length=arguments.max_length,
        limit=arguments.limit,
    )
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        print(summary(report))
        if arguments.json:
            try:
                Path(arguments.json).write_text(text, encoding="utf-8")
            except OSError as error:
                raise CommandError(f"The report cannot be written: {error}. Name another file with --json.") from error
            print(f"\nAll numbers: {arguments.json}")
    return 1 if report["has_errors"] else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.data is None:
        parser.error("no DATA given: name a file, a folder, or a dataset on the hub")
    try:
        arguments.columns = parse_columns(arguments.columns)
    except ValueError as error:
        parser.error(str(error))
    if arguments.max_length is not None and arguments.model is None:
        parser.error("--max_length needs --model, whose tokenizer counts the tokens")
    for name in ("max_length", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cwdpo audit",
        description=(
            "Read a preference dataset before it is trained on, and report missing fields, unreadable pictures, pairs "
            "without a preference, contradictions, length bias and over-long rows. Exit code 0: no error (there may "
            "be warnings); 1: errors; 2: wrong usage."
        ),
    )
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help="a file, a folder, or the name of a dataset on the hub"
    )
    parser.add_argument("--split", help="split to read (default: train, or the only one)")
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a dataset on the hub")
    layouts = ", ".join(LAYOUTS)
    parser.add_argument(
        "--columns",
        default="auto",
        help=f"layout of the data (auto, {layouts}), or a mapping of columns as JSON, such as "
        '\'{"prompt": "question", "images": "image"}\' (default: %(default)s)',
    )
    parser.add_argument("--image_folder", metavar="DIR", help="folder of the pictures (default: that of the data)")
    parser.add_argument(
        "--model",
        help="folder or name of a model, for lengths in tokens; only its tokenizer or processor is loaded",
    )
    parser.add_argument("--max_length", type=int, metavar="N", help="report rows longer than N tokens; needs --model")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N rows only")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON; - prints nothing else")
    return parser


def summary(report: Mapping[str, Any]) -> str:
    """
    A report for people.

    Args:
        report (`Mapping[str, Any]`):
            What [`trl_cwdpo.cli.audit_run.audit`] returns.

    Returns:
        `str`: Lines, without a trailing line break.
    """
    layout = report["layout"] or "as it is"
    head = (
        f"{report['data']}, split {report['split']} (layout: {layout}): {report['rows']} rows, "
        f"{report['usable_pairs']} usable pairs, {report['distinct_prompts']} different prompts"
    )
    images = ", ".join(f"{rows} with {count}" for count, rows in sorted(report["images_per_row"].items()))
    sections = [f"{head}\nPictures per row: {images or MISSING}", _findings(report["findings"])]
    if report["length_bias"]:
        sections.append(_bias(report["length_bias"]))
    if report["tokens"]:
        sections.append(_tokens(report["tokens"]))
    sections.append(_verdict(report["findings"]))
    return "\n\n".join(sections)


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    if not findings:
        return "  Nothing found."
    rows = [
        [f"{finding['severity']}: {finding['name']}", str(finding["count"]), _rows(finding)] for finding in findings
    ]
    details = [f"  {finding['name']}: {printable(finding['example'])}" for finding in findings if finding["example"]]
    table = format_table(("finding", "count", "first rows"), rows)
    return "\n".join([table, "", *details]) if details else table


def _rows(finding: Mapping[str, Any]) -> str:
    shown = ", ".join(map(str, finding["rows"][:ROWS_SHOWN]))
    return f"{shown}, …" if finding["count"] > ROWS_SHOWN and shown else shown or MISSING


def _bias(biases: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"length in {bias['unit']}",
            number(bias["mean_chosen"], 1),
            number(bias["mean_rejected"], 1),
            percent(bias["chosen_longer"]),
            f"{bias['p_value']:.2g}",
        ]
        for bias in biases
    ]
    return format_table(("responses", "mean\nchosen", "mean\nrejected", "chosen\nlonger", "sign test\np"), rows)


def _tokens(tokens: Mapping[str, Mapping[str, float]]) -> str:
    keys = ("minimum", "median", "mean", "maximum")
    rows = [[name, *(f"{values[key]:.0f}" for key in keys)] for name, values in tokens.items()]
    return format_table(("tokens", *keys), rows)


def _verdict(findings: Sequence[Mapping[str, Any]]) -> str:
    counts = {mark: sum(finding["severity"] == mark for finding in findings) for mark in ("error", "warning")}
    if counts["error"]:
        return f"{counts['error']} kind(s) of errors, {counts['warning']} of warnings: mend the data before training."
    if counts["warning"]:
        return f"No errors; {counts['warning']} kind(s) of warnings."
    return "No errors, no warnings."
