"""Runs with a reference cache: the losses of runs without one, and no reference."""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, DeltaLogpProbeCallback, reference_cache, upstream
from trl_cwdpo.reference_store import ReferenceCacheError

LORA = {"r": 4, "init_lora_weights": False}


def make(model, tmp_path, cache=None, *, data=None, eval_data=None, kwargs=None, **options):
    args = CWDPOConfig(
        **tiny.training_options(tmp_path / "out", **options), reference_cache_dir=None if cache is None else str(cache)
    )
    return CWDPOTrainer(
        model() if callable(model) else model,
        args=args,
        train_dataset=tiny.pairs() if data is None else data,
        eval_dataset=eval_data,
        **(kwargs() if kwargs else {}),
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def scored(monkeypatch):
    """How many pairs the reference has been asked for outside of a loss, at each call."""
    calls = []
    original = DPOTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        calls.append(len(inputs["input_ids"]) // 2)
        return original(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)
    return calls


@pytest.fixture
def no_reference_in_the_loss(monkeypatch):
    """Switched on, no loss may run a reference."""

    @contextlib.contextmanager
    def forbid():
        with monkeypatch.context() as patch:
            patch.setattr(upstream, "reference_forward", lambda *_: pytest.fail("the loss ran the reference"))
            yield

    return forbid


def lora(**options):
    return lambda: {"peft_config": LoraConfig(**{**LORA, **options})}


@pytest.fixture
def cases(text_model, vision_model, vision_pairs, tmp_path):
    other = tiny.save_text_model(tmp_path / "other", seed=1)
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(text_model), LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")

    def with_adapter():
        base = AutoModelForCausalLM.from_pretrained(text_model)
        return PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)

    vision = {"model": vision_model, "max_length": None}
    return {
        "text": {"model": text_model},
        "off": {"model": text_model, "cooling_mode": "off"},
        "gate, accumulated": {
            "model": text_model,
            "cooling_mode": "gate",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        "ld_alpha": {"model": text_model, "ld_alpha": 0.5},
        "truncated": {"model": text_model, "max_length": 8, "data": lambda: tiny.pairs(conversational=False)},
        "loaded": {"model": lambda: AutoModelForCausalLM.from_pretrained(text_model)},
        "adapter": {"model": text_model, "kwargs": lora()},
        "adapter, off": {"model": text_model, "kwargs": lora(), "cooling_mode": "off"},
        "frozen copy of an adapter": {"model": with_adapter},
        "given reference": {
            "model": text_model,
            "kwargs": lambda: {"ref_model": AutoModelForCausalLM.from_pretrained(other)},
        },
        "adapter and given reference": {
            "model": text_model,
            "kwargs": lambda: {**lora()(), "ref_model": AutoModelForCausalLM.from_pretrained(other)},
        },
        "stream": {"model": text_model, "data": lambda: tiny.pairs().to_iterable_dataset()},
        "stream of several epochs": {
            "model": text_model,
            "data": lambda: tiny.pairs(8).to_iterable_dataset().shuffle(seed=1, buffer_size=4),
        },
        "vision": {**vision, "data": lambda: vision_pairs["train"]},
        "vision stream, adapter": {
            **vision,
            "data": lambda: vision_pairs["train"].to_iterable_dataset(),
            "kwargs": lora(target_modules=["q_proj", "v_proj"]),
        },
        "workers": {**vision, "data": lambda: vision_pairs["train"], "dataloader_num_workers": 1},
    }


QUICK = ["text", "off", "ld_alpha", "adapter", "given reference", "stream", "vision stream, adapter"]
CASES = [
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "gate, accumulated",
            "truncated",
            "loaded",
            "adapter, off",
            "frozen copy of an adapter",
            "adapter and given reference",
            "stream of several epochs",
            "vision",
            "workers",
        )
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_without_a_cache(cases, tmp_path, name, scored, no_reference_in_the_loss):
    case = dict(cases[name])
    data, model = case.pop("data", tiny.pairs), case.pop("model")
    expected = losses(make(model, tmp_path, data=data(), **case))
    assert len(set(expected)) == 5
    cache = tmp_path / "cache"
    scored.clear()
    with no_reference_in_the_loss():
        building = make(model, tmp_path, cache, data=data(), **case)
        assert sum(scored) >= 8
        assert building.ref_model is None
        assert losses(building) == pytest.approx(expected, abs=1e-6)
        scored.clear()
        reading = make(model, tmp_path, cache, data=data(), **case)
        # A sample is verified, no more
        assert sum(scored) == 4
        assert losses(reading) == pytest.approx(expected, abs=1e-6)
        assert sum(scored) == 4
    # What the user sees of the options is what the user set
    assert reading.args.precompute_ref_log_probs is False
    assert reading.precompute_ref_logps is False


def test_gradients_are_those_without_a_cache(text_model, tmp_path):
    gradients = []
    for cache in (None, tmp_path / "cache"):
        trainer = make(text_model, tmp_path, cache, cooling_floor=-3.9, cooling_temperature=0.2)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


def test_values_are_bit_for_bit_those_of_the_same_batches(text_model, tmp_path):
    data = tiny.pairs(8).to_iterable_dataset()
    inline = make(text_model, tmp_path, data=data, max_steps=2)
    seen = [inline.compute_ref_log_probs(inline.ref_model, batch) for batch in inline.get_train_dataloader()]
    cached = make(text_model, tmp_path, tmp_path / "cache", data=data, max_steps=2)
    for (chosen, rejected), batch in zip(seen, cached.get_train_dataloader(), strict=True):
        assert torch.equal(batch["ref_chosen_logps"], chosen)
        assert torch.equal(batch["ref_rejected_logps"], rejected)


def test_the_model_is_loaded_once(text_model, tmp_path, monkeypatch):
    import trl.trainer.dpo_trainer as module

    loads = []
    original = module.create_model_from_path
    monkeypatch.setattr(
        module, "create_model_from_path", lambda *args, **kwargs: (loads.append(1), original(*args, **kwargs))[1]
    )
    make(text_model, tmp_path)
    assert len(loads) == 2
    for _ in range(2):
        loads.clear()
        make(text_model, tmp_path, tmp_path / "cache")
        assert len(loads) == 1


def test_evaluation_during_training(text_model, tmp_path, no_reference_in_the_loss):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    evaluations = {"a": tiny.pairs(6, seed=1), "b": tiny.pairs(5, seed=2)}

    def eval_losses(trainer):
        trainer.train()
        return [
            value
            for entry in trainer.state.log_history
            for name, value in entry.items()
            if name in ("eval_a_loss", "eval_b_loss")
        ]

    expected = eval_losses(make(text_model, tmp_path, eval_data=dict(evaluations), **options))
    assert len(expected) == 8
    with no_reference_in_the_loss():
        trainer = make(text_model, tmp_path, tmp_path / "cache", eval_data=dict(evaluations), **options)
        assert eval_losses(trainer) == pytest.approx(expected, abs=1e-6)


def test_a_dataset_that_comes_later(text_model, tmp_path):
    later = tiny.pairs(6, seed=5)
    expected = make(text_model, tmp_path, kwargs=lora())
    expected.train()
    trainer = make(text_model, tmp_path, tmp_path / "cache", kwargs=lora())
    trainer.train()
    # An adapter can still be switched off
    assert trainer.evaluate(later)["eval_loss"] == pytest.approx(expected.evaluate(later)["eval_loss"], abs=1e-6)
    full = make(text_model, tmp_path, tmp_path / "cache")
    before = full.evaluate(tiny.pairs(6, seed=6))
    assert np.isfinite(before["eval_loss"])
    full.train()
    with pytest.raises(ReferenceCacheError, match="Give the dataset to the trainer"):
        full.evaluate(tiny.pairs(6, seed=7))
    # What is known is known
    assert np.isfinite(full.evaluate(tiny.pairs(6, seed=6))["eval_loss"])


def test_resuming_a_run(text_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    cache = tmp_path / "cache"
    expected = losses(make(text_model, tmp_path, cache, **options))
    resumed = make(text_model, tmp_path, cache, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == expected


def test_a_full_run_and_an_adapter_share_their_reference(text_model, tmp_path, scored):
    make(text_model, tmp_path, tmp_path / "cache")
    scored.clear()
    make(text_model, tmp_path, tmp_path / "cache", kwargs=lora())
    assert len(scored) == 1


def test_random_state_and_mode_are_left_alone(text_model, tmp_path):
    states = []
    for cache in (None, tmp_path / "cache"):
        trainer = make(text_model, tmp_path, cache, data=tiny.pairs().to_iterable_dataset())
        states.append((torch.get_rng_state(), np.random.get_state()[1], trainer.model.training))
    assert torch.equal(states[0][0], states[1][0])
    assert (states[0][1] == states[1][1]).all()
    assert states[0][2] == states[1][2]


# --- what changes ----------------------------------------------------------------------------------------------------


def entries(cache):
    return sorted(path.parent.name for path in Path(cache).glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("weights", "weights: "),
        ("template", "chat template: "),
        ("max_length", "max_length: 64 → 32"),
        ("ld_alpha", "ld_alpha: None → 0.5"),
        ("dtype", "dtype: torch.float32 → torch.bfloat16"),
    ],
)
def test_a_change_is_named_and_computed_anew(text_model, tmp_path, scored, caplog, changed, named):
    cache = tmp_path / "cache"
    make(text_model, tmp_path, cache, max_length=64)
    model, kwargs, options = text_model, None, {"max_length": 64}
    if changed == "weights":
        loaded = AutoModelForCausalLM.from_pretrained(text_model)
        with torch.no_grad():
            loaded.lm_head.weight[0, 0] += 1e-3
        loaded.save_pretrained(tmp_path / "changed")
        AutoTokenizer.from_pretrained(text_model).save_pretrained(tmp_path / "changed")
        model = str(tmp_path / "changed")
    elif changed == "template":
        tokenizer = AutoTokenizer.from_pretrained(text_model)
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ ' ' }}", "{{ ' <|system|> ' }}")
        kwargs = lambda: {"processing_class": tokenizer}  # noqa: E731
    elif changed == "dtype":
        options["model_init_kwargs"] = {"dtype": "bfloat16"}
    else:
        options[changed] = {"max_length": 32, "ld_alpha": 0.5}[changed]
    scored.clear()
    with caplog.at_level(logging.WARNING, logger="trl_cwdpo.reference_cache"):
        make(model, tmp_path, cache, kwargs=kwargs, **options)
    assert sum(scored) == 24
    assert len(entries(cache)) == 2
    assert named in caplog.text
    # The old ones stay, for whoever comes back to them
    scored.clear()
    make(text_model, tmp_path, cache, max_length=64)
    assert len(scored) == 1


def test_new_rows_are_added(text_model, tmp_path, scored):
    cache = tmp_path / "cache"
    make(text_model, tmp_path, cache, data=tiny.pairs(24).select(range(10)))
    scored.clear()
    make(text_model, tmp_path, cache, data=tiny.pairs(24).select(range(23, -1, -1)))
    # The other 14, and a sample of the 24 to verify
    assert sum(scored) == 14 + 4
    assert len(entries(cache)) == 1


def test_a_table_and_a_stream_share_their_rows(vision_model, vision_pairs, tmp_path, scored):
    cache = tmp_path / "cache"
    make(vision_model, tmp_path, cache, data=vision_pairs["train"], max_length=None)
    scored.clear()
    make(vision_model, tmp_path, cache, data=vision_pairs["train"].to_iterable_dataset(), max_length=None)
    assert len(scored) == 1


def test_a_stream_is_read_as_far_as_training_goes(text_model, tmp_path, scored):
    make(text_model, tmp_path, tmp_path / "cache", data=tiny.pairs().to_iterable_dataset(), max_steps=2)
    assert sum(scored) == 8


def test_a_killed_build_goes_on_where_it_was(text_model, tmp_path, scored, monkeypatch):
    monkeypatch.setattr(reference_cache, "SECONDS_BETWEEN_WRITES", 0.0)
    original = DPOTrainer.compute_ref_log_probs

    def killed(self, model, inputs):
        if len(scored) == 3:
            raise KeyboardInterrupt
        return original(self, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "compute_ref_log_probs", killed)
        with pytest.raises(KeyboardInterrupt):
            make(text_model, tmp_path, tmp_path / "cache")
    scored.clear()
    trainer = make(text_model, tmp_path, tmp_path / "cache")
    assert sum(scored) == 24 - 3 * 4 + 4
    assert losses(trainer) == pytest.approx(losses(make(text_model, tmp_path)), abs=1e-6)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def parts(cache):
    return sorted(Path(cache).glob("*/*.safetensors"))


def test_a_damaged_file_is_named(text_model, tmp_path):
    cache = tmp_path / "cache"
    make(text_model, tmp_path, cache)
    (path,) = parts(cache)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ReferenceCacheError, match=f"{path.name} is damaged"):
        make(text_model, tmp_path, cache)
    # The way out that the message names
    path.unlink()
    (path.parent / "datasets.json").unlink()
    make(text_model, tmp_path, cache)
    assert len(parts(cache)) == 1


