"""What the shared prefix assumes about transformers and TRL. A failure says which assumption a new release broke."""

import pytest
import torch
import transformers.masking_utils
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from trl_cwdpo.upstream import SmoothedCausalLMOutput
from trl_cwdpo.upstream import shared_prefix as internals

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def test_a_four_dimensional_mask_reaches_the_attention_function_as_it_is(model, monkeypatch):
    seen = []
    before = AttentionInterface()["sdpa"]

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return before(module, query, key, value, None, **kwargs)

    AttentionInterface.register("sdpa", attention)
    try:
        mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
        model(input_ids=torch.arange(5)[None], attention_mask=mask, position_ids=torch.arange(5)[None])
    finally:
        AttentionInterface.register("sdpa", before)
    assert len(seen) == 1
    assert seen[0] is mask


def test_registering_changes_no_other_call(model):
    ids, padding = torch.randint(0, 32, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    before = model(input_ids=ids, attention_mask=padding).logits
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    internals.register_split_attention()
    registered = AttentionInterface()["sdpa"]
    internals.register_split_attention()
    assert AttentionInterface()["sdpa"] is registered, "registered twice"
    assert isinstance(registered, internals.SplitAttention)
    assert torch.equal(model(input_ids=ids, attention_mask=padding).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), generated)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("batch", "padded"), [(2, True), (1, False)])
def test_split_attention_is_attention_with_the_dense_mask(batch, padded):
    torch.manual_seed(0)
    prompt, longer, shorter = 4, 3, 2
    width = prompt + longer + shorter
    query, key, value = (torch.randn(2, 2, width, 8, dtype=torch.float64) for _ in range(3))
    used = torch.tensor([4, 2] if padded else [4, 4])
    dense = torch.zeros(2, 1, width, width, dtype=torch.bool)
    for row in range(2):
        for q in range(width):
            start = 0 if q < prompt else prompt if q < prompt + longer else prompt + longer
            dense[row, 0, q, start : q + 1] = True
            dense[row, 0, q, : min(int(used[row]), q + 1)] = True
            if q < prompt:
                dense[row, 0, q] = torch.arange(width) <= q  # padding of prompts is read by nobody
    compact = torch.cat([dense[:batch, :, prompt : prompt + longer, : prompt + longer]], dim=-1)

    def sdpa(module, query, key, value, mask, *, is_causal=False, **kwargs):
        attend = torch.nn.functional.scaled_dot_product_attention
        result = attend(query, key, value, attn_mask=mask, is_causal=is_causal and mask is None)
        return result.transpose(1, 2), None

    split = internals.SplitAttention(sdpa)
    found, _ = split(torch.nn.Module(), query, key, value, compact)
    expected, _ = sdpa(None, query, key, value, dense)
    assert torch.allclose(found, expected, atol=1e-12)
    (added,) = split._additive.values()
    split(torch.nn.Module(), query, key, value, compact)
    assert split._additive[compact] is added, "made again for the next layer"
    del compact
    assert not split._additive, "kept longer than its batch"


def test_the_head_scores_the_places_that_the_backbone_returns(model):
    add_fused_lm_head(model)
    ids = torch.randint(0, 32, (2, 6))
    labels = ids.clone()
    call = {"fused_lm_head": True, "use_cache": False}
    usual = model(input_ids=ids, labels=labels, **call).log_probs
    # The second row's places 2, 3, 4, then the first row's
    index = torch.tensor([[8, 9, 10], [2, 3, 4]])
    with internals.scored_places(model, index):
        picked = model(input_ids=ids, labels=ids.flatten()[index], **call).log_probs
    assert torch.allclose(picked, usual[[1, 0], 2:4], atol=1e-6)
    assert torch.equal(model(input_ids=ids, labels=labels, **call).log_probs, usual), "the hook stayed"


def test_everything_said_of_tokens_is_mapped():
    outputs = SmoothedCausalLMOutput(
        loss=torch.tensor(1.0), log_probs=torch.zeros(2, 3), smoothing_gap=torch.ones(2, 3)
    )
    mapped = internals.map_per_token(outputs, lambda tensor: tensor[:, 1:])
    assert isinstance(mapped, SmoothedCausalLMOutput)
    assert mapped.log_probs.shape == mapped.smoothing_gap.shape == (2, 2)
    assert mapped.loss == 1.0
    assert mapped.entropy is None
    per_token = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"}
    assert set(FusedCausalLMOutput.__dataclass_fields__) == per_token | {"loss", "aux_loss"}


def test_models_tell_whether_they_look_their_attention_up(model):
    assert internals.looks_up_attention(model) is True


def test_block_masks_are_made_of_functions_and_reach_the_attention_function(model, monkeypatch):
    # Not compiled, which takes a minute
    monkeypatch.setattr(
        transformers.masking_utils, "create_block_mask", lambda _compile, **options: create_block_mask(**options)
    )
    mask = internals.block_mask(lambda batch, head, place, seen: seen <= place, 5, torch.device("cpu"))
    assert isinstance(mask, BlockMask)
    assert (
        create_mask(mask.mask_mod, 1, 1, 5, 5, device="cpu")[0, 0].tolist() == torch.ones(5, 5).tril().bool().tolist()
    )
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return torch.zeros_like(query).transpose(1, 2), None

    before = AttentionInterface()["flex_attention"]
    AttentionInterface.register("flex_attention", attention)
    try:
        model.set_attn_implementation("flex_attention")
        model(input_ids=torch.arange(5)[None], attention_mask=mask, position_ids=torch.arange(5)[None])
    finally:
        AttentionInterface.register("flex_attention", before)
    assert len(seen) == 1
    assert seen[0] is mask


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, None),
        ({"sliding_window": 8}, 8),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, 8),
        ({"attention_chunk_size": 4, "sliding_window": 8}, 4),
    ],
)
def test_window(options, window):
    assert internals.attention_window(LlamaConfig(**SIZES, **options)) == window
