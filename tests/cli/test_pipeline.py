"""`trl-cwdpo run`: the tree it writes, what it skips, what it refuses, adapters between the stages, and kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
import yaml
from datasets import load_dataset
from safetensors.torch import load_file

from trl_cwdpo.cli import main, pipeline, pipeline_steps
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.fingerprints import data_fingerprint, model_fingerprint
from trl_cwdpo.cli.generation_journal import Journal
from trl_cwdpo.cli.pipeline import Pipeline
from trl_cwdpo.cli.recipe import builtin_recipes, make_recipe

STEPS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 1,
}


@pytest.fixture
def in_this_process(monkeypatch):
    """Steps take seconds to start as processes, and do the same in this one."""
    taken = []

    def start(self, step):
        taken.append(step)
        return pipeline_steps.main([step, str(self.layout.folder)])

    monkeypatch.setattr(pipeline.Pipeline, "_start", start)
    # Its pictures are tested where reports are, and take longer than all other steps together
    monkeypatch.setattr("trl_cwdpo.report.page.svg", lambda chart: "<svg/>")
    return taken


@pytest.fixture
def text_data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.pairs(24).to_json(folder / "pairs.jsonl")
    return str(folder)


def raw_recipe(start, dataset, output, **sections):
    values = {
        "output_dir": str(output),
        "data": {"dataset_name": dataset, "held_out": 4},
        "model": {"model_name_or_path": start},
        "stage1": dict(STEPS),
        "stage2": {**STEPS, "cooling_calibration_size": 8},
        "evaluation": {"size": 4, "batch_size": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def run(values, **options):
    return Pipeline(make_recipe(values)).run(**options)


def test_tree_skipping_and_refusals(text_model, text_data, tmp_path, in_this_process, capsys):
    values = raw_recipe(text_model, text_data, tmp_path / "out")
    assert run(values) == 0
    out = tmp_path / "out"
    names = ("config.yaml", "split.json", "stage1", "stage2", "evaluation.json", "run.json", "stage1.yaml")
    assert all((out / name).exists() for name in names)
    assert in_this_process == ["check", "prepare", "stage1", "stage2", "evaluate", "report"]
    page = (out / "report.html").read_text()
    assert "Stage 1: supervised finetuning" in page
    assert "Stage 2: preference optimization" in page
    assert "stage1-gradient-norm" in page
    split = json.loads((out / "split.json").read_text())
    assert [len(split[name]) for name in ("stage1", "stage2", "held_out")] == [15, 5, 4]
    probes = [json.loads(line) for line in (out / "probes.jsonl").read_text().splitlines()]
    steps = [(probe["stage"], probe["step"], probe["num_rows"]) for probe in probes]
    assert steps == [("stage1", 0, 4), ("stage1", 2, 4), ("stage2", 0, 4), ("stage2", 2, 4)]
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["reference"] == "stage1"
    first, second = (evaluation["models"][name] for name in ("stage1", "stage2"))
    assert first["tv"] == pytest.approx(0.0, abs=1e-6)
    assert second["tv"] > 1e-5
    # By the loss that stage 2 has trained with: on the same pairs, its last probe has measured the same
    loss = json.loads((out / "stage2" / "run.json").read_text())["pair_loss"]
    logged = next(entry for entry in _history(out / "stage2") if "cooling/floor" in entry)
    assert (loss["beta"], loss["mode"]) == (0.1, "loss")
    assert (loss["floor"], loss["temperature"]) == (logged["cooling/floor"], logged["cooling/temperature"])
    for name in ("weight", "easy_fraction", "saturated_fraction", "loser_share"):
        assert second[name] == pytest.approx(probes[-1][name], abs=1e-4), name
    assert first["weight"] == pytest.approx(probes[-2]["weight"], abs=1e-4)
    assert json.loads((out / "stage1" / "run.json").read_text())["pair_loss"] is None
    record = json.loads((out / "run.json").read_text())
    assert set(record["seconds"]) == {"prepare", "stage1", "stage2", "evaluate"}
    assert record["models"]["stage2"] == model_fingerprint(str(out / "stage2")) != record["models"]["stage1"]
    # stage 2 has started from stage 1: its options say so, and each stage can be repeated by its own file
    assert yaml.safe_load((out / "stage2.yaml").read_text())["model_name_or_path"] == str(out / "stage1")
    assert "Evaluation on held-out pairs" in capsys.readouterr().out

    before = model_fingerprint(str(out / "stage2"))
    in_this_process.clear()
    assert run(values) == 0
    assert in_this_process == ["check", "report"]

    # a result that is gone is made again, the same
    shutil.rmtree(out / "stage2")
    in_this_process.clear()
    assert run(values) == 0
    assert in_this_process == ["check", "stage2", "report"]
    assert model_fingerprint(str(out / "stage2")) == before

    changed = raw_recipe(text_model, text_data, out, stage2={"beta": 0.2})
    with pytest.raises(CommandError, match=r"stage2\.beta: None there, 0\.2 now"):
        run(changed)
    with (tmp_path / "data" / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(tiny.pairs(1, seed=5)[0]) + "\n")
    with pytest.raises(CommandError, match="the data changed since 'data and split' was begun"):
        run(values)
    in_this_process.clear()
    assert run(changed, overwrite=True) == 0
    assert in_this_process == ["check", "prepare", "stage1", "stage2", "evaluate", "report"]


def test_a_run_is_complete_without_a_report(text_model, text_data, tmp_path, in_this_process, capsys, monkeypatch):
    values = raw_recipe(text_model, text_data, tmp_path / "out")
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None if name == "plotly" else True)
    assert run(values) == 0
    assert 'No report.html: plotly missing. Install with: pip install "trl-cwdpo[report]"' in capsys.readouterr().out
    assert not (tmp_path / "out" / "report.html").exists()
    monkeypatch.setattr(pipeline, "find_spec", lambda name: True)
    (tmp_path / "out" / "stage2" / "probes.jsonl").write_text("{}\n{}\n")
    assert run(values) == 0
    assert "The report could not be written; `trl-cwdpo report" in capsys.readouterr().out


def test_foreign_files_are_left_alone(text_model, text_data, tmp_path, in_this_process):
    (tmp_path / "out" / "stage1").mkdir(parents=True)
    (tmp_path / "out" / "config.yaml").write_text("mine: 1")
    with pytest.raises(CommandError, match="which this command did not write"):
        run(raw_recipe(text_model, text_data, tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "config.yaml").read_text() == "mine: 1"
    assert in_this_process == []


def test_wrong_values_are_found_before_anything_is_trained(text_model, text_data, tmp_path, in_this_process, capsys):
    with pytest.raises(SystemExit) as stop:
        run(raw_recipe(text_model, text_data, tmp_path / "out", stage2={"cooling_constant": 3}))
    assert stop.value.code == 2
    assert in_this_process == ["check"]
    assert "cooling_constant" in capsys.readouterr().err


def test_rounds_score_with_the_functions_that_the_recipe_names(text_model, text_data, tmp_path):
    from trl_cwdpo.cli.pipeline_rounds import settings_of

    scored = {"negative_reward_funcs": ["my_rewards:short"], "negative_selection": "lowest_reward"}
    values = raw_recipe(text_model, text_data, tmp_path, stage2={"rounds": 1, "on_policy_chosen": True, **scored})
    settings = settings_of(make_recipe(values), "round1")
    assert (settings.reward_funcs, settings.selection) == (("my_rewards:short",), "lowest_reward")
    assert settings.on_policy_chosen


@pytest.mark.parametrize("handover", ["merge", "continue"])
def test_adapters(handover, text_model, text_data, tmp_path, in_this_process):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "lora_handover": handover}
    out = tmp_path / "out"
    large = {"learning_rate": 0.05}
    assert run(raw_recipe(text_model, text_data, out, model=lora, stage1=large, stage2=large)) == 0
    first = load_file(out / "stage1" / "adapter_model.safetensors")
    second = load_file(out / "stage2" / "adapter_model.safetensors")
    assert set(first) == set(second)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    base = json.loads((out / "stage2" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == (str(out / "stage1" / "merged") if handover == "merge" else text_model)
    models = json.loads((out / "evaluation.json").read_text())["models"]
    assert models["start"]["tv"] > 1e-4
    assert models["stage2"]["tv"] > 1e-4
    # before its first update, stage 2 is its own reference: the loss is ln 2 whatever the adapter
    losses = [entry for entry in _history(out / "stage2") if "loss" in entry]
    assert losses[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize(
    "handover", [None, pytest.param("merge", marks=pytest.mark.slow), pytest.param("continue", marks=pytest.mark.slow)]
)
def test_rounds(handover, text_model, text_data, tmp_path, in_this_process):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "lora_handover": handover}
    out = tmp_path / "out"
    sampling = {"rounds": 2, "negative_max_completion_length": 6, "num_negative_generations": 2}
    values = raw_recipe(
        text_model,
        text_data,
        out,
        model={} if handover is None else lora,
        stage1={"learning_rate": 0.05},
        stage2={**sampling, "learning_rate": 0.05},
    )
    assert run(values) == 0
    merge = (lambda name: [f"merge-{name}"]) if handover == "merge" else lambda name: []
    rounds = ["round1-negatives", "round1", *merge("round1"), "round2-negatives", "round2"]
    expected = ["check", "prepare", "stage1", *merge("stage1"), *rounds, "evaluate", "report"]
    assert in_this_process == expected

    # Each round samples from what the last one has left, for the same pairs, and trains on it
    made = [load_dataset(str(out / f"round{number}-negatives")) for number in (1, 2)]
    assert [len(part) for splits in made for part in splits.values()] == [5, 4, 5, 4]
    first, second = (splits["train"] for splits in made)
    assert first["prompt"] == second["prompt"]
    assert first["rejected"] != second["rejected"]
    assert set(first["source"]) == {"policy"}
    assert made[0]["test"]["rejected"] == made[1]["test"]["rejected"]
    results = ["stage1", "round1", "round2"]
    starts = [yaml.safe_load((out / f"{name}.yaml").read_text())["model_name_or_path"] for name in results]
    end = "/merged" if handover == "merge" else ""
    assert starts == [text_model, f"{out}/stage1{end}", f"{out}/round1{end}"]
    # and starts as its own reference
    for name in ("round1", "round2"):
        losses = [entry["loss"] for entry in _history(out / name) if "loss" in entry]
        assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    models = json.loads((out / "evaluation.json").read_text())["models"]
    assert list(models) == ["start", *results]
    assert len({model["tv"] for model in models.values()}) == 4
    # What only sampling takes is left to that step
    assert "num_negative_generations" not in yaml.safe_load((out / "round1.yaml").read_text())
    assert "out, round 2" in (out / "report.html").read_text()
    stages = [json.loads(line)["stage"] for line in (out / "probes.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == results

    # Done steps are not repeated; one whose result is gone comes out the same
    before = model_fingerprint(str(out / "round2"))
    shutil.rmtree(out / "round2")
    in_this_process.clear()
    assert run(values) == 0
    assert in_this_process == ["check", "round2", "report"]
    assert model_fingerprint(str(out / "round2")) == before
    assert {"round1-negatives", "round1", "round1.yaml", "round2"} <= set(Pipeline(make_recipe(values)).layout.owned)


def test_a_round_goes_on_sampling_where_it_was_stopped(text_model, text_data, tmp_path, in_this_process, monkeypatch):
    sampling = {"rounds": 1, "negative_max_completion_length": 6, "negative_generation_batch_size": 1}
    values = raw_recipe(text_model, text_data, tmp_path / "out", stage2=sampling)
    whole = raw_recipe(text_model, text_data, tmp_path / "whole", stage2=sampling)
    add, added = Journal.add, []

    def until_it_is_stopped(self, entries):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.extend(entries)
        add(self, entries)

    monkeypatch.setattr(Journal, "add", until_it_is_stopped)
    assert run(values) == 130
    monkeypatch.setattr(Journal, "add", lambda self, entries: (added.extend(entries), add(self, entries)))
    assert run(values) == 0
    assert sorted(entry["row"] for entry in added) == list(range(5))
    assert run(whole) == 0
    names = ("prompt", "chosen", "rejected")
    found, expected = (
        load_dataset(str(tmp_path / name / "round1-negatives"), split="train").select_columns(names).to_list()
        for name in ("out", "whole")
    )
    assert found == expected


def _history(folder):
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def _swapped(name, text_model, vision_model, data, output):
    values = yaml.safe_load(builtin_recipes()[name])
    vision = "text" not in name
    values["output_dir"] = str(output)
    values["data"] = {**values["data"], "dataset_name": data, "held_out": 4, "limit": None, "shapes": None}
    values["model"] |= {"model_name_or_path": str(vision_model) if vision else text_model, "shapes": None}
    values["model"].pop("load_in_4bit", None)  # what its absence changes is tested where bitsandbytes is
    for stage in ("stage1", "stage2"):
        values[stage] |= {**STEPS, "gradient_accumulation_steps": 2}
    values["stage2"]["cooling_calibration_size"] = 4
    values["evaluation"] = {"size": 4, "batch_size": 2}
    values.pop("launch", None)
    return values


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe_trains_a_tiny_model(name, text_model, vision_model, vision_pairs, tmp_path, in_this_process):
    if "text" in name:
        tiny.pairs(24).to_json(tmp_path / "pairs.jsonl")
        data = str(tmp_path / "pairs.jsonl")
    else:
        data = str(tmp_path / "data")
        vision_pairs.save_to_disk(data)
    assert run(_swapped(name, text_model, vision_model, data, tmp_path / "out")) == 0
    models = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    _, *trainings = models
    for training in trainings:
        assert [entry["step"] for entry in _history(tmp_path / "out" / training) if "loss" in entry] == [1, 2]
    assert models[trainings[-1]]["tv"] > 0


def test_fingerprints_follow_contents(tmp_path):
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    model.mkdir()
    (data / "a.jsonl").write_text("1")
    (model / "config.json").write_text("{}")
    before = data_fingerprint(str(data)), model_fingerprint(str(model))
    (model / "run.json").write_text("{}")
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "config.json").write_text("{}")
    assert (data_fingerprint(str(data)), model_fingerprint(str(model))) == before
    (data / "a.jsonl").write_text("2")
    (model / "config.json").write_text("{ }")
    assert data_fingerprint(str(data)) != before[0]
    assert model_fingerprint(str(model)) != before[1]
    assert model_fingerprint("some/name") == "hub:some/name"


KILLED = """\
data:
  shapes: {{num_train: 160, num_test: 40, seed: 0}}
  held_out: test
