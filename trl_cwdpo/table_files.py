"""Files of preference data that cannot be read: which line, and why, where the reader only says that it failed."""

import json
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import IterableDataset
from datasets.exceptions import DatasetsError

from .pair_checks import shown

JSON_SUFFIXES = (".json", ".jsonl")
# Sources of what reads a stream, and what it raises
READERS = ("pyarrow/", "datasets/packaged_modules/json/", "datasets/table.py")
READING_ERRORS = (DatasetsError, pa.ArrowException, StopIteration, TypeError, ValueError)


@contextmanager
def naming_lines(name: str, files: Iterable[Path]) -> Iterator[None]:
    """
    Turn errors of reading data into one that names file, line and reason.

    Args:
        name (`str`):
            What the user called the data.
        files (`Iterable[Path]`):
            The files that are read within the context; none if they are not known.

    Raises:
        ValueError: Saying what is wrong with them.
    """
    try:
        yield
    except READING_ERRORS as error:
        files = list(files)
        if not files and not isinstance(error, DatasetsError):
            raise  # already about a name, a split or an option
        fault = next((fault for file in files if (fault := fault_of_file(file)) is not None), None)
        raise ValueError(fault or f"The data in {name!r} cannot be read, row by row: {_root(error)}") from error


def note_files(stream: IterableDataset, files: Iterable[str | Path]) -> None:
    """Note which files a stream reads, for what is made of it too, so that [`naming_streamed_lines`] finds them."""
    stream.info.download_checksums = {
        str(file): {"num_bytes": Path(file).stat().st_size, "checksum": None} for file in files
    }


@contextmanager
def naming_streamed_lines(*datasets: Any) -> Iterator[None]:
    """
    As [`naming_lines`], where rows are read as they are needed.

    Args:
        *datasets ([`~datasets.IterableDataset`]):
            Data that are read within the context; what is no stream is passed over.

    Raises:
        ValueError: If the error comes from reading a stream; saying file, line and reason if [`note_files`] was told.
    """
    try:
        yield
    except (*READING_ERRORS, RuntimeError) as error:
        streams = [dataset for dataset in datasets if isinstance(dataset, IterableDataset)]
        if not streams or not _is_from_reading(error):
            raise
        files = [file for stream in streams for file in stream.info.download_checksums or ()]
        fault = next((fault for file in files if (fault := fault_of_file(Path(file))) is not None), None)
        raise ValueError(fault or _fault_of_stream(files, error)) from error


def _fault_of_stream(files: list[str], error: BaseException) -> str:
    if files:
        return (
            f"A row of {', '.join(files)} cannot be read: {_root(error)}. Every row must be one JSON object, with "
            "values of the same types in the same columns."
        )
    return (
        f"A row of a streamed dataset cannot be read: {_root(error)}. `trl-cwdpo audit` on its files, or "
        "`trl_cwdpo.loading.load_preference_dataset` for the stream, names file and line."
    )


def _is_from_reading(error: BaseException) -> bool:
    """Whether a stream's file was being read when an error was raised, here or in a worker of the dataloader."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    text = "\n".join([*frames, str(error)]).replace("\\", "/")
    return "datasets/iterable_dataset.py" in text and any(reader in text for reader in READERS)


def fault_of_file(file: Path) -> str | None:
    """
    What is wrong with a file of JSON lines.

    Args:
        file (`Path`):
            The file; of other formats nothing is known.

    Returns:
        `str` or `None`: File, line and reason.
    """
    if file.suffix not in JSON_SUFFIXES:
        return None
    with file.open("rb") as stream:
        rows = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        first = next(rows, None)
        if first is None:
            return f"{file} is empty: there is no row in it. Write one JSON object a line."
        if file.suffix == ".json" or first[1].lstrip().startswith(b"["):
            return _fault_of_document(file)
        for number, line in chain([first], rows):
            fault = _fault_of_row(line)
            if fault is not None:
                return f"{file}, line {number} (row {number - 1}): {fault}"
    return None


def _fault_of_document(file: Path) -> str | None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{file} is no valid JSON, row by row: {error}. Write one JSON object a line, in UTF-8."
    return None


def _fault_of_row(line: bytes) -> str | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
    except ValueError as error:
        return f"it is no valid JSON ({error}): {shown(line[:80].decode('utf-8', 'replace'))}."
    if not isinstance(row, dict):
        return f"it is no JSON object but {type(row).__name__} {shown(row)}. Write one object a line."
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"it holds half of a surrogate pair ({error.object[error.start]!a}), which is no character."
    return None


def _root(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
