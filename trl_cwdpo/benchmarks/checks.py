"""What the file of a benchmark may not say, as errors that name the key and the value."""

import difflib
import math
from collections.abc import Sequence
from typing import Any


class MatrixError(ValueError):
    """A benchmark's file says something that cannot be run."""


def at_least(least: int, **values: float) -> None:
    """Refuse numbers, by their keys, that lie below a bound."""
    for name, value in values.items():
        if not value >= least:
            raise MatrixError(f"`{name}` must be {least} or more, got {value}.")


def above_zero(name: str, value: float) -> None:
    """Refuse a number that is not finite and above 0."""
    if not 0.0 < value < math.inf:
        raise MatrixError(f"`{name}` must be a number above 0, got {value}.")


def no_twins(name: str, values: Sequence[float]) -> None:
    """Refuse a list that names something twice."""
    twins = sorted({value for value in values if values.count(value) > 1})
    if twins:
        raise MatrixError(
            f"`{name}` names {twins[0]} more than once: a run would count as several, and intervals would be too "
            "narrow. Name each once."
        )


def one_of(where: str, value: str, choices: Any) -> None:  # noqa: ANN401 (anything with names)
    """Refuse a name that is not among the choices."""
    if value not in choices:
        raise MatrixError(f"{where} is {value!r}, which is unknown{nearest(value, choices)}")


def nearest(name: str, choices: Any, otherwise: str | None = None) -> str:  # noqa: ANN401 (anything with names)
    """The end of a message about an unknown name: what it may have been, or what there is, or where that stands."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    choice = otherwise or f"use one of {', '.join(choices)}"
    return f"; did you mean {near[0]!r}?" if near else f"; {choice}."
