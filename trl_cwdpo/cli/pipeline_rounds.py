"""The data of an iterative round of `trl-cwdpo run`: stage 2's pairs with negatives of the model so far."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_cwdpo.cli.generate_policy import PolicySettings, sample_dataset
from trl_cwdpo.cli.generation_journal import Journal, with_responses_of, write_rows
from trl_cwdpo.cli.pipeline_plan import ROUND, start_of
from trl_cwdpo.cli.recipe import Recipe
from trl_cwdpo.cwdpo_config import CWDPOConfig
from trl_cwdpo.data import drop_unusable_pairs

HELD_OUT_FILE = "test.parquet"
# Settings of sampling, by the option of `CWDPOConfig` that says the same
OPTIONS = {
    "num_negative_generations": "num_generations",
    "negative_selection": "selection",
    "negative_discard_truncated": "discard_truncated",
    "negative_max_completion_length": "max_completion_length",
    "negative_temperature": "temperature",
    "negative_top_p": "top_p",
}


def settings_of(recipe: Recipe, training: str) -> PolicySettings:
    """
    How a round samples: as stage 2 would during training, with a seed of its own.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        training (`str`):
            The round.

    Returns:
        [`PolicySettings`].
    """
    stage2 = recipe["stage2"]
    fields = CWDPOConfig.__dataclass_fields__
    given = {ours: stage2.get(option, fields[option].default) for option, ours in OPTIONS.items()}
    batch_size = stage2.get("negative_generation_batch_size") or recipe["evaluation"]["batch_size"]
    return PolicySettings(
        model=start_of(recipe, training),
        **given,
        reward_funcs=tuple(stage2.get("negative_reward_funcs") or ()),
        on_policy_chosen=bool(stage2.get("on_policy_chosen", False)),
        batch_size=batch_size,
        seed=recipe["seed"] + int(training.removeprefix(ROUND)),
        dtype=recipe["model"].get("dtype") or PolicySettings.dtype,
        trust_remote_code=bool(stage2.get("trust_remote_code", False)),
    )


def write_round(recipe: Recipe, training: str, pairs: Dataset, held_out: Dataset, folder: Path) -> str:
    """
    Sample the negatives of a round and write its dataset, going on where an earlier attempt was stopped.

    Args:
        recipe ([`Recipe`]):
            The recipe.
        training (`str`):
            The round.
        pairs ([`~datasets.Dataset`]):
            The pairs to train on, with the dataset's own negatives, which stay where no sample can take their place.
        held_out ([`~datasets.Dataset`]):
            Pairs for evaluation and probes; they keep their negatives, so that rounds can be compared.
        folder (`Path`):
            Where the dataset goes.

    Returns:
        `str`: What to say of it.
    """
    rows: Any = drop_unusable_pairs(pairs, training)[0]
    settings = settings_of(recipe, training)
    journal = Journal(folder, {"rows": len(rows), "engine": "policy", **_plain(settings)})
    sample_dataset(rows, settings, journal, bar=False)
    # Splits of one dataset have the same columns
    write_rows(with_responses_of(held_out, [{"source": "dataset"}] * len(held_out)), folder / HELD_OUT_FILE)
    sources = journal.finish(rows)["sources"]
    return "  " + ", ".join(f"{count} from the {source}" for source, count in sorted(sources.items())) + "\n"


def _plain(settings: PolicySettings) -> dict[str, Any]:
    # JSON has no tuples
    return {**vars(settings), "reward_funcs": list(settings.reward_funcs)}
