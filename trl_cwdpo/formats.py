"""Layouts of preference data that users have, and converters of a row from each to TRL's own: pure functions."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

AUTO = "auto"
LAYOUTS = {
    "trl": "'chosen' and 'rejected', strings or messages, usually 'prompt', and 'images' or 'image'",
    "rlaif-v": "'question', 'chosen', 'rejected', 'image'",
    "rlhf-v": "'text', a JSON object with 'question', 'chosen' and 'rejected', and 'image'",
    "llava": "'conversations' of turns with 'from' and 'value', 'chosen' and 'rejected' as strings or turns, or "
    "'rejected_conversations', and 'image' or 'images'",
}
PLACEHOLDER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "llava": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Prompts that a chat template was applied to
RENDERED = re.compile(r"<\|\w+\|>|\[INST\]|<start_of_turn>|ASSISTANT:\s*$")
EXCERPT = 80
_REQUIRED: dict[str, tuple[str, ...]] = {
    "trl": ("chosen", "rejected"),
    "rlaif-v": ("question", "chosen", "rejected"),
    "rlhf-v": ("text",),
    "llava": (),
}
_READ: dict[str, tuple[str, ...]] = {
    **_REQUIRED,
    "trl": ("prompt", "chosen", "rejected"),
    "llava": ("conversations", "prompt", "chosen", "rejected", "rejected_conversations"),
}
_IMAGE_PART: dict[str, str | None] = {"type": "image", "text": None}
# Names that a mapping of columns may give: those of the layouts.
KNOWN_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "images",
    "image",
    "question",
    "text",
    "conversations",
    "rejected_conversations",
)


def parse_columns(columns: Mapping[str, str] | str | None) -> dict[str, str] | str | None:
    """
    The option `columns`, checked.

    Args:
        columns (`dict[str, str]` or `str`, *optional*):
            `"auto"`, the name of a layout, or a mapping of our columns to the dataset's: a dictionary, or one as JSON.

    Returns:
        `dict[str, str]` or `str` or `None`: `"auto"`, a layout's name, a mapping, or `None` where nothing is given.

    Raises:
        ValueError: If it is none of these.
    """
    if columns is None or columns in (AUTO, *LAYOUTS):
        return columns
    mapping: object = columns
    if isinstance(columns, str):
        if not columns.strip().startswith("{"):
            raise ValueError(
                f"`columns`={columns!r} is no layout. Use '{AUTO}', one of {', '.join(map(repr, LAYOUTS))}, or a "
                """mapping such as '{"prompt": "question", "images": "image"}'."""
            )
        try:
            mapping = json.loads(columns)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`columns`={columns!r} is no JSON: {error}. Use double quotes within single ones, such as "
                """'{"prompt": "question", "images": "image"}'."""
            ) from None
    if not isinstance(mapping, Mapping) or not all(isinstance(name, str) for name in mapping.values()):
        raise ValueError(f"`columns`={columns!r} must map names of columns to names of columns, both strings.")
    unknown = [name for name in mapping if name not in KNOWN_COLUMNS]
    if unknown:
        raise ValueError(
            f"`columns` maps {unknown[0]!r}, which is no column this package reads. The keys are our names, the "
            f"values the dataset's; use {', '.join(map(repr, KNOWN_COLUMNS))}."
        )
    twice = [name for name in mapping.values() if list(mapping.values()).count(name) > 1]
    if twice:
        raise ValueError(f"`columns` uses the dataset's column {twice[0]!r} twice; map each column once.")
    return dict(mapping)


def recognise(row: Mapping[str, Any]) -> str:
    """
    The layout of a dataset, by one of its rows.

    Args:
        row (`dict`):
            The first row; pictures may be left out, their columns may not.

    Returns:
        `str`: One of `LAYOUTS`.

    Raises:
        ValueError: If no layout fits; it names the columns found and the layouts known.
    """
    columns = set(row)
    if "conversations" in columns and columns & {"rejected", "rejected_conversations"}:
        return "llava"
    if {"chosen", "rejected"} <= columns:
        if _is_turns(row["chosen"]) or _is_turns(row["rejected"]):
            return "llava"
        return "rlaif-v" if "question" in columns and "prompt" not in columns else "trl"
    if "text" in columns and _is_packed_pair(row["text"]):
        return "rlhf-v"
    raise ValueError(
        f"The layout of the data is not known: its columns are {sorted(columns)}. Known are {_layouts_in_words()}. "
        """Name the dataset's columns in `columns`, such as '{"prompt": "question", "chosen": "better", "rejected": """
        """"worse", "images": "image"}'."""
    )


