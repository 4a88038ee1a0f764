"""A benchmark's results as Markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from trl_cwdpo.benchmarks.cell import DONE
from trl_cwdpo.benchmarks.matrix import START, Matrix
from trl_cwdpo.benchmarks.methods import METHODS
from trl_cwdpo.benchmarks.summary import (
    MEASURES,
    Robustness,
    by_setting,
    choose_settings,
    comparison,
    ece_change,
    robustness,
    score_of,
    win_rates,
)
from trl_cwdpo.evaluation.win_rate import WinRate
from trl_cwdpo.probe_measures import Interval

MISSING = "–"


def report(
    matrix: Matrix,
    grid: Sequence[Mapping[str, Any]],
    final: Sequence[Mapping[str, Any]],
    *,
    score_name: str = "score",
    own_measures: Mapping[str, tuple[str, int]] | None = None,
) -> str:
    """
    All tables of a benchmark.

    Args:
        matrix ([`Matrix`]):
            The benchmark.
        grid (`Sequence[Mapping[str, Any]]`):
            Results of the selection seeds.
        final (`Sequence[Mapping[str, Any]]`):
            Results of the comparison's seeds; may be empty.
        score_name (`str`, *optional*, defaults to `"score"`):
            What the task's scores are.
        own_measures (`Mapping[str, tuple[str, int]]`, *optional*):
            Measures of the task's own that the comparison shows, with headline and decimals.

    Returns:
        `str`: Markdown.
    """
    parts = [*_incomplete(matrix, grid, final), _methods(matrix)]
    if grid:
        parts.append(_grid_part(matrix, grid, score_name))
    if final:
        parts.append(_final_part(matrix, grid, final, score_name, own_measures or {}))
    return "\n\n".join(parts) + "\n"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def interval_text(interval: Interval | None, digits: int) -> str:
    """A mean with its interval, such as `0.950 [0.940, 0.960]`."""
    if interval is None or math.isnan(interval.mean):
        return MISSING
    mean = f"{interval.mean:.{digits}f}"
    if math.isnan(interval.low):
        return mean
    return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def win_rate_text(rate: WinRate) -> str:
    """A win-rate in percent with its interval; bold where the interval excludes 50 %."""
    mean, low, high = (100 * value for value in (rate.win_rate.mean, rate.win_rate.low, rate.win_rate.high))
    text = f"{mean:.1f} % [{low:.1f}, {high:.1f}]"
    return f"**{text}**" if rate.is_decided else text


def _incomplete(matrix: Matrix, grid: Sequence[Mapping[str, Any]], final: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning on top of tables of a part of the runs."""
    in_grid = sum(1 for _ in matrix.grid_cells())
    in_final = len(matrix.seeds) * len(matrix.regimes) * len(matrix.methods)
    if len(grid) == in_grid and len(final) == in_final:
        return []
    return [
        f"**Incomplete: {len(grid)} of {in_grid} runs of the grid and {len(final)} of {in_final} of the comparison.** "
        "What is chosen and compared below may change with the rest."
    ]


def _methods(matrix: Matrix) -> str:
    rows = []
    for name, entry in matrix.methods.items():
        options = ", ".join(f"{key}={value}" for key, value in entry.options.items())
        rows.append([name, METHODS[entry.method].summary, entry.stage1, options or MISSING])
    return "## Methods\n\n" + markdown_table(["name", "method", "stage 1", "options"], rows)


def _grid_part(matrix: Matrix, results: Sequence[Mapping[str, Any]], score_name: str) -> str:
    seeds = ", ".join(map(str, matrix.selection_seeds))
    points = f"{100 * matrix.tolerance:g}"
    lines = [
        "## Learning rate × β",
        f"Validation rows; mean over {len(matrix.selection_seeds)} seed(s) ({seeds}). *Good*: {score_name} within "
        f"{points} points of the method's own best; *good overall*: of the best of all methods in the regime.",
    ]
    found = robustness(results, matrix.tolerance)
    for regime in matrix.regimes:
        rows = [_robustness_row(name, found[regime, name]) for name in matrix.methods if (regime, name) in found]
        if not rows:
            continue
        headers = ["method", "start", "best", "at lr, β", "worst", "good", "each seed alone", "good overall"]
        headers += [
            "mean of the grid",
            f"less {next(iter(matrix.methods))}'s",
            "largest ECE rise",
            "ECE rise > 0.03",
            "diverged",
        ]
        lines += [
            f"### Regime {regime}",
            markdown_table(headers, rows),
            *_grid_tables(regime, matrix, results, score_name),
        ]
    return "\n\n".join(lines)


