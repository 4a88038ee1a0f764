"""What a row of preference data must look like: pure functions of its values, with the fault in words.

A row that carries no preference is left out elsewhere; what is found here cannot be meant, so that it is an error.
"""

from collections.abc import Mapping
from typing import Any

EXCERPT = 80
SIDES = ("chosen", "rejected")
PARTS = ("text", "image")
# A mistyped role would be rendered by most chat templates, and trained on. Those after which a response may follow
# (with what some templates call the output of a tool)
PROMPT_ENDS = ("user", "assistant", "tool", "system", "developer", "function", "ipython", "observation", "environment")
Pair = Mapping[str, Any]


def pair_fault(row: Pair, pictures: int | None = None) -> str | None:
    """
    Why a row cannot be read as a preference pair.

    Args:
        row (`Mapping`):
            `chosen` and `rejected`, and `prompt` where the data have it: strings or lists of messages. One that is
            `None` or empty is no fault here.
        pictures (`int`, *optional*):
            Number of the row's pictures, where that is known.

    Returns:
        `str` or `None`: The fault, naming the column and its value, with the way out; `None` if there is none.
    """
    given = {name: row[name] for name in ("prompt", *SIDES) if name in row and not _is_nothing(row[name])}
    for name, value in given.items():
        if (fault := _fault_of_value(name, value)) is not None:
            return fault
    if len({isinstance(value, str) for value in given.values()}) > 1:
        formats = ", ".join(f"{name!r} {'text' if isinstance(v, str) else 'messages'}" for name, v in given.items())
        return f"its columns mix formats ({formats}). Give all of them as text, or all as lists of messages."
    if any(isinstance(value, str) for value in given.values()):
        return None
    return _fault_between(given, row, pictures)


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _fault_of_value(name: str, value: object) -> str | None:
    if isinstance(value, str):
        return _fault_of_text(name, value)
    if isinstance(value, Mapping) and "role" in value:
        return f"{name!r} is one message and no list of messages: {shown(value)}. Put it into a list."
    if not isinstance(value, list):
        return (
            f"{name!r} must be text or a list of messages (`{{'role': …, 'content': …}}`), got "
            f"{type(value).__name__} {shown(value)}."
        )
    return next((fault for message in value if (fault := _fault_of_message(name, message)) is not None), None)


def _fault_of_text(name: str, text: str) -> str | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"{name!r} holds half of a surrogate pair ({text[error.start]!r} at position {error.start}), which is no "
            f"character: {shown(text)}. Read the source as UTF-8, or replace it."
        )
    return None


def _fault_of_message(name: str, message: object) -> str | None:
    if not isinstance(message, Mapping):
        return f"{name!r} holds something that is no message (`{{'role': …, 'content': …}}`): {shown(message)}."
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        return f"{name!r} has a message without a role: {shown(message)}. Give it 'user', 'assistant' or 'system'."
    if content is None:
        return None
    if isinstance(content, str):
        return _fault_of_text(name, content)
    if not isinstance(content, list):
        return f"{name!r} has a message whose 'content' is neither text nor a list of parts: {shown(content)}."
    return next((fault for part in content if (fault := _fault_of_part(name, part)) is not None), None)


def _fault_of_part(name: str, part: object) -> str | None:
    if not isinstance(part, Mapping) or part.get("type") not in PARTS:
        return (
            f"{name!r} has a part of a message that is neither text nor a picture: {shown(part)}. Use "
            "`{'type': 'text', 'text': …}`, or `{'type': 'image'}` in the prompt."
        )
    if part["type"] == "image":
        if name in SIDES:
            return f"{name!r} has a picture in its messages: pictures belong to the prompt. Remove {shown(part)}."
        if part.get("image") is not None:  # nobody would read it, and nothing named in the data is opened
            return (
                f"{name!r} has a part that brings its own picture: {shown(part)}. Put the picture into the column "
                "'images', and `{'type': 'image'}` in its place."
            )
        return None
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        return f"{name!r} has a part whose 'text' is no text: {shown(part)}."
    return None if text is None else _fault_of_text(name, text)


def _fault_between(given: Mapping[str, Any], row: Pair, pictures: int | None) -> str | None:
    """Faults of messages with respect to one another."""
    for name in SIDES:
        last = given[name][-1]["role"] if name in given else "assistant"
        if last != "assistant":
            return (
                f"{name!r} ends with a message of the role {last!r}: {shown(given[name][-1])}. A response is the "
                "assistant's: its last message must have the role 'assistant'."
            )
    last = given["prompt"][-1]["role"] if "prompt" in given else "user"
    if last not in PROMPT_ENDS:
        return (
            f"'prompt' ends with a message of the role {last!r}: {shown(given['prompt'][-1])}. Give it one of "
            f"{', '.join(map(repr, PROMPT_ENDS))}."
        )
    if "prompt" not in row and len(given) == len(SIDES) and given["chosen"][0] != given["rejected"][0]:
        return (
            "there is no column 'prompt', and 'chosen' and 'rejected' do not begin with the same message: "
            f"{shown(given['chosen'][0])} and {shown(given['rejected'][0])}. Add a column 'prompt'."
        )
    parts = [part for message in given.get("prompt", ()) for part in _parts_of(message)]
    # Where no message has parts, the pictures are put before the first text of the user
    wanted = sum(part["type"] == "image" for part in parts)
    if pictures is not None and parts and wanted != pictures and _all_parts(given["prompt"]):
        return (
            f"'prompt' has {wanted} part(s) of the type 'image' and the row {pictures} picture(s): "
            f"{shown(given['prompt'])}. Each picture needs one."
        )
    return None


def _parts_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return message["content"] if isinstance(message.get("content"), list) else []


def _all_parts(messages: list[Mapping[str, Any]]) -> bool:
    return all(isinstance(message.get("content"), list) for message in messages if message["role"] == "user")


def shown(value: object) -> str:
    """
    A value in an error: on one line, cut off, safe to print.

    Args:
        value (`object`):
            Whatever stood in the data.

    Returns:
        `str`.
    """
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"
