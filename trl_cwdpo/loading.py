"""Load preference data: from the hub, a saved dataset, a folder of images, or tables that name image files.

`datasets.load_dataset` covers most of it. What it leaves to the user happens here: paths in a table become images that
are read when a row is; the layouts of [`~trl_cwdpo.formats`] become TRL's; and nothing in the data reaches for a file
outside its folder or for the network. Pictures are neither decoded nor copied on the way.
"""

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError

from .data_arguments import DataArguments
from .formats import LAYOUTS, convert, parse_columns, recognise, text_columns
from .image_paths import check_embedded_images, locate, undecoded
from .stored_pictures import IMAGE_COLUMNS, is_image_column
from .table_files import naming_lines, naming_streamed_lines, note_files

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ScriptArguments

Rows: TypeAlias = Dataset | IterableDataset
Splits: TypeAlias = DatasetDict | IterableDatasetDict

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
# Words in a file's name that say which split it holds; a file without one is training data.
SPLIT_WORDS = {"test": "test", "dev": "validation", "val": "validation", "valid": "validation"}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# JSON files that describe a dataset rather than hold one
DESCRIPTIONS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
SAMPLED_ROWS = 16
_NUM_IMAGES = "_num_images"
_TEXT_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_PART_MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


def dataset_from_arguments(
    script: "ScriptArguments", mixture: "DatasetMixtureConfig", data: DataArguments | None = None
) -> Splits:
    """
    Load what a script's command line names.

    Args:
        script ([`~trl.ScriptArguments`]):
            Names the dataset.
        mixture ([`~trl.DatasetMixtureConfig`]):
            The `datasets` of a config file, where there are several.
        data ([`DataArguments`], *optional*):
            The layout of the data; recognised by default.

    Returns:
        `DatasetDict` or `IterableDatasetDict`.

    Raises:
        ValueError: If both or neither of `dataset_name` and `datasets` are given, or the data has no known layout.
    """
    from trl import get_dataset

    data = data or DataArguments()
    if mixture.datasets:
        if script.dataset_name:
            raise ValueError(
                f"Both `datasets` and `dataset_name` ({script.dataset_name!r}) are given. Remove `dataset_name`, or "
                "add it to `datasets`."
            )
        return _in_trl_format(get_dataset(mixture), data.columns, root=_folder(data.image_folder))
    if not script.dataset_name:
        raise ValueError("No dataset is given. Set `dataset_name`, or `datasets` in a config file.")
    return load_preference_dataset(
        script.dataset_name,
        script.dataset_config,
        columns=data.columns,
        image_folder=data.image_folder,
        streaming=script.dataset_streaming,
    )


def load_preference_dataset(
    name: str,
    config: str | None = None,
    *,
    columns: dict[str, str] | str | None = None,
    image_folder: str | None = None,
    streaming: bool = False,
    check_files: bool = True,
) -> Splits:
    """
    Load the splits of a preference dataset by what `name` is.

    Args:
        name (`str`):
            One of
            - a JSON-lines, JSON or Parquet file, or a folder with such files in it: one pair a line or row. Paths in
              the columns `image` and `images` are relative to the folder and become images. A file name with the word
              `test` or `validation` (`val`, `valid`, `dev`) is that split, every other file is `train`;
            - a folder written by `save_to_disk`;
            - anything else `datasets.load_dataset` takes: a folder of images with `metadata.jsonl`, a folder with a
              dataset card, a dataset on the hub.
        config (`str`, *optional*):
            The configuration of a dataset on the hub, where it has several.
        columns (`dict[str, str]` or `str`, *optional*):
            The layout, see [`DataArguments`]. By default, the columns stay as they are.
        image_folder (`str`, *optional*):
            Folder that paths of images are relative to and must stay inside of. Defaults to the folder of the data.
            Links in it are followed.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed.
        check_files (`bool`, *optional*, defaults to `True`):
            Whether to make sure that the images named in a table exist.

    Returns:
        `DatasetDict` or `IterableDatasetDict`.

    Raises:
        ValueError: If the data has no known layout, a row does not follow it, or an image is a URL or lies outside of
            the folder.
        FileNotFoundError: If an image is not there.
    """
    columns = parse_columns(columns)
    path = Path(name)
    root = _folder(image_folder) or (_folder(path if path.is_dir() else path.parent) if path.exists() else None)
    files = _tables(path)
    if files:
        if config is not None:
            raise ValueError(f"The files at {name!r} have no configurations: remove `dataset_config` ({config!r}).")
        with naming_lines(name, files):
            splits = load_dataset(BUILDERS[files[0].suffix], data_files=_files_by_split(files), streaming=streaming)
            for rows in () if streaming else splits.values():
                rows.data.validate(full=True)  # text that is no UTF-8 passes the reader
        if streaming:
            for split, paths in _files_by_split(files).items():
                note_files(splits[split], paths)
    elif (path / "dataset_dict.json").is_file():
        splits = load_from_disk(name)
        if streaming:
            splits = IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    else:
        splits = _load(name, config, path, streaming=streaming)
    repository = None if path.exists() else name
    with naming_streamed_lines(*splits.values()):
        return _in_trl_format(splits, columns, root=root, repository=repository, check=check_files)


