"""Both trainers, the probes, the fast path and on-policy negatives with tiny models of many architectures.

`python benchmarks/model_matrix.py` runs these tests and writes their outcome as a table, `docs/models.md`.
"""

import math
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.pictures_once import with_pictures_twice
from trl_cwdpo.probe_options import FAMILIES
from trl_cwdpo.probe_records import read_records
from trl_cwdpo.shared_prefix import SharedPrefixError, batch_layout

MODELS = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if entry.quick else [pytest.mark.slow]) for name, entry in model_zoo.ZOO.items()],
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Folder and processing class of a model, built once."""
    built: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            built[name] = (folder, model_zoo.save(name, folder))
        return built[name]

    return get


def build(
    trainer_class: type,
    config_class: type,
    zoo: Any,
    name: str,
    output: Path,
    *,
    evaluate: bool = False,
    **options: Any,
) -> Any:
    folder, processing_class = zoo(name)
    more = {"eval_dataset": model_zoo.data(name)} if evaluate else {}
    return trainer_class(
        str(folder),
        args=config_class(**tiny.training_options(output, max_steps=2, max_length=None, **options)),
        train_dataset=model_zoo.data(name),
        processing_class=processing_class,
        **more,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer: Any, steps: int = 2) -> Any:
    """The trainer after its run, which had finite losses and moved the model."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert len(losses(trainer)) == steps
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    return trainer


@MODELS
def test_stage_1(zoo, tmp_path, name):
    trainer = trained(build(GentleNegativeSFTTrainer, GentleNegativeSFTConfig, zoo, name, tmp_path))
    assert all("gentle/rejected_nll" in entry for entry in trainer.state.log_history if "loss" in entry)


@MODELS
def test_stage_2(zoo, tmp_path, name):
    trainer = trained(build(CWDPOTrainer, CWDPOConfig, zoo, name, tmp_path))
    weights = [entry["cooling/weight"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(0.0 < weight < 1.0 for weight in weights)


@MODELS
def test_cooling_off_is_dpo(zoo, tmp_path, name):
    if not model_zoo.ZOO[name].in_trl:
        pytest.skip("TRL's own `DPOTrainer` does not run it: its collator calls the processor without pictures")
    theirs = build(DPOTrainer, DPOConfig, zoo, name, tmp_path / "dpo")
    ours = build(CWDPOTrainer, CWDPOConfig, zoo, name, tmp_path / "ours", cooling_mode="off", share_prefix=False)
    theirs.train()
    ours.train()
    assert losses(ours) == losses(theirs)
    assert len(losses(ours)) == 2
    expected = dict(theirs.model.named_parameters())
    assert all(torch.equal(value, expected[key]) for key, value in ours.model.named_parameters())


def average_logp_of_chosen(folder: Path, batch: dict[str, Any], *, vision: bool) -> float:
    """From the logits of the saved model, without any code of ours or TRL's."""
    auto_class = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    with torch.no_grad():
        logps = model(**inputs).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    mask = batch["completion_mask"][:, 1:]
    averages = (logps * mask).sum(1) / mask.sum(1)
    return averages[: len(averages) // 2].mean().item()


@MODELS
def test_probes(zoo, tmp_path, name):
    options = {"probe_steps": 2, "eval_strategy": "no"}
    trainer = trained(build(CWDPOTrainer, CWDPOConfig, zoo, name, tmp_path, evaluate=True, **options))
    records = list(read_records(tmp_path / "probes.jsonl"))
    assert len(records) == 2
    for record in records:
        assert set(record.families) >= {"chosen", "rejected", "mismatched", "shuffled", "argmax"}
        assert set(record.families) <= {*FAMILIES, "rejected_hard", "rejected_easy"}
    batch = with_pictures_twice(trainer.data_collator(list(trainer.eval_dataset)))
    expected = average_logp_of_chosen(zoo(name)[0], batch, vision=model_zoo.ZOO[name].vision)
    assert records[0].families["chosen"].avg_logp.mean == pytest.approx(expected, abs=1e-4)


def shared_forward(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor | str:
    """Log-probabilities by the fast path, or why there is none."""
    layout = batch_layout(trainer.model, inputs)
    if isinstance(layout, str):
        return layout
    try:
        return trainer._shared_prefix.forward(trainer.model, inputs).log_probs
    except SharedPrefixError as error:
        return str(error).split("shared: ", 1)[1].split(". Set ", 1)[0]


@MODELS
@torch.no_grad()
def test_fast_path(zoo, tmp_path, name, record_property, caplog):
    trainer = build(CWDPOTrainer, CWDPOConfig, zoo, name, tmp_path, share_prefix=True)
    batch = with_pictures_twice(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    inputs |= {"labels": labels, "use_cache": False, "fused_lm_head": True}
    trainer.model.eval()
    shared = shared_forward(trainer, inputs)
    assert isinstance(shared, str) != model_zoo.ZOO[name].shares_prefix, shared
    if isinstance(shared, str):
        record_property("fallback", shared)
        by_itself = build(CWDPOTrainer, CWDPOConfig, zoo, name, tmp_path / "auto")
        with caplog.at_level("WARNING"):
            found = by_itself._shared_prefix.forward(by_itself.model.eval(), inputs).log_probs
        assert shared in caplog.text
    else:
        assert trainer._shared_prefix.verdicts[id(trainer.model)] is None
        found = shared
    assert torch.allclose(found.sum(1), trainer.model(**inputs).log_probs.sum(1), atol=1e-4)


@MODELS
def test_on_policy_negatives(zoo, tmp_path, name):
    options = {"dataset_negative_fraction": 0.0, "negative_max_completion_length": 4}
    trainer = trained(build(CWDPOTrainer, CWDPOConfig, zoo, name, tmp_path, **options))
    fractions = [entry["negatives/on_policy_fraction"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(fraction > 0.0 for fraction in fractions)
