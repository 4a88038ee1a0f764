"""Folders that are either complete or absent: built aside, renamed into place, reused only if nothing is missing."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def publish(target: Path, settings: Mapping[str, Any], build: Callable[[Path], None]) -> bool:
    """
    Make sure that a folder holds what `build` writes for the given settings.

    A complete folder with the same settings is reused. A damaged one, or one with other settings, is replaced: the
    folder belongs to its writer and can always be built again. A folder with files of any other origin is left alone.

    Args:
        target (`Path`):
            The folder.
        settings (`Mapping[str, Any]`):
            All that the content depends on; JSON values.
        build (`Callable[[Path], None]`):
            Writes the content into the empty folder it is given.

    Returns:
        `bool`: `True` if the folder was built, `False` if it was reused.
    """
    if is_complete(target, settings):
        return False
    _refuse_foreign_files(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the renames below stay on one file system and are atomic.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
        fresh = Path(aside) / "new"
        fresh.mkdir()
        build(fresh)
        _write_manifest(fresh, settings)
        if target.exists():
            target.rename(Path(aside) / "old")
        try:
            fresh.rename(target)
        except OSError:
            # Another process may have published the same content in the meantime.
            if not is_complete(target, settings):
                raise
    return True


def is_complete(target: Path, settings: Mapping[str, Any]) -> bool:
    """
    Say whether a folder holds exactly what was published for the settings.

    Args:
        target (`Path`):
            The folder.
        settings (`Mapping[str, Any]`):
            The settings asked for.

    Returns:
        `bool`: `True` if the settings agree and every file is there, unchanged.
    """
    manifest = _read_manifest(target)
    if manifest is None or manifest["settings"] != json.loads(json.dumps(dict(settings))):
        return False
    return _digests(target) == manifest["files"]


def source_digest() -> str:
    """
    Hash the source of this package, so that what other code has published is not reused.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _refuse_foreign_files(target: Path) -> None:
    if not target.exists():
        return
    manifest = _read_manifest(target) if target.is_dir() else None
    known = set(manifest["files"]) if manifest else set()
    foreign = [target.name] if target.is_file() else sorted(set(_files(target)) - known)
    if foreign:
        raise FileExistsError(
            f"{target} holds files that were not generated here (such as {foreign[0]}), so it is not overwritten; "
            "remove it or choose another folder."
        )


def _write_manifest(folder: Path, settings: Mapping[str, Any]) -> None:
    manifest = {"settings": dict(settings), "files": _digests(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_manifest(target: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"settings", "files"} <= manifest.keys() else None


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _files(folder)}
