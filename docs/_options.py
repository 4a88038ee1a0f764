"""A hook of mkdocs: options of a configuration class, from its fields and its docstring, where a page asks for them.

`<!-- options: module:Class -->` becomes a table of what the class adds to its parent.
"""

import dataclasses
import re
from importlib import import_module
from typing import Any

PLACE = re.compile(r"^<!-- options: (?P<module>[\w.]+):(?P<name>\w+)(?: (?P<prefix>\w+))? -->$", re.MULTILINE)
ENTRY = re.compile(r"^ {8}(\w+) \((.+?)\):\n((?:^ {12}.*\n|^\n)+)", re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fill the places of one page."""
    return PLACE.sub(lambda place: table(place["module"], place["name"], place["prefix"] or ""), markdown)


def table(module: str, name: str, prefix: str = "") -> str:
    """
    The options that a configuration class adds to its parent.

    Args:
        module (`str`):
            Its module.
        name (`str`):
            Its name.
        prefix (`str`, *optional*):
            Only options whose names begin so.

    Returns:
        `str`: A table in Markdown.

    Raises:
        ValueError: If an option has no entry in the docstring.
    """
    config = getattr(import_module(module), name)
    ours = [base for base in config.__mro__ if base.__module__.startswith("trl_cwdpo.")]
    theirs = {name for base in config.__mro__ if base not in ours for name in getattr(base, "__annotations__", {})}
    entries = [entry for base in ours for entry in ENTRY.finditer(f"{base.__doc__}\n")]
    described = {entry[1]: " ".join(entry[3].split()) for entry in entries}
    lines = ["| option | default | meaning |", "|---|---|---|"]
    # Its own before those of the classes that are mixed into it
    order = {option: number for number, option in enumerate(o for base in ours for o in vars(base)["__annotations__"])}
    fields = [field for field in dataclasses.fields(config) if field.name in order and field.name not in theirs]
    for field in sorted(fields, key=lambda field: order[field.name]):
        if not field.name.startswith(prefix):
            continue
        if field.name not in described:
            raise ValueError(f"`{name}.{field.name}` has no entry in the docstring of {name}.")
        meaning = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", described[field.name]).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{_default(field)}` | {meaning} |")
    return "\n".join(lines)


def _default(field: Any) -> Any:  # noqa: ANN401 (a field of a dataclass, and its default)
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"
