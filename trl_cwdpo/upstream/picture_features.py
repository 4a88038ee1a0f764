"""Run the vision tower outside of the forward pass, so that policy and reference can share what it says.

Assumed, and pinned down by `tests/test_shared_prefix_vision.py`: vision-language models compute the features of their
pictures in `get_image_features`, and take them as `mm_encoder_outputs` in place of `pixel_values`; everything below
`base_model` that is not the decoder belongs to the pictures.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel


def picture_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """
    The modules of a vision-language model that only pictures go through, such as tower and projector.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.

    Returns:
        `Iterator` of name and module.
    """
    decoder = model.get_decoder()
    return ((name, module) for name, module in model.base_model.named_children() if module is not decoder)


def takes_features(model: PreTrainedModel) -> bool:
    """Whether a model's forward takes the features of pictures in place of the pictures."""
    has_tower = hasattr(model.base_model, "get_image_features") and any(True for _ in picture_modules(model))
    return has_tower and "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def are_fixed(model: PreTrainedModel) -> bool:
    """Whether the features of a picture are the same at every step: nothing trained, adapted or random on its way."""
    for _, part in picture_modules(model):
        if any(parameter.requires_grad for parameter in part.parameters()):
            return False
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                return False
            if module.training and _is_random(module):
                return False
    return True


def _is_random(module: nn.Module) -> bool:
    # Towers name the dropout of their attention in various ways, and some drop whole layers
    if isinstance(module, nn.Dropout):
        return module.p > 0
    chances = ("dropout", "attention_dropout", "drop_prob", "layerdrop")
    return any(isinstance(chance := getattr(module, name, 0.0), float) and chance > 0 for name in chances)


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models do the same to pictures, as far as their weights tell."""
    ours, theirs = ({name: part.state_dict() for name, part in picture_modules(each)} for each in (model, other))
    return ours.keys() == theirs.keys() and all(
        ours[name].keys() == theirs[name].keys()
        and all(
            value.device == theirs[name][key].device and torch.equal(value, theirs[name][key])
            for key, value in ours[name].items()
        )
        for name in ours
    )


def picture_features(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:  # noqa: ANN401 (the model's output class)
    """
    Features of pictures, without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without wrappers.
        inputs (`dict`):
            With `pixel_values` and what else the model needs to know of them.

    Returns:
        Output of the tower, to be given to the forward pass as `mm_encoder_outputs={"image": …}`.
    """
    features: Any = model.base_model.get_image_features
    known = inspect.signature(features).parameters
    with torch.no_grad():
        return features(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)
