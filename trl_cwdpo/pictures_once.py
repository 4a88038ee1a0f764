"""Process and carry the pictures of a pair once, though TRL's collator asks for them twice.

A batch of preference pairs holds each prompt in its chosen and in its rejected row. [`PicturesOnce`] stands in for the
processor within TRL's collator: it processes one half, repeats what is said of tokens, and leaves the pictures as they
are, marked by `pictures_once`. On the device, [`with_pictures_twice`] makes such a batch what TRL's collator returns.
"""

from typing import Any

import torch

MARK = "pictures_once"
# What a collator returns with one column a token; everything else belongs to the pictures
TEXT_TENSORS = {"input_ids", "attention_mask", "completion_mask", "labels", "token_type_ids", "mm_token_type_ids"}


class PicturesOnce:
    """
    A processor that notices where the second half of its rows repeats the first.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor that does the work. All else is passed on to it.
    """

    def __init__(self, processor: Any) -> None:  # noqa: ANN401 (or a processor already wrapped)
        self.processor = processor

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the processor has)
        if name == "processor":  # while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401 (a processor's)
        """
        As the processor, but with `pictures_once` set where pictures stand for two rows each.

        Args:
            images (`list` of lists of pictures, *optional*):
                Pictures of each row.
            text (`list[str]`, *optional*):
                Rows.
            **kwargs (`Any`):
                For the processor.

        Returns:
            [`~transformers.BatchFeature`].
        """
        if not images or not text or not _repeats(images, text):
            return self.processor(images=images, text=text, **kwargs)
        half = len(text) // 2
        batch = self.processor(images=images[:half], text=text[:half], **kwargs)
        for name in TEXT_TENSORS & batch.keys():
            batch[name] = torch.cat([batch[name], batch[name]])
        batch[MARK] = True
        return batch


def _repeats(images: list[Any], text: list[str]) -> bool:
    half, odd = divmod(len(text), 2)
    return (
        not odd
        and len(images) == len(text)
        and text[:half] == text[half:]
        # The very same objects: comparing pixels would cost what this saves
        and all(
            len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
            for one, other in zip(images[:half], images[half:], strict=True)
        )
    )


def with_pictures_twice(batch: dict[str, Any]) -> dict[str, Any]:
    """
    A batch as TRL's collator returns it.

    Args:
        batch (`dict`):
            A batch, left as it is.

    Returns:
        `dict`: the batch itself where it has no pictures, or has them twice already.
    """
    if MARK not in batch:
        return batch
    twice = {name: value for name, value in batch.items() if name != MARK}
    for name, value in twice.items():
        if torch.is_tensor(value) and len(value) and is_of_pictures(name):
            twice[name] = torch.cat([value, value])
    return twice


def is_of_pictures(name: str) -> bool:
    """Whether a tensor of a batch with pictures says something of them, and not of tokens or pairs."""
    return name not in TEXT_TENSORS and not name.startswith("ref_")
