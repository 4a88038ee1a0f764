"""Compare checkpoints on the same held-out pairs: the measurement of the probes, after the fact."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from trl_cwdpo.probe_options import FAMILIES
from trl_cwdpo.probe_passes import Reference
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.probe_rows import ProbeRows
from trl_cwdpo.probe_summary import PairLoss
from trl_cwdpo.probes import measure
from trl_cwdpo.upstream.models import load_model


def load_for_evaluation(path: str, *, trust_remote_code: bool = False) -> Any:  # noqa: ANN401 (either kind of model)
    """
    Load a model to be measured, on the accelerator if there is one.

    Args:
        path (`str`):
            A model, or a PEFT adapter.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], in evaluation mode; in the precision it was saved in,
        on the CPU in float32.

    Raises:
        ValueError: Naming the model, if it cannot be loaded.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    dtype = "float32" if device is None else "auto"
    try:
        return load_model(path, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The model {path} cannot be loaded: {error}") from error


def compare(
    models: Mapping[str, str],
    reference: str,
    rows: ProbeRows,
    *,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    pair_loss: PairLoss | None = None,
    with_model: Any = None,  # noqa: ANN401 (a callable or nothing)
) -> dict[str, ProbeRecord]:
    """
    Measure models against one of them.

    Args:
        models (`Mapping[str, str]`):
            Folder or hub name of each, by the name to show.
        reference (`str`):
            Which of these names is the reference: changes and distances refer to it.
        rows ([`~trl_cwdpo.probe_rows.ProbeRows`]):
            Held-out pairs, tokenized.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward pass.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the models may run.
        pair_loss ([`~trl_cwdpo.probe_summary.PairLoss`], *optional*):
            The preference loss, for cooling weights and the loser share.
        with_model (`Callable`, *optional*):
            Called with the name and the model of each while it is loaded, for further measures.

    Returns:
        `dict[str, ProbeRecord]`: By name, in the order of `models`. `delta0` is the change from the reference, in nats
        per token; `margin` is Δ_w − Δ_l against it, in nats per sequence.
    """
    origin = load_for_evaluation(models[reference], trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"reference": _as_reference(origin), "pair_loss": pair_loss, "batch_size": batch_size}
    baseline = measure(origin, rows, families=FAMILIES, **how)
    records: dict[str, ProbeRecord] = {}
    for name, path in models.items():
        is_reference = name == reference
        model = origin if is_reference else load_for_evaluation(path, trust_remote_code=trust_remote_code)
        records[name] = baseline if is_reference else measure(model, rows, baseline=baseline, **how)
        if with_model is not None:
            with_model(name, model)
        del model
    return records


def _as_reference(model: Any) -> Reference:  # noqa: ANN401 (either kind of model)
    from trl_cwdpo import upstream

    return Reference(upstream.unwrapped(model), lambda inputs: model(**inputs))
