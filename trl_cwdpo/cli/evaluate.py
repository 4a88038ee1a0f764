"""`trl-cwdpo evaluate`: the measurement of the probes between any two checkpoints, after the fact.

This module stays light, so that `--help` answers at once; loading and measuring are in `evaluate_run.py`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.evaluate_responses import add_arguments, check_arguments
from trl_cwdpo.formats import LAYOUTS, parse_columns

GRADED = ("cooling_floor", "cooling_temperature")
# Which options of the loss a mode reads, besides β
READ_BY_MODE: dict[str, tuple[str, ...]] = {
    "loss": (*GRADED, "cooling_min_weight"),
    "gate": (*GRADED, "cooling_min_weight"),
    "constant": ("cooling_constant", "cooling_min_weight"),
    "off": (),
}


def main(argv: Sequence[str]) -> int:
    """
    Compare models with a reference.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    arguments = _parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from trl_cwdpo.cli.evaluate_run import run  # takes seconds: torch, transformers, TRL

    return run(arguments)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.models:
        parser.error("no MODEL given: name a folder, an adapter, or a model on the hub")
    if arguments.dataset_name is None:
        parser.error("--dataset_name is missing")
    arguments.reference = arguments.reference or arguments.models[0]
    try:
        arguments.columns = parse_columns(arguments.columns)
    except ValueError as error:
        parser.error(str(error))
    _check_loss(parser, arguments)
    check_arguments(parser, arguments)
    for name in ("size", "batch_size", "max_length", "max_new_tokens"):
        value = getattr(arguments, name)
        if value < (0 if name == "max_length" else 1):
            parser.error(f"--{name} must be {'0 (no limit)' if name == 'max_length' else 1} or more, got {value}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cwdpo evaluate",
        usage="trl-cwdpo evaluate MODEL [MODEL ...] --dataset_name DATA [--reference MODEL] [options]",
        description=(
            "Measure on held-out preference pairs how models differ from a reference: what became of chosen, "
            "rejected, mismatched, shuffled and greedy responses, margins, calibration, and the distance. "
            "Models are folders, PEFT adapters, checkpoints, or names on the hub."
        ),
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="what to measure")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the model that changes, distances and win-rates refer to (default: the first MODEL)",
    )
    _add_data(parser.add_argument_group("data"))
    _add_measurement(parser.add_argument_group("measurement"))
    _add_loss(
        parser.add_argument_group(
            "loss", "Given one of these, cooling weights, easy negatives and loser share are measured as well."
        )
    )
    add_arguments(parser)
    results = parser.add_argument_group("results")
    results.add_argument("--json", metavar="FILE", help="also write all numbers; - writes them here and nothing else")
    results.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with charts (needs the extra `report`)"
    )
    return parser


def _add_data(data: Any) -> None:  # noqa: ANN401 (argparse keeps the class private)
    data.add_argument(
        "--dataset_name", "--dataset", metavar="DATA", help="a file, a folder, or the name of a dataset on the hub"
    )
    data.add_argument("--dataset_config", metavar="NAME", help="configuration of a dataset on the hub")
    data.add_argument(
        "--split", "--dataset_test_split", help="split to measure on (default: test, or the only one there is)"
    )
    data.add_argument(
        "--eval_rows",
        metavar="FILE.json:KEY",
        help="rows to measure on, as `trl-cwdpo run` writes them (split.json:held_out); of the split train by default",
    )
    data.add_argument(
        "--columns",
        default="auto",
        help=f"layout of the data (auto, {', '.join(LAYOUTS)}), or a mapping of columns as JSON (default: auto)",
    )
    data.add_argument("--image_folder", metavar="DIR", help="folder of the pictures (default: that of the data)")


def _add_measurement(how: Any) -> None:  # noqa: ANN401 (argparse keeps the class private)
    how.add_argument("--size", type=int, default=256, metavar="N", help="pairs to measure on (default: %(default)s)")
    how.add_argument("--batch_size", type=int, default=8, metavar="N", help="pairs a forward pass (default: 8)")
    how.add_argument(
        "--max_length",
        type=int,
        default=1024,
        metavar="N",
        help="longest prompt plus response in tokens, as in training; 0 cuts nothing off (default: %(default)s)",
    )
    how.add_argument(
        "--truncation_mode",
        choices=("keep_start", "keep_end"),
        default="keep_start",
        help="which end of a longer text is kept (default: %(default)s)",
    )
    how.add_argument("--seed", type=int, default=42, metavar="N", help="which pairs are drawn (default: %(default)s)")
    how.add_argument(
        "--trust_remote_code", action="store_true", help="let code that comes with a model on the hub run"
    )


def _add_loss(loss: Any) -> None:  # noqa: ANN401 (argparse keeps the class private)
    loss.add_argument(
        "--beta", type=_number(above=0.0), metavar="B", help="β of the preference loss (default: 0.1, as in TRL)"
    )
    loss.add_argument(
        "--cooling_mode",
        choices=tuple(READ_BY_MODE),
        help="as in training (default: loss where there is a floor or temperature, else off)",
    )
    loss.add_argument(
        "--cooling_floor",
        type=_number(),
        metavar="F",
        help="ℓ_floor in nats per token; a run's log and report have what it was solved to",
    )
    loss.add_argument("--cooling_temperature", type=_number(above=0.0), metavar="T", help="τ in nats per token")
    loss.add_argument(
        "--cooling_constant", type=_number(0.0, 1.0), metavar="W", help="w of the mode constant (default: 0.5)"
    )
    loss.add_argument(
        "--cooling_min_weight", type=_number(0.0, 1.0), metavar="W", help="weights below it are 0 (default: 0)"
    )


def _number(
    low: float = -sys.float_info.max, high: float = sys.float_info.max, above: float | None = None
) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or (above is not None and value <= above):
            wanted = f"above {above:g}" if above is not None else "finite" if low < 0 else f"in [{low:g}, {high:g}]"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return number


def _check_loss(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Settle the mode of the loss, and refuse what it would ignore or lacks."""
    options = {name for names in READ_BY_MODE.values() for name in names}
    given = {name for name in options if getattr(arguments, name) is not None}
    arguments.has_loss = bool(given) or arguments.beta is not None or arguments.cooling_mode is not None
    mode = arguments.cooling_mode or ("loss" if given & set(GRADED) else "off")
    for name in GRADED:
        if name in READ_BY_MODE[mode] and name not in given:
            parser.error(f"--{name} is missing: --cooling_mode {mode} needs it; a run's log and report have it")
    for name in sorted(given - set(READ_BY_MODE[mode])):
        parser.error(f"--{name} means nothing with --cooling_mode {mode}: leave it out, or set the mode it belongs to")
    arguments.cooling_mode = mode
