"""Errors of data that name the row: what libraries raise in the middle of a run says what, but not where."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from datasets import Dataset, IterableDataset

from .data import UnusablePairError, drop_unusable_pairs_of_splits
from .image_paths import stored_rows, undecoded
from .lengths import BATCH, TOO_LONG, rendered
from .stored_pictures import (
    IMAGE_COLUMNS,
    PICTURE_ERRORS,
    RemoteImageError,
    has_stored_images,
    image_sizes,
    is_image_column,
    picture_fault,
)
from .table_files import naming_streamed_lines

logger = logging.getLogger(__name__)


class NamesRows:
    """
    Mixin for a [`~transformers.Trainer`] on preference pairs: errors of its data name dataset, row and reason.

    Pairs that TRL leaves out because their prompt fills `max_length` are counted in `dropped_pairs`, those of streams
    in `passages`.
    """

    args: Any
    state: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    dropped_pairs: dict[str, dict[str, int]]
    passages: tuple["Passage", ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        with _naming_lines(kwargs.get("train_dataset"), kwargs.get("eval_dataset")):  # the parent reads the first row
            parent.__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the parent's own)
        """
        As the parent.

        Raises:
            UnusablePairError: If a picture of the training data cannot be decoded.
            ValueError: If a row of a stream cannot be read, or there was no pair to train on.
        """
        parent: Any = super()
        streams = _naming_lines(self.train_dataset, self.eval_dataset)
        with streams, naming_pictures(self.train_dataset, self.eval_dataset):
            result = parent.train(*args, **kwargs)
        for passage in self.passages:
            passage.report()
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "The train dataset has no usable pair: all were left out, by the warnings above or because their "
                f"prompts fill `max_length`={self.args.max_length}. Raise `max_length`, or set it to None."
            )
        return result

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:  # noqa: ANN401
        parent: Any = super()

        def prepare(rows: Any) -> Any:  # noqa: ANN401
            return parent._prepare_dataset(rows, processing_class, args, *rest)

        return prepared_rows(self, prepare, dataset, processing_class, args.max_length, name=rest[-1])


def prepared_rows(
    trainer: Any,  # noqa: ANN401 (either trainer)
    prepare: Callable[[Any], Any],
    dataset: Any,  # noqa: ANN401 (in memory or a stream)
    processing_class: Any,  # noqa: ANN401 (a tokenizer or a processor)
    max_length: int | None,
    name: str,
) -> Any:  # noqa: ANN401 (as `dataset`)
    """
    Tokenize a dataset with errors that name the row, and count the pairs that are left out on the way.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            Its `dropped_pairs` or `passages` are counted in.
        prepare (`Callable`):
            TRL's preparation of a dataset.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the model.
        max_length (`int`, *optional*):
            Tokens of a prompt and a response at most.
        name (`str`):
            What to call the dataset.

    Returns:
        What `prepare` returns.

    Raises:
        UnusablePairError: If a row cannot be tokenized.
        ValueError: If no pair is left.
    """
    if isinstance(dataset, IterableDataset):
        passage = Passage(name, max_length)
        prepared = prepare(dataset.filter(_Renders(processing_class, name, passage), with_indices=True))
        passage.entered = 0  # TRL has looked at first rows on the way
        trainer.passages = (*trainer.passages, passage)
        return prepared.filter(passage.leave)
    with naming_rows(dataset, processing_class, name):
        prepared = prepare(dataset)
    count, total = len(dataset) - len(prepared), len(dataset)
    reason = f"`max_length`={max_length} leaves nothing of a response"
    if count == total:
        raise ValueError(
            f"All {total} pairs of the {name} dataset are too long: {reason}. Raise `max_length`, or set it to None."
        )
    if count:
        logger.warning("Left out %d of %d pairs of the %s dataset: %s.", count, total, name, reason)
        trainer.dropped_pairs.setdefault(name, {})[TOO_LONG] = count
    return prepared


@contextmanager
def naming_rows(dataset: Any, processing_class: Any, name: str) -> Iterator[None]:  # noqa: ANN401 (or a processor)
    """
    Where an error comes from a row that the chat template cannot render, say which row.

    Args:
        dataset ([`~datasets.Dataset`]):
            The data that are tokenized within the context.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the model.
        name (`str`):
            What to call the dataset.

    Raises:
        UnusablePairError: Naming the dataset, the row and the reason.
    """
    try:
        yield
    except UnusablePairError:
        raise
    except Exception as error:
        for index, row in enumerate(dataset):
            if (fault := _fault_of_rendering(row, processing_class)) is not None:
                raise UnusablePairError(_of_row(index, name, fault)) from error
        raise


class Passage:
    """
    Counts the pairs of a stream that TRL leaves out between two places of it, without a word, because they are too
    long.

    Args:
        name (`str`):
            What to call the dataset in warnings.
        max_length (`int`, *optional*):
            Tokens of a prompt and a response at most.
    """

    def __init__(self, name: str, max_length: int | None) -> None:
        self.name = name
        self.max_length = max_length
        self.entered = self.left = self.said = 0

    def leave(self, _: object) -> bool:
        """Count a pair that is still there; always `True`, as a filter that keeps all."""
        self.left += 1
        # At 1, 2, 4, 8, …: a stream may hold millions of them
        if self.entered - self.left >= max(2 * self.said, 1):
            self.report()
        return True

    def report(self) -> None:
        """Say how many were left out, if that is more than was said before."""
        dropped = self.entered - self.left
        if dropped > self.said:
            self.said = dropped
            reason = f"`max_length`={self.max_length} leaves nothing of a response"
            logger.warning("Left out %d pairs of the %s dataset so far: %s.", dropped, self.name, reason)


class _Renders:
    """Raises if the chat template cannot render a row of a stream; a class, for workers of a dataloader."""

    def __init__(self, processing_class: Any, name: str, passage: Passage) -> None:  # noqa: ANN401 (or a processor)
        self.processing_class = processing_class
        self.name = name
        self.passage = passage

    def __call__(self, row: dict[str, Any], index: int) -> bool:
        if (fault := _fault_of_rendering(row, self.processing_class)) is not None:
            raise UnusablePairError(_of_row(index, self.name, fault)) from fault
        self.passage.entered += 1
        return True


def _fault_of_rendering(row: Mapping[str, Any], processing_class: Any) -> Exception | None:  # noqa: ANN401
    tools = row.get("tools")
    try:
        messages = rendered(dict(row), processing_class)
        if tools is not None:
            tools = json.loads(tools) if isinstance(tools, str) else tools
            processing_class.apply_chat_template(row["prompt"], tools=tools, tokenize=False)
        getattr(processing_class, "tokenizer", processing_class)(list(messages.values()))
    except Exception as error:  # noqa: BLE001 (a template may raise anything; it is raised again by the caller)
        return error
    return None


def _of_row(index: int, name: str, fault: Exception) -> str:
    return (
        f"Row {index} of the {name} dataset cannot be tokenized ({type(fault).__name__}: {fault}). Check its messages "
        "('prompt', 'chosen', 'rejected') and 'tools' against what the chat template of the model takes."
    )


@contextmanager
def naming_pictures(train: Any, evaluation: Any = None) -> Iterator[None]:  # noqa: ANN401 (what a trainer accepts)
    """
    Where an error comes from a picture that cannot be decoded, say which row it is in.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data that are read within the context.
        evaluation (the same, or a dictionary of them, *optional*):
            Evaluation data.

    Raises:
        UnusablePairError: Naming the dataset, the row, the column and the reason.
    """
    try:
        yield
    except UnusablePairError:
        raise
    except PICTURE_ERRORS as error:
        if _is_from_pictures(error):
            for name, dataset in _by_name(train, evaluation):
                _refuse_unreadable_picture(dataset, name, error)
        raise


def _is_from_pictures(error: BaseException) -> bool:
    """Whether decoding was going on when an error was raised, here or in a worker of the dataloader."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    text = "\n".join([*frames, str(error)]).replace("\\", "/")
    return "PIL/" in text or "datasets/features/image" in text