model:
  shapes: {{steps: 20, num_scenes: 64, seed: 0}}
stage1: &stage
  use_cpu: true
  bf16: false
  gradient_checkpointing: false
  max_length: null
  max_steps: {steps}
  per_device_train_batch_size: 8
  learning_rate: 1.0e-3
  logging_steps: 1
  save_steps: 3
  save_total_limit: 2
stage2: *stage
evaluation: {{size: 40, batch_size: 20}}
"""


def _command(recipe, out):
    return [sys.executable, "-m", "trl_cwdpo", "run", str(recipe), "--output_dir", str(out)]


def _outcome(out):
    weights = {stage: load_file(out / stage / "model.safetensors") for stage in ("stage1", "stage2")}
    losses = {stage: [(e["step"], e["loss"]) for e in _history(out / stage) if "loss" in e] for stage in weights}
    return weights, losses, json.loads((out / "evaluation.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "driver only"])
def test_killed_five_times_ends_as_if_never_killed(whole_group, tmp_path):
    """SIGKILL at five random moments, of everything or of the first process alone, and the same command again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(KILLED.format(steps=30))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    start = time.monotonic()
    subprocess.run(_command(recipe, tmp_path / "whole"), env=environment, check=True, timeout=600, capture_output=True)
    seconds = time.monotonic() - start
    moments = random.Random(3)
    for _ in range(5):
        process = subprocess.Popen(
            _command(recipe, tmp_path / "killed"),
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.1, 0.8) * seconds)
        if process.poll() is None:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(
        _command(recipe, tmp_path / "killed"), env=environment, check=True, timeout=600, capture_output=True
    )
    (weights, losses, evaluation), (again, losses_again, evaluation_again) = map(
        _outcome, (tmp_path / "whole", tmp_path / "killed")
    )
    assert losses == losses_again
    for stage in weights:
        assert all(torch.equal(weights[stage][name], again[stage][name]) for name in weights[stage])
    assert evaluation == evaluation_again


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(pipeline, "PATIENCE", 0.1)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(CommandError, match="Another `trl-cwdpo run`"):
        run(raw_recipe("m", "d", tmp_path / "out"))


def test_help_explains_the_sections(capsys):
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("stage1_share", "lora_handover", "held_out", "accelerate_config", "exit codes")
    )
