"""A benchmark's results as pictures: scores over the learning-rate grid, and learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_cwdpo.benchmarks.matrix import Matrix
from trl_cwdpo.benchmarks.summary import by_setting, score_of

Results = Sequence[Mapping[str, Any]]


def draw_plots(
    matrix: Matrix, grid: Results, final: Results, folder: Path, *, score_name: str = "score"
) -> list[Path]:
    """
    Draw what there is to draw.

    Args:
        matrix ([`Matrix`]):
            The benchmark.
        grid (`Sequence[Mapping[str, Any]]`):
            Results of the selection seeds.
        final (`Sequence[Mapping[str, Any]]`):
            Results of the comparison's seeds.
        folder (`Path`):
            Where the pictures go; existing ones are replaced.
        score_name (`str`, *optional*, defaults to `"score"`):
            What the task's scores are.

    Returns:
        `list[Path]`: PNG files.

    Raises:
        ModuleNotFoundError: Without matplotlib, which the extra `report` brings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for regime in matrix.regimes:
        if grid:
            files.append(_grid_plot(matrix, grid, regime, folder / f"grid-{regime}.png", score_name))
        if final and matrix.curve_points:
            files.append(_curve_plot(matrix, final, regime, folder / f"curves-{regime}.png", score_name))
    return files


def _grid_plot(matrix: Matrix, results: Results, regime: str, file: Path, score_name: str) -> Path:
    """Score and rise of the ECE over the learning rate, one column a β."""
    betas, groups = matrix.grid.beta, by_setting(results)
    figure = _figure(3.2 * len(betas), 5.0)
    axes = figure.subplots(2, len(betas), sharex=True, sharey="row", squeeze=False)
    for column, beta in enumerate(betas):
        for name in matrix.methods:
            settings = groups.get((regime, name), {})
            # A method without β has one value for all
            runs = {rate: found for (rate, b), found in settings.items() if b == beta or len(_betas(settings)) == 1}
            scores = [(rate, fmean(score_of(run, "validation") for run in runs[rate])) for rate in sorted(runs)]
            rises = [(rate, fmean(_rises(runs[rate]))) for rate in sorted(runs) if _rises(runs[rate])]
            for axis, points in ((axes[0][column], scores), (axes[1][column], rises)):
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", label=name)
        axes[0][column].set_title(f"β = {beta:g}")
        axes[1][column].set_xlabel("learning rate")
        axes[1][column].set_xscale("log")
    axes[0][0].set_ylabel(score_name)
    axes[1][0].set_ylabel("ECE − start's")
    axes[0][0].legend(fontsize="x-small")
    figure.suptitle(f"regime {regime}")
    figure.savefig(file)
    return file


def _curve_plot(matrix: Matrix, results: Results, regime: str, file: Path, score_name: str) -> Path:
    """Mean learning curve of each method at its chosen setting."""
    figure = _figure(6.0, 4.0)
    axis = figure.subplots()
    groups = by_setting(results)
    for name in matrix.methods:
        curves = [run["curve"] for runs in groups.get((regime, name), {}).values() for run in runs]
        if curves:
            # A run that diverged has a shorter curve
            points = [list(column) for column in zip(*curves, strict=False)]
            steps = [column[0]["step"] for column in points]
            axis.plot(steps, [fmean(point["score"] for point in column) for column in points], "o-", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(f"{score_name}, validation")
    axis.legend(fontsize="x-small")
    axis.set_title(f"regime {regime}, mean over seeds")
    figure.savefig(file)
    return file


def _betas(settings: Mapping[tuple[float, float], Any]) -> set[float]:
    return {beta for _, beta in settings}


def _rises(runs: Results) -> list[float]:
    return [run["validation"]["ece"] - run["start"]["validation"]["ece"] for run in runs if "validation" in run]


def _figure(width: float, height: float) -> Any:  # noqa: ANN401 (a Figure of a library that may be missing)
    # Without pyplot there is no global state and no display
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)
