"""What the pipeline is going to do, all pure: the folder's layout, its steps, and the options of each stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.cli.recipe import DATA, MODEL, ROUNDS, SHAPES, Recipe
from trl_cwdpo.cli.train_options import PEFT

CONFIG, SPLIT, EVALUATION, PROBES, REPORT, RECORD = (
    "config.yaml",
    "split.json",
    "evaluation.json",
    "probes.jsonl",
    "report.html",
    "run.json",
)
STAGE1, STAGE2, MERGED = "stage1", "stage2", "merged"
# Folders of iterative rounds, `round1` and so on, and what a round's other steps are called after it
ROUND, NEGATIVES, MERGE = "round", "-negatives", "merge-"
# What a training that samples nothing warns of
OF_SAMPLING = {
    "num_negative_generations",
    "negative_selection",
    "on_policy_chosen",
    "negative_reward_funcs",
    "negative_reward_weights",
    "use_vllm",
}
# Written after all steps, anew each time
REPORT_STEP = "report"
REPORT_NEEDS = ("jinja2", "matplotlib", "plotly")
STEPS_FOLDER = ".steps"
# Keys of split.json
HELD_OUT = "held_out"
TITLES = {
    "prepare": "Data and split",
    STAGE1: "Stage 1: SFT with gentle negatives",
    STAGE2: "Stage 2: Cooling-Weighted DPO",
    "evaluate": "Evaluation on held-out pairs",
    REPORT_STEP: "Report",
}


@dataclass(frozen=True)
class Layout:
    """
    Where things stand in the folder of a run.

    Args:
        folder (`Path`):
            The folder.
    """

    folder: Path

    def __truediv__(self, name: str) -> Path:
        """A file or folder in it."""
        return self.folder / name

    def stage_config(self, stage: str) -> Path:
        """The options of a stage: `trl-cwdpo sft --config` or `trl-cwdpo cwdpo --config` repeats the stage alone."""
        return self.folder / f"{stage}.yaml"

    def state(self, step: str) -> Path:
        """What is known of a step."""
        return self.folder / STEPS_FOLDER / f"{step}.json"

    @property
    def owned(self) -> tuple[str, ...]:
        """Everything that a run writes to the folder."""
        stages = (STAGE1, STAGE2, f"{STAGE1}.yaml", f"{STAGE2}.yaml")
        rounds = sorted(path.name for path in self.folder.glob(f"{ROUND}[1-9]*"))
        return (CONFIG, SPLIT, *stages, *rounds, EVALUATION, PROBES, REPORT, RECORD, STEPS_FOLDER)


def trainings_of(recipe: Recipe) -> tuple[str, ...]:
    """
    The trainings of a recipe, in order; each has a folder of its name.

    Args:
        recipe ([`Recipe`]):
            The recipe.

    Returns:
        `tuple[str, ...]`: `"stage1"`, and `"stage2"` or, where there are `stage2.rounds`, `"round1"` and so on.
    """
    rounds = recipe[STAGE2][ROUNDS]
    return (STAGE1, *((STAGE2,) if rounds is None else (f"{ROUND}{number + 1}" for number in range(rounds))))


def section_of(training: str) -> str:
    """The section of the recipe that a training takes its options from."""
    return STAGE1 if training == STAGE1 else STAGE2


def command_of(training: str) -> str:
    """The command that a training is."""
    return "sft" if training == STAGE1 else "cwdpo"


def steps_of(recipe: Recipe) -> tuple[str, ...]:
    """
    The steps of a recipe, in order.

    Args:
        recipe ([`Recipe`]):
            The recipe.

    Returns:
        `tuple[str, ...]`: What [`title_of`] takes.
    """
    *earlier, last = trainings_of(recipe)
    steps = ["prepare"]
    for training in (*earlier, last):
        if training.startswith(ROUND):
            steps.append(training + NEGATIVES)
        steps.append(training)
        if training != last and recipe.hands_adapter_over == "merge":
            steps.append(MERGE + training)
    return (*steps, "evaluate")


def title_of(step: str) -> str:
    """A step's name for people."""
    if step.endswith(NEGATIVES):
        return f"Round {step.removeprefix(ROUND).removesuffix(NEGATIVES)}: negatives from the policy"
    if step.startswith(MERGE):
        return f"Merge the adapter of {step.removeprefix(MERGE)} into the weights"
    return f"Round {step.removeprefix(ROUND)}: Cooling-Weighted DPO" if step.startswith(ROUND) else TITLES[step]


