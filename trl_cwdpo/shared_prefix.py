"""The fast path: prompt and pictures of a pair are computed once, for both of its responses.

A pair is one row [prompt | one response | the other] instead of two rows that begin alike
([`~trl_cwdpo.prefix_layout.PrefixLayout`]). Positions go on from the prompt for either response, neither attends to
the other, and the head scores the places that predict responses. The outputs are put back into the order of the usual
forward pass, so that losses and metrics do not know the difference.

[`SharedPrefix`] stands in for the model. Before it does so for the first time it compares both ways on a batch, in
eval mode and without gradients; where they disagree, or a model cannot be run so, every batch takes the usual way.
"""

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from . import upstream
from .pictures_once import TEXT_TENSORS, with_pictures_twice
from .prefix_layout import PackedRows, PrefixLayout, find_layout
from .preserved import evaluation_mode, preserved_random_state
from .upstream import picture_features as features_of
from .upstream import shared_prefix as internals

logger = logging.getLogger(__name__)

Layout = PrefixLayout | PackedRows

# Mean absolute difference of the responses' log-probabilities, nats per token, up to which both ways are the same
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Estimated relative cost from which "auto" takes the usual way
WORTHWHILE = 0.97
# Values of `DistributedType` under which weights are whole within forward passes only
SHARDING = {"FSDP", "DEEPSPEED", "MEGATRON_LM"}
LABELS = ("labels", "gap_labels")


class SharedPrefixError(ValueError):
    """`share_prefix=True`, and the model cannot be run so."""


class SharesPrefixes:
    """Mixin of the trainers: how they run pairs, and how batches reach them."""

    @functools.cached_property
    def _shared_prefix(self) -> "SharedPrefix":
        trainer: Any = self
        option = trainer.args.share_prefix or False
        if option == "auto" and getattr(trainer.args, "cooling_mode", None) == "off":
            option = False  # plain DPO, bit for bit
        return SharedPrefix(trainer.accelerator, option, trainer_obstacle(trainer))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        trainer: Any = super()
        return with_pictures_twice(trainer._prepare_inputs(inputs))


