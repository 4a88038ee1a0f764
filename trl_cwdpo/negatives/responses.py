"""Responses in a collated batch: taken out of it, and put into it without touching its pictures.

Collating again would tokenize a sampled response's text, whose tokens need not be those that were sampled; here its
tokens are put in as they are.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_cwdpo.pictures_once import TEXT_TENSORS

# What stands at a token in each per-token tensor, 0 elsewhere; `None`: the token itself
COMPLETION_FILL: dict[str, int | None] = {"input_ids": None, "attention_mask": 1, "completion_mask": 1}
PROMPT_FILL: dict[str, int | None] = {"input_ids": None, "attention_mask": 1}


@dataclass(frozen=True)
class Layout:
    """
    How the trainer's collator lays out a batch.

    Args:
        pad_token_id (`int`):
            Padding of `input_ids`.
        max_length (`int`, *optional*):
            Longest sequence.
        keep_end (`bool`, *optional*, defaults to `False`):
            Whether a longer one keeps its end rather than its start.
        pad_to_multiple_of (`int`, *optional*):
            Multiple to pad the length to.
    """

    pad_token_id: int
    max_length: int | None = None
    keep_end: bool = False
    pad_to_multiple_of: int | None = None


def prompt_ids(batch: Mapping[str, Any]) -> list[list[int]]:
    """
    The prompts of a batch.

    Args:
        batch (`dict`):
            With `input_ids`, `attention_mask` and `completion_mask`, each of shape `(rows, T)`.

    Returns:
        `list[list[int]]`: tokens, without padding.
    """
    kept = batch["attention_mask"].bool() & ~batch["completion_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], kept, strict=True)]


def response_ids(batch: Mapping[str, Any]) -> list[list[int]]:
    """
    The responses of a batch.

    Args:
        batch (`dict`):
            With `input_ids` and `completion_mask`, each of shape `(rows, T)`.

    Returns:
        `list[list[int]]`: tokens, as far as they were not truncated.
    """
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True)]


def with_responses(
    batch: Mapping[str, Any],
    responses: Mapping[int, Sequence[int]],
    layout: Layout,
    prompts: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """
    A copy of a batch with other responses in some of its rows.

    Args:
        batch (`dict`):
            Collated batch with right-padded rows, a prompt and a response each.
        responses (`Mapping[int, Sequence[int]]`):
            New tokens, by row.
        layout ([`Layout`]):
            How to pad and truncate.
        prompts (`Sequence[Sequence[int]]`, *optional*):
            Prompts of all rows, for text whose batch may have lost their starts to truncation (`keep_end`).

    Returns:
        `dict` of tensors, on the device of `batch`; what does not have one column a token is the same object.
    """
    rows = {key: _rows(batch, key, responses, layout, prompts) for key in TEXT_TENSORS & batch.keys()}
    longest = max(row.numel() for row in rows["input_ids"])
    multiple = layout.pad_to_multiple_of or 1
    width = -(-longest // multiple) * multiple
    padding = {"input_ids": layout.pad_token_id}
    changed = dict(batch)
    for key, values in rows.items():
        changed[key] = values[0].new_full((len(values), width), padding.get(key, 0))
        for index, row in enumerate(values):
            changed[key][index, : row.numel()] = row
    return changed


def _rows(
    batch: Mapping[str, Any],
    key: str,
    responses: Mapping[int, Sequence[int]],
    layout: Layout,
    prompts: Sequence[Sequence[int]] | None,
) -> list[torch.Tensor]:
    used, completion = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    rows = []
    for index, values in enumerate(batch[key]):
        if index not in responses:
            rows.append(values[used[index]])
            continue
        prompt = values[used[index] & ~completion[index]]
        if prompts is not None:
            prompt = _filled(values.new_tensor(list(prompts[index])), PROMPT_FILL.get(key, 0))
        # Kinds of tokens are those of the response before
        fill = COMPLETION_FILL[key] if key in COMPLETION_FILL else int(values[completion[index]][0])
        row = torch.cat([prompt, _filled(values.new_tensor(list(responses[index])), fill)])
        if layout.max_length is not None:
            row = row[-layout.max_length :] if layout.keep_end else row[: layout.max_length]
        rows.append(row)
    return rows


def _filled(ids: torch.Tensor, fill: int | None) -> torch.Tensor:
    return ids if fill is None else torch.full_like(ids, fill)


def left_padded_prompts(batch: Mapping[str, Any], pad_token_id: int) -> dict[str, Any]:
    """
    What `generate` needs to continue the prompts of a batch.

    Args:
        batch (`dict`):
            Collated batch, a prompt and a response in each row.
        pad_token_id (`int`):
            Padding of `input_ids`.

    Returns:
        `dict`: per-token tensors of the prompts alone, padded on the left, without `completion_mask`; everything
        else, such as pictures, as it was.
    """
    kept = batch["attention_mask"].bool() & ~batch["completion_mask"].bool()
    width = int(kept.sum(dim=1).max())
    inputs = {key: value for key, value in batch.items() if key not in {"completion_mask", "labels"}}
    for key in TEXT_TENSORS & inputs.keys():
        padded = batch[key].new_full((len(kept), width), pad_token_id if key == "input_ids" else 0)
        for index, (values, mask) in enumerate(zip(batch[key], kept, strict=True)):
            row = values[mask]
            padded[index, width - row.numel() :] = row
        inputs[key] = padded
    return inputs


def tiled(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """
    A batch several times over: all of its rows, then all of them again.

    Whatever a processor makes of pictures (a row each, flattened patches, grids of sizes), the whole batch can be
    repeated, while its rows could be repeated one by one only with knowledge of the layout.

    Args:
        inputs (`dict`):
            Tensors.
        copies (`int`):
            How many times.

    Returns:
        `dict` of tensors with `copies` times the rows.
    """
    return {
        key: torch.cat([value] * copies) if torch.is_tensor(value) and copies > 1 else value
        for key, value in inputs.items()
    }


def response_ending(ids: Sequence[int], special_ids: Collection[int], blank_ids: Collection[int]) -> tuple[int, ...]:
    """
    What a chat template puts after a response: its last special token and the white space after it.

    Args:
        ids (`Sequence[int]`):
            Tokens of a response as the template renders it.
        special_ids (`Collection[int]`):
            Special tokens.
        blank_ids (`Collection[int]`):
            Tokens among `ids` that are white space.

    Returns:
        `tuple[int, ...]`: empty where the response does not end that way, as after truncation.
    """
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in special_ids:
            return tuple(ids[index:])
        if ids[index] not in blank_ids:
            return ()
    return ()
