"""Pretraining of the tiny vision-language model from scratch: about a minute on one CPU core."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from trl_cwdpo.shapes.captions import sample_caption
from trl_cwdpo.shapes.model import PIXEL_MEAN, PIXEL_STD, build_model, build_processor, prompt_text
from trl_cwdpo.shapes.publishing import publish, source_digest
from trl_cwdpo.shapes.scenes import Scene, draw_scene, draw_scenes, sample_scenes

RECORD = "pretraining.json"
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """
    Settings of the pretraining; the defaults are tuned to the tiny model.

    Args:
        batch_size (`int`, *optional*, defaults to `32`):
            Scenes a step.
        num_scenes (`int`, *optional*, defaults to `20000`):
            Scenes drawn before training.
        captions_per_scene (`int`, *optional*, defaults to `2`):
            Word orders kept for each scene.
        pair_fraction (`float`, *optional*, defaults to `0.8`):
            Share of scenes with two things. Pairs are where relations are learned: with half of them alone, 800 steps
            leave the direction of a relation at chance.
        muon_learning_rate (`float`, *optional*, defaults to `5e-3`):
            Peak learning rate of the matrices outside embeddings and head.
        adamw_learning_rate (`float`, *optional*, defaults to `3e-3`):
            Peak learning rate of all other parameters.
        warmup_steps (`int`, *optional*, defaults to `30`):
            Steps of linear warm-up; at most a tenth of the steps, rounded up.
        final_share (`float`, *optional*, defaults to `0.05`):
            Share of the peak learning rate that the cosine ends at.
    """

    batch_size: int = 32
    num_scenes: int = 20000
    captions_per_scene: int = 2
    pair_fraction: float = 0.8
    muon_learning_rate: float = 5e-3
    adamw_learning_rate: float = 3e-3
    warmup_steps: int = 30
    final_share: float = 0.05


class PretrainResult(NamedTuple):
    """
    Outcome of a pretraining.

    Args:
        path (`Path`):
            Folder with model and processor.
        losses (`list[float]`):
            Mean loss a completion token in nats, for each step.
        reused (`bool`):
            Whether the folder was there already.
    """

    path: Path
    losses: list[float]
    reused: bool


class Corpus(NamedTuple):
    """
    All pictures, prompts and answers of a pretraining, as tensors. For captions, the answers are word orders.

    Args:
        pixels (`torch.Tensor`):
            Pictures, uint8, shape (N, 3, height, width).
        prompt_ids (`torch.Tensor`):
            Prompts with image tokens, all of one length: shape (P,) where it is the same for every picture, or
            (N, K, P), one for each answer.
        completion_ids (`torch.Tensor`):
            Answers with end token, padded with `IGNORED`, shape (N, K, T): K answers of at most T tokens.
    """

    pixels: Tensor
    prompt_ids: Tensor
    completion_ids: Tensor


def pretrain(
    output_dir: str | Path,
    *,
    steps: int = 800,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> PretrainResult:
    """
    Pretrain the tiny model from scratch and save it with its processor. Nothing is done if the folder already holds
    the outcome of the same settings; one with other settings, or a damaged one, is replaced in one step.

    The same settings give the same weights. Training runs on one CPU thread; thread count and global random state
    are as before afterwards.

    Args:
        output_dir (`str` or `Path`):
            The folder, readable by `AutoProcessor` and `AutoModelForImageTextToText`.
        steps (`int`, *optional*, defaults to `800`):
            Optimizer steps.
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights, scenes and batches.
        recipe (`Recipe`, *optional*):
            Further settings.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `PretrainResult`: Folder and losses.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} trains nothing; use 1 or more.")
    recipe = recipe or Recipe()

    def build(folder: Path) -> None:
        processor = build_processor()
        model = build_model(processor, seed=seed)
        with one_thread():
            corpus = draw_corpus(processor, recipe, seed=seed)
            losses = train(model, corpus, recipe, steps=steps, seed=seed, progress=progress)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps({"losses": losses}) + "\n", encoding="utf-8")

    target = Path(output_dir)
    settings = {"kind": "model", "code": source_digest(), "steps": steps, "seed": seed, **asdict(recipe)}
    built = publish(target, settings, build)
    losses = json.loads((target / RECORD).read_text(encoding="utf-8"))["losses"]
    return PretrainResult(target, losses, reused=not built)


