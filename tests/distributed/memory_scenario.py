"""What a process really holds: bytes of weights, gradients and optimizer after a batch; called on an engine.

`memory_scenario.py MODEL OUTPUT PRECISION`, "no" or "bf16"; process r writes `OUTPUT/rank<r>.json`.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import engines
import tiny
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def local(tensor):
    """The part of a tensor that is on this process."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors):
    """Bytes of different storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def everything():
    """All tensors of this process, shards within others included."""
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and not item.is_meta]
    # Known to the tensors alone until they are asked for
    gradients = [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return [local(tensor) for tensor in found + gradients]


def optimizer_state(optimizer):
    """Moments, and the float32 copy of the weights where DeepSpeed keeps one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return [local(value) for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]


class Weigh(TrainerCallback):
    """Weighs between the batches of a step, when gradients are there and activations are not."""

    def __init__(self, trainer, before):
        self.trainer, self.before, self.found = trainer, before, {}

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step != 1:  # moments are there from the first update on
            return
        gc.collect()
        self.found = {
            "parameters": size([local(parameter) for parameter in self.trainer.model.parameters()]),
            "moments": size(optimizer_state(self.trainer.optimizer)),
            "all": size(everything()) - self.before,
        }


def parameters_of(model):
    """Number of parameters of a model in a folder."""
    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model).parameters())


def weigh(model, output, precision, engine):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    options |= {
        "bf16": precision == "bf16",
        "reference_cache_dir": str(output / f"cache-{precision}"),
        "max_length": 16,
    }
    args = CWDPOConfig(**tiny.training_options(output, **options, **engine.options), cooling_mode="gate")
    gc.collect()
    before = size(everything())
    trainer = CWDPOTrainer(model, args=args, train_dataset=tiny.pairs(16))
    scale = Weigh(trainer, before)
    trainer.add_callback(scale)
    trainer.train()
    identity = engines.identity(trainer)
    assert identity == engines.expected_identity(engine, reference=False), identity
    return scale.found


if __name__ == "__main__":
    torch.set_num_threads(1)
    ENGINE = engines.this_engine()
    MODEL, OUTPUT, PRECISION = sys.argv[1:]
    result = weigh(MODEL, Path(OUTPUT), PRECISION, ENGINE)
    Path(OUTPUT, f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
