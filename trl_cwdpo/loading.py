"""Load preference data: from the hub, a saved dataset, a folder of images, or JSON lines that name image files.

`datasets.load_dataset` covers most of it. What it leaves to the user is the plain folder with a table of pairs whose
`image` or `images` column holds paths relative to the folder: here those become images, read when a row is.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ScriptArguments

IMAGE_COLUMNS = ("image", "images")
# Words in a file's name that say which split it holds; a file without one is training data.
SPLIT_WORDS = {"test": "test", "dev": "validation", "val": "validation", "valid": "validation"}


def dataset_from_arguments(
    script: "ScriptArguments", mixture: "DatasetMixtureConfig"
) -> DatasetDict | IterableDatasetDict:
    """Load what a script's command line names: the `datasets` mixture of a config file, or `--dataset_name`."""
    from trl import get_dataset

    if mixture.datasets:
        if script.dataset_name:
            raise ValueError(
                f"Both `datasets` and `dataset_name` ({script.dataset_name!r}) are given. Remove `dataset_name`, or "
                "add it to `datasets`."
            )
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError("No dataset is given. Set `dataset_name`, or `datasets` in a config file.")
    return load_preference_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)


def load_preference_dataset(
    name: str, config: str | None = None, *, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Load the splits of a preference dataset by what `name` is.

    Args:
        name: One of
            - a JSON-lines file, or a folder with JSON-lines files in it: one pair a line. Paths in the columns
              `image` and `images` are relative to the folder and become images. A file name with the word `test` or
              `validation` (`val`, `valid`, `dev`) is that split, every other file is `train`;
            - a folder written by `save_to_disk`;
            - anything else `datasets.load_dataset` takes: a folder of images with `metadata.jsonl`, a folder of
              Parquet files, a dataset on the hub.
        config: The configuration of a dataset on the hub, where it has several.
        streaming: Read rows as they are needed.
    """
    path = Path(name)
    files = _json_lines_files(path)
    if files:
        if config is not None:
            raise ValueError(
                f"The JSON lines at {name!r} have no configurations: remove `dataset_config` ({config!r})."
            )
        splits = load_dataset("json", data_files=_files_by_split(files), streaming=streaming)
        root = path if path.is_dir() else path.parent
        return type(splits)({split: _read_images(rows, root.resolve()) for split, rows in splits.items()})
    if (path / "dataset_dict.json").is_file():
        saved = load_from_disk(name)
        if not streaming:
            return saved
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in saved.items()})
    return load_dataset(name, name=config, streaming=streaming)


def _json_lines_files(path: Path) -> list[Path]:
    """The tables to read line by line; none where `datasets` understands the folder better than we do."""
    if path.is_file():
        return [path] if path.suffix in {".json", ".jsonl"} else []
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    return [] if any(_indexes_images(file) for file in files) else files


def _indexes_images(file: Path) -> bool:
    """Whether a table follows the convention of `datasets` for folders of images: `metadata.jsonl` with file names."""
    if file.name != "metadata.jsonl":
        return False
    with file.open(encoding="utf-8") as lines:
        first = json.loads(next(lines, "{}"))
    return any(column.endswith(("file_name", "file_names")) for column in first)


def _files_by_split(files: list[Path]) -> dict[str, list[str]]:
    """Group files by the split that their names tell."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        split = next((SPLIT_WORDS.get(word, word) for word in words if word in {*SPLIT_WORDS, "validation"}), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _read_images(rows: Dataset | IterableDataset, root: Path) -> Dataset | IterableDataset:
    """Turn the columns that hold paths of image files into columns of images."""
    features = rows.features.copy()
    for column in IMAGE_COLUMNS:
        if features.get(column) == Value("string"):
            features[column] = Image()
        elif features.get(column) == List(Value("string")):
            features[column] = List(Image())
        else:
            continue
        rows = rows.map(partial(_absolute_paths, column=column, root=root))
    # Cast once, at the end: an iterable dataset does not know its columns after `map`, and decodes only what it knows.
    return rows if features == rows.features else rows.cast(features)


def _absolute_paths(row: dict[str, Any], column: str, root: Path) -> dict[str, Any]:
    """Resolve the path or the paths in one cell; a row may have none."""
    cell = row[column]
    if isinstance(cell, list):
        return {column: [_locate(path, root) for path in cell]}
    return {column: cell if cell is None else _locate(cell, root)}


def _locate(path: str, root: Path) -> str:
    """The absolute path of an image; a URL stays as it is."""
    if "://" in path:
        return path
    located = root / path
    if not located.is_file():
        raise FileNotFoundError(f"The data names the image {path!r}, and there is no such file below {str(root)!r}.")
    return str(located)
