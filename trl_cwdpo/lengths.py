"""How long the prompts of pairs with pictures are, in tokens, before any of them is trained on.

TRL truncates a pair with pictures as it is collated. Where the prompt alone fills `max_length`, no token of either
response is left, and with a longer prompt image tokens are lost too, which the model refuses in the middle of a run.
Both happen exactly where the prompt has `max_length` tokens or more.

Most processors tell the number of image tokens from the size of a picture, which stands in its header: no pixel is
decoded. That number is compared with what the processor really does on a few rows; rows near the limit are run through
the processor in any case, and all rows are where it cannot tell.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import ProcessorMixin
from trl import apply_chat_template, maybe_extract_prompt, prepare_multimodal_messages

from .data import excerpt, response_text, with_image_list
from .stored_pictures import RemoteImageError, Size, has_stored_images, image_sizes

logger = logging.getLogger(__name__)

TOO_LONG = "longer than max_length"
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
BATCH = 256
# Rows on which the estimate is compared with the processor
VERIFIED_ROWS = 4
# Processors wrap pictures in a few tokens more than they tell of
SLACK = 16
ROWS_SHOWN = 5


class PromptLengths:
    """
    Counts the tokens of prompts, those of pictures included.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor of a vision-language model.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._tokens: dict[Size, int] = {}
        # What transformers gives to vLLM for the same purpose; not every processor has it
        self._count: Any = getattr(processor, "_get_num_multimodal_tokens", None)
        # Whether the processor tells the number of image tokens
        self.estimates = self._count is not None

    def exact(self, row: dict[str, Any]) -> int:
        """
        The length of a prompt as the collator makes it.

        Args:
            row (`dict`):
                Row with decoded pictures.

        Returns:
            `int`: Tokens.
        """
        return len(self.token_ids(row))

    def token_ids(self, row: dict[str, Any]) -> list[int]:
        """
        A prompt as the collator makes it.

        Args:
            row (`dict`):
                Row with decoded pictures.

        Returns:
            `list[int]`.
        """
        row = with_image_list(row)
        images = row.pop("images", None) or None
        prompt = rendered(row, self.processor, len(images or []))["prompt"]
        inputs = self.processor(
            text=[prompt], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        return inputs["input_ids"][0].tolist()

    def estimated(self, rows: Sequence[dict[str, Any]], sizes: Sequence[list[Size]]) -> list[int]:
        """
        About how long prompts are.

        Args:
            rows (`list[dict]`):
                Rows, whose pictures are not needed.
            sizes (`list[list[tuple[int, int]]]`):
                Height and width of the pictures of each row.

        Returns:
            `list[int]`: Tokens.
        """
        prompts = [self._rendered(row["prompt"], len(own)) for row, own in zip(rows, sizes, strict=True)]
        texts = self.processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        # In the text, each picture is one token that stands for all of its own
        return [
            len(text) + sum(self._image_tokens(size) - 1 for size in own)
            for text, own in zip(texts, sizes, strict=True)
        ]

    def agrees(self, estimate: int, exact: int, images: int) -> bool:
        """Whether an estimate is as near as rows far from the limit need it."""
        return abs(estimate - exact) <= self.margin(images) // 2

    def margin(self, images: int) -> int:
        """How far from the limit an estimate decides."""
        return SLACK * (1 + images)

    def _rendered(self, prompt: str | list[dict[str, Any]], images: int) -> str:
        if isinstance(prompt, str):
            return prompt
        # Any object stands for a picture: the template only counts them
        messages = prepare_multimodal_messages(prompt, images=[None] * images)
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _image_tokens(self, size: Size) -> int:
        if size not in self._tokens:
            self._tokens[size] = int(self._count(image_sizes=[size])["num_image_tokens"][0])
        return self._tokens[size]


def rendered(row: dict[str, Any], processing_class: Any, images: int | None = None) -> dict[str, str]:  # noqa: ANN401
    """
    `prompt`, `chosen` and `rejected` of a row as text, with the chat template applied to messages.

    Args:
        row (`dict`):
            Row; its pictures are not needed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Whose chat template it is.
        images (`int`, *optional*):
            Number of pictures of the prompt; `None` for a model without.

    Returns:
        `dict[str, str]`.
    """
    given = {name: row[name] for name in TEXT_COLUMNS if row.get(name) is not None}
    example: dict[str, Any] = dict(maybe_extract_prompt(given))
    if isinstance(example["prompt"], str):
        return example
    if images is not None:
        # Any object stands for a picture: the template only counts them
        example["prompt"] = prepare_multimodal_messages(example["prompt"], images=[None] * images)
        for column in ("chosen", "rejected"):
            example[column] = prepare_multimodal_messages(example[column])
    return apply_chat_template(example, processing_class)


def prompt_lengths(dataset: Dataset, processor: ProcessorMixin, limit: int | None = None) -> Iterator[int]:
    """
    The number of tokens of each prompt, those of its pictures included.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference dataset.
        processor ([`~transformers.ProcessorMixin`]):
            The processor of a vision-language model.
        limit (`int`, *optional*):
            Length that matters: whether a prompt reaches it is exact, its distance from it an estimate. By default,
            each length is the processor's own where its estimate was wrong before, and an estimate otherwise.

    Returns:
        `Iterator[int]`, one for each row.

    Raises:
        ValueError: If a row cannot be processed; it names the row and the reason.
    """
    lengths = PromptLengths(processor)
    texts = dataset.with_format(None).select_columns([name for name in TEXT_COLUMNS if name in dataset.column_names])
    checked = 0
    for start in range(0, len(dataset), BATCH):
        stop = min(start + BATCH, len(dataset))
        rows = list(texts.select(range(start, stop)))
        sizes = image_sizes(dataset, start, stop) if lengths.estimates else [[] for _ in rows]
        estimates: Sequence[int | None] = [None] * len(rows)
        if lengths.estimates:
            try:
                estimates = lengths.estimated(rows, sizes)
            except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
                lengths.estimates = False  # this processor tells only some sizes, or none
        for offset, estimate in enumerate(estimates):
            images = len(sizes[offset])
            near = limit is not None and estimate is not None and abs(estimate - limit) <= lengths.margin(images)
            if estimate is not None and lengths.estimates and not near and (not images or checked >= VERIFIED_ROWS):
                yield estimate
                continue
            exact = _exact(lengths, dataset, start + offset)
            if estimate is not None and images:
                checked += 1
                lengths.estimates = lengths.estimates and lengths.agrees(estimate, exact, images)
            yield exact


def _exact(lengths: PromptLengths, dataset: Dataset, index: int) -> int:
    row = dataset[index]
    try:
        return lengths.exact(row)
    except Exception as error:
        raise ValueError(
            f"Row {index}: the processor cannot make model inputs of the prompt "
            f"{excerpt(response_text(row['prompt']))!r} and its picture(s): {error}"
        ) from error


def pair_lengths(
    dataset: Dataset,
    processing_class: Any,  # noqa: ANN401 (a tokenizer or a processor)
    limit: int | None = None,
) -> Iterator[tuple[int, int, int]]:
    """
    The number of tokens of prompt, chosen and rejected response of each pair, with or without pictures.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the model.
        limit (`int`, *optional*):
            Length of prompts that matters, see [`prompt_lengths`].

    Returns:
        `Iterator[tuple[int, int, int]]`.
    """
    vision = has_stored_images(dataset)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    texts = dataset.with_format(None).select_columns([name for name in TEXT_COLUMNS if name in dataset.column_names])
    prompts = prompt_lengths(dataset, processing_class, limit) if vision else None
    for index, row in enumerate(texts):
        standard = isinstance(row["chosen"], str)
        images = len(image_sizes(dataset, index, index + 1)[0]) if vision else None
        pair = rendered(row, processing_class, images)
        texts_of_row = [pair[name] for name in ("prompt", "chosen", "rejected")]
        prompt, chosen, rejected = map(len, tokenizer(texts_of_row, add_special_tokens=False)["input_ids"])
        # Without pictures, TRL ends strings with the end token
        end = int(standard and not vision)
        yield prompt if prompts is None else next(prompts), chosen + end, rejected + end


def rows_that_lose_images(
    dataset: Dataset,
    rows: Iterable[int],
    processing_class: Any,  # noqa: ANN401 (as above)
    max_length: int,
) -> list[int]:
    """
    Those of some rows whose pictures lose tokens when their prompt is cut off.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference dataset.
        rows (`Iterable[int]`):
            Rows whose prompt is longer than `max_length`.
        processing_class ([`~transformers.ProcessorMixin`]):
            Of the model.
        max_length (`int`):
            Tokens that are kept.

    Returns:
        `list[int]`.
    """
    if not has_stored_images(dataset):
        return []
    lengths, token = PromptLengths(processing_class), getattr(processing_class, "image_token_id", None)
    found = []
    for index in rows:
        cut_off = lengths.token_ids(dataset[index])[max_length:]
        if token in cut_off if token is not None else image_sizes(dataset, index, index + 1)[0]:
            found.append(index)
    return found


def drop_overlong_vision_pairs(
    dataset: Dataset | IterableDataset, processor: ProcessorMixin, max_length: int, name: str
) -> tuple[Dataset | IterableDataset, int]:
    """
    Leave out the pairs with or without pictures whose prompt leaves no room for a response.

    Deterministic, so that all ranks come to the same result on their own.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset for a vision-language model. A streamed or transformed one is returned as it is.
        processor ([`~transformers.ProcessorMixin`]):
            The model's processor.
        max_length (`int`):
            Tokens of a prompt and a response at most.
        name (`str`):
            What to call the dataset in warnings.

    Returns:
        `tuple`: the dataset, the same object if no pair is left out, and how many were.

    Raises:
        ValueError: If no pair is left, or a row cannot be processed.
    """
    if not isinstance(dataset, Dataset) or not has_stored_images(dataset):
        return dataset, 0
    try:
        lengths = list(prompt_lengths(dataset, processor, max_length))
    except RemoteImageError:
        return dataset, 0  # fetching all pictures only to measure them is not worth it
    overlong = {index: length for index, length in enumerate(lengths) if length >= max_length}
    if not overlong:
        return dataset, 0
    shown = ", ".join(map(str, list(overlong)[:ROWS_SHOWN])) + (", …" if len(overlong) > ROWS_SHOWN else "")
    reason = (
        f"their prompts with the image tokens are {min(overlong.values())} to {max(overlong.values())} tokens long, "
        f"so `max_length`={max_length} leaves nothing of a response: row(s) {shown}"
    )
    way_out = "Raise `max_length`, set it to None, or use smaller pictures"
    if len(overlong) == len(dataset):
        raise ValueError(f"All {len(dataset)} pairs of the {name} dataset are too long: {reason}. {way_out}.")
    logger.warning(
        "Left out %d of %d pairs of the %s dataset: %s. %s to keep them.",
        len(overlong),
        len(dataset),
        name,
        reason,
        way_out,
    )
    return dataset.select([index for index in range(len(dataset)) if index not in overlong]), len(overlong)


def drop_overlong_pairs(trainer: Any) -> None:  # noqa: ANN401 (either trainer)
    """
    Leave over-long pairs out of the datasets of a trainer that is set up, and count them in its `dropped_pairs`.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            Trainer, whose datasets are replaced. Nothing is done without pictures or without `max_length`.
    """
    if not trainer._is_vision_dataset or trainer.args.max_length is None:
        return

    def drop(dataset: Any, name: str) -> Any:  # noqa: ANN401 (what is no dataset stays as it is)
        if isinstance(dataset, dict):
            return {key: drop(part, f"{name}/{key}") for key, part in dataset.items()}
        kept, count = drop_overlong_vision_pairs(dataset, trainer.processing_class, trainer.args.max_length, name)
        if count:
            trainer.dropped_pairs.setdefault(name, {})[TOO_LONG] = count
        return kept

    trainer.train_dataset = drop(trainer.train_dataset, "train")
    trainer.eval_dataset = drop(trainer.eval_dataset, "eval")


def padded_lengths(dataset: Dataset, processing_class: Any, max_length: int | None) -> list[int]:  # noqa: ANN401
    """
    How many tokens the longer sequence of each pair has, which is what its batch is padded to.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference dataset as a trainer has prepared it: with token ids, or with pictures.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the model.
        max_length (`int`, *optional*):
            Tokens of a prompt and a response at most.

    Returns:
        `list[int]`.

    Raises:
        RemoteImageError: If the pictures are not stored in the dataset.
    """
    if "prompt_ids" in dataset.column_names:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        tables = dataset.with_format("arrow").iter(1000)
        # Only counted: no list of ids is made
        columns = ([pc.list_value_length(table[name]).to_pylist() for name in names] for table in tables)
        lengths = [length for batch in columns for length in zip(*batch, strict=True)]
    elif has_stored_images(dataset):
        lengths = list(pair_lengths(dataset, processing_class))
    else:
        raise RemoteImageError("the pictures are not stored in the dataset, so their size is not known beforehand")
    limit = sys.maxsize if max_length is None else max_length
    return [min(prompt + max(chosen, rejected), limit) for prompt, chosen, rejected in lengths]


def with_pair_lengths(trainer: Any, dataset: Any, original: Any = None) -> Any:  # noqa: ANN401
    """
    What the samplers of `group_by_length` and `batch_rebalance` are to be given in place of a dataset of pairs.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`]):
            Dataset to sample from.
        original ([`~datasets.Dataset`], *optional*):
            The same with all its columns, one of which may hold lengths.

    Returns:
        [`~datasets.Dataset`]: One with the lengths only, or `dataset` where no lengths are asked for.

    Raises:
        ValueError: If the lengths cannot be known.
    """
    args = trainer.args
    if args.train_sampling_strategy not in ("group_by_length", "batch_rebalance") or not isinstance(dataset, Dataset):
        return dataset
    column = args.length_column_name
    for known in (dataset, original):
        if isinstance(known, Dataset) and column in known.column_names and len(known) == len(dataset):
            return known.select_columns([column])
    try:
        return Dataset.from_dict({column: padded_lengths(dataset, trainer.processing_class, args.max_length)})
    except RemoteImageError as error:
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` needs the length of each pair: {error}. Add "
            f"a column {column!r} with the number of tokens (`length_column_name`), or use another strategy."
        ) from error


class GroupsByLength:
    """Mixin for a [`~transformers.Trainer`] on preference pairs: its samplers know how long the pairs are."""

    train_dataset: Any
    eval_dataset: Any

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        parent: Any = super()
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return parent._get_train_sampler(with_pair_lengths(self, dataset, self.train_dataset))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        parent: Any = super()
        return parent._get_eval_sampler(with_pair_lengths(self, eval_dataset, self.eval_dataset))
