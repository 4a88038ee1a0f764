"""Run the cells of a matrix: skip what is done, spread the rest over processes, leave nothing half-written."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from trl_cwdpo.benchmarks.cell import Runner, write_results
from trl_cwdpo.benchmarks.configurations import cell_values, is_current
from trl_cwdpo.benchmarks.matrix import Cell, Matrix

MakeRunner = Callable[[], Runner]
Report = Callable[[str], None]
CELLS = "cells"


class Start(NamedTuple):
    """
    A model that cells start from.

    Args:
        regime (`str`):
            Name of the regime.
        stage1 (`str`):
            Form of stage 1.
        seed (`int`):
            Seed.
    """

    regime: str
    stage1: str
    seed: int


def results_file(folder: Path, cell: Cell) -> Path:
    """Where the results of a cell are: one JSON object."""
    return folder / CELLS / f"{cell.name}.json"


def read_results(folder: Path, matrix: Matrix, cell: Cell) -> dict[str, Any] | None:
    """
    The results of a cell, if it has run with the settings that the matrix has now, and with the defaults of now where
    it has none.

    Args:
        folder (`Path`):
            Where results are.
        matrix ([`Matrix`]):
            The benchmark.
        cell ([`Cell`]):
            The cell.

    Returns:
        `dict` or `None`.
    """
    try:
        result = json.loads(results_file(folder, cell).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    # As JSON has it, so that a tuple equals a list
    expected = json.loads(json.dumps(matrix.cell_settings(cell)))
    if not isinstance(result, dict) or result.get("settings") != expected:
        return None
    return result if is_current(result.get("values"), cell_values(matrix, cell)) else None


def run_cells(
    make_runner: MakeRunner,
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    report: Report = lambda line: None,
) -> list[dict[str, Any]]:
    """
    Run cells, those left out that are done already.

    Args:
        make_runner (`Callable`):
            Makes a [`Runner`]; to be pickled if `jobs` is above 1.
        cells (`Sequence[Cell]`):
            The cells.
        jobs (`int`, *optional*, defaults to `1`):
            Processes; 1 runs them in this one.
        report (`Callable`, *optional*):
            Called with the name of each cell when it is done.

    Returns:
        `list[dict]`: Results in the order of `cells`.

    Raises:
        RuntimeError: Naming the cell that failed. Cells that are done stay done.
    """
    runner = make_runner()
    folder, matrix = runner.folder, runner.matrix
    found = {cell: read_results(folder, matrix, cell) for cell in cells}
    for cell, result in found.items():
        if result is not None:
            report(f"{cell.name} (done before)")
    todo = [cell for cell in found if found[cell] is None]
    starts = dict.fromkeys(Start(cell.regime, matrix.methods[cell.method].stage1, cell.seed) for cell in todo)
    # Starts with the same settings in several regimes are one folder, built once
    unique = list({runner.start_folder(*start): start for start in starts}.values())
    for name in _run(make_runner, runner, unique, jobs):
        report(name)
    for name in _run(make_runner, runner, todo, jobs):
        report(name)
    results = [read_results(folder, matrix, cell) for cell in cells]
    return [result for result in results if result is not None]


def _run(make_runner: MakeRunner, runner: Runner, items: Sequence[Start | Cell], jobs: int) -> Iterator[str]:
    if jobs == 1 or len(items) < 2:
        yield from (_work(runner, item) for item in items)
        return
    # Not forked: threads of torch do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(jobs, len(items)), mp_context=context, initializer=_prepare, initargs=(make_runner,)
    ) as pool:
        futures = [pool.submit(_work_in_process, item) for item in items]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            _cancel(futures)


def _cancel(futures: Iterable[Any]) -> None:
    for future in futures:
        future.cancel()


def _work(runner: Runner, item: Start | Cell) -> str:
    name = f"start {item.regime}/{item.stage1} seed {item.seed}" if isinstance(item, Start) else item.name
    try:
        if isinstance(item, Start):
            runner.build_start(*item)
        else:
            write_results(results_file(runner.folder, item), runner.run(item))
    except Exception as error:
        error.add_note(f"while running {name}")
        raise
    return name


_runner: Runner | None = None


def _prepare(make_runner: MakeRunner) -> None:
    global _runner
    _runner = make_runner()


def _work_in_process(item: Start | Cell) -> str:
    if _runner is None:
        raise RuntimeError("The process has no runner: its initializer did not run.")
    return _work(_runner, item)
