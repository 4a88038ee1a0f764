"""Malformed configurations end in an error that names the option: from Python, a command line, and YAML."""

import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parent))
import options as malformed
from outcomes import ERROR, time_limit, unreadable

from trl_cwdpo.cli import main
from trl_cwdpo.cli.pipeline import Pipeline
from trl_cwdpo.cli.pipeline_steps import check as check_stages
from trl_cwdpo.cli.recipe import RecipeError, builtin_recipes, read_recipe
from trl_cwdpo.cli.train_options import STAGES, launch_options, training_options
from trl_cwdpo.data_arguments import DataArguments

CPU = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
QUICK, FULL = 1, 6
SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
both_depths = pytest.mark.parametrize(
    "each", [QUICK, pytest.param(FULL, marks=pytest.mark.slow)], ids=["quick", "full"]
)


def examples(strategy, count, *, skip=0, key=lambda case: case.key):
    """The same different examples of a strategy each time; the first ones are simple."""
    found = {}

    @settings(**SETTINGS, max_examples=10 * (count + skip))
    @given(strategy)
    def collect(case):
        if len(found) < count + skip:
            found.setdefault(key(case), case)

    collect()
    return list(found.values())[skip:] or list(found.values())


def test_every_option_of_this_package_is_tried():
    for stage, config in malformed.CONFIGS.items():
        assert set(malformed.OPTIONS[stage]) == malformed.own_options(config)
    assert set(malformed.DATA) == malformed.own_options(DataArguments)


# --- Python ----------------------------------------------------------------------------------------------------------


def verdict(build, name):
    with time_limit():
        try:
            build()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is judged)
            return unreadable(error) or (ERROR if f"`{name}" in str(error) else f"does not name {name}: {error}")
    return "accepted"


def report(what, tally, wrong, capsys):
    with capsys.disabled():
        sys.stdout.write(f"\n{what}: {', '.join(f'{count} {outcome}' for outcome, count in tally.items())}\n")
    assert not wrong, "\n".join(wrong)
    assert set(tally) == {ERROR}


@both_depths
def test_values_from_python(each, capsys):
    tally, wrong = Counter(), []
    for place, (stage, name) in enumerate(malformed.PLAN):
        for bad in examples(malformed.bad_options(stage, name), each, skip=place % 4):
            outcome = verdict(lambda bad=bad: malformed.CONFIGS[bad.stage](**CPU, **{bad.name: bad.value}), name)
            tally[outcome] += 1
            if outcome != ERROR:
                wrong.append(f"{bad.key}: {outcome}")
    report("Malformed options from Python", tally, wrong, capsys)