def _load(name: str, config: str | None, path: Path, *, streaming: bool) -> Splits:
    try:
        with naming_lines(name, ()):
            return load_dataset(name, name=config, streaming=streaming)
    except (ConnectionError, DatasetNotFoundError) as error:
        if path.exists():
            raise
        reason = f"There is no file or folder {name!r}, and as a dataset on the hub it cannot be had: {error}"
        raise FileNotFoundError(reason) from error


def select_rows(rows: Rows, selection: str, option: str) -> Dataset:
    """
    Rows that a file lists, without copying any.

    Args:
        rows ([`~datasets.Dataset`]):
            The split.
        selection (`str`):
            `FILE.json:KEY`; the key's value is a list of row numbers, counted from 0.
        option (`str`):
            Name of the option that says so, for errors.

    Returns:
        [`~datasets.Dataset`], in the order of the list.

    Raises:
        ValueError: If the file or the key is not there, a number is no row of the data, or the data is streamed.
    """
    file, separator, key = selection.rpartition(":")
    if not separator or not key:
        raise ValueError(f"`{option}`={selection!r} must be FILE.json:KEY.")
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"`{option}` selects rows by number, and a streamed dataset has no numbers: remove `{option}` or "
            "`dataset_streaming`."
        )
    try:
        lists = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`{option}`={selection!r}: {file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"`{option}`={selection!r}: {file} is no valid JSON: {error}.") from error
    numbers = lists.get(key) if isinstance(lists, dict) else None
    if not isinstance(numbers, list) or not numbers:
        known = ", ".join(map(repr, lists)) if isinstance(lists, dict) else "no object"
        raise ValueError(f"`{option}`={selection!r}: {file} has no list of rows under {key!r}; it has {known}.")
    wrong = next((n for n in numbers if type(n) is not int or not 0 <= n < len(rows)), None)
    if wrong is not None:
        raise ValueError(
            f"`{option}`={selection!r} lists row {wrong!r}, but the data has {len(rows)} rows, from 0. The file "
            "was written for other data: write it anew."
        )
    return rows.select(numbers)


def _folder(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"`image_folder`={str(path)!r} is no folder.")
    return Path(os.path.abspath(folder))  # not `resolve`: a link to a folder is as good as the folder


def _tables(path: Path) -> list[Path]:
    """The tables to read file by file; none where `datasets` understands the folder better than we do."""
    if path.is_file():
        return [path] if path.suffix in BUILDERS else []
    if not path.is_dir() or (path / "dataset_dict.json").is_file():
        return []
    files = sorted(path.glob("*.jsonl"))
    # Beside pictures, `datasets` would take no notice of them; a dataset card says itself how to read its files
    if not files and not (path / "README.md").is_file():
        files = sorted(path.glob("*.parquet"))
    if not files and not any(path.rglob("*.parquet")):
        files = sorted(file for file in path.glob("*.json") if file.name not in DESCRIPTIONS)
    return [] if any(_indexes_images(file) for file in files) else files


def _indexes_images(file: Path) -> bool:
    """Whether a table follows the convention of `datasets` for folders of images: `metadata.jsonl` with file names."""
    if file.name != "metadata.jsonl":
        return False
    with file.open("rb") as lines:
        try:
            first = json.loads(next(lines, b"{}"))
        except ValueError:
            return False  # said where the table is read
    return isinstance(first, dict) and any(column.endswith(("file_name", "file_names")) for column in first)


