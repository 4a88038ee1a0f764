"""What this package assumes about TRL and transformers. A failure here says which assumption a new release broke."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTTrainer, upstream

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "logit scale": lambda: CohereForCausalLM(
        CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)
    ),
    "logits scaling": lambda: GraniteForCausalLM(
        GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0)
    ),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=1.5)),
}


class Watched(dict):
    """A batch that notes when its reference log-probabilities are read."""

    def __init__(self, *args, events):
        super().__init__(*args)
        self.events = events

    def __getitem__(self, key):
        if key.startswith("ref_"):
            self.events.append(key)
        return super().__getitem__(key)


@pytest.fixture
def dpo(text_model, tmp_path):
    return DPOTrainer(text_model, args=DPOConfig(**tiny.training_options(tmp_path)), train_dataset=tiny.pairs())


def batch_of(trainer, rows=4):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(rows)])


class TestLossOfDPOTrainer:
    def test_calls_the_model_once_and_reads_the_references_afterwards(self, dpo):
        events = []

        def model(**kwargs):
            events.append("fused" if upstream.is_fused_call(kwargs) else "plain")
            return dpo.model(**kwargs)

        inputs = Watched(batch_of(dpo), events=events)
        inputs["ref_chosen_logps"] = inputs["ref_rejected_logps"] = torch.zeros(4)
        with upstream.references_in_inputs(dpo):
            dpo._compute_loss(model, inputs, return_outputs=False)
        reads = [event for event in events if event.startswith("ref_")]
        assert events[0] == "fused", "DPOTrainer reads the references before its forward: PolicyTap comes too late"
        assert events.count("fused") == 1, "DPOTrainer calls the policy more than once"
        assert set(reads) == {"ref_chosen_logps", "ref_rejected_logps"}, "references are not taken from the inputs"

    def test_uses_references_that_appear_during_the_forward(self, dpo):
        inputs = batch_of(dpo)

        def losses(shift):
            def put(outputs, _):
                sums = outputs.log_probs.detach().sum(dim=1)
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = sums[:4], sums[4:] + shift

            with upstream.references_in_inputs(dpo):
                return dpo._compute_loss(upstream.PolicyTap(dpo.model, put), inputs, return_outputs=False).item()

        assert losses(0.0) == pytest.approx(0.693147, abs=1e-6)
        assert losses(10.0) == pytest.approx(-F.logsigmoid(torch.tensor(0.1 * 10.0)).item(), abs=1e-6)

    def test_flag_is_restored_after_an_error(self, dpo):
        def fail(**kwargs):
            assert dpo.precompute_ref_logps is True
            raise KeyError

        with upstream.references_in_inputs(dpo), pytest.raises(KeyError):
            dpo._compute_loss(fail, batch_of(dpo), return_outputs=False)
        assert dpo.precompute_ref_logps is False

    def test_collects_the_metrics_that_cooling_puts_right(self, dpo):
        dpo.model.train()
        dpo._compute_loss(dpo.model, batch_of(dpo), return_outputs=False)
        assert {"rewards/rejected", "rewards/accuracies", "rewards/margins"} <= dpo._metrics["train"].keys()


class TestFusedForward:
    def test_is_plain_log_softmax_zero_outside_the_labels_with_chosen_rows_first(self, dpo):
        batch = batch_of(dpo)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kwargs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        outputs = dpo.model(**kwargs, labels=labels, fused_lm_head=True)
        expected = F.log_softmax(dpo.model(**kwargs).logits[:, :-1], dim=-1)
        expected = expected.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        expected = expected.masked_fill(labels[:, 1:] == -100, 0.0)
        assert torch.allclose(upstream.per_token_logps(outputs), expected, atol=1e-5)
        assert (
            batch["input_ids"][0].tolist()[: len(dpo.train_dataset[0]["prompt_ids"])]
            == (dpo.train_dataset[0]["prompt_ids"])
        )

    def test_reference_forward_equals_compute_ref_log_probs(self, dpo):
        batch = batch_of(dpo)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kwargs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        kwargs |= {"labels": labels, "fused_lm_head": True, "output_router_logits": True}
        ours = upstream.per_token_logps(upstream.reference_forward(dpo, kwargs)).sum(dim=1)
        assert torch.equal(ours, torch.cat(dpo.compute_ref_log_probs(dpo.ref_model, batch)))

    @pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
    def test_smoothing_gap_is_that_of_the_models_own_logits(self, build):
        torch.manual_seed(0)
        model = build().eval()
        input_ids = torch.randint(3, 32, (4, 7))
        labels = input_ids.clone()
        labels[:, :3] = -100
        labels[:2] = -100
        logits = model(input_ids=input_ids).logits
        expected = logits[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        expected = (expected - logits[:, :-1].mean(-1)).masked_fill(labels[:, 1:] == -100, 0.0)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        upstream.add_smoothing_gap(model)
        outputs = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True, gap_labels=labels)
        assert torch.allclose(upstream.smoothing_gap(outputs, 6), expected, atol=1e-5)

    def test_model_generates_as_before(self, text_model):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        prompt = torch.tensor([[5, 6, 7]])
        before = model.generate(prompt, max_new_tokens=4, do_sample=False)
        add_fused_lm_head(model)
        upstream.add_smoothing_gap(model)
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), before)

    def test_missing_outputs_are_named(self):
        with pytest.raises(RuntimeError, match="log_probs"):
            upstream.per_token_logps(upstream.FusedCausalLMOutput())
        with pytest.raises(RuntimeError, match="smoothing_gap"):
            upstream.smoothing_gap(upstream.FusedCausalLMOutput(), 3)


def test_preference_data_is_prepared_without_a_dpo_trainer(tmp_path):
    owner = SimpleNamespace(_tokenizer=tiny.tokenizer())
    args = DPOConfig(**tiny.training_options(tmp_path))
    prepared = upstream.prepare_preference_dataset(owner, tiny.pairs(3), tiny.tokenizer(), args, "train")
    assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(prepared.column_names)


@pytest.mark.parametrize(
    ("ours", "theirs", "added"),
    [(CWDPOTrainer, DPOTrainer, ["negative_reward_funcs"]), (GentleNegativeSFTTrainer, SFTTrainer, [])],
)
def test_trainers_take_the_arguments_of_their_parents_in_their_order(ours, theirs, added):
    mine, parent = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
    assert list(mine) == [*parent, *added]
    assert {name: mine[name].default for name in parent} == {name: p.default for name, p in parent.items()}
    assert all(mine[name].default is None for name in added)


@pytest.mark.parametrize(
    ("ours", "theirs", "methods"),
    [
        (
            CWDPOTrainer,
            DPOTrainer,
            [
                "_compute_loss",
                "_get_eval_sampler",
                "_get_train_sampler",
                "_precompute_ref_logps",
                "compute_loss",
                "create_accelerator_and_postprocess",
                "get_eval_dataloader",
                "log",
            ],
        ),
        (
            GentleNegativeSFTTrainer,
            SFTTrainer,
            ["_prepare_dataset", "_set_signature_columns_if_needed", "get_batch_samples", "compute_loss"],
        ),
    ],
)
def test_overridden_methods_keep_their_signature(ours, theirs, methods):
    for method in methods:
        mine, parent = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, theirs))
        assert list(mine) == list(parent), f"{theirs.__name__}.{method} has changed"


@pytest.mark.parametrize("name", ["org/model", "org/model/", "folder/model"])
def test_default_configuration_is_named_after_the_model(name):
    config = upstream.resolve_config(lambda output_dir: output_dir, None, name, "CWDPO")
    assert config == "model-CWDPO"


def test_configuration_of_another_class_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `CWDPOConfig`, got a `DPOConfig`"):
        upstream.resolve_config(CWDPOConfig, DPOConfig(**tiny.training_options(tmp_path)), "model", "CWDPO")


class TestAccelerateConfigs:
    @pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "fsdp1", "fsdp2", "multi_gpu", "single_gpu"])
    def test_names_become_files(self, name):
        option, file = upstream.accelerate_config_words(name)
        assert option == "--config_file"
        assert Path(file).is_file()

    def test_a_file_stays_what_it_is(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("num_processes: 2")
        assert upstream.accelerate_config_words(str(file)) == ["--config_file", str(file)]

    def test_anything_else_names_what_there_is(self):
        with pytest.raises(ValueError, match="fsdp1, fsdp2, multi_gpu, single_gpu, zero1, zero2, zero3"):
            upstream.accelerate_config_words("zero9")


class TestScoringForward:
    @pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
    @pytest.mark.parametrize("fused", [False, True])
    def test_head_and_hidden_states_make_the_models_own_logits(self, build, fused):
        torch.manual_seed(0)
        model = build().eval()
        input_ids = torch.randint(3, 32, (2, 7))
        expected = model(input_ids=input_ids).logits.log_softmax(-1)
        if fused:
            add_fused_lm_head(model)
        before = vars(model).get("forward")
        seen = []
        with upstream.scoring_forward(model, lambda hidden, head: seen.append(head.log_probabilities(hidden))):
            assert model(input_ids=input_ids, use_cache=False) == ()
        assert torch.allclose(seen[0], expected, atol=1e-5)
        assert vars(model).get("forward") is before
        assert torch.equal(model(input_ids=input_ids).logits.log_softmax(-1), expected)

    def test_forward_is_restored_after_an_error(self, text_model):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        with pytest.raises(ZeroDivisionError), upstream.scoring_forward(model, lambda *_: 1 / 0):
            model(input_ids=torch.tensor([[5, 6]]))
        assert "forward" not in vars(model)

    def test_copied_head_outlives_the_forward(self, text_model):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        heads = []
        for copy_head in (False, True):
            with upstream.scoring_forward(model, lambda _, head: heads.append(head), copy_head=copy_head):
                model(input_ids=torch.tensor([[5, 6]]))
        own = model.get_output_embeddings().weight
        assert [head.weight.data_ptr() == own.data_ptr() for head in heads] == [True, False]
        assert torch.equal(heads[1].weight, own)


def test_reference_of_a_supervised_trainer_is_the_model_without_its_adapter(text_model, tmp_path):
    data = Dataset.from_list([{"prompt": "is ", "completion": "sky"}] * 4)
    adapter = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    args = SFTConfig(**tiny.training_options(tmp_path))
    trainer = SFTTrainer(text_model, args=args, train_dataset=data, peft_config=adapter)
    inner = upstream.unwrapped(trainer.model)
    assert inner is upstream.inner_model(trainer)
    seen = []
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    with upstream.scoring_forward(inner, lambda hidden, head: seen.append(head.log_probabilities(hidden))):
        upstream.reference_forward(trainer, inputs)
    expected = AutoModelForCausalLM.from_pretrained(text_model)(**inputs).logits.log_softmax(-1)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert not torch.allclose(trainer.model(**inputs).logits.log_softmax(-1), expected, atol=1e-2)