@pytest.mark.parametrize(("stage", "options", "name"), malformed.CONTRADICTIONS)
def test_contradictions(stage, options, name):
    assert verdict(lambda: malformed.CONFIGS[stage](**CPU, **options), name) == ERROR


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(text_model, tmp_path, capsys):
    """Call a stage's command with some words; its exit code and what it said."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    common = ["--model_name_or_path", text_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    common += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "False", "--report_to", "none"]

    def call(stage, *words):
        with time_limit():
            code = main([stage, *common, "--max_steps", "1", *words])
        return code, capsys.readouterr().err

    return call


def line_verdict(name, code, said):
    if code == 0:
        return "accepted"
    if "Traceback" in said:
        return "a traceback"
    return ERROR if name in said else f"exit code {code} without the name: {said[-300:]}"


def on_a_command_line(bad):
    """A value as somebody would type it, or None where it would be right."""
    if isinstance(bad.value, bool | list | dict | type(None)):
        return None
    text = str(bad.value)
    numeric = not isinstance(bad.value, str)
    # Text is text, and words such as `yes` and `1` are booleans there
    if bad.name in malformed.FREE_TEXT or (numeric and bad.name in ("reference_cache_dir", "probe_families")):
        return None
    return None if text.lower() in ("true", "yes", "1", "0", "auto", "chosen") else text


@both_depths
def test_values_from_a_command_line(each, call, capsys):
    tally, wrong = Counter(), []
    plan = [*malformed.PLAN, *(("data", name) for name in malformed.DATA)]
    for place, (stage, name) in enumerate(plan if each > 1 else plan[::4]):
        strategy = malformed.DATA[name] if stage == "data" else malformed.OPTIONS[stage][name]
        strategy = strategy.map(lambda value, name=name: malformed.BadOption("cwdpo", name, value))
        typed = [(bad, on_a_command_line(bad)) for bad in examples(strategy, 3 * each, skip=place % 4)]
        for bad, text in [pair for pair in typed if pair[1] is not None][:each]:
            code, said = call("sft" if stage == "sft" else "cwdpo", f"--{name}={text}")
            outcome = line_verdict(name, code, said)
            tally[outcome] += 1
            if outcome != ERROR:
                wrong.append(f"{bad.key}: {outcome}")
    report("Malformed command lines", tally, wrong, capsys)


@both_depths
def test_misspelt_names(each, call, capsys):
    known = {*training_options(STAGES["cwdpo"]), *training_options(STAGES["sft"]), *launch_options()}
    tally, wrong = Counter(), []
    for name in examples(malformed.misspelt(malformed.KNOWN), 5 * each, key=str):
        if name in known:
            continue
        code, said = call("cwdpo", f"--{name}", "1")
        outcome = line_verdict(f"unknown option --{name}", code, said)
        tally[outcome] += 1
        if outcome != ERROR:
            wrong.append(f"{name}: {outcome}")
    report("Misspelt options", tally, wrong, capsys)


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_verdict(raw, name, folder, capsys):
    """What `trl-cwdpo run` says of a recipe before it trains: reading it, and checking the options of both stages."""
    file = folder / "recipe.yaml"
    file.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    with time_limit():
        try:
            pipeline = Pipeline(read_recipe(str(file), {"output_dir": str(folder / "run")}))
            pipeline.layout.folder.mkdir(exist_ok=True)
            pipeline._write_stage_options()
            check_stages(pipeline.recipe, pipeline.layout)
        except RecipeError as error:
            return ERROR if name in str(error) else f"does not name {name}: {error}"
        except SystemExit as stop:
            said = capsys.readouterr().err
            return ERROR if stop.code == 2 and name in said else f"does not name {name}: {said}"
        except Exception as error:  # noqa: BLE001 (whatever it is, it is judged)
            return f"{type(error).__name__}: {error}"
    return "accepted"


def with_value(section, name, value):
    raw = yaml.safe_load(builtin_recipes()["shapes"])
    raw.setdefault(section, {})[name] = value
    return raw


def in_yaml(name, value):
    """Whether a value is as wrong in YAML, where numbers may be written as text and null leaves an option out."""
    if value is None or (name in malformed.FREE_TEXT and not isinstance(value, list)):
        return False
    if isinstance(value, str):
        # What a command line's parser reads
        return value.lower() not in ("true", "yes", "")
    return not (isinstance(value, bool | int) and name in ("cooling_mode",))


@both_depths
def test_values_from_recipes(each, tmp_path, capsys):
    tally, wrong = Counter(), []
    for place, (stage, name) in enumerate(malformed.PLAN if each > 1 else malformed.PLAN[::4]):
        found = examples(malformed.bad_options(stage, name), 3 * each, skip=place % 4)
        for bad in [bad for bad in found if in_yaml(name, bad.value)][:each]:
            raw = with_value("stage1" if stage == "sft" else "stage2", name, bad.value)
            outcome = recipe_verdict(raw, name, tmp_path, capsys)
            tally[outcome] += 1
            if outcome != ERROR:
                wrong.append(f"{bad.key}: {outcome}")
    report("Malformed recipes", tally, wrong, capsys)


TEXT = builtin_recipes()["shapes"]
BROKEN_RECIPES = {
    "no mapping": ("- a\n- b\n", "must map sections"),
    "a word": ("shapes\n", "must map sections"),
    "empty": ("", "must map sections"),
    "a tab": ("data:\n\tshapes: true\n", "no valid YAML"),
    "an object": ("data: !!python/object/apply:os.system ['true']\n", "no valid YAML"),
    "a key twice": (f"{TEXT}\nseed: 1\nseed: 2\n", "`seed` twice"),
    "a list for a section": ("data: [1]\nmodel: {shapes: true}\n", "`data`"),
    "a word for a section": ("stage2: fast\ndata: {shapes: true}\n", "`stage2`"),
    "an unknown section": ("stage3: {}\n", "`stage3`"),
    "a key in the wrong section": ("stage1: {beta: 0.1}\n", "`stage1.beta`"),
    "a key of the pipeline": ("stage2: {output_dir: x}\n", "`stage2.output_dir`"),
    "no data": ("model: {shapes: true}\n", "dataset_name"),
    "no model": ("data: {shapes: true}\n", "model_name_or_path"),
    "two datasets": ("data: {shapes: true, dataset_name: x}\nmodel: {shapes: true}\n", "`data.shapes`"),
    "a share above 1": ("data: {shapes: true, stage1_share: 1.5}\nmodel: {shapes: true}\n", "stage1_share"),
    "a share of nothing": ("data: {shapes: true, held_out: 0}\nmodel: {shapes: true}\n", "held_out"),
    "too few rows": ("data: {shapes: true, limit: 1}\nmodel: {shapes: true}\n", "limit"),
    "another handover": ("data: {shapes: true}\nmodel: {shapes: true, lora_handover: x}\n", "lora_handover"),
    "a seed of words": ("seed: abc\ndata: {shapes: true}\nmodel: {shapes: true}\n", "`seed`"),
    "an evaluation of none": (
        "evaluation: {size: 0}\ndata: {shapes: true}\nmodel: {shapes: true}\n",
        "evaluation.size",
    ),
    "a number that is none": ("data: {shapes: true, stage1_share: .nan}\nmodel: {shapes: true}\n", "stage1_share"),
    "infinitely many": ("data: {shapes: true, held_out: .inf}\nmodel: {shapes: true}\n", "held_out"),
    "infinite evaluation": ("evaluation: {size: .nan}\ndata: {shapes: true}\nmodel: {shapes: true}\n", "evaluation"),
    "a number for a name": ("data: {dataset_name: 5}\nmodel: {shapes: true}\n", "dataset_name"),
    "a number for a key": ("data: {5: x, shapes: true}\nmodel: {shapes: true}\n", "data.5"),
    "drawn data of none": ("data: {shapes: {num_train: 0}}\nmodel: {shapes: true}\n", "num_train"),
    "drawn data of words": ("data: {shapes: {num_train: many}}\nmodel: {shapes: true}\n", "num_train"),
    "a model without steps": ("data: {shapes: true}\nmodel: {shapes: {steps: -1}}\n", "steps"),
}


@pytest.mark.parametrize("what", BROKEN_RECIPES)
def test_broken_recipes(what, tmp_path, capsys):
    text, name = BROKEN_RECIPES[what]
    assert recipe_verdict(text, name, tmp_path, capsys) == ERROR


def test_misspelt_keys_of_recipes(tmp_path, capsys):
    names = set(itertools.islice(malformed.OPTIONS["cwdpo"], 12))
    for name in examples(malformed.misspelt(names), 8, key=str):
        if name not in training_options(STAGES["cwdpo"]):
            assert recipe_verdict(with_value("stage2", name, 1), f"`stage2.{name}`", tmp_path, capsys) == ERROR


@pytest.mark.parametrize("content", [b"data: \xe9\n", b"\xff\xfe\x00", b"\x00\x01"])
def test_a_recipe_that_is_no_text(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is no"):
        read_recipe(str(file))


@pytest.mark.slow
def test_the_command_says_it_too(tmp_path, capfd):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(with_value("stage2", "cooling_constant", 7)))
    assert main(["run", str(file), "--output_dir", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert "`cooling_constant` must lie in [0, 1], got 7" in said
    assert "Traceback" not in said
