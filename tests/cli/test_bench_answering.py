"""The base of the questions' task: what it is taught with, against the processor and the questions' own meaning."""

import json

import pytest
import torch
from torch import nn

from trl_cwdpo.cli.bench_answering import QUESTIONS_PER_SCENE, build_answering_base, question_corpus
from trl_cwdpo.cli.bench_questions import prompt_text
from trl_cwdpo.shapes import build_model, build_processor, pretrain
from trl_cwdpo.shapes.captions import describe
from trl_cwdpo.shapes.pretraining import Recipe, completion_loss
from trl_cwdpo.shapes.scenes import draw_scene, sample_scenes


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(12, seed=3, pair_fraction=0.8)


def test_the_answers_are_true_and_half_of_them_are_yes(processor, scenes):
    corpus, tokenizer = question_corpus(processor, scenes, seed=0), processor.tokenizer
    assert corpus.completion_ids.shape == (12, QUESTIONS_PER_SCENE, 2)
    assert corpus.completion_ids[..., 1].unique().tolist() == [tokenizer.eos_token_id]
    told = []
    for scene, prompts, answers in zip(scenes, corpus.prompt_ids, corpus.completion_ids, strict=True):
        things = [tuple(phrase) for phrase in describe(scene).phrases]
        for prompt, answer in zip(prompts, answers, strict=True):
            words = tokenizer.decode(prompt).split()
            asked = tuple(words[words.index("a") + 1 :][:3])
            told.append(tokenizer.decode(answer[0]))
            assert (asked in things) == (told[-1] == "yes")
    assert told.count("yes") == len(told) / 2


def test_the_loss_is_that_of_the_whole_model_on_the_answers(processor, scenes):
    model, corpus = build_model(processor, seed=0), question_corpus(processor, scenes, seed=0)
    rows, orders = torch.tensor([0, 4, 7]), torch.tensor([1, 0, 3])
    texts = []
    for row, order in zip(rows, orders, strict=True):
        words = processor.tokenizer.decode(corpus.prompt_ids[row, order]).split()
        question = " ".join(words[words.index("is") : words.index("?") + 1])
        answer = processor.tokenizer.decode(corpus.completion_ids[row, order])
        texts.append(f"{prompt_text(processor, question)} {answer}")
    batch = processor(images=[[draw_scene(scenes[row])] for row in rows], text=texts, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[:, -3:-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -2:].flatten())
        found = completion_loss(model, corpus, rows, orders)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_teaching_starts_from_the_captioner_and_is_done_once(tmp_path):
    captioner = pretrain(tmp_path / "captioner", steps=1, recipe=Recipe(num_scenes=8), progress=False).path
    target = tmp_path / "answering"
    assert build_answering_base(captioner, target, scenes=8, steps=2, seed=0) == target
    losses = json.loads((target / "losses.json").read_text())
    assert len(losses) == 2
    written = (target / "model.safetensors").stat().st_mtime_ns
    build_answering_base(captioner, target, scenes=8, steps=2, seed=0)
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    build_answering_base(captioner, target, scenes=8, steps=3, seed=0)
    assert len(json.loads((target / "losses.json").read_text())) == 3
