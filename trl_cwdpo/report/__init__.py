"""A report of training runs: one self-contained HTML file, and the same as pictures and as JSON.

[`write_report`] reads what runs have left on disk. Charts are described once (`charts`, `catalogue`) and drawn twice:
by plotly (`interactive`) and by matplotlib (`pictures`), so that a page is readable without scripts.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from trl_cwdpo.probe_examples import ProbeExample
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.report.comparison import comparison_part
from trl_cwdpo.report.contents import charts_of, page_of, summary_of
from trl_cwdpo.report.page import render
from trl_cwdpo.report.pictures import save_png
from trl_cwdpo.report.tracks import NoRunError, Runs, Track, distinct_names, read_runs
from trl_cwdpo.report.verdicts import Verdict, judge

__all__ = [
    "NoRunError",
    "Runs",
    "Track",
    "Verdict",
    "distinct_names",
    "judge",
    "missing_packages",
    "read_runs",
    "render_comparison",
    "render_report",
    "save_pngs",
    "summary_of",
    "write_report",
]
NEEDED = ("jinja2", "matplotlib", "plotly")
INSTALL = 'pip install "trl-cwdpo[report]"'


def missing_packages() -> list[str]:
    """What a report needs and is not installed: the extra `report`."""
    return [name for name in NEEDED if find_spec(name) is None]


def write_report(folders: Iterable[str | os.PathLike[str]], file: str | os.PathLike[str]) -> Runs:
    """
    Write the report of some runs.

    Args:
        folders (`Iterable[str or Path]`):
            Output directories of trainers, or folders of `trl-cwdpo run`. Several are laid over each other.
        file (`str` or `Path`):
            The HTML file.

    Returns:
        [`~trl_cwdpo.report.tracks.Runs`], what was read.

    Raises:
        NoRunError: If a folder holds no run.
        ImportError: If a package of the extra `report` is missing.
        ValueError: If a file of a run cannot be understood.

    Example:

    ```python
    >>> from trl_cwdpo.report import write_report
    >>> write_report(["outputs/dpo", "outputs/cwdpo"], "comparison.html")
    ```
    """
    runs = read_runs(folders)
    write_text(Path(file), render_report(runs))
    return runs


def render_report(runs: Runs) -> str:
    """The HTML of a report; raises `ImportError` if a package of the extra `report` is missing."""
    _require_packages()
    return render(*page_of(runs))


def render_comparison(
    records: Mapping[str, ProbeRecord],
    reference: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    note: str,
    examples: Sequence[ProbeExample] = (),
) -> str:
    """The HTML of a comparison of models, see [`~trl_cwdpo.report.comparison.comparison_part`]."""
    _require_packages()
    part = comparison_part(records, reference, table, note, examples)
    return render("Models on held-out pairs", ", ".join(records), [part])


def _require_packages() -> None:
    missing = missing_packages()
    if missing:
        raise ImportError(f"A report needs {', '.join(missing)}, which the extra `report` installs: {INSTALL}")


def save_pngs(runs: Runs, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every chart of a report as a PNG into a folder, and return the files."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return [save_png(chart, target) for chart in charts_of(runs)]


def write_text(file: Path, text: str) -> None:
    """Write a file that is either complete or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
