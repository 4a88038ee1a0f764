"""On-policy negatives on drawn shapes: from an imperfect base, against stage 1 and against the dataset's negatives.

    python benchmarks/on_policy.py --output outputs/on_policy --seeds 0 1 2 3 4
    python benchmarks/on_policy.py --output outputs/on_policy --report

Every arm of a seed starts from the same stage-1 model, trains on the same pairs in the same order for the same number
of steps, and is scored by the oracle on the same held-out pictures. Results are kept in `OUTPUT/results.jsonl`, one
line per seed and arm; what is there is not run again.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.shapes import Recipe, attribute_reward, build_dataset, generate_captions, judge, pretrain, scenes_of

PAIRS, STAGE1_PAIRS, HELD_OUT = 2000, 800, 1000
PRETRAINING_STEPS, STAGE1_STEPS = 260, 40
DATASET = {"dataset_negative_fraction": 1.0}
SAMPLED = {"dataset_negative_fraction": 0.0, "num_negative_generations": 4}
GRADED = {**SAMPLED, "negative_selection": "lowest_reward", "on_policy_chosen": True}
# What each arm of stage 2 changes; `rewards`: graded by the oracle
ARMS: dict[str, dict[str, Any]] = {
    "CW-DPO, dataset negatives": DATASET,
    "CW-DPO, half sampled": {**SAMPLED, "num_negative_generations": 1, "dataset_negative_fraction": 0.5},
    "CW-DPO, sampled": {**SAMPLED, "num_negative_generations": 1},
    "CW-DPO, sampled, hardest of 4": {**SAMPLED, "negative_selection": "hardest"},
    "CW-DPO, sampled, lowest reward of 4": {**SAMPLED, "negative_selection": "lowest_reward"},
    "CW-DPO, both sides sampled": GRADED,
    "CW-DPO (gate), both sides sampled": {**GRADED, "cooling_mode": "gate"},
    "DPO, dataset negatives": {**DATASET, "cooling_mode": "off"},
    "DPO, both sides sampled": {**GRADED, "cooling_mode": "off"},
    "RPO, dataset negatives": {**DATASET, "cooling_mode": "off", "loss_type": ["sigmoid", "sft"]},
    "RPO, both sides sampled": {**GRADED, "cooling_mode": "off", "loss_type": ["sigmoid", "sft"]},
    "DPO-Shift, both sides sampled": {**GRADED, "cooling_mode": "constant"},
    "SFT, dataset responses": {**DATASET, "cooling_mode": "off", "loss_type": ["sft"]},
    "SFT, best of 4 samples": {**GRADED, "cooling_mode": "off", "loss_type": ["sft"]},
}
BASE, STAGE1 = "base", "stage 1"
# Quantile 0.975 of Student's t, by degrees of freedom
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def options(folder: Path, seed: int, **others: Any) -> dict[str, Any]:
    """Training options that all stages share."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "per_device_train_batch_size": 16,
        "warmup_steps": 0.1,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


