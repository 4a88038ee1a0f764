"""`trl-cwdpo sft|cwdpo` in this process: from flags and files to a trained model, with the losses of TRL's script."""

import dataclasses
import json
import re

import pytest
import tiny
import torch
import yaml
from huggingface_hub import HfApi, get_token
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser

from trl_cwdpo import probes
from trl_cwdpo.cli import main
from trl_cwdpo.cli.launching import NUM_PROCESSES
from trl_cwdpo.cli.model_card import public_name
from trl_cwdpo.cli.progress import columns_of, summary
from trl_cwdpo.probe_records import read_records

STEP = re.compile(r"^step (\d+)/(\d+)  loss (\S+)  (.*)  lr \S+$", re.MULTILINE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of preference pairs."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [json.dumps(row) for row in tiny.pairs(24)]
    file.write_text("\n".join(rows) + "\n")
    return str(file)


@pytest.fixture
def flags(text_model, data, tmp_path):
    """Options of a run of two steps."""
    options = {
        "model_name_or_path": text_model,
        "dataset_name": data,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "max_steps": "2",
        "per_device_train_batch_size": "4",
        "learning_rate": "5e-3",
        "logging_steps": "1",
        "save_strategy": "no",
        "report_to": "none",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def record(tmp_path):
    return json.loads((tmp_path / "out" / "run.json").read_text())


class TestRuns:
    def test_cwdpo_from_flags(self, flags, tmp_path, capsys):
        assert main(["cwdpo", *flags, "--cooling_mode=gate", "--beta", "0.2"]) == 0
        output = capsys.readouterr().out
        found = STEP.findall(output)
        assert [step[:2] for step in found] == [("1", "2"), ("2", "2")]
        # Nothing has been learnt before the first step: ln 2, no margin, no difference from the reference
        assert found[0][2] == "0.6931"
        assert found[0][3].startswith("margin +0.0000  chosen Δ +0.000  weight 0.")
        assert "24 pairs, 4 a step, on 1 process (cpu)" in output
        assert "Cooling calibrated on 24 rejected responses" in output
        assert re.search(r"first +last +mean", output)
        assert f"Saved in {tmp_path / 'out'}." in output
        assert (tmp_path / "out" / "model.safetensors").is_file()
        written = record(tmp_path)
        assert written["num_processes"] == 1
        assert (written["global_step"], written["stopped_by"]) == (2, None)
        assert (written["options"]["cooling_mode"], written["options"]["beta"]) == ("gate", 0.2)

    def test_sft_from_flags(self, flags, tmp_path, capsys):
        assert main(["sft", *flags, "--negative_loss_type", "hinge"]) == 0
        found = STEP.findall(capsys.readouterr().out)
        assert re.match(r"chosen nll \d\.\d+  rejected nll \d\.\d+", found[0][3])
        assert record(tmp_path)["options"]["negative_loss_type"] == "hinge"

    def test_yaml_with_overrides(self, flags, tmp_path):
        file = tmp_path / "stage.yaml"
        values = dict(zip([f[2:] for f in flags[::2]], flags[1::2], strict=True))
        values |= {"max_steps": 7, "cooling_constant": 0.25, "use_cpu": True, "bf16": False, "seed": 3}
        file.write_text(yaml.safe_dump(values) + "cooling_mode: off\nloss_type: [ipo]\n")
        assert main(["cwdpo", "--config", str(file), "--max_steps", "1", f"--output_dir={tmp_path / 'out'}"]) == 0
        written = record(tmp_path)
        assert written["max_steps"] == 1
        assert written["options"]["cooling_mode"] == "off"
        assert written["options"]["cooling_constant"] == 0.25
        assert written["options"]["loss_type"] == ["ipo"]
        assert written["options"]["seed"] == 3

    def test_lora(self, flags, tmp_path):
        assert main(["cwdpo", *flags, "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]) == 0
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == 2
        assert set(config["target_modules"]) == {"q_proj", "v_proj"}
        assert record(tmp_path)["options"]["lora_r"] == 2

    @pytest.mark.parametrize("command", ["sft", "cwdpo"])
    def test_pictures(self, command, flags, vision_model, vision_pairs, tmp_path):
        vision_pairs.save_to_disk(tmp_path / "pictures")
        picked = ["--model_name_or_path", vision_model, "--dataset_name", str(tmp_path / "pictures")]
        assert main([command, *flags, *picked, "--max_steps", "1", "--max_length", "none"]) == 0
        assert record(tmp_path)["global_step"] == 1

    def test_evaluation_has_its_line_and_column(self, flags, tmp_path, data, capsys):
        evaluated = ["--eval_strategy", "steps", "--eval_steps", "2", "--dataset_test_split", "train"]
        assert main(["cwdpo", *flags, *evaluated]) == 0
        output = capsys.readouterr().out
        assert re.search(r"^eval 2/2  loss 0\.\d{4}  margin [+-]", output, re.MULTILINE)
        assert "last eval" in output
        assert record(tmp_path)["numbers"]["loss"]["eval"] > 0


def test_off_gives_the_losses_of_trls_script(flags, tmp_path, monkeypatch):
    from trl.scripts import dpo

    trainers = []
    original = DPOTrainer.__init__

    def remember(self, *args, **kwargs):
        trainers.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "__init__", remember)
    assert main(["cwdpo", *flags, "--cooling_mode", "off", "--max_steps", "4"]) == 0
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig))
    theirs = [*flags, "--max_steps", "4", "--output_dir", str(tmp_path / "theirs"), "--disable_tqdm", "true"]
    script, args, model, mixture = parser.parse_args_and_config(theirs)
    script.dataset_name, script.dataset_config = "json", None
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": tiny.pairs(24)})
    dpo.main(script, args, model, mixture)
    ours, reference = (
        [(log["loss"], log["grad_norm"], log["rewards/margins"]) for log in trainer.state.log_history if "loss" in log]
        for trainer in trainers
    )
    assert len(ours) == 4
    assert ours == reference
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


class TestFaults:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--packing"], "`packing=True` is not supported by stage 1"),
            (["--lora_r", "many"], "invalid int value: 'many'"),
            (["--negative_loss_type", "harsh"], "invalid choice: 'harsh'"),
            (["--use_peft", "true", "stray"], "'stray' stands where an option should"),
        ],
    )
    def test_wrong_values_are_wrong_usage(self, words, expected, flags, capsys):
        assert main(["sft", *flags, *words]) == 2
        assert expected in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--dataset_train_split", "trian"], "`dataset_train_split`='trian' is no split"),
            (["--dataset_name", "no/such-data"], "no/such-data"),
            (["--model_name_or_path", "no/such-model"], "The model 'no/such-model' cannot be loaded"),
            (["--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
            (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint`=nowhere is no folder"),
        ],
    )
    def test_what_is_not_there_is_named(self, words, expected, flags, capsys):
        assert main(["cwdpo", *flags, *words]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error


def test_fewer_processes_than_asked_for_are_refused(flags, monkeypatch, capsys):
    monkeypatch.setenv(NUM_PROCESSES, "2")
    assert main(["cwdpo", *flags]) == 1
    assert "`num_processes`=2, but accelerate has started 1" in capsys.readouterr().err


class TestModelCard:
    @pytest.fixture
    def pushed(self, flags, monkeypatch, tmp_path):
        """The token with which a run would have uploaded its folder."""
        uploads = []
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: type("Repository", (), {"repo_id": "me/it"}))
        monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: uploads.append(get_token()))
        secret = "hf_" + "x" * 20
        hub = ["--push_to_hub", "--hub_model_id", "me/it", "--hub_token", secret]
        assert main(["cwdpo", *flags, *hub, "--cooling_mode", "constant"]) == 0
        return uploads, secret

    def test_recipe_is_in_what_is_pushed(self, pushed, tmp_path, text_model):
        uploads, secret = pushed
        assert set(uploads) == {secret}
        assert get_token() != secret
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("## Recipe") == 1
        options = yaml.safe_load(re.search(r"```yaml\n(model_name.*?)```", card, re.DOTALL)[1])
        assert options["cooling_mode"] == "constant"
        assert options["learning_rate"] == 5e-3
        assert "| loss | 0.6931 |" in card
        assert "Learning Dynamics of VLM Finetuning" in card
        assert card.index("## Recipe") < card.index("@article{yang2025learning") < card.index("@software{vonwerra")
        # Neither secrets nor where things are on this machine
        for file in ("README.md", "run.json"):
            text = (tmp_path / "out" / file).read_text()
            assert str(tmp_path) not in text
            assert text_model not in text
        for file in (tmp_path / "out").rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file

    def test_public_name(self, tmp_path):
        assert public_name(str(tmp_path / "..")) == ".."
        assert public_name(str(tmp_path)) == tmp_path.name
        assert public_name("org/model") == "org/model"
        assert public_name(None) is None


def test_table_of_what_was_logged():
    args = type("Args", (), {"beta": 0.5})
    history = [
        {"loss": 0.5, "rewards/margins": 1.0, "cooling/margin": 2.0, "rewards/chosen": 1.0, "cooling/weight": 0.25},
        {"eval_loss": 0.75},
        {"loss": 0.25, "rewards/margins": 1.0, "cooling/margin": 4.0, "rewards/chosen": -2.0, "cooling/weight": 0.75},
        {"train_runtime": 1.0},
    ]
    assert summary(history, columns_of("cwdpo", args)).splitlines() == [
        "              first     last     mean  last eval",
        "  --------  -------  -------  -------  ---------",
        "  loss       0.5000   0.2500   0.3750     0.7500",
        "  margin    +2.0000  +4.0000  +3.0000          –",
        # rewards over β: 1 / 0.5 and -2 / 0.5
        "  chosen Δ   +2.000   -4.000   -1.000          –",
        "  weight      0.250    0.750    0.500          –",
    ]
    assert summary([], columns_of("sft", args)) == ""


def test_a_test_split_is_probed_though_nothing_is_evaluated(flags, tmp_path):
    folder = tmp_path / "two_splits"
    folder.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        tiny.pairs(12, seed=seed).to_json(folder / f"{split}.jsonl")
    given = [*flags, "--dataset_name", str(folder), "--probe_families", "chosen", "argmax"]
    assert main(["cwdpo", *given]) == 0
    records = read_records(tmp_path / "out")
    assert [(record.step, record.num_rows) for record in records] == [(0, 12), (2, 12)]
    assert set(records[0].families) == {"chosen", "rejected", "argmax"}
    assert main(["sft", *given, "--output_dir", str(tmp_path / "off"), "--probe_steps", "0"]) == 0
    assert not (tmp_path / "off" / "probes.jsonl").exists()


@pytest.mark.parametrize("restores", [True, False])
def test_a_run_stopped_by_its_probes_says_so(flags, tmp_path, data, monkeypatch, capsys, restores):
    original = probes.measure

    def measure(*args, step, **kwargs):
        return dataclasses.replace(original(*args, step=step, **kwargs), total_variation=0.5 if step > 2 else 0.0)

    monkeypatch.setattr(probes, "measure", measure)
    given = ["--dataset_test_split", "train", "--max_steps", "6", "--probe_steps", "1", "--probe_early_stopping"]
    assert main(["cwdpo", *flags, *given, "--probe_restore_best", str(restores)]) == 3
    assert "Stopping after step 4: drift, 2 probes in a row" in capsys.readouterr().out
    written = record(tmp_path)
    assert (written["global_step"], written["stopped_by"]) == (4, None)
    assert written["stopped_by_rules"][0].startswith("drift, 2 probes in a row")
    best = written["best_checkpoint"]
    saved, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "out" / best))
    assert all(torch.equal(value, kept[name]) for name, value in saved.items()) == restores
