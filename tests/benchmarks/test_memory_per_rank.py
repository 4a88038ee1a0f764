"""`benchmarks/memory_per_rank.py`: numbers by hand, the tables of the documentation, and what real runs weigh."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
import engines
import memory_scenario

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "memory_per_rank.py"
PAGE = ROOT / "docs" / "scaling.md"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks beside the tests")
RANKS = 2


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("memory_per_rank", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    sys.modules["memory_per_rank"] = found
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("ddp", (4000, 4000, 8000, 4000)),
        ("zero1", (2000, 2000, 3000, 2000)),
        ("zero2", (2000, 500, 3000, 2000)),
        ("zero3", (500, 500, 3000, 500)),
        ("fsdp2", (1000, 1000, 2000, 1000)),
    ],
)
def test_a_thousand_parameters_on_four_processes(engine, expected, module):
    found = module.bytes_per_rank(1000, 4, engine)
    assert (found.weights, found.gradients, found.optimizer, found.reference) == expected
    assert found.total == sum(expected)
    assert module.bytes_per_rank(1000, 4, engine, reference="cache").total == sum(expected[:3])


def test_an_adapter(module):
    found = module.bytes_per_rank(1100, 2, "zero2", trainable=100, reference="adapter")
    assert (found.weights, found.gradients, found.optimizer) == (2 * 100 + 2 * 1000, 100, 600)
    nf4 = {"trainable": 100, "reference": "adapter", "base_bytes": module.NF4, "base_scales": module.NF4_SCALES}
    quantized = module.bytes_per_rank(1100, 2, "ddp", **nf4)
    assert (quantized.weights, quantized.gradients, quantized.optimizer) == (400 + 562.5, 400, 800)
    # Half of the weights, all of the scales
    assert module.bytes_per_rank(1100, 2, "fsdp2", **nf4).weights == 200 + 250 + 62.5


def test_unknown_names_are_refused(module):
    for engine, reference in (("zero4", "model"), ("ddp", "copy")):
        with pytest.raises(ValueError, match="must be one of"):
            module.bytes_per_rank(1, 1, engine, reference=reference)


@pytest.mark.skipif(not PAGE.is_file(), reason="no documentation beside the tests")
def test_the_tables_of_the_documentation_are_what_the_commands_print(module):
    text = PAGE.read_text()
    commands = re.findall(r"memory_per_rank\.py --parameters (\S+) --ranks (\d+) --trainable (\S+)", text)
    assert len(commands) == 2
    for parameters, ranks, trainable in commands:
        assert module.table(float(parameters), int(ranks), float(trainable)) in text


def without_buckets(stage):
    """DeepSpeed's configuration with as little beside weights, gradients and optimizer as it allows."""
    sizes = (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters",
    )
    found = engines.deepspeed_configuration(stage)
    found["zero_optimization"] |= {**dict.fromkeys(sizes, 70_000), "stage3_param_persistence_threshold": 0}
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_what_a_process_holds_is_what_the_formula_says(name, precision, module, tmp_path, monkeypatch, capsys):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    model = tiny.save_text_model(tmp_path / "model", **memory_scenario.SIZES)
    configuration = without_buckets(engines.ENGINES[name].stage)
    monkeypatch.setattr(engines, "deepspeed_configuration", lambda stage: configuration)
    weighed = memory_scenario.parameters_of(model)
    run = engines.run(engines.ENGINES[name], tmp_path, memory_scenario.__file__, model, str(tmp_path), precision)
    expected = module.bytes_per_rank(weighed, RANKS, name, reference="cache", mixed_precision=precision == "bf16")
    # accelerate has FSDP2 reduce and shard gradients after the last batch of a step only; until then they are as the
    # layers computed them
    width = module.BFLOAT16 if precision == "bf16" else module.FLOAT32
    whole_gradients = width * weighed - expected.gradients if name == "fsdp2" else 0.0
    for rank in range(RANKS):
        file = tmp_path / f"rank{rank}.json"
        assert file.is_file(), run.stderr[-3000:]
        found = json.loads(file.read_text())
        assert found["parameters"] == pytest.approx(expected.weights, rel=0.02), rank
        shares = 1 if name == "ddp" else RANKS
        assert found["moments"] == pytest.approx(module.ADAM * weighed / shares, rel=0.02), rank
        assert found["all"] == pytest.approx(expected.total + whole_gradients, rel=0.05), (rank, found)
        held, formula = found["all"] / weighed, (expected.total + whole_gradients) / weighed
        with capsys.disabled():
            sys.stdout.write(f"\n{name}, {precision}: {held:.2f} bytes a parameter, by the formula {formula:.2f}\n")
