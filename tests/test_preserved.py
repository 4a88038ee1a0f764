"""`preserved`: random state and train/eval modes are as before, also when the body raises."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from trl_cwdpo.preserved import evaluation_mode, preserved_random_state


def draws():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist(), torch.randn(2).tolist()


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def raise_after(action):
    action()
    raise KeyError("body")


@pytest.mark.parametrize("disturb", [draws, lambda: seed(99)], ids=["drawing", "seeding"])
@pytest.mark.parametrize("raises", [False, True])
def test_python_numpy_and_torch_draw_what_they_would_have_drawn(disturb, raises):
    seed(7)
    draws()
    expected = draws()

    seed(7)
    draws()
    expectation = pytest.raises(KeyError, match="body") if raises else contextlib.nullcontext()
    with expectation, preserved_random_state():
        raise_after(disturb) if raises else disturb()
    assert draws() == expected


def test_the_body_continues_the_outer_random_stream():
    seed(7)
    expected = draws()
    seed(7)
    with preserved_random_state():
        assert draws() == expected


def test_preserved_random_states_nest():
    seed(7)
    expected = draws()
    seed(7)
    with preserved_random_state():
        draws()
        with preserved_random_state():
            draws()
    assert draws() == expected


@pytest.mark.gpu
def test_the_accelerator_draws_what_it_would_have_drawn():
    device = torch.accelerator.current_accelerator()
    torch.manual_seed(7)
    expected = torch.rand(3, device=device)
    torch.manual_seed(7)
    with preserved_random_state():
        torch.rand(3, device=device)
    assert torch.equal(torch.rand(3, device=device), expected)


def model():
    """In training, except for a frozen part in eval mode that holds a module in training."""
    built = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), nn.Dropout())
    built.train()
    built[1].training = False
    built[1][1].training = False
    return built


MODES = [True, True, False, True, False, True]


def modes(built):
    return [module.training for module in built.modules()]


def test_every_module_is_in_eval_mode_inside():
    built = model()
    assert modes(built) == MODES
    with evaluation_mode(built):
        assert modes(built) == [False] * 6


@pytest.mark.parametrize("raises", [False, True])
def test_every_module_returns_to_its_own_mode(raises):
    built = model()
    expectation = pytest.raises(KeyError, match="body") if raises else contextlib.nullcontext()
    with expectation, evaluation_mode(built):
        raise_after(built.eval) if raises else built.train()
    assert modes(built) == MODES


def test_a_model_in_eval_mode_stays_there():
    built = model().eval()
    with evaluation_mode(built):
        pass
    assert modes(built) == [False] * 6
