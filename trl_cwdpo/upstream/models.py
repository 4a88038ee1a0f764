"""Load models and processors as TRL's trainers do: whole models, or a PEFT adapter over its base model."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from trl.trainer.utils import create_model_from_path

ADAPTER_FILE = "adapter_config.json"


def is_adapter(path: str) -> bool:
    """Whether a local folder holds a PEFT adapter rather than a model."""
    return (Path(path) / ADAPTER_FILE).is_file()


def load_model(path: str, *, is_trainable: bool = False, **options: Any) -> PreTrainedModel | PeftModel:
    """
    Load a model in the class that its configuration names.

    Args:
        path (`str`):
            A folder or a name on the hub; or a folder with a PEFT adapter, whose base model is then loaded first.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether the adapter is to be trained.
        **options (`Any`):
            For `from_pretrained` of the model; `dtype` defaults to float32.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`].
    """
    options = {name: value for name, value in options.items() if value is not None or name == "device_map"}
    if not is_adapter(path):
        return create_model_from_path(path, **options)
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ValueError(f"{path} is an adapter that does not name its base model in {ADAPTER_FILE}: add it there.")
    options.pop("revision", None)
    return PeftModel.from_pretrained(create_model_from_path(base, **options), path, is_trainable=is_trainable)


def require_model(path: str, *, trust_remote_code: bool = False) -> None:
    """
    Make sure that there is a model, by its configuration alone, before anything long begins.

    Args:
        path (`str`):
            A folder, with a model or a PEFT adapter, or a name on the hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.

    Raises:
        ValueError: If there is none.
    """
    try:
        base = PeftConfig.from_pretrained(path).base_model_name_or_path if is_adapter(path) else path
        AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        where = f"There is no model in the folder {path}"
        if not Path(path).is_dir():
            where = f"There is no folder {path!r}, and as a model on the hub it cannot be had"
        raise ValueError(f"{where}: {error}") from error


def load_processor(path: str, **options: Any) -> Any:  # noqa: ANN401 (a processor or a tokenizer)
    """The processor or tokenizer beside a model; where an adapter came without, that of its base model."""
    if is_adapter(path) and not any(
        (Path(path) / f"{name}_config.json").is_file() for name in ("tokenizer", "processor")
    ):
        path = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    return AutoProcessor.from_pretrained(path, **options)
