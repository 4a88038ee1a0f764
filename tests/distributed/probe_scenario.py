"""A short run with probes, the same for one process and for several; by torchrun: `probe_scenario.py MODEL OUTPUT`.

Every process writes `OUTPUT/probes-rank<r>.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, DeltaLogpProbeCallback

ROWS = 5  # odd, so that one of two processes repeats a row


def run(model, output, *, probes):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"per_device_train_batch_size": 4 // world, "optim": "sgd", "learning_rate": 0.05, "max_steps": 4}
    args = CWDPOConfig(**tiny.training_options(output, **options))
    trainer = CWDPOTrainer(model, args=args, train_dataset=tiny.pairs(24))
    if probes:
        trainer.add_callback(DeltaLogpProbeCallback(trainer, tiny.pairs(9, seed=7), size=ROWS, steps=2, batch_size=2))
    trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "backend": torch.distributed.get_backend() if world > 1 else None,
        "probes": [entry for entry in trainer.state.log_history if "probe/ece" in entry],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": [float(value.detach().double().sum()) for value in trainer.model.parameters()],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, OUTPUT = sys.argv[1:]
    results = {name: run(MODEL, f"{OUTPUT}/{name}", probes=name == "probed") for name in ("plain", "probed")}
    Path(OUTPUT, f"probes-rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
