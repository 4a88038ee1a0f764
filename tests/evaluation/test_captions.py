"""Caption metrics, with and without Java."""

import math
import shutil

import pytest

from trl_cwdpo.evaluation import captions
from trl_cwdpo.evaluation.captions import caption_scores

pytest.importorskip("pycocoevalcap")

SAID = ["A small red circle.", "a large blue square left of a green cross", "a white triangle"]
TRUTH = [["a small red circle"], ["a large blue square left of a small green cross", "x y"], ["a purple cross"]]


def test_perfect_captions():
    texts = ["a small red circle", "two large dogs run fast", "the cat sat down there"]
    result = caption_scores(texts, [[text] for text in texts], use_java=False)
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert result.scores[name] == pytest.approx(1.0)
    # CIDEr-D of a caption that is its own only reference: cosine 1 for each length of n-gram, times 10
    assert result.scores["CIDEr"] == pytest.approx(10.0)
    assert (result.tokenizer, len(result.notes)) == ("simple", 1)


def test_bleu_by_hand():
    # Unigrams: "a" and "triangle" … one of three words right, lengths equal
    result = caption_scores(["a white triangle"], [["a purple cross"]], use_java=False)
    assert result.scores["BLEU-1"] == pytest.approx(1 / 3, rel=1e-6)
    # ROUGE-L: longest common subsequence 1 of 3 on both sides
    assert result.scores["ROUGE-L"] == pytest.approx(1 / 3)
    # Shorter than its reference: the brevity penalty of BLEU, e^(1 − 4/2)
    result = caption_scores(["red circle"], [["a small red circle"]], use_java=False)
    assert result.scores["BLEU-1"] == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)


def test_without_java_it_says_so(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    result = caption_scores(SAID, TRUTH)
    assert result.tokenizer == "simple"
    assert "METEOR" not in result.scores
    assert "Java" in result.notes[0]
    assert result.to_dict()["scores"]["CIDEr"] > 0
    with pytest.raises(ValueError, match="no `java` on the PATH"):
        caption_scores(SAID, TRUTH, use_java=True)


def test_a_java_that_does_not_run_is_none(monkeypatch, tmp_path):
    # As on macOS, where the program only says where to get one
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert not captions.has_java()
    assert caption_scores(SAID, TRUTH).tokenizer == "simple"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_with_java_plain_english_scores_the_same():
    ours, theirs = (caption_scores(SAID, TRUTH, use_java=java) for java in (False, True))
    assert theirs.tokenizer == "ptb"
    assert 0 < theirs.scores["METEOR"] < 1
    for name, value in ours.scores.items():
        assert theirs.scores[name] == pytest.approx(value)


def test_wrong_arguments():
    for said, truth in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="reference"):
            caption_scores(said, truth)
