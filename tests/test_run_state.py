"""`run_state`: values frozen at the start of a run come back from a checkpoint the way transformers restores them."""

import types

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, ExportableState

from trl_cwdpo.run_state import RunState

VALUES = {"cooling": {"floor": -2.5, "temperature": 0.15, "warnings": ["one"]}, "negative_nll_floor": 1.25}


def trainer_with(*callbacks, restore=False):
    """As much of a trainer as `Trainer._load_callback_state` reads."""
    handler = CallbackHandler(list(callbacks), None, None, None, None)
    arguments = types.SimpleNamespace(restore_callback_states_from_checkpoint=restore)
    return types.SimpleNamespace(
        args=arguments, callback_handler=handler, control=TrainerControl(), state=TrainerState(stateful_callbacks=[])
    )


def saved_and_loaded(callback, path):
    """The state of a trainer with this callback, through `trainer_state.json`."""
    TrainerState(stateful_callbacks=[callback, TrainerControl()]).save_to_json(str(path))
    return TrainerState.load_from_json(str(path))


def begin_training(trainer):
    RunState.of(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_new_one_is_empty():
    assert RunState().values == {}


def test_it_does_not_share_the_values_it_is_given():
    given = {"floor": 1.0}
    RunState(given).values["floor"] = 2.0
    assert given == {"floor": 1.0}


def test_state_rebuilds_an_equal_callback():
    callback = RunState(VALUES)
    state = callback.state()
    assert isinstance(callback, ExportableState)
    assert isinstance(callback, TrainerCallback)
    assert type(callback)(**state["args"]).values == VALUES
    assert state["attributes"] == {}


def test_values_survive_the_state_file_of_a_checkpoint(tmp_path):
    state = saved_and_loaded(RunState(VALUES), tmp_path / "trainer_state.json")
    assert type(RunState())(**state.stateful_callbacks["RunState"]["args"]).values == VALUES


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_values_whether_or_not_transformers_restores_callbacks(tmp_path, restore):
    trainer = trainer_with(RunState(), restore=restore)
    trainer.state = saved_and_loaded(RunState(VALUES), tmp_path / "trainer_state.json")
    before = RunState.of(trainer)
    Trainer._load_callback_state(trainer)
    assert (RunState.of(trainer) is before) == (not restore)
    begin_training(trainer)
    assert RunState.of(trainer).values == VALUES


def test_values_of_the_checkpoint_win_over_those_of_the_new_process(tmp_path):
    trainer = trainer_with(RunState({"negative_nll_floor": 9.0, "other": 1}))
    trainer.state = saved_and_loaded(RunState(VALUES), tmp_path / "trainer_state.json")
    begin_training(trainer)
    assert RunState.of(trainer).values == {**VALUES, "other": 1}


def test_a_fresh_run_starts_without_values():
    trainer = trainer_with(RunState())
    begin_training(trainer)
    assert RunState.of(trainer).values == {}


def test_a_checkpoint_from_before_the_values_were_known_gives_none(tmp_path):
    trainer = trainer_with(RunState())
    trainer.state = saved_and_loaded(RunState(), tmp_path / "trainer_state.json")
    begin_training(trainer)
    assert RunState.of(trainer).values == {}


def test_a_checkpoint_of_another_trainer_gives_none(tmp_path):
    TrainerState(stateful_callbacks=[TrainerControl()]).save_to_json(str(tmp_path / "state.json"))
    trainer = trainer_with(RunState())
    trainer.state = TrainerState.load_from_json(str(tmp_path / "state.json"))
    begin_training(trainer)
    assert RunState.of(trainer).values == {}


def test_the_state_of_a_running_trainer_follows_values_found_later(tmp_path):
    callback = RunState()
    state = TrainerState(stateful_callbacks=[callback])
    callback.values["floor"] = -2.0
    state.stateful_callbacks["RunState"] = callback.state()
    state.save_to_json(str(tmp_path / "state.json"))
    loaded = TrainerState.load_from_json(str(tmp_path / "state.json"))
    assert loaded.stateful_callbacks["RunState"]["args"]["values"] == {"floor": -2.0}


def test_it_is_found_among_the_callbacks_of_a_trainer():
    wanted = RunState()
    assert RunState.of(trainer_with(TrainerCallback(), wanted, TrainerCallback())) is wanted
