"""What training on weights quantised by bitsandbytes takes, beyond what TRL and PEFT do.

- TRL makes the adapters of a quantised model bfloat16; PEFT's `load_adapter`, with which transformers resumes, makes
  them float32 again, and the losses after a resume are others.
- int8 weights multiply what was rounded to 8 bits, but for columns where any row of the batch has an outlier: results
  depend on the batch. On CPU they do so in evaluation mode only.
- On a CPU with AVX512-BF16, the first forward without gradients in evaluation mode packs 4-bit weights for inference.
  That rounds their scales, and the packed weights have no backward: whatever is trained below them stands still.
- FSDP2 shards 4-bit weights that are stored as floats (`bnb_4bit_quant_storage`), and accelerate keeps others whole on
  each process. int8 weights become plain parameters without the scales that bitsandbytes keeps with them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

__all__ = ["keep_trainable", "kept_dtypes", "rounds_inputs"]


def keep_trainable(*models: nn.Module | None) -> None:
    """
    Keep bitsandbytes from packing 4-bit weights for inference on CPU, and refuse what cannot be trained. Other models
    stay as they are.

    Args:
        *models (`nn.Module` or `None`):
            Models that are trained, or compared with one that is.

    Raises:
        ValueError: If a model's weights are packed already, or are 8-bit weights under FSDP.
    """
    if any(map(rounds_inputs, models)) and PartialState().distributed_type == DistributedType.FSDP:
        raise ValueError(
            "`load_in_8bit=True` cannot be trained under FSDP, which takes 8-bit weights apart from their scales. Use "
            "`load_in_4bit=True`, or DDP or DeepSpeed ZeRO."
        )
    for module in (module for model in models if model is not None for module in model.modules()):
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "The 4-bit weights of `model` are packed for inference and cannot be trained: bitsandbytes does this "
                "when a model is evaluated on this CPU. Load the model again and pass it to the trainer first."
            )
        packs: Any = module
        packs.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """
    Give the weights that are trained their types back after something was loaded into them.

    Args:
        model (`nn.Module`):
            The model. Only parameters that require gradients count.
    """
    dtypes = {name: value.dtype for name, value in model.named_parameters() if value.requires_grad}
    try:
        yield
    finally:
        # By name: PEFT puts new parameters in place of the old ones
        for name, value in model.named_parameters():
            if name in dtypes and value.dtype != dtypes[name]:
                value.data = value.data.to(dtypes[name])


def rounds_inputs(model: nn.Module | None) -> bool:
    """
    Whether a row's output depends on the other rows of its batch, as with int8 weights.

    Args:
        model (`nn.Module`, *optional*):
            The model, with or without PEFT's wrapper.
    """
    return bool(getattr(model, "is_loaded_in_8bit", False))
