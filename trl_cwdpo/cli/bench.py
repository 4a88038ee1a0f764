"""`trl-cwdpo bench`: methods × seeds × regimes from one YAML file, resumable, with tables and plots.

This module stays light, so that `--help` answers at once; running is in `bench_run.py`.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.yaml_files import YamlError, read_yaml_file

MATRICES = Path(__file__).parent.parent / "benchmarks" / "matrices"
SMOKE = "smoke"


def main(argv: Sequence[str]) -> int:
    """
    Run a benchmark.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: 0.
    """
    arguments = _parse(argv)
    # Nothing is fetched, so nothing should try to.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # For the processes of --jobs; in this one bars are off anyway
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    file = matrix_file(arguments.matrix)
    try:
        values = read_yaml_file(file)
    except YamlError as error:
        raise CommandError(f"{file} {error}") from error
    folder = arguments.output_dir or Path("outputs") / "bench" / file.stem

    from trl_cwdpo.cli.bench_run import run_bench  # takes seconds: torch, transformers, TRL

    run_bench(
        values,
        folder=folder,
        cache=arguments.cache_dir or default_cache_dir(),
        jobs=arguments.jobs,
        report_only=arguments.report_only,
    )
    return 0


def matrix_file(name: str) -> Path:
    """
    The file of a matrix.

    Args:
        name (`str`):
            A path, or the name of one that comes along.

    Returns:
        `Path`.

    Raises:
        CommandError: If there is neither.
    """
    for candidate in (Path(name), MATRICES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in MATRICES.glob("*.yaml")))
    raise CommandError(
        f"There is no file {name!r}, and no matrix of that name comes along. Name a file, or one of {known}."
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        if arguments.matrix is not None:
            parser.error(f"--smoke runs the matrix {SMOKE!r}; give it or MATRIX, not both")
        arguments.matrix = SMOKE
    if arguments.matrix is None:
        parser.error("no MATRIX given: name a YAML file or a matrix that comes along, or use --smoke")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {arguments.jobs}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    known = ", ".join(sorted(file.stem for file in MATRICES.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="trl-cwdpo bench",
        description=(
            "Compare methods over seeds and regimes. Each method is tried on a grid of learning rates and β with the "
            "selection seeds; its best setting runs with fresh seeds. The same command continues a run that was "
            "stopped: cells that are done with the same settings are kept. Needs no network."
        ),
    )
    parser.add_argument("matrix", metavar="MATRIX", nargs="?", help=f"a YAML file, or one that comes along: {known}")
    parser.add_argument("--smoke", action="store_true", help="a tiny matrix: every method, two seeds, few steps")
    parser.add_argument(
        "--output_dir", type=Path, help="folder of results (default: outputs/bench/ and the name of the matrix)"
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help="folder that keeps pretrained models (default: $XDG_CACHE_HOME/trl-cwdpo or ~/.cache/trl-cwdpo)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a process each (default: %(default)s)")
    parser.add_argument("--report_only", action="store_true", help="run nothing; write tables of what is done so far")
    return parser
