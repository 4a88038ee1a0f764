"""The benchmark of a step runs on shapes of a few tokens, and writes its page."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_time.py"


@pytest.fixture
def step_time():
    if not SCRIPT.is_file():
        pytest.skip("not a checkout")
    spec = importlib.util.spec_from_file_location("step_time", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_time"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["step_time"]


@pytest.mark.parametrize(("family", "size", "prompt"), [("text", 12, 12), ("llava", 0, 290), ("qwen2.5-vl", 8, 50)])
def test_batches_are_pairs_with_one_prompt(step_time, family, size, prompt):
    length, batch = step_time.batch_of(family, size, 5, "cpu")
    assert length == prompt
    assert batch["input_ids"].shape == (2, prompt + 5)
    assert batch["completion_mask"].sum(dim=1).tolist() == [5, 5]
    assert (batch["input_ids"][0, :prompt] == batch["input_ids"][1, :prompt]).all()


@pytest.mark.slow
def test_the_page(step_time, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(step_time.GRIDS, "cpu", [(48, 4)])
    page = tmp_path / "results" / "page.md"
    options = ["--families", "text", "--tunings", "full", "--rounds", "1", "--width", "128", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *options, "--output", str(page)])
    step_time.main()
    (row,) = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| text")]
    assert row.startswith("| text | full | 48 | 4 |")
    shares = [float(cell.split("(")[1].split(")")[0]) for cell in row.strip("| ").split(" | ")[5:]]
    assert shares[0] == 1.0, "cooling costs no arithmetic"
    assert shares[1] < 0.6, "48 + 8 tokens instead of 104"
    assert shares[3] < shares[2] <= shares[1]
    assert (tmp_path / "images" / "step_time.png").stat().st_size > 1000
