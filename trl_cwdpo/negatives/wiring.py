"""Put on-policy negatives together for a trainer's options."""

import logging
from typing import Any

from trl_cwdpo.negative_options import NegativeOptions, refuse_stored_references
from trl_cwdpo.upstream import dispatches_batches
from trl_cwdpo.upstream.generation import GeneratingPolicy, image_token_ids, stop_token_ids
from trl_cwdpo.upstream.vllm import build_vllm_generation

from .engines import Engine, SamplingOptions, TransformersEngine, VLLMEngine
from .pairs import NegativeSampler, SelectionOptions
from .records import SampleTable
from .refresh import FractionSchedule, OnPolicyNegatives
from .responses import Layout
from .scoring import Scorer, named_reward

logger = logging.getLogger(__name__)


def build_scorer(trainer: Any, reward_funcs: Any) -> Scorer | None:  # noqa: ANN401 (trainer; what TRL accepts)
    """
    The scorer of a trainer.

    Args:
        trainer ([`CWDPOTrainer`]):
            The trainer.
        reward_funcs (`Callable`, `str`, model, or a list of them, *optional*):
            Its `negative_reward_funcs`.

    Returns:
        [`Scorer`] or `None`.

    Raises:
        ValueError: If the options need rewards and there are none, weights have no functions, or both the trainer and
            its options name functions.
    """
    args = trainer.args
    if args.negative_reward_funcs:
        if reward_funcs is not None:
            raise ValueError(
                f"`negative_reward_funcs` was passed to the trainer and is {args.negative_reward_funcs} in its "
                "options: leave one of them out."
            )
        reward_funcs = [named_reward(name) for name in args.negative_reward_funcs]
    if reward_funcs is not None:
        return Scorer(
            reward_funcs,
            args.negative_reward_weights,
            trainer.accelerator,
            trust_remote_code=args.trust_remote_code,
        )
    needing = {
        "negative_selection='lowest_reward'": args.negative_selection == "lowest_reward",
        "on_policy_chosen=True": args.on_policy_chosen,
        f"negative_reward_weights={args.negative_reward_weights}": args.negative_reward_weights is not None,
    }
    for option, needs in needing.items():
        if needs:
            raise ValueError(
                f"`{option}` needs rewards: pass `negative_reward_funcs` to the trainer (functions with the signature "
                "of TRL's `reward_funcs`, or a reward model), name them in the option of that name, or change the "
                "option."
            )
    return None


def build_negatives(trainer: Any, reward_funcs: Any) -> OnPolicyNegatives:  # noqa: ANN401 (trainer; what TRL accepts)
    """
    On-policy negatives for a trainer; with `dataset_negative_fraction=1` they do nothing until a callback asks.

    Args:
        trainer ([`CWDPOTrainer`]):
            The trainer, after its parent's `__init__`.
        reward_funcs (`Callable`, `str`, model, or a list of them, *optional*):
            Its `negative_reward_funcs`.

    Returns:
        [`OnPolicyNegatives`].

    Raises:
        ValueError: If options cannot go together.
        ImportError: If vLLM is asked for and missing.
    """
    args = trainer.args
    scorer = build_scorer(trainer, reward_funcs)
    if args.samples_negatives:
        check_can_sample(trainer)
    else:
        _warn_of_idle_options(trainer, has_rewards=scorer is not None)
    layout = Layout(
        pad_token_id=trainer._tokenizer.pad_token_id,
        max_length=args.max_length,
        keep_end=args.truncation_mode == "keep_end",
        pad_to_multiple_of=args.pad_to_multiple_of,
    )
    vllm: Engine | None = None
    if args.use_vllm:
        vllm = VLLMEngine(build_vllm_generation(trainer, _vllm_sequences(trainer)))
    return OnPolicyNegatives(
        trainer,
        # The model is wrapped when training starts, and again by each call of `train`
        lambda: build_sampler(trainer, layout, scorer, vllm),
        schedule=FractionSchedule(args.dataset_negative_fraction, args.dataset_negative_fraction_end),
        refresh_steps=args.negative_refresh_steps,
        batch_size=args.negative_generation_batch_size,
        layout=layout,
        table=SampleTable(args.negative_log_samples),
        needs_all_columns=scorer is not None,
    )


def build_sampler(
    trainer: Any,  # noqa: ANN401 (its class imports this module)
    layout: Layout,
    scorer: Scorer | None,
    vllm: Engine | None,
) -> NegativeSampler:
    """
    The sampler for a trainer's model as it is wrapped now.

    Args:
        trainer ([`CWDPOTrainer`]):
            The trainer.
        layout ([`Layout`]):
            How its collator lays out a batch.
        scorer ([`Scorer`], *optional*):
            Rewards.
        vllm ([`Engine`], *optional*):
            vLLM; `None`: transformers samples.

    Returns:
        [`NegativeSampler`].
    """
    args = trainer.args
    policy = GeneratingPolicy(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )
    return NegativeSampler(
        engine=vllm or TransformersEngine(policy, layout.pad_token_id),
        model=trainer.model_wrapped,
        collate=lambda rows: trainer._prepare_inputs(trainer.data_collator(rows)),
        tokenizer=trainer._tokenizer,
        layout=layout,
        stop_token_ids=stop_token_ids(trainer.model, trainer._tokenizer),
        suppressed_token_ids=image_token_ids(trainer.model.config),
        sampling=SamplingOptions(
            num_generations=args.num_negative_generations,
            max_completion_length=args.negative_max_completion_length,
            temperature=args.negative_temperature,
            top_p=args.negative_top_p,
        ),
        selection=SelectionOptions(
            rule=args.negative_selection,
            replace_chosen=args.on_policy_chosen,
            discard_truncated=args.negative_discard_truncated,
        ),
        scorer=scorer,
        with_images=vllm is not None,
    )


def check_can_sample(trainer: Any) -> None:  # noqa: ANN401 (its class imports this module)
    """
    Raise if something in a run excludes on-policy negatives.

    Args:
        trainer ([`CWDPOTrainer`]):
            The trainer.

    Raises:
        ValueError: Naming the options and the way out.
    """
    args = trainer.args
    refuse_stored_references(args.precompute_ref_log_probs, args.reference_cache_dir)
    if dispatches_batches(trainer):
        raise ValueError(
            "`dataset_negative_fraction` below 1 needs the rows of each process, which "
            "`accelerator_config={'dispatch_batches': True}` reads on one process only: leave `dispatch_batches` "
            "unset, or keep `dataset_negative_fraction=1.0`."
        )


def _warn_of_idle_options(trainer: Any, *, has_rewards: bool) -> None:  # noqa: ANN401 (its class imports this module)
    defaults = NegativeOptions()
    idle = [
        name
        for name in ("num_negative_generations", "negative_selection", "on_policy_chosen", "use_vllm")
        if getattr(trainer.args, name) != getattr(defaults, name)
    ]
    idle += ["negative_reward_funcs"] if has_rewards else []
    if idle and trainer.accelerator.is_main_process:
        logger.warning(
            "%s: without effect as long as `dataset_negative_fraction` is 1, which keeps the dataset's rejected "
            "responses. Lower it, or let a callback call `set_dataset_negative_fraction`.",
            ", ".join(f"`{name}`" for name in idle),
        )


def _vllm_sequences(trainer: Any) -> int:  # noqa: ANN401 (its class imports this module)
    args = trainer.args
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.negative_refresh_steps
    return min(args.negative_generation_batch_size or window, window) * args.num_negative_generations