def test_deleting_only_the_part_is_noticed(text_model, tmp_path):
    cache = tmp_path / "cache"
    make(text_model, tmp_path, cache)
    parts(cache)[0].unlink()
    trainer = make(text_model, tmp_path, cache)
    with pytest.raises(ReferenceCacheError, match="a row that was not there when the cache was filled"):
        trainer.train()


@pytest.mark.parametrize("streamed", [False, True])
def test_numbers_of_another_reference_are_found_out(text_model, tmp_path, streamed):
    cache = tmp_path / "cache"
    data = tiny.pairs().to_iterable_dataset() if streamed else tiny.pairs()
    cached = make(text_model, tmp_path, cache, data=data).reference_cache
    table = cached.collator.table
    keys = table.keys.view(np.uint8).reshape(-1, 16)
    for path in parts(cache):
        path.unlink()
    cached.store.write_part("forged", keys, table.logps - 1.0)
    with pytest.raises(ReferenceCacheError, match=r"no longer gives the log-probabilities.*there, .* now.*Delete"):
        make(text_model, tmp_path, cache, data=data)


def test_rows_that_change_when_they_are_read_are_refused(vision_model, vision_pairs, tmp_path):
    generator = np.random.default_rng(0)

    def augmented(batch):
        return {
            **batch,
            "images": [
                [image.rotate(float(generator.uniform(0, 90))) for image in images] for images in batch["images"]
            ],
        }

    data = vision_pairs["train"].select(range(4))
    if "images" not in data.column_names:
        data = data.map(lambda row: {"images": [row["image"]]}, remove_columns="image")
    with pytest.raises(ReferenceCacheError, match="not the same when they are read twice"):
        make(vision_model, tmp_path, tmp_path / "cache", data=data.with_transform(augmented), max_length=None)


