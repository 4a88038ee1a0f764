"""Rows are found again by the texts of a batch: exactly where they can be, and not at all where they can't."""

import pytest

from trl_cwdpo.row_lookup import find_pair, find_sampled_pair


def assistant(content):
    return [{"role": "assistant", "content": content}]


ROWS = [
    {"chosen": "the sky is blue", "rejected": "green"},
    {"chosen": assistant("snow is white"), "rejected": assistant("black")},
    {"chosen": "snow is white", "rejected": "red"},
]


@pytest.mark.parametrize(
    ("texts", "index"),
    [
        ({"chosen": "the sky is blue", "rejected": "green"}, 0),
        ({"chosen": " the sky ", "rejected": "gre"}, 0),
        ({"chosen": "snow is white", "rejected": "red"}, 2),
        ({"chosen": "snow"}, 1),
        ({"rejected": "red"}, 2),
        ({"chosen": "the sky is blue", "rejected": "red"}, None),
        ({"chosen": "sky"}, None),
        ({"chosen": "", "rejected": "green"}, None),
    ],
)
def test_find_pair_matches_the_beginning_of_all_given_responses(texts, index):
    assert find_pair(ROWS, texts) == index


def test_find_pair_stops_at_the_first_match():
    assert find_pair(iter([*ROWS, None]), {"rejected": "red"}) == 2


def user(text):
    return [{"role": "user", "content": text}]


PROMPTED = [
    {"prompt": user("what colour is the sky"), "chosen": assistant("blue"), "rejected": assistant("green")},
    {"prompt": user("what colour is the sky"), "chosen": assistant("grey"), "rejected": assistant("red")},
    {"prompt": user([{"type": "image"}, {"type": "text", "text": "and snow"}]), "chosen": "white", "rejected": "red"},
    {"prompt": "why", "chosen": "because", "rejected": "so"},
]
SKY = "<|user|> what  colour is\nthe sky <|assistant|> "


@pytest.mark.parametrize(
    ("texts", "prompt", "index"),
    [
        ({"chosen": "grey", "rejected": "sampled"}, SKY, 1),
        ({"chosen": "sampled", "rejected": "green"}, SKY, 0),
        # The response of one row to the prompt of another
        ({"chosen": "white", "rejected": "sampled"}, SKY, None),
        ({"chosen": "sampled", "rejected": "sampled too"}, SKY, None),
        ({"chosen": "sampled", "rejected": "sampled too"}, "user: and snow", 2),
        ({"chosen": "because", "rejected": "sampled"}, "why", 3),
        ({"chosen": "because", "rejected": "sampled"}, "", None),
        ({"chosen": "", "rejected": ""}, SKY, None),
    ],
)
def test_find_sampled_pair_goes_by_the_prompt_and_the_response_that_was_kept(texts, prompt, index):
    assert find_sampled_pair(PROMPTED, texts, prompt) == index


def test_find_sampled_pair_passes_by_rows_without_a_prompt():
    assert find_sampled_pair(ROWS, {"chosen": "green", "rejected": "sampled"}, "the sky is blue") is None
