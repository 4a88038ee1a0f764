"""Sampling with the policy of a run, as TRL's own on-policy trainers do it.

Assumptions, pinned down by `tests/test_upstream_generation.py`:

- `unwrap_model_for_generation` gathers ZeRO-3's weights and `DistributedBackend.summon_full_params` FSDP1's; under
  FSDP2 `generate` gathers them layer by layer, on all processes together. That takes `synced_gpus`, by which a process
  whose responses have ended goes on until those of all have. `generate` sets it where it takes a model for sharded;
  for FSDP2, where that depends on who sharded it, it is set here;
- what a `GenerationConfig` passed to `generate` sets explicitly wins over the model's own;
- a model with TRL's fused head still generates.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import GenerationConfig
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head

from .sharding import has_fsdp2_shards

__all__ = ["GeneratingPolicy", "add_scoring_head", "image_token_ids", "stop_token_ids"]


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:  # noqa: ANN401 (any model and tokenizer)
    """Every token that the model or its tokenizer declares as the end of a response."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*declared, *own})


def image_token_ids(config: Any) -> list[int]:  # noqa: ANN401 (any configuration)
    """Placeholders of pictures and videos: sampled ones would have no picture behind them."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return sorted({token for token in found if isinstance(token, int)})


@dataclass
class GeneratingPolicy:
    """
    A policy that can generate wherever its weights are: on one device, replicated, or sharded.

    Args:
        model (`nn.Module`):
            The policy, as wrapped by accelerate.
        accelerator ([`~accelerate.Accelerator`]):
            The run's.
        gather_deepspeed3_params (`bool`, *optional*, defaults to `True`):
            Whether ZeRO-3 gathers all weights for generation, rather than layer by layer.
        gradient_checkpointing_kwargs (`dict`, *optional*):
            How to turn gradient checkpointing on again afterwards.
    """

    model: nn.Module
    accelerator: Any
    gather_deepspeed3_params: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] | None = None

    @contextlib.contextmanager
    def unwrapped(self) -> Iterator[Any]:
        """The transformers or PEFT model, its weights in place."""
        backend = DistributedBackend(self.accelerator)
        wrapped: Any = self.model
        with (
            unwrap_model_for_generation(
                wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.gather_deepspeed3_params,
                gradient_checkpointing_kwargs=self.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            backend.summon_full_params(wrapped, recurse=False),
        ):
            yield model

    def generate(self, inputs: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
        """
        Continue prompts. All processes must call this together, with at least one row each.

        Args:
            inputs (`dict`):
                Prompts, padded on the left, with their pictures.
            options (`dict`):
                Arguments of [`~transformers.GenerationConfig`].

        Returns:
            `torch.Tensor` of shape `(rows, T)`: the new tokens, padded after their end.
        """
        config = GenerationConfig(**options, disable_compile=True)
        with self.unwrapped() as model:
            if getattr(model.config.get_text_config(), "output_router_logits", False):
                # The load-balancing loss, of no use here, fails where a cache makes the mask longer than the input
                inputs = {**inputs, "output_router_logits": False}
            synced = True if has_fsdp2_shards(model) and self.accelerator.num_processes > 1 else None
            outputs = model.generate(**inputs, generation_config=config, synced_gpus=synced)
        return outputs[:, inputs["input_ids"].size(1) :]


def add_scoring_head(model: Any) -> None:  # noqa: ANN401 (a transformers or PEFT model)
    """Let a model return per-token log-probabilities (`fused_lm_head=True`), as TRL's trainers do."""
    add_fused_lm_head(model.get_base_model() if is_peft_model(model) else model, outputs=("log_probs",))