def dataset_options(recipe: Recipe, stage: str) -> dict[str, Any]:
    """
    The data options of a stage, without those that say how rows are used.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        stage (`str`):
            `"stage1"` or `"stage2"`.

    Returns:
        `dict[str, Any]`.
    """
    data = recipe["data"]
    if stage == STAGE2 and data["stage2"] is not None:
        return dict(data["stage2"])
    options = {key: value for key, value in data.items() if key not in DATA}
    if data[SHAPES] is not None:
        options["dataset_name"] = str(shapes_data_folder(data[SHAPES]))
    return options


def start_model(recipe: Recipe) -> str:
    """The model that stage 1 starts from."""
    model = recipe["model"]
    return str(shapes_model_folder(model[SHAPES])) if model[SHAPES] is not None else model["model_name_or_path"]


def result_of(recipe: Recipe, training: str) -> str:
    """The model that a training leaves, as the next one starts from it and the evaluation measures it."""
    merged = recipe.hands_adapter_over == "merge" and training != trainings_of(recipe)[-1]
    folder = recipe.output_dir / training
    return str(folder / MERGED if merged else folder)


def start_of(recipe: Recipe, training: str) -> str:
    """The model that a training starts from, which is its reference too."""
    trainings = trainings_of(recipe)
    position = trainings.index(training)
    return result_of(recipe, trainings[position - 1]) if position else start_model(recipe)


def stage_options(recipe: Recipe, training: str, split: dict[str, Any]) -> dict[str, Any]:
    """
    Every option of a training, as its YAML file holds them.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        training (`str`):
            One of [`trainings_of`].
        split (`dict[str, Any]`):
            What `split.json` holds.

    Returns:
        `dict[str, Any]`.
    """
    layout, section = Layout(recipe.output_dir), section_of(training)
    model = {key: value for key, value in recipe["model"].items() if key not in MODEL}
    if section == STAGE2 and recipe.hands_adapter_over == "continue":
        # The adapter is part of the model that is started from
        model = {key: value for key, value in model.items() if not key.startswith(PEFT)}
    return {
        **model,
        "model_name_or_path": start_of(recipe, training),
        **_data_of(recipe, training, split),
        "seed": recipe["seed"],
        "resume_from_checkpoint": "auto",
        **recipe["launch"],
        **_own_options(recipe[section], training),
        "output_dir": str(layout / training),
    }


def _own_options(section: dict[str, Any], training: str) -> dict[str, Any]:
    options = {key: value for key, value in section.items() if key != ROUNDS}
    if training.startswith(ROUND) and "dataset_negative_fraction" not in options:
        # Sampling has come before the round
        options = {key: value for key, value in options.items() if key not in OF_SAMPLING}
    return options


def _data_of(recipe: Recipe, training: str, split: dict[str, Any]) -> dict[str, Any]:
    layout, section = Layout(recipe.output_dir), section_of(training)
    if training.startswith(ROUND):
        return {"dataset_name": str(layout / f"{training}{NEGATIVES}"), "dataset_test_split": "test"}
    rows: dict[str, Any] = {}
    if section in split:
        rows["train_rows"] = f"{layout / SPLIT}:{section}"
    held_out = recipe["data"]["held_out"]
    if isinstance(held_out, str):
        rows["dataset_test_split"] = held_out
    elif HELD_OUT in split and _shares_the_held_out_rows(recipe, section):
        rows["eval_rows"] = f"{layout / SPLIT}:{HELD_OUT}"
    return {**dataset_options(recipe, section), **rows}


def shapes_data_folder(options: dict[str, Any]) -> Path:
    """Where drawn data are kept, for this run and later ones."""
    return default_cache_dir() / f"shapes-{options['num_train']}-{options['num_test']}-seed{options['seed']}"


def shapes_model_folder(options: dict[str, Any]) -> Path:
    """Where the tiny pretrained model is kept, for this run and later ones."""
    return default_cache_dir() / f"tiny-vlm-{options['steps']}-{options['num_scenes']}-seed{options['seed']}"


def _shares_the_held_out_rows(recipe: Recipe, stage: str) -> bool:
    # Held-out pairs are those of stage 2's dataset
    return recipe["data"]["stage2"] is None or stage == STAGE2
