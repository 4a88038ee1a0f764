"""Stable keys of preference rows: digests of what a reference is shown, a context with one response.

A key is made of the row itself, before it is collated: of token ids, or of texts and pictures where these are
processed batch by batch. So it does not depend on the order of the rows, on their number or on how they are read.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate.utils import broadcast_object_list

from .data import with_image_list
from .reference_store import KEY_BYTES
from .upstream import reference as upstream

TEXT_CONTEXT, TEXT_RESPONSES = ("prompt_ids",), ("chosen_ids", "rejected_ids")
VISION_CONTEXT = ("prompt", "images", "tools", "chat_template_kwargs")
VISION_RESPONSES = ("chosen", "rejected")


def pair_keys(
    example: Mapping[str, Any], *, vision: bool, whole_row: bool = False, paired: bool = False
) -> np.ndarray:
    """
    Keys of the chosen and the rejected response of a row.

    Args:
        example (`Mapping[str, Any]`):
            Row, as the collator gets it; left as it is.
        vision (`bool`):
            Whether the row is processed by the collator (`prompt`, `chosen`, `rejected`, `images`, …), or holds token
            ids (`prompt_ids`, `chosen_ids`, `rejected_ids`).
        whole_row (`bool`, *optional*, defaults to `False`):
            Whether all columns count, as a collator of one's own may read others.
        paired (`bool`, *optional*, defaults to `False`):
            Whether the log-probability of one response depends on the other one, as it does with `ld_alpha`.

    Returns:
        `np.ndarray` of shape `(2, 16)` and dtype `uint8`: chosen, rejected.
    """
    row = with_image_list(dict(example)) if vision else example
    responses = VISION_RESPONSES if vision else TEXT_RESPONSES
    context = (
        [name for name in row if name not in responses] if whole_row else VISION_CONTEXT if vision else TEXT_CONTEXT
    )
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(context):
        if row.get(name) is not None:
            _update(digest, name)
            _update(digest, [_content(item) for item in row[name]] if name == "images" else row[name])
    sides = []
    for index, name in enumerate(responses):
        side = digest.copy()
        for part in [row[name], index, [row[other] for other in responses]] if paired else [row[name]]:
            _update(side, part)
        sides.append(np.frombuffer(side.digest(), dtype=np.uint8))
    return np.stack(sides)


def _update(digest: Any, value: Any) -> None:  # noqa: ANN401, C901 (a hash of hashlib's; whatever a row holds)
    # Every value is preceded by its kind and size, so that no two rows run together to the same bytes
    if isinstance(value, PIL.Image.Image):
        palette = bytes(value.getpalette() or []) if value.mode == "P" else b""
        _bytes(digest, f"picture {value.mode} {value.size}", value.tobytes() + palette)
    elif isinstance(value, Mapping):
        # Tables fill a message's missing fields with None, streams do not
        present = sorted((str(key), item) for key, item in value.items() if item is not None)
        _bytes(digest, f"mapping {len(present)}", b"")
        for key, item in present:
            _update(digest, key)
            _update(digest, item)
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(value)
        _bytes(digest, f"array {array.dtype} {array.shape}", array.tobytes())
    elif isinstance(value, (list, tuple)):
        if value and all(type(item) is int for item in value):
            _bytes(digest, f"integers {len(value)}", np.asarray(value, dtype=np.int64).tobytes())
            return
        _bytes(digest, f"list {len(value)}", b"")
        for item in value:
            _update(digest, item)
    elif isinstance(value, bytes):
        _bytes(digest, "bytes", value)
    elif isinstance(value, str):
        _bytes(digest, "text", value.encode("utf-8", "surrogatepass"))
    elif value is None or isinstance(value, (bool, int, float)):
        _bytes(digest, "plain", repr(value).encode())
    else:
        raise TypeError(
            f"A row holds a {type(value).__name__}, of which `reference_cache_dir` can take no digest. Convert it to "
            "text, numbers, lists, arrays or pictures, or remove its column."
        )


def _bytes(digest: Any, kind: str, content: bytes) -> None:  # noqa: ANN401 (a hash of hashlib's)
    digest.update(f"{kind} {len(content)}:".encode())
    digest.update(content)


def _content(picture: Any) -> Any:  # noqa: ANN401 (whatever stands for a picture)
    # A file counts by what is in it, an address by its text
    return Path(picture).read_bytes() if isinstance(picture, str) and Path(picture).is_file() else picture


class RowKeys:
    """
    [`pair_keys`] with the options of a trainer; a class, so that workers of a dataloader can unpickle it.

    Args:
        vision (`bool`):
            As of [`pair_keys`].
        whole_row (`bool`):
            As of [`pair_keys`].
        paired (`bool`):
            As of [`pair_keys`].
    """

    def __init__(self, *, vision: bool, whole_row: bool, paired: bool) -> None:
        self.options = {"vision": vision, "whole_row": whole_row, "paired": paired}

    def __call__(self, example: dict[str, Any]) -> np.ndarray:
        """Keys of one row, of shape `(2, 16)`."""
        return pair_keys(example, **self.options)

    def collate(self, examples: list[dict[str, Any]]) -> torch.Tensor:
        """Keys of some rows, of shape `(n, 2, 16)`."""
        return torch.from_numpy(np.stack([self(example) for example in examples]))


def ingredients(trainer: Any) -> dict[str, Any]:  # noqa: ANN401
    """
    What the reference log-probabilities of a row depend on, besides the row.

    Args:
        trainer ([`CWDPOTrainer`]):
            Trainer that is set up, before training; all ranks must call this together.

    Returns:
        `dict[str, Any]`: Names with plain JSON values, the same on all ranks.
    """
    args, collator = trainer.args, trainer.data_collator.collator
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    reference = trainer.model if trainer.ref_model is None else trainer.accelerator.unwrap_model(trainer.ref_model)
    found = [
        {
            "weights": upstream.weights_digest(reference),
            "architecture": upstream.architecture_digest(reference.config),
            "dtype": str(reference.dtype),
            "mixed_precision": trainer.accelerator.mixed_precision,
            "tokenizer": upstream.tokenizer_digest(trainer._tokenizer),
            "processor": upstream.processor_digest(trainer.processing_class),
            "chat template": upstream.template_digest(trainer.processing_class),
            "data collator": f"{type(collator).__module__}.{name}",
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "ld_alpha": trainer.ld_alpha,
        }
    ]
    broadcast_object_list(found, from_process=0)
    return found[0]
