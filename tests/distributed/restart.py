"""A run whose last process is killed once; by torchrun: `restart.py MODEL OUTPUT STAGE KILLED_AT`, 0 for never.

Process r writes `OUTPUT/rank<r>.json`, and one line into `OUTPUT/starts.txt` whenever it starts.
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
from transformers import TrainerCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer

STAGES = {"1": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig), "2": (CWDPOTrainer, CWDPOConfig)}
TIMES = ("runtime", "per_second", "total_flos", "train_loss")


class KillOnce(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if state.global_step == self.step and first_start and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def main(model, output, stage, killed_at):
    trainer_class, config_class = STAGES[stage]
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    args = config_class(**tiny.training_options(Path(output, "run"), **options))
    with Path(output, "starts.txt").open("a") as file:
        file.write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n")
    callbacks = [KillOnce(int(killed_at))] if int(killed_at) else []
    trainer = trainer_class(model, args=args, train_dataset=tiny.pairs(24), callbacks=callbacks)
    trainer.train(resume_from_checkpoint="auto")
    result = {
        "world_size": trainer.accelerator.num_processes,
        "backend": torch.distributed.get_backend(),
        "distributed_type": str(trainer.accelerator.distributed_type),
        "log": [
            {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
            for entry in trainer.state.log_history
        ],
        "weights": [float(value.detach().double().sum()) for value in trainer.model.parameters()],
    }
    Path(output, f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
