"""Every engine trains as one process does: losses, metrics, probes, calibration and weights."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import engines
import parity

pytestmark = pytest.mark.distributed
SHARDED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def train_on(engine, names, models, output):
    process = engines.run(engine, output, parity.__file__, output, models, *names, timeout=1500)
    # Results are read from files: an exit code alone has been seen to lie in both directions
    files = {name: [output / f"{name}-rank{rank}.json" for rank in range(engine.processes)] for name in names}
    missing = [name for name, ranks in files.items() if not all(file.exists() for file in ranks)]
    assert not missing, f"{missing}\n{process.stdout[-3000:]}{process.stderr[-9000:]}"
    return {name: [json.loads(file.read_text()) for file in ranks] for name, ranks in files.items()}


@pytest.fixture(scope="module")
def models(text_model, vision_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "text").symlink_to(text_model)
    (folder / "pictures").symlink_to(vision_model)
    return folder


@pytest.fixture(scope="module")
def one(models, tmp_path_factory):
    """Results of one process, on demand."""
    found = {}

    def result(name):
        if name not in found:
            found[name] = parity.run(name, models, tmp_path_factory.mktemp("one"))
        return found[name]

    return result


@pytest.fixture(scope="module")
def short(models, tmp_path_factory):
    names = (*parity.SHORT, parity.SHORT_SAMPLED)
    return train_on(engines.ENGINES["fsdp2"], names, models, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def several(models, tmp_path_factory):
    """Results of all runs on an engine of several processes, on demand."""
    found = {}

    def results(engine):
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        if engine not in found:
            found[engine] = train_on(engines.ENGINES[engine], parity.RUNS, models, tmp_path_factory.mktemp(engine))
        return found[engine]

    return results


def assert_equal(name, ours, theirs):
    tolerance = parity.TOLERANCE_BF16 if "bf16" in name else parity.TOLERANCE
    assert ours[0]["weights"]
    for rank, result in enumerate(ours):
        if parity.RUNS[name][2].get("share_prefix") is True:
            assert result["shares"] is theirs["shares"] is True
        found = parity.differences(name, result, theirs)
        if rank and "stops" in parity.RUNS[name][1]:
            # What the main process alone is made to see: that all stop by it is shown by everything else
            found = {key: value for key, value in found.items() if not key.endswith("probe/tv")}
        worst = max(found, key=found.get)
        assert found[worst] <= tolerance, f"process {rank}: {worst} differs by {found[worst]:.2e}"


@pytest.mark.parametrize("name", parity.SHORT)
def test_fsdp2_equals_one_process(one, short, name):
    for result in short[name]:
        assert result["identity"]["parameters"] == ["DTensor"]
        assert result["identity"]["world_size"] == 2
    assert_equal(name, short[name], one(name))


def test_fsdp2_samples_responses_that_end_apart(short):
    first, second = short[parity.SHORT_SAMPLED]
    assert first["identity"]["parameters"] == ["DTensor"]
    assert first["log"] == second["log"]
    steps = [entry for entry in first["log"] if "negatives/on_policy_fraction" in entry]
    assert [entry["negatives/on_policy_fraction"] for entry in steps] == [1.0] * parity.STEPS
    # Nothing was cut at the limit, so that each process ended where its own responses did
    assert [entry["negatives/truncated_fraction"] for entry in steps] == [0.0] * parity.STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.RUNS)
@pytest.mark.parametrize("engine", SHARDED)
def test_engine_equals_one_process(one, several, engine, name):
    ours = several(engine)[name]
    for result in ours:
        reference = "adapter" not in name and name.startswith(("cooled", "sampled", "DPO", "off"))
        assert result["identity"] == engines.expected_identity(engines.ENGINES[engine], reference=reference)
    # Of an uneven last batch, accelerate repeats rows: how many depends on the number of processes. And each process
    # samples from random numbers of its own.
    expected = several("ddp")[name][0] if "uneven" in name or name.startswith("sampled") else one(name)
    assert_equal(name, ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_switched_off_equals_dpo_trainer_on_every_engine(several, engine):
    for ours, theirs in zip(several(engine)["off"], several(engine)["DPOTrainer"], strict=True):
        assert ours["weights"] == theirs["weights"]
        for entry, expected in zip(ours["log"], theirs["log"], strict=True):
            assert {key: entry[key] for key in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_training_is_the_same_without_probes_on_every_engine(several, engine):
    for ours, plain in zip(several(engine)["cooled"], several(engine)["cooled, without probes"], strict=True):
        assert [entry["step"] for entry in ours["log"] if "probe/ece" in entry] == [0, 2, 3]
        assert [entry for entry in ours["log"] if "probe/ece" not in entry] == plain["log"]
        assert ours["weights"] == plain["weights"]