class PictureFeatures:
    """
    Features of the pictures of the batch at hand, for policy and reference alike where neither trains their modules.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's. Where it shards weights, every forward pass computes its own features.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._is_sharded = accelerator.distributed_type.value in SHARDING
        self._of: tuple[weakref.ref[torch.Tensor], weakref.ref[Any], Any] | None = None
        self._same: dict[tuple[int, int], bool] = {}

    def put_into(self, model: Any, rows: dict[str, Any], pixel_values: torch.Tensor) -> None:  # noqa: ANN401
        """
        Replace pictures by their features where these are the same for policy and reference.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Model without wrappers.
            rows (`dict`):
                Arguments of its forward pass, changed in place.
            pixel_values (`torch.Tensor`):
                The batch's own tensor, by which its second use is recognised.
        """
        if self._is_sharded or not features_of.takes_features(model) or not features_of.are_fixed(model):
            return
        features = self._known(model, pixel_values)
        if features is None:
            with self.accelerator.autocast():
                features = features_of.picture_features(model, rows)
            self._of = weakref.ref(pixel_values), weakref.ref(model), features
        del rows["pixel_values"]
        rows["mm_encoder_outputs"] = {"image": features}

    def _known(self, model: Any, pixel_values: torch.Tensor) -> Any:  # noqa: ANN401 (as above)
        if self._of is None or self._of[0]() is not pixel_values:
            return None
        encoder: Any = self._of[1]()
        features = self._of[2]
        if encoder is None:
            return None
        if encoder is not model:
            pair = (id(encoder), id(model))
            if pair not in self._same:
                self._same[pair] = features_of.same_weights(encoder, model)
            if not self._same[pair]:
                return None
        return features


class SharedPrefix:
    """
    Runs fused forward passes of preference batches with one row for each pair.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's. All ranks must make their calls together until the first comparison is done.
        option (`bool` or `str`):
            `share_prefix`: `"auto"`, or `True` to raise where `"auto"` would fall back, or `False`.
        obstacle (`str`, *optional*):
            Something known from the start that makes the fast path impossible.
    """

    def __init__(self, accelerator: Accelerator, option: bool | int | str, obstacle: str | None = None) -> None:  # noqa: FBT001
        self.accelerator = accelerator
        self.option = option
        # Of each model without wrappers, by its id: None once it is verified, or why it is not run so
        self.verdicts: dict[int, str | None] = {}
        self._told: set[str] = set()
        self._obstacle = obstacle
        self._features = PictureFeatures(accelerator)
        # Tokens and labels of the last batch, for which attention it was laid out, and how
        self._last: tuple[tuple[weakref.ref[torch.Tensor], ...], str, Layout | str] | None = None
        if option:
            internals.register_split_attention()

    def stand_in(self, model: nn.Module) -> Callable[..., Any]:
        """
        A stand-in for a model that shares prefixes in fused calls, and passes every other call on.

        Args:
            model (`nn.Module`):
                The policy or the reference, as wrapped by accelerate.

        Returns:
            `Callable`, the model itself with `share_prefix=False`.
        """
        if not self.option:
            return model

        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the model's own signature)
            return self.forward(model, kwargs) if upstream.is_fused_call(kwargs) else model(*args, **kwargs)

        return run

    def allows(self, model: nn.Module) -> bool:
        """Whether option, set-up and configuration let probes share prefixes, in rows of their own of whole models."""
        is_sharded = self.accelerator.distributed_type.value in SHARDING
        if not self.option or is_sharded or self._obstacle is not None:
            return False
        inner = upstream.unwrapped(model)
        return model_obstacle(inner) is None and internals.attention_of(inner) != internals.BLOCK_ATTENTION

    def forward(self, model: nn.Module, kwargs: dict[str, Any]) -> upstream.FusedCausalLMOutput:
        """
        The fused forward pass of a preference batch.

        Args:
            model (`nn.Module`):
                The policy or the reference, as wrapped by accelerate.
            kwargs (`dict`):
                Arguments of the usual forward pass.

        Returns:
            [`FusedCausalLMOutput`], as the usual forward pass returns it.

        Raises:
            SharedPrefixError: With `share_prefix=True`, if the model cannot be run so.
        """
        inner = upstream.unwrapped(model)
        if self.verdicts.get(id(inner)) is not None:
            return model(**kwargs)
        layout = self._layout(inner, kwargs)
        if id(inner) not in self.verdicts:
            self._verify(model, kwargs, layout)
        if self.verdicts.get(id(inner)) is not None:
            return model(**kwargs)
        if isinstance(layout, str):
            self._tell_once(f"`share_prefix`: a batch is computed without sharing, since {layout}.")
            return model(**kwargs)
        if id(inner) not in self.verdicts:
            return model(**kwargs)  # another process could not compare yet
        if self.option == "auto" and relative_cost(inner, layout) > WORTHWHILE:
            return model(**kwargs)
        return run_rows(model, layout, kwargs, self._features)

    def _layout(self, inner: Any, kwargs: dict[str, Any]) -> Layout | str:  # noqa: ANN401 (as above)
        found = row_obstacle(inner, kwargs)
        if found is not None:
            return found
        tensors, attention = (kwargs["input_ids"], kwargs["labels"]), internals.attention_of(inner)
        # The reference gets the very tensors of the policy
        known = self._last
        if known is None or known[1] != attention or any(a() is not b for a, b in zip(known[0], tensors, strict=True)):
            known = self._last = tuple(map(weakref.ref, tensors)), attention, pair_layout(inner, kwargs)
        return known[2]

    def _verify(self, model: nn.Module, kwargs: dict[str, Any], layout: Layout | str) -> None:
        # Sharded models wait for one another: every rank makes the same forwards, and all come to the same verdict
        inner = upstream.unwrapped(model)
        static = self._obstacle or model_obstacle(inner)
        reason, known = (static, True) if static else self._compare(model, kwargs, layout)
        verdict = torch.tensor([0 if reason else 1 if known else 2], device=self.accelerator.device)
        found = set(self.accelerator.gather(verdict).tolist())
        if found == {2}:
            return  # no batch could be compared: the next one may
        if 0 not in found:
            self.verdicts[id(inner)] = None
            return
        reasons = [text for text in gather_object([reason]) if text]
        self.verdicts[id(inner)] = reasons[0]
        if self.option is True:
            raise SharedPrefixError(
                f"`share_prefix=True`, but prompts cannot be shared: {reasons[0]}. Set `share_prefix='auto'` to "
                "compute each response with its own prompt where that is so, or False."
            )
        self._tell_once(f"`share_prefix='auto'`: each response is computed with its own prompt, since {reasons[0]}.")

    def _compare(self, model: nn.Module, kwargs: dict[str, Any], layout: Layout | str) -> tuple[str | None, bool]:
        # What is wrong, and whether this batch could tell
        with preserved_random_state(), evaluation_mode(model), torch.no_grad():
            usual = upstream.per_token_logps(model(**kwargs))
            if isinstance(layout, str):
                model(**kwargs)
                return None, False
            try:
                shared = upstream.per_token_logps(run_rows(model, layout, kwargs, self._features))
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                text = str(error).splitlines()[0] if str(error) else ""
                return f"a model of the class {type(upstream.unwrapped(model)).__name__} fails: {text}", True
        tokens = (kwargs["labels"][:, 1:] != -100).to(usual.device)
        difference = (shared - usual)[tokens].abs().double().mean().item()
        limit = self.tolerance(model)
        if difference <= limit:
            return None, True
        name = type(upstream.unwrapped(model)).__name__
        return (
            f"the log-probabilities of {name} then differ by {difference:.3g} nats per token on the first batch, more "
            f"than the {limit:g} that rounding explains"
        ), True

    def tolerance(self, model: nn.Module) -> float:
        """Mean absolute difference of log-probabilities, nats per token, that rounding explains."""
        dtypes = {parameter.dtype for parameter in upstream.unwrapped(model).parameters()} & TOLERANCES.keys()
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if torch.get_float32_matmul_precision() != "highest" and self.accelerator.device.type == "cuda":
            dtypes.add(torch.float16)  # TF32 keeps as many digits
        return max(TOLERANCES[dtype] for dtype in dtypes | ({mixed} if mixed else set()))

    def _tell_once(self, message: str) -> None:
        if message not in self._told and self.accelerator.is_main_process:
            logger.warning(message)
        self._told.add(message)


def trainer_obstacle(trainer: Any) -> str | None:  # noqa: ANN401 (either trainer)
    """
    What keeps a trainer from sharing prefixes, as far as its set-up tells.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            Trainer that is set up.

    Returns:
        `str`, or `None`.
    """
    if trainer.aux_loss_enabled:
        return "the load-balancing loss of a mixture of experts counts every token of a batch"
    adapters = getattr(trainer.model, "peft_config", {}).values()
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "prompt learning (PEFT) puts virtual tokens in front of a row"
    if trainer.args.torch_compile:
        return "`torch_compile=True` does not see hooks that come and go"
    if trainer.args.n_gpu > 1:
        return "`DataParallel` cuts batches apart (launch one process for each device)"
    return None


def model_obstacle(model: Any) -> str | None:  # noqa: ANN401 (a model of transformers)
    """
    What keeps a model from sharing prefixes, as far as its configuration tells.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.

    Returns:
        `str`, or `None`.
    """
    config = model.config.get_text_config()
    implementation = internals.attention_of(model)
    if implementation not in (internals.SPLIT_ATTENTION, internals.DENSE_ATTENTION, internals.BLOCK_ATTENTION):
        return f"`attn_implementation={implementation!r}` takes no mask that hides a response (use 'sdpa')"
    if layers := internals.stateful_layers(config):
        return f"layers of the kind {sorted(layers)[0]!r} carry a state along the row"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder model has no prefix to share"
    return None


def batch_layout(model: Any, kwargs: dict[str, Any]) -> Layout | str:  # noqa: ANN401 (as above)
    """
    The layout of a batch, or why it cannot be shared.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.
        kwargs (`dict`):
            Arguments of the usual forward pass.

    Returns:
        [`PrefixLayout`] or `str`.
    """
    return row_obstacle(model, kwargs) or pair_layout(model, kwargs)


def row_obstacle(model: Any, kwargs: dict[str, Any]) -> str | None:  # noqa: ANN401 (as above)
    """What keeps a model from sharing the prefixes of a batch, whatever its pairs are like."""
    if "token_type_ids" in kwargs:
        return "tokens of pictures attend to one another (`token_type_ids`)"
    window = internals.attention_window(model.config.get_text_config())
    if window is not None and kwargs["input_ids"].size(1) > window:
        return f"rows of {kwargs['input_ids'].size(1)} tokens exceed the attention window of {window}"
    return None


def pair_layout(model: Any, kwargs: dict[str, Any]) -> Layout | str:  # noqa: ANN401 (as above)
    """The layout of a batch, packed where the model's attention takes that, or why its pairs share no prefix."""
    for name, value in vision_inputs(kwargs).items():
        halves = value.chunk(2)
        if len(value) % 2 or not torch.equal(*halves):
            return f"chosen and rejected rows differ in `{name}`"
    layout = find_layout(kwargs["input_ids"], kwargs.get("attention_mask"), kwargs["labels"])
    packs = internals.attention_of(model) == internals.BLOCK_ATTENTION
    return PackedRows(layout) if packs and not isinstance(layout, str) else layout


