"""Take a command line and its YAML file apart: options of training, of launching, and words that are neither.

All this happens before anything heavy is imported, so that a misspelt option is reported at once.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from trl_cwdpo.cli.exit_codes import USAGE
from trl_cwdpo.cli.train_options import PROGRAM, Stage, launch_options, training_options, usage
from trl_cwdpo.cli.yaml_files import YamlError, read_yaml_file

FLAG = re.compile(r"-(-|[a-zA-Z])")


class CommandLine(NamedTuple):
    """
    What a command was given.

    Args:
        words (`tuple[str, ...]`):
            The command line without the options of launching, to be given to other processes.
        training (`tuple[str, ...]`):
            The same without `--config`.
        config (`dict[str, Any]`):
            The options of training in the YAML file.
        launch (`tuple[str, ...]`):
            The options of launching, those of the file first.
        environment (`dict[str, str]`):
            Environment variables that the file sets.
    """

    words: tuple[str, ...]
    training: tuple[str, ...]
    config: dict[str, Any]
    launch: tuple[str, ...]
    environment: dict[str, str]

    def gives(self, name: str) -> bool:
        """Whether an option of training is given, in whatever form."""
        flags = {f"--{name}", f"--{name.replace('_', '-')}"}
        return name in self.config or any(word.split("=")[0] in flags for word in self.training)


def usage_error(stage: Stage, message: str) -> NoReturn:
    """
    End with exit code 2.

    Args:
        stage (`Stage`):
            The command.
        message (`str`):
            What is wrong and how to mend it.

    Raises:
        SystemExit: Always.
    """
    print(f"usage: {usage(stage)}\n{PROGRAM} {stage.command}: error: {message}", file=sys.stderr)
    raise SystemExit(USAGE)


def read_command_line(stage: Stage, argv: Sequence[str]) -> CommandLine:
    """
    Sort the words of a command line.

    Args:
        stage (`Stage`):
            The command.
        argv (`Sequence[str]`):
            Its arguments.

    Returns:
        `CommandLine`.

    Raises:
        SystemExit: With exit code 2, if an option or a YAML key is unknown or something needed is missing.
    """
    file, training, launch = _sort(stage, argv)
    values = _read_yaml(stage, file) if file is not None else {}
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        usage_error(stage, f"`env` in {file} must map names of variables to values, got {environment!r}.")
    _refuse_unknown_keys(stage, values, file)
    options = training_options(stage)
    # Where a name is both training's and accelerate's, it is training's, as on the command line
    ours = {name: value for name, value in values.items() if name in options}
    theirs = {name: value for name, value in values.items() if name not in options}
    line = CommandLine(
        words=(*(("--config", file) if file is not None else ()), *training),
        training=tuple(training),
        config=ours,
        launch=(*_launch_words(theirs), *launch),
        environment={name: str(value) for name, value in environment.items()},
    )
    _require(stage, line)
    return line


def _sort(stage: Stage, argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    flags = {flag for option in training_options(stage).values() for flag in option.flags}
    file: str | None = None
    training: list[str] = []
    launch: list[str] = []
    for words in _options(argv):
        flag, separator, value = words[0].partition("=")
        name = flag[2:].replace("-", "_")
        if not FLAG.match(flag) or flag in flags:
            training += words
        elif flag == "--config":
            file, words = _value(stage, flag, separator, value, words)
            training += words
        elif flag.startswith("--") and name in launch_options():
            launch.append(f"--{name}")
            if launch_options()[name]:
                value, words = _value(stage, flag, separator, value, words)
                launch.append(value)
            else:
                words = words[1:]
            training += words
        else:
            usage_error(stage, f"unknown option {flag}{_nearest(flag, (*flags, *_launch_flags(), '--config'))}")
    return file, training, launch


def _options(argv: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with the words up to the next; words before the first flag by themselves."""
    group: list[str] = []
    for word in argv:
        if FLAG.match(word) and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _value(stage: Stage, flag: str, separator: str, value: str, words: list[str]) -> tuple[str, list[str]]:
    """The value of a flag that takes one, and the words that are left over."""
    if separator:
        return value, words[1:]
    if len(words) < 2:
        usage_error(stage, f"{flag} needs a value.")
    return words[1], words[2:]


def _read_yaml(stage: Stage, file: str) -> dict[str, Any]:
    try:
        values = read_yaml_file(file)
    except YamlError as error:
        usage_error(stage, f"--config {file} {error}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        usage_error(stage, f"--config {file} must map options to values, such as `max_steps: 100`.")
    return {str(name): value for name, value in values.items()}


def _refuse_unknown_keys(stage: Stage, values: Iterable[str], file: str | None) -> None:
    known = {*training_options(stage), *launch_options()}
    for name in values:
        if name not in known:
            usage_error(stage, f"unknown key '{name}' in {file}{_nearest(name, (*known, 'env'))}")


def _launch_words(values: dict[str, Any]) -> Iterator[str]:
    for name, takes_value in launch_options().items():
        if name not in values:
            continue
        if takes_value:
            yield from (f"--{name}", str(values[name]))
        elif values[name]:
            yield f"--{name}"


def _launch_flags() -> Iterator[str]:
    return (f"--{name}" for name in launch_options())


def _nearest(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given.replace("-", "_"), sorted({k.replace("-", "_") for k in known}), n=1)
    if not near:
        return "; `--help` lists them all."
    name = near[0]
    if given.startswith("-"):
        name = f"--{name.lstrip('_')}"
    return f"; did you mean {name}?"


def _require(stage: Stage, line: CommandLine) -> None:
    if not line.gives("model_name_or_path"):
        usage_error(stage, "no model is given; name a folder or a model on the hub with --model_name_or_path.")
    if not line.gives("dataset_name") and not line.gives("datasets"):
        usage_error(stage, "no dataset is given; set --dataset_name, or `datasets` in a YAML file.")
