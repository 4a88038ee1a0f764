"""The numbers that a pipeline ends with: before training, after each stage, on pairs that no stage has seen."""

from collections.abc import Mapping
from typing import Any

from trl_cwdpo.cli.recipe import Recipe
from trl_cwdpo.cli.table import format_table, number, percent
from trl_cwdpo.evaluation.comparison import compare
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.probe_rows import choose_rows
from trl_cwdpo.upstream.models import load_processor

SCENE = "scene"


def evaluate_models(models: Mapping[str, str], reference: str, held_out: Any, recipe: Recipe) -> dict[str, Any]:  # noqa: ANN401
    """
    Measure models on held-out pairs.

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
        `dict[str, Any]`: `reference`, `num_pairs` and, under `models`, the numbers of each; plain JSON values.
    """
    options, stage2 = recipe["evaluation"], recipe["stage2"]
    trusts = bool(stage2.get("trust_remote_code", False))
    processor = load_processor(models[reference], trust_remote_code=trusts)
    rows = choose_rows(
        held_out,
        processor,
        options["size"],
        max_length=stage2.get("max_length", 1024),
        truncation_mode=stage2.get("truncation_mode", "keep_start"),
        seed=recipe["seed"],
    )
    pictures = held_out.select([row.index for row in rows.rows]) if SCENE in held_out.column_names else None
    captions: dict[str, dict[str, Any]] = {}

    def caption(name: str, model: Any) -> None:  # noqa: ANN401 (either kind of model)
        from trl_cwdpo.shapes.evaluation import evaluate

        if pictures is not None:
            captions[name] = evaluate(model, processor, pictures).to_dict()

    records = compare(
        models, reference, rows, batch_size=options["batch_size"], trust_remote_code=trusts, with_model=caption
    )
    measured = {name: {**numbers_of(record), **captions.get(name, {})} for name, record in records.items()}
    return {"reference": reference, "num_pairs": len(rows), "models": measured}


def numbers_of(record: ProbeRecord) -> dict[str, Any]:
    """
    What a comparison keeps of a measurement.

    Args:
        record ([`~trl_cwdpo.probe_records.ProbeRecord`]):
            The measurement.

    Returns:
        `dict[str, Any]`: Plain JSON values.
    """
    plain = record.to_dict()
    kept = ("accuracy", "margin", "ece", "smooth_ece", "brier", "entropy", "top1_mass")
    families = {
        name: {"avg_logp": family["avg_logp"], "delta0": family["delta0"]}
        for name, family in plain["families"].items()
    }
    distances = {"tv": plain["total_variation"], "js": plain["jensen_shannon"]}
    return {**{name: plain[name] for name in kept}, **distances, "families": families}


def table(result: Mapping[str, Any]) -> str:
    """
    Lay the numbers out.

    Args:
        result (`Mapping[str, Any]`):
            What [`evaluate_models`] returned.

    Returns:
        `str`: A table and a line that explains it.
    """
    models = result["models"]
    shapes = all("attribute_accuracy" in numbers for numbers in models.values())
    headers = [
        "",
        "pairs\nwon",
        "margin\nnats",
        "chosen\nΔ/token",
        "rejected\nΔ/token",
        "ECE",
        "Brier",
        "TV",
    ]
    headers += ["attributes", "exact\ncaptions"] if shapes else []
    lines = []
    for name, numbers in models.items():
        chosen, rejected = (numbers["families"][side]["delta0"] or {} for side in ("chosen", "rejected"))
        won = numbers["accuracy"] if name != result["reference"] else None
        cells = [
            name,
            "–" if won is None else percent(won),
            number(numbers["margin"]["mean"], 2),
            number(chosen.get("mean"), 3),
            number(rejected.get("mean"), 3),
            *(number(numbers[key], 3) for key in ("ece", "brier", "tv")),
        ]
        cells += [percent(numbers["attribute_accuracy"]), percent(numbers["exact_rate"])] if shapes else []
        lines.append(cells)
    explained = f"  {result['num_pairs']} held-out pairs; changes and distances from {result['reference']}"
    return f"{format_table(headers, lines)}\n{explained}"
