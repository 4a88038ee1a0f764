"""Preference data: what a pair must have to be trained on, and what happens to one that has not.

Pairs whose chosen or rejected response is empty, or whose responses are identical, carry no preference: they are left
out, counted and named in one warning per dataset. What cannot be repaired by leaving a pair out is an error: a missing
column, a dataset without any usable pair, a pair whose response does not fit `max_length`.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from .pair_checks import pair_fault, shown
from .pictures_once import MARK, TEXT_TENSORS, PicturesOnce, is_of_pictures
from .redaction import printable
from .stored_pictures import IMAGE_COLUMNS, picture_counts

logger = logging.getLogger(__name__)

AnyDatasets: TypeAlias = (
    Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None
)


class UnusablePairError(ValueError):
    """A preference pair from which no inputs of a model can be made."""


REQUIRED_COLUMNS = ("chosen", "rejected")
TEXT_COLUMNS = ("prompt", *REQUIRED_COLUMNS)
# Unicode categories of what is not seen: separators, control and format characters
INVISIBLE = ("Z", "C")
ROWS_SHOWN = 5
EXCERPT_LENGTH = 80


def response_text(response: str | list[dict[str, Any]] | None) -> str:
    """
    The text of a response, standard or conversational.

    Args:
        response (`str`, `list[dict]` or `None`):
            A string, or messages whose `content` is a string or a list of parts. Of a whole conversation, the last
            message counts.

    Returns:
        `str`, without surrounding white space.
    """
    if not response:
        return ""
    return response.strip() if isinstance(response, str) else _message_text(response[-1])


def _message_text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = " ".join(part.get("text") or "" for part in content)
    # A call of a tool says something even without words
    calls = message.get("tool_calls")
    return f"{content or ''}{calls or ''}".strip()


def _all_texts(response: str | list[dict[str, Any]]) -> list[str]:
    return [response.strip()] if isinstance(response, str) else [_message_text(message) for message in response]


def pair_problem(chosen: str | list[dict[str, Any]] | None, rejected: str | list[dict[str, Any]] | None) -> str | None:
    """
    Why a pair carries no preference.

    Args:
        chosen (`str` or `list[dict]`):
            Chosen response.
        rejected (`str` or `list[dict]`):
            Rejected response.

    Returns:
        `str` or `None`: `"empty chosen response"`, `"empty rejected response"`, `"identical responses"`, or `None` for
        a pair that can be trained on.
    """
    if not chosen or is_blank(response_text(chosen)):
        return "empty chosen response"
    if not rejected or is_blank(response_text(rejected)):
        return "empty rejected response"
    return "identical responses" if _all_texts(chosen) == _all_texts(rejected) else None


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, zero-width and control characters only."""
    return all(character.isspace() or unicodedata.category(character)[0] in INVISIBLE for character in text)


def row_problem(row: Mapping[str, Any], where: str, pictures: int | None = None) -> str | None:
    """
    Why a row is left out.

    Args:
        row (`Mapping`):
            `chosen`, `rejected` and, where the data have it, `prompt`.
        where (`str`):
            What to call it in the error.
        pictures (`int`, *optional*):
            Number of its pictures.

    Returns:
        `str` or `None`: As [`pair_problem`], or `"empty prompt"`.

    Raises:
        ValueError: If it cannot be read as a preference pair; it names the row, the column, the value and the fix.
    """
    fault = pair_fault(row, pictures)
    if fault is not None:
        raise ValueError(f"{where}: {fault}")
    problem = pair_problem(row.get("chosen"), row.get("rejected"))
    # A prompt of no text is one; a missing one is not
    return problem or ("empty prompt" if row.get("prompt", "") in (None, []) else None)


