"""Which row of a dataset the texts of a batch come from: the errors of a run name rows, and a batch knows none."""

from collections.abc import Iterable, Mapping
from typing import Any

from .data import response_text


def find_pair(rows: Iterable[dict[str, Any]], texts: Mapping[str, str]) -> int | None:
    """
    Index of the pair whose responses were decoded to these texts, up to truncation.

    Args:
        rows (`Iterable[dict]`):
            Rows with `chosen` and `rejected`.
        texts (`dict[str, str]`):
            Decoded responses, without special tokens, by column: both or one of them.

    Returns:
        `int` or `None`: the first match.
    """
    wanted = {column: text.strip() for column, text in texts.items()}
    for index, row in enumerate(rows):
        if all(_begins_with(row, column, seen) for column, seen in wanted.items()):
            return index
    return None


def find_sampled_pair(rows: Iterable[dict[str, Any]], texts: Mapping[str, str], prompt: str) -> int | None:
    """
    Index of the pair of which a response was replaced by one that the policy sampled.

    Args:
        rows (`Iterable[dict]`):
            Rows with `prompt`, `chosen` and `rejected`.
        texts (`dict[str, str]`):
            Decoded responses, as for [`find_pair`].
        prompt (`str`):
            The decoded prompt, with whatever the chat template put around it.

    Returns:
        `int` or `None`: the first row with the prompt and one of the responses; where no row has one of them, the row
        with the prompt if there is just one.
    """
    seen = _without_space(prompt)
    same_prompt = []
    for index, row in enumerate(rows):
        said = [_without_space(response_text([part] if isinstance(part, dict) else part)) for part in _parts(row)]
        if not any(said) or not all(text in seen for text in said):
            continue
        if any(_begins_with(row, column, text.strip()) for column, text in texts.items()):
            return index
        same_prompt.append(index)
    return same_prompt[0] if len(same_prompt) == 1 else None


def _begins_with(row: Mapping[str, Any], column: str, seen: str) -> bool:
    return bool(seen) and response_text(row[column]).startswith(seen)


def _parts(row: Mapping[str, Any]) -> list[Any]:
    prompt = row.get("prompt")
    return [prompt] if isinstance(prompt, str) else list(prompt or ())


def _without_space(text: str) -> str:
    return "".join(text.split())
