"""Reference log-probabilities on disk: the files, and nothing of how they are computed.

A cache folder holds one subfolder for each reference and way of preparing data, named by a digest of both. In it:

- `manifest.json`: what the digest was taken of, in words;
- `*.safetensors`: parts, each with `keys` (`uint8[n, 16]`, digests of a context with a response) and `logps`
  (`float32[n]`, nats per sequence), and a checksum of both;
- `datasets.json`: fingerprints of datasets all of whose rows are there;
- `.lock`: held while rows are being added.

Files are written beside their place and then moved there, so that a killed process leaves nothing half written.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ._version import __version__

FORMAT_VERSION = "1"
KEY_BYTES = 16
MANIFEST_FILE, DATASETS_FILE, LOCK_FILE = "manifest.json", "datasets.json", ".lock"


class ReferenceCacheError(ValueError):
    """The cache of reference log-probabilities cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class ReferenceTable:
    """
    Reference log-probabilities in memory, sorted by key.

    Args:
        keys (`np.ndarray` of shape `(n,)` and dtype `S16`):
            Keys, ascending, each once.
        logps (`np.ndarray` of shape `(n,)` and dtype `float32`):
            Log-probabilities, nats per sequence.
    """

    keys: np.ndarray
    logps: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> "ReferenceTable":
        """
        A table of several parts; of a key that comes several times, the first value counts.

        Args:
            parts (`Iterable[tuple[np.ndarray, np.ndarray]]`):
                Keys of shape `(n, 16)` and dtype `uint8`, and their log-probabilities.

        Returns:
            [`ReferenceTable`].
        """
        parts = list(parts)
        if not parts:
            return cls(np.zeros(0, dtype="S16"), np.zeros(0, dtype=np.float32))
        keys = np.concatenate([_sortable(keys) for keys, _ in parts])
        unique, first = np.unique(keys, return_index=True)
        return cls(unique, np.concatenate([logps for _, logps in parts])[first])

    def __len__(self) -> int:
        return len(self.keys)

    def with_parts(self, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> "ReferenceTable":
        """This table and further parts."""
        return self.of([(self.keys.view(np.uint8).reshape(-1, KEY_BYTES), self.logps), *parts])

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """
        Log-probabilities of some keys.

        Args:
            keys (`np.ndarray` of shape `(..., 16)` and dtype `uint8`):
                Keys.

        Returns:
            `np.ndarray` of shape `(...)` and dtype `float32`, NaN where a key is unknown.
        """
        wanted = _sortable(keys.reshape(-1, KEY_BYTES))
        found = np.full(len(wanted), np.nan, dtype=np.float32)
        if len(self.keys):
            places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            known = self.keys[places] == wanted
            found[known] = self.logps[places[known]]
        return found.reshape(keys.shape[:-1])


def _sortable(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys, dtype=np.uint8).view(f"S{KEY_BYTES}").reshape(-1)


class ReferenceStore:
    """
    One subfolder of a cache.

    Args:
        root (`Path`):
            The cache folder.
        ingredients (`Mapping[str, Any]`):
            What the log-probabilities depend on besides the rows: names, with plain JSON values.
    """

    def __init__(self, root: Path, ingredients: Mapping[str, Any]) -> None:
        self.root = root
        self.ingredients = {**ingredients, "format version": FORMAT_VERSION}
        canonical = json.dumps(self.ingredients, sort_keys=True)
        self.name = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self.folder = root / self.name

    def exists(self) -> bool:
        """Whether the subfolder has been set up."""
        return (self.folder / MANIFEST_FILE).is_file()

    def create(self, about: Mapping[str, Any]) -> None:
        """
        Set up the subfolder, unless it is there.

        Args:
            about (`Mapping[str, Any]`):
                Further plain values for people who read the manifest.
        """
        if self.exists():
            return
        manifest = {"ingredients": self.ingredients, "about": {**about, "trl-cwdpo": __version__}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / MANIFEST_FILE, json.dumps(manifest, indent=2, sort_keys=True).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def changes(self) -> list[str]:
        """
        How this subfolder differs from the most similar one of the cache.

        Returns:
            `list[str]`: `"name: there → here"` for each difference; empty where there is no other subfolder.
        """
        found = []
        for path in sorted(self.root.glob(f"*/{MANIFEST_FILE}")):
            if path.parent != self.folder:
                theirs = _read_json(path).get("ingredients", {})
                names = sorted({*theirs, *self.ingredients})
                found.append(
                    [
                        f"{name}: {theirs.get(name)} → {self.ingredients.get(name)}"
                        for name in names
                        if theirs.get(name) != self.ingredients.get(name)
                    ]
                )
        return min(found, key=len, default=[])

    def load(self) -> ReferenceTable:
        """
        Read all parts.

        Returns:
            [`ReferenceTable`].

        Raises:
            ReferenceCacheError: If a file is damaged.
        """
        for attempt in (1, 2, 3):
            try:
                return ReferenceTable.of([self._read_part(path) for path in sorted(self.folder.glob("*.safetensors"))])
            except FileNotFoundError:
                # Another run has replaced a part between the listing and the reading
                if attempt == 3:
                    raise
        raise AssertionError("unreachable")

    def _read_part(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with safe_open(path, framework="np") as file:
                metadata, keys, logps = file.metadata() or {}, file.get_tensor("keys"), file.get_tensor("logps")
        except SafetensorError as error:
            raise self._damaged(path, str(error)) from error
        if metadata.get("entry") != self.name:
            raise self._damaged(path, f"it belongs to the subfolder {metadata.get('entry')!r}")
        if metadata.get("checksum") != _checksum(keys, logps):
            raise self._damaged(path, "its contents do not match its checksum")
        bad = int((~np.isfinite(logps)).sum())
        if bad:
            raise self._damaged(path, f"{bad} of its {len(logps)} log-probabilities are not finite")
        return keys, logps

    def _damaged(self, path: Path, reason: str) -> ReferenceCacheError:
        return ReferenceCacheError(
            f"`reference_cache_dir`: {path} is damaged: {reason}. Delete this file and {DATASETS_FILE} beside it: "
            "its rows are then computed again."
        )

    def write_part(self, name: str, keys: np.ndarray, logps: np.ndarray) -> None:
        """
        Write a part, in place of the one of the same name.

        Args:
            name (`str`):
                File name without ending.
            keys (`np.ndarray` of shape `(n, 16)` and dtype `uint8`):
                Keys.
            logps (`np.ndarray` of shape `(n,)` and dtype `float32`):
                Log-probabilities, nats per sequence.
        """
        keys, logps = np.ascontiguousarray(keys), np.ascontiguousarray(logps, dtype=np.float32)
        metadata = {"format_version": FORMAT_VERSION, "entry": self.name, "checksum": _checksum(keys, logps)}
        try:
            _write(self.folder / f"{name}.safetensors", save({"keys": keys, "logps": logps}, metadata))
        except OSError as error:
            raise self._unwritable(error) from error

    def complete_datasets(self) -> dict[str, int]:
        """Fingerprints of the datasets all of whose rows are there, and how many rows they have."""
        path = self.folder / DATASETS_FILE
        return _read_json(path) if path.is_file() else {}

    def add_complete_dataset(self, fingerprint: str, rows: int) -> bool:
        """Note that all rows of a dataset are there; `False` if the folder cannot be written, which does no harm."""
        known = self.complete_datasets()
        if fingerprint not in known:
            try:
                _write(self.folder / DATASETS_FILE, json.dumps({**known, fingerprint: rows}, indent=2).encode())
            except OSError:
                return False
        return True

    def lock(self) -> FileLock:
        """The lock to hold while rows are added; the operating system frees it when its holder dies."""
        try:
            (self.folder / LOCK_FILE).touch()
        except OSError as error:
            raise self._unwritable(error) from error
        return FileLock(self.folder / LOCK_FILE)

    def _unwritable(self, error: OSError) -> ReferenceCacheError:
        return ReferenceCacheError(
            f"`reference_cache_dir`: {self.folder} lacks rows that this run needs and cannot be written ({error}). "
            "Make it writable, or choose another folder."
        )


def _checksum(keys: np.ndarray, logps: np.ndarray) -> str:
    return hashlib.blake2b(keys.tobytes() + logps.tobytes(), digest_size=16).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReferenceCacheError(f"`reference_cache_dir`: {path} is damaged ({error}). Delete it.") from error
    if not isinstance(found, dict):
        raise ReferenceCacheError(f"`reference_cache_dir`: {path} is damaged (no JSON object). Delete it.")
    return found


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
