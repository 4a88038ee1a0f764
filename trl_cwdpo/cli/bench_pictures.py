"""Naming real pictures: the task of a benchmark on real weights, scored without a judge.

A model answers by the likeliest of a few names: the right one, others of its subgroup (hard) and others of anywhere
(easy). A name's score is the log-probability of its tokens and of the end token, divided by their number.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForImageTextToText

from trl_cwdpo.benchmarks.matrix import Base, Data
from trl_cwdpo.cli.bench_alignment import align, answer_text, prompt_text
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.preserved import evaluation_mode, preserved_random_state
from trl_cwdpo.probe_measures import expected_calibration_error
from trl_cwdpo.upstream.models import load_processor

FOLDER, MODEL, PICTURES = "real-pictures", "model", "pictures"
GRADES = ("hard", "easy")
# Wrong names of each grade that a picture's own is ranked against
RIVALS = 2


class Choice(str):
    """
    The name that a model picked.

    Args:
        names (`Sequence[str]`):
            The candidates, the right one first.
        scores (`Sequence[float]`):
            Mean log-probability a token of each, nats.
    """

    __slots__ = ("names", "scores")
    names: tuple[str, ...]
    scores: tuple[float, ...]

    def __new__(cls, names: Sequence[str], scores: Sequence[float]) -> "Choice":
        """The likeliest of the candidates."""
        choice = super().__new__(cls, names[int(np.argmax(scores))])
        choice.names, choice.scores = tuple(names), tuple(scores)
        return choice

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the scores."""
        weights = np.exp(np.array(self.scores) - max(self.scores))
        return weights / weights.sum()


def name_reward(completions: Sequence[Any], name: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for a response that is the picture's name, in the signature of TRL's reward functions."""
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    return [float(text.strip().lower() == right) for text, right in zip(texts, name, strict=True)]


class RealPictures:
    """
    Names of real pictures, for a small model of real weights; both come from `benchmarks/fetch_real_pictures.py`.

    Args:
        cache (`Path`):
            Where `real-pictures` is, with `model` and `pictures` in it.
    """

    name = "real-pictures"
    score_name = "naming accuracy"
    reward: Callable[..., list[float]] = staticmethod(name_reward)
    own_measures: Mapping[str, tuple[str, int]] = {
        "hard_accuracy": ("accuracy, hard pairs", 3),
        "easy_accuracy": ("accuracy, easy pairs", 3),
        "choice_ece": ("ECE of the choice", 3),
        "choice_brier": ("Brier of the choice", 3),
    }

    def __init__(self, cache: Path) -> None:
        self.folder = cache / FOLDER
        self._pictures: DatasetDict | None = None

    @property
    def pictures(self) -> DatasetDict:
        """The dataset, read once."""
        if self._pictures is None:
            self._pictures = load_dataset(str(self._found(PICTURES)))
        return self._pictures

    def build_base(self, folder: Path, base: Base) -> Path:
        """See [`~trl_cwdpo.benchmarks.task.Task`]: the fetched model with its projector trained on the train split."""
        source = self._found(MODEL)
        tokens = json.loads((source / "config.json").read_text(encoding="utf-8"))["image_seq_length"]
        target = folder / FOLDER / f"aligned-{tokens}-tokens-{base.steps}-{base.scenes}-seed{base.seed}"
        if target.is_dir():
            return target
        rows = one_a_picture(self.pictures["train"])
        rows = rows.shuffle(seed=base.seed).select(range(min(base.scenes, len(rows))))
        model: Any = AutoModelForImageTextToText.from_pretrained(source)
        processor = load_processor(str(source))
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        align(model, processor, rows, steps=base.steps, seed=base.seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            fresh = Path(aside) / target.name
            # The processor as it is
            shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("*.safetensors"))
            model.save_pretrained(fresh)
            fresh.rename(target)
        return target

    def training_pairs(self, data: Data, seed: int) -> tuple[Dataset, Dataset]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]; pictures come again once all have been used."""
        mix = data.grade_mix or dict.fromkeys(GRADES, 1.0)
        if set(mix) - set(GRADES) or min(mix.values()) < 0 or not sum(mix.values()):
            raise CommandError(f"`grade_mix` is {mix}; this task has the grades {' and '.join(GRADES)}.")
        rng = random.Random(f"pairs-{seed}")
        train = self.pictures["train"]
        by_grade = {grade: [i for i, found in enumerate(train["grade"]) if found == grade] for grade in GRADES}
        number = data.stage1_pairs + data.stage2_pairs
        grades = rng.choices(list(mix), weights=list(mix.values()), k=number)
        decks = {grade: _deck(rows, number, rng) for grade, rows in by_grade.items()}
        rows = train.select([decks[grade].pop() for grade in grades])
        return rows.select(range(data.stage1_pairs)), rows.select(range(data.stage1_pairs, number))

    def held_out(self, data: Data) -> dict[str, Dataset]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]; one row a picture, of a subgroup with rivals."""
        sizes = {"validation": data.validation, "test": data.test}
        found = {}
        for split, number in sizes.items():
            rows = self.pictures[split]
            columns = zip(rows["grade"], rows["hard_names"], rows["easy_names"], strict=True)
            kept = [
                index
                for index, (grade, hard, easy) in enumerate(columns)
                if grade == "hard" and min(len(hard), len(easy)) >= RIVALS
            ]
            if number > len(kept):
                raise CommandError(f"`data.{split}` is {number}, but this task has {len(kept)} pictures for it.")
            found[split] = rows.select(kept[:number])
        return found

    def respond(self, model: Any, processor: Any, rows: Dataset) -> list[str]:  # noqa: ANN401
        """See [`~trl_cwdpo.benchmarks.task.Task`]: the likeliest of the candidates, each a [`Choice`]."""
        return [Choice(names, scores) for names, scores in zip(*score_names(model, processor, rows), strict=True)]

    def score(self, responses: Sequence[str], rows: Dataset) -> list[float]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]: 1 for the right name."""
        return [float(response == name) for response, name in zip(responses, rows["name"], strict=True)]

    def measure(self, model: Any, processor: Any, rows: Dataset, responses: Sequence[str]) -> Mapping[str, float]:  # noqa: ANN401
        """Accuracy against the rivals of each grade, and the calibration of the choice."""
        return choice_measures([response for response in responses if isinstance(response, Choice)])

    def _found(self, part: str) -> Path:
        if not (self.folder / part).is_dir():
            raise CommandError(
                f"The task {self.name!r} needs {self.folder / part}, which is not there. Fetch it with `python "
                f"benchmarks/fetch_real_pictures.py --cache {self.folder}` from a clone of the repository."
            )
        return self.folder / part


