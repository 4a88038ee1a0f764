"""The examples run, with tiny models in the place of large ones; the option files name options that exist."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import trl
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no examples beside the tests")


def run(*words):
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def pairs(tmp_path):
    tiny.pairs(30).to_json(tmp_path / "pairs.jsonl")
    return tmp_path / "pairs.jsonl"


@pytest.mark.slow
def test_probes_on_trl(text_model, pairs, tmp_path):
    words = f"--model_name_or_path {text_model} --dataset_name {pairs} --output_dir {tmp_path / 'out'} --max_steps 2"
    printed = run(EXAMPLES / "probes_on_trl.py", *words.split(), "--use_cpu", "--bf16", "False", "--report_to", "none")
    assert "Diagnosis: " in printed
    assert len((tmp_path / "out" / "probes.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_custom_judge(text_model, pairs, tmp_path):
    other = tiny.save_text_model(tmp_path / "other", seed=1)
    words = (pairs, "--limit", "6", "--max_new_tokens", "8")
    printed = run(EXAMPLES / "custom_judge.py", text_model, other, *words)
    assert "wins" in printed
    assert "6 prompts" in printed
    itself = run(EXAMPLES / "custom_judge.py", text_model, text_model, *words)
    assert "wins 50.0% [50.0%, 50.0%]" in itself


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_option_files(file, tmp_path):
    from trl_cwdpo.cli.command_line import read_command_line
    from trl_cwdpo.cli.train_arguments import parse
    from trl_cwdpo.cli.train_options import STAGES

    # What only another machine has; everything else is read and checked as it stands
    elsewhere = {"load_in_4bit", "use_vllm", "bf16"}
    options = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name not in elsewhere}
    here = tmp_path / file.name
    here.write_text(yaml.safe_dump({**options, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path / "out")}))
    arguments = parse(STAGES["cwdpo"], read_command_line(STAGES["cwdpo"], ["--config", str(here)]))
    assert arguments.args.learning_rate == options["learning_rate"]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_examples_stay_short(file):
    assert len(file.read_text().splitlines()) <= 100


def changed_script():
    """TRL's own script after the change that the page on migrating shows."""
    page = (EXAMPLES.parent / "docs" / "migrating.md").read_text()
    (change,) = (block for block in re.findall(r"```diff\n(.*?)```", page, re.DOTALL) if "get_peft_config" in block)
    script = (Path(trl.__file__).parent / "scripts" / "dpo.py").read_text()
    for old, new in re.findall(r"^-(.*\n)((?:^\+.*\n)+)", change, re.MULTILINE):
        assert script.count(old) == 1, f"TRL's script has no line {old!r}: show its change anew in docs/migrating.md"
        script = script.replace(old, re.sub(r"^\+", "", new, flags=re.MULTILINE))
    return script


@pytest.mark.contract
@pytest.mark.skipif(not (EXAMPLES.parent / "docs").is_dir(), reason="no documentation beside the tests")
def test_trls_own_script_is_migrated_as_the_documentation_shows(text_model, tmp_path, monkeypatch):
    (tmp_path / "dpo.py").write_text(changed_script())
    tiny.pairs(8).to_json(tmp_path / "data" / "train.jsonl")
    tiny.pairs(4).to_json(tmp_path / "data" / "test.jsonl")
    words = f"--model_name_or_path {text_model} --dataset_name {tmp_path / 'data'} --output_dir {tmp_path / 'out'}"
    words += " --use_cpu --bf16 False --max_steps 2 --eval_strategy steps --eval_steps 1 --report_to none"
    words += " --logging_steps 1 --save_steps 2 --cooling_mode gate --no_remove_unused_columns"
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words.split()])
    runpy.run_path(str(tmp_path / "dpo.py"), run_name="__main__")
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("cooling/weight" in entry for entry in log)
    assert any("eval_rewards/margins" in entry for entry in log)
    assert (tmp_path / "out" / "model.safetensors").is_file()
