"""The dispatcher: it answers at once, names what is wrong, and its exit codes mean something."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from trl_cwdpo import cli
from trl_cwdpo.cli import COMMANDS, Command, main
from trl_cwdpo.cli.errors import CommandError

HEAVY = ("accelerate", "datasets", "numpy", "peft", "torch", "transformers", "trl")
CALL_AND_MEASURE = """
import sys, time
start = time.perf_counter()
from trl_cwdpo.cli import main
code = main(sys.argv[1].split())
print(time.perf_counter() - start, code, *sorted(set(sys.modules) & set(sys.argv[2:])), file=sys.stderr)
"""


@pytest.fixture
def fake_command(monkeypatch):
    """Puts a command into the table that does what it is told, and records its arguments."""
    calls = []

    def install(action):
        def command(argv):
            calls.append(argv)
            return action()

        monkeypatch.setitem(COMMANDS, "fake", Command("a fake", f"{__name__}:command"))
        monkeypatch.setattr(Command, "load", lambda self: command)
        return calls

    return install


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_help_answers_at_once(arguments):
    run = subprocess.run(
        [sys.executable, "-c", CALL_AND_MEASURE, arguments, *HEAVY], capture_output=True, text=True, check=True
    )
    elapsed, code, *loaded = run.stderr.split()
    assert loaded == []
    assert code == "0"
    assert float(elapsed) < 1
    assert "trl-cwdpo" in run.stdout


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in output
        assert command.help.split()[0] in output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    assert callable(COMMANDS[name].load())
    assert main([name, "--help"]) == 0
    assert f"usage: trl-cwdpo {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_option_of_a_command_is_wrong_usage(name, capsys):
    assert main([name, "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "nearest"), [("dmo", "demo"), ("Demo", "demo"), ("envv", "env")])
def test_unknown_command_names_the_nearest(given, nearest, capsys):
    assert main([given, "--fast"]) == 2
    assert f"unknown command '{given}'; did you mean '{nearest}'?" in capsys.readouterr().err


def test_unknown_command_without_a_near_one_lists_all(capsys):
    assert main(["xxxxxx"]) == 2
    assert ", ".join(COMMANDS) in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--no-such-option"], ["--no-such-option", "demo"]])
def test_no_command_is_wrong_usage(argv, capsys):
    assert main(argv) == 2
    assert "usage: trl-cwdpo" in capsys.readouterr().err


def test_arguments_after_the_name_are_the_commands(fake_command):
    calls = fake_command(lambda: 0)
    assert main(["fake", "--help", "x", "--", "--version"]) == 0
    assert calls == [["--help", "x", "--", "--version"]]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_exit_code_is_the_commands(fake_command, code):
    fake_command(lambda: code)
    assert main(["fake"]) == code


def test_mendable_failure_is_one_line(fake_command, capsys):
    fake_command(raising(CommandError("the disk is full.")))
    assert main(["fake"]) == 1
    assert capsys.readouterr().err == "trl-cwdpo: error: the disk is full.\n"


def test_interruption_has_its_own_code(fake_command, capsys):
    fake_command(raising(KeyboardInterrupt()))
    assert main(["fake"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_any_other_error_keeps_its_traceback(fake_command):
    fake_command(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["fake"])


def test_arguments_default_to_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trl-cwdpo", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"trl-cwdpo {cli.__version__}\n"


@pytest.mark.parametrize("module", ["trl_cwdpo", "trl_cwdpo.cli"])
def test_runs_as_a_module(module):
    run = subprocess.run([sys.executable, "-m", module, "evn"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "did you mean 'env'?" in run.stderr
    run = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, f"trl-cwdpo {cli.__version__}\n")


def test_env_names_versions_and_devices(capsys):
    assert main(["env"]) == 0
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("torch", "transformers", "trl", "accelerate", "peft", "datasets"):
        assert lines[name] == version(name)
    assert lines["trl-cwdpo"] == cli.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["platform"]
    assert lines["devices"]


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m trl_cwdpo cwdpo --help | head -n 1"
    shell = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert shell.stdout.startswith("usage: trl-cwdpo cwdpo")
    assert shell.stderr == ""
    assert shell.returncode in {0, 141}, "as a shell counts a closed pipe"
