"""The command line `trl-cwdpo`: a table of commands, each imported only when it is called.

Exit codes stand in `exit_codes.py`. A command is a function that takes the arguments after its name and
returns the exit code. It raises [`CommandError`] for a failure that the user can mend, and lets everything else
propagate with its traceback.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from trl_cwdpo._version import __version__
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.exit_codes import FAILED, of_signal
from trl_cwdpo.redaction import printable, redacted

PROGRAM = "trl-cwdpo"


class Command(NamedTuple):
    """
    One command.

    Args:
        help (`str`):
            What it does, in one line.
        target (`str`):
            Where it is, as `module:function`.
    """

    help: str
    target: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the function."""
        module, function = self.target.split(":")
        return getattr(import_module(module), function)


COMMANDS: dict[str, Command] = {
    "run": Command("run both stages and the evaluation from one recipe", "trl_cwdpo.cli.run:main"),
    "recipes": Command("list, show or copy the recipes that come along", "trl_cwdpo.cli.run:recipes"),
    "sft": Command("train stage 1: SFT with gentle negatives", "trl_cwdpo.cli.train:sft"),
    "cwdpo": Command("train stage 2: Cooling-Weighted DPO", "trl_cwdpo.cli.train:cwdpo"),
    "evaluate": Command("measure models against a reference on held-out pairs", "trl_cwdpo.cli.evaluate:main"),
    "report": Command(
        "write an HTML report of runs: what training did, and what to change", "trl_cwdpo.cli.report:main"
    ),
    "generate-negatives": Command(
        "write a dataset with negatives sampled from a model or edited by one", "trl_cwdpo.cli.generate_negatives:main"
    ),
    "audit": Command("read a dataset before training and report what is wrong", "trl_cwdpo.cli.audit:main"),
    "bench": Command("compare methods over seeds, regimes and settings", "trl_cwdpo.cli.bench:main"),
    "demo": Command("both stages beside plain DPO on a toy task, in minutes and offline", "trl_cwdpo.cli.demo:main"),
    "env": Command("print versions and devices, for bug reports", "trl_cwdpo.cli.env:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments; those of the process by default.

    Returns:
        `int`: The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # All up to the command's name is ours, all after it is the command's.
    position = next((index for index, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    try:
        name = _command_name(arguments[: position + 1])
        code = COMMANDS[name].load()(arguments[position + 1 :])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's way to end after --help (0) and after wrong usage (2)
        return stop.code if isinstance(stop.code, int) else FAILED
    except CommandError as error:
        print(f"{PROGRAM}: error: {redacted(printable(str(error)))}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return of_signal(signal.SIGPIPE)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return of_signal(signal.SIGINT)


def _command_name(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Cooling-Weighted DPO and gentle-negative SFT for vision-language models, on top of TRL.",
        epilog=f"'{PROGRAM} COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        # The command parses what follows its name, --help included.
        commands.add_parser(name, help=command.help, add_help=False)
    last = arguments[-1] if arguments else "-"
    if not last.startswith("-") and last not in COMMANDS:
        parser.error(_unknown(last))
    chosen = parser.parse_args(arguments).command
    if chosen is None:
        parser.error(f"no command given; use one of {', '.join(COMMANDS)}")
    return chosen


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(COMMANDS)}."
    return f"unknown command '{name}'; {hint}"
