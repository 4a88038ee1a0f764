"""The only package that touches internals of TRL and transformers.

What both trainers assume about them stands here, a few lines each, and is pinned down by `tests/test_upstream.py`,
whose failures say which assumption a new release broke; what single features need is in the modules beside:

- `DPOTrainer._compute_loss` calls its model once with `fused_lm_head=True`, *before* it reads `ref_chosen_logps` and
  `ref_rejected_logps` from its inputs, which it does where `precompute_ref_logps` is set;
- the outputs of that call hold `log_probs` per token, zero outside the labels, chosen rows first;
- `DPOTrainer._prepare_dataset` needs of its trainer only `_tokenizer`, and the preference collators need no trainer;
- the fused forward runs the backbone `base_model` and scores its `last_hidden_state` with the output embeddings, which
  is all that [`scoring_forward`] does in its place.
"""

import contextlib
import functools
import importlib.resources
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id, maybe_gather_lm_head_ctx, use_adapter

from trl_cwdpo.probe_measures import OutputHead

from .processors import for_responses

__all__ = [
    "FusedCausalLMOutput",
    "PolicyTap",
    "accelerate_config_words",
    "add_smoothing_gap",
    "chosen_outputs",
    "dispatches_batches",
    "inner_model",
    "is_fused_call",
    "is_peft_model",
    "is_training",
    "metrics_mode",
    "per_token_logps",
    "preference_collator",
    "prepare_preference_dataset",
    "reference_forward",
    "references_in_inputs",
    "replay",
    "resolve_config",
    "scoring_forward",
    "smoothing_gap",
    "unwrapped",
]


Config = TypeVar("Config", bound=TrainingArguments)


def inner_model(trainer: Any) -> PreTrainedModel:  # noqa: ANN401 (any TRL trainer)
    """The transformers model of a trainer, without its PEFT wrapper."""
    return trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model


def resolve_config(config_class: type[Config], args: Config | None, model: Any, suffix: str) -> Config:  # noqa: ANN401
    """
    The trainer's `args`, or a default configuration named after the model.

    Args:
        config_class (`type`):
            Class that `args` must have.
        args (`config_class`, *optional*):
            What the user gave.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model, for the name of the output directory.
        suffix (`str`):
            Its ending.

    Returns:
        `config_class`.

    Raises:
        TypeError: If `args` is of another class.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.rstrip('/').split('/')[-1]}-{suffix}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"`args` must be a `{config_class.__name__}`, got a `{type(args).__name__}`. The options are the same: "
            "change the name of the class."
        )
    return args


def is_fused_call(kwargs: dict[str, Any]) -> bool:
    """Whether a forward call asks for per-token log-probabilities rather than logits."""
    return bool(kwargs.get("fused_lm_head"))


class PolicyTap:
    """
    Stands in for the model of one loss computation: runs it as asked, and shows the outputs before they are used.

    Args:
        model (`Callable`):
            The policy, as wrapped by accelerate, or its stand-in.
        on_outputs (`Callable`):
            Called with the outputs and the keyword arguments of the fused forward.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        on_outputs: Callable[[FusedCausalLMOutput, dict[str, Any]], None],
    ) -> None:
        self.model = model
        self.on_outputs = on_outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the model's own signature)
        """Run the model."""
        outputs = self.model(*args, **kwargs)
        if is_fused_call(kwargs):
            self.on_outputs(outputs, kwargs)
        return outputs