def draw_corpus(processor: LlavaProcessor, recipe: Recipe, *, seed: int = 0) -> Corpus:
    """
    Draw all scenes of a pretraining, from the train split.

    Args:
        processor ([`~transformers.LlavaProcessor`]):
            The processor.
        recipe (`Recipe`):
            Settings.
        seed (`int`, *optional*, defaults to `0`):
            Seed of scenes and captions.

    Returns:
        `Corpus`: Pictures and captions.
    """
    scenes = sample_scenes(recipe.num_scenes, seed=seed, pair_fraction=recipe.pair_fraction)
    pixels = torch.from_numpy(draw_scenes(scenes)).permute(0, 3, 1, 2).contiguous()
    completions = _completion_ids(processor, scenes, recipe.captions_per_scene, seed)
    return Corpus(pixels, _prompt_ids(processor, scenes[0]), completions)


def train(
    model: LlavaForConditionalGeneration,
    corpus: Corpus,
    recipe: Recipe,
    *,
    steps: int,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """
    Train a model on a corpus, in place; it is in evaluation mode afterwards.

    Args:
        model ([`~transformers.LlavaForConditionalGeneration`]):
            The model.
        corpus (`Corpus`):
            Pictures and captions.
        recipe (`Recipe`):
            Settings.
        steps (`int`):
            Optimizer steps.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the batches.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[float]`: Loss of each step, in nats a token.
    """
    optimizers = _build_optimizers(model, recipe)
    schedules = [_build_schedule(optimizer, recipe, steps) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    with logging.tqdm(total=steps, desc="pretraining", unit="step", disable=not progress) as bar:
        for _ in range(steps):
            loss = completion_loss(model, corpus, *_sample_batch(corpus, recipe.batch_size, generator))
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def completion_loss(
    model: LlavaForConditionalGeneration, corpus: Corpus, scenes: Tensor, word_orders: Tensor
) -> Tensor:
    """
    Mean loss of the answers' tokens of a batch. The head is applied to their positions only: most of a sequence is
    image and prompt.

    Args:
        model ([`~transformers.LlavaForConditionalGeneration`]):
            The model.
        corpus (`Corpus`):
            Pictures and captions.
        scenes (`torch.Tensor`):
            Rows of the corpus, shape (B,).
        word_orders (`torch.Tensor`):
            Which answer of each row, shape (B,).

    Returns:
        `torch.Tensor`: Scalar loss in nats a token.
    """
    labels, prompts = corpus.completion_ids[scenes, word_orders], corpus.prompt_ids
    prompts = prompts.expand(len(labels), -1) if prompts.ndim == 1 else prompts[scenes, word_orders]
    inputs = torch.cat((prompts, labels.clamp(min=0)), dim=1)
    pixels = (corpus.pixels[scenes].float() / 255 - PIXEL_MEAN) / PIXEL_STD
    # Padding comes last and attention is causal, so no attention mask is needed.
    hidden = model.model(input_ids=inputs, pixel_values=pixels, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, prompts.shape[1] - 1 : -1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _prompt_ids(processor: LlavaProcessor, scene: Scene) -> Tensor:
    inputs = processor(
        images=[draw_scene(scene)], text=prompt_text(processor), add_special_tokens=False, return_tensors="pt"
    )
    return inputs["input_ids"][0]


def _completion_ids(processor: LlavaProcessor, scenes: Sequence[Scene], orders: int, seed: int) -> Tensor:
    tokenizer, rng = processor.tokenizer, random.Random(f"captions-{seed}")
    captions = [sample_caption(scene, rng) for scene in scenes for _ in range(orders)]
    rows = tokenizer([caption + tokenizer.eos_token for caption in captions], add_special_tokens=False)["input_ids"]
    ids = np.full((len(rows), max(map(len, rows))), IGNORED, dtype=np.int64)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(ids).view(len(scenes), orders, -1)


def _sample_batch(corpus: Corpus, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    number, orders, _ = corpus.completion_ids.shape
    if corpus.prompt_ids.ndim > 1:
        # All questions about a picture together: what tells their answers apart is then the question alone. Without
        # this, hundreds of steps stay at chance
        scenes = torch.randint(number, (size // orders,), generator=generator)
        return scenes.repeat_interleave(orders), torch.arange(orders).repeat(len(scenes))
    scenes = torch.randint(number, (size,), generator=generator)
    return scenes, torch.randint(orders, (size,), generator=generator)


def _build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings and head, AdamW for all else; weight decay on matrices only."""
    muon, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            vectors.append(weight)
        elif weight.ndim > 2 or "embed" in name or "lm_head" in name:
            matrices.append(weight)
        else:
            muon.append(weight)
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(
            muon, lr=recipe.muon_learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=recipe.adamw_learning_rate, betas=(0.9, 0.98)),
    ]


def _build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    warmup = min(recipe.warmup_steps, math.ceil(steps / 10))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return recipe.final_share + (1 - recipe.final_share) * (1 + math.cos(math.pi * done)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums depend on how they are cut up, so one thread gives the same weights on every machine of a kind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