def test_a_folder_that_cannot_be_written(text_model, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    make(text_model, tmp_path, cache)

    def refuse(*_, **__):
        raise PermissionError("read-only file system")

    # Root may write anywhere, so that permissions of files would not do
    monkeypatch.setattr("trl_cwdpo.reference_store._write", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    trainer = make(text_model, tmp_path, cache)
    assert len(losses(trainer)) == 5
    with pytest.raises(ReferenceCacheError, match=r"lacks rows that this run needs and cannot be written"):
        make(text_model, tmp_path, cache, data=tiny.pairs(26))
    with pytest.raises(ReferenceCacheError, match=r"cannot be written"):
        make(text_model, tmp_path, tmp_path / "new")


def test_log_probabilities_that_are_not_finite_are_not_stored(text_model, tmp_path):
    def broken():
        model = AutoModelForCausalLM.from_pretrained(text_model)
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        return model

    with pytest.raises(ReferenceCacheError, match="not finite; the chosen response of the first is"):
        make(broken, tmp_path, tmp_path / "cache")
    assert parts(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("option", "value"), [("precompute_ref_log_probs", True), ("sync_ref_model", True), ("reference_cache_dir", "")]
)
def test_options_that_contradict_a_cache(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}"):
        CWDPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, **{"reference_cache_dir": "cache", option: value}
        )


def test_dropout_in_an_adapted_reference_is_refused(text_model, tmp_path):
    options = {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.1}}
    with pytest.raises(ValueError, match="attention_dropout"):
        make(text_model, tmp_path, tmp_path / "cache", kwargs=lora(), **options)
    # That of the adapter is off in the reference, and a reference model is in evaluation mode
    make(text_model, tmp_path, tmp_path / "cache", kwargs=lora(lora_dropout=0.1), disable_dropout=False)
    make(text_model, tmp_path, tmp_path / "cache", **options)