def check_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """
    Raise if a dataset has no pairs, or lacks a column that every preference dataset has.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            What to call it in the error.

    Raises:
        ValueError: Naming the missing columns, those that are there, and the fix.
    """
    columns = _columns(dataset)
    if columns is None or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} dataset is empty: there is no pair to train on.")
    # Text-only data may hold its prompts within the responses; pictures belong to a prompt
    required = ("prompt", *REQUIRED_COLUMNS) if set(IMAGE_COLUMNS) & set(columns) else REQUIRED_COLUMNS
    missing = [column for column in required if column not in columns]
    if missing:
        raise ValueError(
            f"The {name} dataset has no column {' and no column '.join(map(repr, missing))}; it has "
            f"{sorted(columns)}. A preference dataset needs 'chosen' and 'rejected', usually 'prompt', and 'images' "
            "(or 'image') where there are pictures. Rename the columns, for example "
            "`dataset.rename_column('question', 'prompt')`."
        )


def _columns(dataset: Dataset | IterableDataset) -> list[str] | None:
    # Names that are known are not read off a row, whose pictures would be decoded; a transform may make its own
    if isinstance(dataset, Dataset) and not _is_transformed(dataset):
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    return None if first is None else list(first)


def _is_transformed(dataset: Dataset | IterableDataset) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def drop_unusable_pairs(
    dataset: Dataset | IterableDataset, name: str
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """
    Leave out the pairs that carry no preference.

    A map-style dataset without such pairs is returned as it is, the same object; a streamed one is filtered as it is
    read, and its warnings come as the pairs do.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset.
        name (`str`):
            What to call it in warnings.

    Returns:
        `tuple`: the dataset, and how many pairs were left out for each reason (empty for a streamed dataset, whose
        pairs are not known yet).

    Raises:
        ValueError: If a column is missing, or no usable pair is left.
    """
    check_columns(dataset, name)
    if isinstance(dataset, IterableDataset):
        return _usable_pairs_of_stream(dataset, name), {}
    rows: dict[str, list[int]] = {}
    for index, (row, pictures) in enumerate(_text_rows(dataset)):
        problem = row_problem(row, f"Row {index} of the {name} dataset", pictures)
        if problem is not None:
            rows.setdefault(problem, []).append(index)
    if not rows:
        return dataset, {}
    unusable = {index for indices in rows.values() for index in indices}
    reasons = "; ".join(f"{len(indices)} with {problem}: {_rows(indices)}" for problem, indices in rows.items())
    if len(unusable) == len(dataset):
        raise ValueError(f"The {name} dataset has no usable pair: {reasons}.")
    logger.warning("Left out %d of %d pairs of the %s dataset (%s).", len(unusable), len(dataset), name, reasons)
    kept = dataset.select([index for index in range(len(dataset)) if index not in unusable])
    return kept, {problem: len(indices) for problem, indices in rows.items()}


def _rows(indices: list[int]) -> str:
    first = ", ".join(map(str, indices[:ROWS_SHOWN]))
    return f"row{'s' if len(indices) > 1 else ''} {first}{', …' if len(indices) > ROWS_SHOWN else ''}"


def _text_rows(dataset: Dataset) -> Iterator[tuple[dict[str, Any], int | None]]:
    """The text columns of each row and, where pictures are stored, their number; no picture is decoded."""
    names = [name for name in TEXT_COLUMNS if name in dataset.column_names or _is_transformed(dataset)]
    if _is_transformed(dataset):
        yield from (({name: row[name] for name in names if name in row}, None) for row in dataset)
        return
    counts = picture_counts(dataset)
    for batch in dataset.with_format(None).select_columns(names).iter(1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True)), None if counts is None else next(counts)


def _usable_pairs_of_stream(dataset: IterableDataset, name: str) -> IterableDataset:
    # Where the features are known, every row has every column, and no picture need be read
    names = [column for column in TEXT_COLUMNS if column in (dataset.features or {})]
    keeps = _StreamFilter(name, tuple(names))
    usable = dataset.filter(keeps, input_columns=names or None, with_indices=True)
    if next(iter(usable), None) is None:
        raise ValueError(f"The {name} dataset has no usable pair: {dict(keeps.dropped)}.")
    return usable


