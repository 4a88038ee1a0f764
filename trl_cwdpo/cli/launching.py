"""Start the processes of a run through `accelerate launch`, pass signals on to them, and collect their exit code."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trl_cwdpo.cli.command_line import CommandLine, usage_error
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.exit_codes import FAILED, is_deliberate, of_signal
from trl_cwdpo.cli.train_options import ACCELERATE_CONFIG, PROGRAM, Stage
from trl_cwdpo.interrupts import AGAIN_AFTER, SIGNALS

WORKER = "trl_cwdpo.cli.worker"
# How many processes the command line asks for, told to each of them
NUM_PROCESSES = "TRL_CWDPO_NUM_PROCESSES"


def is_a_launched_process() -> bool:
    """Whether something else, such as torchrun, has started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def wants_launch(stage: Stage, line: CommandLine) -> bool:
    """
    Whether a run needs processes of its own: where the command line says so, or there are several accelerators.

    Args:
        stage (`Stage`):
            The command.
        line (`CommandLine`):
            Its arguments.

    Returns:
        `bool`.
    """
    if is_a_launched_process():
        if line.launch:
            usage_error(
                stage,
                f"{line.launch[0]} starts processes, but this one has already been started as one of several. Leave "
                f"it out, or call {PROGRAM} without `accelerate launch` or torchrun.",
            )
        return False
    if line.launch:
        return True
    if line.gives("use_cpu"):
        return False
    import torch

    # One process would train on copies of the model in several threads, which TRL's trainers do not support
    return torch.accelerator.is_available() and torch.accelerator.device_count() > 1


def launch(stage: Stage, line: CommandLine) -> int:
    """
    Run a command in processes of its own.

    Args:
        stage (`Stage`):
            The command.
        line (`CommandLine`):
            Its arguments.

    Returns:
        `int`: Exit code of the first process that did not succeed, or 0.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = _launch_words(stage, line)
    arguments = launch_command_parser().parse_args([*words, "--module", WORKER, stage.command, *line.words])
    # How processes ended is reported here, and by themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Processes that `--max_restarts` starts again must not find the addresses of those that have ended
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Signals meant to end a run are ours: torch would give the processes 30 seconds and then kill them
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    # `python -m` would import a user's file, such as datasets.py, before the package of that name
    os.environ["PYTHONSAFEPATH"] = "1"
    if "--num_processes" in line.launch:
        os.environ[NUM_PROCESSES] = str(arguments.num_processes)
    with _passing_signals_on():
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
        except subprocess.CalledProcessError as error:
            return _exit_code({0: error.returncode})
        except ValueError as error:
            usage_error(stage, f"accelerate cannot launch this: {error}")
    return 0


def check_num_processes(started: int) -> None:
    """
    Refuse to train on fewer processes than were asked for, which accelerate does without a word.

    Args:
        started (`int`):
            How many there are.

    Raises:
        CommandError: If it is another number than that on the command line.
    """
    asked = int(os.environ.get(NUM_PROCESSES, started))
    if asked != started:
        raise CommandError(
            f"`num_processes`={asked}, but accelerate has started {started}: nothing says how they share the work, "
            "and there are not as many accelerators. Add `--multi_gpu` (on CPU too), `--accelerate_config` with a "
            "configuration for several processes, or leave `--num_processes` out."
        )


def _launch_words(stage: Stage, line: CommandLine) -> list[str]:
    words = list(line.launch)
    named: str | None = None
    while f"--{ACCELERATE_CONFIG}" in words:
        position = words.index(f"--{ACCELERATE_CONFIG}")
        named = words[position + 1]
        del words[position : position + 2]
    if named is None:
        return words
    from trl_cwdpo import upstream  # seconds, for torch

    try:
        return [*upstream.accelerate_config_words(named), *words]
    except ValueError as error:
        usage_error(stage, str(error))


def _exit_code(codes: dict[int, int]) -> int:
    """One exit code for all; processes that were killed could not say why."""
    # After the first process has ended otherwise than well, torch ends the others by SIGTERM
    causes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    for rank, code in causes.items():
        if code < 0:
            name = signal.Signals(-code).name
            reason = " Being out of memory is the usual reason." if name == "SIGKILL" else ""
            print(f"{PROGRAM}: error: process {rank} was ended by {name}.{reason}", file=sys.stderr)
        elif not is_deliberate(code):
            print(f"{PROGRAM}: error: process {rank} ended with exit code {code}.", file=sys.stderr)
    first = next(iter(causes.values()), FAILED)
    return of_signal(-first) if first < 0 else first


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Hand signals to the processes of the run; a second Ctrl-C ends them at once."""
    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and bool(first) and time.monotonic() - first[0] > AGAIN_AFTER
        first.append(time.monotonic())
        for worker in _workers():
            worker.send_signal(signal.SIGKILL if again else number)
        if again:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers() -> list[Any]:
    import psutil  # type: ignore[import-untyped, unused-ignore]  # accelerate requires it

    def is_worker(process: psutil.Process) -> bool:
        try:
            return WORKER in process.cmdline()
        except psutil.Error:
            return False

    return [process for process in psutil.Process().children() if is_worker(process)]
