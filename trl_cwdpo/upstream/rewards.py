"""Reward functions and reward models with the signature of TRL's trainers."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import apply_chat_template, is_conversational
from trl.models import prepare_deepspeed
from trl.trainer.utils import (
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

__all__ = [
    "BackgroundLoop",
    "RewardFunction",
    "RewardModel",
    "callable_name",
    "is_async_callable",
    "is_conversational",
]

RewardFunction = Callable[..., Any]
Result = TypeVar("Result")


def callable_name(function: RewardFunction) -> str:
    """Name of a reward function, for messages and tables."""
    return get_callable_name(function)


class BackgroundLoop:
    """One event loop in a thread of its own, so that it works within a notebook and keeps clients' connections."""

    def __init__(self) -> None:
        self._thread: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine and wait for it."""
        if self._loop is None:
            self._thread, self._loop, ready = start_event_loop_in_daemon(name="negative-rewards")
            ready.wait()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """End the thread, if it was started."""
        shutdown_event_loop_in_daemon(self._thread, self._loop)
        self._thread = self._loop = None


class RewardModel:
    """
    A sequence classifier with one label as a reward function.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or its name or folder.
        accelerator ([`~accelerate.Accelerator`]):
            The run's, which places the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a model's own code may run.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | nn.Module",
        accelerator: Any,  # noqa: ANN401
        *,
        trust_remote_code: bool = False,
    ) -> None:
        loaded: Any = model
        if isinstance(model, str):
            options: dict[str, Any] = {"num_labels": 1, "trust_remote_code": trust_remote_code}
            loaded = AutoModelForSequenceClassification.from_pretrained(model, **options)
        config: Any = loaded.config
        name = get_config_model_id(config)
        self.__name__ = name.rstrip("/").split("/")[-1]
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The model reads its reward off the last token that is no padding
        config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.device = accelerator.device
        deepspeed = getattr(accelerator.state, "deepspeed_plugin", None) is not None
        if deepspeed:
            self.model = prepare_deepspeed(loaded, accelerator)
        else:
            self.model = accelerator.prepare_model(loaded, evaluation_mode=True, device_placement=True)
        self.model.eval()

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """Rewards of completions."""
        if is_conversational({"prompt": prompts[0]}):
            messages = [{"messages": prompt + answer} for prompt, answer in zip(prompts, completions, strict=True)]
            texts = [apply_chat_template(row, self.tokenizer)["text"] for row in messages]
        else:
            texts = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
        inputs = self.tokenizer(text=texts, **options).to(self.device)
        with torch.inference_mode():
            return self.model(**inputs).logits[:, 0].float().tolist()
