"""The options of a benchmark's trainings, put together from its file, and their check before anything runs."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from trl_cwdpo.benchmarks.checks import MatrixError, nearest
from trl_cwdpo.benchmarks.matrix import Cell, Matrix
from trl_cwdpo.benchmarks.methods import METHODS, PAIR_LOSS, SFT
from trl_cwdpo.benchmarks.pair_loss_trainer import OPTIONS
from trl_cwdpo.cwdpo_config import CWDPOConfig
from trl_cwdpo.gentle_negative_sft_config import GentleNegativeSFTConfig

# What else in the file says it: one place only, or a grid would not be the grid that its tables show
SAID_ELSEWHERE = {
    "max_steps": "`steps`",
    "num_train_epochs": "`steps`",
    "per_device_train_batch_size": "`batch_size`",
    "seed": "`seeds` and `selection_seeds`",
    "output_dir": "`--output_dir`",
}
OF_STAGE1 = {**SAID_ELSEWHERE, "learning_rate": "`stage1.learning_rate`", "negative_loss_type": "`stage1` of a method"}
OF_STAGE2 = {**SAID_ELSEWHERE, "learning_rate": "`grid.learning_rate`", "beta": "`grid.beta`"}


def stage1_options(matrix: Matrix, stage1: str, folder: Path, seed: int) -> dict[str, Any]:
    """
    Options of [`~trl_cwdpo.GentleNegativeSFTConfig`] for stage 1.

    Args:
        matrix ([`Matrix`]):
            The benchmark.
        stage1 (`str`):
            Form of stage 1.
        folder (`Path`):
            Where the trainer may write.
        seed (`int`):
            Seed.

    Returns:
        `dict[str, Any]`.
    """
    return {
        **training_options(folder, seed),
        "negative_loss_type": stage1,
        "max_steps": matrix.stage1.steps,
        "learning_rate": matrix.stage1.learning_rate,
        "per_device_train_batch_size": matrix.stage1.batch_size,
        **matrix.stage1.options,
    }


def stage2_options(matrix: Matrix, cell: Cell, folder: Path) -> dict[str, Any]:
    """
    Options of the training of a cell: of [`~trl_cwdpo.GentleNegativeSFTConfig`] for SFT, else of
    [`~trl_cwdpo.CWDPOConfig`].

    Args:
        matrix ([`Matrix`]):
            The benchmark.
        cell ([`Cell`]):
            The cell.
        folder (`Path`):
            Where the trainer may write.

    Returns:
        `dict[str, Any]`.
    """
    entry, stage2 = matrix.methods[cell.method], matrix.stage2_of(cell.regime)
    method = METHODS[entry.method]
    common = {
        **training_options(folder, cell.seed),
        "max_steps": stage2.steps,
        "learning_rate": cell.learning_rate,
        "per_device_train_batch_size": stage2.batch_size,
    }
    if method.kind == SFT:
        # Options about pairs and negatives mean nothing to a method that sees the chosen responses alone
        return {**common, "negative_loss_type": "none", **method.options, **entry.options}
    return {**common, "beta": cell.beta, **stage2.options, **method.options, **entry.options}


def values_in_force(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values of a configuration's own options, where nothing is given its defaults: what a later version of this
    package may do otherwise under the same file.

    Args:
        kind (`type`):
            [`~trl_cwdpo.CWDPOConfig`] or [`~trl_cwdpo.GentleNegativeSFTConfig`].
        options (`Mapping[str, Any]`):
            What is given.

    Returns:
        `dict[str, Any]`: By name, as JSON has them.
    """
    inherited = {entry.name for parent in kind.__mro__[1:] if is_dataclass(parent) for entry in fields(parent)}
    own = {entry.name: entry.default for entry in fields(kind) if entry.name not in inherited and entry.init}
    values = {name: options.get(name, default) for name, default in own.items()}
    return json.loads(json.dumps(values, default=str))


def cell_values(matrix: Matrix, cell: Cell) -> dict[str, Any]:
    """[`values_in_force`] of the training of a cell, and of stage 1 before it."""
    folder, form = Path("unused"), matrix.methods[cell.method].stage1
    own = values_in_force(_kind(matrix, cell.method), stage2_options(matrix, cell, folder))
    return {"stage1": start_values(matrix, form), "stage2": own}


