"""Rows of shared prefixes against a definition in plain Python."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cwdpo.prefix_layout import PrefixLayout, find_layout

PAD, FIRST_TOKEN = 0, 3


def batch_of(prompts, *sides, extra_columns=0):
    """What a collator makes of lists of token lists: input_ids, attention_mask and labels."""
    sequences = [p + r for side in sides for p, r in zip(prompts, side, strict=True)]
    width = max(map(len, sequences)) + extra_columns
    ids = torch.full((len(sequences), width), PAD)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        attention[row, : len(sequence)] = 1
        start = len(prompts[row % len(prompts)])
        labels[row, start : len(sequence)] = ids[row, start : len(sequence)]
    return ids, attention, labels


@st.composite
def pairs(draw, longest=6, most_sides=2):
    """Prompts, chosen and rejected responses (or more) whose tokens are all different."""
    count, sides = draw(st.integers(1, 3)), draw(st.integers(2, most_sides))
    sizes = st.lists(st.integers(1, longest), min_size=count, max_size=count)
    token = iter(range(FIRST_TOKEN, 1000))
    return [[[next(token) for _ in range(size)] for size in draw(sizes)] for _ in range(1 + sides)]


def blocks(layout):
    """First column of the prompt and of the block of each side: the longest first, the shortest last."""
    by_length = sorted(layout.sides, reverse=True)
    longest, left = by_length[0], list(by_length)
    starts = []
    for width in layout.sides:
        # Of sides that are equally long, the first comes first
        place = left.index(width)
        left[place] = None
        starts.append(layout.prompt + place * longest)
    return (0, *starts)


@settings(max_examples=60, deadline=None)
@given(pairs(most_sides=4), st.integers(0, 2))
def test_rows_hold_every_token_once_with_its_position(tokens, extra_columns):
    ids, attention, labels = batch_of(*tokens, extra_columns=extra_columns)
    layout = find_layout(ids, attention, labels, len(tokens) - 1)
    assert isinstance(layout, PrefixLayout)
    rows, positions = layout.rows(ids), layout.positions()
    assert rows.shape == positions.shape == (len(tokens[0]), layout.width)
    assert layout.width == layout.prompt + max(layout.sides) * (len(layout.sides) - 1) + min(layout.sides)
    for pair, (prompt, *responses) in enumerate(zip(*tokens, strict=True)):
        begins = (0, *(len(prompt) for _ in responses))
        for start, part, before in zip(blocks(layout), (prompt, *responses), begins, strict=True):
            block = slice(start, start + len(part))
            assert rows[pair, block].tolist() == part
            assert positions[pair, block].tolist() == list(range(before, before + len(part)))
        used = len(prompt) + sum(map(len, responses))
        # Padding repeats a token of text, never one that stands for a picture
        assert (rows[pair] == responses[0][0]).sum() == layout.width - used + 1
    assert layout.tokens == sum(len(part) for parts in tokens for part in parts)


@settings(max_examples=60, deadline=None)
@given(pairs(most_sides=4), st.integers(0, 2))
def test_masks_let_a_response_see_its_prompt_and_itself(tokens, extra_columns):
    ids, attention, labels = batch_of(*tokens, extra_columns=extra_columns)
    layout = find_layout(ids, attention, labels, len(tokens) - 1)
    dense, side = layout.dense_mask(), layout.side_mask
    longest = max(layout.sides)
    assert side.shape[-2:] == (longest, layout.prompt + longest)
    starts = blocks(layout)
    for pair, parts in enumerate(zip(*tokens, strict=True)):
        prompt = range(len(parts[0]))
        for part, start in enumerate(starts):
            for index in range(len(parts[part])):
                own = set(range(start, start + index + 1))
                assert set(dense[pair, 0, start + index].nonzero().flatten().tolist()) == own | (
                    set(prompt) if part else set()
                )
                if part:
                    # Columns of the compact mask are those of the prompt, then of the side itself
                    seen = side[min(pair, len(side) - 1), 0, index].nonzero().flatten().tolist()
                    assert seen == [*prompt, *range(layout.prompt, layout.prompt + index + 1)]
    assert bool(dense.any(dim=-1).all()), "a row that sees nothing gives NaN"


@settings(max_examples=60, deadline=None)
@given(pairs(most_sides=4), st.integers(0, 2))
def test_scores_come_back_in_the_usual_order(tokens, extra_columns):
    ids, attention, labels = batch_of(*tokens, extra_columns=extra_columns)
    layout = find_layout(ids, attention, labels, len(tokens) - 1)
    # Each place says which token stands there, so a label must be predicted by the token before it
    predictor = layout.rows(ids).flatten()[layout.scored_index][:, :-1]
    scored = layout.labels(labels)[:, 1:]
    assert (layout.labels(labels)[:, 0] == -100).all()
    before, shifted = ids[:, :-1], labels[:, 1:]
    response = shifted != -100
    assert torch.equal(layout.restore(predictor), before.masked_fill(~response, 0))
    assert torch.equal(layout.restore(scored), shifted.masked_fill(~response, 0))
    assert torch.equal(layout.restore(scored > 0), response)


def test_positions_of_several_axes_go_on_from_the_prompt():
    ids, attention, labels = batch_of([[3, 4, 5]], [[6, 7]], [[8, 9, 10]])
    layout = find_layout(ids, attention, labels)
    of_chosen = torch.tensor([[[0, 1, 2, 7, 8, 0]], [[0, 1, 6, 7, 8, 0]]])
    # The rejected response is longer, so it comes first
    expected = [[[0, 1, 2, 7, 8, 9, 7, 8]], [[0, 1, 6, 7, 8, 9, 7, 8]]]
    assert layout.positions(of_chosen).tolist() == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids, attention, labels: (ids, None, labels), "no batch of pairs"),
        (lambda ids, attention, labels: (ids[:1], attention[:1], labels[:1]), "no batch of pairs"),
        (lambda ids, attention, labels: (ids.flip(1), attention.flip(1), labels.flip(1)), "padded on the right"),
        (lambda ids, attention, labels: (ids + torch.tensor([[0], [1]]), attention, labels), "prompts .* differ"),
        (lambda ids, attention, labels: (ids[:, 2:], attention[:, 2:], labels[:, 2:]), "empty"),
    ],
)
def test_what_cannot_be_shared_is_named(change, reason):
    found = find_layout(*change(*batch_of([[3, 4]], [[5, 6]], [[7]])))
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_cost_counts_tokens_scores_and_attention():
    ids, attention, labels = batch_of([[3] * 100], [[4] * 10], [[5] * 10])
    layout = find_layout(ids, attention, labels)
    # Very wide: only tokens count, 120 instead of 220
    assert layout.relative_cost(10**6, 10**6) == pytest.approx(120 / 220, rel=1e-3)
    # Only the head counts: 2 · 11 places instead of 220
    assert layout.relative_cost(1, 0, 10**6) == pytest.approx(22 / 220, rel=1e-3)
    # The same of four responses, which have a prompt in common with all the others
    layout = find_layout(*batch_of([[3] * 100], *([[token] * 10] for token in range(4, 8))), 4)
    assert layout.relative_cost(10**6, 10**6) == pytest.approx(140 / 440, rel=1e-3)
    assert layout.relative_cost(1, 0, 10**6) == pytest.approx(44 / 440, rel=1e-3)
    # Only attention counts: 100²/2 + 4 · 10 · 110 instead of 4 · 110²/2
    seen = layout.relative_cost(1e-9, 0.0)
    assert seen == pytest.approx((100**2 / 2 + 4 * 10 * 110) / (4 * 110**2 / 2), rel=1e-3)
