"""Greedy responses of a batch are those of each row alone, with and without pictures."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from trl_cwdpo.evaluation.responses import generate_responses, score_captions, win_rates
from trl_cwdpo.evaluation.win_rate import score_judge
from trl_cwdpo.probe_rows import choose_rows


def alone(model, tokenizer, rows, max_new_tokens):
    """One row at a time, without padding, a token at a time from plain logits."""
    texts = []
    for position in range(len(rows)):
        _, prompts = next(rows.batches([position], 1))
        pixels = {key: value for key, value in prompts.items() if key == "pixel_values"}
        ids = list(rows.rows[position].prompt_ids)
        start = len(ids)
        while len(ids) < start + max_new_tokens:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), **pixels, use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        texts.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    return texts


def test_text(text_model):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    model = AutoModelForCausalLM.from_pretrained(text_model).train()
    rows = choose_rows(tiny.pairs(12), tokenizer, 6)
    assert len({len(row.prompt_ids) for row in rows.rows}) > 1
    state, side = torch.get_rng_state(), tokenizer.padding_side
    found = generate_responses(model, tokenizer, rows, max_new_tokens=6, batch_size=4)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.padding_side == side
    assert found == alone(model.eval(), tokenizer, rows, 6)
    assert len(set(found)) > 1


def test_pictures(vision_model, vision_pairs):
    processor = AutoProcessor.from_pretrained(vision_model)
    model = AutoModelForImageTextToText.from_pretrained(vision_model)
    rows = choose_rows(vision_pairs["test"], processor, 5)
    found = generate_responses(model, processor.tokenizer, rows, max_new_tokens=4, batch_size=3)
    assert found == alone(model, processor.tokenizer, rows, 4)


def test_models_are_compared_with_the_reference():
    responses = {"base": ["a", "bb"], "ours": ["aa", "bb"]}
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    judge = score_judge(lambda pairs: [len(pair.first) for pair in pairs])
    found = win_rates(responses, rows, "base", judge)
    assert list(found) == ["ours"]
    assert found["ours"]["win_rate"]["mean"] == 0.75
    # The judge sees the row
    seen = []
    win_rates(responses, rows, "base", score_judge(lambda pairs: [seen.append(p.row) or 0.0 for p in pairs]))
    assert seen[0] == {"prompt": "x"}


def test_caption_scores_of_models():
    pytest.importorskip("pycocoevalcap")
    found = score_captions({"a": ["red sea"], "b": ["blue sky"]}, [["red sea"]])
    assert found["a"]["scores"]["BLEU-1"] > found["b"]["scores"]["BLEU-1"]
