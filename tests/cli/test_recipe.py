"""Recipes: what may stand in them, what the errors say, and which options each stage gets."""

import re
import sys

import pytest
import yaml

from trl_cwdpo.cli import main
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.pipeline_plan import result_of, stage_options, start_model, steps_of, trainings_of
from trl_cwdpo.cli.pipeline_steps import split_rows
from trl_cwdpo.cli.recipe import RecipeError, builtin_recipes, known_keys, make_recipe, read_recipe

MINIMAL = {"data": {"dataset_name": "my_data"}, "model": {"model_name_or_path": "my_model"}}


def recipe(**sections):
    return make_recipe({**MINIMAL, **sections})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"dta": {}}, "unknown key `dta`; did you mean `data`?"),
        ({"stage2": {"bta": 1}}, "unknown key `stage2.bta`; did you mean `stage2.beta`?"),
        ({"stage2": {"use_peft": True}}, "unknown key `stage2.use_peft`; it belongs into the section `model`."),
        ({"stage1": {"cooling_mode": "gate"}}, "it belongs into the section `stage2`"),
        ({"launch": {"learning_rate": 1}}, "it belongs into the section `stage1`"),
        ({"stage1": {"output_dir": "x"}}, "`stage1.output_dir` cannot be set"),
        ({"stage1": {"seed": 1}}, "the recipe's `seed`"),
        ({"data": {"dataset_name": "x", "dataset_streaming": True}}, "no numbered rows"),
        ({"data": {"dataset_name": "x", "stage1_share": 1.0}}, "`data.stage1_share`=1.0 must lie between 0 and 1"),
        ({"data": {"dataset_name": "x", "held_out": 0}}, "`data.held_out`=0"),
        ({"data": {"dataset_name": "x", "held_out": True}}, "`data.held_out`=True"),
        ({"data": {"dataset_name": "x", "limit": 2}}, "`data.limit`=2"),
        ({"data": {"dataset_name": "x", "stage2": "y"}}, "`data.stage2`='y' must hold the data options"),
        ({"data": {"dataset_name": "x", "stage2": {"dataset_name": "y", "held_out": 3}}}, "`data.stage2.held_out`"),
        ({"data": {"shapes": True, "dataset_name": "x"}}, "exclude each other"),
        ({"data": {"shapes": {"num_trains": 3}}}, "did you mean `data.shapes.num_train`?"),
        ({"data": {}}, "no dataset is given"),
        ({"model": {}}, "no model is given"),
        ({"model": {"model_name_or_path": "m", "lora_handover": "keep"}}, "must be one of merge, continue"),
        ({"evaluation": {"size": 0}}, "`evaluation.size`=0"),
        ({"seed": "a"}, "`seed`='a'"),
        ({"stage1": [1]}, "`stage1` must map options to values"),
    ],
)
def test_what_is_wrong_is_named(raw, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        make_recipe({**MINIMAL, **raw})


def test_sections_have_the_options_of_the_commands():
    assert {"beta", "cooling_mode", "learning_rate"} <= set(known_keys("stage2"))
    assert {"negative_loss_type", "packing"} <= set(known_keys("stage1"))
    assert not {"use_peft", "dataset_name", "cooling_mode"} & set(known_keys("stage1"))
    assert {"columns", "image_folder", "dataset_config", "stage1_share"} <= set(known_keys("data"))
    assert {"lora_r", "load_in_4bit", "attn_implementation", "lora_handover"} <= set(known_keys("model"))
    assert {"accelerate_config", "num_processes", "main_process_ip"} <= set(known_keys("launch"))


def test_reading_needs_neither_torch_nor_trl():
    import subprocess

    code = (
        "import sys; from trl_cwdpo.cli.recipe import read_recipe; read_recipe('shapes'); import trl_cwdpo.cli.run;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overrides_go_before_the_file(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "stage2": {"beta": 0.1, "max_steps": 5}}))
    read = read_recipe(str(file), {"stage2.beta": 0.3, "launch.num_processes": 2, "seed": 7})
    assert read["stage2"] == {"rounds": None, "beta": 0.3, "max_steps": 5}
    assert (read["launch"], read["seed"], read["name"]) == ({"num_processes": 2}, 7, "mine")
    assert str(read.output_dir) == "outputs/mine"
    assert main(["run", str(file), "--stage2.beta", "0.25", "--output_dir", "there", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "beta: 0.25" in shown
    assert "there" in shown
    for words, message in (
        (["--stage2.bta", "1"], "did you mean `stage2.beta`?"),
        (["--beta", "1"], "unknown option '--beta'"),
        (["--stage2.beta"], "--stage2.beta needs a value"),
        (["--stage2.beta", "[1"], "no valid YAML"),
    ):
        assert main(["run", str(file), *words]) == 2
        assert message in capsys.readouterr().err


def test_unknown_recipe_names_the_nearest(capsys):
    assert main(["run", "shape"]) == 2
    assert "did you mean shapes?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a", "a: [", "just words"])
def test_a_file_that_is_no_recipe(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(str(file))):
        read_recipe(str(file))


class TestSteps:
    def test_whole_models(self):
        made = recipe(output_dir="out")
        assert steps_of(made) == ("prepare", "stage1", "stage2", "evaluate")
        assert start_model(made) == "my_model"
        assert result_of(made, "stage1") == "out/stage1"
        split = {"seed": 1, "stage1": [0], "stage2": [1], "held_out": [2]}
        first, second = (stage_options(made, stage, split) for stage in ("stage1", "stage2"))
        assert (first["model_name_or_path"], second["model_name_or_path"]) == ("my_model", "out/stage1")
        assert (first["train_rows"], second["train_rows"]) == ("out/split.json:stage1", "out/split.json:stage2")
        assert first["eval_rows"] == second["eval_rows"] == "out/split.json:held_out"
        assert second["resume_from_checkpoint"] == "auto"
        assert "stage1_share" not in first

    def test_merge_trains_a_new_adapter_on_merged_weights(self):
        made = recipe(model={"model_name_or_path": "m", "use_peft": True, "lora_r": 4}, output_dir="out")
        assert steps_of(made) == ("prepare", "stage1", "merge-stage1", "stage2", "evaluate")
        second = stage_options(made, "stage2", {})
        assert (second["model_name_or_path"], second["use_peft"], second["lora_r"]) == ("out/stage1/merged", True, 4)

    def test_continue_trains_the_adapter_on(self):
        model = {"model_name_or_path": "m", "use_peft": True, "lora_r": 4, "load_in_4bit": True}
        made = recipe(model={**model, "lora_handover": "continue"}, output_dir="out")
        assert "merge-stage1" not in steps_of(made)
        second = stage_options(made, "stage2", {})
        assert (second["model_name_or_path"], second["load_in_4bit"]) == ("out/stage1", True)
        assert not {"use_peft", "lora_r", "lora_handover"} & set(second)
        assert stage_options(made, "stage1", {})["lora_r"] == 4

    def test_held_out_split_and_own_data_of_stage2(self):
        data = {"dataset_name": "a", "held_out": "test", "stage2": {"dataset_name": "b", "columns": "llava"}}
        made = recipe(data=data)
        first, second = (stage_options(made, stage, {"stage2": [1]}) for stage in ("stage1", "stage2"))
        assert (first["dataset_name"], second["dataset_name"], second["columns"]) == ("a", "b", "llava")
        assert first["dataset_test_split"] == second["dataset_test_split"] == "test"
        assert "eval_rows" not in second

    def test_rounds(self):
        made = recipe(stage2={"rounds": 2, "beta": 0.3}, output_dir="out")
        rounds = ("round1-negatives", "round1", "round2-negatives", "round2")
        assert steps_of(made) == ("prepare", "stage1", *rounds, "evaluate")
        first, second = (stage_options(made, name, {"stage2": [1], "held_out": [2]}) for name in ("round1", "round2"))
        assert (first["model_name_or_path"], second["model_name_or_path"]) == ("out/stage1", "out/round1")
        assert (first["dataset_name"], second["dataset_name"]) == ("out/round1-negatives", "out/round2-negatives")
        assert first["beta"] == second["beta"] == 0.3
        assert first["dataset_test_split"] == "test"
        assert not {"rounds", "train_rows", "eval_rows"} & set(first)

    @pytest.mark.parametrize(
        ("stage2", "message"),
        [
            ({"rounds": 0}, "`stage2.rounds`=0 must be a whole number of at least 1"),
            ({"rounds": True}, "`stage2.rounds`=True must be"),
            (
                {"rounds": 2, "negative_selection": "lowest_reward"},
                "`stage2.negative_selection`='lowest_reward' needs",
            ),
            ({"rounds": 2, "on_policy_chosen": True}, "`stage2.on_policy_chosen`=True needs reward functions"),
        ],
    )
    def test_impossible_rounds(self, stage2, message):
        with pytest.raises(RecipeError, match=re.escape(message)):
            recipe(stage2=stage2)

    def test_launch_options_reach_both_stages(self):
        made = recipe(launch={"accelerate_config": "zero3", "num_processes": 8})
        for stage in ("stage1", "stage2"):
            options = stage_options(made, stage, {})
            assert (options["accelerate_config"], options["num_processes"]) == ("zero3", 8)


class TestSplit:
    def test_every_pair_once_and_the_same_each_time(self):
        made = recipe(data={"dataset_name": "a", "held_out": 10})
        split = split_rows(90, made)
        assert split == split_rows(90, made)
        parts = [split[name] for name in ("stage1", "stage2", "held_out")]
        assert [len(part) for part in parts] == [60, 20, 10]
        assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(90))
        assert split_rows(90, recipe(data={"dataset_name": "a", "held_out": 10}, seed=43)) != split

    def test_share_and_limit(self):
        split = split_rows(
            1000, recipe(data={"dataset_name": "a", "held_out": 0.1, "limit": 100, "stage1_share": 0.5})
        )
        assert [len(split[name]) for name in ("stage1", "stage2", "held_out")] == [45, 45, 10]

    def test_separate_data(self):
        made = recipe(data={"dataset_name": "a", "held_out": 4, "stage2": {"dataset_name": "b"}})
        split = split_rows(20, made, other=10)
        assert [len(split[name]) for name in ("stage1", "stage2", "held_out")] == [20, 6, 4]
        assert sorted(split["stage2"] + split["held_out"]) == list(range(10))

    def test_too_few(self):
        with pytest.raises(CommandError, match="leave none for stage"):
            split_rows(3, recipe(data={"dataset_name": "a", "held_out": 3}))


class TestBuiltin:
    @pytest.mark.parametrize("name", builtin_recipes())
    def test_is_valid_and_says_what_it_is(self, name):
        read = read_recipe(name)
        assert read["name"] == name
        assert len(read["description"]) > 20
        for stage in trainings_of(read):
            assert stage_options(read, stage, {})["output_dir"] == f"outputs/{name}/{stage}"

    def test_list_show_and_copy(self, tmp_path, capsys):
        assert main(["recipes"]) == 0
        listed = capsys.readouterr().out
        assert all(name in listed for name in builtin_recipes())
        assert main(["recipes", "shapes"]) == 0
        assert capsys.readouterr().out == builtin_recipes()["shapes"]
        copy = tmp_path / "mine.yaml"
        assert main(["recipes", "shapes", "--copy", str(copy)]) == 0
        assert copy.read_text() == builtin_recipes()["shapes"]
        assert main(["recipes", "shapes", "--copy", str(copy)]) == 1
        assert main(["recipes", "none"]) == 2
