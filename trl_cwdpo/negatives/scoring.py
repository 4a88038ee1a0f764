"""What samples are worth: rewards from TRL-style reward functions, and the policy's own average log-probability."""

import asyncio
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trl_cwdpo import upstream
from trl_cwdpo.objectives import average_logps
from trl_cwdpo.preserved import evaluation_mode, preserved_random_state
from trl_cwdpo.upstream import rewards

from .responses import Layout, with_responses


class Scorer:
    """
    Scores completions with one or more reward functions.

    Args:
        functions (`Callable`, `str`, [`~transformers.PreTrainedModel`] or a list of them):
            As `reward_funcs` of [`~trl.GRPOTrainer`]: called with `prompts`, `completions`, `completion_ids`, the
            other columns of the dataset, `trainer_state`, `log_extra` and `log_metric`, and returning one number or
            `None` per completion; synchronous or not; or a sequence classifier, or its name.
        weights (`list[float]`, *optional*):
            Their weights, 1 by default.
        accelerator ([`~accelerate.Accelerator`]):
            The run's.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            For reward models.

    Raises:
        ValueError: If the numbers of functions and weights differ, or there is no function.
    """

    def __init__(
        self,
        functions: Any,  # noqa: ANN401 (what TRL accepts)
        weights: Sequence[float] | None,
        accelerator: Any,  # noqa: ANN401
        *,
        trust_remote_code: bool = False,
    ) -> None:
        functions = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not functions:
            raise ValueError("`negative_reward_funcs` is an empty list: give at least one reward function, or None.")
        if weights is not None and len(weights) != len(functions):
            raise ValueError(
                f"`negative_reward_weights` has {len(weights)} numbers and `negative_reward_funcs` {len(functions)} "
                "functions: give one weight per function, or none."
            )
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        self.functions = [
            _reward_model(function, accelerator, trust_remote_code=trust_remote_code)
            if isinstance(function, str | torch.nn.Module)
            else function
            for function in functions
        ]
        self.names = [rewards.callable_name(function) for function in self.functions]
        self._loop = rewards.BackgroundLoop()

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: dict[str, Any]
    ) -> list[float]:
        """
        Weighted sums of the rewards.

        Args:
            prompts (`list`):
                A prompt per completion, a string or messages.
            completions (`list`):
                Strings or messages.
            completion_ids (`list[list[int]]`):
                Their tokens.
            columns (`dict`):
                Everything else that the functions get.

        Returns:
            `list[float]`: NaN where no function has a reward for a completion.

        Raises:
            ValueError: If a function does not return one reward per completion.
        """
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        results: list[Any] = [None] * len(self.functions)
        pending = {}
        for index, function in enumerate(self.functions):
            if rewards.is_async_callable(function):
                pending[index] = function
            else:
                results[index] = function(**arguments)
        if pending:
            for index, result in zip(pending, self._loop.run(_gathered(pending, arguments)), strict=True):
                results[index] = result
        for name, result in zip(self.names, results, strict=True):
            if len(result) != len(prompts):
                raise ValueError(
                    f"The reward function {name!r} of `negative_reward_funcs` returned {len(result)} rewards for "
                    f"{len(prompts)} completions: it must return one per completion, `None` where it has none."
                )
        return [weighted_sum(row, self.weights) for row in zip(*results, strict=True)]


def _reward_model(model: Any, accelerator: Any, *, trust_remote_code: bool) -> rewards.RewardModel:  # noqa: ANN401
    try:
        return rewards.RewardModel(model, accelerator, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if not isinstance(model, str):
            raise
        raise ValueError(
            f"`negative_reward_funcs`: there is no reward model {model!r} to load. Name a function as "
            f"module:function, or a folder or repository with a sequence classifier. ({error})"
        ) from error


def named_reward(name: str) -> Any:  # noqa: ANN401 (a function, or the name of a model)
    """
    What the name of a reward function stands for.

    Args:
        name (`str`):
            `module:function`, or the folder or name of a reward model.

    Returns:
        `Callable`, or the name of the model as it is.

    Raises:
        ValueError: If there is no such function.
    """
    if ":" not in name or Path(name).exists():
        return name
    module, function = name.split(":", 1)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`negative_reward_funcs`: there is no reward function {name!r}: {error}. Name it as module:function, of "
            "a module that can be imported (`PYTHONPATH=.` for one in the working directory), or name a reward model."
        ) from error


async def _gathered(functions: dict[int, Callable[..., Any]], arguments: dict[str, Any]) -> list[Any]:
    return await asyncio.gather(*(function(**arguments) for function in functions.values()))


def weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float:
    """
    Weighted sum of the rewards that are there, as TRL sums them.

    Args:
        values (`Sequence[float]`):
            One per function; `None` or NaN: it has none.
        weights (`Sequence[float]`):
            One per function.

    Returns:
        `float`: NaN where no function has a reward.
    """
    there = [
        weight * float(value)
        for value, weight in zip(values, weights, strict=True)
        if value is not None and not math.isnan(value)
    ]
    return sum(there) if there else math.nan


def measure_avg_logps(
    model: torch.nn.Module, batch: dict[str, Any], responses: Sequence[Sequence[int]], layout: Layout
) -> list[float]:
    """
    ℓ̄ of responses to the prompts of a batch. All processes call this together.

    Args:
        model (`nn.Module`):
            The policy with a fused head, as wrapped by accelerate.
        batch (`dict`):
            Collated, one row a prompt.
        responses (`Sequence[Sequence[int]]`):
            One response per row.
        layout ([`Layout`]):
            How to pad and truncate.

    Returns:
        `list[float]`: nats per token.
    """
    inputs = with_responses(batch, dict(enumerate(responses)), layout)
    mask = inputs.pop("completion_mask")
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    with preserved_random_state(), evaluation_mode(model), torch.no_grad():
        outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    averages, _ = average_logps(upstream.per_token_logps(outputs, mask.size(1) - 1), mask[:, 1:])
    return averages.float().tolist()
