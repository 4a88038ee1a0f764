"""Sample responses to prompts: with transformers' `generate`, or with vLLM through TRL.

Both engines take prompts as tokens, so that the policy continues exactly the context that the loss sees, and return
the tokens it sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trl_cwdpo.preserved import evaluation_mode, preserved_random_state
from trl_cwdpo.upstream.generation import GeneratingPolicy

from .responses import left_padded_prompts, prompt_ids, tiled


@dataclass(frozen=True)
class SamplingOptions:
    """
    How to sample.

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Responses per prompt.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest response, tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the most likely tokens that are sampled from.
    """

    num_generations: int = 1
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Prompts:
    """
    Prompts to continue.

    Args:
        batch (`dict`):
            Collated, one row a prompt, each with some response, which does not matter.
        stop_token_ids (`frozenset[int]`):
            Tokens that end a response.
        suppressed_token_ids (`tuple[int, ...]`, *optional*):
            Tokens that must not be sampled.
        images (`list`, *optional*):
            The pictures of each prompt, for an engine that processes them itself.
    """

    batch: dict[str, Any]
    stop_token_ids: frozenset[int]
    suppressed_token_ids: tuple[int, ...] = ()
    images: list[Any] | None = field(default=None)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.batch["input_ids"])


class Engine(Protocol):
    """Samples responses. All processes call it together, with equally many prompts, at least one."""

    def synchronize(self) -> None:
        """Bring the weights up to date, on all processes, before a round of sampling."""
        ...

    def sample(self, prompts: Prompts, options: SamplingOptions, seed: int) -> list[list[list[int]]]:
        """
        Continue prompts.

        Args:
            prompts ([`Prompts`]):
                The prompts of this process.
            options ([`SamplingOptions`]):
                How to sample.
            seed (`int`):
                Seed, of its own on each process.

        Returns:
            `list[list[list[int]]]`: for each prompt, `num_generations` responses as tokens, up to and with the first
            stop token.
        """
        ...


def until_stop(ids: Sequence[int], stop_token_ids: frozenset[int]) -> list[int]:
    """
    Tokens up to and with the first that ends a response.

    Args:
        ids (`Sequence[int]`):
            Sampled tokens, perhaps with padding behind the end.
        stop_token_ids (`frozenset[int]`):
            Tokens that end a response.

    Returns:
        `list[int]`.
    """
    end = next((index for index, token in enumerate(ids) if token in stop_token_ids), len(ids) - 1)
    return list(ids[: end + 1])


class TransformersEngine:
    """
    Samples with `generate`, from random numbers of its own: the state of the run's generators stays as it was.

    Args:
        policy ([`~trl_cwdpo.upstream.generation.GeneratingPolicy`]):
            The policy.
        pad_token_id (`int`):
            Padding of prompts.
    """

    def __init__(self, policy: GeneratingPolicy, pad_token_id: int) -> None:
        self.policy = policy
        self.pad_token_id = pad_token_id

    def synchronize(self) -> None:
        """Nothing to do: the weights are the run's own."""

    def sample(self, prompts: Prompts, options: SamplingOptions, seed: int) -> list[list[list[int]]]:
        """See [`Engine`]."""
        inputs = tiled(left_padded_prompts(prompts.batch, self.pad_token_id), options.num_generations)
        settings = {
            "max_new_tokens": options.max_completion_length,
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            # Set here, so that a model's own preferences for inference do not reach the samples
            "top_k": 0,
            "min_p": None,
            "repetition_penalty": 1.0,
            "num_beams": 1,
            "use_cache": True,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": sorted(prompts.stop_token_ids),
            "suppress_tokens": list(prompts.suppressed_token_ids) or None,
        }
        with preserved_random_state(), evaluation_mode(self.policy.model):
            torch.manual_seed(seed)
            sampled = self.policy.generate(inputs, settings).tolist()
        count = len(prompts)
        # Tiled: all prompts, then all of them again
        return [
            [
                until_stop(sampled[copy * count + row], prompts.stop_token_ids)
                for copy in range(options.num_generations)
            ]
            for row in range(count)
        ]


class VLLMEngine:
    """
    Samples with vLLM, whose weights are brought up to date first.

    Args:
        generation (`VLLMGeneration`):
            TRL's, in server or colocate mode.
    """

    def __init__(self, generation: Any) -> None:  # noqa: ANN401 (TRL's class, which needs vLLM)
        self.generation = generation

    def synchronize(self) -> None:
        """Send the policy's weights to vLLM."""
        self.generation.sync_weights()

    def sample(self, prompts: Prompts, options: SamplingOptions, seed: int) -> list[list[list[int]]]:
        """See [`Engine`]; `seed` does not reach vLLM, whose engine has been seeded when it was built."""
        generation, copies = self.generation, options.num_generations
        generation.generation_kwargs = {
            **generation.generation_kwargs,
            "stop_token_ids": sorted(prompts.stop_token_ids),
        }
        images = prompts.images if prompts.images is not None and any(prompts.images) else None
        _, sampled, *_ = generation.generate(
            # The copies of a prompt side by side, as TRL expects them
            prompts=[ids for ids in prompt_ids(prompts.batch) for _ in range(copies)],
            images=None if images is None else [row or None for row in images for _ in range(copies)],
            num_generations=copies,
        )
        return [
            [until_stop(ids, prompts.stop_token_ids) for ids in sampled[row * copies : (row + 1) * copies]]
            for row in range(len(prompts))
        ]
