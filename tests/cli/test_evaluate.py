"""`trl-cwdpo evaluate`: the probes' measurement between any two checkpoints, with errors that say what to do."""

import json
import shutil

import numpy as np
import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from trl_cwdpo.cli import main, model_comparison
from trl_cwdpo.cli.evaluate_run import named_models
from trl_cwdpo.cli.model_comparison import Measure

NAMED = ("m", "--reference", "r", "--dataset", "d")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The text model with other weights."""
    return tiny.save_text_model(tmp_path_factory.mktemp("others") / "tuned", seed=1)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    tiny.pairs(12, seed=7).to_json(file)
    return str(file)


def evaluate(*words):
    return main(["evaluate", *map(str, words)])


def average_logps(path, row, side):
    """ℓ̄ of a response by plain logits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), tiny.tokenizer()
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logps[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))) / (len(whole) - len(prompt))


def test_numbers_are_those_of_plain_logits(text_model, other_model, pairs_file, tmp_path, capsys):
    out = tmp_path / "n.json"
    assert (
        evaluate(other_model, "--reference", text_model, "--dataset_name", pairs_file, "--size", 5, "--json", out) == 0
    )
    found = json.loads(out.read_text())
    assert (found["reference"], found["num_pairs"]) == ("text_model0", 5)
    assert list(found["models"]) == ["text_model0", "tuned"]
    reference, tuned = (found["records"][name] for name in found["models"])
    rows = tiny.pairs(12, seed=7)
    drawn = torch.tensor(tuned["families"]["chosen"]["rows"])
    assert drawn.tolist() == [0, 1, 2, 3, 4]
    from trl_cwdpo.probe_rows import choose_rows

    indices = [row.index for row in choose_rows(rows, tiny.tokenizer(), 5, max_length=1024, seed=42).rows]
    for side in ("chosen", "rejected"):
        ours = tuned["families"][side]["row_avg_logps"]
        plain = [average_logps(other_model, rows[index], side) for index in indices]
        assert ours == pytest.approx(plain, abs=1e-4)
        change = sum(ours) / 5 - sum(reference["families"][side]["row_avg_logps"]) / 5
        assert found["models"]["tuned"]["families"][side]["delta0"]["mean"] == pytest.approx(change, abs=1e-6)
    assert found["models"]["text_model0"]["tv"] == pytest.approx(0.0, abs=1e-6)
    assert found["models"]["tuned"]["tv"] > 0.01
    said = capsys.readouterr().out
    assert "5 held-out pairs; changes and distances from text_model0" in said
    assert f"Numbers: {out}" in said


def test_cooling_weights_and_loser_share(text_model, other_model, pairs_file, tmp_path, capsys):
    words = [other_model, "--reference", text_model, "--dataset_name", pairs_file, "--size", 6]
    loss = ["--beta", 0.5, "--cooling_floor", -4.2, "--cooling_temperature", 0.3]
    assert evaluate(*words, *loss, "--json", tmp_path / "n.json") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "n.json").read_text())
    for name, numbers in found["models"].items():
        rejected = np.array(found["records"][name]["families"]["rejected"]["row_avg_logps"])
        weights = 1 / (1 + np.exp(-(rejected + 4.2) / 0.3))
        assert numbers["weight"] == pytest.approx(weights.mean(), abs=1e-6)
        assert numbers["easy_fraction"] == (weights < 0.1).mean()
        assert 0 < numbers["loser_share"] < 1
        assert f"{numbers['weight']:.2f}" in said
    assert "loser" in said
    # Nothing has moved yet: the sides differ by the weight and by how sure the model is
    assert evaluate(*words, "--cooling_mode", "constant", "--cooling_constant", 0.0, "--json", "-") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [numbers["loser_share"] for numbers in models.values()] == [0.0, 0.0]
    assert evaluate(*words, "--json", "-") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [numbers["loser_share"] for numbers in models.values()] == [None, None]


