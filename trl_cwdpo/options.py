"""Options as they come from Python, a command line or YAML: their types, and words that stand beside a value."""

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

WORDS: dict[str, bool | str] = {"true": True, "false": False, "auto": "auto"}


def bool_or_auto(name: str, value: object) -> bool | str:
    """
    Read an option that is a boolean or `"auto"`.

    Args:
        name (`str`):
            Name of the option, for the error.
        value (`bool` or `str`):
            What the user gave.

    Returns:
        `bool` or `"auto"`.

    Raises:
        ValueError: If it is neither.
    """
    word = str(value).lower()
    if word not in WORDS:
        raise ValueError(f"`{name}` must be 'auto', True or False, got {value!r}.")
    return WORDS[word]


def check_types(config: Any) -> None:  # noqa: ANN401 (any dataclass)
    """
    Raise if one of this package's options has a value of the wrong type.

    What a configuration inherits from other packages is left to them, and options that are a number or a word are read
    by [`bool_or_auto`] and [`~trl_cwdpo.calibration.number_or_auto`].

    Args:
        config (dataclass):
            The configuration.

    Raises:
        TypeError: Naming the option, the value and the type that it must have.
    """
    for name, annotation in _own_options(type(config)):
        value = getattr(config, name)
        members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        numbers_or_words = str in members and {int, float} & set(members)
        if numbers_or_words or any(_is_of(value, member) for member in members):
            continue
        expected = " or ".join(_in_words(member) for member in members)
        raise TypeError(f"`{name}` must be {expected}, got {type(value).__name__} {value!r}.")


def _own_options(config: type) -> Iterator[tuple[str, Any]]:
    for base in config.__mro__:
        if base.__module__.startswith(f"{__package__}."):
            yield from inspect.get_annotations(base).items()


def _is_of(value: object, member: Any) -> bool:  # noqa: ANN401 (a type, or a generic of one)
    if typing.get_origin(member) is list:
        (item,) = typing.get_args(member)
        return isinstance(value, list) and all(_is_of(each, item) for each in value)
    if typing.get_origin(member) is dict:
        return isinstance(value, dict)
    if member is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, member)


def _in_words(member: Any) -> str:  # noqa: ANN401 (as above)
    if typing.get_origin(member) is list:
        return f"a list of {_in_words(typing.get_args(member)[0])}"
    if typing.get_origin(member) is dict:
        return "a dictionary"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return words.get(member, str(member))
