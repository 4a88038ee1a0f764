"""The model that a run starts from: as it is, with a new adapter, or with an adapter that is trained on."""

from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.upstream.models import is_adapter, load_model, load_processor


def starting_model(model: ModelConfig, args: Any) -> dict[str, Any]:  # noqa: ANN401 (either configuration)
    """
    What a trainer is to start from. A local folder with a PEFT adapter means: train that adapter on; the reference of
    preference training is then a frozen copy of it.

    Args:
        model ([`~trl.ModelConfig`]):
            The model options.
        args ([`CWDPOConfig`] or [`GentleNegativeSFTConfig`]):
            The trainer's configuration, whose `model_init_kwargs` are set.

    Returns:
        `dict[str, Any]`: Arguments of the trainer that concern the model.

    Raises:
        CommandError: If a new adapter is asked for on top of one that is to be continued.
    """
    name, quantization = str(model.model_name_or_path), get_quantization_config(model)
    if not is_adapter(name):
        return {"model": name, "quantization_config": quantization, "peft_config": get_peft_config(model)}
    if model.use_peft:
        raise CommandError(
            f"`use_peft` asks for a new adapter, but `model_name_or_path`={name} is itself an adapter, which would be "
            "trained on. Remove `use_peft`, or merge the adapter into its base model first and name the result."
        )
    options, args.model_init_kwargs = args.model_init_kwargs, None
    if args.world_size > 1:
        # Each process trains on a whole copy, or shards it itself
        options["device_map"] = None
    return {
        "model": load_model(name, quantization_config=quantization, is_trainable=True, **options),
        "processing_class": load_processor(name, trust_remote_code=args.trust_remote_code),
    }