def replay(outputs: FusedCausalLMOutput, model: nn.Module) -> Callable[..., Any]:
    """
    A stand-in for the model that answers the fused call with `outputs` and passes every other call on.

    Args:
        outputs ([`FusedCausalLMOutput`]):
            What to answer with.
        model (`nn.Module`):
            Model for the other calls, such as the one for the logits of `compute_metrics`.

    Returns:
        `Callable`.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the model's own signature)
        return outputs if is_fused_call(kwargs) else model(*args, **kwargs)

    return stand_in


def per_token_logps(outputs: FusedCausalLMOutput, length: int | None = None) -> torch.Tensor:
    """
    Per-token log-probabilities of a fused forward.

    Args:
        outputs ([`FusedCausalLMOutput`]):
            Its outputs.
        length (`int`, *optional*):
            Number of positions to keep: prompt-learning PEFT prepends virtual tokens, the real ones are the last.

    Returns:
        `torch.Tensor` of shape `(2B, length)`, nats per token, zero outside the labels.
    """
    if outputs.log_probs is None:
        raise RuntimeError("The fused forward returned no `log_probs`: this version of TRL is not supported.")
    return outputs.log_probs if length is None else outputs.log_probs[:, -length:]


def smoothing_gap(outputs: FusedCausalLMOutput, length: int) -> torch.Tensor:
    """
    z_y − mean_v z_v of a forward through a model given [`add_smoothing_gap`].

    Args:
        outputs ([`FusedCausalLMOutput`]):
            Its outputs.
        length (`int`):
            Number of positions to keep, from the end.

    Returns:
        `torch.Tensor` of shape `(2B, length)`, nats.
    """
    if not isinstance(outputs, SmoothedCausalLMOutput) or outputs.smoothing_gap is None:
        raise RuntimeError("The fused forward returned no `smoothing_gap`: something replaced the model's forward.")
    return outputs.smoothing_gap[:, -length:]


def is_training(trainer: Any) -> bool:  # noqa: ANN401 (any TRL trainer)
    """Whether the trainer is in a training step rather than in an evaluation."""
    return bool(trainer.model.training)


def dispatches_batches(trainer: Any) -> bool:  # noqa: ANN401 (any trainer)
    """Whether one process reads the batches of all, which then hold tensors only."""
    return bool(trainer.args.accelerator_config.dispatch_batches)


def metrics_mode(trainer: Any) -> str:  # noqa: ANN401 (any TRL trainer)
    """Under which key TRL collects the metrics of now."""
    return "train" if is_training(trainer) else "eval"


def reference_forward(
    trainer: DPOTrainer,
    kwargs: dict[str, Any],
    stand_in: Callable[[Any], Callable[..., Any]] | None = None,
) -> FusedCausalLMOutput:
    """
    The reference model's outputs for the call that the policy got.

    The reference is `trainer.ref_model` or, under PEFT, the model with its adapter disabled or replaced by the frozen
    copy "ref". Unlike `compute_ref_log_probs`, it runs in the precision that `DPOTrainer` uses within its loss.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.
        kwargs (`dict`):
            Keyword arguments of the policy's fused forward.
        stand_in (`Callable`, *optional*):
            Returns what to call in place of a model.

    Returns:
        [`FusedCausalLMOutput`].
    """
    # A frozen model needs no load-balancing loss
    kwargs = {key: value for key, value in kwargs.items() if key != "output_router_logits"}
    adapter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    model: Any = getattr(trainer, "ref_model", None)  # a trainer of SFT has none
    if model is None:
        # The wrapped policy would run DDP's bookkeeping for a forward that has no backward
        model = trainer.model
        peft_model: Any = model if isinstance(model, PeftModel) else trainer.accelerator.unwrap_model(model)
        adapter = use_adapter(peft_model, "ref" if "ref" in peft_model.peft_config else None)
    policy: Any = trainer.model
    checkpointing_kwargs: Any = trainer.args.gradient_checkpointing_kwargs
    with torch.no_grad(), disable_gradient_checkpointing(policy, checkpointing_kwargs), adapter:
        return (stand_in(model) if stand_in else model)(**kwargs)


@contextlib.contextmanager
def references_in_inputs(trainer: DPOTrainer) -> Iterator[None]:
    """Have `DPOTrainer._compute_loss` read the reference log-probabilities from its inputs, for the duration."""
    before = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.precompute_ref_logps = before


def prepare_preference_dataset(trainer: Any, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:  # noqa: ANN401
    """Tokenize a preference dataset as `DPOTrainer` does, on behalf of any trainer that has a `_tokenizer`."""
    return DPOTrainer._prepare_dataset(trainer, dataset, processing_class, args, name)


def preference_collator(trainer: Any) -> DataCollatorForPreference | DataCollatorForVisionPreference:  # noqa: ANN401
    """The collator that `DPOTrainer` would build, for the options of another trainer."""
    args = trainer.args
    if trainer._is_vision_dataset:
        return DataCollatorForVisionPreference(
            processor=for_responses(trainer.processing_class),
            max_length=args.max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
    return DataCollatorForPreference(
        pad_token_id=trainer._tokenizer.pad_token_id,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


def chosen_outputs(outputs: FusedCausalLMOutput, rows: int) -> FusedCausalLMOutput:
    """
    The first rows of a fused head's outputs.

    Args:
        outputs ([`FusedCausalLMOutput`]):
            Outputs for at least `rows` rows.
        rows (`int`):
            How many to keep.

    Returns:
        [`FusedCausalLMOutput`], without the loss, which covers all rows.
    """
    per_token = ("log_probs", "entropy", "is_top1", "label_mask")
    kept = {name: getattr(outputs, name)[:rows] for name in per_token}
    return FusedCausalLMOutput(**kept, aux_loss=outputs.aux_loss)


@dataclass
class SmoothedCausalLMOutput(FusedCausalLMOutput):
    """
    Output of a model given [`add_smoothing_gap`].

    Args:
        smoothing_gap (`torch.Tensor` of shape `(batch, seq_len - 1)`):
            z_y − mean_v z_v of each next-token label in nats, zero where `gap_labels` is -100, differentiable.
    """

    smoothing_gap: torch.Tensor | None = None


def logit_scale(config: PretrainedConfig) -> float:
    """Factor between the output projection and the logits, under the names that architectures give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def add_smoothing_gap(model: PreTrainedModel) -> None:
    """
    Let a model with TRL's fused head also return z_y − mean_v z_v, the one thing label smoothing needs of the logits.

    Afterwards `model(..., labels=labels, fused_lm_head=True, gap_labels=gap_labels)` returns a
    [`SmoothedCausalLMOutput`]. The term is computed within the forward, where FSDP and ZeRO-3 can gather the head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that `add_fused_lm_head` was applied to, without PEFT wrapper.
    """
    fused_forward = model.forward
    text_config = model.config.get_text_config()
    scale, softcap = logit_scale(text_config), getattr(text_config, "final_logit_softcapping", None)

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(fused_forward)
    def forward(self: PreTrainedModel, *args: Any, gap_labels: torch.Tensor | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        if gap_labels is None:
            return fused_forward(*args, **kwargs)
        hidden_states: list[torch.Tensor] = []
        hook = self.base_model.register_forward_hook(
            lambda _module, _args, outputs: hidden_states.append(outputs.last_hidden_state)
        )
        try:
            outputs = fused_forward(*args, **kwargs)
        finally:
            hook.remove()
        gap = _smoothing_gap(hidden_states[-1], gap_labels, self.get_output_embeddings(), scale, softcap)
        return SmoothedCausalLMOutput(**outputs, smoothing_gap=gap)

    model.forward = types.MethodType(forward, model)


def _smoothing_gap(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: Any,  # noqa: ANN401 (whatever holds the output embeddings)
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    # Prompt-learning PEFT prepends virtual tokens: the real ones are the last
    hidden_states = hidden_states[:, -labels.size(1) :][:, :-1].to(lm_head.weight.device)
    targets = labels[:, 1:].to(lm_head.weight.device)
    mask = targets != -100
    weight: Any = lm_head.weight
    bias: Any = getattr(lm_head, "bias", None)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):
        gap = _gap_of_tokens(hidden_states[mask], targets[mask], weight, bias, scale, softcap)
    # `masked_scatter` keeps the graph where no label is valid
    return gap.new_zeros(mask.shape).masked_scatter(mask, gap)


def _gap_of_tokens(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is not None:
        # The cap is not linear, so the mean needs every logit
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        logits = softcap * torch.tanh(scale * logits / softcap)
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.mean(-1)
    direction = weight[targets].float() - weight.mean(dim=0, dtype=torch.float32)
    gap = (hidden.float() * direction).sum(dim=-1)
    if bias is not None:
        gap = gap + bias[targets].float() - bias.mean(dtype=torch.float32)
    return scale * gap


def accelerate_config_words(name: str) -> list[str]:
    """
    What `--accelerate_config` of TRL's command line means to `accelerate launch`.

    Args:
        name (`str`):
            A file of accelerate's, or the name of one of TRL's.

    Returns:
        `list[str]`: Options of `accelerate launch`.

    Raises:
        ValueError: If it is neither.
    """
    # Only the command line needs it
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        return resolve_accelerate_config_argument(["--accelerate_config", name])
    except ValueError:
        folder = importlib.resources.files("trl.accelerate_configs")
        known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        raise ValueError(
            f"`accelerate_config`={name!r} is neither a file nor one of {', '.join(known)}. Name one of these, or a "
            "file that `accelerate config` has written."
        ) from None


# Accelerate reads the metadata of installed packages each time it unwraps a model, which takes milliseconds
_WITHIN: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model within a model, without the wrappers of accelerate and PEFT."""
    known = _WITHIN.get(model)
    inner: Any = None if known is None else known()
    if inner is None:
        inner = extract_model_from_parallel(model)
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
        _WITHIN[model] = weakref.ref(inner)
    return inner


@contextlib.contextmanager
def scoring_forward(
    model: PreTrainedModel, score: Callable[[torch.Tensor, OutputHead], None], *, copy_head: bool = False
) -> Iterator[None]:
    """
    For the duration, a forward of `model` shows the backbone's hidden states and its head to `score`, no logits made.

    `score` runs within the forward, where FSDP and ZeRO-3 can gather the head; the forward itself returns nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers; call the wrapped one.
        score (`Callable`):
            Takes hidden states of shape `(B, T, D)`, those of virtual tokens of prompt-learning PEFT first, and the
            head.
        copy_head (`bool`, *optional*, defaults to `False`):
            Whether `score` gets a head that stays valid after the forward, even of a sharded model.
    """
    text_config = model.config.get_text_config()
    scale, softcap = logit_scale(text_config), getattr(text_config, "final_logit_softcapping", None)
    before = vars(model).get("forward")

    def forward(self: PreTrainedModel, *args: Any, labels: Any = None, **kwargs: Any) -> tuple[()]:  # noqa: ANN401
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        lm_head: Any = self.get_output_embeddings()
        weight: Any = lm_head.weight
        bias: Any = getattr(lm_head, "bias", None)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        with maybe_gather_lm_head_ctx(weight, bias):
            if copy_head:
                weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
            score(hidden.to(weight.device), OutputHead(weight, bias, scale, softcap))
        return ()

    model.forward = types.MethodType(forward, model)
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
