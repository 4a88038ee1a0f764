"""A run by the trainer's own interface that one process of several gets a signal in; called by torchrun.

`torchrun --nproc_per_node 2 preemption.py MODEL OUTPUT STAGE`: stopped, continued, and whole.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer

STAGES = {"cwdpo": (CWDPOTrainer, CWDPOConfig), "sft": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)}
STEPS, STOP_AFTER = 6, 3


class SignalIn(TrainerCallback):
    """Sends this process a signal within a step."""

    def __init__(self, number):
        self.number = number

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == STOP_AFTER - 1:
            os.kill(os.getpid(), self.number)


def run(model, output, stage, number=None):
    """Train, with a signal for the last process only, or continue; what came of it."""
    trainer_class, config_class = STAGES[stage]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": STEPS}
    args = config_class(**tiny.training_options(output, **options, enable_jit_checkpoint=True))
    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_class(model, args=args, train_dataset=tiny.pairs(24))
    assert signal.getsignal(signal.SIGTERM) is before
    last = trainer.accelerator.is_last_process
    if number is not None and last:
        trainer.add_callback(SignalIn(number))
    trainer.train(resume_from_checkpoint="auto")
    assert signal.getsignal(signal.SIGTERM) is before
    assert args.enable_jit_checkpoint
    trainer.save_model(f"{output}/final")
    trainer.accelerator.wait_for_everyone()
    weights = load_file(Path(output, "final", "model.safetensors"))
    return {
        "stopped_by": trainer.stopped_by,
        "step": trainer.state.global_step,
        "world_size": trainer.accelerator.num_processes,
        "checkpoints": sorted(folder.name for folder in Path(output).glob("checkpoint-*")),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: value.double().sum().item() for name, value in weights.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, OUTPUT, STAGE = sys.argv[1:]
    results = {
        "stopped": run(MODEL, f"{OUTPUT}/out", STAGE, signal.SIGUSR1),
        "continued": run(MODEL, f"{OUTPUT}/out", STAGE),
        "whole": run(MODEL, f"{OUTPUT}/whole", STAGE),
    }
    Path(OUTPUT, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
