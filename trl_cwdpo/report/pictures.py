"""Charts as still pictures, drawn by matplotlib: readable without scripts, on paper and in a paper."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_cwdpo.report.charts import Chart, Guide, Line
from trl_cwdpo.report.colors import light

# Inches. Small figures keep their writing readable on a phone.
SIZE = (5.4, 3.5)
DPI = 200
DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1, 1.4)), "points": "None"}
BAND = 0.16
# Only what a file name can hold everywhere
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def save_png(chart: Chart, folder: Path) -> Path:
    """
    Write a chart for a paper.

    Args:
        chart ([`~trl_cwdpo.report.charts.Chart`]):
            The chart.
        folder (`Path`):
            Where to.

    Returns:
        `Path`: The file, named after the chart.
    """
    file = folder / f"{UNSAFE.sub('-', chart.key)}.png"
    with _figure(chart) as figure:
        figure.savefig(file, dpi=DPI, facecolor=light("surface"), metadata={"Software": None})
    return file


def svg(chart: Chart) -> str:
    """
    A chart as SVG for a page that gives its title, the same for the same data, in the colours of a light page and
    without a background.
    """
    buffer = io.StringIO()
    with _figure(replace(chart, title="")) as figure:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@contextmanager
def _figure(chart: Chart) -> Iterator[Any]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_style()):
        # Not pyplot, which would keep the figure and might open a window
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, chart)
        yield figure


def _style() -> Any:  # noqa: ANN401 (matplotlib lists its hundreds of keys as literals)
    muted, text = light("muted"), light("text")
    return {
        "font.size": 10,
        # What users write may hold dollar signs, which are no formulas
        "text.parse_math": False,
        "text.color": text,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": muted,
        "axes.edgecolor": light("border"),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": light("grid"),
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "svg.hashsalt": "trl-cwdpo",
        "svg.fonttype": "path",
    }


def _draw(axes: Any, chart: Chart) -> None:  # noqa: ANN401 (matplotlib's axes)
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_title)
    axes.set_ylabel(chart.y_title)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.heat_map is not None:
        _draw_heat_map(axes, chart)
    elif chart.stack is not None:
        _draw_stack(axes, chart)
    else:
        for line in chart.lines:
            _draw_line(axes, line, as_bars=bool(chart.categories))
    for guide in chart.guides:
        _draw_guide(axes, guide)
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    if chart.categories:
        axes.set_xticks(range(len(chart.categories)), chart.categories)
        axes.set_xlim(-0.5, len(chart.categories) - 0.5)
    if len(chart.lines) > 1 or chart.stack is not None:
        _legend(axes)


def _legend(axes: Any) -> None:  # noqa: ANN401 (matplotlib's axes)
    handles, labels = axes.get_legend_handles_labels()
    shown = [label if len(label) <= 40 else f"{label[:39]}…" for label in labels]
    columns = 1 if max(map(len, shown)) > 26 else 2
    axes.figure.legend(handles, shown, loc="outside lower center", ncols=columns)


def _draw_line(axes: Any, line: Line, *, as_bars: bool) -> None:  # noqa: ANN401 (matplotlib's axes)
    color = light(line.color)
    # matplotlib leaves curves whose name begins with an underscore out of the legend
    label = f"\u200b{line.name}" if line.name.startswith("_") else line.name
    ys = [math.nan if y is None else y for y in line.y]
    lows, highs = ([math.nan if y is None else y for y in ends] for ends in (line.low, line.high))
    if as_bars:
        below = [max(0.0, y - low) for y, low in zip(ys, lows, strict=False)]
        above = [max(0.0, high - y) for y, high in zip(ys, highs, strict=False)]
        errors = [below, above] if below else None
        axes.errorbar(line.x, ys, yerr=errors, fmt="o", color=color, capsize=3, markersize=5, label=label)
        return
    points = line.style == "points" or len(line.x) <= 12
    axes.plot(
        line.x,
        ys,
        color=color,
        linestyle=DASHES[line.style],
        marker="o" if points else None,
        markersize=6 if line.style == "points" else 3.2,
        label=label,
    )
    if lows != highs:
        axes.fill_between(line.x, lows, highs, color=color, alpha=BAND, linewidth=0)


def _draw_guide(axes: Any, guide: Guide) -> None:  # noqa: ANN401 (matplotlib's axes)
    color = light("muted")
    if guide.value is None:
        axes.plot([0, 1], [0, 1], color=color, linestyle=(0, (2, 2)), linewidth=1)
        return
    axes.axhline(guide.value, color=color, linestyle=(0, (2, 2)), linewidth=1)
    axes.annotate(
        guide.label,
        (1, guide.value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=color,
    )


def _draw_heat_map(axes: Any, chart: Chart) -> None:  # noqa: ANN401 (matplotlib's axes)
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    heat_map = chart.heat_map
    if heat_map is None:
        return
    borders = column_edges(heat_map.x)
    cells, colors = [], []
    full = max(max(row) for row in heat_map.shares) or 1.0
    for row, shares in enumerate(heat_map.shares):
        bottom, top = heat_map.edges[row], heat_map.edges[row + 1]
        for column, share in enumerate(shares):
            if share > 0:
                left, right = borders[column], borders[column + 1]
                cells.append(Rectangle((left, bottom), right - left, top - bottom))
                # One colour, more or less of it: that stays right when the picture is recoloured for a dark page
                colors.append(to_rgba(light(heat_map.color), min(1.0, 0.08 + 0.92 * share / full)))
    axes.add_collection(PatchCollection(cells, facecolors=colors, edgecolors="none"))
    axes.set_xlim(borders[0], borders[-1])
    axes.set_ylim(heat_map.edges[0], heat_map.edges[-1])


def column_edges(x: tuple[float, ...]) -> list[float]:
    """Borders half-way between the columns, and as far beyond the outer ones."""
    if len(x) == 1:
        return [x[0] - 0.5, x[0] + 0.5]
    middles = [(left + right) / 2 for left, right in pairwise(x)]
    return [x[0] - (middles[0] - x[0]), *middles, x[-1] + (x[-1] - middles[-1])]


def _draw_stack(axes: Any, chart: Chart) -> None:  # noqa: ANN401 (matplotlib's axes)
    stack = chart.stack
    if stack is None:
        return
    axes.stackplot(
        stack.x,
        [heights for _, _, heights in stack.parts],
        labels=[name for name, _, _ in stack.parts],
        colors=[light(color) for _, color, _ in stack.parts],
        alpha=0.75,
        linewidth=0,
    )
    axes.margins(x=0, y=0)
