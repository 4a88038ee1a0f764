"""FSDP2 resumes whichever weights have optimizer states, on one process: what is assumed of torch and accelerate."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import load_fsdp_optimizer, save_fsdp_optimizer
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trl_cwdpo.upstream.sharded_optimizer import KeepsOptimizerStates, frozen, owners_of_states, weights_without_state

FORMATS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


class Branched(nn.Module):
    """A branch that only some batches reach, and one that none does."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.sometimes = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.still = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, rows, *, both):
        hidden = self.used(rows) * self.still
        return self.sometimes(hidden) if both else hidden


class ParentTrainer:
    """What transformers' trainer does with optimizers under FSDP, by accelerate's own functions."""

    def __init__(self, state_dict_type, optimizer_class=torch.optim.AdamW, **options):
        torch.manual_seed(0)
        self.model = fully_shard(Branched(), mesh=init_device_mesh("cpu", (1,)))
        self.optimizer = optimizer_class(self.model.parameters(), lr=0.1, **options)
        self.state = SimpleNamespace(global_step=0)
        self.is_fsdp_enabled = True
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=state_dict_type)
        self.accelerator = SimpleNamespace(
            process_index=0,
            is_main_process=True,
            wait_for_everyone=lambda: None,
            state=SimpleNamespace(fsdp_plugin=plugin),
        )

    def _save_optimizer_and_scheduler(self, folder):
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, folder)

    def _load_optimizer_and_scheduler(self, folder):
        plugin = self.accelerator.state.fsdp_plugin
        load_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, folder)

    def step(self, *, both):
        """One step; its rows are the same for every call."""
        rows = torch.linspace(-1, 1, 8).view(2, 4)
        self.model(rows, both=both).pow(2).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1

    def states(self):
        """All optimizer states as plain tensors, by weight."""
        state = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        return {
            weight: {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in of.items()}
            for weight, of in state.items()
        }

    def weights(self):
        return {name: value.full_tensor().detach() for name, value in self.model.named_parameters()}


class OurTrainer(KeepsOptimizerStates, ParentTrainer):
    """As the trainers of this package."""


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)  # accelerate's log wants it
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def resumed(trainer, folder, *args, **options):
    """A second trainer that continues from what a first one saves now."""
    trainer._save_optimizer_and_scheduler(str(folder))
    second = type(trainer)(*args, **options)
    second.state.global_step = trainer.state.global_step
    with torch.no_grad():
        for value, other in zip(second.model.parameters(), trainer.model.parameters(), strict=True):
            value.copy_(other)
    second._load_optimizer_and_scheduler(str(folder))
    return second


@pytest.mark.parametrize(
    ("form", "message"), [(FORMATS[0], "Missing key in checkpoint"), (FORMATS[1], "Missing optimizer state")]
)
def test_upstream_asks_for_states_that_are_not_there(tmp_path, form, message):
    trainer = ParentTrainer(form)
    trainer.step(both=False)
    with pytest.raises((RuntimeError, distributed.checkpoint.CheckpointException), match=message):
        resumed(trainer, tmp_path, form)


@pytest.mark.parametrize(
    ("form", "optimizer_class", "options"),
    [
        *((form, torch.optim.AdamW, {}) for form in FORMATS),
        *((form, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}) for form in FORMATS),
        # An optimizer without any state: upstream does not load whole states of one
        (FORMATS[0], torch.optim.SGD, {}),
    ],
)
def test_weights_without_gradients_so_far_resume_exactly(tmp_path, form, optimizer_class, options):
    trainer = OurTrainer(form, optimizer_class, **options)
    trainer.step(both=False)
    trainer.step(both=False)
    second = resumed(trainer, tmp_path, form, optimizer_class, **options)
    assert all(value.requires_grad == ("still" not in name) for name, value in second.model.named_parameters())
    for both in (False, True, True):
        trainer.step(both=both)
        second.step(both=both)
    assert_same(second.weights(), trainer.weights())
    expected = {"used.weight", "used.bias", "sometimes.weight", "sometimes.bias"}
    if optimizer_class is torch.optim.AdamW:
        assert trainer.states().keys() == second.states().keys() == expected
        # Counted from the first gradient of each, two steps later than the others
        assert {name: int(state["step"]) for name, state in second.states().items()} == {
            name: 5 if "used" in name else 2 for name in expected
        }
    assert_same(second.states(), trainer.states())


def test_upstream_counts_a_step_when_it_saves_before_the_first(tmp_path):
    trainer = ParentTrainer("SHARDED_STATE_DICT")
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    assert int(trainer.states()["used.weight"]["step"]) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_of_the_beginning_changes_nothing(tmp_path, form):
    never_saved, trainer = OurTrainer(form), OurTrainer(form)
    second = resumed(trainer, tmp_path, form)
    for one in (never_saved, trainer, second):
        one.step(both=True)
    assert_same(trainer.weights(), never_saved.weights())
    assert_same(second.weights(), never_saved.weights())


@pytest.mark.parametrize("form", FORMATS)
def test_states_of_a_checkpoint_are_found(tmp_path, form):
    trainer = OurTrainer(form)
    trainer.step(both=True)
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    found = weights_without_state(trainer.model, owners_of_states(tmp_path))
    assert [id(value) for value in found] == [id(value) for value in trainer.model.never.parameters()]
    assert owners_of_states(tmp_path / "elsewhere") is None


def test_states_of_another_model_are_left_to_upstream():
    model = Branched()
    saved = ["used.weight.exp_avg", "used.bias.exp_avg", "other.weight.exp_avg"]
    assert weights_without_state(model, saved) == []
    assert len(weights_without_state(model, saved[:2])) == 4


def test_names_of_wrapped_layers_are_those_that_are_saved():
    model = Branched()
    model.used = checkpoint_wrapper(model.used)  # as accelerate's `fsdp_activation_checkpointing` does
    assert "used._checkpoint_wrapped_module.weight" in dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.used.parameters())
    saved = get_optimizer_state_dict(model.used, optimizer)["state"]
    found = weights_without_state(model, [f"used.{name}" for name in saved])
    assert len(saved) == 2
    assert {id(value) for value in found} == {
        id(value) for layer in (model.sometimes, model.never) for value in layer.parameters()
    }


def test_frozen_weights_are_trained_again_after_an_error():
    model = Branched()

    def fail():
        with frozen(model.parameters()):
            assert not any(value.requires_grad for value in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["still"]
