"""What `upstream.sharding` assumes about accelerate and FSDP2."""

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trl_cwdpo.upstream.sharding import name_only_present_layers, prepare_for_sharding


def plugin():
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")


def test_accelerate_stops_at_a_layer_that_is_not_there(vision_model):
    model = AutoModelForImageTextToText.from_pretrained(vision_model)
    with pytest.raises(ValueError, match="CLIPTextEmbeddings"):
        plugin().set_auto_wrap_policy(model)
    kept = set(model._no_split_modules) - {"CLIPTextEmbeddings"}
    name_only_present_layers(model)
    policy = plugin()
    policy.set_auto_wrap_policy(model)
    wrapped = {layer.__name__ for layer in policy.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == set(model._no_split_modules)
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= wrapped <= kept


def test_names_that_are_all_there_stay(text_model):
    model = AutoModelForCausalLM.from_pretrained(text_model)
    before = set(model._no_split_modules)
    name_only_present_layers(model)
    assert set(model._no_split_modules) == before


def test_without_fsdp_the_forward_is_as_it_was(text_model):
    model = AutoModelForCausalLM.from_pretrained(text_model)
    ids = torch.arange(6).view(1, 6)
    before = model(input_ids=ids).logits
    prepare_for_sharding(model)
    assert torch.equal(model(input_ids=ids).logits, before)
