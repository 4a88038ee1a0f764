"""Measure rejected responses before the first update, without touching the run.

Both stages may take numbers from the initial policy: the floor and temperature of the cooling, or the floor and
ceiling of the gentle negatives' NLL. The pass below runs on all ranks, on a seeded sample of the training data, and
leaves the training stream, the random state and the model's mode as they were.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from datasets import Dataset

from .data import one_side
from .objectives import average_logps
from .preserved import evaluation_mode, preserved_random_state


@dataclass(frozen=True)
class InitialNegatives:
    """
    A sample of rejected responses under the initial policy, the same on all ranks.

    Args:
        avg_logps (`np.ndarray` of shape `(n,)`):
            ℓ̄, nats per token.
        lengths (`np.ndarray` of shape `(n,)`):
            L, tokens.
    """

    avg_logps: np.ndarray
    lengths: np.ndarray


def sample_rows(dataset: Any, size: int, seed: int) -> list[dict[str, Any]]:  # noqa: ANN401 (map-style or iterable)
    """
    Up to `size` rows of a dataset: drawn at random from a map-style one, the first ones of a stream.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset; a stream is read from a fresh iterator.
        size (`int`):
            Number of rows.
        seed (`int`):
            Seed of the draw.

    Returns:
        `list[dict]`.
    """
    if isinstance(dataset, Dataset):
        indices = np.random.default_rng(seed).permutation(len(dataset))[:size]
        return [dataset[int(index)] for index in np.sort(indices)]
    return list(islice(iter(dataset), size))


def measure_initial_negatives(trainer: Any, model: torch.nn.Module, size: int) -> InitialNegatives:  # noqa: ANN401
    """
    Average token log-probability and length of rejected responses under the current policy.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer whose `data_collator` returns preference batches and whose model has a fused head. All ranks must
            call this together.
        model (`nn.Module`):
            The policy, as wrapped by accelerate.
        size (`int`):
            Number of rejected responses, over all ranks.

    Returns:
        [`InitialNegatives`].
    """
    with preserved_random_state():
        rows = sample_rows(trainer.train_dataset, size, trainer.args.seed)
    return _measure_rows(trainer, model, rows)


def measure_every_negative(trainer: Any, model: torch.nn.Module) -> InitialNegatives:  # noqa: ANN401
    """
    The same of every row of a map-style training dataset, in its order.

    Args:
        trainer ([`~transformers.Trainer`]):
            See [`measure_initial_negatives`].
        model (`nn.Module`):
            The policy, as wrapped by accelerate.

    Returns:
        [`InitialNegatives`].
    """
    return _measure_rows(trainer, model, trainer.train_dataset)


def _measure_rows(trainer: Any, model: torch.nn.Module, rows: Any) -> InitialNegatives:  # noqa: ANN401 (a sequence)
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    batch_size = trainer.args.per_device_train_batch_size
    with preserved_random_state(), evaluation_mode(model), torch.no_grad():
        # Every rank makes the same number of forwards (sharded models wait for one another): short ranks repeat rows,
        # which the gathering then leaves out
        per_rank = -(-len(rows) // world)
        mine = [(rank + world * i) % len(rows) for i in range(per_rank)]
        starts = tqdm(
            range(0, per_rank, batch_size), desc="Measuring rejected responses", disable=trainer.args.disable_tqdm
        )
        batches = [
            _measure(trainer, model, [rows[index] for index in mine[start : start + batch_size]]) for start in starts
        ]
        # Interleaved by rank, so that the repeated rows come last
        gathered = trainer.accelerator.gather(torch.cat(batches).unsqueeze(0))
    values = gathered.transpose(0, 1).reshape(-1, 2)[: len(rows)].double().cpu().numpy()
    return InitialNegatives(avg_logps=values[:, 0], lengths=values[:, 1])


def _measure(trainer: Any, model: torch.nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:  # noqa: ANN401
    inputs = one_side(trainer._prepare_inputs(trainer.data_collator(rows)), "rejected", trim_to_multiple_of=1)
    completion_mask = inputs["completion_mask"]
    labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
    ours = {"completion_mask", "labels", "ref_chosen_logps", "ref_rejected_logps"}
    model_inputs = {key: value for key, value in inputs.items() if key not in ours}
    outputs = model(**model_inputs, labels=labels, use_cache=False, fused_lm_head=True)
    shift_mask = completion_mask[:, 1:]
    avg_logps, lengths = average_logps(outputs.log_probs[:, -shift_mask.size(1) :], shift_mask)
    return torch.stack([avg_logps, lengths.to(avg_logps.dtype)], dim=1)
