"""Teach a new projector to speak to a language model: pictures and their names, with everything else frozen.

The vision tower runs once a picture. The projector then learns, first, to say the mean embedding of the name's tokens
at every point of the picture, which takes seconds and no language model; then, with the language model behind it, to
make it say the name.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from trl_cwdpo.preserved import evaluation_mode, preserved_random_state

BATCH = 16
WARM_UP_STEPS, WARM_UP_RATE = 100, 1e-3
LEARNING_RATE = 5e-4
IGNORED = -100


def align(model: Any, processor: Any, rows: Dataset, *, steps: int, seed: int) -> float:  # noqa: ANN401
    """
    Train the projector of a vision-language model. Modes and random state are afterwards as before, and nothing but
    the projector has changed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            With `model.vision_tower`, `model.multi_modal_projector` and `mm_encoder_outputs` in its forward pass, as
            FastVLM.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        rows ([`~datasets.Dataset`]):
            Pictures, one a row, with `prompt`, `chosen` and `images`.
        steps (`int`):
            Optimizer steps behind the language model, of 16 pictures each; 0 for the mean embeddings alone.
        seed (`int`):
            Seed of the order.

    Returns:
        `float`: Mean loss of the last steps, nats per token; NaN for none.
    """
    projector = model.model.multi_modal_projector
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with preserved_random_state(), evaluation_mode(model):
        torch.manual_seed(seed)
        model.requires_grad_(requires_grad=False)
        projector.requires_grad_(requires_grad=True)
        try:
            features = tower_features(model, processor, rows)
            names = [messages[-1]["content"] for messages in rows["chosen"]]
            _towards_embeddings(model, features, name_vectors(model, processor, names))
            return _behind_language_model(model, processor, rows, features, steps)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(requires_grad=True)


@torch.no_grad()
def tower_features(model: Any, processor: Any, rows: Dataset, batch_size: int = 32) -> torch.Tensor:  # noqa: ANN401
    """What the vision tower says of each picture: `(N, tokens, width)`, in the precision of the model."""
    found = []
    for start in range(0, len(rows), batch_size):
        pictures = [images[0] for images in rows[start : start + batch_size]["images"]]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        hidden = model.model.vision_tower(pixels.to(model.device, model.dtype)).last_hidden_state
        found.append(hidden.flatten(2).transpose(1, 2))
    return torch.cat(found)


@torch.no_grad()
def name_vectors(model: Any, processor: Any, names: Sequence[str]) -> torch.Tensor:  # noqa: ANN401
    """Mean embedding of the tokens of each name: `(N, width)`."""
    embeddings = model.get_input_embeddings().weight
    ids = processor.tokenizer(list(names), add_special_tokens=False)["input_ids"]
    return torch.stack([embeddings[torch.tensor(tokens, device=embeddings.device)].mean(dim=0) for tokens in ids])


def _towards_embeddings(model: Any, features: torch.Tensor, names: torch.Tensor) -> None:  # noqa: ANN401
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=WARM_UP_RATE)
    scale = names.std()
    for indices in _batches(len(features), 4 * BATCH, WARM_UP_STEPS):
        said = projector(features[indices])
        loss = torch.nn.functional.mse_loss(said / scale, (names[indices] / scale).unsqueeze(1).expand_as(said))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _behind_language_model(
    model: Any,  # noqa: ANN401
    processor: Any,  # noqa: ANN401
    rows: Dataset,
    features: torch.Tensor,
    steps: int,
) -> float:
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
    )
    losses = []
    for indices in _batches(len(rows), BATCH, steps):
        inputs, labels = name_inputs(processor, rows.select(indices), features.shape[1])
        outputs = model.model(
            **inputs.to(model.device),
            mm_encoder_outputs={"image": _Features(projector(features[indices]))},
            use_cache=False,
        )
        positions = labels[:, 1:] != IGNORED
        # The head is large: only where the answer is
        logits = model.lm_head(outputs.last_hidden_state[:, :-1][positions])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][positions].to(logits.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    last = losses[-10:]
    return sum(last) / len(last) if last else math.nan


class _Features:
    """What a forward pass reads of the output of a vision tower."""

    def __init__(self, pooler_output: torch.Tensor) -> None:
        self.pooler_output = pooler_output


def name_inputs(processor: Any, rows: Dataset, image_tokens: int) -> tuple[Any, torch.Tensor]:  # noqa: ANN401
    """
    Tokens of prompts and answers without their pictures, padded on the right.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor.
        rows ([`~datasets.Dataset`]):
            With `prompt` and `chosen`.
        image_tokens (`int`):
            Tokens of a picture.

    Returns:
        The tokenizer's output and labels of shape `(N, L)`, −100 outside of the answers.
    """
    prompts = [prompt_text(processor, messages[-1]["content"], image_tokens) for messages in rows["prompt"]]
    answers = [answer_text(processor, messages[-1]["content"]) for messages in rows["chosen"]]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    options = {"add_special_tokens": False}
    inputs = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", **options)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(processor.tokenizer(prompt, **options)["input_ids"])] = IGNORED
    return inputs, labels


def prompt_text(processor: Any, question: str, image_tokens: int) -> str:  # noqa: ANN401
    """A prompt with one picture as the language model reads it, up to where the answer begins."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return text.replace(processor.image_token, processor.image_token * image_tokens)


def answer_text(processor: Any, answer: str) -> str:  # noqa: ANN401
    """An answer as the language model reads it, with what ends it."""
    return answer + str(processor.tokenizer.eos_token)


def _batches(number: int, size: int, steps: int) -> Sequence[list[int]]:
    """Indices of each step, every row once an epoch."""
    size = min(size, number)
    epochs = -(-steps * size // number) + 1
    order = torch.cat([torch.randperm(number) for _ in range(epochs)]).tolist()
    return [order[step * size : (step + 1) * size] for step in range(steps)]