def test_probes_of_a_run_without_a_reference_model(text_model, tmp_path):
    for kwargs, measured in ((None, False), (lora(), True), (None, False)):
        trainer = make(text_model, tmp_path, tmp_path / "cache", kwargs=kwargs, max_steps=1)
        trainer.add_callback(DeltaLogpProbeCallback(trainer, tiny.pairs(4, seed=3), size=4, steps=1))
        trainer.train()
        records = [json.loads(line) for line in (tmp_path / "out" / "probes.jsonl").read_text().splitlines()]
        assert (records[-1]["total_variation"] is not None) == measured


def test_lookup(text_model, tmp_path):
    trainer = make(text_model, tmp_path, tmp_path / "cache")
    rows = [dict(trainer.train_dataset[index]) for index in (3, 5)]
    expected = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator.collator(rows))
    chosen, rejected = trainer.reference_cache.lookup(rows)
    np.testing.assert_allclose(chosen, expected[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(rejected, expected[1].numpy(), atol=1e-5)
    # A fresh negative: its chosen response stays known
    rows[0]["rejected_ids"] = [7, 8, 2]
    fresh_chosen, fresh_rejected = trainer.reference_cache.lookup(rows)
    assert (fresh_chosen == chosen).all()
    assert np.isnan(fresh_rejected).tolist() == [True, False]


def test_the_collators_workers_can_unpickle_it(text_model, tmp_path):
    import pickle

    trainer = make(text_model, tmp_path, tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(trainer.data_collator))
    rows = [trainer.train_dataset[0]]
    assert torch.equal(copy(rows)["ref_chosen_logps"], trainer.data_collator(rows)["ref_chosen_logps"])


def test_datasets_of_another_kind_are_refused(text_model, tmp_path):
    trainer = make(text_model, tmp_path, tmp_path / "cache")
    with pytest.raises(ReferenceCacheError, match="is a list"):
        trainer.reference_cache.cover([1], "eval")
    assert isinstance(trainer.train_dataset, Dataset)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_calibration_takes_batches_of_any_size(batch_size, text_model, tmp_path):
    options = tiny.training_options(tmp_path / "out", max_steps=1, per_device_train_batch_size=batch_size)
    args = CWDPOConfig(**options, reference_cache_dir=str(tmp_path / "cache"), cooling_calibration_size=4)
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs(8))
    trainer.train()
    assert trainer.calibration.sample_size == 4
