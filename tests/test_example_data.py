"""The pairs in `examples/data` are what their README says."""

import json
from collections import Counter
from pathlib import Path

import pytest

PAIRS = Path(__file__).parent.parent / "examples" / "data" / "preferences.jsonl"

pytestmark = pytest.mark.skipif(not PAIRS.is_file(), reason="the examples are not beside the tests")


@pytest.fixture(scope="module")
def pairs():
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def test_counts_are_those_of_the_readme(pairs):
    assert Counter(pair["difficulty"] for pair in pairs) == {"hard": 67, "easy": 33}


def test_every_pair_is_one_question_with_two_different_answers(pairs):
    for pair in pairs:
        assert [message["role"] for message in pair["prompt"]] == ["user"]
        (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert chosen["content"].strip() != rejected["content"].strip()


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_no_text_occurs_twice(pairs, column):
    texts = [pair[column][0]["content"].casefold() for pair in pairs]
    assert len(set(texts)) == len(texts)