def _layouts_in_words() -> str:
    return "; ".join(f"'{name}' ({columns})" for name, columns in LAYOUTS.items())


def _is_turns(value: object) -> bool:
    """Whether a value is a turn of LLaVA's, or a list of them."""
    turn = value[0] if isinstance(value, list) and value else value
    return isinstance(turn, Mapping) and "from" in turn and "value" in turn


def _is_packed_pair(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{"))


def text_columns(layout: str, columns: Collection[str]) -> list[str]:
    """
    The columns that a conversion reads, apart from pictures; they are replaced by `prompt`, `chosen` and `rejected`.

    Args:
        layout (`str`):
            One of `LAYOUTS`.
        columns (`Collection[str]`):
            Columns of the dataset.

    Returns:
        `list[str]`.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in _REQUIRED[layout] if name not in columns]
    if layout == "rlhf-v" and "text" not in columns and not set(_REQUIRED["rlaif-v"]) - set(columns):
        return list(_REQUIRED["rlaif-v"])
    if missing:
        raise ValueError(
            f"`columns`='{layout}' needs {LAYOUTS[layout]}, and the dataset has no column "
            f"{' and no column '.join(map(repr, missing))}; it has {sorted(columns)}. Use `columns`='{AUTO}', another "
            "layout, or a mapping of columns."
        )
    return [name for name in _READ[layout] if name in columns]


def convert(layout: str, row: Mapping[str, Any], *, images: int, vision: bool) -> dict[str, list[dict[str, Any]]]:
    """
    One row in TRL's conversational preference format.

    Args:
        layout (`str`):
            One of `LAYOUTS`; `"trl"` stands for strings here.
        row (`dict`):
            The columns that [`text_columns`] names.
        images (`int`):
            Number of pictures of the row.
        vision (`bool`):
            Whether rows of the dataset may have pictures: then the content of prompts is a list of parts, with a part
            for each picture where its `<image>` stood, or else before the text.

    Returns:
        `dict`: `prompt`, `chosen` and `rejected`, each a list of messages.

    Raises:
        ValueError: If the row cannot be converted; it names the column, the value and the reason.
    """
    pair = _CONVERTERS[layout](row)
    for column in ("chosen", "rejected"):
        if any(PLACEHOLDER in (message["content"] or "") for message in pair[column]):
            raise ValueError(
                f"the {column} response contains {PLACEHOLDER!r}, which would be read as a picture. Pictures belong "
                "to the prompt: remove it."
            )
    if vision:
        return {**pair, "prompt": place_images(pair["prompt"], images)}
    return pair


def place_images(messages: Sequence[Mapping[str, Any]], images: int) -> list[dict[str, Any]]:
    r"""
    Messages whose content is a list of parts, with `{"type": "image"}` where `<image>` stood.

    Args:
        messages (`list[dict]`):
            Messages of a prompt, with text as content.
        images (`int`):
            Number of pictures. Without any `<image>`, they come before the text of the first user message.

    Returns:
        `list[dict]`.

    Raises:
        ValueError: If there are as many `<image>` neither as pictures nor as none.

    Example:

    ```python
    >>> place_images([{"role": "user", "content": "<image>\nWhat is this?"}], 1)
    [{'role': 'user', 'content': [{'type': 'image', 'text': None}, {'type': 'text', 'text': 'What is this?'}]}]
    ```
    """
    placeholders = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if placeholders not in (0, images):
        raise ValueError(
            f"the prompt has {placeholders} {PLACEHOLDER!r} and the row {images} picture(s): "
            f"{_shown(messages[0]['content'])}. Each picture needs one, or leave them out altogether to have the "
            "pictures come first."
        )
    first_user = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    placed = []
    for index, message in enumerate(messages):
        leading = images if placeholders == 0 and index == first_user else 0
        parts = [_IMAGE_PART] * leading + _parts(message["content"])
        placed.append({"role": message["role"], "content": [dict(part) for part in parts]})
    return placed


def _parts(text: str) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append(_IMAGE_PART)
        # The line break between a placeholder and the text belongs to the placeholder
        piece = piece.strip("\n") if PLACEHOLDER in text else piece
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def _from_trl(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = _string(row, "prompt")
    if RENDERED.search(prompt):
        raise ValueError(
            f"'prompt' looks as if a chat template had been applied to it: {_shown(prompt)}. Set `columns` to 'trl' "
            "to train on it as it is, or give the plain question."
        )
    return _pair(prompt, _string(row, "chosen"), _string(row, "rejected"))


def _from_rlaif_v(row: Mapping[str, Any]) -> dict[str, Any]:
    return _pair(*(_string(row, column) for column in _REQUIRED["rlaif-v"]))


def _from_rlhf_v(row: Mapping[str, Any]) -> dict[str, Any]:
    if "text" not in row:
        return _from_rlaif_v(row)
    packed = row["text"]
    try:
        unpacked = json.loads(packed) if isinstance(packed, str) else packed
    except json.JSONDecodeError as error:
        raise ValueError(f"'text' is no JSON ({error}): {_shown(packed)}.") from None
    missing = sorted(set(_REQUIRED["rlaif-v"]) - set(unpacked if isinstance(unpacked, Mapping) else ()))
    if missing:
        raise ValueError(f"'text' is a JSON object without {', '.join(map(repr, missing))}: {_shown(packed)}.")
    return _from_rlaif_v(unpacked)


def _from_llava(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = _turns(row, "conversations") or _turns(row, "prompt", role="user")
    if row.get("rejected_conversations") is not None:
        return _split_conversations(prompt, _turns(row, "rejected_conversations"))
    chosen, rejected = _turns(row, "chosen", role="assistant"), _turns(row, "rejected", role="assistant")
    if not prompt:
        return _split_conversations(chosen, rejected)
    # Responses may be given as whole conversations
    chosen, rejected = (
        turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns for turns in (chosen, rejected)
    )
    if prompt[-1]["role"] == "assistant":
        # The conversation holds its own answer: it is the chosen one, which need not be repeated
        if chosen and chosen != prompt[-1:]:
            raise ValueError(
                f"'conversations' ends with an answer that is not 'chosen': {_shown(prompt[-1]['content'])}. End it "
                "with the turn that is to be answered."
            )
        prompt, chosen = prompt[:-1], prompt[-1:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _split_conversations(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> dict[str, Any]:
    """Two conversations parted into what they share, up to the last common turn of the user, and the two answers."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise ValueError("the chosen and the rejected conversation do not begin with the same turn of the user.")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _turns(row: Mapping[str, Any], column: str, role: str | None = None) -> list[dict[str, str]]:
    """The messages in a cell that holds turns (`from`, `value`), messages, or a string that `role` says."""
    cell = row.get(column)
    if cell is None:
        return []
    if isinstance(cell, str) and role is not None:
        return [{"role": role, "content": cell}]
    turns = [cell] if isinstance(cell, Mapping) else cell
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"{column!r} is no list of turns: {_shown(cell)}.")
    return [_message(turn, column) for turn in turns]


def _message(turn: object, column: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{column!r} holds something that is no turn: {_shown(turn)}.")
    speaker, value = (turn.get("from") or turn.get("role")), turn.get("value", turn.get("content"))
    if speaker not in ROLES:
        raise ValueError(f"{column!r} has a turn from {speaker!r}; known are {', '.join(ROLES)}.")
    if not isinstance(value, str) and value is not None:
        raise ValueError(f"{column!r} has a turn whose value is no text: {_shown(value)}.")
    return {"role": ROLES[speaker], "content": value or ""}


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column!r} is no text but {_shown(value)}.")
    # Missing responses are counted and left out later on
    return value or ""


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…")


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "trl": _from_trl,
    "rlaif-v": _from_rlaif_v,
    "rlhf-v": _from_rlhf_v,
    "llava": _from_llava,
}
