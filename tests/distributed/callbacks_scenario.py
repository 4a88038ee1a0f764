"""Runs with early stopping and a curriculum, by torchrun: `callbacks_scenario.py MODEL OUTPUT`.

Every process writes `OUTPUT/callbacks-rank<r>.json`. In the first run the processes disagree about their probes.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from parity import disagreeing_probes

from trl_cwdpo import CurriculumCallback, CWDPOConfig, CWDPOTrainer


def trainer_of(model, output, **options):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"per_device_train_batch_size": 4 // world, "optim": "sgd", "max_steps": 6, **options}
    args = CWDPOConfig(**tiny.training_options(output, **options))
    return CWDPOTrainer(model, args=args, train_dataset=tiny.pairs(24), eval_dataset=tiny.pairs(5, seed=7))


def stopped(model, output):
    with disagreeing_probes():
        trainer = trainer_of(model, output, probe_steps=1, probe_early_stopping=True)
        trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "backend": torch.distributed.get_backend() if trainer.accelerator.num_processes > 1 else None,
        "steps": trainer.state.global_step,
        "best": Path(trainer.state.best_model_checkpoint).name,
        "weights": [float(value.detach().double().sum()) for value in trainer.model.parameters()],
    }


def ordered(model, output):
    trainer = trainer_of(model, output, probe_steps=0, learning_rate=0.0)
    trainer.add_callback(CurriculumCallback(trainer))
    trainer.train()
    logged = [entry["cooling/rejected_avg_logp"] for entry in trainer.state.log_history if "loss" in entry]
    return {"world_size": trainer.accelerator.num_processes, "avg_logps": logged}


def run(model, output):
    return {"stopped": stopped(model, f"{output}/stopped"), "ordered": ordered(model, f"{output}/ordered")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, OUTPUT = sys.argv[1:]
    Path(OUTPUT, f"callbacks-rank{os.environ['RANK']}.json").write_text(json.dumps(run(MODEL, OUTPUT)))
    torch.distributed.destroy_process_group()
