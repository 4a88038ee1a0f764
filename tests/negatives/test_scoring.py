"""Rewards in TRL's signature, and ℓ̄ of samples against plain logits."""

import asyncio
import math

import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from trl_cwdpo.negatives.responses import Layout
from trl_cwdpo.negatives.scoring import Scorer, measure_avg_logps, weighted_sum

PROMPTS, COMPLETIONS, IDS = ["a", "b"], ["xx", "yyy"], [[1], [2, 3]]


def length(completions, **_):
    return [len(text) for text in completions]


async def number_of_ids(completion_ids, **_):
    await asyncio.sleep(0)
    return [len(ids) for ids in completion_ids]


def score(functions, weights=None, **columns):
    return Scorer(functions, weights, Accelerator(cpu=True))(PROMPTS, COMPLETIONS, IDS, columns)


def test_functions_of_both_kinds_add_up_with_their_weights():
    assert score(length) == [2.0, 3.0]
    assert score([length, number_of_ids]) == [3.0, 5.0]
    assert score([length, number_of_ids], [0.5, -1.0]) == [0.0, -0.5]


def test_columns_reach_the_functions():
    assert score(lambda prompts, solution, **_: [float(s in p) for p, s in zip(prompts, solution, strict=True)],
                 solution=["a", "z"]) == [1.0, 0.0]  # fmt: skip


def test_missing_rewards():
    assert weighted_sum([None, 2.0], [1.0, 0.5]) == 1.0
    assert math.isnan(weighted_sum([None, math.nan], [1.0, 1.0]))
    assert math.isnan(score(lambda **_: [None, 1.0])[0])


def test_errors_name_the_function_and_the_numbers():
    def broken(**_):
        return [1.0]

    with pytest.raises(ValueError, match=r"'broken'.*returned 1 rewards for 2 completions"):
        score(broken)
    with pytest.raises(ValueError, match=r"`negative_reward_weights` has 1 .* 2 functions"):
        score([length, length], [1.0])
    with pytest.raises(ValueError, match="empty list"):
        score([])


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_model_scores_the_whole_conversation(tmp_path, conversational):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=27, num_key_value_heads=2, num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    prompts, completions = ["the sky ", "snow "], ["is blue", "looks very white"]
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    scores = Scorer(str(tmp_path), None, Accelerator(cpu=True))(prompts, completions, IDS, {})
    model = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    for prompt, completion, value in zip(prompts, completions, scores, strict=True):
        if conversational:
            ids = tokenizer.apply_chat_template(prompt + completion, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
        assert value == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)


def test_a_reward_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="`negative_reward_funcs`: there is no reward model 'no/such-model'"):
        Scorer("no/such-model", None, Accelerator(cpu=True))


def test_average_logps_equal_those_of_plain_logits(text_model):
    model = AutoModelForCausalLM.from_pretrained(text_model)
    rows = [
        {"prompt_ids": [3, 8, 9], "chosen_ids": [10, 2], "rejected_ids": [11, 2]},
        {"prompt_ids": [3, 7], "chosen_ids": [10, 2], "rejected_ids": [11, 2]},
    ]
    batch = {key: value[:2] for key, value in DataCollatorForPreference(0)(rows).items()}
    responses = [[12, 13, 14, 2], [15]]
    expected = []
    for row, ids in zip(rows, responses, strict=True):
        tokens = torch.tensor([row["prompt_ids"] + ids])
        log_probs = model(input_ids=tokens).logits.double().log_softmax(dim=-1)[0]
        start = len(row["prompt_ids"])
        expected.append(sum(log_probs[start + i - 1, token].item() for i, token in enumerate(ids)) / len(ids))
    add_fused_lm_head(model, outputs=("log_probs",))
    model.train()
    assert measure_avg_logps(model, batch, responses, Layout(0)) == pytest.approx(expected, abs=1e-5)
    assert model.training
