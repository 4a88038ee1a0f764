"""Rows of shared prefixes against a definition in plain Python."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cwdpo.prefix_layout import PrefixLayout, find_layout

PAD, FIRST_TOKEN = 0, 3


def batch_of(prompts, chosen, rejected, extra_columns=0):
    """What a collator makes of lists of token lists: input_ids, attention_mask and labels."""
    sequences = [p + r for side in (chosen, rejected) for p, r in zip(prompts, side, strict=True)]
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
def pairs(draw, longest=6):
    """Prompts, chosen and rejected responses whose tokens are all different."""
    count = draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, longest), min_size=count, max_size=count)
    token = iter(range(FIRST_TOKEN, 1000))
    return [[[next(token) for _ in range(size)] for size in draw(sizes)] for _ in range(3)]


def blocks(layout):
    """First column of prompt, chosen and rejected block."""
    chosen, rejected = layout.sides
    return (
        (0, layout.prompt, layout.prompt + chosen)
        if chosen >= rejected
        else (
            0,
            layout.prompt + rejected,
            layout.prompt,
        )
    )


@settings(max_examples=60, deadline=None)
@given(pairs(), st.integers(0, 2))
def test_rows_hold_every_token_once_with_its_position(tokens, extra_columns):
    ids, attention, labels = batch_of(*tokens, extra_columns)
    layout = find_layout(ids, attention, labels)
    assert isinstance(layout, PrefixLayout)
    rows, positions = layout.rows(ids), layout.positions()
    assert rows.shape == positions.shape == (len(tokens[0]), layout.width)
    for pair, (prompt, chosen, rejected) in enumerate(zip(*tokens, strict=True)):
        for start, part, before in zip(
            blocks(layout), (prompt, chosen, rejected), (0, len(prompt), len(prompt)), strict=True
        ):
            block = slice(start, start + len(part))
            assert rows[pair, block].tolist() == part
            assert positions[pair, block].tolist() == list(range(before, before + len(part)))
        used = len(prompt) + len(chosen) + len(rejected)
        # Padding repeats a token of text, never one that stands for a picture
        assert (rows[pair] == chosen[0]).sum() == layout.width - used + 1


@settings(max_examples=60, deadline=None)
@given(pairs(), st.integers(0, 2))
def test_masks_let_a_response_see_its_prompt_and_itself(tokens, extra_columns):
    ids, attention, labels = batch_of(*tokens, extra_columns)
    layout = find_layout(ids, attention, labels)
    dense, side = layout.dense_mask(), layout.side_mask
    longer, shorter = max(layout.sides), min(layout.sides)
    assert side.shape[-2:] == (longer, layout.prompt + longer)
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
    assert shorter <= longer


@settings(max_examples=60, deadline=None)
@given(pairs(), st.integers(0, 2))
def test_scores_come_back_in_the_usual_order(tokens, extra_columns):
    ids, attention, labels = batch_of(*tokens, extra_columns)
    layout = find_layout(ids, attention, labels)
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
