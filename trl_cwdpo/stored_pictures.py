"""Pictures as a dataset stores them: which columns hold them, how many there are, how large, and which are broken."""

import io
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import PIL.Image
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Image, List

IMAGE_COLUMNS = ("image", "images")
Size: TypeAlias = tuple[int, int]
# What Pillow raises for a file that is no picture, a cut-off one, or one too large to be meant
PICTURE_ERRORS = (OSError, SyntaxError, TypeError, ValueError, PIL.Image.DecompressionBombError)
EXIF_ORIENTATION = 0x0112
# Orientations that exchange height and width
TURNED = {5, 6, 7, 8}


class RemoteImageError(ValueError):
    """A picture that would have to be fetched to know its size."""


def is_image_column(feature: object) -> bool:
    """Whether a feature of `datasets` is that of pictures, one or a list of them for each row."""
    return isinstance(feature.feature if isinstance(feature, List) else feature, Image)


def picture_fault(picture: Any) -> str | None:  # noqa: ANN401 (as stored, or decoded)
    """
    Why a picture cannot be read.

    Args:
        picture (`dict` or [`PIL.Image.Image`]):
            `bytes` and `path` of a picture, or a decoded one.

    Returns:
        `str` or `None`.
    """
    if not isinstance(picture, Mapping):
        return None
    source = picture["path"] if picture.get("bytes") is None else io.BytesIO(picture["bytes"])
    if source is None:
        return "neither bytes nor a path"
    try:
        with PIL.Image.open(source) as opened:
            opened.load()
    except PICTURE_ERRORS as error:
        return " ".join(str(error).split())
    return None


def has_stored_images(dataset: Dataset) -> bool:
    """Whether a dataset has columns of pictures, stored as such, and only those."""
    features = [dataset.features[name] for name in IMAGE_COLUMNS if name in dataset.column_names]
    return bool(features) and all(map(is_image_column, features)) and dataset.format["type"] != "custom"


def picture_counts(dataset: Dataset) -> Iterator[int] | None:
    """
    The number of pictures of each row.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset.

    Returns:
        `Iterator[int]`, or `None` where no column holds pictures.
    """
    names = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    return _picture_counts(dataset.select_columns(names).with_format("arrow"), names) if names else None


def _picture_counts(pictures: Dataset, names: list[str]) -> Iterator[int]:
    for batch in pictures.iter(1000):
        for row in range(batch.num_rows):
            yield sum(_number_of_pictures(batch[name][row]) for name in names)


def _number_of_pictures(cell: Any) -> int:  # noqa: ANN401 (a scalar of Arrow's)
    if not cell.is_valid:
        return 0
    return sum(cell.values.is_valid().to_pylist()) if pa.types.is_list(cell.type) else 1


def image_sizes(dataset: Dataset, start: int, stop: int, where: str = "of the data") -> list[list[Size]]:
    """
    Height and width of the pictures of some rows, read off their headers.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with pictures in `image` or `images`.
        start (`int`):
            First row.
        stop (`int`):
            Row after the last.
        where (`str`, *optional*, defaults to `"of the data"`):
            What the rows are of, for errors.

    Returns:
        `list[list[tuple[int, int]]]`, one list for each row.

    Raises:
        ValueError: If a picture cannot be opened; it names the row.
    """
    columns = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    table = dataset.select_columns(columns).with_format("arrow")[start:stop]
    sizes: list[list[Size]] = []
    for offset in range(stop - start):
        cells = [cell for name in columns for cell in _cells(table[name][offset])]
        try:
            sizes.append([size_of(cell) for cell in cells])
        except RemoteImageError:
            raise
        except PICTURE_ERRORS as error:
            raise ValueError(
                f"Row {start + offset} {where}, column {' or '.join(map(repr, columns))}: a picture cannot be opened: "
                f"{error}. Replace it, or leave the row out; `trl-cwdpo audit` finds all such rows."
            ) from error
    return sizes


def _cells(scalar: Any) -> list[Any]:  # noqa: ANN401 (a scalar of Arrow's)
    if not scalar.is_valid:
        return []
    cells = [scalar] if pa.types.is_struct(scalar.type) else [scalar.values[index] for index in range(len(scalar))]
    return [cell for cell in cells if cell.is_valid]


def size_of(cell: Any) -> Size:  # noqa: ANN401 (a scalar of Arrow's)
    """
    Height and width of a stored picture, as it is once decoded.

    Args:
        cell (`pyarrow.StructScalar`):
            `bytes` or `path` of a picture.

    Returns:
        `tuple[int, int]`.
    """
    content = cell["bytes"]
    if not content.is_valid and not cell["path"].is_valid:
        raise ValueError("neither bytes nor a path")
    source = pa.BufferReader(content.as_buffer()) if content.is_valid else cell["path"].as_py()
    if isinstance(source, str) and "://" in source:
        raise RemoteImageError(f"{source!r} is a URL.")
    with PIL.Image.open(source) as image:
        width, height = image.size
        # PNG looks for it behind the pixels, which would be decoded
        has_exif = image.format != "PNG" or "exif" in image.info
        turned = has_exif and image.getexif().get(EXIF_ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)
