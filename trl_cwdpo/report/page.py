"""One HTML file that holds everything: texts, charts as pictures and as data, plotly's script. It fetches nothing."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from trl_cwdpo._version import __version__
from trl_cwdpo.report.charts import Chart, Section
from trl_cwdpo.report.colors import COLORS, darkened
from trl_cwdpo.report.interactive import figure_of
from trl_cwdpo.report.pictures import svg

TEMPLATE, STYLE, SCRIPT = "report.html.j2", "report.css", "report.js"


@dataclass(frozen=True)
class Part:
    """
    A part of the page: a stage of training, or an evaluation.

    Args:
        key (`str`):
            Its name in links.
        title (`str`):
            Its heading.
        cards (`Sequence[dict]`, *optional*):
            What is to be said of each run: `name`, and `verdict` ([`~trl_cwdpo.report.verdicts.Verdict`]).
        table (`tuple[Sequence[str], Sequence[Sequence[str]]]`, *optional*):
            Headers and rows of a table of numbers.
        table_note (`str`, *optional*):
            What the table says.
        sections (`Sequence[Section]`, *optional*):
            Its charts.
        examples (`Sequence[tuple[str, Any]]`, *optional*):
            By run, what [`~trl_cwdpo.report.examples.notable_examples`] returned.
        options (`tuple[Sequence[str], Sequence[tuple[str, Sequence[str], bool]]]`, *optional*):
            Names of runs; and by option its value in each, and whether they differ.
        num_telling (`int`, *optional*, defaults to `0`):
            How many of the options, from the first, are shown without being asked for.
    """

    key: str
    title: str
    cards: Sequence[dict[str, Any]] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    table_note: str = ""
    sections: Sequence[Section] = ()
    examples: Sequence[tuple[str, Any]] = ()
    options: tuple[Sequence[str], Sequence[tuple[str, Sequence[str], bool]]] | None = None
    num_telling: int = 0


def render(title: str, subtitle: str, parts: Sequence[Part]) -> str:
    """
    Make the page.

    Args:
        title (`str`):
            Its title.
        subtitle (`str`):
            A line below it.
        parts (`Sequence[Part]`):
            Its contents.

    Returns:
        `str`: HTML. Texts are escaped; scripts other than the page's own are refused by its content security policy.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trl_cwdpo.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _pictures
    environment.filters["code"] = _with_code
    charts = [chart for part in parts for section in part.sections for chart in section.charts]
    script = _own(SCRIPT)
    return environment.get_template(TEMPLATE).render(
        title=title,
        subtitle=subtitle,
        parts=parts,
        version=__version__,
        style=_style(),
        script=script,
        policy=_policy(script, plotly_script()),
        plotly=_packed(plotly_script()) if charts else "",
        figures=_json({chart.key: figure_of(chart) for chart in charts}),
        colors=_json({theme: {name: pair[i] for name, pair in COLORS.items()} for i, theme in enumerate(THEMES)}),
    )


def _with_code(text: str) -> Any:  # noqa: ANN401 (jinja2 is optional)
    """Words in backticks as code; everything is escaped first."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


THEMES = ("light", "dark")


def _own(name: str) -> str:
    return resources.files("trl_cwdpo.report").joinpath("templates", name).read_text(encoding="utf-8")


def _style() -> str:
    light, dark = (
        "".join(f"--{name.replace('_', '-')}:{pair[i]};" for name, pair in COLORS.items()) for i in range(len(THEMES))
    )
    themes = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{themes}\n{_own(STYLE)}"


@cache
def plotly_script() -> str:
    """The library that draws, as plotly's Python package brings it along."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@cache
def _packed(script: str) -> str:
    # A third of its size; browsers unpack it themselves
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


def _policy(*scripts: str) -> str:
    """Only these scripts run, and nothing is fetched, whatever a text should manage to smuggle in."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """JSON that can stand in a page: no text in it can close the element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _pictures(chart: Chart) -> dict[str, str]:
    drawn = svg(chart)
    both = {"light": drawn, "dark": darkened(drawn)}
    return {
        theme: f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}" for theme, text in both.items()
    }
