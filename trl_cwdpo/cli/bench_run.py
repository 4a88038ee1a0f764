"""Runs a benchmark and writes its tables and plots."""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from trl_cwdpo.benchmarks.cell import Runner
from trl_cwdpo.benchmarks.checks import MatrixError
from trl_cwdpo.benchmarks.configurations import check_options
from trl_cwdpo.benchmarks.matrix import Cell, Matrix, parse_matrix
from trl_cwdpo.benchmarks.plots import draw_plots
from trl_cwdpo.benchmarks.schedule import read_results, run_cells
from trl_cwdpo.benchmarks.summary import choose_settings, numbers
from trl_cwdpo.benchmarks.tables import report
from trl_cwdpo.benchmarks.task import Task
from trl_cwdpo.cli.bench_tasks import TASKS, make_task
from trl_cwdpo.cli.env import devices, versions
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.report import write_json
from trl_cwdpo.cli.terminal import quiet

LOCK = ".lock"
CONTINUES = "Runs that are done are kept: the same command continues."
REPORT, RECORD = "report.md", "bench.json"
Results = list[dict[str, Any]]


def run_bench(values: Any, *, folder: Path, cache: Path, jobs: int = 1, report_only: bool = False) -> str:  # noqa: ANN401
    """
    Run a benchmark, or continue it, and write `report.md`, `bench.json` and `plots/`.

    Args:
        values (`dict`):
            The content of its YAML file.
        folder (`Path`):
            Where results are.
        cache (`Path`):
            Where pretrained models are kept.
        jobs (`int`, *optional*, defaults to `1`):
            Cells at a time.
        report_only (`bool`, *optional*, defaults to `False`):
            Whether to write tables of what is done, without running anything.

    Returns:
        `str`: The report, Markdown.

    Raises:
        CommandError: If the matrix cannot be run.
    """
    matrix = read_matrix(values)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The folder cannot be used: {error}. Name another.") from error
    if report_only:
        grid, final = _done(matrix, folder)
        if not grid and not final:
            raise CommandError(f"No cell of this matrix is done in {folder}: run it without --report_only first.")
    else:
        with _locked(folder):
            grid, final = _run(matrix, folder, cache, jobs)
    with _mendable():
        return _write(matrix, grid, final, folder, make_task(matrix.task, cache))


def read_matrix(values: Any) -> Matrix:  # noqa: ANN401 (whatever YAML holds)
    """
    Check the content of a matrix file.

    Args:
        values (`Any`):
            The content.

    Returns:
        [`~trl_cwdpo.benchmarks.matrix.Matrix`].

    Raises:
        CommandError: If it cannot be run.
    """
    try:
        matrix = parse_matrix(values)
        with quiet(bars=False):
            check_options(matrix)
    except MatrixError as error:
        raise CommandError(f"The matrix cannot be run: {error}") from error
    if matrix.task not in TASKS:
        raise CommandError(f"`task` is {matrix.task!r}, which is unknown. Use one of {', '.join(TASKS)}.")
    return matrix


def make_runner(matrix: Matrix, folder: Path, cache: Path) -> Runner:
    """A runner of a matrix; called in each process."""
    return Runner(matrix, make_task(matrix.task, cache), folder, cache)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the folder."""
    try:
        with FileLock(folder / LOCK, timeout=0), _mendable():
            yield
    except Timeout as error:
        raise CommandError(
            f"Another process runs a benchmark in {folder}. Wait for it, look at what is done with --report_only, or "
            "choose another folder with --output_dir."
        ) from error
    except OSError as error:
        raise CommandError(f"The folder cannot be used: {error}. Name another.") from error


@contextmanager
def _mendable() -> Iterator[None]:
    """Say of what can be mended outside, such as a full disk, that nothing is lost."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CommandError(f"{_during(error)}{error}. {CONTINUES}") from error
    except BrokenProcessPool as error:
        raise CommandError(
            f"A process died, as it does when memory runs out: fewer --jobs need less. {CONTINUES}"
        ) from error


def _during(error: BaseException) -> str:
    return "".join(f"{note}: " for note in getattr(error, "__notes__", []))


def _run(matrix: Matrix, folder: Path, cache: Path, jobs: int) -> tuple[Results, Results]:
    factory = functools.partial(make_runner, matrix, folder, cache)
    with quiet(bars=False):
        # Before the processes start, which would all pretrain
        for regime in matrix.regimes:
            make_task(matrix.task, cache).build_base(cache, matrix.base_of(regime))
        cells = list(matrix.grid_cells())
        print(f"Grid: {len(cells)} cells", flush=True)
        grid = run_cells(factory, cells, jobs=jobs, report=_tell) if cells else []
        final_cells = list(matrix.final_cells(_chosen(matrix, grid)))
        print(f"Comparison: {len(final_cells)} cells", flush=True)
        final = run_cells(factory, final_cells, jobs=jobs, report=_tell) if final_cells else []
    return grid, final


def _chosen(matrix: Matrix, grid: Results) -> dict[tuple[str, str], tuple[float, float]]:
    return choose_settings(grid) if matrix.selection_seeds else matrix.only_settings()


def _tell(line: str) -> None:
    print(f"  {line}", flush=True)


def _done(matrix: Matrix, folder: Path) -> tuple[Results, Results]:
    grid = _known(matrix, folder, list(matrix.grid_cells()))
    return grid, _known(matrix, folder, list(matrix.final_cells(_chosen(matrix, grid))))


def _known(matrix: Matrix, folder: Path, cells: Sequence[Cell]) -> Results:
    results = (read_results(folder, matrix, cell) for cell in cells)
    return [result for result in results if result is not None]


def _write(matrix: Matrix, grid: Results, final: Results, folder: Path, task: Task) -> str:
    score_name = task.score_name
    text = report(matrix, grid, final, score_name=score_name, own_measures=task.own_measures)
    (folder / REPORT).write_text(text, encoding="utf-8")
    chosen = [
        {"regime": regime, "method": method, "learning_rate": setting[0], "beta": setting[1]}
        for (regime, method), setting in _chosen(matrix, grid).items()
    ]
    record = {"matrix": asdict(matrix), "chosen": chosen, "versions": versions(), "devices": devices()}
    write_json({**record, **numbers(matrix, grid, final)}, str(folder / RECORD))
    print(f"\n{text}\nTables: {folder / REPORT}; results of each cell: {folder / 'cells'}")
    if importlib.util.find_spec("matplotlib") is None:
        print("No plots: matplotlib is missing; pip install 'trl-cwdpo[report]' and add --report_only.")
    else:
        files = draw_plots(matrix, grid, final, folder / "plots", score_name=score_name)
        print(f"Plots: {', '.join(map(str, files)) or 'none, there is neither a grid nor a learning curve'}")
    return text
