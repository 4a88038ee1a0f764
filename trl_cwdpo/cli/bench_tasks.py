"""The tasks that come along: captions of drawn shapes, yes-no questions about them, and names of real pictures."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from trl_cwdpo.benchmarks.matrix import Base, Data
from trl_cwdpo.benchmarks.task import Task
from trl_cwdpo.cli.bench_answering import build_answering_base
from trl_cwdpo.cli.bench_pictures import RealPictures
from trl_cwdpo.cli.bench_questions import (
    answer_probabilities,
    answer_questions,
    answer_reward,
    build_questions,
    yes_no_measures,
)
from trl_cwdpo.evaluation.answers import is_answer
from trl_cwdpo.shapes.captions import PROMPT
from trl_cwdpo.shapes.dataset import build_dataset, scenes_of
from trl_cwdpo.shapes.evaluation import generate_captions, score_captions
from trl_cwdpo.shapes.negatives import Grade
from trl_cwdpo.shapes.oracle import attribute_reward, judge
from trl_cwdpo.shapes.pretraining import Recipe, pretrain

# The held-out rows are the same for every seed of a benchmark
HELD_OUT_SEED = 12345


class ShapesCaptions:
    """Captions of drawn shapes, scored by the exact oracle: the share of correct attributes."""

    name = "shapes-captions"
    score_name = "attribute accuracy"
    own_measures: Mapping[str, tuple[str, int]] = {}
    reward: Callable[..., list[float]] = staticmethod(attribute_reward)
    prompt = PROMPT

    def build_base(self, folder: Path, base: Base) -> Path:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        target = folder / f"tiny-vlm-{base.steps}-{base.scenes}-seed{base.seed}"
        recipe = Recipe(num_scenes=base.scenes)
        return pretrain(target, steps=base.steps, seed=base.seed, recipe=recipe, progress=False).path

    def training_pairs(self, data: Data, seed: int) -> tuple[Dataset, Dataset]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        number = data.stage1_pairs + data.stage2_pairs
        # What it does not know, it refuses
        mix = cast(dict[Grade, float], data.grade_mix) or None
        rows = build_dataset(num_train=number, num_test=1, seed=seed, grade_mix=mix)["train"]
        return rows.select(range(data.stage1_pairs)), rows.select(range(data.stage1_pairs, number))

    def held_out(self, data: Data) -> dict[str, Dataset]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        number = data.validation + data.test
        rows = build_dataset(num_train=1, num_test=number, seed=HELD_OUT_SEED)["test"]
        return {
            "validation": rows.select(range(data.validation)),
            "test": rows.select(range(data.validation, number)),
        }

    def respond(self, model: Any, processor: Any, rows: Dataset) -> list[str]:  # noqa: ANN401
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        return generate_captions(model, processor, scenes_of(rows))

    def score(self, responses: Sequence[str], rows: Dataset) -> list[float]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        return [judge(text, scene).score for text, scene in zip(responses, scenes_of(rows), strict=True)]

    def measure(self, model: Any, processor: Any, rows: Dataset, responses: Sequence[str]) -> Mapping[str, float]:  # noqa: ANN401
        """Share of exact captions, and accuracy by kind of attribute."""
        result = score_captions(responses, scenes_of(rows))
        return {"exact": result.exact_rate, **result.per_attribute}


class ShapesQuestions(ShapesCaptions):
    """Yes-no questions about drawn shapes. The answer is one token, so its probability is the model's belief."""

    name = "shapes-questions"
    score_name = "accuracy"
    own_measures: Mapping[str, tuple[str, int]] = {
        "answer_ece": ("ECE of the answer", 3),
        "answer_ece_change": ("its ECE − start's", 3),
        "answer_brier_change": ("its Brier − start's", 3),
    }
    reward = staticmethod(answer_reward)

    def build_base(self, folder: Path, base: Base) -> Path:
        """See [`~trl_cwdpo.benchmarks.task.Task`]: the captioning model, taught to answer for as many steps."""
        captioner = super().build_base(folder, base)
        target = captioner.with_name(f"{captioner.name}-answering")
        return build_answering_base(captioner, target, scenes=base.scenes, steps=base.steps, seed=base.seed)

    def training_pairs(self, data: Data, seed: int) -> tuple[Dataset, Dataset]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        stage1, stage2 = super().training_pairs(data, seed)
        rng = random.Random(f"questions-{seed}")
        return build_questions(stage1, rng), build_questions(stage2, rng)

    def held_out(self, data: Data) -> dict[str, Dataset]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        rng = random.Random(f"questions-{HELD_OUT_SEED}")
        return {name: build_questions(rows, rng) for name, rows in super().held_out(data).items()}

    def respond(self, model: Any, processor: Any, rows: Dataset) -> list[str]:  # noqa: ANN401
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        return answer_questions(model, processor, rows)

    def score(self, responses: Sequence[str], rows: Dataset) -> list[float]:
        """See [`~trl_cwdpo.benchmarks.task.Task`]."""
        return [float(is_answer(text, truth)) for text, truth in zip(responses, rows["answer"], strict=True)]

    def measure(self, model: Any, processor: Any, rows: Dataset, responses: Sequence[str]) -> Mapping[str, float]:  # noqa: ANN401
        """Yes-no measures in the manner of POPE, and the calibration of the answer's one token."""
        return yes_no_measures(answer_probabilities(model, processor, rows), responses, list(rows["answer"]))


# From the folder of cached models to the task
TASKS: dict[str, Callable[[Path], Task]] = {
    ShapesCaptions.name: lambda cache: ShapesCaptions(),
    ShapesQuestions.name: lambda cache: ShapesQuestions(),
    RealPictures.name: RealPictures,
}


def make_task(name: str, cache: Path) -> Task:
    """The task of a name of `TASKS`; what it needs that is not made by itself lies in `cache`."""
    return TASKS[name](cache)
