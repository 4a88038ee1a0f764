"""Evaluation on the shapes task: greedy captions, scored by the oracle."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from trl_cwdpo.shapes.dataset import scenes_of
from trl_cwdpo.shapes.model import prompt_text
from trl_cwdpo.shapes.oracle import ATTRIBUTES, Verdict, judge
from trl_cwdpo.shapes.scenes import Scene, draw_scene


class Sample(NamedTuple):
    """
    One generated caption.

    Args:
        scene (`str`):
            The scene record as JSON.
        caption (`str`):
            What the model said.
        score (`float`):
            Share of correct attributes.
        exact (`bool`):
            Whether it is an exact caption.
    """

    scene: str
    caption: str
    score: float
    exact: bool


@dataclass(frozen=True)
class EvaluationResult:
    """
    Scores over a set of scenes.

    Args:
        attribute_accuracy (`float`):
            Mean over scenes of the share of correct attributes.
        exact_rate (`float`):
            Share of exact captions.
        per_attribute (`dict[str, float]`):
            Accuracy of `colour`, `shape`, `size`, `relation` (share of all attributes of the kind) and `count` (share
            of captions with the right number of things). Kinds that no scene has are left out.
        samples (`list[Sample]`):
            The first captions.
        num_scenes (`int`):
            How many scenes were scored.
    """

    attribute_accuracy: float
    exact_rate: float
    per_attribute: dict[str, float]
    samples: list[Sample]
    num_scenes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "samples": [sample._asdict() for sample in self.samples]}


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: Dataset | Sequence[Scene],
    *,
    batch_size: int = 128,
    max_new_tokens: int = 16,
    num_samples: int = 8,
) -> EvaluationResult:
    """
    Caption scenes greedily and score the captions.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. Its train or evaluation mode, and the global random state, are the same afterwards.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor; its padding side is not touched.
        data (`Dataset` or `Sequence[Scene]`):
            A split of the shapes dataset, or scenes.
        batch_size (`int`, *optional*, defaults to `128`):
            Pictures a batch.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest caption in tokens; exact ones have at most 11, with the end token.
        num_samples (`int`, *optional*, defaults to `8`):
            How many captions to keep in the result.

    Returns:
        `EvaluationResult`: The scores.
    """
    scenes = scenes_of(data) if isinstance(data, Dataset) else list(data)
    captions = generate_captions(model, processor, scenes, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return score_captions(captions, scenes, num_samples=num_samples)


def score_captions(captions: Sequence[str], scenes: Sequence[Scene], *, num_samples: int = 8) -> EvaluationResult:
    """
    Score captions with the oracle.

    Args:
        captions (`Sequence[str]`):
            Captions, N of them, from wherever.
        scenes (`Sequence[Scene]`):
            Their scenes, N of them, at least one.
        num_samples (`int`, *optional*, defaults to `8`):
            How many captions to keep in the result.

    Returns:
        `EvaluationResult`: The scores.
    """
    if not scenes:
        raise ValueError("There is no scene to evaluate on; pass at least one.")
    verdicts = [judge(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    rows = itertools.islice(zip(scenes, captions, verdicts, strict=True), num_samples)
    return EvaluationResult(
        attribute_accuracy=sum(verdict.score for verdict in verdicts) / len(verdicts),
        exact_rate=sum(verdict.exact for verdict in verdicts) / len(verdicts),
        per_attribute=_per_attribute(verdicts),
        samples=[Sample(scene.to_json(), text, verdict.score, verdict.exact) for scene, text, verdict in rows],
        num_scenes=len(scenes),
    )


def generate_captions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    scenes: Sequence[Scene],
    *,
    batch_size: int = 128,
    max_new_tokens: int = 16,
) -> list[str]:
    """
    Caption scenes greedily, in batches.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        scenes (`Sequence[Scene]`):
            The scenes, N of them.
        batch_size (`int`, *optional*, defaults to `128`):
            Pictures a batch.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Longest caption in tokens.

    Returns:
        `list[str]`: N captions.
    """
    prompt = prompt_text(processor)
    captions: list[str] = []
    with _undisturbed(model), torch.no_grad():
        for start in range(0, len(scenes), batch_size):
            images = [[draw_scene(scene)] for scene in scenes[start : start + batch_size]]
            inputs = processor(
                images=images,
                text=[prompt] * len(images),
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
            ).to(model.device)
            output = cast(Any, model).generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            completions = output[:, inputs["input_ids"].shape[1] :]
            captions += processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return captions


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode and the random state as before outside."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _per_attribute(verdicts: Sequence[Verdict]) -> dict[str, float]:
    totals = {kind: sum(verdict.total[kind] for verdict in verdicts) for kind in ATTRIBUTES}
    accuracy = {
        kind: sum(verdict.correct[kind] for verdict in verdicts) / total for kind, total in totals.items() if total
    }
    return {**accuracy, "count": sum(verdict.count_correct for verdict in verdicts) / len(verdicts)}
