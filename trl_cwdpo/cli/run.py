"""`trl-cwdpo run`: both stages and the evaluation, from one recipe. `trl-cwdpo recipes`: those that come along."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.exit_codes import DONE, EXPLANATION, FAILED, USAGE
from trl_cwdpo.cli.pipeline_plan import stage_options, steps_of, title_of, trainings_of
from trl_cwdpo.cli.recipe import (
    DATA,
    EVALUATION,
    MODEL,
    SHAPES_DATA,
    SHAPES_MODEL,
    Recipe,
    RecipeError,
    builtin_recipes,
    read_recipe,
)
from trl_cwdpo.cli.yaml_files import YamlError, read_yaml

PROGRAM = "trl-cwdpo run"


def main(argv: Sequence[str]) -> int:
    """
    Run a recipe.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    arguments, words = _parser().parse_known_args(argv)
    try:
        overrides = _overrides(words)
        for name in ("output_dir", "seed"):
            if getattr(arguments, name) is not None:
                overrides[name] = getattr(arguments, name)
        if arguments.recipe is None:
            raise RecipeError(f"no recipe given; name a YAML file, or one of {', '.join(builtin_recipes())}.")
        recipe = read_recipe(arguments.recipe, overrides)
    except RecipeError as error:
        print(f"usage: {PROGRAM} RECIPE [options]\n{PROGRAM}: error: {error}", file=sys.stderr)
        return USAGE
    if arguments.dry_run:
        print(describe(recipe))
        return DONE
    from trl_cwdpo.cli.pipeline import Pipeline

    return Pipeline(recipe).run(overwrite=arguments.overwrite)


def describe(recipe: Recipe) -> str:
    """
    What a recipe would do.

    Args:
        recipe ([`Recipe`]):
            The recipe.

    Returns:
        `str`: Its steps and the options of each stage.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    lines = [f"{recipe['name']}, in {recipe.output_dir}", ""]
    for number, step in enumerate(steps_of(recipe), start=1):
        lines.append(f"{number}. {title_of(step)}")
        if step in trainings_of(recipe):
            written = yaml.safe_dump(stage_options(recipe, step, {}), sort_keys=False, allow_unicode=True)
            lines += [f"     {line}" for line in written.splitlines()]
    return "\n".join(lines)


def recipes(argv: Sequence[str]) -> int:
    """
    List the recipes that come with the package, or show or copy one.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: The exit code.
    """
    parser = argparse.ArgumentParser(prog="trl-cwdpo recipes", description="Recipes for `trl-cwdpo run`.")
    parser.add_argument("name", nargs="?", help="show this one")
    parser.add_argument("--copy", metavar="FILE", type=Path, help="write it to a file, to be changed")
    arguments = parser.parse_args(argv)
    known = builtin_recipes()
    if arguments.name is None:
        if arguments.copy is not None:
            parser.error(f"--copy needs the name of a recipe: {', '.join(known)}")
        for name in known:
            print(f"{name:<28}{' '.join(str(read_recipe(name)['description']).split())}")
        return DONE
    if arguments.name not in known:
        parser.error(f"there is no recipe {arguments.name!r}; there are {', '.join(known)}")
    if arguments.copy is None:
        print(known[arguments.name], end="")
        return DONE
    if arguments.copy.exists():
        print(f"{parser.prog}: error: {arguments.copy} exists already. Name another file.", file=sys.stderr)
        return FAILED
    arguments.copy.write_text(known[arguments.name], encoding="utf-8")
    print(f"{arguments.copy}: run it with `trl-cwdpo run {arguments.copy}`")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} RECIPE [options] [--SECTION.KEY VALUE …]",
        description="Run the whole pipeline from one YAML file: split the pairs; stage 1, whose result becomes start "
        "and reference of stage 2; stage 2; evaluation. The same command continues a run that was stopped or killed.",
        epilog=f"{_schema()}\n\n{EXPLANATION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Not required by argparse, which would say so before it says that an option is unknown
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a YAML file, or a name that `trl-cwdpo recipes` lists"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="folder of the run (default: outputs/NAME)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of split and training (default: 42)")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run has left in the folder")
    parser.add_argument("--dry_run", action="store_true", help="print the steps and every option, and do nothing")
    parser.add_argument(
        "--SECTION.KEY", metavar="VALUE", help="set any value, such as --stage2.beta 0.2", dest="_unused"
    )
    return parser


def _schema() -> str:
    return f"""\
a recipe's sections, and what they may hold:
  data        the data options of `trl-cwdpo sft`; {_pairs(DATA)}
  model       the model, PEFT and quantization options; {_pairs(MODEL)}
  stage1      every other option of `trl-cwdpo sft`
  stage2      every other option of `trl-cwdpo cwdpo`
  evaluation  {_pairs(EVALUATION)}
  launch      the options of `accelerate launch`, and accelerate_config, for both stages
  (top)       name, description, output_dir, seed
held_out is a number of pairs, a share of them, or the name of a split. lora_handover: `merge` makes stage 1's adapter
part of the weights and stage 2 trains a new one; `continue` trains it on, with a frozen copy as the reference.
Instead of names: data.shapes ({_pairs(SHAPES_DATA)}) and model.shapes ({_pairs(SHAPES_MODEL)})."""


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} ({value})" if value is not None else key for key, value in values.items())


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` and `--section.key=value`, with values read as YAML."""
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        flag, separator, value = left.pop(0).partition("=")
        if not flag.startswith("--") or "." not in flag:
            raise RecipeError(f"unknown option {flag!r}; values of the recipe are set as --section.key VALUE.")
        if not separator:
            if not left:
                raise RecipeError(f"{flag} needs a value.")
            value = left.pop(0)
        try:
            found[flag[2:]] = read_yaml(value)
        except YamlError as error:
            raise RecipeError(f"{flag} {value!r} {error}") from error
    return found
