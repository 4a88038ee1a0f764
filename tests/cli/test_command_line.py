"""Options are sorted without importing what declares them, and misspelt ones are named with the nearest."""

import re
import subprocess
import sys

import pytest
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_cwdpo.cli import main
from trl_cwdpo.cli.command_line import read_command_line
from trl_cwdpo.cli.dataclass_sources import MISSING, SourceError, load, options_of
from trl_cwdpo.cli.train_options import STAGES, launch_options, option_groups, training_options
from trl_cwdpo.data_arguments import DataArguments

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]
HEAVY = ("accelerate", "datasets", "numpy", "torch", "transformers", "trl")


def read(argv, name="cwdpo"):
    return read_command_line(STAGES[name], argv)


@pytest.mark.parametrize("name", STAGES)
class TestSources:
    """What is read from the sources is what importing them gives."""

    def parser(self, name):
        stage = STAGES[name]
        return TrlParser(
            (ScriptArguments, stage.load(stage.config), ModelConfig, DatasetMixtureConfig, DataArguments),
            add_help=False,
        )

    def test_flags(self, name):
        expected = {flag for action in self.parser(name)._actions for flag in action.option_strings}
        assert {flag for option in training_options(STAGES[name]).values() for flag in option.flags} == expected

    def test_defaults_and_choices(self, name):
        options = training_options(STAGES[name])
        for action in self.parser(name)._actions:
            option = options[action.dest]
            if not any(flag.startswith("--no_") for flag in action.option_strings):
                default = getattr(action.default, "value", action.default)
                assert option.default == default or default in (None, []), option
                if option.choices:
                    assert [*option.choices] == [*map(str, action.choices)]

    def test_help(self, name):
        options = training_options(STAGES[name])
        for action in self.parser(name)._actions:
            if action.help and "%(" not in action.help:
                expected = " ".join(action.help.replace("%%", "%").split())
                assert options[action.dest].help == expected


def test_launch_options_are_accelerates():
    from accelerate.commands.launch import launch_command_parser

    actions = {flag: action for action in launch_command_parser()._actions for flag in action.option_strings}
    for name, takes_value in launch_options().items():
        if name != "accelerate_config":
            assert (actions[f"--{name}"].nargs != 0) == takes_value, name
    missing = {flag[2:] for flag in actions if flag.startswith("--") and "-" not in flag[2:]} - set(launch_options())
    assert missing == {"help", "config_file", "module", "no_python"}


class TestHelp:
    @pytest.mark.parametrize("name", STAGES)
    def test_groups(self, name, capsys):
        assert main([name, "--help"]) == 0
        output = capsys.readouterr().out
        stage = STAGES[name]
        titles = [f"\n{title}:\n" for title in (stage.adds, "data", "model", "PEFT", "quantization")]
        titles += [f"\nTRL's {stage.upstream}:\n", "\ntraining (transformers):\n", "\nexit codes:\n"]
        positions = [output.index(title) for title in titles]
        assert positions == sorted(positions)
        for option in training_options(stage).values():
            assert re.search(rf"^  --{option.name}\b", output, re.MULTILINE), option.name

    def test_shows_help_default_and_choices_of_ours(self, capsys):
        main(["cwdpo", "-h"])
        output = " ".join(capsys.readouterr().out.split())
        assert "--cooling_preset {head,tail,paper} Which weights 'auto' aims at." in output
        assert "(default: head)" in output
        assert "--no_cooling_stop_gradient turns it off" in output
        assert "~20% slower" in output

    @pytest.mark.parametrize("arguments", ["cwdpo --help", "sft --help", "cwdpo --cooling_mod off"])
    def test_answers_without_heavy_imports(self, arguments):
        script = (
            "import sys; from trl_cwdpo.cli import main; main(sys.argv[1].split()); "
            "print('loaded', *sorted(set(sys.modules) & set(sys.argv[2:])))"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, arguments, *HEAVY], capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines()[-1] == "loaded"