def test_page(text_model, other_model, pairs_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_cwdpo.report.page.svg", lambda chart: "<svg/>")
    page = tmp_path / "e.html"
    words = [other_model, "--reference", text_model, "--dataset_name", pairs_file, "--size", 6, "--html", page]
    assert evaluate(*words, "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_pairs"] == 6
    assert "Page:" in captured.err
    text = page.read_text()
    assert "Against text_model0" in text
    assert 'data-chart="families"' in text
    assert "Hardest negatives" not in text or "average log-probability" in text
    figures = json.loads(text.split('id="figures">')[1].split("</script>")[0])
    assert figures["families"]["layout"]["xaxis"]["ticktext"][0] == "chosen"
    assert len(figures["families"]["data"][0]["error_y"]["array"]) == 7


def test_adapters(text_model, pairs_file, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(text_model)
    for seed, name in ((0, "a"), (1, "b")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / name)
        model = adapted.unload()
    words = [tmp_path / "a", tmp_path / "b", "--reference", text_model, "--dataset_name", pairs_file]
    assert evaluate(*words, "--json", "-") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert list(models) == ["text_model0", "a", "b"]
    assert models["text_model0"]["tv"] == pytest.approx(0.0, abs=1e-6)
    assert models["a"]["tv"] > 1e-4
    assert models["a"]["tv"] != models["b"]["tv"]


def test_rows_of_a_run(text_model, pairs_file, tmp_path, capsys):
    (tmp_path / "split.json").write_text(json.dumps({"held_out": [1, 4, 9]}))
    rows = f"{tmp_path / 'split.json'}:held_out"
    words = [text_model, "--reference", text_model, "--dataset_name", pairs_file]
    assert evaluate(*words, "--eval_rows", rows) == 0
    assert "3 held-out pairs" in capsys.readouterr().out
    assert evaluate(*words, "--eval_rows", f"{tmp_path / 'split.json'}:other") == 1
    assert "it has 'held_out'" in capsys.readouterr().err


def test_further_measures_are_shown(text_model, pairs_file, monkeypatch, capsys):
    def ask(pairs, processor, settings):
        measured = Measure(lambda model: {"answer": float(len(pairs))}, (("the\nanswer", "answer", "{:.1f}".format),))
        return measured if settings.size == 3 else None

    monkeypatch.setattr(model_comparison, "MEASURES", (ask,))
    words = [text_model, "--reference", text_model, "--dataset_name", pairs_file]
    assert evaluate(*words, "--size", 3) == 0
    said = capsys.readouterr().out
    assert "answer" in said
    assert "3.0" in said
    assert evaluate(*words, "--size", 4) == 0
    assert "answer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl: "),
        (["--split", "validation"], "there is no split 'validation'; choose one of 'train' with --split"),
        (["--columns", '{"prompt": "question"}'], "`columns` maps 'prompt' to 'question'"),
        (["--html", "no/such/folder/e.html"], "name a file in a folder that exists"),
    ],
)
def test_errors(text_model, pairs_file, options, message, capsys):
    words = [text_model, "--reference", text_model, "--dataset_name", pairs_file]
    assert evaluate(*words, *options) == 1
    assert message in capsys.readouterr().err


def test_models_that_do_not_fit(text_model, vision_model, pairs_file, tmp_path, capsys):
    assert evaluate(vision_model, "--reference", text_model, "--dataset_name", pairs_file) == 1
    assert "different tokens" in capsys.readouterr().err
    assert evaluate(tmp_path / "gone", "--reference", text_model, "--dataset_name", pairs_file) == 1
    assert "There is no folder" in (said := capsys.readouterr().err)
    assert "gone" in said
    assert evaluate(text_model, "--reference", tmp_path / "gone", "--dataset_name", pairs_file) == 1
    assert "There is no folder" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    # Before anything is measured, although it comes last
    assert evaluate(text_model, tmp_path / "nothing", "--dataset_name", pairs_file) == 1
    assert "There is no model in the folder" in capsys.readouterr().err


def test_weights_that_cannot_be_loaded(text_model, pairs_file, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(text_model, broken)
    (broken / "model.safetensors").write_bytes(b"not a safetensors file")
    assert evaluate(text_model, broken, "--dataset_name", pairs_file) == 1
    assert f"The model {broken} cannot be loaded" in capsys.readouterr().err


def test_the_first_model_is_the_reference_by_default(text_model, other_model, pairs_file, capsys):
    assert evaluate(other_model, text_model, "--dataset", pairs_file, "--size", 3) == 0
    assert "changes and distances from tuned" in capsys.readouterr().out


def test_a_row_that_cannot_be_tokenized_is_named(text_model, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    tiny.pairs(3, seed=7).remove_columns("prompt").to_json(file)
    assert evaluate(text_model, "--dataset", file) == 1
    assert "Row 0 of the held-out dataset cannot be tokenized" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no MODEL given"),
        (["m", "--reference", "r"], "--dataset_name is missing"),
        (["m", "--reference", "r", "--dataset", "d", "--size", "0"], "--size must be 1 or more, got 0"),
        ([*NAMED, "--beta", "0"], "argument --beta: must be above 0, got 0"),
        ([*NAMED, "--cooling_floor", "nan"], "argument --cooling_floor: must be finite, got nan"),
        ([*NAMED, "--cooling_min_weight", "2"], "argument --cooling_min_weight: must be in [0, 1], got 2"),
        ([*NAMED, "--cooling_floor", "-5"], "--cooling_temperature is missing: --cooling_mode loss needs it"),
        ([*NAMED, "--cooling_mode", "gate"], "--cooling_floor is missing: --cooling_mode gate needs it"),
        (
            [*NAMED, "--cooling_mode", "off", "--cooling_constant", "0.5"],
            "--cooling_constant means nothing with --cooling_mode off",
        ),
    ],
)
def test_wrong_usage(words, message, capsys):
    assert evaluate(*words) == 2
    assert message in capsys.readouterr().err


def test_names():
    assert named_models("a/stage1", ["a/stage2", "b/stage2", "a/stage1"]) == {
        "stage1": "a/stage1",
        "a/stage2": "a/stage2",
        "b/stage2": "b/stage2",
    }
