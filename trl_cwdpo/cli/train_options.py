"""The options of `trl-cwdpo sft` and `trl-cwdpo cwdpo`: which there are, and the help that explains them.

They are those of TRL's own scripts, of this package's configurations and of `accelerate launch`, read from the sources
that declare them, so that nothing is written twice and nothing heavy is imported.
"""

import argparse
import ast
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from trl_cwdpo.cli.dataclass_sources import MISSING, Option, load, options_of
from trl_cwdpo.cli.exit_codes import EXPLANATION

PROGRAM = "trl-cwdpo"
ACCELERATE_CONFIG = "accelerate_config"
QUANTIZATION = ("load_in", "bnb", "use_bnb")
PEFT = ("use_peft", "lora", "use_rslora", "use_dora")


class Stage(NamedTuple):
    """
    One of the two commands.

    Args:
        command (`str`):
            Its name.
        title (`str`):
            What it does, in one line.
        config (`tuple[str, str]`):
            Module and name of its configuration class.
        trainer (`tuple[str, str]`):
            Module and name of its trainer class.
        adds (`str`):
            What its own options are about.
        upstream (`str`):
            What TRL calls the method that it extends.
    """

    command: str
    title: str
    config: tuple[str, str]
    trainer: tuple[str, str]
    adds: str
    upstream: str

    def load(self, name: tuple[str, str]) -> Any:  # noqa: ANN401 (a class)
        """Import its configuration or its trainer."""
        return getattr(import_module(name[0]), name[1])


STAGES = {
    "sft": Stage(
        "sft",
        "Stage 1: SFT on chosen responses with gentle negatives",
        ("trl_cwdpo.gentle_negative_sft_config", "GentleNegativeSFTConfig"),
        ("trl_cwdpo.gentle_negative_sft_trainer", "GentleNegativeSFTTrainer"),
        "gentle negatives",
        "SFT",
    ),
    "cwdpo": Stage(
        "cwdpo",
        "Stage 2: Cooling-Weighted DPO",
        ("trl_cwdpo.cwdpo_config", "CWDPOConfig"),
        ("trl_cwdpo.cwdpo_trainer", "CWDPOTrainer"),
        "cooling",
        "DPO",
    ),
}


@cache
def option_groups(stage: Stage) -> dict[str, list[Option]]:
    """
    Every option of a stage's dataclasses.

    Args:
        stage (`Stage`):
            The stage.

    Returns:
        `dict[str, list[Option]]`: Options by the title of their group, ours first.
    """
    config = options_of(*stage.config).values()
    model = options_of("trl", "ModelConfig").values()
    data = [
        *options_of("trl_cwdpo.data_arguments", "DataArguments").values(),
        *options_of("trl", "ScriptArguments").values(),
        *options_of("trl", "DatasetMixtureConfig").values(),
    ]
    declared = {name: [o for o in config if o.declared_in.startswith(f"{name}.")] for name in ("trl_cwdpo", "trl")}
    return {
        stage.adds: declared["trl_cwdpo"],
        "data": [option for option in data if option.name != "ignore_bias_buffers"],
        "model": [option for option in model if not option.name.startswith((*PEFT, *QUANTIZATION))],
        "PEFT": [option for option in model if option.name.startswith(PEFT)],
        "quantization": [option for option in model if option.name.startswith(QUANTIZATION)],
        f"TRL's {stage.upstream}": [
            *declared["trl"],
            *(option for option in data if option.name == "ignore_bias_buffers"),
        ],
        "training (transformers)": [o for o in config if o.declared_in.startswith("transformers.")],
    }


def training_options(stage: Stage) -> dict[str, Option]:
    """Every option of a stage's dataclasses, by name."""
    return {option.name: option for options in option_groups(stage).values() for option in options}


@cache
def launch_options() -> Mapping[str, bool]:
    """
    The options of `accelerate launch`, and `accelerate_config`.

    Returns:
        `Mapping[str, bool]`: Whether a value follows, by name without dashes at its front.
    """
    found = {ACCELERATE_CONFIG: True}
    for node in ast.walk(load("accelerate.commands.launch").tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [name.value for name in node.args if isinstance(name, ast.Constant)]
            action = next((key.value for key in node.keywords if key.arg == "action"), None)
            takes_value = action is None or not ast.unparse(action).strip("'").startswith(("store_", "help"))
            found |= {name[2:]: takes_value for name in names if isinstance(name, str) and name.startswith("--")}
    # `--config_file` is what `--accelerate_config` becomes; the others are positional, or ours
    for name in ("help", "config_file", "module", "no_python"):
        found.pop(name, None)
    return found


def print_help(stage: Stage) -> None:
    """Explain a command."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {stage.command}",
        usage=usage(stage),
        description=(
            f"{stage.title}. Takes preference pairs (prompt, chosen, rejected, optionally images) and every option of "
            f"`trl {stage.upstream.lower()}`."
        ),
        epilog=f"{EXPLANATION}\n\n{_example(stage)}",
        formatter_class=_Formatter,
        add_help=False,
    )
    for title, options in option_groups(stage).items():
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option)
        if title == "data":
            _add_common(parser.add_argument_group("this command"))
    print(parser.format_help())


def usage(stage: Stage) -> str:
    """The line that stands above help and errors."""
    return (
        f"{PROGRAM} {stage.command} [--config FILE.yaml] --model_name_or_path MODEL --dataset_name DATA "
        "--output_dir FOLDER [options]"
    )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves room for long flags, and the epilog as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _add_common(group: Any) -> None:  # noqa: ANN401 (argparse keeps the class private)
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="read options from a YAML file; the command line goes before it"
    )
    group.add_argument(
        "--accelerate_config",
        metavar="NAME|FILE",
        help="train on several processes: a name (zero1, zero2, zero3, fsdp1, fsdp2, multi_gpu, single_gpu) or a file "
        "of accelerate's. Every option of `accelerate launch`, such as --num_processes, can be given beside it. "
        "Without any, one process trains, or one for each GPU where there are several.",
    )


def _add(group: Any, option: Option) -> None:  # noqa: ANN401 (argparse keeps the class private)
    flags = [f"--{option.name}", *option.aliases]
    if option.is_flag:
        shown: dict[str, Any] = {"nargs": "?", "metavar": "BOOL"}
    else:
        shown = {"metavar": "{" + ",".join(option.choices) + "}" if option.choices else _kind(option.annotation)}
    default = "" if option.default in (MISSING, None, "", []) else f" (default: {_written(option)})"
    group.add_argument(*flags, **shown, help=f"{option.help}{default}".replace("%", "%%"))


def _kind(annotation: str) -> str:
    words = annotation.replace("[", " ").replace("]", " ").replace("|", " ").replace(",", " ").split()
    kinds = {"int": "N", "float": "X", "list": "LIST", "dict": "JSON"}
    return next((kinds[word] for word in words if word in kinds), "TEXT")


def _written(option: Option) -> str:
    if isinstance(option.default, list):
        return " ".join(map(str, option.default))
    turn_off = option.is_flag and option.default is True
    return f"{option.default}; --no_{option.name} turns it off" if turn_off else str(option.default)


def _example(stage: Stage) -> str:
    return (
        "example:\n"
        f"  {PROGRAM} {stage.command} --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name my_data \\\n"
        f"      --output_dir outputs/{stage.command} --max_length 2048 --use_peft"
    )
