"""Pairs packed into one row for FlexAttention give what the usual way gives.

FlexAttention has no backward pass on a CPU. So gradients are tested with a stand-in for its kernel, which evaluates
the very block masks in full; the kernel itself is tested forward only, and in training where there is an accelerator.
"""

import shutil

import pytest
import tiny
import torch
import transformers.masking_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_prefix_layout import batch_of, pairs
from test_shared_prefix import (
    BATCHES,
    COOLED,
    MODELS,
    assert_equal_runs,
    assert_same,
    fused,
    inputs_of,
    is_shared,
    outputs_and_gradients,
    run,
)
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AttentionInterface
from vision_batches import GRIDS, VISION_MODELS, vision_inputs_of

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.prefix_layout import PackedRows, find_layout
from trl_cwdpo.shared_prefix import batch_layout, run_rows
from trl_cwdpo.upstream import shared_prefix as internals

FLEX = {"model_init_kwargs": {"attn_implementation": "flex_attention"}}


@settings(max_examples=40, deadline=None)
@given(pairs(), st.integers(0, 2), st.sampled_from([1, 4, 32]))
def test_one_row_holds_every_token_and_pairs_are_apart(tokens, extra_columns, multiple):
    ids, attention, labels = batch_of(*tokens, extra_columns=extra_columns)
    layout = find_layout(ids, attention, labels)
    packed = PackedRows(layout, multiple)
    (row,), (positions,) = packed.rows(ids).tolist(), packed.positions().tolist()
    total = sum(len(part) for parts in tokens for part in parts)
    assert len(row) == len(positions) == packed.length
    assert packed.length % multiple == 0
    assert total <= packed.length < total + multiple
    allowed = create_mask(packed.attends(), 1, 1, packed.length, packed.length, device="cpu")[0, 0]
    assert bool(allowed.any(dim=1).all()), "a row that sees nothing gives NaN"
    for prompt, *sides in zip(*tokens, strict=True):
        for side in sides:
            for number, token in enumerate([*prompt, *side]):
                place = row.index(token)  # all tokens are different
                assert positions[place] == number
                seen = [row[index] for index in allowed[place].nonzero().flatten()]
                assert seen == [*prompt, *side][: number + 1]
    # As for rows with padding: each label is predicted by the token before it
    predictor = packed.rows(ids)[0][packed.scored_index][:, :-1]
    response = labels[:, 1:] != -100
    assert torch.equal(packed.restore(predictor), ids[:, :-1].masked_fill(~response, 0))


def test_blocks_that_nobody_attends_to_are_left_out():
    count, prompt, side = 4, 100, 14
    tokens = [[[3] * length for _ in range(count)] for length in (prompt, side, side)]
    packed = PackedRows(find_layout(*batch_of(*tokens)))
    assert packed.length == 4 * 128
    mask = packed.mask(lambda attends, length: create_block_mask(attends, 1, None, length, length, device="cpu"))
    assert mask is packed.mask(None), "made again for the reference"
    blocks = mask.to_dense()[0, 0]
    assert torch.equal(blocks, torch.eye(count, dtype=blocks.dtype)), "each pair is one block and sees no other"


def test_cost_is_that_of_the_tokens():
    even, uneven = ([[3] * 100] * 2, [[4] * 28] * 2), ([[3] * 100, [3] * 10], [[4] * 28, [4] * 4])
    costs = []
    for prompts, sides in (even, uneven):
        layout = find_layout(*batch_of(prompts, sides, sides))
        costs.append((layout.relative_cost(10**6, 10**6), PackedRows(layout, 1).relative_cost(10**6, 10**6)))
    assert costs[0] == pytest.approx((156 / 256, 156 / 256), rel=1e-3)
    assert costs[1] == pytest.approx((156 / 256, (156 + 18) / 512), rel=1e-3)


# --- gradients and runs, with a stand-in for the kernel ---


