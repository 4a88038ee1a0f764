"""What models say: greedy responses to measured rows, win-rates between models, caption scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl_cwdpo.evaluation.captions import caption_scores
from trl_cwdpo.evaluation.win_rate import Comparison, Judge, compare_responses
from trl_cwdpo.preserved import evaluation_mode, preserved_random_state
from trl_cwdpo.probe_rows import ProbeRows

TEXT_INPUTS = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")


@torch.no_grad()
def generate_responses(
    model: Any,  # noqa: ANN401 (any model that generates)
    tokenizer: Any,  # noqa: ANN401 (its tokenizer)
    rows: ProbeRows,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> list[str]:
    """
    Respond greedily to the prompts of measured rows, token for token those that the other measures use.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model; its mode and the random state are afterwards as before.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer; its padding side is not touched.
        rows ([`~trl_cwdpo.probe_rows.ProbeRows`]):
            The rows, N of them, with or without pictures.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest response in tokens.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a batch.

    Returns:
        `list[str]`: N responses, without special tokens.
    """
    device = next(model.parameters()).device
    responses: list[str] = []
    with preserved_random_state(), evaluation_mode(model):
        for positions, prompts in rows.batches(range(len(rows)), batch_size):
            inputs = _left_padded(rows, positions, prompts)
            inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
            output = model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=rows.pad_token_id
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            responses += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return responses


def _left_padded(rows: ProbeRows, positions: Sequence[int], prompts: Mapping[str, Any]) -> dict[str, Any]:
    ids = [rows.rows[position].prompt_ids for position in positions]
    length = max(map(len, ids))
    shape = (len(ids), length)
    input_ids = torch.full(shape, rows.pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    kinds = {key: torch.zeros(shape, dtype=torch.long) for key in TEXT_INPUTS[3:] if key in prompts}
    for i, prompt in enumerate(ids):
        input_ids[i, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, length - len(prompt) :] = 1
        for key, kind in kinds.items():
            kind[i, length - len(prompt) :] = prompts[key][i, : len(prompt)]
    pictures = {key: value for key, value in prompts.items() if key not in TEXT_INPUTS}
    return {**pictures, **kinds, "input_ids": input_ids, "attention_mask": attention_mask}


def win_rates(
    responses: Mapping[str, Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
    reference: str,
    judge: Judge,
    *,
    swap: bool = True,
) -> dict[str, dict[str, Any]]:
    """
    Win-rate of every model against one of them.

    Args:
        responses (`Mapping[str, Sequence[str]]`):
            By model, N responses.
        rows (`Sequence[Mapping[str, Any]]` of length N):
            Rows of the dataset, with a `prompt`.
        reference (`str`):
            Name of the model to compare with.
        judge (`Judge`):
            The judge, see [`~trl_cwdpo.evaluation.win_rate.compare_responses`].
        swap (`bool`, *optional*, defaults to `True`):
            Whether to ask in both orders.

    Returns:
        `dict[str, dict]`: By the name of each other model, its [`~trl_cwdpo.evaluation.win_rate.WinRate`] as plain
        data.
    """
    found = {}
    for name, texts in responses.items():
        if name == reference:
            continue
        pairs = [
            Comparison(row["prompt"], ours, theirs, dict(row))
            for row, ours, theirs in zip(rows, texts, responses[reference], strict=True)
        ]
        found[name] = compare_responses(pairs, judge, swap=swap).to_dict()
    return found


def score_captions(
    responses: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """
    Caption scores of every model.

    Args:
        responses (`Mapping[str, Sequence[str]]`):
            By model, N responses.
        references (`Sequence[Sequence[str]]` of length N):
            References of each row.

    Returns:
        `dict[str, dict]`: By model, its [`~trl_cwdpo.evaluation.captions.CaptionScores`] as plain data.
    """
    return {name: caption_scores(texts, references).to_dict() for name, texts in responses.items()}
