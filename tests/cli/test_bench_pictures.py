"""The task of real pictures, with drawn ones and a tiny model: ranking, alignment, a run with LoRA in both stages."""

import json

import numpy as np
import picture_stand_ins as stand_ins
import pytest
import torch
from transformers import AutoModelForImageTextToText

from trl_cwdpo.benchmarks.matrix import Base, Data, MatrixError, parse_matrix
from trl_cwdpo.cli import main
from trl_cwdpo.cli.bench_alignment import align, name_inputs
from trl_cwdpo.cli.bench_pictures import Choice, RealPictures, choice_measures, score_names
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.upstream.models import load_processor

MATRIX = """
task: real-pictures
base: {steps: 1, scenes: 8}
data: {stage1_pairs: 4, stage2_pairs: 4, validation: 2, test: 3}
stage1: {steps: 2, batch_size: 2}
stage2: {steps: 2, batch_size: 2}
lora: {r: 2, target_modules: [q_proj, linear_1]}
selection_seeds: []
seeds: [10]
grid: {learning_rate: [1e-3], beta: [0.1]}
curve_points: 0
methods:
  dpo: {}
  sft: {stage1: skip}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder as the script leaves it."""
    folder = tmp_path_factory.mktemp("cache")
    build = stand_ins.script("real_pictures_data").build_dataset
    target = folder / "real-pictures"
    build(*stand_ins.archives(folder), target / "pictures", side=stand_ins.SIDE)
    stand_ins.save_model(target / "model")
    return folder


@pytest.fixture(scope="module")
def loaded(cache):
    folder = cache / "real-pictures" / "model"
    return AutoModelForImageTextToText.from_pretrained(folder), load_processor(str(folder))


def test_names_are_scored_as_one_pass_would(cache, loaded):
    model, processor = loaded
    rows = RealPictures(cache).held_out(Data(validation=1, test=2))["test"]
    names, scores = score_names(model.train(), processor, rows)
    assert model.training
    model.eval()
    for row, few, found in zip(rows, names, scores, strict=True):
        assert few[0] == row["name"]
        for name, score in zip(few, found, strict=True):
            answer = rows.select([0]).map(lambda _, name=name: {"chosen": [{"role": "assistant", "content": name}]})
            inputs, labels = name_inputs(processor, answer, image_tokens=4)
            pixels = processor.image_processor(row["images"], return_tensors="pt")["pixel_values"]
            logps = model(**inputs, pixel_values=pixels).logits[:, :-1].log_softmax(-1)
            kept = labels[:, 1:] != -100
            expected = logps[kept].gather(1, labels[:, 1:][kept].unsqueeze(1)).mean()
            assert score == pytest.approx(float(expected.detach()), abs=1e-5)
            # Noun, colour and the end token
            assert int(kept.sum()) == 3


def test_measures_of_choices_by_hand():
    first = Choice(["a", "b", "c", "d", "e"], np.log([0.6, 0.1, 0.1, 0.1, 0.1]).tolist())
    second = Choice(["v", "w", "x", "y", "z"], np.log([0.2, 0.5, 0.1, 0.1, 0.1]).tolist())
    assert [first, second] == ["a", "w"]
    found = choice_measures([first, second])
    assert found["hard_accuracy"] == 0.75
    assert found["easy_accuracy"] == 1.0
    assert found["choice_ece"] == pytest.approx((0.4 + 0.5) / 2)
    assert found["choice_brier"] == pytest.approx((0.16 + 0.04 + 0.64 + 0.25 + 0.03) / 2)
    assert json.loads(json.dumps([first])) == ["a"]


def test_alignment_changes_the_projector_alone_and_helps(cache):
    folder = cache / "real-pictures" / "model"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(str(folder))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = RealPictures(cache).pictures["train"]
    state = torch.get_rng_state()
    first = align(model, processor, rows, steps=1, seed=0)
    later = align(model, processor, rows, steps=20, seed=0)
    assert later < first
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_pairs_repeat_themselves_and_keep_pictures_apart(cache):
    task, data = RealPictures(cache), Data(stage1_pairs=30, stage2_pairs=10, validation=2, test=3)
    stage1, stage2 = task.training_pairs(data, seed=1)
    assert [len(stage1), len(stage2)] == [30, 10]
    assert task.training_pairs(data, seed=1)[1]["name"] == stage2["name"]
    assert task.training_pairs(data, seed=2)[1]["name"] != stage2["name"]
    held_out = task.held_out(data)
    seen = set(stage1["hexcode"]) | set(stage2["hexcode"])
    assert not seen & {code for rows in held_out.values() for code in rows["hexcode"]}
    hard = task.training_pairs(Data(stage1_pairs=5, stage2_pairs=5, grade_mix={"hard": 1.0}), seed=1)
    assert set(hard[0]["grade"]) == {"hard"}
    assert task.reward(["Red apple", "red"], name=["red apple", "red apple"]) == [1.0, 0.0]
    with pytest.raises(CommandError, match="grades hard and easy"):
        task.training_pairs(Data(grade_mix={"medium": 1.0}), seed=1)
    with pytest.raises(CommandError, match=r"`data.test` is 99"):
        task.held_out(Data(validation=1, test=99))


def test_what_has_not_been_fetched(tmp_path):
    with pytest.raises(CommandError, match=r"python benchmarks/fetch_real_pictures.py --cache"):
        RealPictures(tmp_path).build_base(tmp_path, Base())


def test_a_grid_of_one_setting_needs_no_seeds():
    values = {"grid": {"learning_rate": [1e-4]}, "methods": {"dpo": {}}, "selection_seeds": []}
    assert parse_matrix(values).only_settings() == {("default", "dpo"): (1e-4, 0.1)}
    with pytest.raises(MatrixError, match="several settings to choose from"):
        parse_matrix({**values, "grid": {"learning_rate": [1e-4, 1e-3]}})


def test_a_run_with_lora(cache, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(MATRIX)
    words = ["bench", str(file), "--output_dir", str(tmp_path / "out"), "--cache_dir", str(cache)]
    assert main(words) == 0
    cells = tmp_path / "out/cells/default"
    dpo, sft = (json.loads((cells / f"{name}/lr0.001-beta0.1-seed10.json").read_text()) for name in ("dpo", "sft"))
    for result in (dpo, sft):
        assert result["settings"]["lora"]["r"] == 2
        assert set(result["test"]["scores"]) <= {0.0, 1.0}
        assert 0 <= result["test"]["choice_ece"] <= 1
        assert result["test"]["tv"] > 0
    assert dpo["start"]["test"]["chosen_avg_logp"] != sft["start"]["test"]["chosen_avg_logp"]
    # What stage 2 starts from is a whole model
    starts = list((tmp_path / "out/starts").iterdir())
    assert len(starts) == 2
    assert all((start / "model.safetensors").is_file() for start in starts)
    text = (tmp_path / "out/report.md").read_text()
    assert "ECE of the choice" in text
    assert "which nothing chose" in text
    assert "Learning rate × β" not in text
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.count("(done before)") == 2
