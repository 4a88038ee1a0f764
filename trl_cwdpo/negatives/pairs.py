"""From rows of a preference dataset to sampled pairs: sample, score, select."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trl_cwdpo.data import one_side, with_image_list

from .engines import Engine, Prompts, SamplingOptions
from .responses import Layout, prompt_ids, response_ending, response_ids, with_responses
from .scoring import Scorer, measure_avg_logps
from .selection import Choice, Sample, select

# Columns that TRL's reward functions get under other names, or that tokenization added
NOT_FOR_REWARDS = {"prompt", "completion", "completion_ids", "prompt_ids", "chosen_ids", "rejected_ids"}


@dataclass(frozen=True)
class SampledPair:
    """
    One pair for which responses were sampled.

    Args:
        prompt (`str`):
            The prompt, without special tokens.
        chosen, rejected ([`Sample`]):
            The dataset's responses.
        samples (`tuple[Sample, ...]`):
            What was sampled.
        choice ([`Choice`]):
            What became of it.
    """

    prompt: str
    chosen: Sample
    rejected: Sample
    samples: tuple[Sample, ...]
    choice: Choice

    def replacement(self, side: str) -> Sample | None:
        """The sample that takes the place of the `"chosen"` or `"rejected"` response, if one does."""
        index = getattr(self.choice, side)
        return None if index is None else self.samples[index]


@dataclass(frozen=True)
class SelectionOptions:
    """
    How to select.

    Args:
        rule (`str`, *optional*, defaults to `"random"`):
            See [`select`].
        replace_chosen (`bool`, *optional*, defaults to `False`):
            See [`select`].
        discard_truncated (`bool`, *optional*, defaults to `False`):
            See [`select`].
        measure (`bool`, *optional*, defaults to `False`):
            Whether ℓ̄ is measured although the rule does not need it.
    """

    rule: str = "random"
    replace_chosen: bool = False
    discard_truncated: bool = False
    measure: bool = False


@dataclass
class NegativeSampler:
    """
    Samples negatives for rows of a dataset. All processes call it together, with equally many rows, at least one.

    Args:
        engine ([`Engine`]):
            Samples.
        model (`nn.Module`):
            The policy with a fused head, as wrapped by accelerate; used only where ℓ̄ is measured.
        collate (`Callable`):
            From rows to a preference batch on the model's device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        layout ([`Layout`]):
            How `collate` lays out a batch.
        stop_token_ids (`Sequence[int]`):
            Ends of a response that the model declares; those that the data's responses end with are added.
        suppressed_token_ids (`Sequence[int]`, *optional*):
            Tokens never to sample.
        sampling ([`SamplingOptions`], *optional*):
            How to sample.
        selection ([`SelectionOptions`], *optional*):
            How to select.
        scorer ([`Scorer`], *optional*):
            Rewards.
        with_images (`bool`, *optional*, defaults to `False`):
            Whether the engine wants the pictures themselves.
    """

    engine: Engine
    model: torch.nn.Module
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokenizer: Any
    layout: Layout
    stop_token_ids: Sequence[int]
    suppressed_token_ids: Sequence[int] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    scorer: Scorer | None = None
    with_images: bool = False

    def __call__(
        self, rows: list[dict[str, Any]], seeds: Sequence[int], columns: Mapping[str, Any] | None = None
    ) -> list[SampledPair]:
        """
        Sample, score and select.

        Args:
            rows (`list[dict]`):
                Rows of the dataset.
            seeds (`Sequence[int]`):
                For [`seed_of`]: run, step, process and so on.
            columns (`Mapping`, *optional*):
                What reward functions get beside the columns of the dataset.

        Returns:
            `list[SampledPair]`, one per row.
        """
        batch = self.collate([dict(row) for row in rows])
        ends = self._endings(batch)
        half = one_side(batch, "chosen", trim_to_multiple_of=1)
        whole = whole_prompts(rows, self.layout)
        if whole is not None:
            answers = dict(enumerate(response_ids(half)))
            half = with_responses(half, answers, Layout(self.layout.pad_token_id), whole)
        prompts = Prompts(
            batch=half,
            stop_token_ids=frozenset({*self.stop_token_ids, *(end[0] for end in ends if end)}),
            suppressed_token_ids=tuple(self.suppressed_token_ids),
            images=[with_image_list(row).get("images") for row in rows] if self.with_images else None,
        )
        seed = seed_of(*seeds)
        sampled = self.engine.sample(prompts, self.sampling, seed)
        samples = [
            [self._sample(ids, prompts.stop_token_ids, end, len(prompt)) for ids in answers]
            for answers, end, prompt in zip(sampled, ends, prompt_ids(half), strict=True)
        ]
        if self.selection.measure or self.selection.rule == "hardest":
            samples = self._measured(samples, half)
        chosen, rejected = self._dataset_responses(batch)
        if self.scorer is not None:
            samples, chosen = self._scored(self.scorer, rows, samples, chosen, columns or {})
        return self._selected(batch, samples, chosen, rejected, random.Random(seed))

    def _endings(self, batch: dict[str, Any]) -> list[tuple[int, ...]]:
        special = {*self.tokenizer.all_special_ids, *self.stop_token_ids}
        answers = response_ids(one_side(batch, "chosen"))
        blank = {
            token for answer in answers for token in answer[-3:] if not self.tokenizer.decode([token]).strip()
        } - special
        found = [response_ending(answer, special, blank) for answer in answers]
        # A truncated response shows none: those of the others stand in
        usual = max(found, key=found.count) or next(filter(None, found), ())
        return [end or usual for end in found]

    def _sample(
        self, ids: list[int], stop_token_ids: frozenset[int], ending: tuple[int, ...], prompt_length: int
    ) -> Sample:
        ended = bool(ids) and ids[-1] in stop_token_ids
        # The way the template ends a response, so that the two sides of a pair do not differ in form
        kept = (*ids[:-1], *(ending or ids[-1:])) if ended else tuple(ids)
        limit = self.layout.max_length
        fits = limit is None or prompt_length + len(kept) <= limit
        return Sample(kept, self._text(kept), truncated=not (ended and fits))

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _dataset_responses(self, batch: dict[str, Any]) -> tuple[list[Sample], list[Sample]]:
        sides = [response_ids(one_side(batch, side)) for side in ("chosen", "rejected")]
        chosen, rejected = ([Sample(tuple(ids), self._text(ids)) for ids in side] for side in sides)
        return chosen, rejected

    def _measured(self, samples: list[list[Sample]], half: dict[str, Any]) -> list[list[Sample]]:
        columns = []
        for answers in zip(*samples, strict=True):
            averages = measure_avg_logps(self.model, half, [answer.ids for answer in answers], self.layout)
            columns.append([replace(a, avg_logp=value) for a, value in zip(answers, averages, strict=True)])
        return [list(answers) for answers in zip(*columns, strict=True)]

    def _scored(
        self,
        scorer: Scorer,
        rows: list[dict[str, Any]],
        samples: list[list[Sample]],
        chosen: list[Sample],
        columns: Mapping[str, Any],
    ) -> tuple[list[list[Sample]], list[Sample]]:
        conversational = not isinstance(rows[0]["prompt"], str)
        copies = self.sampling.num_generations + 1
        completions: list[Any] = []
        for row, answers in zip(rows, samples, strict=True):
            texts = [answer.text for answer in answers]
            completions += [[{"role": "assistant", "content": text}] if conversational else text for text in texts]
            completions.append(row["chosen"] if conversational else self._without_end(row["chosen"]))
        rewards = scorer(
            [row["prompt"] for row in rows for _ in range(copies)],
            completions,
            [list(a.ids) for answers, best in zip(samples, chosen, strict=True) for a in (*answers, best)],
            {
                **{key: [row[key] for row in rows for _ in range(copies)] for key in rows[0].keys() - NOT_FOR_REWARDS},
                **columns,
            },
        )
        scored = [
            [replace(answer, reward=rewards[row * copies + index]) for index, answer in enumerate(answers)]
            for row, answers in enumerate(samples)
        ]
        best = [replace(answer, reward=rewards[(row + 1) * copies - 1]) for row, answer in enumerate(chosen)]
        return scored, best

    def _without_end(self, text: str) -> str:
        # TRL adds it to responses that are plain text
        end = self.tokenizer.eos_token
        return text.removesuffix(end) if end else text

    def _selected(
        self,
        batch: dict[str, Any],
        samples: list[list[Sample]],
        chosen: list[Sample],
        rejected: list[Sample],
        rng: random.Random,
    ) -> list[SampledPair]:
        options = self.selection
        pairs = []
        for ids, answers, best, worst in zip(prompt_ids(batch), samples, chosen, rejected, strict=False):
            choice = select(
                answers,
                best,
                worst,
                options.rule,
                rng,
                scored=self.scorer is not None,
                replace_chosen=options.replace_chosen,
                discard_truncated=options.discard_truncated,
            )
            pairs.append(SampledPair(self._text(ids), best, worst, tuple(answers), choice))
        return pairs


def whole_prompts(rows: Sequence[Mapping[str, Any]], layout: Layout) -> list[list[int]] | None:
    """
    Prompts from the rows themselves, where truncation at the start may have taken them from a batch.

    Args:
        rows (`Sequence[Mapping]`):
            Tokenized rows.
        layout ([`Layout`]):
            How they are collated.

    Returns:
        `list[list[int]]` or `None`: `None` where a batch holds them whole.
    """
    if layout.max_length is None or not layout.keep_end:
        return None
    return [list(row["prompt_ids"]) for row in rows]


def seed_of(*parts: int) -> int:
    """
    A seed from several numbers, far from the seeds of numbers nearby.

    Args:
        *parts (`int`):
            Not negative: seed of the run, step, process and so on.

    Returns:
        `int`: 63 bits.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
