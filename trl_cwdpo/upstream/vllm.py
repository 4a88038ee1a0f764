"""vLLM through TRL's `VLLMGeneration`, whose arguments and calls `tests/test_upstream_generation.py` pins down."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version
from trl.generation.vllm_generation import VLLMGeneration

__all__ = ["SUPPORTED_VERSIONS", "build_vllm_generation", "check_vllm"]

# What the installed TRL says it supports
SUPPORTED_VERSIONS = ("0.22.0", "0.31.0")


def check_vllm() -> None:
    """
    Raise unless a version of vLLM is installed that TRL supports.

    Raises:
        ImportError: Naming the extra, the versions and the alternatives.
    """
    low, high = SUPPORTED_VERSIONS
    remedy = (
        "Install it with `pip install 'trl-cwdpo[vllm]'` on a machine with a GPU, in an environment of its own if its "
        "torch or transformers differ from yours, or set `use_vllm=False` to sample with transformers."
    )
    try:
        installed = version("vllm")
    except PackageNotFoundError as error:
        raise ImportError(
            f"`use_vllm=True` needs vLLM {low} to {high}, in server mode too, and it is not installed. {remedy}"
        ) from error
    # A local part, as in 0.24.0+cu129, would sort after the plain release
    if not Version(low) <= Version(Version(installed).base_version) <= Version(high):
        raise ImportError(f"`use_vllm=True` needs vLLM {low} to {high}, and {installed} is installed. {remedy}")


def build_vllm_generation(trainer: Any, max_num_seqs: int) -> Any:  # noqa: ANN401 (TRL's class, which needs vLLM)
    """
    TRL's interface to vLLM, for the options of a trainer.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        max_num_seqs (`int`):
            Most sequences that colocated vLLM works on at a time.

    Returns:
        `VLLMGeneration`.

    Raises:
        ImportError: If vLLM is missing or of another version.
    """
    check_vllm()
    args = trainer.args
    return VLLMGeneration(
        model=trainer.model,
        accelerator=trainer.accelerator,
        processing_class=trainer.processing_class,
        mode=args.vllm_mode,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        server_timeout=args.vllm_server_timeout,
        group_port=args.vllm_group_port,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=max_num_seqs,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
        repetition_penalty=1.0,
        temperature=args.negative_temperature,
        top_p=args.negative_top_p,
        top_k=0,
        min_p=0.0,
        max_completion_length=args.negative_max_completion_length,
        logprobs=0,
    )
