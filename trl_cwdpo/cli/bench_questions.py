"""Yes-no questions about drawn shapes, and what is measured with their one-token answers."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value

from trl_cwdpo.evaluation.answers import NO, YES, is_answer, yes_no_accuracy
from trl_cwdpo.preserved import evaluation_mode, preserved_random_state
from trl_cwdpo.probe_measures import expected_calibration_error, smooth_calibration_error
from trl_cwdpo.shapes.captions import describe
from trl_cwdpo.shapes.scenes import COLOURS, EXTENTS, SHAPES, Scene

# In the words that the tiny tokenizer knows
QUESTION = "is there a {size} {colour} {shape} in this picture ?"
KINDS: dict[str, tuple[str, ...]] = {"size": tuple(EXTENTS), "colour": tuple(COLOURS), "shape": SHAPES}


def build_questions(rows: Dataset, rng: random.Random) -> Dataset:
    """
    Turn rows of the captioning task into yes-no questions, half of each.

    A question with the answer no names a thing of the picture with one attribute changed. The rejected response is the
    other answer (grade `hard`) or, for rows of other grades, a word that is no answer (grade `easy`).

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `images`, `scene` and `grade`.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen`, `rejected`, `images`, `grade`, `scene` and `answer`.
    """
    answers = [YES, NO] * ((len(rows) + 1) // 2)
    answers = answers[: len(rows)]
    rng.shuffle(answers)
    questions = [ask(Scene.from_json(scene), truth, rng) for scene, truth in zip(rows["scene"], answers, strict=True)]
    words = [word for choices in KINDS.values() for word in choices]
    grades = ["hard" if grade == "hard" else "easy" for grade in rows["grade"]]
    rejected = [
        (NO if truth == YES else YES) if grade == "hard" else rng.choice(words)
        for truth, grade in zip(answers, grades, strict=True)
    ]
    columns = {
        "prompt": [_message("user", question) for question in questions],
        "chosen": [_message("assistant", answer) for answer in answers],
        "rejected": [_message("assistant", answer) for answer in rejected],
        "grade": grades,
        "answer": answers,
    }
    kept = rows.remove_columns([name for name in columns if name in rows.column_names])
    features = Features(
        {**{name: rows.features[name] for name in columns if name in rows.features}, "answer": Value("string")}
    )
    for name, column in columns.items():
        kept = kept.add_column(name, column, feature=features[name])
    return kept


def answer_questions(model: Any, processor: Any, rows: Dataset) -> list[str]:  # noqa: ANN401
    """
    The likeliest first token of each answer, in words.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model; its mode and the random state are afterwards as before.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        rows ([`~datasets.Dataset`]):
            Questions.

    Returns:
        `list[str]`.
    """
    return processor.tokenizer.batch_decode(_first_token_logps(model, processor, rows).argmax(dim=-1, keepdim=True))


def answer_probabilities(model: Any, processor: Any, rows: Dataset) -> np.ndarray:  # noqa: ANN401
    """
    Probability of the answer yes among yes and no, from the one token that decides.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        rows ([`~datasets.Dataset`]):
            N questions.

    Returns:
        `np.ndarray` of shape `(N,)`.
    """
    logps = _first_token_logps(model, processor, rows)
    yes, no = processor.tokenizer.convert_tokens_to_ids([YES, NO])
    return torch.sigmoid(logps[:, yes] - logps[:, no]).double().cpu().numpy()


def yes_no_measures(yes: np.ndarray, responses: Sequence[str], truths: Sequence[str]) -> Mapping[str, float]:
    """
    What is measured with yes-no answers.

    Args:
        yes (`np.ndarray` of shape `(N,)`):
            Probability of yes.
        responses (`Sequence[str]` of length N):
            What the model said.
        truths (`Sequence[str]` of length N):
            `"yes"` or `"no"`.

    Returns:
        `dict[str, float]`: Of [`~trl_cwdpo.evaluation.answers.yes_no_accuracy`], and the calibration errors and the
        Brier score (p − y)² of the probability of yes.
    """
    truth = np.array([answer == YES for answer in truths])
    confidence, correct = np.maximum(yes, 1.0 - yes), (yes > 0.5) == truth
    return {
        **yes_no_accuracy(responses, truths).to_dict(),
        "answer_ece": expected_calibration_error(confidence, correct),
        "answer_smooth_ece": smooth_calibration_error(confidence, correct),
        "answer_brier": float(np.mean((yes - truth) ** 2)),
    }


def answer_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """
    1 for a right answer, 0 for any other, in the signature of TRL's reward functions.

    Args:
        completions (`list`):
            Completions, strings or messages.
        answer (`list[str]`):
            The column `answer`.
        kwargs:
            Further columns, ignored.

    Returns:
        `list[float]`.
    """
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    return [float(is_answer(text, truth)) for text, truth in zip(texts, answer, strict=True)]


def ask(scene: Scene, truth: str, rng: random.Random) -> str:
    """
    A question about a picture.

    Args:
        scene (`Scene`):
            The picture.
        truth (`str`):
            The answer that it is to have, `"yes"` or `"no"`.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: After something of the picture, with one attribute changed where the answer is no.
    """
    phrases = [phrase._asdict() for phrase in describe(scene).phrases]
    named = dict(rng.choice(phrases))
    while truth == NO and named in phrases:
        named = dict(rng.choice(phrases))
        kind = rng.choice(tuple(KINDS))
        named[kind] = rng.choice(KINDS[kind])
    return QUESTION.format(**named)


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@torch.no_grad()
def _first_token_logps(model: Any, processor: Any, rows: Dataset, batch_size: int = 128) -> torch.Tensor:  # noqa: ANN401
    found = []
    with preserved_random_state(), evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            texts = [prompt_text(processor, messages[-1]["content"]) for messages in batch["prompt"]]
            inputs = processor(
                images=batch["images"],
                text=texts,
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
            ).to(model.device)
            found.append(model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(dim=-1))
    return torch.cat(found)


def prompt_text(processor: Any, question: str) -> str:  # noqa: ANN401
    """A question about one picture as the model reads it, up to where the answer begins."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