def _files_by_split(files: list[Path]) -> dict[str, list[str]]:
    """Group files by the split that their names tell."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        split = next((SPLIT_WORDS.get(word, word) for word in words if word in {*SPLIT_WORDS, "validation"}), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _in_trl_format(
    splits: Splits,
    columns: dict[str, str] | str | None,
    *,
    root: Path | None,
    repository: str | None = None,
    check: bool = True,
) -> Splits:
    converted = {}
    for split, rows in splits.items():
        rows = _with_columns(rows, columns, split)
        rows = _read_images(rows, root, split, check=check, must=columns is not None)
        image_columns = [name for name in IMAGE_COLUMNS if is_image_column((rows.features or {}).get(name))]
        converted[split] = check_embedded_images(rows, image_columns, root, repository, split)
    return type(splits)(converted)


# --- the layout of the columns ---------------------------------------------------------------------------------------


def _with_columns(rows: Rows, columns: dict[str, str] | str | None, split: str) -> Rows:
    """Rows in TRL's format."""
    if columns is None or columns == "trl":
        return rows
    if rows.features is None:
        rows = _with_features(rows)
    rows = _renamed(rows, columns if isinstance(columns, dict) else {}, split)
    sample = _sample_row(rows)
    if sample is None:
        return rows
    layout = columns if isinstance(columns, str) and columns in LAYOUTS else recognise(sample)
    vision = bool(set(IMAGE_COLUMNS) & set(sample))
    if layout == "trl" and not (vision and all(isinstance(sample.get(column), str) for column in PAIR_COLUMNS)):
        return rows
    return _converted(rows, str(layout), split, vision=vision)


def _with_features(rows: IterableDataset) -> IterableDataset:
    """A stream whose features are known: those of its first row."""
    first = list(rows.take(1))
    return rows.cast(Dataset.from_list(first).features) if first else rows


def _sample_row(rows: Rows) -> dict[str, Any] | None:
    """What stands in each column, of the first rows, one of which may lack it; pictures are not decoded."""
    names = list(rows.features or {})
    texts = rows.select_columns([name for name in names if name not in IMAGE_COLUMNS])
    first = list(islice(texts, SAMPLED_ROWS))
    if not first:
        return None
    return {name: next((row[name] for row in first if row.get(name)), None) for name in names}


def _renamed(rows: Rows, mapping: dict[str, str], split: str) -> Rows:
    """Rows whose columns have our names; a column that had one of them and is not mapped itself gives way."""
    features = rows.features
    for ours, theirs in mapping.items():
        if theirs not in features:
            raise ValueError(
                f"`columns` maps {ours!r} to {theirs!r}, and the {split} split has no such column; it has "
                f"{sorted(features)}."
            )
    unmapped = [name for name in IMAGE_COLUMNS if name in features and not {name} & {*mapping, *mapping.values()}]
    mapping = {**mapping, **{name: name for name in unmapped}}
    names = {theirs: _fitting_name(ours, features[theirs]) for ours, theirs in mapping.items()}
    in_the_way = [name for name in names.values() if name in features and name not in names]
    rows = rows.remove_columns(in_the_way) if in_the_way else rows
    changed = {theirs: ours for theirs, ours in names.items() if theirs != ours}
    return rows.rename_columns(changed) if changed else rows


def _fitting_name(name: str, feature: Any) -> str:  # noqa: ANN401 (a feature of `datasets`)
    """`images` for a list of pictures and `image` for one, whichever of the two was meant."""
    if name not in IMAGE_COLUMNS:
        return name
    return "images" if isinstance(feature, List) else "image"


