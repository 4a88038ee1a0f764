"""What must not be written down or printed as it stands: secrets in options, and control characters in texts."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"
# Names of options whose value is a secret; `eos_token` and its like are none
SECRET_NAME = re.compile(r"(?i)^token$|(hub|auth|access|bearer|api)_?token$|api_?key$|password|passwd|secret")
SECRETS = (
    # User and password of a URL, and parameters of one
    (re.compile(r"(?<=://)[^/\s?#@]+@"), f"{HIDDEN}@"),
    (re.compile(r"(?i)([?&](?:api_?key|(?:access_?)?token|password|secret|sig(?:nature)?)=)[^&#\s]+"), rf"\1{HIDDEN}"),
    # Keys by their beginnings: Hugging Face, OpenAI and others, GitHub, AWS, Google, Slack; and those of HTTP headers
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"), HIDDEN),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{30,}|\bxox[abprs]-[0-9A-Za-z-]{10,}"), HIDDEN),
    (re.compile(r"(?i)(\bBearer\s+)[A-Za-z0-9._~+/-]{12,}=*"), rf"\1{HIDDEN}"),
)


class UnpickledToken(str):
    """
    A token that is itself to all who read it, and `None` to those who unpickle what it was pickled with.

    transformers saves a run's arguments beside the model, with `torch.save`, and uploads that file with it.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __copy__(self) -> "UnpickledToken":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnpickledToken":
        return self


def redacted(value: Any) -> Any:  # noqa: ANN401 (any option's value)
    """
    A value without the secrets in it.

    Args:
        value (`Any`):
            Text, or lists and mappings of it; other values are returned as they are. Of a mapping, values whose key
            names a secret (`hub_token`, `api_key`, `password`, …) are hidden whole.

    Returns:
        The value with `<hidden>` in their place; the same if there are none.
    """
    if isinstance(value, str):
        for pattern, replacement in SECRETS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {name: _of_option(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted, value)) if type(value) in (list, tuple) else value
    return value


def _of_option(name: str, value: Any) -> Any:  # noqa: ANN401 (as above)
    return HIDDEN if value and isinstance(value, str) and SECRET_NAME.search(name) else redacted(value)


def printable(text: str) -> str:
    r"""
    A text that a terminal shows as it is: control characters, which could move its cursor or change earlier lines, and
    marks that turn the direction of writing, as escapes.

    Args:
        text (`str`):
            Text from data; line breaks and tabulators stay.

    Returns:
        `str`.

    Example:

    ```python
    >>> printable("red\x1b[2J")
    'red\\x1b[2J'
    ```
    """
    if text.isprintable():
        return text
    kept = " \n\t\u00a0\u3000"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
