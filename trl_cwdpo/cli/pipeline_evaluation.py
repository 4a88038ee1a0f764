"""The comparison that a pipeline ends with: before training, after each stage, on pairs that no stage has seen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.model_comparison import Comparison, Settings, compare_models
from trl_cwdpo.cli.recipe import Recipe
from trl_cwdpo.probe_summary import PairLoss


def evaluate_models(
    models: Mapping[str, str],
    reference: str,
    held_out: Any,  # noqa: ANN401
    recipe: Recipe,
    pair_loss: PairLoss | None = None,
) -> Comparison:
    """
    Measure models on held-out pairs, with the lengths that stage 2 was trained with.

    Args:
        models (`Mapping[str, str]`):
            Folder or hub name of each, by name.
        reference (`str`):
            Which of them changes and distances refer to.
        held_out ([`~datasets.Dataset`]):
            The pairs.
        recipe ([`Recipe`]):
            The recipe.
        pair_loss ([`~trl_cwdpo.probe_summary.PairLoss`], *optional*):
            The preference loss of stage 2, for cooling weights, easy negatives and the loser share.

    Returns:
        [`~trl_cwdpo.cli.model_comparison.Comparison`].
    """
    options, stage2 = recipe["evaluation"], recipe["stage2"]
    settings = Settings(
        size=options["size"],
        batch_size=options["batch_size"],
        max_length=stage2.get("max_length", Settings.max_length),
        truncation_mode=stage2.get("truncation_mode", Settings.truncation_mode),
        seed=recipe["seed"],
        trust_remote_code=bool(stage2.get("trust_remote_code", False)),
        pair_loss=pair_loss,
    )
    return compare_models(models, reference, held_out, settings)


def trained_pair_loss(record: Path) -> PairLoss | None:
    """
    The preference loss that a training has gone by, with the floor and temperature that `"auto"` was solved to.

    Args:
        record (`Path`):
            `run.json` of the training.

    Returns:
        [`~trl_cwdpo.probe_summary.PairLoss`], or `None` for a training of an older version, which has not noted it.
    """
    noted = json.loads(record.read_text(encoding="utf-8")).get("pair_loss") if record.exists() else None
    return None if noted is None else PairLoss(**noted)