def _converted(rows: Rows, layout: str, split: str, *, vision: bool) -> Rows:
    """Rows with `prompt`, `chosen` and `rejected` made of their text columns; the other columns are not touched."""
    names = text_columns(layout, list(rows.features))
    replaced = [name for name in rows.features if name in {*names, *PAIR_COLUMNS}]
    features = Features(
        prompt=_PART_MESSAGES if vision else _TEXT_MESSAGES, chosen=_TEXT_MESSAGES, rejected=_TEXT_MESSAGES
    )
    row_converter = partial(_convert_row, layout=layout, names=names, split=split, vision=vision)
    if isinstance(rows, IterableDataset):
        kept = Features({name: feature for name, feature in rows.features.items() if name not in replaced})
        rows = undecoded(rows).map(row_converter, with_indices=True, remove_columns=replaced)
        return rows.cast(Features({**kept, **features}))
    texts = rows.select_columns(names)
    if vision:
        texts = texts.add_column(_NUM_IMAGES, list(_image_counts(rows)))
    pairs = texts.map(row_converter, with_indices=True, remove_columns=texts.column_names, features=features)
    rest = rows.remove_columns(replaced)
    # Beside the pictures rather than together with them: mapping whole rows would write all pictures anew
    return concatenate_datasets([rest, pairs], axis=1) if rest.column_names else pairs


def _convert_row(
    row: dict[str, Any], index: int, *, layout: str, names: list[str], split: str, vision: bool
) -> dict[str, Any]:
    images = row[_NUM_IMAGES] if _NUM_IMAGES in row else _count_images(row)
    try:
        return dict(convert(layout, {name: row[name] for name in names}, images=images, vision=vision))
    except ValueError as error:
        raise ValueError(f"Row {index} of the {split} split, read as '{layout}': {error}") from None


def _count_images(row: dict[str, Any]) -> int:
    return (row.get("image") is not None) + sum(image is not None for image in row.get("images") or [])


def _image_counts(rows: Dataset) -> Iterator[int]:
    """Number of pictures of each row, read off Arrow's bookkeeping."""
    columns = [name for name in IMAGE_COLUMNS if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        yield from map(sum, zip(*(_counts_of(batch[name]) for name in columns), strict=True))


def _counts_of(column: Any) -> list[int]:  # noqa: ANN401 (a column of Arrow's)
    # Chunk by chunk: joining them would copy the pictures
    if hasattr(column.type, "value_type"):
        return [count or 0 for chunk in column.chunks for count in chunk.value_lengths().to_pylist()]
    return [int(valid) for chunk in column.chunks for valid in chunk.is_valid().to_pylist()]


# --- images ----------------------------------------------------------------------------------------------------------


def _read_images(rows: Rows, root: Path | None, split: str, *, check: bool, must: bool) -> Rows:
    """Turn the columns that hold paths or bytes of image files into columns of images."""
    if rows.features is None:
        return rows
    features = rows.features.copy()
    for column in IMAGE_COLUMNS:
        feature = features.get(column)
        is_list = isinstance(feature, List)
        inner = feature.feature if is_list else feature
        if inner == Value("string") or inner == Value("large_string"):
            if root is None:
                if not must:
                    continue
                raise ValueError(
                    f"The column {column!r} of the {split} split holds paths, and the data is in no local folder. "
                    "Set `image_folder` to the folder that the paths are relative to."
                )
            absolute = partial(_absolute_paths, column=column, root=root, split=split, check=check)
            rows = rows.map(absolute, with_indices=True)
        elif not _is_stored_image(inner):
            if feature is not None and not is_image_column(feature) and inner != Value("null"):
                raise ValueError(
                    f"The column {column!r} of the {split} split holds neither pictures nor paths, in one row at "
                    f"least: its type is {inner}. Give a path, bytes, or null in each row."
                )
            continue
        features[column] = List(Image()) if is_list else Image()
    changed = [name for name in IMAGE_COLUMNS if features.get(name) != (rows.features or {}).get(name)]
    if isinstance(rows, IterableDataset):
        # Cast at the end: it does not know its columns after `map`, and decodes only what it knows
        return rows.cast(features) if changed else rows
    for name in changed:
        rows = rows.cast_column(name, features[name])
    return rows


def _is_stored_image(feature: Any) -> bool:  # noqa: ANN401 (a feature of `datasets`)
    """Whether a feature holds pictures without being declared to."""
    return feature in (Value("binary"), Value("large_binary")) or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )


def _absolute_paths(
    row: dict[str, Any], index: int, *, column: str, root: Path, split: str, check: bool
) -> dict[str, Any]:
    """Resolve the path or the paths in one cell; a row may have none."""
    cell = row[column]
    where = f"Row {index} of the {split} split, column {column!r}"
    if isinstance(cell, list):
        return {column: [locate(path, root, where, check=check) for path in cell]}
    return {column: cell if cell is None else locate(cell, root, where, check=check)}
