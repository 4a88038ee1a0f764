"""What the shared prefix needs of transformers and TRL: attention, hidden states, positions and picture features.

Assumed, and pinned down by `tests/test_upstream_shared_prefix.py`:

- a four-dimensional attention mask reaches the attention function as it is;
- models look their attention function up in `AttentionInterface` by the name in their configuration;
- the mask function "flex_attention" of `AttentionMaskInterface` makes block masks of functions, and models take them;
- the fused head scores the `last_hidden_state` that the backbone `base_model` returns, whatever its length;
- models with multi-axis RoPE compute their positions in `get_rope_index`, and take them as `position_ids`.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

SPLIT_ATTENTION = "sdpa"
DENSE_ATTENTION = "eager"
BLOCK_ATTENTION = "flex_attention"
# Kernels sum over keys in chunks. A last one cut short rounds otherwise, which in half precision shows in the prompts
CHUNK = 16
STATELESS_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# A model has many modules, and every batch asks
_LOOKS_UP: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class SplitAttention:
    """
    Attention over rows [prompt | longer side | shorter side], each side blind to the other; `attention` for all else.

    Rows are known by their mask, that of [`~trl_cwdpo.prefix_layout.PrefixLayout.side_mask`]: it has fewer columns
    than there are keys, which no other mask has. Prompts attend causally among themselves and need no mask, since
    their padding comes behind them; each side attends to its prompt and to itself. Sides beyond the first two follow
    in blocks as wide as the longest, but for the last one.

    Args:
        attention (`Callable`):
            An attention function of transformers that takes `is_causal`.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self._additive = WeakTensorKeyDictionary()

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; see `AttentionInterface` of transformers for arguments and result."""
        if attention_mask is None or attention_mask.dim() != 4 or not _covers_sides_only(attention_mask, query, key):
            return self.attention(module, query, key, value, attention_mask, **kwargs)
        attention_mask = self._as_additive(attention_mask, query.dtype)
        rows, columns = attention_mask.shape[-2:]
        prompt = columns - rows
        kwargs["is_causal"] = True
        # Without padding between them, prompt and longer side are one causal sequence
        is_padded = attention_mask.shape[0] > 1
        first = min(-(-prompt // CHUNK) * CHUNK, columns) if is_padded else columns
        parts = [self.attention(module, query[:, :, :first], key[:, :, :first], value[:, :, :first], None, **kwargs)]
        if is_padded:
            parts = [(parts[0][0][:, :prompt], None)]
            side = query[:, :, prompt:columns], key[:, :, :columns], value[:, :, :columns]
            parts.append(self.attention(module, *side, attention_mask, **kwargs))
        for start in range(columns, query.shape[2], rows):
            block = slice(start, start + rows)
            keys, values = (torch.cat([x[:, :, :prompt], x[:, :, block]], dim=2) for x in (key, value))
            mask = attention_mask[..., : keys.shape[2] - prompt, : keys.shape[2]]
            parts.append(self.attention(module, query[:, :, block], keys, values, mask, **kwargs))
        return torch.cat([output for output, _ in parts], dim=1), None

    def _as_additive(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Kernels add their masks. From one of bools each layer would make its own, and keep it for the backward pass
        added = self._additive.get(mask)
        if added is None or added.dtype != dtype:
            added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._additive[mask] = added
        return added


def _covers_sides_only(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[2] == key.shape[2] > mask.shape[-1] > 1


def register_split_attention() -> None:
    """
    Let the attention implementation "sdpa" take the masks of shared prefixes, once.

    Every other call is passed on, so that models, their configurations and generation stay as they are.
    """
    attention = AttentionInterface()[SPLIT_ATTENTION]
    if not isinstance(attention, SplitAttention):
        AttentionInterface.register(SPLIT_ATTENTION, SplitAttention(attention))


def block_mask(attends: Callable[..., torch.Tensor], length: int, device: torch.device) -> Any:  # noqa: ANN401 (torch's)
    """
    The block mask of a row, by the function that makes them for transformers' own models.

    Args:
        attends (`Callable`):
            Of batch, head, place and place attended to.
        length (`int`):
            Tokens of the row.
        device (`torch.device`):
            Where it is used.

    Returns:
        [`~torch.nn.attention.flex_attention.BlockMask`]: blocks that nobody attends to are not computed.
    """
    build = AttentionMaskInterface()[BLOCK_ATTENTION]
    return build(batch_size=1, q_length=length, kv_length=length, mask_function=attends, device=device)


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention implementation of a model's decoder."""
    return str(model.config.get_text_config()._attn_implementation)


def looks_up_attention(model: PreTrainedModel) -> bool:
    """Whether a model takes its attention function from `AttentionInterface`."""
    if model not in _LOOKS_UP:
        parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
        _LOOKS_UP[model] = all(part._can_set_attn_implementation() for part in parts)
    return _LOOKS_UP[model]


def attention_window(config: PretrainedConfig) -> int | None:
    """
    The number of tokens up to which every layer of a decoder attends to all tokens before.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Of the decoder.

    Returns:
        `int`, or `None` without a limit.
    """
    layers = getattr(config, "layer_types", None)
    limits = []
    for name, layer in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        limit = getattr(config, name, None)
        if limit is not None and (layers is None or layer in layers):
            limits.append(int(limit))
    return min(limits, default=None)


def stateful_layers(config: PretrainedConfig) -> set[str]:
    """The kinds of layers of a decoder that carry a state along a row, so that a side would see the other."""
    return set(getattr(config, "layer_types", None) or ()) - STATELESS_LAYERS


@contextlib.contextmanager
def scored_places(model: PreTrainedModel, index: torch.Tensor) -> Iterator[None]:
    """
    For the duration, the head of `model` sees the hidden states of some places only.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.
        index (`torch.Tensor` of shape `(rows, places)`):
            Places in the backbone's rows laid end to end.
    """

    def pick(_module: nn.Module, _args: Any, outputs: Any) -> Any:  # noqa: ANN401 (a hook of torch)
        hidden = outputs.last_hidden_state
        picked = hidden.flatten(0, 1).index_select(0, index.flatten().to(hidden.device))
        outputs.last_hidden_state = picked.view(*index.shape, -1)
        return outputs

    hook = model.base_model.register_forward_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def map_per_token(
    outputs: FusedCausalLMOutput, function: Callable[[torch.Tensor], torch.Tensor]
) -> FusedCausalLMOutput:
    """
    Outputs of a fused forward with `function` applied to everything that is said of each token.

    Args:
        outputs ([`FusedCausalLMOutput`]):
            Outputs; subclasses keep their class.
        function (`Callable`):
            Takes and returns a tensor with one value for each token.

    Returns:
        [`FusedCausalLMOutput`].
    """
    values = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    for name, value in values.items():
        if torch.is_tensor(value) and value.dim() == 2:
            values[name] = function(value)
    return type(outputs)(**values)


def multi_axis_positions(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor | None:
    """
    The positions that a model with multi-axis RoPE gives to a batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.
        inputs (`dict`):
            What the usual forward gets.

    Returns:
        `torch.Tensor` of shape `(axes, rows, columns)`, or `None` for a model or batch whose positions are a count.
    """
    get_rope_index = getattr(model.base_model, "get_rope_index", None)
    if get_rope_index is None or not any(name.endswith("_grid_thw") for name in inputs):
        return None
    known = inspect.signature(get_rope_index).parameters
    positions, _ = get_rope_index(**{name: value for name, value in inputs.items() if name in known})
    return positions
