"""The comparison that a pipeline ends with: before training, after each stage, on pairs that no stage has seen."""

from collections.abc import Mapping
from typing import Any

from trl_cwdpo.cli.model_comparison import Comparison, Settings, compare_models
from trl_cwdpo.cli.recipe import Recipe


def evaluate_models(models: Mapping[str, str], reference: str, held_out: Any, recipe: Recipe) -> Comparison:  # noqa: ANN401
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
    )
    return compare_models(models, reference, held_out, settings)
