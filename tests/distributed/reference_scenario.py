"""Runs with a reference cache, of one process or several; by torchrun: `reference_scenario.py MODEL OUTPUT KILL`.

With KILL=1 the last process dies while the cache is being built. Otherwise every process writes
`OUTPUT/reference-rank<r>.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from trl import DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, reference_cache

ROWS, EVAL_ROWS = 23, 5  # odd, so that one of two processes repeats a row
KILL_AFTER = 2

scored = []
original = DPOTrainer.compute_ref_log_probs


def counted(self, model, inputs):
    if os.environ.get("KILL_REFERENCE") == "1" and len(scored) == KILL_AFTER and self.accelerator.is_last_process:
        os._exit(9)
    scored.append(len(inputs["input_ids"]) // 2)
    return original(self, model, inputs)


DPOTrainer.compute_ref_log_probs = counted


def run(model, output, *, cache, stream=False):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "per_device_train_batch_size": 4 // world,
        "per_device_eval_batch_size": 4 // world,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    args = CWDPOConfig(**tiny.training_options(output, **options), reference_cache_dir=cache)
    data = tiny.pairs(ROWS)
    scored.clear()
    trainer = CWDPOTrainer(
        model,
        args=args,
        train_dataset=data.to_iterable_dataset() if stream else data,
        eval_dataset=tiny.pairs(EVAL_ROWS, seed=1),
    )
    pairs = sum(scored)
    trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "backend": torch.distributed.get_backend() if world > 1 else None,
        "has_reference": trainer.ref_model is not None,
        "scored": pairs,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": [float(value.detach().double().sum()) for value in trainer.model.parameters()],
    }


def run_all(model, output):
    cache = f"{output}/cache"
    return {
        "built": run(model, output, cache=cache),
        "read": run(model, output, cache=cache),
        "without": run(model, output, cache=None),
        "stream built": run(model, output, cache=f"{output}/stream_cache", stream=True),
        "stream without": run(model, output, cache=None, stream=True),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, OUTPUT, KILL = sys.argv[1:]
    os.environ["KILL_REFERENCE"] = KILL
    reference_cache.SECONDS_BETWEEN_WRITES = 0.0
    everything = run_all(MODEL, OUTPUT)
    Path(OUTPUT, f"reference-rank{os.environ['RANK']}.json").write_text(json.dumps(everything))
    torch.distributed.destroy_process_group()
