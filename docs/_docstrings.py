"""A griffe extension: docstrings are written for another documentation builder than the one that shows them here."""

import re
from typing import Any

import griffe

# [`~trl.DPOTrainer`] is a link there; it shows the last part of the name
LINK = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")
# \\( … \\) is a formula there
FORMULA = re.compile(r"\\\\\(\s*(.*?)\s*\\\\\)", re.DOTALL)


def plain(text: str) -> str:
    """
    Turn links and formulas of a docstring into code.

    Args:
        text (`str`):
            The docstring.

    Returns:
        `str`.
    """
    text = LINK.sub(lambda found: f"`{found[2].split('.')[-1] if found[1] else found[2]}`", text)
    return FORMULA.sub(lambda found: f"`{' '.join(found[1].split())}`", text)


class Docstrings(griffe.Extension):
    """Applies [`plain`] to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
