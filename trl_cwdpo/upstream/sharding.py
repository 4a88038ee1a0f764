"""What sharding with FSDP2 takes to be right for every model, vision-language ones included.

- accelerate wraps the layers that a model's `_no_split_modules` names and stops at a name the model doesn't have.
- It makes [final norm, head] one unit where it finds the norm, and the head a unit of its own where it does not, as in
  LLaVA. The fused head reads the head's weight without calling the head, so that in the second case nothing gathers
  it; upstream's `weight.full_tensor()` then gives each rank the gradient of its own rows of the batch only.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

__all__ = ["has_fsdp2_shards", "prepare_for_sharding"]


def has_fsdp2_shards(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def prepare_for_sharding(model: PreTrainedModel) -> None:
    """
    Let a model be sharded with FSDP2, and its head be gathered within the fused forward. Without FSDP2 nothing
    changes.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without PEFT wrapper, before it is sharded.
    """
    name_only_present_layers(model)

    def gather_head(backbone: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ANN401 (the backbone's own)
        head: Any = model.get_output_embeddings()
        if isinstance(getattr(head, "weight", None), DTensor) and isinstance(head, FSDPModule):
            # FSDP reduces the gradients and shards the head again at the end of the backward pass
            head.unshard()

    model.base_model.register_forward_hook(gather_head)


def name_only_present_layers(model: nn.Module) -> None:
    """
    Take names of layers that a model doesn't have off the list of those to shard one by one.

    A composite model inherits them from its parts: LLaVA, of whose CLIP it has the vision tower only, also names the
    text embeddings of CLIP.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without PEFT wrapper; its `_no_split_modules` is replaced.
    """
    named = getattr(model, "_no_split_modules", None)
    if named:
        present = {type(module).__name__ for module in model.modules()}
        model._no_split_modules = type(named)(name for name in named if name in present)
