"""Every option that the installed TRL adds to `TrainingArguments` has its effect in our trainers, or is refused.

The options are read from TRL, so that a new one fails here until somebody has thought about it: it then gets a case
that shows its effect, or an error of ours that names it. Each case trains with a value that is not the default and
compares with the same run without it.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import DPOConfig, SFTConfig

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer

CPU = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
ADAPTER_WITH_DROPOUT = {"peft_config": LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)}


@dataclass
class Run:
    """What became of a short training run."""

    trainer: Any
    losses: list[float]
    messages: list[str] = field(default_factory=list)

    @property
    def batch(self) -> Mapping[str, torch.Tensor]:
        trainer = self.trainer
        return trainer.data_collator([trainer.train_dataset[index] for index in range(4)])


def differ(run: Run, plain: Run) -> bool:
    return run.losses != plain.losses


@dataclass(frozen=True)
class Case:
    """
    A value of an option that is not the default, and what it does.

    `base` are options that run and comparison share, `works` tells from both whether the option had its effect.
    """

    value: Any
    works: Callable[[Run, Run], bool] = differ
    base: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: str = "text_model"
    conversational: bool = True
    gpu: bool = False


@dataclass(frozen=True)
class Refused:
    """A value that the configuration refuses with an error that names option and value."""

    value: Any


def padded_to_16(run: Run, plain: Run) -> bool:
    return run.batch["input_ids"].size(1) % 16 == 0 != plain.batch["input_ids"].size(1) % 16


def in_bfloat16(run: Run, plain: Run) -> bool:
    return (run.trainer.model.dtype, plain.trainer.model.dtype) == (torch.bfloat16, torch.float32)


def cut_at_8(run: Run, plain: Run) -> bool:
    return run.batch["input_ids"].size(1) <= 8 < plain.batch["input_ids"].size(1)


def has_other_tokens(run: Run, plain: Run) -> bool:
    return not torch.equal(run.batch["input_ids"], plain.batch["input_ids"])


def padded_with_unk(run: Run, plain: Run) -> bool:
    def padding(which: Run) -> set[int]:
        return set(which.batch["input_ids"][which.batch["attention_mask"] == 0].tolist())

    return (padding(run), padding(plain)) == ({1}, {0})


def without_reference_model(run: Run, plain: Run) -> bool:
    return run.trainer.ref_model is None is not plain.trainer.ref_model and run.losses == pytest.approx(plain.losses)


def same_rows_in_other_order(run: Run, plain: Run) -> bool:
    ours, theirs = run.trainer.train_dataset["chosen_ids"], plain.trainer.train_dataset["chosen_ids"]
    return ours != theirs and sorted(ours) == sorted(theirs)


def reference_moved(run: Run, plain: Run) -> bool:
    def moved(which: Run) -> bool:
        start = AutoModelForCausalLM.from_pretrained(which.trainer.model.name_or_path).state_dict()
        return any(not torch.equal(value, start[name]) for name, value in which.trainer.ref_model.state_dict().items())

    return moved(run) and not moved(plain)


def offloads(run: Run, plain: Run) -> bool:
    def context(which: Run) -> str:
        return type(which.trainer.maybe_activation_offload_context).__name__

    return (context(run), context(plain)) == ("OffloadActivations", "nullcontext")


def warned_of(text: str) -> Callable[[Run, Run], bool]:
    return lambda run, plain: any(text in message for message in run.messages) and run.losses == plain.losses


DPO_CASES: dict[str, Case | Refused] = {
    "model_init_kwargs": Case({"dtype": "bfloat16"}, in_bfloat16),
    "router_aux_loss_coef": Case(0.5, model="moe_model"),
    "disable_dropout": Case(value=False, trainer=ADAPTER_WITH_DROPOUT),
    "max_length": Case(8, cut_at_8, conversational=False),
    "truncation_mode": Case("keep_end", has_other_tokens, base={"max_length": 8}, conversational=False),
    # TRL's own answer to it, at present
    "padding_free": Case(value=True, works=warned_of("padding_free")),
    "pad_to_multiple_of": Case(16, padded_to_16),
    "precompute_ref_log_probs": Case(value=True, works=without_reference_model),
    "loss_type": Case("hinge"),
    "loss_weights": Case([0.3, 0.7], base={"loss_type": ["sigmoid", "sft"]}),
    "ld_alpha": Case(0.5),
    "f_divergence_type": Case("js_divergence"),
    "f_alpha_divergence_coef": Case(0.3, base={"f_divergence_type": "alpha_divergence"}),
    "label_smoothing": Case(0.2, base={"loss_type": "robust"}),
    "beta": Case(0.5),
    "use_weighting": Case(value=True),
    "discopop_tau": Case(0.5, base={"loss_type": "discopop"}),
    "activation_offloading": Case(value=True, works=offloads, base={"use_cpu": False}, gpu=True),
    "sync_ref_model": Case(value=True, works=reference_moved, base={"ref_model_sync_steps": 1}),
    "ref_model_mixup_alpha": Case(0.1, base={"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "ref_model_sync_steps": Case(1, base={"sync_ref_model": True}),
    "pad_token": Case("<unk>", padded_with_unk),
}
SFT_CASES: dict[str, Case | Refused] = {
    "model_init_kwargs": Case({"dtype": "bfloat16"}, in_bfloat16),
    "router_aux_loss_coef": Case(0.5, model="moe_model"),
    "dataset_text_field": Refused("body"),
    "dataset_kwargs": Refused({"skip_prepare_dataset": True}),
    "eos_token": Case("<|system|>", has_other_tokens, conversational=False),
    "max_length": Case(8, cut_at_8, conversational=False),
    "truncation_mode": Case("keep_end", has_other_tokens, base={"max_length": 8}, conversational=False),
    "shuffle_dataset": Case(value=True, works=same_rows_in_other_order),
    "packing": Refused(value=True),
    "packing_strategy": Refused("wrapped"),
    "padding_free": Refused(value=True),
    "pad_to_multiple_of": Case(16, padded_to_16),
    "eval_packing": Refused(value=True),
    "completion_only_loss": Refused(value=False),
    "assistant_only_loss": Refused(value=True),
    "loss_type": Case("dft"),
    "activation_offloading": Case(value=True, works=offloads, base={"use_cpu": False}, gpu=True),
    "pad_token": Case("<unk>", padded_with_unk),
}
# Options whose effect needs a set-up of its own: a test below each
DPO_ALONE = {"trust_remote_code", "dataset_num_proc", "precompute_ref_batch_size"}
SFT_ALONE = {"trust_remote_code", "dataset_num_proc", "chat_template_path"}


def added_options(config: type) -> set[str]:
    """Options that a configuration of TRL has and `TrainingArguments` has not."""
    plain = {item.name for item in dataclasses.fields(TrainingArguments)}
    return {item.name for item in dataclasses.fields(config) if item.init} - plain


@pytest.mark.contract
@pytest.mark.parametrize(
    ("config", "cases", "alone"), [(DPOConfig, DPO_CASES, DPO_ALONE), (SFTConfig, SFT_CASES, SFT_ALONE)]
)
def test_every_option_of_the_installed_trl_has_been_thought_about(config, cases, alone):
    added, known = added_options(config), cases.keys() | alone
    assert not added - known, f"new in {config.__name__}: give each a case that shows its effect, or refuse it"
    assert not known - added, f"gone from {config.__name__}: remove their cases"
    assert not cases.keys() & alone


@pytest.mark.contract
@pytest.mark.parametrize(("config", "cases"), [(DPOConfig, DPO_CASES), (SFTConfig, SFT_CASES)])
def test_cases_are_not_the_defaults(config, cases):
    defaults = config(**CPU)
    assert [name for name, case in cases.items() if getattr(defaults, name) == case.value] == []


def train(
    trainer_class: type, config_class: type, model: str, folder: Path, case: Case, caplog: Any, **options: Any
) -> Run:
    data = tiny.pairs(12, conversational=case.conversational)
    steps = {"max_steps": 2, "save_strategy": "no", "share_prefix": False, **case.base, **options}
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_class(
            model=model,
            args=config_class(**tiny.training_options(folder, **steps)),
            train_dataset=data,
            **case.trainer,
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    return Run(trainer, losses, [record.getMessage() for record in caplog.records] + [str(w.message) for w in caught])


PLAIN: dict[str, Run] = {}


def check(
    trainer_class: type, config_class: type, name: str, case: Case, request: Any, tmp_path: Path, **options: Any
) -> None:
    caplog = request.getfixturevalue("caplog")
    arguments = (trainer_class, config_class, request.getfixturevalue(case.model), tmp_path, case, caplog)
    key = str((trainer_class, case.base, case.trainer, case.model, case.conversational, options))
    if key not in PLAIN:
        PLAIN[key] = train(*arguments, **options)
    assert case.works(train(*arguments, **options, **{name: case.value}), PLAIN[key])


def trained(cases: dict[str, Case | Refused]) -> list[Any]:
    return [
        pytest.param(name, case, marks=[pytest.mark.gpu] if case.gpu else [])
        for name, case in cases.items()
        if isinstance(case, Case)
    ]


# With cooling off, `test_equals_dpo.py` compares every number of such runs with those of `DPOTrainer`
@pytest.mark.parametrize("mode", [pytest.param("off", marks=pytest.mark.slow), "loss"])
@pytest.mark.parametrize(("name", "case"), trained(DPO_CASES))
def test_dpo_option_has_its_effect(name, case, mode, request, tmp_path):
    cooling = {"cooling_mode": mode, "cooling_floor": -3.0, "cooling_temperature": 0.5}
    check(CWDPOTrainer, CWDPOConfig, name, case, request, tmp_path, **cooling)


@pytest.mark.parametrize(("name", "case"), trained(SFT_CASES))
def test_sft_option_has_its_effect(name, case, request, tmp_path):
    check(GentleNegativeSFTTrainer, GentleNegativeSFTConfig, name, case, request, tmp_path)


@pytest.mark.parametrize(("name", "case"), [item for item in SFT_CASES.items() if isinstance(item[1], Refused)])
def test_refused_sft_options_are_named(name, case):
    with pytest.raises(ValueError, match=f"`{name}") as caught:
        GentleNegativeSFTConfig(**CPU, **{name: case.value})
    assert str(case.value) in str(caught.value)


BOTH = pytest.mark.parametrize(
    ("trainer_class", "config_class", "options"),
    [
        (CWDPOTrainer, CWDPOConfig, {"cooling_mode": "off"}),
        (CWDPOTrainer, CWDPOConfig, {"cooling_floor": -3.0, "cooling_temperature": 0.5}),
        (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, {}),
    ],
    ids=["cooling off", "cooling on", "sft"],
)


@BOTH
def test_dataset_num_proc_reaches_the_tokenization(
    trainer_class, config_class, options, text_model, tmp_path, caplog, monkeypatch
):
    processes = []
    plain_map = Dataset.map

    def watched_map(self: Dataset, *args: Any, num_proc: int | None = None, **kwargs: Any) -> Dataset:
        processes.append(num_proc)
        return plain_map(self, *args, **kwargs)  # in this process: the number is what counts, not the time

    monkeypatch.setattr(Dataset, "map", watched_map)
    train(trainer_class, config_class, text_model, tmp_path, Case(2), caplog, dataset_num_proc=2, **options)
    assert 2 in processes


@BOTH
def test_trust_remote_code_loads_the_code_of_the_model(
    trainer_class, config_class, options, text_model, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(text_model)
    folder = tmp_path / "model"
    tiny.tokenizer().save_pretrained(folder)
    (folder / "modeling_foreign.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class ForeignConfig(LlamaConfig):\n    model_type = 'foreign'\n\n\n"
        "class ForeignForCausalLM(LlamaForCausalLM):\n    config_class = ForeignConfig\n"
    )
    model.config.auto_map = {
        "AutoConfig": "modeling_foreign.ForeignConfig",
        "AutoModelForCausalLM": "modeling_foreign.ForeignForCausalLM",
    }
    model.save_pretrained(folder)
    config = folder / "config.json"
    text = config.read_text().replace('"llama"', '"foreign"').replace('"LlamaForCausalLM"', '"ForeignForCausalLM"')
    config.write_text(text)
    arguments = (trainer_class, config_class, str(folder), tmp_path, Case(value=True), caplog)
    with pytest.raises(ValueError, match="trust_remote_code"):
        train(*arguments, **options)
    assert type(train(*arguments, trust_remote_code=True, **options).trainer.model).__name__ == "ForeignForCausalLM"


@pytest.mark.parametrize("mode", ["off", "constant"])
def test_precompute_ref_batch_size_reaches_the_computation(text_model, tmp_path, caplog, monkeypatch, mode):
    sizes = []
    compute = CWDPOTrainer.compute_ref_log_probs

    def watched(self: CWDPOTrainer, model: Any, inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]) // 2)
        return compute(self, model, inputs)

    monkeypatch.setattr(CWDPOTrainer, "compute_ref_log_probs", watched)
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 6, "cooling_mode": mode}
    train(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, Case(6), caplog, **options)
    assert sizes == [6, 6]


def test_chat_template_path_renders_the_pairs(text_model, tmp_path, caplog):
    template = tmp_path / "template.jinja"
    template.write_text(
        tiny.CHAT_TEMPLATE.replace("'<|' + message['role'] + '|> '", "'a <|' + message['role'] + '|> '")
    )
    arguments = (GentleNegativeSFTTrainer, GentleNegativeSFTConfig, text_model, tmp_path, Case(str(template)), caplog)
    plain, run = train(*arguments), train(*arguments, chat_template_path=str(template))
    word = tiny.tokenizer().convert_tokens_to_ids("a")
    assert run.batch["input_ids"][0, 0].item() == word != plain.batch["input_ids"][0, 0].item()
