"""`trl-cwdpo env`: what a bug report needs to know."""

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from trl_cwdpo._version import __version__

REQUIRED = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
OPTIONAL = ("deepspeed", "bitsandbytes", "vllm")


def main(argv: Sequence[str]) -> int:
    """
    Print versions and devices, ready to be pasted into an issue.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name; there are none.

    Returns:
        `int`: The exit code.
    """
    argparse.ArgumentParser(prog="trl-cwdpo env", description="Print versions and devices.").parse_args(argv)
    rows = {**versions(), "devices": ", ".join(devices())}
    for name, value in rows.items():
        print(f"- {name}: {value}")
    return 0


def versions() -> dict[str, str]:
    """
    Versions of this package, of Python and of the packages it works with; optional ones only if installed.

    Returns:
        `dict[str, str]`: Version by name. Nothing is imported to find them.
    """
    found = {"trl-cwdpo": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in REQUIRED:
                found[name] = "not installed"
    return found


def devices() -> list[str]:
    """
    The accelerators that torch sees, or the CPU.

    Returns:
        `list[str]`: One description each.
    """
    import torch  # a second that `trl-cwdpo env --help` need not wait

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [f"CPU, {torch.get_num_threads()} threads"]
    if accelerator.type == "cuda":
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
