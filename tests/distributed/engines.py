"""The engines that the tests run on: how each is launched on CPUs, and how a process finds out which one it got.

Some set-ups run one process, or plain data parallelism, and exit with 0. [`identity`] is what a run writes down about
itself, and [`expected_identity`] what it must be.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from transformers import training_args


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a training run is spread over processes."""

    name: str
    distributed_type: str = "DistributedType.MULTI_CPU"
    processes: int = 2
    stage: int = 0  # of ZeRO

    @property
    def is_fsdp(self):
        return self.distributed_type == "DistributedType.FSDP"

    @property
    def options(self):
        """Options of the trainer: a `use_cpu` run is taken for DDP, whatever accelerate's configuration says."""
        return {"use_cpu": not (self.is_fsdp or self.stage), "ddp_backend": "gloo" if self.processes > 1 else None}


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("one", "DistributedType.NO", processes=1),
        Engine("ddp"),
        Engine("fsdp2", "DistributedType.FSDP"),
        *(Engine(f"zero{stage}", "DistributedType.DEEPSPEED", stage=stage) for stage in (1, 2, 3)),
    )
}
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_activation_checkpointing": False,
}
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")


def accelerate_configuration(engine, folder):
    """A file for `accelerate launch`."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": engine.processes,
        "mixed_precision": "no",
        "distributed_type": "MULTI_CPU" if engine.name == "ddp" else "NO",
        "use_cpu": False,
    }
    if engine.name == "ddp":
        # `MULTI_CPU` would start one process
        settings["distributed_type"] = "MULTI_GPU"
    if engine.is_fsdp:
        settings |= {"distributed_type": "FSDP", "fsdp_config": FSDP}
    if engine.stage:
        file = Path(folder, f"{engine.name}-deepspeed.json")
        file.write_text(json.dumps(deepspeed_configuration(engine.stage)))
        deepspeed = {"deepspeed_config_file": str(file), "zero3_init_flag": engine.stage == 3}
        settings |= {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
        # Stated in DeepSpeed's own file
        del settings["mixed_precision"]
    file = Path(folder, f"{engine.name}.yaml")
    file.write_text(yaml.safe_dump(settings))
    return file


def deepspeed_configuration(stage):
    return {
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(AUTO, "auto"),
    }


def command(engine, folder, *words, port=0):
    """The words that start a script on an engine."""
    if engine.processes == 1:
        return [sys.executable, *map(str, words)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [
        *launcher,
        "--config_file",
        str(accelerate_configuration(engine, folder)),
        "--main_process_port",
        str(port),
        *map(str, words),
    ]


def environment(engine):
    """What the processes of an engine need in their environment."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TEST_ENGINE": engine.name}
    if engine.is_fsdp:
        variables["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if engine.stage:
        variables["DS_ACCELERATOR"] = "cpu"
    if engine.name == "ddp":
        variables["ACCELERATE_USE_CPU"] = "true"
    return variables


def launch_environment(engine, folder):
    """What `accelerate launch` tells the processes that it starts, without their ranks."""
    if engine.processes == 1:
        return {}
    words = ["--config_file", str(accelerate_configuration(engine, folder)), "script.py"]
    arguments, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    # Set by `accelerate launch` itself, after this
    arguments.deepspeed_fields_from_accelerate_config = "deepspeed_config_file,zero3_init_flag"
    variables = prepare_deepspeed_cmd_env(arguments)[1] if engine.stage else prepare_multi_gpu_env(arguments)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE", "FSDP"))}


def run(engine, folder, *words, timeout=600):
    """Run a script on an engine, to its end."""
    return subprocess.run(
        command(engine, folder, *words),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(engine),
    )


def this_engine():
    """The engine that this process was started on; to be called before the first trainer is built."""
    engine = ENGINES[os.environ.get("TEST_ENGINE", "one")]
    if engine.is_fsdp:
        # accelerate offers FSDP to accelerators only; what it then does is the same
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if not engine.options["use_cpu"]:
        # CPUs have bfloat16 too, but only a `use_cpu` run may say so
        training_args.is_torch_bf16_gpu_available = lambda: True
    return engine


def forget_settings():
    """Let the next trainer of this process set up accelerate anew."""
    AcceleratorState._reset_state()


def identity(trainer):
    """What a run can tell about the engine it runs on, once it has trained."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for module in trainer.model.modules():
        # A forward that no backward follows, such as that of an evaluation, leaves the outermost parameters whole
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    reference = getattr(trainer, "ref_model", None)
    deepspeed = trainer.deepspeed
    return {
        "world_size": trainer.accelerator.num_processes,
        "torch_world_size": torch.distributed.get_world_size() if distributed else 1,
        "backend": torch.distributed.get_backend() if distributed else None,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "parameters": sorted({kind(parameter) for parameter in parameters}),
        "reference": None if reference is None else sorted({kind(value) for value in reference.parameters()}),
        "zero_stage": deepspeed.zero_optimization_stage() if deepspeed else 0,
    }


def kind(parameter):
    """Which kind of sharding a parameter is under."""
    return "ds_id" if hasattr(parameter, "ds_id") else type(parameter.data).__name__


def expected_identity(engine, *, reference):
    """What [`identity`] gives where an engine really runs."""
    parameter = ["DTensor"] if engine.is_fsdp else ["ds_id"] if engine.stage == 3 else ["Tensor"]
    return {
        "world_size": engine.processes,
        "torch_world_size": engine.processes,
        "backend": "gloo" if engine.processes > 1 else None,
        "distributed_type": engine.distributed_type,
        "parameters": parameter,
        "reference": parameter if reference else None,
        "zero_stage": engine.stage,
    }
