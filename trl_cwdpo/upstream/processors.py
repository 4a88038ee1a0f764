"""Processors of transformers that TRL's preference collator cannot call as it does."""

import dataclasses
from typing import Any

from transformers import PaliGemmaProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference


class ResponsesThroughTokenizer:
    """
    A processor that refuses text without pictures, for a collator that processes responses by themselves.

    Prompts, which are what the collator pads on the left, go through the processor. Responses go through its
    tokenizer; their token types are 1, what follows the prompt and is attended to causally.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor.
    """

    def __init__(self, processor: Any) -> None:  # noqa: ANN401 (a processor of any model)
        self.processor = processor

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the processor has)
        if name == "processor":  # asked for before `__init__`, when unpickled in a worker
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401 (as the processor)
        if images is not None or kwargs.get("padding_side") == "left":
            inputs = self.processor(images=images, text=text, **kwargs)
            inputs.pop("labels", None)  # of the prompt alone
            return inputs
        inputs = self.processor.tokenizer(text, **kwargs)
        inputs["token_type_ids"] = inputs["attention_mask"].clone()
        return inputs


def for_responses(processor: Any) -> Any:  # noqa: ANN401 (a processor of any model)
    """The processor itself or, where it refuses text without pictures, one that does not."""
    return ResponsesThroughTokenizer(processor) if isinstance(processor, PaliGemmaProcessor) else processor


def collator_for_responses(collator: Any) -> Any:  # noqa: ANN401 (any collator)
    """TRL's preference collator with a processor that takes responses by themselves; any other as it is."""
    if not isinstance(collator, DataCollatorForVisionPreference):
        return collator
    return dataclasses.replace(collator, processor=for_responses(collator.processor))
