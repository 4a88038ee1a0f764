"""A run with checkpoints, and one that continues from its middle: `resume_scenario.py OUTPUT MODELS NAME`.

NAME is a run of the parity suite. Process r writes `OUTPUT/resumed-rank<r>.json`.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import engines
import parity
import torch

STEPS, SAVED_AT = 4, 2
OPTIONS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "eval_strategy": "no",
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
}


def train(name, models, output, checkpoint=None):
    engines.forget_settings()
    trainer = parity.build(name, models, output, **OPTIONS)
    trainer.train(resume_from_checkpoint=checkpoint)
    trained = [(key, value) for key, value in trainer.model.named_parameters() if value.requires_grad]
    stateless = [key for key, value in trained if not trainer.optimizer.state[value]]
    return {**parity.record(trainer), "stateless": stateless}


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUTPUT, MODELS, NAME = sys.argv[1:]
    whole = train(NAME, MODELS, Path(OUTPUT, "run"))
    resumed = train(NAME, MODELS, Path(OUTPUT, "run"), str(Path(OUTPUT, "run", f"checkpoint-{SAVED_AT}")))
    file = Path(OUTPUT, f"resumed-rank{os.environ.get('RANK', '0')}.json")
    file.write_text(json.dumps({"whole": whole, "resumed": resumed}))
    torch.distributed.destroy_process_group()
