"""Options that are a word or a value, read alike from Python, a command line or YAML."""

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
