"""The package as users import it: light, with every public name reachable, typed, and with one version."""

import subprocess
import sys
from importlib import resources
from importlib.metadata import version

import pytest

import trl_cwdpo

HEAVY = ("accelerate", "datasets", "numpy", "peft", "torch", "transformers", "trl")
IMPORT = """
import sys
import trl_cwdpo
dir(trl_cwdpo), trl_cwdpo.__version__
print(*sorted(set(sys.modules) & set(sys.argv[1:])))
"""


def test_import_stays_light():
    run = subprocess.run([sys.executable, "-c", IMPORT, *HEAVY], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("name", trl_cwdpo.__all__)
def test_public_name_resolves(name):
    assert getattr(trl_cwdpo, name) is not None
    assert name in dir(trl_cwdpo)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        trl_cwdpo.NoSuchName  # noqa: B018


def test_version_is_the_installed_one():
    assert version("trl-cwdpo") == trl_cwdpo.__version__


def test_type_information_is_shipped():
    assert resources.files("trl_cwdpo").joinpath("py.typed").is_file()
