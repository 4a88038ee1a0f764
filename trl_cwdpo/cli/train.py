"""`trl-cwdpo sft` and `trl-cwdpo cwdpo`: train a stage on preference pairs.

This module stays light, so that `--help` and misspelt options are answered at once; the work is in `train_run.py`.
"""

import os
from collections.abc import Sequence

from trl_cwdpo.cli.command_line import read_command_line
from trl_cwdpo.cli.exit_codes import DONE
from trl_cwdpo.cli.launching import launch, wants_launch
from trl_cwdpo.cli.train_options import STAGES, Stage, print_help


def sft(argv: Sequence[str]) -> int:
    """
    Train stage 1: SFT on chosen responses with gentle negatives.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    return train(STAGES["sft"], argv)


def cwdpo(argv: Sequence[str]) -> int:
    """
    Train stage 2: Cooling-Weighted DPO.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    return train(STAGES["cwdpo"], argv)


def train(stage: Stage, argv: Sequence[str]) -> int:
    """
    Train a stage in this process or, where the command line or the machine asks for it, in several.

    Args:
        stage (`Stage`):
            The stage.
        argv (`Sequence[str]`):
            Its arguments.

    Returns:
        `int`: The exit code.
    """
    if "--help" in argv or "-h" in argv:
        print_help(stage)
        return DONE
    line = read_command_line(stage, argv)
    # Before torch is imported, which reads some of them once
    os.environ.update(line.environment)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if wants_launch(stage, line):
        from trl_cwdpo.cli.train_arguments import check  # takes seconds: torch, transformers, TRL

        check(stage, line)
        return launch(stage, line)
    from trl_cwdpo.cli.train_run import run

    return run(stage, line)
