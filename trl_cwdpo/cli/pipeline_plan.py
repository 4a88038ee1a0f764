"""What the pipeline is going to do, all pure: the folder's layout, its steps, and the options of each stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.cli.recipe import DATA, MODEL, SHAPES, Recipe
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
# Written after all steps, anew each time
REPORT_STEP = "report"
REPORT_NEEDS = ("jinja2", "matplotlib", "plotly")
STEPS_FOLDER = ".steps"
# Keys of split.json
HELD_OUT = "held_out"
COMMANDS = {STAGE1: "sft", STAGE2: "cwdpo"}
TITLES = {
    "prepare": "Data and split",
    STAGE1: "Stage 1: SFT with gentle negatives",
    "merge": "Merge stage 1's adapter into the weights",
    STAGE2: "Stage 2: Cooling-Weighted DPO",
    "evaluate": "Evaluation on held-out pairs",
    "report": "Report",
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
        return (CONFIG, SPLIT, *stages, EVALUATION, PROBES, REPORT, RECORD, STEPS_FOLDER)


def steps_of(recipe: Recipe) -> tuple[str, ...]:
    """
    The steps of a recipe, in order.

    Args:
        recipe ([`Recipe`]):
            The recipe.

    Returns:
        `tuple[str, ...]`: Keys of `TITLES`.
    """
    merge = ("merge",) if recipe.hands_adapter_over == "merge" else ()
    return ("prepare", STAGE1, *merge, STAGE2, "evaluate")


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


def stage1_result(recipe: Recipe) -> str:
    """The model that stage 2 starts from, and is compared with."""
    folder = recipe.output_dir / STAGE1
    return str(folder / MERGED if recipe.hands_adapter_over == "merge" else folder)


def stage_options(recipe: Recipe, stage: str, split: dict[str, Any]) -> dict[str, Any]:
    """
    Every option of a stage, as its YAML file holds them.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        stage (`str`):
            `"stage1"` or `"stage2"`.
        split (`dict[str, Any]`):
            What `split.json` holds.

    Returns:
        `dict[str, Any]`.
    """
    layout = Layout(recipe.output_dir)
    model = {key: value for key, value in recipe["model"].items() if key not in MODEL}
    if stage == STAGE2 and recipe.hands_adapter_over == "continue":
        # The adapter is part of the model that is started from
        model = {key: value for key, value in model.items() if not key.startswith(PEFT)}
    rows: dict[str, Any] = {}
    if stage in split:
        rows["train_rows"] = f"{layout / SPLIT}:{stage}"
    held_out = recipe["data"]["held_out"]
    if isinstance(held_out, str):
        rows["dataset_test_split"] = held_out
    elif HELD_OUT in split and _shares_the_held_out_rows(recipe, stage):
        rows["eval_rows"] = f"{layout / SPLIT}:{HELD_OUT}"
    return {
        **model,
        "model_name_or_path": start_model(recipe) if stage == STAGE1 else stage1_result(recipe),
        **dataset_options(recipe, stage),
        **rows,
        "seed": recipe["seed"],
        "resume_from_checkpoint": "auto",
        **recipe["launch"],
        **recipe[stage],
        "output_dir": str(layout / stage),
    }


def shapes_data_folder(options: dict[str, Any]) -> Path:
    """Where drawn data are kept, for this run and later ones."""
    return default_cache_dir() / f"shapes-{options['num_train']}-{options['num_test']}-seed{options['seed']}"


def shapes_model_folder(options: dict[str, Any]) -> Path:
    """Where the tiny pretrained model is kept, for this run and later ones."""
    return default_cache_dir() / f"tiny-vlm-{options['steps']}-{options['num_scenes']}-seed{options['seed']}"


def _shares_the_held_out_rows(recipe: Recipe, stage: str) -> bool:
    # Held-out pairs are those of stage 2's dataset
    return recipe["data"]["stage2"] is None or stage == STAGE2
