"""A run whose last process stops for too long in its third step; by torchrun: `hang.py MODEL OUTPUT`."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from transformers import TrainerCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.hangs import HungProcessError

TIMEOUT = 12


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == "1":
            time.sleep(4 * TIMEOUT)


if __name__ == "__main__":
    MODEL, OUTPUT = sys.argv[1:]
    # On CPUs transformers does not hand its `ddp_timeout` on
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    args = CWDPOConfig(**tiny.training_options(OUTPUT, per_device_train_batch_size=2, ddp_timeout=TIMEOUT))
    trainer = CWDPOTrainer(MODEL, args=args, train_dataset=tiny.pairs(24), callbacks=[Stop()])
    try:
        trainer.train()
    except HungProcessError as error:
        Path(OUTPUT, f"error-rank{os.environ['RANK']}.txt").write_text(str(error))
        raise
