"""A reward model and a user's function as judges."""

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_cwdpo.evaluation import judges
from trl_cwdpo.evaluation.judges import as_messages, load_function, reward_model_judge
from trl_cwdpo.evaluation.win_rate import Comparison, compare_responses


def reward_model(labels=1):
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    return LlamaForSequenceClassification(config).train(), tokenizer


def test_it_prefers_the_higher_reward():
    model, tokenizer = reward_model()
    pairs = [
        Comparison([{"role": "user", "content": "what is the sky"}], "it is blue", "grass"),
        Comparison("what is the sea", "very very very green", "not a bit"),
        Comparison("what is snow", "white", "it looks very black"),
    ]
    rewards = []
    for pair in pairs:
        for response in (pair.first, pair.second):
            messages = [*as_messages(pair.prompt), {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            with torch.no_grad():
                rewards.append(model.eval()(**tokenizer(text, return_tensors="pt")).logits.item())
    model.train()
    expected = [1.0 if first > second else 0.0 for first, second in zip(rewards[::2], rewards[1::2], strict=True)]
    state = torch.get_rng_state()
    # Batches of two: padding must not matter
    assert reward_model_judge(model, tokenizer, batch_size=2)(pairs) == expected
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    rate = compare_responses(pairs, reward_model_judge(model, tokenizer))
    assert rate.wins == pytest.approx(sum(expected) / 3)
    assert rate.inconsistent == 0.0


PAIRS = [
    Comparison("what is the sea", "very very very green", "not a bit"),
    Comparison("what is snow", "white", "black"),
]


def test_without_a_padding_token_rows_are_scored_one_by_one():
    model, tokenizer = reward_model()
    expected = reward_model_judge(model, tokenizer)(PAIRS)
    model.config.pad_token_id = None
    tokenizer.pad_token = None
    assert reward_model_judge(model, tokenizer)(PAIRS) == expected


def test_it_is_loaded_when_it_is_first_asked(tmp_path, monkeypatch):
    model, tokenizer = reward_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = []
    load = judges._load_reward_model
    monkeypatch.setattr(judges, "_load_reward_model", lambda path: loaded.append(path) or load(path))
    judge = reward_model_judge(str(tmp_path), None)
    assert loaded == []
    assert judge(PAIRS) == reward_model_judge(model, tokenizer)(PAIRS)
    judge(PAIRS)
    assert loaded == [str(tmp_path)]


def test_special_tokens_come_from_the_template_or_the_tokenizer(monkeypatch):
    model, tokenizer = reward_model()
    tokenizer._tokenizer.post_processor = TemplateProcessing("<|system|> $A", special_tokens=[("<|system|>", 5)])
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    reward_model_judge(model, tokenizer, batch_size=1)(PAIRS[:1])
    tokenizer.chat_template = None
    reward_model_judge(model, tokenizer, batch_size=1)(PAIRS[:1])
    with_template, without = seen[0], seen[2]
    assert 5 not in with_template
    assert without[0] == 5
    assert without.count(5) == 1


def test_it_needs_one_label():
    model, tokenizer = reward_model(labels=2)
    with pytest.raises(ValueError, match="2 labels; it must have one"):
        reward_model_judge(model, tokenizer)


def test_messages_without_pictures():
    content = [{"type": "image"}, {"type": "text", "text": "what is"}, {"type": "text", "text": "this?"}]
    assert as_messages([{"role": "user", "content": content}]) == [{"role": "user", "content": "what is this?"}]
    assert as_messages("hello") == [{"role": "user", "content": "hello"}]


def test_functions_by_name():
    assert load_function("os.path:join")("a", "b") == "a/b"
    for name in ("os.path", "nowhere_at_all:x", "os.path:nothing", "os:sep"):
        with pytest.raises(ValueError, match=name.split(":")[0]):
            load_function(name)
