"""`alerts`: a flag is told when it rises, once, and trackio hears of it where the run reports there."""

import logging
import sys
import types

import pytest
import tiny
from transformers import TrainerControl, TrainerState
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, DeltaLogpProbeCallback
from trl_cwdpo.alerts import ProbeAlertCallback
from trl_cwdpo.probe_flags import ADVICE, MEANINGS
from trl_cwdpo.probe_measures import Interval
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.signals import STOPPING, SignalThresholds


def record(step, tv, ece=0.1):
    nothing = Interval(0.0, 0.0, 0.0)
    return ProbeRecord(step, 1, {}, 0.5, 0.8, 0.2, ece, ece, margin=nothing, total_variation=tv)


@pytest.fixture
def trackio(monkeypatch):
    """Stands in for trackio, which need not be installed; keeps the alerts."""
    alerts = []
    module = types.SimpleNamespace(
        AlertLevel=types.SimpleNamespace(WARN="warn"), alert=lambda **alert: alerts.append(alert)
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    return alerts


def probe_all(callback, records, report_to=("trackio",), *, main_process=True):
    args = types.SimpleNamespace(report_to=list(report_to))
    state = TrainerState(is_world_process_zero=main_process)
    callback.on_train_begin(args, state, TrainerControl())
    for found in records:
        callback.on_probe(args, state, TrainerControl(), record=found, baseline=records[0])


def test_told_when_it_rises(trackio, caplog):
    records = [record(0, 0.0), record(10, 0.3), record(20, 0.4, ece=0.2), record(30, 0.1), record(40, 0.5)]
    with caplog.at_level(logging.WARNING, logger="trl_cwdpo.alerts"):
        probe_all(ProbeAlertCallback(), records)
    expected = [
        ("Probe flag: drift", f"step 10: total variation to the reference 0.3 > 0.25. {ADVICE['drift']}"),
        (
            "Probe flag: miscalibration",
            f"step 20: calibration error up by 0.1 > 0.05, to 0.2. {ADVICE['miscalibration']}",
        ),
        ("Probe flag: drift", f"step 40: total variation to the reference 0.5 > 0.25. {ADVICE['drift']}"),
    ]
    assert [(alert["title"], alert["text"]) for alert in trackio] == expected
    assert all(alert["level"] == "warn" for alert in trackio)
    assert caplog.messages == [f"{title}, {text}" for title, text in expected]


def test_every_flag_has_its_words():
    assert set(ADVICE) == set(MEANINGS) == {*STOPPING, "squeezing"}


def test_numbers_can_be_changed(trackio):
    probe_all(ProbeAlertCallback(SignalThresholds(total_variation=0.05)), [record(0, 0.0), record(10, 0.1)])
    assert len(trackio) == 1


def test_only_the_main_process_and_only_where_reported(trackio, caplog):
    probe_all(ProbeAlertCallback(), [record(0, 0.0), record(10, 0.3)], main_process=False)
    assert caplog.messages == []
    probe_all(ProbeAlertCallback(), [record(0, 0.0), record(10, 0.3)], report_to=())
    assert len(caplog.messages) == 1
    assert trackio == []


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_one_of_the_user_takes_the_place_of_the_default(text_model, tmp_path, caplog, ours, first):
    trainer_class, config_class = (CWDPOTrainer, CWDPOConfig) if ours else (DPOTrainer, DPOConfig)
    args = config_class(**tiny.training_options(tmp_path, max_steps=2, learning_rate=0.05))
    held_out = tiny.pairs(6, seed=7)
    trainer = trainer_class(text_model, args=args, train_dataset=tiny.pairs(), eval_dataset=held_out)
    added = [
        DeltaLogpProbeCallback(trainer, held_out, size=6, steps=2),
        ProbeAlertCallback(SignalThresholds(total_variation=0.001)),
    ]
    for callback in reversed(added) if first else added:
        trainer.add_callback(callback)
    trainer.train()
    told = [message for message in caplog.messages if message.startswith("Probe flag: drift")]
    assert len(told) == 1
    assert "> 0.001. Raise `beta`" in told[0]


def test_a_run_of_trl_warns(text_model, tmp_path, caplog):
    args = DPOConfig(**tiny.training_options(tmp_path, max_steps=4, learning_rate=0.05))
    trainer = DPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
    trainer.add_callback(ProbeAlertCallback(SignalThresholds(total_variation=0.01)))
    trainer.add_callback(DeltaLogpProbeCallback(trainer, tiny.pairs(6, seed=7), size=6, steps=2))
    trainer.train()
    drift = [message for message in caplog.messages if message.startswith("Probe flag: drift, step 2")]
    assert len(drift) == 1


def test_trackio_itself(text_model, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio.sqlite_storage")
    args = DPOConfig(
        **tiny.training_options(
            tmp_path / "out", max_steps=4, learning_rate=0.05, report_to="trackio", project="probes", run_name="one"
        )
    )
    trainer = DPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
    trainer.add_callback(ProbeAlertCallback(SignalThresholds(total_variation=0.01)))
    trainer.add_callback(DeltaLogpProbeCallback(trainer, tiny.pairs(6, seed=7), size=6, steps=2))
    trainer.train()
    run = next(iter(trackio.Api().runs("probes")))
    assert any("drift" in alert["title"] for alert in run.alerts())
