"""What a reader is shown of a probe's rows: prompt, responses and small copies of the pictures."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

# Pixels of the longer side of a copy: enough to recognise, small enough for a hundred of them
THUMBNAIL_SIZE = 160
MAX_PICTURES = 4
SMALL = 64


@dataclass(frozen=True)
class ProbeExample:
    """
    One row, for people.

    Args:
        prompt (`str`):
            Text of the prompt, without the tokens of pictures.
        chosen (`str`):
            The chosen response, as far as it was measured.
        rejected (`str`):
            The rejected response, as far as it was measured.
        pictures (`tuple[str, ...]`):
            Copies of its first pictures, as `data:` URLs.
    """

    prompt: str
    chosen: str
    rejected: str
    pictures: tuple[str, ...] = ()


def make_example(
    row: dict[str, Any],
    prompt_ids: Sequence[int],
    completions: Mapping[str, Sequence[int]],
    tokenizer: Any,  # noqa: ANN401 (a tokenizer)
) -> ProbeExample:
    """
    Make what is shown of one row.

    Args:
        row (`dict`):
            The row of the dataset.
        prompt_ids (`Sequence[int]`):
            Tokens of its prompt, for data without a column for it.
        completions (`Mapping[str, Sequence[int]]`):
            Tokens of its responses, `chosen` and `rejected` among them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        [`ProbeExample`].
    """

    def decode(ids: Sequence[int]) -> str:
        text = str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        # Words that the tokenizer does not know may be all there is
        return text or str(tokenizer.decode(list(ids))).strip()

    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    return ProbeExample(
        prompt=_message_text(row.get("prompt")) or decode(prompt_ids),
        chosen=decode(completions["chosen"]),
        rejected=decode(completions["rejected"]),
        pictures=tuple(thumbnail(image) for image in images[:MAX_PICTURES] if isinstance(image, Image.Image)),
    )


def _message_text(prompt: Any) -> str:  # noqa: ANN401 (text, or messages)
    if isinstance(prompt, str):
        return prompt.strip()
    texts = []
    for message in prompt or ():
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        texts.append(" ".join(part["text"] for part in parts if part.get("text")))
    return "\n".join(text for text in texts if text).strip()


def thumbnail(image: Image.Image) -> str:
    """A small copy of a picture as a `data:` URL; drawings stay PNG, which small ones need for sharp edges."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    kind, options = ("png", {"optimize": True}) if max(small.size) <= SMALL else ("jpeg", {"quality": 80})
    buffer = io.BytesIO()
    small.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