class _StreamFilter:
    # A class rather than a closure, so that workers of a dataloader can unpickle it

    def __init__(self, name: str, columns: tuple[str, ...] = ()) -> None:
        self.name = name
        self.columns = columns
        self.dropped: Counter[str] = Counter()

    def __call__(self, *values: Any) -> bool:
        *cells, index = values
        row = dict(zip(self.columns, cells, strict=True)) if self.columns else cells[0]
        where = f"Row {index} of the {self.name} dataset"
        missing = [column for column in REQUIRED_COLUMNS if column not in row]
        if missing:
            raise ValueError(f"{where} has no column {missing[0]!r}; it has {sorted(row)}. Leave such rows out.")
        problem = row_problem(row, where)
        if problem is None:
            return True
        self.dropped[problem] += 1
        count = sum(self.dropped.values())
        # At 1, 2, 4, 8, …: a stream may hold millions of them
        if count & (count - 1) == 0:
            logger.warning("Left out %d pairs of the %s dataset so far: %s.", count, self.name, dict(self.dropped))
        return False


def drop_unusable_pairs_of_splits(
    train: Dataset | IterableDataset | None, evaluation: AnyDatasets
) -> tuple[Any, Any, dict[str, dict[str, int]]]:
    """
    [`drop_unusable_pairs`] for what a trainer accepts.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Training data.
        evaluation ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or dictionary of them, *optional*):
            Evaluation data.

    Returns:
        `tuple`: both without unusable pairs, and how many were left out, by dataset and reason.
    """
    counts: dict[str, dict[str, int]] = {}

    def clean(dataset: Any, name: str) -> Any:  # noqa: ANN401 (what is no dataset is left to TRL's own checks)
        if isinstance(dataset, Mapping):
            return {key: clean(part, f"{name}/{key}") for key, part in dataset.items()}
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        dataset, counts[name] = drop_unusable_pairs(dataset, name)
        return dataset

    return clean(train, "train"), clean(evaluation, "eval"), counts


def with_image_list(example: dict[str, Any]) -> dict[str, Any]:
    """
    A copy of a row whose pictures stand in the column `images`, as a list, empty where there are none.

    Args:
        example (`dict`):
            Row; left as it is.

    Returns:
        `dict`.

    Raises:
        UnusablePairError: If `images` is no list.
    """
    example = dict(example)
    if "image" in example or "images" in example:
        images = example.get("images")
        if images is not None and not isinstance(images, list | tuple):
            raise UnusablePairError(
                f"The pair whose prompt is {excerpt(_prompt_text(example))!r} has {shown(images)} as its 'images', "
                f"which is no list but {type(images).__name__}. Rename the column 'image', or make it a list."
            )
        images = [example.pop("image", None), *(images or [])]
        example["images"] = [image for image in images if image is not None]
    return example


def refuse_unopened_pictures(row: Mapping[str, Any]) -> None:
    """
    Raise if something stands where pictures should: a path or an address would be opened by the processor, whoever
    wrote it into the data.

    Args:
        row (`Mapping`):
            Row with `images`, or without pictures.

    Raises:
        UnusablePairError: Naming the value and the fix.
    """
    for picture in row.get("images") or ():
        if not isinstance(picture, PIL.Image.Image | np.ndarray | torch.Tensor):
            raise UnusablePairError(
                f"The pair whose prompt is {excerpt(_prompt_text(row))!r} has {shown(picture)} among its 'images', "
                f"which is no picture but {type(picture).__name__}. Paths are not opened: make the column one of "
                "pictures with `dataset.cast_column('images', datasets.List(datasets.Image()))`."
            )


def _prompt_text(row: Mapping[str, Any]) -> str:
    prompt = row.get("prompt", "(tokenized)")
    return response_text(prompt) if isinstance(prompt, str | list) else shown(prompt)


