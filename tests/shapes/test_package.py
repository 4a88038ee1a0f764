"""The package itself: light to import, and its list of names is complete."""

import subprocess
import sys

import pytest

from trl_cwdpo import shapes


def test_import_is_light():
    code = (
        "import sys, trl_cwdpo.shapes as s; s.__all__; "
        "heavy = {'torch', 'transformers', 'datasets', 'PIL', 'numpy'} & set(sys.modules); assert not heavy, heavy; "
        "s.Scene, s.judge, s.hard_negative; "
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_resolves():
    assert set(shapes.__all__) == set(shapes._HOMES)
    for name in shapes.__all__:
        assert getattr(shapes, name) is not None
    assert dir(shapes) == sorted(shapes.__all__)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shapes.nothing  # noqa: B018