class TestSorting:
    def test_training_and_launching(self):
        line = read(
            [
                *("--num_processes", "2", *NEEDED, "--multi_gpu", "--lora_target_modules", "q", "v", "--beta=-1"),
                *("--accelerate_config=zero2", "--main-process-port", "0", "--gradient_accumulation_steps", "2"),
            ]
        )
        assert line.launch == (
            *("--num_processes", "2", "--multi_gpu"),
            *("--accelerate_config", "zero2", "--main_process_port", "0"),
        )
        assert line.training == (
            *NEEDED,
            *("--lora_target_modules", "q", "v", "--beta=-1", "--gradient_accumulation_steps", "2"),
        )
        assert line.words == line.training

    def test_negative_numbers_are_values(self):
        assert read([*NEEDED, "--cooling_floor", "-3.5"]).training[-2:] == ("--cooling_floor", "-3.5")

    def test_yaml(self, tmp_path):
        file = tmp_path / "a.yaml"
        file.write_text(
            "env: {A_VARIABLE: 1}\nmodel_name_or_path: m\ndatasets: [{path: p}]\ncooling_mode: off\n"
            "num_processes: 2\nmulti_gpu: true\nuse_fsdp: false\naccelerate_config: zero1\n"
        )
        line = read(["--config", str(file), "--accelerate_config", "zero3"])
        assert line.config == {"model_name_or_path": "m", "datasets": [{"path": "p"}], "cooling_mode": False}
        assert line.environment == {"A_VARIABLE": "1"}
        assert line.words == ("--config", str(file))
        # The command line comes last, and the last one counts
        assert line.launch[-2:] == ("--accelerate_config", "zero3")
        assert "--multi_gpu" in line.launch
        assert "--use_fsdp" not in line.launch

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--cooling_mod", "off"], "unknown option --cooling_mod; did you mean --cooling_mode?"),
            (["--cooling-flor=1"], "unknown option --cooling-flor; did you mean --cooling_floor?"),
            (["--learning_rat", "1"], "did you mean --learning_rate?"),
            (["--num_proceses", "2"], "did you mean --num_processes?"),
            (["--cofig", "a.yaml"], "did you mean --config?"),
            (["--xyzzy"], "unknown option --xyzzy; `--help` lists them all."),
            (["-x"], "unknown option -x"),
            (["--num_processes"], "--num_processes needs a value"),
            (["--config"], "--config needs a value"),
            (["--config", "no.yaml"], "--config no.yaml cannot be read"),
        ],
    )
    def test_wrong_usage(self, words, expected, capsys):
        assert main(["cwdpo", *NEEDED, *words]) == 2
        assert expected in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cooling_flor: 1", "unknown key 'cooling_flor' in {file}; did you mean cooling_floor?"),
            ("numprocesses: 1", "did you mean num_processes?"),
            ("- a", "must map options to values"),
            ("a: [", "is no valid YAML"),
            ("env: 3", "`env` in {file} must map"),
        ],
    )
    def test_wrong_yaml(self, text, expected, tmp_path, capsys):
        file = tmp_path / "a.yaml"
        file.write_text(text)
        assert main(["cwdpo", *NEEDED, "--config", str(file)]) == 2
        assert expected.format(file=file) in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "expected"), [(NEEDED[2:], "--model_name_or_path"), (NEEDED[:2], "--dataset_name")]
    )
    def test_model_and_data_are_needed(self, words, expected, capsys):
        assert main(["sft", *words]) == 2
        assert expected in capsys.readouterr().err


class TestReadingOfSources:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A package with what the real ones do: names from elsewhere, for type checkers only, and computed parts."""
        folder = tmp_path / "somewhere"
        folder.mkdir()
        (folder / "__init__.py").write_text("if False:\n    from .options import Child\n")
        (folder / "bases.py").write_text(
            "from dataclasses import dataclass\nSIZES = ('s', 'm')\n@dataclass\nclass Base:\n"
            "    a: int = 1\n    b: bool = field(default=True, metadata={'help': 'b ' + '50%%'})\n    _c: int = 0\n"
        )
        (folder / "options.py").write_text(
            "from .bases import Base as Parent, SIZES\nclass Child(Parent):\n"
            "    a: int = field(default=compute(), metadata={'help': f'{x} of a'})\n"
            "    d: str = field(metadata={'choices': list(SIZES), 'aliases': ['--dd']})\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        load.cache_clear()
        yield "somewhere"
        load.cache_clear()

    def test_follows_names(self, package):
        options = options_of(package, "Child")
        assert list(options) == ["a", "b", "d"]
        assert options["a"].default == "compute()"
        assert options["a"].help == "of a"
        assert options["a"].declared_in == "somewhere.bases"
        assert options["b"].help == "b 50%"
        assert set(options["b"].flags) == {"--b", "--no_b", "--no-b"}
        assert options["d"].default is MISSING
        assert options["d"].choices == ("s", "m")
        assert options["d"].flags == ("--d", "--dd")

    @pytest.mark.parametrize(("module", "name"), [("somewhere", "Other"), ("somewhere.no", "A"), ("no_package", "A")])
    def test_names_what_cannot_be_found(self, module, name, package):
        with pytest.raises(SourceError):
            options_of(module, name)


def test_every_option_of_a_group_is_ours_first():
    for stage in STAGES.values():
        first, *_ = option_groups(stage).values()
        assert first
        assert all(option.declared_in.startswith("trl_cwdpo.") for option in first)
