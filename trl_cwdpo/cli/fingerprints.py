"""Tell whether data and models are still what they were: digests of files, quick for large ones."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Larger files are told apart by their size and a piece at either end: reading hundreds of gigabytes takes longer than
# the mistake that it would find is worth
WHOLE_FILES = 64 * 2**20
PIECE = 2**20
# Written beside a model, and no part of it
RECORDS = frozenset({"run.json", "trainer_state.json", "all_results.json", "train_results.json", "probe_rows.json"})
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".pt")
NOT_THE_MODEL = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt"})


def digest_of(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """
    A digest of plain values.

    Args:
        value (`Any`):
            What JSON can hold.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_fingerprint(name: str) -> str:
    """
    A digest of a dataset: of all files of a local one, of the name of one on the hub.

    Args:
        name (`str`):
            A file, a folder, or a name on the hub.

    Returns:
        `str`.
    """
    path = Path(name)
    if path.is_file():
        return _digest_of_files(path.parent, [path])
    return _digest_of_files(path, _all_files(path)) if path.is_dir() else f"hub:{name}"


def model_fingerprint(name: str) -> str:
    """
    A digest of a model: of weights, configuration and processor of a local one, of the name of one on the hub.

    Args:
        name (`str`):
            A folder, or a name on the hub.

    Returns:
        `str`.
    """
    path = Path(name)
    if not path.is_dir():
        return f"hub:{name}"
    found = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix in MODEL_FILES]
    return _digest_of_files(path, [file for file in found if file.name not in RECORDS | NOT_THE_MODEL])


def _all_files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _digest_of_files(root: Path, files: Any) -> str:  # noqa: ANN401 (an iterable of paths)
    return digest_of({file.relative_to(root).as_posix(): _digest_of_file(file) for file in files})


def _digest_of_file(file: Path) -> str:
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE_FILES:
            while block := stream.read(PIECE):
                found.update(block)
        else:
            found.update(stream.read(PIECE))
            stream.seek(-PIECE, 2)
            found.update(stream.read())
    return found.hexdigest()[:16]
