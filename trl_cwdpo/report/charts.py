"""What a chart shows, apart from how it is drawn: `interactive` and `pictures` draw the same."""

from dataclasses import dataclass
from typing import Literal

from trl_cwdpo.probe_measures import Interval

Number = float | None


@dataclass(frozen=True)
class Line:
    """
    One curve.

    Args:
        name (`str`):
            What the legend says.
        color (`str`):
            Name of a colour, see [`~trl_cwdpo.report.colors.COLORS`].
        x (`tuple[float, ...]`):
            Where.
        y (`tuple[float or None, ...]`):
            How much; `None` leaves a gap.
        low, high (`tuple[float or None, ...]`, *optional*):
            Ends of the intervals.
        style (`str`, *optional*, defaults to `"solid"`):
            `"solid"`, `"dash"`, `"dot"`, or `"points"` for markers alone.
    """

    name: str
    color: str
    x: tuple[float, ...]
    y: tuple[Number, ...]
    low: tuple[Number, ...] = ()
    high: tuple[Number, ...] = ()
    style: Literal["solid", "dash", "dot", "points"] = "solid"

    @classmethod
    def of_intervals(
        cls,
        name: str,
        color: str,
        points: list[tuple[float, Interval | None]],
        style: Literal["solid", "dash", "dot", "points"] = "solid",
    ) -> "Line":
        """A curve of means with their intervals; what is not known is left out."""
        known = [(x, interval) for x, interval in points if interval is not None]
        return cls(
            name,
            color,
            tuple(x for x, _ in known),
            tuple(interval.mean for _, interval in known),
            tuple(interval.low for _, interval in known),
            tuple(interval.high for _, interval in known),
            style,
        )


@dataclass(frozen=True)
class Guide:
    """
    A straight line to compare with.

    Args:
        label (`str`):
            What it says.
        value (`float`, *optional*):
            Its height; without one, it is the diagonal.
    """

    label: str
    value: float | None = None


@dataclass(frozen=True)
class HeatMap:
    """
    How a distribution changes.

    Args:
        x (`tuple[float, ...]`):
            Steps, one a column.
        edges (`tuple[float, ...]`):
            Edges of the bins, from the bottom up.
        shares (`tuple[tuple[float, ...], ...]`):
            For each bin, from the bottom up, the share of the whole at each step.
        color (`str`):
            Colour of a full cell.
    """

    x: tuple[float, ...]
    edges: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    color: str = "accent"


@dataclass(frozen=True)
class Stack:
    """
    Parts of a whole, one above the other.

    Args:
        x (`tuple[float, ...]`):
            Steps.
        parts (`tuple[tuple[str, str, tuple[float, ...]], ...]`):
            Name, colour and height of each part, from the bottom up.
    """

    x: tuple[float, ...]
    parts: tuple[tuple[str, str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Chart:
    """
    One chart.

    Args:
        key (`str`):
            Its name in files, unique in a report.
        title (`str`):
            Its title.
        note (`str`):
            What it shows and what to look at, in plain words.
        x_title, y_title (`str`):
            The axes, with units.
        lines (`tuple[Line, ...]`, *optional*):
            Curves.
        guides (`tuple[Guide, ...]`, *optional*):
            Lines to compare with.
        heat_map ([`HeatMap`], *optional*):
            A distribution, in the place of curves.
        stack ([`Stack`], *optional*):
            Parts of a whole, in the place of curves.
        y_range (`tuple[float, float]`, *optional*):
            Limits of the axis.
        min_span (`float`, *optional*, defaults to `0.0`):
            Smallest height of the axis where it has no limits of its own: less is noise.
        log_y (`bool`, *optional*, defaults to `False`):
            Whether it is logarithmic.
        categories (`tuple[str, ...]`, *optional*):
            Names of the places 0, 1, … on the x-axis.
    """

    key: str
    title: str
    note: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...] = ()
    guides: tuple[Guide, ...] = ()
    heat_map: HeatMap | None = None
    stack: Stack | None = None
    y_range: tuple[float, float] | None = None
    min_span: float = 0.0
    log_y: bool = False
    categories: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return self.heat_map is None and self.stack is None and not any(line.x for line in self.lines)


@dataclass(frozen=True)
class Section:
    """
    Charts under one heading.

    Args:
        key (`str`):
            Its name in links.
        title (`str`):
            Its heading.
        charts (`tuple[Chart, ...]`):
            Its charts.
        note (`str`, *optional*):
            A sentence below the heading.
    """

    key: str
    title: str
    charts: tuple[Chart, ...]
    note: str = ""
