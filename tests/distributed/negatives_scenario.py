"""Runs with on-policy negatives, the same for one process and for several.

By torchrun: `negatives_scenario.py MODEL TOY OUTPUT`, where TOY is a model of known distribution.
Every process writes `OUTPUT/negatives-rank<r>.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch

from trl_cwdpo import CWDPOConfig, CWDPOTrainer

RANK = int(os.environ.get("RANK", "0"))


def nothing_scores_lower_on_the_first_process(prompts, **_):
    """All samples of rank 0 fall back; those of the others are negatives."""
    # Samples of a prompt stand before its chosen response
    return [0.0 if RANK == 0 or index % 2 else -1.0 for index in range(len(prompts))]


# Each is a way in which processes could wait for one another
SCENARIOS = {
    "one process falls back": {"rewards": nothing_scores_lower_on_the_first_process, "max_steps": 3},
    "different lengths, hardest": {
        "num_negative_generations": 3,
        "negative_selection": "hardest",
        "negative_max_completion_length": 12,
        "max_steps": 3,
    },
    "uneven last batch": {
        "rows": 23,
        "num_train_epochs": 1,
        "max_steps": -1,
        "gradient_accumulation_steps": 2,
        "negative_refresh_steps": 2,
        "dataset_negative_fraction": 0.4,
    },
    "evaluation in between": {"evaluation": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3},
    "resumed": {
        "negative_refresh_steps": 3,
        "dataset_negative_fraction": 0.3,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
    },
}


def build(model, output, *, rewards=None, rows=24, evaluation=False, **options):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "per_device_train_batch_size": 4 // world,
        "dataset_negative_fraction": 0.0,
        "negative_max_completion_length": 6,
        "negative_log_samples": 1000,
        "cooling_calibration_size": 8,
        **options,
    }
    return CWDPOTrainer(
        model,
        args=CWDPOConfig(**tiny.training_options(output, **options)),
        train_dataset=tiny.pairs(rows),
        eval_dataset=tiny.pairs(5, seed=4) if evaluation else None,
        negative_reward_funcs=rewards,
    )


def record(trainer):
    names = ("loss", "eval_loss", "logps/rejected")
    return {
        "log": [
            {
                name: value
                for name, value in entry.items()
                if name in names or (name.startswith("negatives/") and "time" not in name)
            }
            for entry in trainer.state.log_history
        ],
        "weights": [float(value.detach().double().sum()) for value in trainer.model.parameters()],
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
    }


def run(model, output, name):
    trainer = build(model, f"{output}/{name}", **SCENARIOS[name])
    trainer.train()
    results = {"whole": record(trainer)}
    if name == "resumed":
        again = build(model, f"{output}/{name}", **SCENARIOS[name])
        again.train(resume_from_checkpoint=f"{output}/{name}/checkpoint-2")
        results["part"] = record(again)
    return results


def toy_samples(toy, output, steps):
    """What the processes sampled from a policy of known distribution, with weights that stay."""
    trainer = build(
        toy,
        f"{output}/toy",
        max_steps=steps,
        learning_rate=0.0,
        negative_max_completion_length=1,
        cooling_mode="off",
        rows=160,
        per_device_train_batch_size=40 // int(os.environ.get("WORLD_SIZE", "1")),
    )
    # Logging would empty the table
    trainer._negatives.log_samples = lambda: None
    trainer.train()
    return [row["sampled"] for row in trainer._negatives.table.rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, TOY, OUTPUT = sys.argv[1:]
    everything = {name: run(MODEL, OUTPUT, name) for name in SCENARIOS}
    everything["toy"] = toy_samples(TOY, OUTPUT, 10)
    everything["backend"] = torch.distributed.get_backend()
    Path(OUTPUT, f"negatives-rank{RANK}.json").write_text(json.dumps(everything))
    torch.distributed.destroy_process_group()
