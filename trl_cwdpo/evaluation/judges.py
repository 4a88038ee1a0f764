"""Judges of pairs of responses: a reward model, a user's function. See `win_rate` for what a judge is."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from trl_cwdpo.evaluation.win_rate import Comparison, Judge, score_judge
from trl_cwdpo.preserved import evaluation_mode, preserved_random_state


def load_function(name: str) -> Callable[..., Any]:
    """
    A function by its name.

    Args:
        name (`str`):
            `module:function`, importable from here.

    Returns:
        `Callable`.

    Raises:
        ValueError: If there is none.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot be imported ({error}); write it as `module:function`, with its folder on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ValueError(f"{name!r} is no function but a {type(found).__name__}.")
    return found


def reward_model_judge(model: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int = 2048) -> Judge:  # noqa: ANN401
    """
    A judge that prefers the response with the higher reward.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            A sequence-classification model with one label, or its folder or name; it is then loaded when it is first
            asked, on the accelerator if there is one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded with the model if `None`. Prompt and response are rendered with its chat template, or
            joined where it has none. Pictures are not shown to it.
        batch_size (`int`, *optional*, defaults to `8`):
            Responses a forward pass.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest prompt plus response in tokens, if its tokenizer allows as many; longer ones lose their beginning.

    Returns:
        `Judge`.

    Raises:
        ValueError: If the model has not exactly one label.
    """
    load: Callable[[], Any]
    if isinstance(model, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        config, load = AutoConfig.from_pretrained(model), cache(partial(_load_reward_model, model))
    else:
        config, load = model.config, lambda: model
    if config.num_labels != 1:
        raise ValueError(
            f"The reward model has {config.num_labels} labels; it must have one, whose logit is the reward."
        )
    max_length = min(max_length, tokenizer.model_max_length)
    # A classifier over a decoder looks for the padding to find its last token
    can_pad = tokenizer.pad_token_id is not None and config.pad_token_id is not None
    size = batch_size if can_pad else 1

    @torch.no_grad()
    def score(comparisons: Sequence[Comparison]) -> list[float]:
        loaded, rewards = load(), list[float]()
        # A chat template brings its special tokens
        rows = [
            tokenizer(_rendered(pair, tokenizer), add_special_tokens=tokenizer.chat_template is None)["input_ids"]
            for pair in comparisons
        ]
        with preserved_random_state(), evaluation_mode(loaded):
            for start in range(0, len(rows), size):
                ids = {"input_ids": [row[-max_length:] for row in rows[start : start + size]]}
                inputs = tokenizer.pad(ids, padding=can_pad, return_tensors="pt")
                rewards += loaded(**inputs.to(loaded.device)).logits[:, 0].float().tolist()
        return rewards

    return score_judge(score)


def _load_reward_model(path: str) -> Any:  # noqa: ANN401 (a classifier of any class)
    device = torch.accelerator.current_accelerator(check_available=True)
    dtype = "float32" if device is None else "auto"
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).to(device or "cpu").eval()


def _rendered(pair: Comparison, tokenizer: Any) -> str:  # noqa: ANN401
    messages = as_messages(pair.prompt)
    if tokenizer.chat_template is None:
        return "\n".join([*(message["content"] for message in messages), pair.first])
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": pair.first}], tokenize=False)
    return cast(str, text)


def as_messages(prompt: Any) -> list[dict[str, str]]:  # noqa: ANN401 (text or messages)
    """
    A prompt as messages of plain text.

    Args:
        prompt (`str` or `list[dict]`):
            Text, or messages whose content is text or a list of parts.

    Returns:
        `list[dict[str, str]]`: Pictures are left out.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": message["role"], "content": _text(message["content"])} for message in prompt]


def _text(content: Any) -> str:  # noqa: ANN401
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text" and part.get("text"))
