"""Recipes of `trl-cwdpo run`: one YAML file for the whole pipeline, read and checked before heavy imports.

A recipe has the sections

- `data`: the data options of `trl-cwdpo sft` (`dataset_name`, `columns`, …), and how its rows are used ([`DATA`]);
- `model`: the model, PEFT and quantization options, and what becomes of an adapter between the stages ([`MODEL`]);
- `stage1`, `stage2`: every other option of `trl-cwdpo sft` and `trl-cwdpo cwdpo`;
- `evaluation`: see [`EVALUATION`];
- `launch`: the options of `accelerate launch`, and `accelerate_config`, for both stages;

and at its top `name`, `description`, `output_dir` and `seed`.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.train_options import STAGES, launch_options, option_groups, training_options
from trl_cwdpo.cli.yaml_files import YamlError, read_yaml, read_yaml_file
from trl_cwdpo.redaction import HIDDEN, redacted

SHAPES = "shapes"
# How the rows are used, with the defaults. `shapes` stands in the place of `dataset_name`: drawn data.
DATA: dict[str, Any] = {
    # Share of the pairs that stage 1 trains on; stage 2 gets the others
    "stage1_share": 0.75,
    # Pairs for evaluation and probes, which no stage trains on: a number, a share, or the name of a split
    "held_out": 0.05,
    # Use at most so many pairs of the training split
    "limit": None,
    # Data options of stage 2, where it is trained on another dataset: then stage 1 gets all pairs of the first
    "stage2": None,
    # Options of the drawn dataset
    SHAPES: None,
}
MODEL: dict[str, Any] = {
    # "merge": stage 1's adapter becomes part of the weights, stage 2 trains a new one; "continue": stage 2 trains the
    # adapter on, with a frozen copy of it as the reference
    "lora_handover": "merge",
    # Options of the tiny model, in the place of `model_name_or_path`
    SHAPES: None,
}
EVALUATION: dict[str, Any] = {
    # Held-out pairs to measure on
    "size": 256,
    # Rows a forward pass
    "batch_size": 8,
}
ROUNDS = "rounds"
STAGE2: dict[str, Any] = {
    # Iterative rounds: each samples negatives from the model so far, with the `negative_*` options, then trains on
    # them with that model as the reference. By default stage 2 is trained once, on the dataset's own negatives.
    ROUNDS: None,
}
SHAPES_DATA: dict[str, Any] = {"num_train": 2000, "num_test": 500, "seed": 0}
SHAPES_MODEL: dict[str, Any] = {"steps": 800, "num_scenes": 20000, "seed": 0}
TOP: dict[str, Any] = {"name": None, "description": "", "output_dir": None, "seed": 42}
SECTIONS = ("data", "model", "stage1", "stage2", "evaluation", "launch")
HANDOVERS = ("merge", "continue")
# The pipeline decides about these itself, in sections that hold options of a stage
CHECKED = ("data", "data.stage2", "model", "stage1", "stage2")
DECIDED = {
    "output_dir": "the recipe's `output_dir`",
    "seed": "the recipe's `seed`",
    "hub_token": "the environment variable HF_TOKEN, so that no file of the run holds it",
    "push_to_hub_token": "the environment variable HF_TOKEN, so that no file of the run holds it",
    "resume_from_checkpoint": "nothing: a stage always continues from its last complete checkpoint",
    "train_rows": "`data.stage1_share` and `data.limit`",
    "eval_rows": "`data.held_out`",
    "dataset_streaming": "nothing: the pairs are split by row, and a streamed dataset has no numbered rows",
}


class RecipeError(ValueError):
    """A recipe that cannot be followed, with what is wrong and how to mend it."""


@dataclass(frozen=True)
class Recipe:
    """
    A checked recipe, with its defaults filled in.

    Args:
        values (`dict[str, Any]`):
            Top-level values and sections, as they go to `config.yaml`.
    """

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (a section or a value)
        """A section or a top-level value."""
        return self.values[name]

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.values["output_dir"])

    @property
    def hands_adapter_over(self) -> str | None:
        """What becomes of stage 1's adapter, or `None` where whole models are trained."""
        return self["model"]["lora_handover"] if self["model"].get("use_peft") else None

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key."""
        return dict(_flat(self.values))


def builtin_recipes() -> dict[str, str]:
    """The recipes that come with the package: their text, by name."""
    folder = resources.files("trl_cwdpo") / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def read_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """
    Read a recipe and check it.

    Args:
        name (`str`):
            A YAML file, or the name of a recipe that comes with the package.
        overrides (`Mapping[str, Any]`, *optional*):
            Values by dotted key, such as `stage2.beta`, that go before the file's.

    Returns:
        [`Recipe`].

    Raises:
        RecipeError: If there is no such recipe, a section or key is unknown, or a value is impossible.
    """
    try:
        raw = _values(name)
    except YamlError as error:
        raise RecipeError(f"{name} {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{name} must map sections to options, such as `data:` with `dataset_name: my_data` below.")
    default_name = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    return make_recipe(raw, default_name=default_name)


def make_recipe(raw: Mapping[str, Any], *, default_name: str = "run") -> Recipe:
    """
    Check the values of a recipe and fill in the defaults.

    Args:
        raw (`Mapping[str, Any]`):
            What the YAML file says.
        default_name (`str`, *optional*, defaults to `"run"`):
            Name of a recipe that does not say its own.

    Returns:
        [`Recipe`].

    Raises:
        RecipeError: See [`read_recipe`].
    """
    _refuse_unknown("", raw, (*TOP, *SECTIONS))
    values: dict[str, Any] = {**TOP, **{key: value for key, value in raw.items() if key in TOP}}
    values["name"] = str(values["name"] or default_name)
    values["output_dir"] = str(values["output_dir"] or f"outputs/{values['name']}")
    for section in SECTIONS:
        given = raw.get(section) or {}
        if not isinstance(given, Mapping):
            raise RecipeError(f"`{section}` must map options to values, got {given!r}.")
        _refuse_unknown(f"{section}.", given, known_keys(section))
        values[section] = {**_own(section), **given}
    _check(values)
    return Recipe(values)


@cache
def known_keys(section: str) -> tuple[str, ...]:
    """The keys that a section may have."""
    first, second = STAGES["sft"], STAGES["cwdpo"]
    own = tuple(_own(section))
    if section == "launch":
        # Where accelerate and a stage share a name, it is the stage's
        return tuple(name for name in launch_options() if name not in training_options(second))
    if section == "evaluation":
        return own
    groups = option_groups(first)
    if section == "data":
        return (*own, *(option.name for option in groups["data"]))
    model = [option.name for title in ("model", "PEFT", "quantization") for option in groups[title]]
    if section == "model":
        return (*own, *model)
    elsewhere = {*model, *(option.name for option in groups["data"])}
    stage = first if section == "stage1" else second
    return own + tuple(name for name in training_options(stage) if name not in elsewhere)


def _own(section: str) -> dict[str, Any]:
    return {"data": DATA, "model": MODEL, "stage2": STAGE2, "evaluation": EVALUATION}.get(section, {})


def _values(name: str) -> Any:  # noqa: ANN401 (any YAML value)
    if Path(name).is_file():
        return read_yaml_file(name)
    known = builtin_recipes()
    if name in known:
        return read_yaml(known[name])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the recipes that come along are {', '.join(known)}."
    raise RecipeError(f"there is no file and no recipe {name!r}; {hint}")


def _override(raw: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 (any YAML value)
    *parents, last = key.split(".")
    inner = raw
    for parent in parents:
        child = inner.get(parent)
        inner[parent] = dict(child) if isinstance(child, Mapping) else {}
        inner = inner[parent]
    inner[last] = value


def _refuse_unknown(prefix: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    section = prefix.rstrip(".")
    for key in given:
        if section in CHECKED and key in DECIDED:
            raise RecipeError(f"`{prefix}{key}` cannot be set; what decides it is {DECIDED[key]}.")
        if key not in known:
            raise RecipeError(f"unknown key `{prefix}{key}`{_hint(section, str(key), known)}")


def _hint(section: str, key: str, known: list[str]) -> str:
    home = next((other for other in SECTIONS if section and other != section and key in known_keys(other)), None)
    if home is not None:
        return f"; it belongs into the section `{home}`."
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    prefix = f"{section}." if section else ""
    return f"; did you mean `{prefix}{near[0]}`?" if near else "; `trl-cwdpo run --help` says what there is."


def _check(values: dict[str, Any]) -> None:
    _refuse_secrets(values)
    if not isinstance(values["seed"], int) or isinstance(values["seed"], bool):
        raise RecipeError(f"`seed`={values['seed']!r} must be a whole number.")
    data, model = values["data"], values["model"]
    _fill_shapes(data, "data", SHAPES_DATA, ("dataset_name", "datasets"))
    _fill_shapes(model, "model", SHAPES_MODEL, ("model_name_or_path",))
    if data[SHAPES] is None and not data.get("dataset_name") and not data.get("datasets"):
        raise RecipeError("no dataset is given: set `data.dataset_name`.")
    if model[SHAPES] is None and not model.get("model_name_or_path"):
        raise RecipeError("no model is given: set `model.model_name_or_path`.")
    _check_rows(data)
    if model["lora_handover"] not in HANDOVERS:
        raise RecipeError(f"`model.lora_handover`={model['lora_handover']!r} must be one of {', '.join(HANDOVERS)}.")
    _check_rounds(values["stage2"])
    for key in EVALUATION:
        if not _is_number(values["evaluation"][key]) or values["evaluation"][key] < 1:
            raise RecipeError(f"`evaluation.{key}`={values['evaluation'][key]!r} must be a number of at least 1.")


def _refuse_secrets(values: dict[str, Any]) -> None:
    for key, value in _flat(values):
        if redacted({key: value})[key] != value:
            raise RecipeError(
                f"`{key}` holds a secret ({redacted(value) if redacted(value) != value else HIDDEN}), and recipes are "
                "copied into the folder of the run. Give it by an environment variable that the server or library "
                "reads."
            )


def _check_rows(data: dict[str, Any]) -> None:
    share, held_out, limit = data["stage1_share"], data["held_out"], data["limit"]
    if not _is_number(share) or not 0 < share < 1:
        raise RecipeError(
            f"`data.stage1_share`={share!r} must lie between 0 and 1. To train one stage alone, use `trl-cwdpo "
            "sft` or `trl-cwdpo cwdpo`."
        )
    if not isinstance(held_out, str) and (not _is_number(held_out) or held_out <= 0):
        raise RecipeError(
            f"`data.held_out`={held_out!r} must be a number of pairs, a share below 1, or the name of a split."
        )
    if limit is not None and (not isinstance(limit, int) or limit < 3):
        raise RecipeError(f"`data.limit`={limit!r} must be a number of pairs of at least 3.")
    if data["stage2"] is None:
        return
    if not isinstance(data["stage2"], Mapping) or not data["stage2"].get("dataset_name"):
        raise RecipeError(f"`data.stage2`={data['stage2']!r} must hold the data options of stage 2: `dataset_name`, …")
    _refuse_unknown("data.stage2.", data["stage2"], [key for key in known_keys("data") if key not in DATA])


def _check_rounds(stage2: dict[str, Any]) -> None:
    rounds = stage2[ROUNDS]
    if rounds is None:
        return
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise RecipeError(f"`stage2.{ROUNDS}`={rounds!r} must be a whole number of at least 1.")
    for key, scored in (("negative_selection", "lowest_reward"), ("on_policy_chosen", True)):
        if stage2.get(key) == scored and not stage2.get("negative_reward_funcs"):
            raise RecipeError(
                f"`stage2.{key}`={scored!r} needs reward functions: name them in `stage2.negative_reward_funcs`, or "
                "change it."
            )


def _fill_shapes(section: dict[str, Any], name: str, defaults: dict[str, Any], others: tuple[str, ...]) -> None:
    if section[SHAPES] is None:
        return
    given = {} if section[SHAPES] is True else section[SHAPES]
    if not isinstance(given, Mapping):
        raise RecipeError(f"`{name}.{SHAPES}`={given!r} must be `true` or map options to values.")
    _refuse_unknown(f"{name}.{SHAPES}.", given, defaults)
    both = next((other for other in others if section.get(other)), None)
    if both is not None:
        raise RecipeError(f"`{name}.{SHAPES}` and `{name}.{both}` exclude each other: remove one.")
    section[SHAPES] = {**defaults, **given}
    for key, value in section[SHAPES].items():
        least = 0 if key == "seed" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RecipeError(f"`{name}.{SHAPES}.{key}`={value!r} must be a whole number of at least {least}.")


def _is_number(value: Any) -> bool:  # noqa: ANN401 (any YAML value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, Mapping) and prefix == "" and key in SECTIONS):
            yield f"{prefix}{key}", value