def _by_name(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 (what a trainer accepts)
    several = isinstance(evaluation, Mapping)
    named = {f"eval/{key}": part for key, part in evaluation.items()} if several else {"eval": evaluation}
    yield from ((name, rows) for name, rows in {"train": train, **named}.items() if rows is not None)


def _naming_lines(train: Any, evaluation: Any) -> AbstractContextManager[None]:  # noqa: ANN401 (of a trainer)
    return naming_streamed_lines(*(rows for _, rows in _by_name(train, evaluation)))


def _refuse_unreadable_picture(dataset: Any, name: str, cause: Exception | None = None) -> None:  # noqa: ANN401
    """Raise for the first picture that cannot be decoded."""
    features = getattr(dataset, "features", None) or {}
    columns = [column for column in IMAGE_COLUMNS if is_image_column(features.get(column))]
    if not columns or not isinstance(dataset, Dataset | IterableDataset):
        return
    rows = dataset.select_columns(columns)
    for index, row in enumerate(stored_rows(rows) if isinstance(rows, Dataset) else undecoded(rows)):
        for column in columns:
            cells = row[column] if isinstance(row[column], list) else [row[column]]
            fault = next((reason for cell in cells if cell is not None and (reason := picture_fault(cell))), None)
            if fault is not None:
                raise UnusablePairError(
                    f"Row {index} of the {name} dataset, column {column!r}: the picture cannot be read: {fault}. "
                    "Replace it, or leave the row out; `trl-cwdpo audit` finds all such rows."
                ) from cause


def checked_datasets(train: Any, evaluation: Any) -> tuple[Any, Any, dict[str, dict[str, int]]]:  # noqa: ANN401
    """
    What a trainer does with its data first: leave out pairs without a preference, refuse what cannot be trained on.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data.
        evaluation (the same, or a dictionary of them, *optional*):
            Evaluation data.

    Returns:
        `tuple`: See [`~trl_cwdpo.data.drop_unusable_pairs_of_splits`].

    Raises:
        ValueError: Naming the dataset, the row, the column, the reason and the fix.
    """
    for name, dataset in _by_name(train, evaluation):
        if isinstance(dataset, Dataset) and has_stored_images(dataset):
            for start in range(0, len(dataset), BATCH):
                with contextlib.suppress(RemoteImageError):  # not worth fetching only to look at it
                    image_sizes(dataset, start, min(start + BATCH, len(dataset)), f"of the {name} dataset")
            # TRL decodes the first row right away
            _refuse_unreadable_picture(dataset.select(range(min(1, len(dataset)))), name)
    with _naming_lines(train, evaluation):
        return drop_unusable_pairs_of_splits(train, evaluation)