def choice_measures(choices: Sequence[Choice]) -> dict[str, float]:
    """
    What is measured with choices among `1 + 2 * RIVALS` names, the right one first, then the hard and the easy ones.

    Args:
        choices (`Sequence[Choice]`):
            The choices, at least one.

    Returns:
        `dict[str, float]`: `hard_accuracy` and `easy_accuracy`, the share of single rivals that the right name beats;
        `choice_ece`, the calibration error of the chosen name's probability; `choice_brier`, the mean over pictures of
        Σ (p − y)² over the names.
    """
    scores = np.array([choice.scores for choice in choices])
    probabilities = np.stack([choice.probabilities for choice in choices])
    beaten = scores[:, :1] > scores[:, 1:]
    truth = np.zeros_like(probabilities)
    truth[:, 0] = 1.0
    return {
        "hard_accuracy": float(beaten[:, :RIVALS].mean()),
        "easy_accuracy": float(beaten[:, RIVALS:].mean()),
        "choice_ece": expected_calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == 0),
        "choice_brier": float(((probabilities - truth) ** 2).sum(axis=1).mean()),
    }


def candidates(rows: Dataset) -> list[list[str]]:
    """The names that each picture is ranked with: its own, then `RIVALS` hard and `RIVALS` easy ones."""
    columns = zip(rows["name"], rows["hard_names"], rows["easy_names"], strict=True)
    return [[name, *hard[:RIVALS], *easy[:RIVALS]] for name, hard, easy in columns]


@torch.no_grad()
def score_names(model: Any, processor: Any, rows: Dataset) -> tuple[list[list[str]], list[list[float]]]:  # noqa: ANN401
    """
    Mean log-probability a token of each candidate, given the picture.

    Prompt and picture are computed once a row, and the candidates continue them from the cache.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model; its mode and the random state are afterwards as before.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        rows ([`~datasets.Dataset`]):
            Held-out rows.

    Returns:
        Names and scores, nats, of each row.
    """
    names = candidates(rows)
    scores = []
    with preserved_random_state(), evaluation_mode(model):
        for row, few in zip(rows, names, strict=True):
            scores.append(_score_row(model, processor, row, few))
    return names, scores


def _score_row(model: Any, processor: Any, row: Mapping[str, Any], names: Sequence[str]) -> list[float]:  # noqa: ANN401
    question = prompt_text(processor, row["prompt"][-1]["content"], image_tokens=1)
    inputs = processor(images=[row["images"]], text=[question], add_special_tokens=False, return_tensors="pt")
    prompt = model(**inputs.to(model.device), use_cache=True, logits_to_keep=1)
    answers = processor.tokenizer(
        [answer_text(processor, name) for name in names],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)
    ids, mask = answers["input_ids"], answers["attention_mask"]
    prompt.past_key_values.batch_repeat_interleave(len(names))
    seen = torch.cat([inputs["attention_mask"].expand(len(names), -1), mask], dim=1)
    logits = model(input_ids=ids, attention_mask=seen, past_key_values=prompt.past_key_values).logits
    # The first token follows the prompt, every other one the token before
    logits = torch.cat([prompt.logits.expand(len(names), -1, -1), logits[:, :-1]], dim=1)
    logps = logits.float().log_softmax(dim=-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    return ((logps * mask).sum(dim=1) / mask.sum(dim=1)).tolist()


def one_a_picture(rows: Dataset) -> Dataset:
    """The first row of each picture."""
    first: dict[str, int] = {}
    for index, code in enumerate(rows["hexcode"]):
        first.setdefault(code, index)
    return rows.select(list(first.values()))


def _deck(rows: Sequence[int], number: int, rng: random.Random) -> list[int]:
    deck: list[int] = []
    while len(deck) < number:
        deck += rng.sample(rows, len(rows))
    return deck
