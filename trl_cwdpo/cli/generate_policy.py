"""The policy engine of `trl-cwdpo generate-negatives`: sample from a checkpoint, select, keep ℓ̄ of each sample."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, tqdm
from datasets import Dataset
from transformers import ProcessorMixin

from trl_cwdpo import upstream
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.generation_journal import Journal
from trl_cwdpo.cli.launching import is_a_launched_process
from trl_cwdpo.cwdpo_config import CWDPOConfig
from trl_cwdpo.data import PreferenceCollator
from trl_cwdpo.negatives.engines import SamplingOptions, TransformersEngine
from trl_cwdpo.negatives.pairs import NegativeSampler, SampledPair, SelectionOptions
from trl_cwdpo.negatives.responses import Layout
from trl_cwdpo.negatives.scoring import Scorer, named_reward
from trl_cwdpo.upstream.generation import GeneratingPolicy, add_scoring_head, image_token_ids, stop_token_ids
from trl_cwdpo.upstream.models import load_model, load_processor


@dataclass(frozen=True)
class PolicySettings:
    """
    How to sample from a checkpoint.

    Args:
        model (`str`): Folder or name of the model, or of an adapter.
        num_generations (`int`): Responses per prompt.
        selection (`str`): `"random"`, `"hardest"` or `"lowest_reward"`.
        reward_funcs (`tuple[str, ...]`): `module:function`, or names of reward models.
        on_policy_chosen (`bool`): Whether the best-scored sample may replace the chosen response.
        discard_truncated (`bool`): Whether truncated samples are no negatives.
        max_completion_length (`int`): Longest response, tokens.
        temperature (`float`): Temperature.
        top_p (`float`): Mass of the tokens that are sampled from.
        batch_size (`int`): Prompts at a time.
        seed (`int`): Seed.
        dtype (`str`): Data type of the weights.
        trust_remote_code (`bool`): Whether a model's own code may run.
    """

    model: str
    num_generations: int = 1
    selection: str = "random"
    reward_funcs: tuple[str, ...] = ()
    on_policy_chosen: bool = False
    discard_truncated: bool = False
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0
    dtype: str = "float32"
    trust_remote_code: bool = False


def sample_dataset(dataset: Dataset, settings: PolicySettings, journal: Journal, *, bar: bool = True) -> None:
    """
    Sample negatives for the rows that have none yet. Several processes share the batches, and all end up with the
    results of all.

    Args:
        dataset ([`~datasets.Dataset`]):
            Usable pairs.
        settings ([`PolicySettings`]):
            How.
        journal ([`Journal`]):
            Where the results go.
        bar (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    missing = set(journal.missing(len(dataset)))
    process, processes = process_number()
    # Several processes set up together, whoever has something left to do
    if not missing and processes == 1:
        return
    sampler, rows = build_sampler(dataset, settings, journal.folder)
    # Batches start at the same rows whenever the command is run, and on however many processes, so that the samples
    # are the same
    starts = [
        start
        for start in range(0, len(dataset), settings.batch_size)
        if start // settings.batch_size % processes == process
        and missing & set(range(start, start + settings.batch_size))
    ]
    for start in tqdm(starts, desc="Sampling negatives", disable=not bar):
        indices = range(start, min(start + settings.batch_size, len(dataset)))
        pairs = sampler([rows[index] for index in indices], (settings.seed, start))
        journal.add([_entry(index, pair) for index, pair in zip(indices, pairs, strict=True)])
    if processes > 1:
        PartialState().wait_for_everyone()
        journal.read()


def process_number() -> tuple[int, int]:
    """Number of this process, and how many there are; 0 and 1 without a launcher."""
    if not is_a_launched_process():
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def build_sampler(dataset: Dataset, settings: PolicySettings, folder: Path) -> tuple[NegativeSampler, Dataset]:
    """
    A sampler for a checkpoint, and the dataset as the sampler wants it.

    Args:
        dataset ([`~datasets.Dataset`]):
            Usable pairs.
        settings ([`PolicySettings`]):
            How to sample.
        folder (`Path`):
            Output folder.

    Returns:
        `tuple[NegativeSampler, Dataset]`.
    """
    # First, since a configuration sets up accelerate anew
    args = CWDPOConfig(str(folder), max_length=None, use_cpu=not torch.accelerator.is_available(), bf16=False)
    accelerator = Accelerator(cpu=args.use_cpu)
    _check_processes(accelerator)
    model: Any = load_model(settings.model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    add_scoring_head(model)
    model.to(accelerator.device).eval()
    processing_class = load_processor(settings.model, trust_remote_code=settings.trust_remote_code)
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    vision = bool({"image", "images"} & set(dataset.column_names))
    owner = SimpleNamespace(
        args=args, processing_class=processing_class, _tokenizer=tokenizer, _is_vision_dataset=vision
    )
    rows = dataset if vision else upstream.prepare_preference_dataset(owner, dataset, processing_class, args, "input")
    collator = PreferenceCollator(upstream.preference_collator(owner))
    scorer = None
    if settings.reward_funcs:
        try:
            functions = [named_reward(name) for name in settings.reward_funcs]
            scorer = Scorer(functions, None, accelerator, trust_remote_code=settings.trust_remote_code)
        except ValueError as error:
            raise CommandError(f"--reward_funcs {' '.join(settings.reward_funcs)}: {error}") from error

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        collated = collator(batch)
        return {key: v.to(accelerator.device) if torch.is_tensor(v) else v for key, v in collated.items()}

    sampler = NegativeSampler(
        engine=TransformersEngine(GeneratingPolicy(model, accelerator), tokenizer.pad_token_id),
        model=model,
        collate=collate,
        tokenizer=tokenizer,
        layout=Layout(tokenizer.pad_token_id),
        stop_token_ids=stop_token_ids(model, tokenizer),
        suppressed_token_ids=image_token_ids(model.config),
        sampling=SamplingOptions(
            settings.num_generations, settings.max_completion_length, settings.temperature, settings.top_p
        ),
        selection=SelectionOptions(
            settings.selection, settings.on_policy_chosen, settings.discard_truncated, measure=True
        ),
        scorer=scorer,
    )
    return sampler, rows


def _check_processes(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise CommandError(
            "Processes share the rows here, not the weights: launch with --multi_gpu instead of "
            f"{accelerator.distributed_type.value}, or sample from a model that exceeds one device with --engine "
            "endpoint."
        )
    if accelerator.num_processes != process_number()[1]:
        raise CommandError(
            f"The launcher started {process_number()[1]} processes, but accelerate knows of "
            f"{accelerator.num_processes}. On CPUs, set ACCELERATE_USE_CPU=true and launch with --multi_gpu."
        )


def _entry(row: int, pair: SampledPair) -> dict[str, Any]:
    rejected, chosen = pair.replacement("rejected"), pair.replacement("chosen")
    return {
        "row": row,
        "source": "dataset" if rejected is None else "policy",
        "reason": pair.choice.fallback,
        "rejected": None if rejected is None else rejected.text.strip(),
        "chosen": None if chosen is None else chosen.text.strip(),
        "avg_logp": None if rejected is None else rejected.avg_logp,
        "samples": [
            {"text": s.text, "avg_logp": s.avg_logp, "reward": None if math.isnan(s.reward) else s.reward}
            for s in pair.samples
        ],
    }
