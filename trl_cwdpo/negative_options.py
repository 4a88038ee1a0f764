"""Options of on-policy negatives, and of vLLM, which can sample them; mixed into the configuration of stage 2."""

import math
from dataclasses import dataclass, field

from .redaction import redacted

SELECTIONS = ("random", "hardest", "lowest_reward")
VLLM_MODES = ("server", "colocate")
VLLM_MODEL_IMPLS = ("vllm", "transformers")


@dataclass
class NegativeOptions:
    r"""
    What the configuration of stage 2 says about on-policy negatives. The names of vLLM's options are TRL's.

    Parameters:
        dataset_negative_fraction (`float`, *optional*, defaults to `1.0`):
            Share of pairs that keep the dataset's rejected response, in [0, 1]. The others get one that is sampled
            from the current policy for the same prompt and pictures. 1: no sampling.
        dataset_negative_fraction_end (`float`, *optional*):
            Share at the last step, reached on a straight line from `dataset_negative_fraction`. By default the share
            is constant.
        num_negative_generations (`int`, *optional*, defaults to `1`):
            Responses sampled per prompt, one of which is selected.
        negative_selection (`str`, *optional*, defaults to `"random"`):
            Which sample becomes the negative: `"random"`, `"hardest"` (highest average token log-probability under the
            policy) or `"lowest_reward"` (needs `negative_reward_funcs`).
        negative_reward_funcs (`list[str]`, *optional*):
            Reward functions by name, where a command line or a recipe has to name them: `module:function` of an
            importable module, or the folder or name of a reward model. In Python, pass functions to the trainer.
        negative_reward_weights (`list[float]`, *optional*):
            Weights of `negative_reward_funcs`; 1 by default.
        on_policy_chosen (`bool`, *optional*, defaults to `False`):
            Whether the best-scored sample replaces the chosen response where it scores at least as high, so that both
            sides of a pair come from the policy. Needs `negative_reward_funcs`.
        negative_discard_truncated (`bool`, *optional*, defaults to `False`):
            Whether a sample that reaches the limit of tokens before its end is no negative, so that the dataset's is
            kept.
        negative_max_completion_length (`int`, *optional*, defaults to `256`):
            Longest sampled response, in tokens.
        negative_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling.
        negative_top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the most likely tokens that are sampled from, in (0, 1].
        negative_refresh_steps (`int`, *optional*, defaults to `1`):
            Optimizer steps per round of sampling. 1: each step samples from the policy as it is. k: a round samples
            for the next k steps at once, so the last of them trains on responses of a policy k − 1 updates old.
        negative_generation_batch_size (`int`, *optional*):
            Most prompts a process samples for at a time, to bound memory. By default all prompts of a round together.
        negative_log_samples (`int`, *optional*, defaults to `4`):
            Sampled responses per log that are written to `negatives.jsonl` and, as a table, to the trackers; 0: none.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Whether DeepSpeed ZeRO-3 gathers the policy's weights for sampling, which is faster; `False` samples layer
            by layer, for models that exceed the memory of one device.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples, rather than transformers.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"server"`: a vLLM server that was started before; `"colocate"`: vLLM in the training processes, on their
            devices.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Whose implementation of the model vLLM runs: `"vllm"` or `"transformers"`.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether colocated vLLM gives its memory back between rounds of sampling.
        vllm_structured_outputs_regex (`str`, *optional*):
            Regular expression that sampled responses follow.
        vllm_server_base_url (`str`, *optional*):
            URL of the vLLM server, such as `http://localhost:8000`, in place of host and port.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Host of the vLLM server.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Port of the vLLM server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the vLLM server to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port over which weights are sent to the vLLM server.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of a device's memory that colocated vLLM takes.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt and response together in vLLM; by default the model's own.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Devices over which colocated vLLM spreads the model.
    """

    dataset_negative_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of pairs that keep the dataset's rejected response, in [0, 1]. The others get one that is "
            "sampled from the current policy for the same prompt and pictures. 1: no sampling.",
        },
    )
    dataset_negative_fraction_end: float | None = field(
        default=None,
        metadata={
            "help": "Share at the last step, reached on a straight line from `dataset_negative_fraction`. By default "
            "the share is constant.",
        },
    )
    num_negative_generations: int = field(
        default=1,
        metadata={
            "help": "Responses sampled per prompt, one of which is selected.",
        },
    )
    negative_selection: str = field(
        default="random",
        metadata={
            "help": "Which sample becomes the negative: 'random', 'hardest' (highest average token log-probability "
            "under the policy) or 'lowest_reward' (needs `negative_reward_funcs`).",
            "choices": list(SELECTIONS),
        },
    )
    negative_reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions by name: `module:function` of an importable module (`PYTHONPATH=.` for one in "
            "the working directory), or the folder or name of a reward model. In Python, pass functions to the "
            "trainer.",
        },
    )
    negative_reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of `negative_reward_funcs`; 1 by default.",
        },
    )
    on_policy_chosen: bool = field(
        default=False,
        metadata={
            "help": "Whether the best-scored sample replaces the chosen response where it scores at least as high, so "
            "that both sides of a pair come from the policy. Needs `negative_reward_funcs`.",
        },
    )
    negative_discard_truncated: bool = field(
        default=False,
        metadata={
            "help": "Whether a sample that reaches the limit of tokens before its end is no negative, so that the "
            "dataset's is kept.",
        },
    )
    negative_max_completion_length: int = field(
        default=256,
        metadata={
            "help": "Longest sampled response, in tokens.",
        },
    )
    negative_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of sampling.",
        },
    )
    negative_top_p: float = field(
        default=1.0,
        metadata={
            "help": "Mass of the most likely tokens that are sampled from, in (0, 1].",
        },
    )
    negative_refresh_steps: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps per round of sampling. 1: each step samples from the policy as it is. k: a round "
            "samples for the next k steps at once, so the last of them trains on responses of a policy k − 1 "
            "updates old.",
        },
    )
    negative_generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Most prompts a process samples for at a time, to bound memory. By default all prompts of a round "
            "together.",
        },
    )
    negative_log_samples: int = field(
        default=4,
        metadata={
            "help": "Sampled responses per log that are written to `negatives.jsonl` and, as a table, to the "
            "trackers; 0: none.",
        },
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Whether DeepSpeed ZeRO-3 gathers the policy's weights for sampling, which is faster; `False` "
            "samples layer by layer, for models that exceed the memory of one device.",
        },
    )
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Whether vLLM samples, rather than transformers.",
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'server': a vLLM server that was started before; 'colocate': vLLM in the training processes, on "
            "their devices.",
            "choices": list(VLLM_MODES),
        },
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={
            "help": "Whose implementation of the model vLLM runs: 'vllm' or 'transformers'.",
            "choices": list(VLLM_MODEL_IMPLS),
        },
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={
            "help": "Whether colocated vLLM gives its memory back between rounds of sampling.",
        },
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that sampled responses follow.",
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of the vLLM server, such as `http://localhost:8000`, in place of host and port.",
        },
    )
    vllm_server_host: str = field(
        default="0.0.0.0",
        metadata={
            "help": "Host of the vLLM server.",
        },
    )
    vllm_server_port: int = field(
        default=8000,
        metadata={
            "help": "Port of the vLLM server.",
        },
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={
            "help": "Seconds to wait for the vLLM server to be up.",
        },
    )
    vllm_group_port: int = field(
        default=51216,
        metadata={
            "help": "Port over which weights are sent to the vLLM server.",
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "Share of a device's memory that colocated vLLM takes.",
        },
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt and response together in vLLM; by default the model's own.",
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Devices over which colocated vLLM spreads the model.",
        },
    )

    @property
    def samples_negatives(self) -> bool:
        """Whether the run starts or ends with on-policy negatives; a callback may still turn them on."""
        end = self.dataset_negative_fraction_end
        return self.dataset_negative_fraction < 1.0 or (end is not None and end < 1.0)

    def _check_negative_options(self) -> None:
        for name, value in (
            ("dataset_negative_fraction", self.dataset_negative_fraction),
            ("dataset_negative_fraction_end", self.dataset_negative_fraction_end),
        ):
            check_fraction(name, value)
        for name in ("negative_selection", "vllm_mode", "vllm_model_impl"):
            choices = {"negative_selection": SELECTIONS, "vllm_mode": VLLM_MODES, "vllm_model_impl": VLLM_MODEL_IMPLS}
            if getattr(self, name) not in choices[name]:
                raise ValueError(f"`{name}` must be one of {list(choices[name])}, got {getattr(self, name)!r}.")
        least = {
            "num_negative_generations": 1,
            "negative_max_completion_length": 1,
            "negative_refresh_steps": 1,
            "negative_generation_batch_size": 1,
            "negative_log_samples": 0,
            "vllm_max_model_length": 1,
            "vllm_tensor_parallel_size": 1,
            "vllm_server_timeout": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {getattr(self, name)}.")
        if not self.negative_temperature > 0.0:
            raise ValueError(
                f"`negative_temperature` must be positive, got {self.negative_temperature}. For nearly greedy samples "
                "use a small one, such as 0.01."
            )
        if not 0.0 < self.negative_top_p <= 1.0:
            raise ValueError(f"`negative_top_p` must lie in (0, 1], got {self.negative_top_p}; 1 keeps every token.")
        self._check_reward_functions()
        self._check_reward_weights()
        self._check_vllm_options()
        if self.use_vllm and not self.ds3_gather_for_generation:
            raise ValueError(
                "`use_vllm=True` needs whole weights to send to vLLM, which `ds3_gather_for_generation=False` does "
                "not gather. Leave `ds3_gather_for_generation=True`, or sample with transformers (`use_vllm=False`)."
            )

    def _check_reward_functions(self) -> None:
        names = self.negative_reward_funcs
        if names is not None and not (names and all(name.strip() for name in names)):
            raise ValueError(
                f"`negative_reward_funcs` must be a list of names, `module:function` or reward models, got {names!r}. "
                "Functions themselves are passed to the trainer."
            )

    def _check_reward_weights(self) -> None:
        weights = self.negative_reward_weights
        if weights is not None and not (weights and all(map(math.isfinite, weights))):
            raise ValueError(
                f"`negative_reward_weights` must hold a finite number for each function, got {weights}. Leave it out "
                "for equal ones."
            )

    def _check_vllm_options(self) -> None:
        url = self.vllm_server_base_url
        if url is not None and redacted(url) != url:
            raise ValueError(
                f"`vllm_server_base_url`={redacted(url)} holds a secret, which trackers and files of the run would "
                "show. Put user and password into ~/.netrc, which is read for each request."
            )
        for name in ("vllm_server_port", "vllm_group_port"):
            if not 0 < getattr(self, name) < 65536:
                raise ValueError(f"`{name}` must be a port, from 1 to 65535, got {getattr(self, name)}.")
        if not 0.0 < self.vllm_gpu_memory_utilization <= 1.0:
            raise ValueError(
                "`vllm_gpu_memory_utilization` must lie in (0, 1], got "
                f"{self.vllm_gpu_memory_utilization}: it is the share of a device's memory."
            )


def check_fraction(name: str, value: float | None) -> None:
    """
    Raise unless a share lies in [0, 1].

    Args:
        name (`str`):
            What it is called.
        value (`float`, *optional*):
            The share; `None` is none.

    Raises:
        ValueError: Naming it.
    """
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"`{name}` must lie in [0, 1], got {value}: it is the share of pairs that keep the dataset's rejected "
            "response."
        )


def refuse_stored_references(precompute_ref_log_probs: bool, reference_cache_dir: str | None) -> None:  # noqa: FBT001
    """
    Raise if reference log-probabilities are to be stored, which responses that are sampled later cannot have.

    Args:
        precompute_ref_log_probs (`bool`):
            TRL's option.
        reference_cache_dir (`str`, *optional*):
            Ours.

    Raises:
        ValueError: Naming the option and the way out.
    """
    stored = {
        "precompute_ref_log_probs=True": precompute_ref_log_probs,
        f"reference_cache_dir={reference_cache_dir!r}": reference_cache_dir is not None,
    }
    for option, is_set in stored.items():
        if is_set:
            raise ValueError(
                f"`{option}` stores log-probabilities of the reference before training; `dataset_negative_fraction` "
                "below 1 samples rejected responses during training, which have none yet. Leave out "
                f"`{option.split('=')[0]}`, or keep `dataset_negative_fraction=1.0`."
            )