def one_side(
    inputs: dict[str, Any], side: Literal["chosen", "rejected"], *, trim_to_multiple_of: int | None = None
) -> dict[str, Any]:
    """
    The chosen or the rejected half of a preference batch.

    Args:
        inputs (`dict` of tensors with `2B` rows):
            Batch of a preference collator. Half of the rows or patches of pictures, too, unless they are there once.
        side (`str`):
            `"chosen"` or `"rejected"`.
        trim_to_multiple_of (`int`, *optional*):
            If given, columns that hold padding of the other half only are cut off, down to a multiple of it.

    Returns:
        `dict` of tensors with `B` rows.
    """
    index = REQUIRED_COLUMNS.index(side)
    # One row for each pair: references, and pictures that are there once
    whole = {key for key in inputs if key.startswith("ref_") or (MARK in inputs and is_of_pictures(key))}
    half = {
        key: value.chunk(2)[index] if torch.is_tensor(value) and key not in whole else value
        for key, value in inputs.items()
        if key != MARK
    }
    if trim_to_multiple_of is not None:
        used = int(half["attention_mask"].any(dim=0).nonzero().max()) + 1
        used = -(-used // trim_to_multiple_of) * trim_to_multiple_of
        for key in TEXT_TENSORS & half.keys():
            half[key] = half[key][:, :used]
    return half


class PreferenceCollator:
    """
    Wraps a preference collator: accepts rows without pictures among rows with them, and refuses pairs that lose a
    response to truncation.

    Args:
        collator (`Callable`):
            A collator that returns `input_ids` and `completion_mask` of `2B` rows, chosen first, and may change the
            examples it gets.
        max_length (`int`, *optional*):
            Named in errors.
        chosen_labels (`bool`, *optional*, defaults to `False`):
            Whether to add `labels` that cover the chosen responses only.
        chosen_only (`bool`, *optional*, defaults to `False`):
            Whether to keep only the chosen half, as `SFTTrainer` would collate it.
        pictures_once (`bool`, *optional*, defaults to `False`):
            Whether to change `collator`, one of TRL's, so that it processes and returns pictures once for each pair.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        max_length: int | None = None,
        *,
        chosen_labels: bool = False,
        chosen_only: bool = False,
        pictures_once: bool = False,
    ) -> None:
        if pictures_once and hasattr(collator, "processor"):
            collator.processor = PicturesOnce(collator.processor)
        self.collator = collator
        self.max_length = max_length
        self.chosen_labels = chosen_labels
        self.chosen_only = chosen_only

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Collate.

        Args:
            examples (`list[dict]`):
                Rows of the dataset.

        Returns:
            `dict` of tensors with `2B` rows, or `B` with `chosen_only`.

        Raises:
            ValueError: If a response has no token left, a picture is none, or a pair cannot be processed.
        """
        rows = [with_image_list(example) for example in examples]
        for row in rows:
            refuse_unopened_pictures(row)
        batch = self._collated(rows)
        self._check_lengths(batch["completion_mask"], examples)
        if self.chosen_labels:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            labels[len(examples) :] = -100
            batch["labels"] = labels
        if self.chosen_only:
            multiple = getattr(self.collator, "pad_to_multiple_of", None) or 1
            batch = one_side(batch, "chosen", trim_to_multiple_of=multiple)
            del batch["completion_mask"]
        return batch

    def _collated(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self.collator([dict(row) for row in rows])
        except Exception as error:
            for row in rows:
                try:
                    self.collator([dict(row)])
                except type(error) as same:
                    raise UnusablePairError(
                        f"The pair whose prompt is {excerpt(_prompt_text(row))!r} cannot be made into model inputs: "
                        f"{same}. Check its 'prompt', 'chosen', 'rejected' and pictures."
                    ) from error
            raise

    def _check_lengths(self, completion_mask: torch.Tensor, examples: list[dict[str, Any]]) -> None:
        # The first position predicts nothing, so a token there does not count
        empty = (completion_mask[:, 1:].sum(dim=1) == 0).nonzero().flatten().tolist()
        if not empty:
            return
        side = "chosen" if empty[0] < len(examples) else "rejected"
        example = examples[empty[0] % len(examples)]
        text = excerpt(_prompt_text(example))
        raise ValueError(
            f"{len(empty)} response(s) of a batch have no token left after truncation to `max_length`="
            f"{self.max_length}; the first is the {side} response to the prompt {text!r}. Raise `max_length`, set it "
            "to None, or leave out such pairs."
        )


def excerpt(text: str, length: int = EXCERPT_LENGTH) -> str:
    """
    The beginning of a text on one line.

    Args:
        text (`str`):
            Any text.
        length (`int`, *optional*, defaults to `80`):
            Longest result.

    Returns:
        `str`.
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"
