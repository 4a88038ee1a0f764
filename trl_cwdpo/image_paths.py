"""Where images that a dataset names may come from: its own folder, or the one the user names; never the network.

A dataset is somebody else's file. What it says about paths must not make a training run read other files of the
machine, or fetch addresses.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, Image, IterableDataset, List, config
from huggingface_hub.constants import HF_HUB_CACHE

Rows: TypeAlias = Dataset | IterableDataset


def locate(path: str, root: Path, where: str, *, check: bool = True) -> str:
    """
    The absolute path of an image that the data names.

    Args:
        path (`str`):
            What the data says.
        root (`Path`):
            Folder that it is relative to and must stay inside of, absolute.
        where (`str`):
            What to call the cell in errors.
        check (`bool`, *optional*, defaults to `True`):
            Whether the file must exist.

    Returns:
        `str`.

    Raises:
        ValueError: If it is a URL, or leaves the folder.
        FileNotFoundError: If there is no such file.
    """
    _refuse_url(path, where)
    if "\0" in path:
        raise ValueError(f"{where}: the image {path!r} is no path: it holds a null character.")
    located = Path(os.path.normpath(root / path))
    if not _is_inside(located, root):
        raise ValueError(
            f"{where}: the image {path!r} lies outside of {str(root)!r}. Set `image_folder` to a folder that "
            "contains it, if you trust the data with that folder."
        )
    if check and not os.path.isfile(located):  # of a name that is too long, too
        raise FileNotFoundError(f"{where}: the image {path!r} is named, and there is no such file in {str(root)!r}.")
    return str(located)


def _refuse_url(path: str, where: str) -> None:
    if "://" in path:
        raise ValueError(
            f"{where}: the image {path!r} is a URL, and nothing is fetched from the network. Download the images, put "
            "their paths into the data, and name their folder in `image_folder`."
        )


def _is_inside(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) or path.is_relative_to(folder.resolve())


def check_embedded_images(
    rows: Rows, columns: list[str], root: Path | None, repository: str | None, split: str
) -> Rows:
    """
    Refuse images that are stored as a path to somewhere else.

    A column of images holds bytes, or paths where the images lie in files. A Parquet file can name any path.

    Args:
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        columns (`list[str]`):
            Columns of images.
        root (`Path`, *optional*):
            Folder of the data.
        repository (`str`, *optional*):
            Name of the dataset on the hub, if it comes from there.
        split (`str`):
            Named in errors.

    Returns:
        The rows; of a stream, they are checked as they are read.

    Raises:
        ValueError: If an image is a URL or lies outside of the data.
    """
    check = partial(_check_path, root=root, repository=repository)
    if isinstance(rows, IterableDataset):
        return _check_stream(rows, columns, check, split) if columns else rows
    for column in columns:
        for index, path in _paths_without_bytes(rows, column):
            check(path, where=f"Row {index} of the {split} split, column {column!r}")
    return rows


def _paths_without_bytes(rows: Dataset, column: str) -> Iterator[tuple[int, str]]:
    """Row and path of each image that is not embedded; neither pictures nor their other bytes are read."""
    start = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        # Chunk by chunk: joining them would copy the pictures
        for chunk in batch[column].chunks:
            is_list = not pa.types.is_struct(chunk.type)
            images = chunk.flatten() if is_list else chunk
            elsewhere = images.field("bytes").is_null()
            paths = images.field("path").filter(elsewhere).to_pylist()
            if any(path is not None for path in paths):
                parents = chunk.value_parent_indices() if is_list else pa.array(range(len(chunk)))
                found = zip(parents.filter(elsewhere).to_pylist(), paths, strict=True)
                yield from ((start + row, path) for row, path in found if path is not None)
            start += len(chunk)


def _check_path(path: str, where: str, *, root: Path | None, repository: str | None) -> None:
    # A stream of a folder of images on the hub names its own files there
    if repository is not None and path.split("::")[-1].startswith(f"hf://datasets/{repository}@"):
        return
    _refuse_url(path, where)
    located = Path(os.path.abspath(path))
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    # Where `datasets` puts what it downloads and unpacks
    folders = [Path(folder) for folder in caches if folder] + ([root] if root else [])
    if not any(_is_inside(located, folder) for folder in folders):
        raise ValueError(
            f"{where}: the image is not embedded but stored as the path {path!r}, which lies outside of the data"
            f"{f' ({str(root)!r})' if root else ''}. Set `image_folder` to a folder that contains it, if you trust "
            "the data with that folder."
        )


def _check_stream(rows: IterableDataset, columns: list[str], check: partial[None], split: str) -> IterableDataset:
    row_check = partial(_check_row, columns=columns, check=check, split=split)
    # Typed at the end only: what `map` types it does not decode
    return undecoded(rows).map(row_check, with_indices=True).cast(rows.features)


def undecoded(rows: IterableDataset) -> IterableDataset:
    """
    A stream whose images stay bytes and path.

    Args:
        rows ([`~datasets.IterableDataset`]):
            Stream with known features.

    Returns:
        [`~datasets.IterableDataset`].
    """
    features = dict(rows.features)
    for name, feature in features.items():
        if isinstance(feature, Image):
            features[name] = Image(decode=False)
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            features[name] = List(Image(decode=False))
    return rows.cast(Features(features))


def _check_row(
    row: dict[str, Any], index: int, *, columns: list[str], check: partial[None], split: str
) -> dict[str, Any]:
    for column in columns:
        cells = row[column] if isinstance(row[column], list) else [row[column]]
        for cell in cells:
            if cell is not None and cell["bytes"] is None and cell["path"] is not None:
                check(cell["path"], where=f"Row {index} of the {split} split, column {column!r}")
    return {}


def stored_rows(rows: Dataset, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """
    Rows as they are stored: a picture is its bytes and its path.

    Args:
        rows ([`~datasets.Dataset`]):
            Dataset.
        batch_size (`int`, *optional*, defaults to `64`):
            Rows in memory at a time.

    Returns:
        `Iterator[dict]`.
    """
    for batch in rows.with_format("arrow").iter(batch_size):
        yield from batch.to_pylist()