def load(folder: Path | str) -> Any:  # noqa: ANN401 (a model)
    """A model of the shapes task."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def prepare(output: Path, seed: int) -> tuple[Path, Path, Dataset, Dataset]:
    """Base model, stage-1 model, pairs of stage 2 and held-out pairs of a seed."""
    data = build_dataset(num_train=PAIRS, num_test=HELD_OUT, seed=seed)
    base = pretrain(
        output / f"base-{seed}", steps=PRETRAINING_STEPS, seed=seed, recipe=Recipe(num_scenes=8000), progress=False
    ).path
    stage1 = output / f"stage1-{seed}"
    if not (stage1 / "config.json").exists():
        config = GentleNegativeSFTConfig(**options(stage1, seed, max_steps=STAGE1_STEPS, learning_rate=1e-4))
        trainer = GentleNegativeSFTTrainer(
            str(base), args=config, train_dataset=data["train"].select(range(STAGE1_PAIRS))
        )
        trainer.train()
        trainer.save_model()
        AutoProcessor.from_pretrained(base).save_pretrained(stage1)
    return base, stage1, data["train"].select(range(STAGE1_PAIRS, PAIRS)), data["test"]


def score(model: Any, processor: Any, held_out: Dataset) -> dict[str, Any]:  # noqa: ANN401
    """What the oracle says of greedy captions of the held-out pictures."""
    scenes = scenes_of(held_out)
    verdicts = [
        judge(text, scene) for text, scene in zip(generate_captions(model, processor, scenes), scenes, strict=True)
    ]
    return {
        "attribute_accuracy": sum(verdict.score for verdict in verdicts) / len(verdicts),
        "exact_rate": sum(verdict.exact for verdict in verdicts) / len(verdicts),
        "scores": [round(verdict.score, 6) for verdict in verdicts],
    }


def train_arm(stage1: Path, arm: str, seed: int, pairs: Dataset, folder: Path, settings: argparse.Namespace) -> Any:  # noqa: ANN401
    """The trainer of one arm of stage 2, after training."""
    changes = ARMS[arm]
    rewards = (
        attribute_reward
        if {"lowest_reward", True}
        & {
            changes.get("negative_selection"),
            changes.get("on_policy_chosen"),
        }
        else None
    )
    config = CWDPOConfig(
        **options(
            folder,
            seed,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            beta=settings.beta,
            negative_max_completion_length=16,
            cooling_preset="tail",  # the default when the published numbers were made
            negative_log_samples=0,
            **changes,
        )
    )
    trainer = CWDPOTrainer(str(stage1), args=config, train_dataset=pairs, negative_reward_funcs=rewards)
    trainer.train()
    return trainer


def known(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Results so far, by arm and seed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}


def run(settings: argparse.Namespace) -> None:
    """Run every seed and arm that has no result yet."""
    path = settings.output / "results.jsonl"
    for seed in settings.seeds:
        done = known(path)
        arms = [arm for arm in settings.arms or ARMS if (arm, seed) not in done]
        if not arms and (STAGE1, seed) in done:
            continue
        base, stage1, pairs, held_out = prepare(settings.output, seed)
        processor = AutoProcessor.from_pretrained(base)
        for name, folder in ((BASE, base), (STAGE1, stage1)):
            if (name, seed) not in done:
                write(path, name, seed, settings, score(load(folder), processor, held_out))
        for arm in arms:
            began = time.process_time()
            trainer = train_arm(stage1, arm, seed, pairs, settings.output / "arm", settings)
            logs = trainer.state.log_history
            extra = {
                name: average(logs, name)
                for name in ("negatives/on_policy_fraction", "negatives/on_policy_chosen_fraction", "cooling/weight")
            }
            result = score(trainer.model, processor, held_out)
            write(path, arm, seed, settings, {**result, **extra, "cpu_seconds": time.process_time() - began})


def average(logs: Sequence[dict[str, float]], name: str) -> float | None:
    """Mean of a metric over a run's logs."""
    values = [entry[name] for entry in logs if name in entry]
    return sum(values) / len(values) if values else None


def write(path: Path, arm: str, seed: int, settings: argparse.Namespace, result: dict[str, Any]) -> None:
    """Append a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {"steps": settings.steps, "learning_rate": settings.learning_rate, "beta": settings.beta}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"arm": arm, "seed": seed, **shared, **result}) + "\n")
    print(
        f"seed {seed}  {arm:40s} accuracy {result['attribute_accuracy']:.4f}  exact {result['exact_rate']:.3f}",
        flush=True,
    )


def interval(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % interval over seeds (Student's t)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:+.4f} ± {T_975[len(values) - 1] * deviation / math.sqrt(len(values)):.4f}"


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of pictures with the better caption, ties one half."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return sum(wins) / len(wins)


def report(settings: argparse.Namespace) -> None:
    """Print the results as a table in Markdown."""
    results = known(settings.output / "results.jsonl")
    seeds = sorted({seed for arm, seed in results if arm == STAGE1})
    print("| arm | seeds | attribute accuracy | against stage 1 | against dataset negatives | exact | win rate |")
    print("|---|---|---|---|---|---|---|")
    for arm in (BASE, STAGE1, *ARMS):
        there = [seed for seed in seeds if (arm, seed) in results]
        if not there:
            continue
        rows = [results[arm, seed] for seed in there]
        starts = [results[STAGE1, seed] for seed in there]
        mean, exact = (sum(row[name] for row in rows) / len(rows) for name in ("attribute_accuracy", "exact_rate"))
        change = interval(
            [row["attribute_accuracy"] - start["attribute_accuracy"] for row, start in zip(rows, starts, strict=True)]
        )
        wins = sum(win_rate(row["scores"], start["scores"]) for row, start in zip(rows, starts, strict=True)) / len(
            rows
        )
        paired = [
            row["attribute_accuracy"] - results["CW-DPO, dataset negatives", seed]["attribute_accuracy"]
            for row, seed in zip(rows, there, strict=True)
            if ("CW-DPO, dataset negatives", seed) in results
        ]
        against = interval(paired) if paired else ""
        print(f"| {arm} | {len(there)} | {mean:.4f} | {change} | {against} | {exact:.3f} | {wins:.3f} |")
    print(f"\n{len(seeds)} seeds: {seeds}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/on_policy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--report", action="store_true", help="print the table of what is there and run nothing")
    settings = parser.parse_args()
    if settings.report:
        report(settings)
        return
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    with contextlib.suppress(KeyboardInterrupt):
        run(settings)


if __name__ == "__main__":
    main()
