"""Under FSDP2 a fully trained model is resumed exactly, also where some of its weights never get a gradient."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import engines
import resume_scenario

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_model_with_weights_that_get_no_gradient_is_resumed(vision_model, tmp_path):
    models, output = tmp_path / "models", tmp_path / "output"
    models.mkdir()
    output.mkdir()
    (models / "pictures").symlink_to(vision_model)
    engine = engines.ENGINES["fsdp2"]
    process = engines.run(engine, output, resume_scenario.__file__, output, models, "smoothed, pictures")
    files = [output / f"resumed-rank{rank}.json" for rank in range(engine.processes)]
    assert all(file.exists() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    for file in files:
        whole, resumed = json.loads(file.read_text()).values()
        assert whole["identity"]["parameters"] == resumed["identity"]["parameters"] == ["DTensor"]
        assert any("post_layernorm" in name for name in whole["stateless"])
        assert [entry["step"] for entry in whole["log"] if "loss" in entry] == [1, 2, 3, 4]
        # The last entry sums up a call of `train`, over the steps that it has taken itself
        assert resumed["log"][:-1] == whole["log"][:-1]
        assert resumed["weights"] == whole["weights"]
        assert resumed["stateless"] == whole["stateless"]
