"""The fixed rows of a run's probes: which pairs, and the tokens of each response family.

Rows are drawn once, by seed. Every family is a completion of the row's own prompt and pictures: `chosen`, `rejected`,
`rephrase` (a column), `mismatched` (the chosen response of another row) and `shuffled` (the tokens of the chosen
response in another order, the closing token in its place). Tokens are kept, and processed pictures as long as
they take little memory; others are processed anew each time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import ProcessorMixin

from .data import one_side, pair_problem, with_image_list
from .pictures_once import TEXT_TENSORS
from .probe_examples import ProbeExample, make_example
from .stored_pictures import IMAGE_COLUMNS
from .upstream import preference_collator, prepare_preference_dataset

HARDNESS_COLUMNS = ("grade", "hardness")
# Processed pictures, up to which those of a run's rows are kept from one probe to the next, in bytes
KEPT_PICTURES = 2**28


@dataclass(frozen=True)
class ProbeRow:
    """
    One row, tokenized.

    Args:
        index (`int`):
            Its position in the dataset.
        prompt_ids (`tuple[int, ...]`):
            Tokens of the prompt, those of pictures included.
        completions (`dict[str, tuple[int, ...]]`):
            Tokens of each family that the row has.
        hardness (`str`, *optional*):
            `"hard"` or `"easy"` by a column of the data; other values count as neither.
    """

    index: int
    prompt_ids: tuple[int, ...]
    completions: dict[str, tuple[int, ...]]
    hardness: str | None = None


@dataclass(frozen=True)
class ProbeRows:
    """
    The rows of a run's probes.

    Args:
        rows (`tuple[ProbeRow, ...]`):
            The rows.
        pad_token_id (`int`):
            Token to pad with.
        has_hardness (`bool`):
            Whether the data say which rejected responses are hard.
        seed (`int`):
            Seed of the draw.
        prompt_inputs (`Callable`, *optional*):
            Makes the model's inputs of the prompts of some rows, given their positions, where there are pictures.
        examples (`tuple[ProbeExample, ...]`, *optional*):
            The rows for people, in the same order; no part of the digest.
    """

    rows: tuple[ProbeRow, ...]
    pad_token_id: int
    has_hardness: bool = False
    seed: int = 0
    prompt_inputs: Callable[[Sequence[int]], dict[str, Any]] | None = None
    examples: tuple[ProbeExample, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """Identifies tokens and order of the rows."""
        return hashlib.sha256(self._json().encode()).hexdigest()[:16]

    def _json(self) -> str:
        return json.dumps([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what is saved with a run."""
        return {
            "seed": self.seed,
            "digest": self.digest,
            "rows": json.loads(self._json()),
            "examples": [asdict(example) for example in self.examples],
        }

    def batches(self, positions: Sequence[int], batch_size: int) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
        """
        Cut rows into batches.

        Args:
            positions (`Sequence[int]`):
                Positions of the rows to take.
            batch_size (`int`):
                Rows a batch.

        Yields:
            The positions of a batch, and the inputs of its prompts (empty where there are no pictures).
        """
        for start in range(0, len(positions), batch_size):
            part = positions[start : start + batch_size]
            yield part, {} if self.prompt_inputs is None else self.prompt_inputs(part)

    def family_inputs(self, positions: Sequence[int], family: str, prompts: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Model inputs of one family.

        Args:
            positions (`Sequence[int]`):
                Positions of the rows.
            family (`str`):
                One of those with a forward pass. A row that lacks it gets its chosen response in its place, which
                keeps the batch whole.
            prompts (`dict`):
                Inputs of the prompts, see [`~ProbeRows.batches`].

        Returns:
            `dict` of tensors, with `completion_mask` among them, padded on the right.
        """
        chosen = [self.rows[position] for position in positions]
        prompt_ids = [row.prompt_ids for row in chosen]
        completions = [row.completions.get(family, row.completions["chosen"]) for row in chosen]
        whole = [prompt + completion for prompt, completion in zip(prompt_ids, completions, strict=True)]
        length = max(map(len, whole))
        inputs = {key: value for key, value in prompts.items() if key not in TEXT_TENSORS}
        input_ids = torch.tensor([ids + (self.pad_token_id,) * (length - len(ids)) for ids in whole])
        starts, ends = (torch.tensor([len(ids) for ids in rows]).unsqueeze(1) for rows in (prompt_ids, whole))
        column = torch.arange(length)
        attention_mask = column < ends
        completion_mask = attention_mask & (column >= starts)
        kinds: dict[str, torch.Tensor] = {
            key: prompts[key].new_zeros(input_ids.shape)
            for key in ("token_type_ids", "mm_token_type_ids")
            if key in prompts
        }
        for key, kind in kinds.items():
            for i, (prompt, ids) in enumerate(zip(prompt_ids, whole, strict=True)):
                start, end = len(prompt), len(ids)
                kind[i, :start] = prompts[key][i, :start]
                kind[i, start:end] = prompts[key][i, start]  # what any response has: PaliGemma's are of kind 1
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask.long(),
            "completion_mask": completion_mask.long(),
        }
        return {**inputs, **kinds, **texts}


def choose_rows(
    dataset: Any,  # noqa: ANN401 (map-style or iterable)
    processing_class: Any,  # noqa: ANN401 (tokenizer or processor)
    size: int = 64,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    seed: int = 0,
) -> ProbeRows:
    """
    Draw the rows of a run's probes and tokenize them as [`~trl.DPOTrainer`] would.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data; of a stream the first usable rows are taken. Optional columns: `rephrase`, another wording
            of the chosen response, and `grade` or `hardness` with the values `"hard"` and `"easy"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        size (`int`, *optional*, defaults to `64`):
            Number of rows.
        max_length (`int`, *optional*):
            Longest prompt plus response in tokens. Rows that have no response left are not taken.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            `"keep_start"` or `"keep_end"`, for text.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw, of the partners and of the shuffling.

    Returns:
        [`ProbeRows`].

    Raises:
        ValueError: If no usable row is left.
    """
    raw = _draw(dataset, size, seed)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    has_images = any(row.get(column) for _, row in raw for column in IMAGE_COLUMNS)
    if has_images and not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            "The probe dataset has pictures, but `processing_class` is a tokenizer. Pass the processor of a "
            "vision-language model, or leave the pictures out."
        )
    tokenize = _tokenize_with_images if has_images else _tokenize_text
    pairs = tokenize([row for _, row in raw], processing_class)
    cut = None if max_length is None else (max_length, "keep_start" if has_images else truncation_mode)
    kept = [i for i, pair in enumerate(pairs) if all(_cut(pair["prompt"], pair[side], cut)[1] for side in SIDES)]
    if not kept:
        raise ValueError(f"No row of the probe dataset has a response left within `max_length`={max_length}.")
    rows, pairs = [raw[i] for i in kept], [pairs[i] for i in kept]
    _add_mismatched_and_shuffled(pairs, tokenizer.eos_token_id, seed)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chosen_rows = tuple(_row(index, row, pair, cut) for (index, row), pair in zip(rows, pairs, strict=True))
    return ProbeRows(
        rows=chosen_rows,
        pad_token_id=pad_token_id,
        has_hardness=any(_hardness(row) is not None for _, row in rows),
        seed=seed,
        prompt_inputs=_PromptInputs([row for _, row in rows], processing_class) if has_images else None,
        examples=tuple(
            make_example(row, ours.prompt_ids, ours.completions, tokenizer)
            for (_, row), ours in zip(rows, chosen_rows, strict=True)
        ),
    )


SIDES = ("chosen", "rejected")
Pair = dict[str, list[int]]


def _draw(dataset: Any, size: int, seed: int) -> list[tuple[int, dict[str, Any]]]:  # noqa: ANN401
    if isinstance(dataset, Dataset):
        order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
        candidates: Iterator[tuple[int, dict[str, Any]]] = ((index, dataset[index]) for index in order)
    else:
        candidates = enumerate(iter(dataset))
    usable = (
        (index, row) for index, row in candidates if pair_problem(row.get("chosen"), row.get("rejected")) is None
    )
    rows = sorted(islice(usable, size), key=lambda item: item[0])
    if not rows:
        raise ValueError(
            "The probe dataset has no usable pair: it needs the columns 'chosen' and 'rejected', not empty and not "
            "identical. Pass `probe_dataset`."
        )
    return rows


def _hardness(row: dict[str, Any]) -> str | None:
    values = (row.get(column) for column in HARDNESS_COLUMNS)
    return next((value for value in values if value in ("hard", "easy")), None)


def _rephrased(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "chosen": row.get("rephrase") or row["chosen"]} for row in rows]


def _tokenize_text(rows: list[dict[str, Any]], tokenizer: Any) -> list[Pair]:  # noqa: ANN401
    columns = [column for column in ("prompt", *SIDES, "tools", "chat_template_kwargs") if column in rows[0]]
    owner = SimpleNamespace(_tokenizer=getattr(tokenizer, "tokenizer", tokenizer))
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")

    def prepare(rows: list[dict[str, Any]]) -> Any:  # noqa: ANN401
        data = Dataset.from_list([{column: row[column] for column in columns} for row in rows])
        return prepare_preference_dataset(owner, data, tokenizer, args, "probe")

    prepared = prepare(rows)
    pairs = [
        {"prompt": row["prompt_ids"], "chosen": row["chosen_ids"], "rejected": row["rejected_ids"]} for row in prepared
    ]
    if any(row.get("rephrase") for row in rows):
        for pair, row, ours in zip(pairs, prepare(_rephrased(rows)), rows, strict=True):
            if ours.get("rephrase"):
                pair["rephrase"] = row["chosen_ids"]
    return pairs


def _tokenize_with_images(rows: list[dict[str, Any]], processor: Any) -> list[Pair]:  # noqa: ANN401
    inputs = _PromptInputs(rows, processor)
    rephrase = _PromptInputs(_rephrased(rows), processor) if any(row.get("rephrase") for row in rows) else None
    pairs = []
    for position, row in enumerate(rows):
        batch = inputs.pair([position])
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        completion = batch["completion_mask"].bool()
        pair = {"prompt": ids[0][mask[0] & ~completion[0]].tolist()}
        pair |= {side: ids[i][completion[i] & mask[i]].tolist() for i, side in enumerate(SIDES)}
        if rephrase is not None and row.get("rephrase"):
            batch = rephrase.pair([position])
            pair["rephrase"] = batch["input_ids"][0][batch["completion_mask"][0].bool()].tolist()
        pairs.append(pair)
    return pairs


class _PromptInputs:
    """The processor's output for the prompts and pictures of some rows."""

    def __init__(self, rows: list[dict[str, Any]], processor: ProcessorMixin) -> None:
        self.rows = rows
        self.kept: dict[tuple[int, ...], dict[str, Any]] = {}
        self.room = KEPT_PICTURES
        args = SimpleNamespace(max_length=None, pad_to_multiple_of=None)
        self.collator = preference_collator(
            SimpleNamespace(args=args, _is_vision_dataset=True, processing_class=processor)
        )

    def pair(self, positions: Sequence[int]) -> dict[str, Any]:
        columns = ("prompt", *SIDES, *IMAGE_COLUMNS, "tools", "chat_template_kwargs")
        rows = [self.rows[position] for position in positions]
        return self.collator([with_image_list({key: row[key] for key in columns if key in row}) for row in rows])

    def __call__(self, positions: Sequence[int]) -> dict[str, Any]:
        key = tuple(positions)
        if key in self.kept:
            return self.kept[key]
        inputs = one_side(self.pair(positions), "chosen")
        size = sum(value.numel() * value.element_size() for value in inputs.values() if torch.is_tensor(value))
        if size <= self.room:
            self.room -= size
            self.kept[key] = inputs
        return inputs


def _add_mismatched_and_shuffled(pairs: list[Pair], eos_token_id: int | None, seed: int) -> None:
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(pairs)).tolist()
    # All are taken from the chosen responses before any is added
    for place, i in enumerate(order):
        others = (pairs[order[(place + step) % len(order)]]["chosen"] for step in range(1, len(order)))
        other = next((ids for ids in others if ids != pairs[i]["chosen"]), None)
        if other is not None:
            pairs[i]["mismatched"] = other
    for pair in pairs:
        shuffled = _shuffled(pair["chosen"], eos_token_id, generator)
        if shuffled is not None:
            pair["shuffled"] = shuffled


def _shuffled(ids: list[int], eos_token_id: int | None, generator: np.random.Generator) -> list[int] | None:
    body = ids[:-1] if ids[-1] == eos_token_id else ids
    if len(set(body)) < 2:
        return None
    while True:
        shuffled = [body[i] for i in generator.permutation(len(body)).tolist()]
        if shuffled != body:
            return shuffled + ids[len(body) :]


def _cut(prompt: list[int], completion: list[int], cut: tuple[int, str] | None) -> tuple[list[int], list[int]]:
    if cut is None:
        return prompt, completion
    length, mode = cut
    if mode == "keep_start":
        return prompt[:length], completion[: max(0, length - len(prompt))]
    completion = completion[-length:]
    kept = length - len(completion)
    return prompt[len(prompt) - kept :] if kept < len(prompt) else prompt, completion


def _row(index: int, row: dict[str, Any], pair: Pair, cut: tuple[int, str] | None) -> ProbeRow:
    # The prompt is that of the chosen response, so that all families share their context
    prompt, _ = _cut(pair["prompt"], pair["chosen"], cut)
    completions = {name: _cut(pair["prompt"], ids, cut)[1] for name, ids in pair.items() if name != "prompt"}
    return ProbeRow(
        index=index,
        prompt_ids=tuple(prompt),
        completions={name: tuple(ids) for name, ids in completions.items() if ids},
        hardness=_hardness(row),
    )
