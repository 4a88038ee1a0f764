"""Malformed datasets end in an error that names the row or column, or in a counted skip: both stages, every route."""

import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import rows as malformed
from outcomes import outcome_of

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.checkpoints import fault_of, last_checkpoint

STAGES = {"sft": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig), "cwdpo": (CWDPOTrainer, CWDPOConfig)}
QUICK, FULL = 40, 200
# The same examples each time, and as many different ones as asked for
SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(scope="module")
def models(text_model, vision_model):
    return {False: text_model, True: vision_model}


def run_of(case, stage, models, folder, *, resume=None, **options):
    """A short training run on the data of a case, in an output folder that may hold a checkpoint."""
    trainer_class, config_class = STAGES[stage]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, **dict(case.options), **options}

    def run():
        dataset = malformed.dataset_of(case, Path(tempfile.mkdtemp(dir=folder)))[0]
        args = config_class(**tiny.training_options(folder / "out", **options))
        trainer = trainer_class(models[case.vision], args=args, train_dataset=dataset)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def examples(strategy, count):
    """The same different examples of a strategy each time."""
    found = {}

    @settings(**SETTINGS, max_examples=4 * count)
    @given(strategy)
    def collect(case):
        if len(found) < count:
            found.setdefault(case.key, case)

    collect()
    return list(found.values())


def drawn(plan, count):
    """Different cases of each fault and kind of a plan, a round of all before the next of any."""
    each = 2 * count // len(plan) + 1
    # The first examples of all strategies are alike, and simple
    found = [examples(malformed.cases(*pair), each + 5)[place % 5 :] for place, pair in enumerate(plan)]
    rounds = itertools.zip_longest(*found)
    return [case for of_all in rounds for case in of_all if case is not None][:count]


def try_all(count, models, folder, stages):
    """Run different malformed datasets, by turns through the stages; what became of them, and what should not have."""
    tally, wrong, turns = Counter(), [], itertools.cycle(stages)

    for case in drawn(malformed.PLAN[: max(count, len(malformed.FAULTS))], count):
        stage = next(turns)
        outcome = outcome_of(run_of(case, stage, models, folder))
        tally[outcome] += 1
        if outcome not in case.expected:
            where = f"{stage}, {case.fault} in rows {case.bad}, {case.route}"
            wrong.append(f"{where}: {outcome}; {case.rows[case.bad[0]]}")
    return tally, wrong


def check(tally, wrong, count, capsys):
    with capsys.disabled():
        sys.stdout.write(f"\n{count} malformed datasets: {', '.join(f'{n} {name}' for name, n in tally.items())}\n")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(text[:600] for text in wrong)


def test_some_malformed_datasets(models, tmp_path, capsys):
    check(*try_all(QUICK, models, tmp_path, ("sft", "cwdpo")), QUICK, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("sft", "cwdpo"), ("cwdpo", "sft")], ids=["one turn", "other turn"])
def test_malformed_datasets(models, tmp_path, stages, capsys):
    check(*try_all(FULL, models, tmp_path, stages), FULL, capsys)


def test_a_good_dataset_is_no_malformed_one(models, tmp_path):
    """The judge tells a clean run, by every route, from all others."""
    for kind, route in (
        *itertools.product(malformed.ANY[:3], malformed.ROUTES),
        *zip(malformed.PICTURES, malformed.ROUTES, strict=False),
    ):
        case = malformed.Case("none", malformed.good_rows(kind), frozenset(), (), route, malformed.is_vision(kind))
        assert outcome_of(run_of(case, "cwdpo", models, tmp_path)) == malformed.TRAINED, (kind, route)


# --- a good checkpoint survives --------------------------------------------------------------------------------------


def snapshot(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("stage", STAGES)
def test_bad_input_leaves_a_good_checkpoint_as_it_is(stage, models, tmp_path):
    good = malformed.Case("none", tiny.pairs(12).to_list(), frozenset(), (), "map")
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    run_of(good, stage, models, tmp_path, max_steps=4, **saving)()
    checkpoint = last_checkpoint(str(tmp_path / "out"))
    before = snapshot(checkpoint)
    outcomes = Counter()

    refused = (malformed.wrong_type, malformed.bad_role, malformed.missing_column, malformed.mixed_formats)
    for case in drawn([(fault, "conversational") for fault in refused], 6):
        for resume in (None, True):
            outcomes[outcome_of(run_of(case, stage, models, tmp_path, resume=resume, max_steps=8, **saving))] += 1
    assert outcomes == {malformed.ERROR: 12}
    assert last_checkpoint(str(tmp_path / "out")) == checkpoint
    assert fault_of(checkpoint) is None
    assert snapshot(checkpoint) == before
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        assert all(weights.get_tensor(name).isfinite().all() for name in weights.keys())  # noqa: SIM118 (no mapping)
