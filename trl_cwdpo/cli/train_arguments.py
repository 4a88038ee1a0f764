"""Options as dataclasses: of one process, or checked before several are started with them."""

import os
import sys
from typing import Any, NamedTuple

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_cwdpo.cli.command_line import CommandLine, usage_error
from trl_cwdpo.cli.exit_codes import USAGE
from trl_cwdpo.cli.train_options import PROGRAM, Stage, usage
from trl_cwdpo.data_arguments import DataArguments


class Arguments(NamedTuple):
    """
    The parsed options.

    Args:
        script ([`~trl.ScriptArguments`]):
            What names the data.
        args ([`CWDPOConfig`] or [`GentleNegativeSFTConfig`]):
            The trainer's configuration.
        model ([`~trl.ModelConfig`]):
            What names the model, and how it is adapted and quantized.
        mixture ([`~trl.DatasetMixtureConfig`]):
            Several datasets.
        data ([`DataArguments`]):
            The layout of the data.
    """

    script: ScriptArguments
    args: Any
    model: ModelConfig
    mixture: DatasetMixtureConfig
    data: DataArguments


def parse(stage: Stage, line: CommandLine) -> Arguments:
    """
    Make the dataclasses of a command line.

    Args:
        stage (`Stage`):
            The stage.
        line (`CommandLine`):
            Its arguments.

    Returns:
        `Arguments`.

    Raises:
        SystemExit: With exit code 2, if a value is wrong.
    """
    parser = _parser(stage, line)
    try:
        *parsed, left = parser.parse_args_into_dataclasses(
            args=list(line.training), return_remaining_strings=True, look_for_args_file=False
        )
    except (ImportError, TypeError, ValueError) as error:
        # Every process finds the same fault; the first one names it
        if rank() > 0:
            raise SystemExit(USAGE) from error
        usage_error(stage, str(error))
    _refuse_stray_words(stage, left)
    arguments = Arguments(*parsed)
    if not line.gives("disable_tqdm"):
        # Its default follows the verbosity of transformers, which is set low here for other reasons
        arguments.args.disable_tqdm = not shows_bars()
    return arguments


def check(stage: Stage, line: CommandLine) -> None:
    """
    Check the types and choices of a command line before processes are started with it.

    Args:
        stage (`Stage`):
            The stage.
        line (`CommandLine`):
            Its arguments.

    Raises:
        SystemExit: With exit code 2, if a value is wrong.
    """
    _refuse_stray_words(stage, _parser(stage, line).parse_known_args(list(line.training))[1])


def _parser(stage: Stage, line: CommandLine) -> TrlParser:
    classes: Any = (ScriptArguments, stage.load(stage.config), ModelConfig, DatasetMixtureConfig, DataArguments)
    parser = TrlParser(classes, prog=f"{PROGRAM} {stage.command}", usage=usage(stage), allow_abbrev=False)
    parser.set_defaults_with_config(**line.config)
    return parser


def _refuse_stray_words(stage: Stage, words: list[str]) -> None:
    if words:
        usage_error(stage, f"{words[0]!r} stands where an option should. Options begin with `--`.")


def shows_bars() -> bool:
    """Whether this process may draw bars."""
    return sys.stderr.isatty() and rank() == 0


def rank() -> int:
    """Which of several processes this is."""
    return int(os.environ.get("RANK", "0"))
