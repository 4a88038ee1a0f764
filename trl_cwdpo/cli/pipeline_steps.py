"""One step of `trl-cwdpo run`, in a process of its own: `python -m trl_cwdpo.cli.pipeline_steps STEP FOLDER`.

A process for each step, so that a stage starts with empty memory, on the accelerator too. A step ends when the process
that started it does, however that ended: two runs never write to one folder.
"""

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.command_line import read_command_line
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.exit_codes import DONE, FAILED, of_signal
from trl_cwdpo.cli.pipeline_plan import (
    EVALUATION,
    HELD_OUT,
    MERGE,
    NEGATIVES,
    RECORD,
    REPORT,
    REPORT_STEP,
    SPLIT,
    STAGE1,
    STAGE2,
    Layout,
    command_of,
    dataset_options,
    result_of,
    start_model,
    title_of,
    trainings_of,
)
from trl_cwdpo.cli.recipe import SHAPES, Recipe, make_recipe
from trl_cwdpo.cli.terminal import quiet
from trl_cwdpo.cli.train_options import PROGRAM, STAGES
from trl_cwdpo.redaction import printable, redacted

# File descriptor of a pipe whose other end the starting process holds for as long as it lives
LIFELINE = "TRL_CWDPO_LIFELINE"


def main(argv: Sequence[str]) -> int:
    """
    Run a step in this process.

    Args:
        argv (`Sequence[str]`):
            The step and the folder of the run, whose `config.yaml` has been written.

    Returns:
        `int`: The exit code.
    """
    _end_with_parent()
    step, folder = argv
    layout = Layout(Path(folder))
    try:
        recipe = read_config(layout)
        if step in trainings_of(recipe):
            from trl_cwdpo.cli.train import train

            return train(STAGES[command_of(step)], ["--config", str(layout.stage_config(step))])
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with quiet(bars=sys.stderr.isatty()):
            said = _take(step, recipe, layout)
        print(said, end="", flush=True)
    except CommandError as error:
        print(f"{PROGRAM} run: error: {redacted(printable(str(error)))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return of_signal(2)
    return DONE


def read_config(layout: Layout) -> Recipe:
    """The recipe as the run has written it."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    return make_recipe(yaml.safe_load((layout / "config.yaml").read_text(encoding="utf-8")))


def check(recipe: Recipe, layout: Layout) -> str:
    """
    Check the values of both stages' options before anything is trained.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        layout ([`Layout`]):
            The folder of the run, with the options of both stages.

    Returns:
        `str`: What to say of it.

    Raises:
        SystemExit: With exit code 2, if a value is wrong.
    """
    from trl_cwdpo.cli.train_arguments import parse

    for training in trainings_of(recipe):
        stage = STAGES[command_of(training)]
        parse(stage, read_command_line(stage, ["--config", str(layout.stage_config(training))]))
    return ""


def prepare(recipe: Recipe, layout: Layout) -> str:
    """
    Draw the built-in data and model where they are asked for, and split the pairs.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        layout ([`Layout`]):
            The folder of the run.

    Returns:
        `str`: What to say of it.

    Raises:
        CommandError: If the data cannot be loaded or has too few pairs.
    """
    _make_shapes(recipe)
    rows = {stage: _load_rows(recipe, stage) for stage in (STAGE1, STAGE2)}
    split = split_rows(
        len(rows[STAGE1]), recipe, other=len(rows[STAGE2]) if recipe["data"]["stage2"] is not None else None
    )
    if isinstance(recipe["data"]["held_out"], str):
        _load_rows(recipe, STAGE2, recipe["data"]["held_out"])
    write_json(layout / SPLIT, split)
    counts = {key: len(value) for key, value in split.items() if isinstance(value, list)}
    parts = {STAGE1: "for stage 1", STAGE2: "for stage 2", HELD_OUT: "held out"}
    return "  " + ", ".join(f"{count} pairs {parts[key]}" for key, count in counts.items()) + "\n"


def split_rows(count: int, recipe: Recipe, *, other: int | None = None) -> dict[str, Any]:
    """
    Share out the pairs: held out first, then the stages.

    Args:
        count (`int`):
            Pairs of the dataset.
        recipe ([`Recipe`]):
            The recipe.
        other (`int`, *optional*):
            Pairs of stage 2's own dataset, where it has one.

    Returns:
        `dict[str, Any]`: `seed`, and sorted row numbers under `stage1`, `stage2` and `held_out`. Where the stages have
        datasets of their own, those of `stage2` and `held_out` are rows of the second one.

    Raises:
        CommandError: If a part would be empty.
    """
    import numpy as np

    data = recipe["data"]
    generator = np.random.default_rng(recipe["seed"])
    rows = generator.permutation(count)[: data["limit"]]
    held_out, pool = data["held_out"], rows
    parts: dict[str, Any] = {}
    if other is not None:
        parts[STAGE1], pool = rows, generator.permutation(other)
    if not isinstance(held_out, str):
        size = round(held_out * len(pool)) if held_out < 1 else int(held_out)
        parts[HELD_OUT], pool = pool[:size], pool[size:]
    if other is None:
        border = round(data["stage1_share"] * len(pool))
        parts[STAGE1], pool = pool[:border], pool[border:]
    parts[STAGE2] = pool
    empty = next((name for name, part in parts.items() if len(part) == 0), None)
    if empty is not None:
        raise CommandError(
            f"{count} pairs leave none for {empty.replace('_', '-')} (`data.held_out`={held_out!r}, "
            f"`data.stage1_share`={data['stage1_share']!r}, `data.limit`={data['limit']!r}). Change one of these."
        )
    lists = {name: sorted(map(int, parts[name])) for name in (STAGE1, STAGE2, HELD_OUT) if name in parts}
    return {"seed": recipe["seed"], **lists}


def merge(recipe: Recipe, layout: Layout, training: str) -> str:
    """
    Merge an adapter into the weights of its base model, which is loaded without quantization for it.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        layout ([`Layout`]):
            The folder of the run.
        training (`str`):
            The training that has left the adapter.

    Returns:
        `str`: What to say of it.
    """
    from trl_cwdpo.upstream.models import load_model, load_processor

    target = Path(result_of(recipe, training))
    source = str(layout / training)
    trusts = {"trust_remote_code": bool(recipe[STAGE1].get("trust_remote_code", False))}
    model: Any = load_model(source, dtype=recipe["model"].get("dtype", "float32"), **trusts)
    model.merge_and_unload().save_pretrained(target)
    load_processor(source, **trusts).save_pretrained(target)
    return f"  {target}\n"


def negatives(recipe: Recipe, layout: Layout, training: str) -> str:
    """
    Sample the negatives of a round from the model that it starts from, for stage 2's pairs.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        layout ([`Layout`]):
            The folder of the run.
        training (`str`):
            The round.

    Returns:
        `str`: What to say of it.
    """
    from trl_cwdpo.cli.pipeline_rounds import write_round

    split = json.loads((layout / SPLIT).read_text(encoding="utf-8"))
    pairs = _load_rows(recipe, STAGE2).select(split[STAGE2])
    return write_round(recipe, training, pairs, _held_out(recipe, layout), layout / f"{training}{NEGATIVES}")


def evaluate(recipe: Recipe, layout: Layout) -> str:
    """
    Compare the model before training and after each stage, on the held-out pairs.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        layout ([`Layout`]):
            The folder of the run.

    Returns:
        `str`: What to say of it.
    """
    from trl_cwdpo.cli.pipeline_evaluation import evaluate_models, trained_pair_loss

    rows = _held_out(recipe, layout)
    models = {"start": start_model(recipe)} | {name: result_of(recipe, name) for name in trainings_of(recipe)}
    *_, last = trainings_of(recipe)
    result = evaluate_models(models, STAGE1, rows, recipe, trained_pair_loss(layout / last / RECORD))
    write_json(layout / EVALUATION, result.to_dict())
    return f"{result.table()}\n"


def report(recipe: Recipe, layout: Layout) -> str:
    """
    Write the report of the run.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        layout ([`Layout`]):
            The folder of the run.

    Returns:
        `str`: What to say of it.

    Raises:
        CommandError: If what the stages have recorded cannot be read.
    """
    from trl_cwdpo.report import judge, write_report

    try:
        runs = write_report([layout.folder], layout / REPORT)
    except ValueError as error:
        raise CommandError(f"There is something wrong with what the stages have recorded: {error}") from error
    lines = [
        f"  {title_of(track.folder.name)}: {(verdict := judge(track)).title}. {verdict.advice}"
        for track in runs.tracks
    ]
    return "\n".join(["", title_of(REPORT_STEP), *lines, ""])


STEPS = {"check": check, "prepare": prepare, "evaluate": evaluate, REPORT_STEP: report}


def _take(step: str, recipe: Recipe, layout: Layout) -> str:
    if step.startswith(MERGE):
        return merge(recipe, layout, step.removeprefix(MERGE))
    if step.endswith(NEGATIVES):
        return negatives(recipe, layout, step.removesuffix(NEGATIVES))
    return STEPS[step](recipe, layout)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (any JSON value)
    """Write a file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _make_shapes(recipe: Recipe) -> None:
    data, model = recipe["data"][SHAPES], recipe["model"][SHAPES]
    if data is not None:
        from trl_cwdpo.shapes.dataset import write_dataset

        write_dataset(dataset_options(recipe, STAGE1)["dataset_name"], **data)
    if model is not None:
        from trl_cwdpo.shapes.pretraining import Recipe as Pretraining
        from trl_cwdpo.shapes.pretraining import pretrain

        settings = Pretraining(num_scenes=model["num_scenes"])
        bar = sys.stderr.isatty()
        pretrain(start_model(recipe), steps=model["steps"], seed=model["seed"], recipe=settings, progress=bar)


def _load_rows(recipe: Recipe, stage: str, split: str | None = None) -> Any:  # noqa: ANN401 (a dataset)
    from transformers import HfArgumentParser
    from trl import DatasetMixtureConfig, ScriptArguments

    from trl_cwdpo.data_arguments import DataArguments
    from trl_cwdpo.loading import dataset_from_arguments

    classes: Any = (ScriptArguments, DatasetMixtureConfig, DataArguments)
    try:
        script, mixture, data = HfArgumentParser(classes).parse_dict(dataset_options(recipe, stage))
        splits = dataset_from_arguments(script, mixture, data)
    except (OSError, ValueError) as error:
        raise CommandError(f"The data of {stage} cannot be loaded: {error}") from error
    name = script.dataset_train_split if split is None else split
    if name not in splits:
        option = "dataset_train_split" if split is None else "held_out"
        raise CommandError(
            f"The data of {stage} has no split {name!r} (`data.{option}`); it has {', '.join(map(repr, splits))}."
        )
    return splits[name]


def _held_out(recipe: Recipe, layout: Layout) -> Any:  # noqa: ANN401 (a dataset)
    held_out = recipe["data"]["held_out"]
    if isinstance(held_out, str):
        return _load_rows(recipe, STAGE2, held_out)
    numbers = json.loads((layout / SPLIT).read_text(encoding="utf-8"))[HELD_OUT]
    return _load_rows(recipe, STAGE2).select(numbers)


def _end_with_parent() -> None:
    """Kill this process and its children when the one that started it is gone."""
    if LIFELINE not in os.environ:
        return
    descriptor = int(os.environ.pop(LIFELINE))
    os.set_inheritable(descriptor, False)  # noqa: FBT003 (positional-only)

    def watch() -> None:
        os.read(descriptor, 1)  # nothing is ever written: it returns when the other end is closed
        import psutil  # type: ignore[import-untyped, unused-ignore]  # accelerate requires it

        me = psutil.Process()
        for process in (*me.children(recursive=True), me):
            process.kill()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
