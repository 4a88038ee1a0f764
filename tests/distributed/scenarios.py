"""Short runs that are the same for one process and for several: called by the tests, and by torchrun as a script.

As a script: `torchrun --nproc_per_node 2 scenarios.py MODEL OUTPUT`. Every process writes `OUTPUT/rank<r>.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.faults import NonFiniteLossError

GLOBAL_BATCH = 4
COOLED = {
    "cooled": {"cooling_mode": "loss"},
    "cooled, accumulated": {"cooling_mode": "loss", "gradient_accumulation_steps": 2},
    "gated": {"cooling_mode": "gate", "cooling_preset": "paper"},
    "calibrated on an odd number": {"cooling_calibration_size": 7},
}
GENTLE = {
    "smoothed": {},
    "hinge": {"negative_loss_type": "hinge"},
    "hinge of the batch": {"negative_loss_type": "hinge", "negative_reduction": "batch", "negative_nll_floor": 4.2},
    "hinge of the batch, accumulated": {
        "negative_loss_type": "hinge",
        "negative_reduction": "batch",
        "negative_nll_floor": 4.2,
        "gradient_accumulation_steps": 2,
    },
    "band": {"negative_loss_type": "band", "negative_reduction": "batch"},
}
UNCOOLED = {
    "DPOTrainer": (DPOTrainer, DPOConfig, {}),
    "off": (CWDPOTrainer, CWDPOConfig, {"cooling_mode": "off"}),
    "weights of 1": (
        CWDPOTrainer,
        CWDPOConfig,
        {"cooling_mode": "constant", "cooling_constant": 1.0, "share_prefix": False},
    ),
}


def train(trainer_class, config_class, model, output, **options):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = options.get("gradient_accumulation_steps", 1)
    options = {
        "per_device_train_batch_size": GLOBAL_BATCH // world // steps,
        "optim": "sgd",
        "learning_rate": 0.05,
        **options,
    }
    args = config_class(**tiny.training_options(output, **options))
    trainer = trainer_class(model, args=args, train_dataset=tiny.pairs(24))
    trainer.train()
    assert trainer.accelerator.num_processes == world
    return trainer


def record(trainer):
    """Everything a run leaves behind, as plain numbers."""
    times = ("runtime", "per_second")
    return {
        "log": [
            {name: value for name, value in entry.items() if not any(time in name for time in times)}
            for entry in trainer.state.log_history
        ],
        "weights": [float(value.detach().double().sum()) for value in trainer.model.parameters()],
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
    }


def bad_number_on_the_last_rank(model, output):
    """The message each process gets when the loss of one of them is not finite."""
    args = CWDPOConfig(**tiny.training_options(output, per_device_train_batch_size=2), cooling_mode="off")
    trainer = CWDPOTrainer(model, args=args, train_dataset=tiny.pairs(24))
    if trainer.accelerator.is_last_process:
        original = trainer.model.forward

        def broken(*args, **kwargs):
            outputs = original(*args, **kwargs)
            outputs.log_probs = outputs.log_probs * float("nan")
            return outputs

        trainer.model.forward = broken
    try:
        trainer.train()
    except NonFiniteLossError as error:
        return str(error)
    return "no error"


def run_all(model, output):
    results = {}
    for name, (trainer_class, config_class, options) in UNCOOLED.items():
        results[name] = record(train(trainer_class, config_class, model, output, **options))
    for name, options in COOLED.items():
        trainer = train(CWDPOTrainer, CWDPOConfig, model, output, **options)
        results[name] = {**record(trainer), "calibration": trainer.calibration.to_dict()}
    for name, options in GENTLE.items():
        results[name] = record(train(GentleNegativeSFTTrainer, GentleNegativeSFTConfig, model, output, **options))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, OUTPUT = sys.argv[1:]
    everything = run_all(MODEL, OUTPUT)
    everything["bad number"] = bad_number_on_the_last_rank(MODEL, OUTPUT)
    Path(OUTPUT, f"rank{os.environ['RANK']}.json").write_text(json.dumps(everything))
    torch.distributed.destroy_process_group()