def dense_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What FlexAttention computes, from the function within its mask."""
    size = (len(query), 1, query.shape[2], key.shape[2])
    mask = create_mask(attention_mask.mask_mod, *size, device=query.device) if attention_mask is not None else None
    attend = torch.nn.functional.scaled_dot_product_attention
    output = attend(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True, dropout_p=0.0
    )
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def without_kernel(monkeypatch):
    """FlexAttention with gradients on a CPU, and without waiting for a compiler."""
    monkeypatch.setattr(
        transformers.masking_utils,
        "create_block_mask",
        lambda _compile, **options: create_block_mask(**options),
    )
    before = AttentionInterface()["flex_attention"]
    AttentionInterface.register("flex_attention", dense_attention)
    yield
    AttentionInterface.register("flex_attention", before)


def with_flex_attention(model):
    # Of the decoder, and in spite of transformers' list of those that it lets have it
    model.config.get_text_config()._attn_implementation = "flex_attention"
    return model


@pytest.mark.parametrize("tokens", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral, window not reached"])
def test_outputs_and_gradients(without_kernel, name, tokens):
    torch.manual_seed(0)
    model, inputs = with_flex_attention(fused(MODELS[name]())), inputs_of(tokens, extra_columns=1)
    assert isinstance(batch_layout(model, inputs), PackedRows)
    assert_same(model, inputs)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("family", VISION_MODELS)
def test_pictures(without_kernel, family, grids):
    torch.manual_seed(0)
    model, inputs = with_flex_attention(fused(VISION_MODELS[family]())), vision_inputs_of(family, grids)
    assert isinstance(batch_layout(model, inputs), PackedRows)
    assert_same(model, inputs)


def test_outputs_are_those_of_sdpa(without_kernel):
    torch.manual_seed(0)
    model, inputs = fused(MODELS["llama"]()), inputs_of(BATCHES["padded"])
    expected, gradients = outputs_and_gradients(model, lambda: run_rows(model, batch_layout(model, inputs), inputs))
    with_flex_attention(model)
    found, ours = outputs_and_gradients(model, lambda: run_rows(model, batch_layout(model, inputs), inputs))
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("trainer_class", [CWDPOTrainer, GentleNegativeSFTTrainer])
def test_runs(without_kernel, text_model, tmp_path, trainer_class, adapter):
    config_class, cooling = (CWDPOConfig, COOLED) if trainer_class is CWDPOTrainer else (GentleNegativeSFTConfig, {})
    kwargs = {"peft_config": LoraConfig(r=4, init_lora_weights=False)} if adapter else {}
    usual, shared = (
        run(trainer_class, config_class, text_model, tmp_path, kwargs, share_prefix=share, **FLEX, **cooling)
        for share in (False, True)
    )
    assert is_shared(shared)
    assert shared._shared_prefix._last[1] == "flex_attention"
    assert_equal_runs(usual, shared)


# --- the kernel itself ---


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="FlexAttention is compiled")
@pytest.mark.parametrize("family", ["text", "llava"])
def test_the_kernel_forward(family):
    torch.manual_seed(0)
    if family == "text":
        model, inputs = fused(MODELS["llama"]()), inputs_of(BATCHES["padded"])
    else:
        model, inputs = fused(VISION_MODELS["llava"]()), vision_inputs_of("llava", GRIDS["several pictures, and none"])
    with torch.no_grad():
        usual = model(**inputs)
        model.set_attn_implementation("flex_attention" if family == "text" else {"text_config": "flex_attention"})
        assert internals.attention_of(model) == "flex_attention"
        shared = run_rows(model, batch_layout(model, inputs), inputs)
    assert (shared.log_probs.sum(1) - usual.log_probs.sum(1)).abs().max() <= 1e-4
    assert torch.allclose(shared.entropy, usual.entropy, atol=1e-4)


@pytest.mark.gpu
def test_the_kernel_in_training(tmp_path):
    # Its blocks need heads of at least 16
    model = tiny.save_text_model(tmp_path / "model", hidden_size=64)
    options = {"use_cpu": False, **FLEX, **COOLED}
    usual, shared = (
        run(CWDPOTrainer, CWDPOConfig, model, tmp_path, share_prefix=share, **options) for share in (False, True)
    )
    assert is_shared(shared)
    assert_equal_runs(usual, shared, tolerance=1e-3)