def _robustness_row(name: str, found: Robustness) -> list[str]:
    learning_rate, beta = found.best_setting
    return [
        name,
        f"{found.start:.3f}",
        f"{found.best:.3f}",
        f"{learning_rate:g}, {beta:g}",
        f"{found.worst:.3f}",
        f"{found.good}/{found.settings}",
        ", ".join(map(str, found.good_by_seed)),
        f"{found.good_overall}/{found.settings}",
        interval_text(found.mean, 3),
        interval_text(found.less_first, 3),
        MISSING if math.isnan(found.ece_change) else f"{found.ece_change:+.3f}",
        f"{found.miscalibrated}/{found.settings}",
        f"{found.diverged}/{found.settings}",
    ]


def _grid_tables(regime: str, matrix: Matrix, results: Sequence[Mapping[str, Any]], score_name: str) -> list[str]:
    titles = {
        f"{score_name.capitalize()} at each β (rows) and learning rate (columns):": _scores_text,
        "ECE − start's at each β and learning rate:": _rises_text,
    }
    return [f"{title}\n\n" + _grid_table(regime, matrix, results, text) for title, text in titles.items()]


def _grid_table(
    regime: str,
    matrix: Matrix,
    results: Sequence[Mapping[str, Any]],
    text: Callable[[Sequence[Mapping[str, Any]]], str],
) -> str:
    groups, rates = by_setting(results), matrix.grid.learning_rate
    rows = [
        [name, f"{beta:g}" if METHODS[entry.method].uses_beta else MISSING]
        + [text(groups.get((regime, name), {}).get((rate, beta), [])) for rate in rates]
        for name, entry in matrix.methods.items()
        for beta in dict.fromkeys(beta for _, beta in matrix.settings(entry))
    ]
    return markdown_table(["method", "β", *(f"{rate:g}" for rate in rates)], rows)


def _scores_text(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{fmean(score_of(run, 'validation') for run in runs):.3f}" if runs else MISSING


def _rises_text(runs: Sequence[Mapping[str, Any]]) -> str:
    if any(run["status"] != DONE for run in runs):
        return "diverged"
    return f"{ece_change(runs):+.3f}" if runs else MISSING


def _final_part(
    matrix: Matrix,
    grid: Sequence[Mapping[str, Any]],
    final: Sequence[Mapping[str, Any]],
    score_name: str,
    own_measures: Mapping[str, tuple[str, int]],
) -> str:
    seeds = ", ".join(map(str, matrix.seeds))
    setting = "its own best setting, chosen on the validation rows of the selection seeds"
    if not matrix.selection_seeds:
        setting = "the same setting, which nothing chose"
    lines = [
        "## Comparison",
        f"Each method at {setting}; test rows, seeds {seeds} (used for nothing else); mean and 95 % interval over "
        "seeds (Student's t).",
    ]
    chosen = choose_settings(grid) if matrix.selection_seeds else matrix.only_settings()
    measures, rates = comparison(final, matrix), win_rates(final)
    shown = {**MEASURES, **own_measures}
    for regime in matrix.regimes:
        names = [name for name in matrix.methods if (regime, name) in measures]
        lines.append(f"### Regime {regime}")
        headers = ["method", "lr, β", *(score_name if key == "score" else head for key, (head, _) in shown.items())]
        rows = [
            [
                name,
                "{:g}, {:g}".format(*chosen[regime, name]),
                *(interval_text(measures[regime, name].get(key), digits) for key, (_, digits) in shown.items()),
            ]
            for name in names
        ]
        lines += [markdown_table(headers, rows), _win_rate_table(regime, names, rates)]
    return "\n\n".join(lines)


def _win_rate_table(regime: str, names: Sequence[str], rates: Mapping[tuple[str, str, str], WinRate]) -> str:
    rivals = [START, *names]
    rows = [
        [name, *(win_rate_text(rates[regime, name, rival]) if rival != name else MISSING for rival in rivals)]
        for name in names
    ]
    explained = (
        "Win-rate of the row against the column by the oracle, ties one half; bootstrap over seeds and rows; bold "
        "where the interval excludes 50 %:"
    )
    return f"{explained}\n\n" + markdown_table(["", *rivals], rows)
