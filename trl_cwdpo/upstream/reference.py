"""What the cache of reference log-probabilities assumes about TRL, transformers and datasets.

- `DPOTrainer.__init__` reads `args.precompute_ref_log_probs` again after `Trainer.__init__` has made the accelerator,
  and where it is set then, loads no reference for full finetuning (under FSDP it loads one and frees it) and hands
  each dataset to `_precompute_ref_logps`;
- `compute_ref_log_probs(model, inputs)` takes a batch of the collator and returns the log-probabilities that
  `ref_chosen_logps` and `ref_rejected_logps` stand for, with adapters disabled or replaced by the frozen copy "ref"
  where there is no reference model.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed

# Components of a parameter's name that wrappers add
WRAPPERS = {"base_layer", "original_module"}
# Parts of a tokenizer that stand as its last call left them
TRANSIENT = {"padding", "truncation"}
# Entries of a configuration that do not change what a forward computes, or are told apart elsewhere
NOT_THE_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@contextlib.contextmanager
def restored_options(args: DPOConfig) -> Iterator[None]:
    """Put `precompute_ref_log_probs` back to what the user set, whatever happens."""
    before = args.precompute_ref_log_probs
    try:
        yield
    finally:
        args.precompute_ref_log_probs = before


def refuse_noisy_reference(trainer: DPOTrainer) -> None:
    """
    Raise if dropout is on in the reference: with an adapter to switch off, the reference is the model in training.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer that is set up.

    Raises:
        ValueError: Naming the option.
    """
    model: Any = trainer.model
    if not is_peft_model(model) or trainer.ref_model is not None:
        return
    inner: Any = model.get_base_model()
    adapters = set(model.peft_config)
    if any(
        isinstance(module, nn.Dropout) and module.p > 0 and not adapters & set(name.split("."))
        for name, module in inner.named_modules()
    ):
        raise ValueError(
            "`reference_cache_dir` needs a reference without chance, and with an adapter and `disable_dropout=False` "
            "it has the model's dropout. Set `disable_dropout=True`, or leave out `reference_cache_dir`."
        )
    chance = getattr(inner.config.get_text_config(), "attention_dropout", 0.0)
    if chance:
        raise ValueError(
            f"`reference_cache_dir` needs a reference without chance, and the model has `attention_dropout`={chance}, "
            "which with an adapter acts on the reference too. Load it with "
            "`model_init_kwargs={'attention_dropout': 0.0}`, or leave out `reference_cache_dir`."
        )


def dataset_fingerprint(dataset: Dataset) -> str:
    """The fingerprint that `datasets` gives a dataset, made of its contents and what was done to it."""
    return dataset._fingerprint


def initial_scorer(trainer: DPOTrainer, reference: nn.Module | None) -> nn.Module:
    """
    The model to compute reference log-probabilities with, before training has begun.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer that is set up. Without a reference model its policy, untrained, is the reference.
        reference (`nn.Module`, *optional*):
            A reference that TRL has prepared and let go of.

    Returns:
        `nn.Module`, to be given to `compute_ref_log_probs`.
    """
    reference = trainer.ref_model if reference is None else reference
    if reference is not None:
        return reference
    policy: Any = trainer.model
    if trainer.is_deepspeed_enabled:
        # Places and gathers the parameters, which the trainer itself does only as training begins
        return prepare_deepspeed(policy, trainer.accelerator)
    # Under FSDP it is still on the CPU
    return policy.to(trainer.accelerator.device) if trainer.is_fsdp_enabled else policy


def weights_digest(model: nn.Module) -> str:
    """
    A digest of the weights of a reference, the same whether it is wrapped by PEFT or not.

    Of adapters only the frozen copy "ref" counts: the others are switched off in a reference. All ranks must call this
    together; only the first one's digest means something.

    Args:
        model (`nn.Module`):
            Model without wrappers other than PEFT's.

    Returns:
        `str` of 32 hexadecimal digits.
    """
    wrapped: Any = model if is_peft_model(model) else None
    adapters = set(wrapped.peft_config) if wrapped is not None else set()
    digests = {}
    for name, tensor in _whole_tensors(model):
        parts = name.split(".")
        if (adapters - {"ref"}) & set(parts):
            continue
        if wrapped is not None:
            # PEFT's model holds the one it wraps as `base_model.model`, or as `base_model` for prompt learning
            inside = 1 if wrapped.active_peft_config.is_prompt_learning else 2
            parts = parts[inside:] if parts[0] == "base_model" else parts
        digests[".".join(part for part in parts if part not in WRAPPERS)] = _tensor_digest(tensor)
    if "ref" in adapters:
        digests["ref"] = plain_digest(
            wrapped.peft_config["ref"].to_dict(), without={"base_model_name_or_path", "revision"}
        )
    return plain_digest(digests)


def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with _gathered(tensor):
            data = tensor.detach()
            yield name, data.full_tensor() if isinstance(data, DTensor) else data
        # Scales of weights quantised by bitsandbytes
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield f"{name}.absmax", state.absmax


def _gathered(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    if tensor.device.type != "meta":
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_digest(value: Any, without: set[str] | None = None) -> str:  # noqa: ANN401 (plain values)
    """
    A digest of plain values.

    Args:
        value (`Any`):
            Nested dictionaries, lists and scalars; anything else is taken by its text.
        without (`set[str]`, *optional*):
            Keys to leave out at all levels.

    Returns:
        `str` of 32 hexadecimal digits.
    """
    text = json.dumps(_without(value, without or set()), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _without(value: Any, names: set[str]) -> Any:  # noqa: ANN401 (plain values)
    if isinstance(value, dict):
        return {str(key): _without(item, names) for key, item in value.items() if key not in names}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_without(item, names) for item in value] if isinstance(value, (list, tuple)) else value


def architecture_digest(config: Any) -> str:  # noqa: ANN401 (a configuration of transformers)
    """A digest of what a model's configuration says about its computation."""
    return plain_digest(config.to_dict(), without=NOT_THE_ARCHITECTURE)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer makes of a text; its chat template is left to [`template_digest`]."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return plain_digest([tokenizer.get_vocab(), tokenizer.special_tokens_map])
    state = {name: value for name, value in json.loads(backend.to_str()).items() if name not in TRANSIENT}
    return plain_digest([state, tokenizer.special_tokens_map])


def processor_digest(processing_class: Any) -> str | None:  # noqa: ANN401 (a processor or a tokenizer)
    """A digest of a processor's settings for pictures and the like, `None` for a tokenizer."""
    if not isinstance(processing_class, ProcessorMixin):
        return None
    settings = {name: value for name, value in processing_class.to_dict().items() if name != "chat_template"}
    return plain_digest(settings, without={"tokenizer", "_processor_class", "processor_class"})


def template_digest(processing_class: Any) -> str:  # noqa: ANN401 (a processor or a tokenizer)
    """A digest of the chat template."""
    return plain_digest(getattr(processing_class, "chat_template", None))
