"""How good is the model of the task `real-pictures` before any method starts, and how much does its tower know?

Ranks the five names of held-out pictures with the projector as it was joined, with the projector trained for some
steps, and by ridge regression from the tower's mean features to the mean embedding of a name, without language model.

    python benchmarks/real_pictures_start.py --steps 30
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from trl_cwdpo.benchmarks.matrix import Base, Data
from trl_cwdpo.cli.bench_alignment import name_vectors, tower_features
from trl_cwdpo.cli.bench_pictures import (
    FOLDER,
    MODEL,
    Choice,
    RealPictures,
    candidates,
    choice_measures,
    one_a_picture,
)
from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.evaluation.comparison import load_for_evaluation
from trl_cwdpo.upstream.models import load_processor

PENALTY = 300.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Rank names before any method starts.")
    parser.add_argument("--cache_dir", type=Path, default=default_cache_dir(), help="where real-pictures is")
    parser.add_argument("--steps", type=int, default=30, help="steps of training the projector (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=60, help="test pictures (default: %(default)s)")
    arguments = parser.parse_args()
    task = RealPictures(arguments.cache_dir)
    rows = task.held_out(Data(validation=1, test=arguments.pictures))["test"]
    print("| names ranked by | of five | hard pairs | easy pairs | ECE of the choice |")
    print("|---|---|---|---|---|")
    source = arguments.cache_dir / FOLDER / MODEL
    model, processor = load_for_evaluation(str(source)), load_processor(str(source))
    show("ridge regression on the tower, no language model", ridge(model, processor, task, rows))
    show("the model, projector untrained", task.respond(model, processor, rows))
    trained = load_for_evaluation(str(task.build_base(arguments.cache_dir, Base(steps=arguments.steps))))
    show(f"the model, projector trained for {arguments.steps} steps", task.respond(trained, processor, rows))


def ridge(model: Any, processor: Any, task: RealPictures, rows: Dataset) -> list[str]:  # noqa: ANN401
    """Choices by the cosine between a predicted embedding and those of the candidates."""
    train = one_a_picture(task.pictures["train"])
    seen, names = tower_features(model, processor, train).mean(dim=1), name_vectors(model, processor, train["name"])
    centre, scale, mean = seen.mean(dim=0), seen.std(dim=0) + 1e-6, names.mean(dim=0)
    inputs = (seen - centre) / scale
    gram = inputs.T @ inputs + PENALTY * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(gram, inputs.T @ (names - mean))
    said = (tower_features(model, processor, rows).mean(dim=1) - centre) / scale @ weights
    choices: list[str] = []
    for vector, few in zip(said, candidates(rows), strict=True):
        others = name_vectors(model, processor, few) - mean
        choices.append(Choice(few, torch.cosine_similarity(vector[None], others).tolist()))
    return choices


def show(label: str, choices: Sequence[Any]) -> None:
    """Print one row."""
    found = choice_measures(choices)
    right = sum(choice == choice.names[0] for choice in choices) / len(choices)
    numbers = (right, found["hard_accuracy"], found["easy_accuracy"])
    # Cosines are no log-probabilities: their softmax says nothing of confidence
    error = "–" if label.startswith("ridge") else f"{found['choice_ece']:.3f}"
    print(f"| {label} | {' | '.join(f'{number:.3f}' for number in numbers)} | {error} |", flush=True)


if __name__ == "__main__":
    main()
