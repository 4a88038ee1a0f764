"""Adapters on quantised weights, trained and resumed; also on an engine: `quantized.py MODEL OUTPUT NAME …`.

Every process writes `OUTPUT/NAME-rank<r>.json` as soon as a run is over.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import engines
import memory_scenario
import tiny
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer

GLOBAL_BATCH = 4
STEPS, SAVED_AT = 6, 3
FORMATS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
    },
    "int8": {"load_in_8bit": True},
}
# What FSDP2 can shard: accelerate keeps other 4-bit weights whole on each process
FORMATS["nf4 in floats"] = {**FORMATS["nf4"], "bnb_4bit_quant_storage": "float32"}
ADAPTER = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
STAGES = {
    "stage 1": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig),
    "stage 2": (CWDPOTrainer, CWDPOConfig),
}
RUNS = tuple(f"{stage}, {form}" for stage in STAGES for form in ("nf4", "int8"))
ON_ENGINES = {
    "ddp": RUNS,
    "fsdp2": tuple(f"{stage}, {form}" for stage in STAGES for form in ("nf4", "nf4 in floats")),
    "zero2": RUNS,
    "zero3": RUNS,
}
TIMES = ("runtime", "per_second", "train_loss", "total_flos")


def bitsandbytes_is_installed():
    return importlib.util.find_spec("bitsandbytes") is not None


def build(name, model, output, **options):
    """The trainer of a run."""
    stage, form = name.split(", ")
    trainer_class, config_class = STAGES[stage]
    engine = engines.this_engine()
    options = {
        "per_device_train_batch_size": GLOBAL_BATCH // engine.processes,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
        "learning_rate": 0.02,
        **engine.options,
        **options,
    }
    engines.forget_settings()
    torch.manual_seed(0)  # where an adapter starts
    return trainer_class(
        model,
        args=config_class(**tiny.training_options(output, **options)),
        train_dataset=tiny.pairs(24),
        quantization_config=BitsAndBytesConfig(**FORMATS[form]),
        peft_config=ADAPTER,
    )


def trained(trainer):
    """The weights of the adapter, whole; all processes must call this."""
    found = {}
    for name, value in trainer.model.named_parameters():
        if not value.requires_grad:
            continue
        with gathered(value):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name] = whole.detach().clone()
    return found


def gathered(value):
    """A parameter that ZeRO-3 has taken apart, put together."""
    if not hasattr(value, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value])


def record(trainer):
    """What a run leaves behind."""
    weights = trained(trainer)
    digest = hashlib.sha256(b"".join(value.float().numpy().tobytes() for value in weights.values()))
    identity = engines.identity(trainer)
    frozen = [value for value in trainer.model.parameters() if not value.requires_grad]
    return {
        "identity": identity,
        "frozen_bytes": memory_scenario.size([memory_scenario.local(value) for value in frozen]),
        "frozen": sorted({f"{engines.kind(value)} {type(value).__name__} {value.dtype}" for value in frozen}),
        "dtypes": sorted({str(value.dtype) for value in weights.values()}),
        "weights": digest.hexdigest(),
        "norms": {name: float(value.double().norm()) for name, value in weights.items()},
        "log": [
            {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
            for entry in trainer.state.log_history
        ],
    }


def run(name, model, output):
    """Train to the end, and again from the middle."""
    whole = build(name, model, output)
    start = trained(whole)
    whole.train()
    moved = any(not torch.equal(value, start[key]) for key, value in trained(whole).items())
    result = record(whole)
    again = build(name, model, output)
    again.train(resume_from_checkpoint=str(Path(output, f"checkpoint-{SAVED_AT}")))
    return {"moved": moved, "whole": result, "resumed": record(again)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL, OUTPUT, *NAMES = sys.argv[1:]
    for NAME in NAMES:
        result = run(NAME, MODEL, Path(OUTPUT, NAME))
        Path(OUTPUT, f"{NAME}-rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
