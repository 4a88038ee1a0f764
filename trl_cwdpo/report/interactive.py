"""Charts for plotly, as plain data.

Colours are names (`"@chosen"`, or `"@chosen/28"` with an alpha in hexadecimal), which the page's script turns into the
colours of a light or a dark page.
"""

import html
from typing import Any

from trl_cwdpo.report.charts import Chart, Line
from trl_cwdpo.report.pictures import column_edges

DASHES = {"solid": "solid", "dash": "dash", "dot": "dot", "points": "solid"}
BAND_ALPHA = "29"


def figure_of(chart: Chart) -> dict[str, Any]:
    """
    A chart as a plotly figure.

    Args:
        chart ([`~trl_cwdpo.report.charts.Chart`]):
            The chart.

    Returns:
        `dict[str, Any]`: `data` and `layout`, plain JSON values. Texts are escaped for plotly, which reads some HTML.
    """
    if chart.heat_map is not None:
        data = [_heat_map(chart)]
    elif chart.stack is not None:
        data = [_area(chart, part) for part in chart.stack.parts]
    else:
        bars = bool(chart.categories)
        data = [trace for line in chart.lines for trace in ([_points(line)] if bars else _traces(line))]
    return {"data": data, "layout": _layout(chart)}


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def _short(text: str) -> str:
    return _text(text if len(text) <= 40 else f"{text[:39]}…")


def _traces(line: Line) -> list[dict[str, Any]]:
    group = {"legendgroup": _text(line.name)}
    traces: list[dict[str, Any]] = []
    if line.low != line.high:
        band = {"type": "scatter", "mode": "lines", "x": line.x, "hoverinfo": "skip", "showlegend": False, **group}
        edge = {"line": {"width": 0, "color": f"@{line.color}"}}
        traces += [
            {**band, **edge, "y": line.low},
            {**band, **edge, "y": line.high, "fill": "tonexty", "fillcolor": f"@{line.color}/{BAND_ALPHA}"},
        ]
    points = line.style == "points"
    few = len(line.x) <= 12
    interval = " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]" if line.low != line.high else ""
    return [
        *traces,
        {
            "type": "scatter",
            "mode": "markers" if points else "lines+markers" if few else "lines",
            "x": line.x,
            "y": line.y,
            "name": _short(line.name),
            "line": {"color": f"@{line.color}", "dash": DASHES[line.style], "width": 2},
            "marker": {"color": f"@{line.color}", "size": 9 if points else 5},
            "customdata": list(zip(line.low, line.high, strict=True)) if interval else None,
            "hovertemplate": f"%{{y:.4g}}{interval}",
            **group,
        },
    ]


def _points(line: Line) -> dict[str, Any]:
    known = [
        (x, y, low, high)
        for x, y, low, high in zip(line.x, line.y, line.low, line.high, strict=True)
        if y is not None and low is not None and high is not None
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, *_ in known],
        "y": [y for _, y, *_ in known],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - y for _, y, _, high in known],
            "arrayminus": [y - low for _, y, low, _ in known],
            "color": f"@{line.color}",
            "thickness": 1.5,
        },
        "marker": {"color": f"@{line.color}", "size": 8},
        "name": _short(line.name),
        "hovertemplate": "%{y:.4g}",
    }


def _heat_map(chart: Chart) -> dict[str, Any]:
    heat_map = chart.heat_map
    if heat_map is None:
        raise ValueError(f"Chart {chart.key!r} has no heat map.")
    return {
        "type": "heatmap",
        # Borders rather than middles, one more than there are columns and rows
        "x": column_edges(heat_map.x),
        "y": heat_map.edges,
        "z": heat_map.shares,
        "zmin": 0,
        "colorscale": [[0, "@surface"], [0.001, f"@{heat_map.color}/1f"], [1, f"@{heat_map.color}"]],
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickformat": ".0%"},
        "hovertemplate": "step %{x}, w about %{y:.2f}: %{z:.1%} of the pairs<extra></extra>",
    }


def _area(chart: Chart, part: tuple[str, str, tuple[float, ...]]) -> dict[str, Any]:
    name, color, heights = part
    return {
        "type": "scatter",
        "mode": "lines",
        "x": chart.stack.x if chart.stack is not None else (),
        "y": heights,
        "stackgroup": "one",
        "name": _short(name),
        "line": {"width": 0.5, "color": f"@{color}"},
        "fillcolor": f"@{color}/bf",
        "hovertemplate": "%{y:.0f} pairs",
    }


def _layout(chart: Chart) -> dict[str, Any]:
    axis = {"gridcolor": "@grid", "zeroline": False, "linecolor": "@border", "automargin": True, "fixedrange": False}
    y_axis: dict[str, Any] = {**axis, "title": {"text": _text(chart.y_title), "font": {"size": 12}}}
    x_axis: dict[str, Any] = {**axis, "title": {"text": _text(chart.x_title), "font": {"size": 12}}}
    if chart.log_y:
        y_axis["type"] = "log"
    if chart.y_range is not None:
        y_axis["range"] = list(chart.y_range)
    if chart.categories:
        ticks = [_short(name) for name in chart.categories]
        x_axis |= {"tickmode": "array", "tickvals": list(range(len(ticks))), "ticktext": ticks, "tickangle": -30}
        x_axis["range"] = [-0.5, len(ticks) - 0.5]
    guides = [_guide(guide.value) for guide in chart.guides]
    labels = [_guide_label(guide.label, guide.value) for guide in chart.guides if guide.value is not None]
    return {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "shapes": guides,
        # A label on a logarithmic axis stands at the logarithm; no such chart has guides
        "annotations": labels,
        "showlegend": len(chart.lines) > 1 or chart.stack is not None,
        "hovermode": "closest" if chart.heat_map is not None else "x unified",
    }


def _guide(value: float | None) -> dict[str, Any]:
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    if value is None:
        return {"type": "line", "x0": 0, "x1": 1, "y0": 0, "y1": 1, "line": line, "layer": "below"}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": line,
        "layer": "below",
    }


def _guide_label(label: str, value: float) -> dict[str, Any]:
    return {
        "xref": "paper",
        "x": 1,
        "y": value,
        "text": _text(label),
        "showarrow": False,
        "xanchor": "right",
        "yanchor": "bottom",
        "font": {"size": 10, "color": "@muted"},
    }
