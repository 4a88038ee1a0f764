"""What the reference cache assumes about TRL, transformers, datasets and PEFT."""

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import DPOConfig, DPOTrainer

from trl_cwdpo.upstream import reference


def test_the_option_is_read_again_after_the_accelerator_is_made(text_model, tmp_path):
    asked = []

    class Late(DPOTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            assert not hasattr(self, "ref_model")
            self.args.precompute_ref_log_probs = True

        def _precompute_ref_logps(self, dataset, name, batch_size):
            asked.append((name, self.ref_model))
            return dataset

    args = DPOConfig(**tiny.training_options(tmp_path))
    trainer = Late(text_model, args=args, train_dataset=tiny.pairs(4), eval_dataset=tiny.pairs(4))
    assert asked == [("train", None), ("eval", None)]
    assert trainer.ref_model is None
    # Read before, so that the loss does not take the references for granted
    assert trainer.precompute_ref_logps is False


def test_ref_log_probs_are_those_of_the_loss(text_model, tmp_path):
    args = DPOConfig(**tiny.training_options(tmp_path))
    trainer = DPOTrainer(text_model, args=args, train_dataset=tiny.pairs(4))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    labels = batch["input_ids"][:, 1:]
    logits = trainer.ref_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * batch["completion_mask"][:, 1:]
    torch.testing.assert_close(torch.cat([chosen, rejected]), logps.sum(dim=1), rtol=1e-5, atol=1e-5)


def test_options_are_put_back_after_an_error(tmp_path):
    args = DPOConfig(**tiny.training_options(tmp_path))

    def fail():
        with reference.restored_options(args):
            args.precompute_ref_log_probs = True
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert args.precompute_ref_log_probs is False


class TestWeightsDigest:
    @pytest.fixture
    def model(self, text_model):
        return AutoModelForCausalLM.from_pretrained(text_model)

    def test_every_weight_and_its_precision_count(self, model):
        seen = {reference.weights_digest(model)}
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.view(-1)[-1] += 1.0
            seen.add(reference.weights_digest(model))
        seen.add(reference.weights_digest(model.to(torch.bfloat16)))
        assert len(seen) == len(list(model.parameters())) + 2

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["norm"]),
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ],
        ids=["lora", "prompt tuning"],
    )
    def test_a_fresh_adapter_does_not_count(self, model, config):
        expected = reference.weights_digest(model)
        assert reference.weights_digest(get_peft_model(model, config)) == expected

    def test_the_frozen_copy_of_an_adapter_counts(self, model):
        config = LoraConfig(r=2, init_lora_weights=False)
        plain = reference.weights_digest(model)
        adapted = get_peft_model(model, config)
        adapted.add_adapter("ref", config)
        first = reference.weights_digest(adapted)
        assert first != plain
        weights = dict(adapted.named_parameters())
        name = next(name for name in weights if ".ref." in name)
        with torch.no_grad():
            weights[name.replace(".ref.", ".default.")] += 1.0
        assert reference.weights_digest(adapted) == first
        with torch.no_grad():
            weights[name] += 1.0
        assert reference.weights_digest(adapted) != first


def test_where_a_model_lies_is_no_part_of_its_architecture():
    first, second = LlamaConfig(name_or_path="here"), LlamaConfig(name_or_path="there", dtype="bfloat16")
    assert reference.architecture_digest(first) == reference.architecture_digest(second)
    assert reference.architecture_digest(first) != reference.architecture_digest(LlamaConfig(rope_theta=5.0))


def test_a_tokenizer_counts_by_what_it_does_and_not_by_what_it_has_done(text_model):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    expected = reference.tokenizer_digest(tokenizer)
    tokenizer(["blue sky", "red"], padding=True, truncation=True, max_length=1)
    assert reference.tokenizer_digest(tokenizer) == expected
    assert reference.tokenizer_digest(AutoTokenizer.from_pretrained(text_model)) == expected
    tokenizer.add_tokens(["orange"])
    assert reference.tokenizer_digest(tokenizer) != expected


def test_a_processor_counts_by_its_settings(vision_model):
    from trl_cwdpo.shapes import build_processor

    first, second = build_processor(), build_processor()
    assert reference.processor_digest(first) == reference.processor_digest(second)
    second.image_processor.image_mean = [0.2] * 3
    assert reference.processor_digest(first) != reference.processor_digest(second)
    assert reference.processor_digest(first.tokenizer) is None
    assert reference.template_digest(first) == reference.template_digest(build_processor())


def test_data_have_a_fingerprint_of_their_contents():
    assert reference.dataset_fingerprint(tiny.pairs(4)) == reference.dataset_fingerprint(tiny.pairs(4))
    assert reference.dataset_fingerprint(tiny.pairs(4)) != reference.dataset_fingerprint(tiny.pairs(4, seed=1))
