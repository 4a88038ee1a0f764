"""Plain-text tables for the terminal."""

from collections.abc import Sequence

from trl_cwdpo.redaction import printable

MISSING = "–"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    r"""
    Lay out a table: the first column to the left, all others to the right.

    Args:
        headers (`Sequence[str]`):
            One header a column; lines within a header are parted by `\n`.
        rows (`Sequence[Sequence[str]]`):
            The cells, one a column.
        indent (`str`, *optional*, defaults to two spaces):
            What each line begins with.

    Returns:
        `str`: The lines, without a trailing line break.
    """
    split = [printable(header).split("\n") for header in headers]
    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    height = max(map(len, split))
    # Short headers stand at the bottom, next to their column.
    tops = [[""] * (height - len(lines)) + lines for lines in split]
    header_rows = [[column[line] for column in tops] for line in range(height)]
    widths = [max(map(len, column)) for column in zip(*header_rows, *rows, strict=True)]
    lines = [_line(row, widths) for row in header_rows]
    lines.append("  ".join("-" * width for width in widths))
    lines += [_line(row, widths) for row in rows]
    return "\n".join((indent + line).rstrip() for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others))


def percent(share: float) -> str:
    """A share as percent with one decimal, such as `87.5 %`."""
    return f"{100 * share:.1f} %"


def number(value: float | None, digits: int) -> str:
    """A number with a fixed number of decimals, or a dash for none."""
    return MISSING if value is None else f"{value:.{digits}f}"