def vision_inputs(kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those tensors of a batch that describe pictures, not tokens."""
    text = {*TEXT_TENSORS, *LABELS}
    return {name: value for name, value in kwargs.items() if torch.is_tensor(value) and name not in text}


def relative_cost(model: Any, layout: Layout) -> float:  # noqa: ANN401 (as above)
    """Estimated cost of the rows of a layout, relative to the usual forward pass."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None) or 1
    # Where there is no Triton, TRL's head scores every token
    head = config.vocab_size / config.num_hidden_layers if model.device.type == "cpu" else 0.0
    return layout.relative_cost(hidden, getattr(config, "intermediate_size", None) or 4 * hidden, head)


def run_rows(
    model: nn.Module, layout: Layout, kwargs: dict[str, Any], features: PictureFeatures | None = None
) -> upstream.FusedCausalLMOutput:
    """
    A fused forward pass with one row for each pair.

    Args:
        model (`nn.Module`):
            The policy or the reference, as wrapped by accelerate.
        layout ([`PrefixLayout`]):
            Layout of the batch.
        kwargs (`dict`):
            Arguments of the usual forward pass.
        features ([`PictureFeatures`], *optional*):
            Keeps the features of the batch's pictures.

    Returns:
        [`FusedCausalLMOutput`], as the usual forward pass returns it.
    """
    inner = upstream.unwrapped(model)
    text = {name: value for name, value in kwargs.items() if name in TEXT_TENSORS - set(LABELS)}
    pictures = {name: value.chunk(2)[0] for name, value in vision_inputs(kwargs).items()}
    rows = {name: value for name, value in kwargs.items() if not torch.is_tensor(value)}
    rows |= {name: layout.labels(kwargs[name]) for name in LABELS if name in kwargs}
    rows |= row_inputs(inner, layout, text, pictures)
    if features is not None and "pixel_values" in kwargs:
        features.put_into(inner, rows, kwargs["pixel_values"])
    with internals.scored_places(inner, layout.scored_index):
        outputs = model(**rows)
    return internals.map_per_token(outputs, layout.restore)


def row_inputs(
    model: Any,  # noqa: ANN401 (as above)
    layout: Layout,
    text: dict[str, torch.Tensor],
    pictures: dict[str, Any],
) -> dict[str, Any]:
    """
    Inputs of a forward pass with one row for each pair.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.
        layout ([`PrefixLayout`]):
            Layout of the batch.
        text (`dict`):
            What the usual forward pass gets of each token, tensors of shape `(2B, T)`, or as many rows as the layout
            has responses; no labels.
        pictures (`dict`):
            What it gets of the pictures of one half.

    Returns:
        `dict`: The rows, with positions and mask.
    """
    first = {name: value[: layout.pairs] for name, value in text.items()}
    positions = internals.multi_axis_positions(model, {**first, **pictures})
    return {
        **{name: layout.rows(value) for name, value in text.items()},
        **pictures,
        "position_ids": layout.positions(positions),
        "attention_mask": attention_mask(model, layout),
    }


def attention_mask(model: Any, layout: Layout) -> Any:  # noqa: ANN401 (as above)
    """The mask of the rows of a layout, in the form that the attention implementation of a model takes."""
    if isinstance(layout, PackedRows):
        return layout.mask(functools.partial(internals.block_mask, device=layout.scored_index.device))
    if internals.attention_of(model) == internals.SPLIT_ATTENTION and internals.looks_up_attention(model):
        return layout.side_mask
    mask = layout.dense_mask()
    if internals.attention_of(model) == internals.SPLIT_ATTENTION:
        return mask
    # Eager attention adds its mask
    dtype = model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
