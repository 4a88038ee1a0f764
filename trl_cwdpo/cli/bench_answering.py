"""Teaches the tiny model, which has only seen captions, to answer yes-no questions: the base of the questions' task.

Whether there is "a small red circle" in a picture takes looking for three words at once, and an answer says one bit.
Short runs of a trainer with AdamW stay at chance; the recipe of the captions' pretraining gets there.
"""

import functools
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from trl_cwdpo.cli.bench_questions import QUESTION, ask, prompt_text
from trl_cwdpo.evaluation.answers import NO, YES
from trl_cwdpo.shapes.pretraining import Corpus, Recipe, one_thread, train
from trl_cwdpo.shapes.publishing import publish, source_digest
from trl_cwdpo.shapes.scenes import Scene, draw_scenes, sample_scenes
from trl_cwdpo.upstream.models import load_processor

# Half of them with the answer yes
QUESTIONS_PER_SCENE = 4
BATCH = 64
# Three fifths of the rates from scratch
MUON_RATE, ADAMW_RATE = 3e-3, 1.8e-3


def build_answering_base(captioner: Path, target: Path, *, scenes: int, steps: int, seed: int) -> Path:
    """
    Train a captioning model to answer questions, and save it with its processor, unless that has been done.

    Args:
        captioner (`Path`):
            Folder of the captioning model.
        target (`Path`):
            The folder to write.
        scenes (`int`):
            Pictures to draw.
        steps (`int`):
            Optimizer steps of 64 questions each.
        seed (`int`):
            Seed of pictures, questions and batches.

    Returns:
        `Path`: `target`.
    """
    recipe = Recipe(
        batch_size=BATCH,
        num_scenes=scenes,
        muon_learning_rate=MUON_RATE,
        adamw_learning_rate=ADAMW_RATE,
    )
    settings = {
        "kind": "answering model",
        "code": source_digest(),
        "captioner": captioner.name,
        "question": QUESTION,
        "questions_per_scene": QUESTIONS_PER_SCENE,
        "steps": steps,
        "seed": seed,
        **asdict(recipe),
    }

    def build(folder: Path) -> None:
        processor = load_processor(str(captioner))
        model = LlavaForConditionalGeneration.from_pretrained(captioner)
        drawn = sample_scenes(recipe.num_scenes, seed=seed, pair_fraction=recipe.pair_fraction)
        with one_thread():
            corpus = question_corpus(processor, drawn, seed)
            losses = train(model, corpus, recipe, steps=steps, seed=seed, progress=False)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "losses.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")

    publish(target, settings, build)
    return target


def question_corpus(processor: Any, scenes: list[Scene], seed: int) -> Corpus:  # noqa: ANN401
    """
    Questions about pictures, half of them with the answer yes, as tensors.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor of the model.
        scenes (`list[Scene]`):
            The pictures.
        seed (`int`):
            Seed of the questions.

    Returns:
        [`~trl_cwdpo.shapes.pretraining.Corpus`].
    """
    rng, tokenizer = random.Random(f"answering-{seed}"), processor.tokenizer

    @functools.cache  # there are a few dozen different ones
    def prompt_ids(question: str) -> list[int]:
        text = prompt_text(processor, question).replace(processor.image_token, processor.image_token * image_tokens)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pixels = torch.from_numpy(draw_scenes(scenes)).permute(0, 3, 1, 2).contiguous()
    image_tokens = _image_tokens(processor, pixels)
    answers = (YES, NO) * (QUESTIONS_PER_SCENE // 2)
    ends = {truth: tokenizer(truth + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for truth in answers}
    return Corpus(
        pixels,
        torch.tensor([[prompt_ids(ask(scene, truth, rng)) for truth in answers] for scene in scenes]),
        torch.tensor([ends[truth] for truth in answers]).expand(len(scenes), -1, -1),
    )


def _image_tokens(processor: Any, pixels: torch.Tensor) -> int:  # noqa: ANN401
    picture = pixels[0].permute(1, 2, 0).numpy()
    inputs = processor(images=[picture], text=processor.image_token, add_special_tokens=False)
    return sum(token == processor.image_token_id for token in inputs["input_ids"][0])