def start_values(matrix: Matrix, stage1: str) -> dict[str, Any]:
    """[`values_in_force`] of a form of stage 1."""
    if stage1 == "skip":
        return {}
    return values_in_force(GentleNegativeSFTConfig, stage1_options(matrix, stage1, Path("unused"), 0))


def is_current(noted: Mapping[str, Any] | None, current: Mapping[str, Any]) -> bool:
    """Whether noted values are those of now; an option that only one of both has, or no note at all, is no change."""
    shared = set(noted or {}) & set(current)
    return noted is None or all(
        is_current(noted[name], current[name]) if isinstance(current[name], dict) else noted[name] == current[name]
        for name in shared
    )


def check_options(matrix: Matrix) -> None:
    """
    Make sure, before anything runs, that the configurations take the options that a benchmark names.

    Args:
        matrix ([`Matrix`]):
            The benchmark.

    Raises:
        MatrixError: Naming the key, the option, the reason and the fix.
    """
    _check_names(GentleNegativeSFTConfig, matrix.stage1.options, "stage1.options", OF_STAGE1)
    _check_names(CWDPOConfig, matrix.stage2.options, "stage2.options", OF_STAGE2)
    for regime in matrix.regimes:
        changes = matrix.regimes[regime].stage2.get("options", {})
        _check_names(CWDPOConfig, changes, f"regimes.{regime}.stage2.options", OF_STAGE2)
    for name, entry in matrix.methods.items():
        _check_names(_kind(matrix, name), entry.options, f"methods.{name}.options", OF_STAGE2)
    folder = Path("unused")
    _check_values(LoraConfig, matrix.lora, "lora")
    for form in dict.fromkeys(entry.stage1 for entry in matrix.methods.values() if entry.stage1 != "skip"):
        _check_values(GentleNegativeSFTConfig, stage1_options(matrix, form, folder, 0), f"stage 1 `{form}`")
    for regime in matrix.regimes:
        for name in matrix.methods:
            cell = Cell(regime, name, matrix.grid.learning_rate[0], matrix.grid.beta[0], seed=0)
            where, options = f"methods.{name} in the regime {regime}", stage2_options(matrix, cell, folder)
            _check_values(_kind(matrix, name), options, where)
            _check_fit(matrix, cell, options, where)


def _check_fit(matrix: Matrix, cell: Cell, options: Mapping[str, Any], where: str) -> None:
    """What the trainers would refuse, when much has run already."""
    method = METHODS[matrix.methods[cell.method].method]
    for name, value in OPTIONS.items():
        if method.kind == PAIR_LOSS and options[name] != value:
            raise MatrixError(
                f"{where}: `{name}` is {options[name]!r}, but {method.summary} is not cooled. Leave it out."
            )
    asks = options.get("on_policy_chosen") or options.get("negative_selection") == "lowest_reward"
    has_reward = matrix.stage2_of(cell.regime).reward or options.get("negative_reward_funcs")
    if asks and not has_reward:
        raise MatrixError(
            f"{where}: `on_policy_chosen` and `negative_selection: lowest_reward` go by the scores of sampled "
            "responses. Add `reward: true` to `stage2`."
        )


def _kind(matrix: Matrix, name: str) -> type:
    return GentleNegativeSFTConfig if METHODS[matrix.methods[name].method].kind == SFT else CWDPOConfig


def _check_names(kind: type, options: Mapping[str, Any], where: str, said_elsewhere: Mapping[str, str]) -> None:
    known = {entry.name for entry in fields(kind) if entry.init}
    where_all = f"the options of {kind.__name__} are what can be set"
    for name, value in options.items():
        if name in said_elsewhere:
            raise MatrixError(
                f"{where} has {name!r}: {value!r}, but that is what {said_elsewhere[name]} says. Leave it out."
            )
        if name not in known:
            raise MatrixError(f"unknown option {name!r} in {where}{nearest(name, sorted(known), where_all)}")


def _check_values(kind: type, options: Mapping[str, Any], where: str) -> None:
    try:
        kind(**options)
    except (TypeError, ValueError) as error:
        raise MatrixError(f"{where}: {error}") from error


def training_options(folder: Path, seed: int) -> dict[str, Any]:
    """Options of a short training that leaves nothing behind but its model."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "warmup_steps": 0.1,
        "max_length": None,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
