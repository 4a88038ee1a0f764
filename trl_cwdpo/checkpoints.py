"""The checkpoints to continue from: which there are, and which of them were written to their end.

A run can be killed while it writes a checkpoint, and a disk can be full. A checkpoint counts only if each of its files
is whole, so that a broken newest one is passed over for the one before it.
"""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0", "none", "")
AUTO = "auto"
STATE_FILE = "trainer_state.json"
# Formats of torch.save, whose files are zip archives: their table of contents stands at the end
ZIPPED = (".pt", ".pth", ".bin", ".distcp")
# What torch.save has written otherwise, and no run needs to continue
UNZIPPED = frozenset({"training_args.bin"})


class CheckpointError(ValueError):
    """A checkpoint cannot be continued from, or could not be written."""


def checkpoint_to_resume(
    output_dir: str,
    value: Any,  # noqa: ANN401 (YAML gives text or a boolean)
    processes: int | None = None,
) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir (`str`):
            The output folder.
        value (`str` or `bool`, *optional*):
            The option: a folder, `true` for the last checkpoint in the output folder, or `auto` for the last one if
            there is one.
        processes (`int`, *optional*):
            How many processes the run has; by default as many as its launcher says.

    Returns:
        `str` or `None`: Its folder, or `None` to start anew.

    Raises:
        CheckpointError: If it is not there.
    """
    text = str(value).lower()
    if value is None or text in FALSE:
        return None
    if text not in (*TRUE, AUTO):
        return _complete(Path(str(value)), processes)
    last = last_checkpoint(output_dir, processes)
    if last is None and text == AUTO:
        return None
    if last is None:
        raise CheckpointError(
            f"`resume_from_checkpoint`={value}, but {output_dir} holds no complete checkpoint. Leave the option out "
            "to start anew, or name the folder of a checkpoint."
        )
    return str(last)


def last_checkpoint(output_dir: str, processes: int | None = None) -> Path | None:
    """The last checkpoint that was written to its end."""
    return next((folder for folder in _newest_first(output_dir) if fault_of(folder, processes) is None), None)


def broken_checkpoints(output_dir: str, processes: int | None = None) -> dict[Path, str]:
    """
    Checkpoints that are newer than the last complete one.

    Args:
        output_dir (`str`):
            The output folder.
        processes (`int`, *optional*):
            How many processes the run has.

    Returns:
        `dict[Path, str]`: What is wrong with each, newest first.
    """
    broken: dict[Path, str] = {}
    for folder in _newest_first(output_dir):
        fault = fault_of(folder, processes)
        if fault is None:
            break
        broken[folder] = fault
    return broken


def fault_of(folder: Path, processes: int | None = None) -> str | None:
    """
    What keeps a checkpoint from being continued.

    Args:
        folder (`Path`):
            Its folder.
        processes (`int`, *optional*):
            How many processes the run has, each of which needs its random state.

    Returns:
        `str` or `None`: The fault, or `None` if it is complete.
    """
    state = folder / STATE_FILE
    if not state.is_file():
        return f"has no {STATE_FILE}, which is written last"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{STATE_FILE} is cut off"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    cut_off = next((file for file in files if not _is_whole(file)), None)
    if cut_off is not None:
        return f"{cut_off.relative_to(folder)} is cut off"
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    states = [folder / f"rng_state_{rank}.pth" for rank in range(processes)]
    if processes > 1 and states[0].is_file() and not all(file.is_file() for file in states):
        return "the random state of a process is missing"
    return None


def _newest_first(output_dir: str) -> list[Path]:
    found = [
        (int(match[1]), folder)
        for folder in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def _is_whole(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return _is_whole_safetensors(file)
    if file.suffix in ZIPPED and file.name not in UNZIPPED:
        return zipfile.is_zipfile(file)
    return True


def _is_whole_safetensors(file: Path) -> bool:
    """The header says how long the file is: eight bytes of its own length, itself, and the last tensor's end."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return file.stat().st_size == 8 + length + end


def _complete(folder: Path, processes: int | None) -> str:
    if not folder.is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint`={folder} is no folder. Name the folder of a checkpoint, or `true` for the last "
            "one in the output folder."
        )
    fault = fault_of(folder, processes)
    if fault is not None:
        raise CheckpointError(
            f"`resume_from_checkpoint`={folder} is no complete checkpoint: {fault}. Name another, or `true` for the "
            "last complete one in the output folder."
        )
    return str(folder)
