"""What the demonstration measures with the answers given: log-probabilities of held-out pairs, and calibration."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from trl_cwdpo.shapes.model import prompt_text


@dataclass(frozen=True)
class TokenScores:
    """
    A model's view of given responses, token by token.

    Args:
        avg_logps (`np.ndarray` of shape `(N,)`):
            Average log-probability of each response's tokens, nats per token.
        confidences (`np.ndarray` of shape `(M,)`):
            Largest probability at each token of all responses.
        correct (`np.ndarray` of shape `(M,)`):
            Whether the token with that probability is the one given.
    """

    avg_logps: np.ndarray
    confidences: np.ndarray
    correct: np.ndarray


def score_responses(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: Dataset, side: str, *, batch_size: int = 128
) -> TokenScores:
    """
    Score the responses of one side of preference pairs, teacher-forced. The model is in evaluation mode afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        pairs ([`~datasets.Dataset`]):
            A split of the shapes dataset, N pairs.
        side (`str`):
            `"chosen"` or `"rejected"`.
        batch_size (`int`, *optional*, defaults to `128`):
            Pairs a batch.

    Returns:
        `TokenScores`: The scores; the end token counts as a token of the response.
    """
    model.eval()
    batches = [
        _score_batch(model, processor, pairs[start : start + batch_size], side)
        for start in range(0, len(pairs), batch_size)
    ]
    columns = (torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True))
    return TokenScores(*columns)


@torch.no_grad()
def _score_batch(
    model: PreTrainedModel, processor: ProcessorMixin, rows: dict[str, list[Any]], side: str
) -> tuple[Tensor, Tensor, Tensor]:
    prompt = prompt_text(processor)
    # The prompt is the same in all rows, and so is its length.
    start = len(_encode(processor, rows["images"][:1], [prompt])["input_ids"][0])
    # What the template renders for an answer follows the prompt's text as it stands.
    answers = [_answer_text(processor, messages) for messages in rows[side]]
    inputs = _encode(processor, rows["images"], [prompt + answer for answer in answers]).to(model.device)
    logps = cast(Any, model)(**inputs, use_cache=False).logits[:, start - 1 : -1].float().log_softmax(dim=-1)
    tokens, mask = inputs["input_ids"][:, start:], inputs["attention_mask"][:, start:].bool()
    token_logps = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    top_logps, top_tokens = logps.max(dim=-1)
    avg_logps = (token_logps * mask).sum(dim=1) / mask.sum(dim=1)
    return avg_logps, top_logps[mask].exp(), (top_tokens == tokens)[mask]


def _answer_text(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> str:
    prompt: list[dict[str, Any]] = [{"role": "user", "content": ""}]
    opening = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return processor.apply_chat_template([*prompt, *messages], tokenize=False).removeprefix(opening)


def _encode(processor: ProcessorMixin, images: list[Any], texts: list[str]) -> Any:  # noqa: ANN401 (a mapping with .to)
    return processor(
        images=images,
        text=texts,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
