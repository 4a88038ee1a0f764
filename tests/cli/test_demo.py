"""The demonstration: what it measures, what it prints, and a run of a few steps from nothing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_cwdpo.cli import main
from trl_cwdpo.cli.demo import COLUMNS, default_cache_dir, run_demo, summary
from trl_cwdpo.cli.demo_metrics import score_responses
from trl_cwdpo.cli.demo_settings import DemoSettings
from trl_cwdpo.shapes.captions import PROMPT

TINY = DemoSettings(
    num_pairs=24,
    stage1_share=0.5,
    num_held_out=9,
    pretraining_steps=4,
    pretraining_scenes=64,
    batch_size=4,
    stage1_steps=2,
    stage2_steps=3,
)
MODELS = ["pretrained", "stage1", "dpo", "cw-dpo"]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """Folders and results of one run."""
    folder = tmp_path_factory.mktemp("demo")
    report = run_demo(TINY, output_dir=folder / "out", cache_dir=folder / "cache")
    return folder, report


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


# --- the run --------------------------------------------------------------------------------------------------------


def test_record_is_complete_and_finite(demo_run):
    folder, report = demo_run
    record = json.loads((folder / "out" / "demo.json").read_text())
    assert record == report
    assert list(record["models"]) == MODELS
    numbers = numbers_in(record)
    assert len(numbers) > 60
    assert all(math.isfinite(number) for number in numbers)
    assert DemoSettings(**record["settings"]) == TINY
    assert record["versions"]["trl"]
    assert set(record["seconds"]) == {"dataset", *MODELS[1:], "pretraining", "evaluation", "total"}
    for scores in record["models"].values():
        assert 0 <= scores["attribute_accuracy"] <= 1
        assert 0 <= scores["ece"] <= 1
        assert scores["chosen_avg_logp"] < 0
        assert scores["num_scenes"] == TINY.num_held_out


def test_both_methods_start_from_the_same_weights(demo_run):
    models = demo_run[1]["models"]
    for name in ("dpo", "cw-dpo"):
        # The policy is its own reference at the first step.
        assert models[name]["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    # The same pairs under the same weights.
    first = [models[name]["training"]["first_logps_chosen"] for name in ("dpo", "cw-dpo")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_training_changes_every_stage(demo_run):
    losses = {name: scores["chosen_avg_logp"] for name, scores in demo_run[1]["models"].items()}
    assert len(set(losses.values())) == len(MODELS)


def test_only_cw_dpo_has_a_cooling_weight(demo_run):
    training = {name: scores["training"] for name, scores in demo_run[1]["models"].items()}
    assert training["pretrained"] is None
    assert [name for name in MODELS[1:] if "mean_cooling_weight" in training[name]] == ["cw-dpo"]
    assert 0 < training["cw-dpo"]["mean_cooling_weight"] < 1


def test_scores_are_those_of_the_saved_model(demo_run):
    folder, report = demo_run
    path = folder / "out" / "cw-dpo"
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    dataset = next((folder / "cache").glob("shapes-*"))
    row = load_dataset(str(dataset), split="test", cache_dir=str(folder / "again"))[0]
    # The same by another way: the model's own loss, over labels that leave the prompt out.
    prompt = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    texts = [
        processor.apply_chat_template([prompt], add_generation_prompt=True, tokenize=False),
        processor.apply_chat_template([prompt, *row["chosen"]], tokenize=False),
    ]
    start, inputs = (
        processor(images=row["images"], text=[text], add_special_tokens=False, return_tensors="pt") for text in texts
    )
    labels = inputs["input_ids"].clone()
    labels[:, : start["input_ids"].shape[1]] = -100
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss.item()
    held_out = load_dataset(str(dataset), split="test", cache_dir=str(folder / "again"))
    scores = score_responses(model, processor, held_out, "chosen", batch_size=4)
    assert scores.avg_logps[0] == pytest.approx(-loss, rel=1e-4)
    assert len(scores.avg_logps) == TINY.num_held_out
    assert len(scores.confidences) == len(scores.correct) > TINY.num_held_out
    assert report["models"]["cw-dpo"]["chosen_avg_logp"] == pytest.approx(scores.avg_logps.mean(), rel=1e-4)


def test_second_run_reuses_the_cache_and_gives_the_same_numbers(demo_run, capsys):
    folder, report = demo_run
    assert report["reused"] == {"dataset": False, "pretraining": False}
    (folder / "out" / "notes.txt").write_text("mine")
    again = run_demo(TINY, output_dir=folder / "out", cache_dir=folder / "cache")
    assert again["reused"] == {"dataset": True, "pretraining": True}
    assert again["models"] == report["models"]
    output = capsys.readouterr().out
    assert output.count("reused from") == 2
    assert "Replacing the results of an earlier demo" in output
    assert (folder / "out" / "notes.txt").read_text() == "mine"


def test_another_seed_is_another_run(demo_run):
    folder, report = demo_run
    other = run_demo(replace(TINY, seed=1), output_dir=folder / "other", cache_dir=folder / "cache")
    assert other["reused"] == {"dataset": False, "pretraining": False}
    assert other["models"]["dpo"]["chosen_avg_logp"] != report["models"]["dpo"]["chosen_avg_logp"]


def test_run_leaves_the_thread_count_alone(demo_run):
    assert torch.get_num_threads() == 1  # what tests/conftest.py sets


def test_summary_says_what_the_numbers_are_worth(demo_run):
    text = summary(demo_run[1])
    for label in ("pretrained", "stage 1", "DPO", "CW-DPO", "one seed", "not which method is better"):
        assert label in text
    header = " ".join(text.splitlines()[:2]).split()
    assert set(header) == set(" ".join(COLUMNS).split())
    assert all(len(line) <= 100 for line in text.splitlines())


def test_summary_shows_warnings_of_the_trainers(demo_run):
    assert "Warning" not in summary({**demo_run[1], "notes": []})
    assert "Warning of the trainers: β is large." in summary({**demo_run[1], "notes": ["β is large."]})


# --- the command ----------------------------------------------------------------------------------------------------


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "trl-cwdpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "trl-cwdpo"


def test_foreign_results_are_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "model.safetensors").write_text("precious")
    assert main(["demo", "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]) == 1
    assert "stage1/model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_unusable_cache_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = main(["demo", "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "file" / "cache")])
    assert code == 1
    assert "--cache_dir" in capsys.readouterr().err


def test_fast_changes_sizes_only():
    fast, full = DemoSettings().shortened(), DemoSettings()
    assert (fast.beta, fast.stage2_learning_rate, fast.seed) == (full.beta, full.stage2_learning_rate, full.seed)
    assert fast.stage2_steps < full.stage2_steps


@pytest.mark.slow
def test_fast_demo_from_nothing(tmp_path, capfd):
    arguments = ["--fast", "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    assert main(["demo", *arguments]) == 0
    output, error = capfd.readouterr()
    # A log file gets headlines and results; nothing else speaks up.
    assert len(output.splitlines()) < 50
    assert error == ""
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert record["models"]["pretrained"]["attribute_accuracy"] > 0.6
