"""The baseline losses against numbers worked out by hand and gradients against autograd; the trainer against DPO."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.benchmarks.baselines import bdpo_loss, cal_dpo_loss, dpop_loss
from trl_cwdpo.benchmarks.methods import METHODS
from trl_cwdpo.benchmarks.pair_loss_trainer import OPTIONS, PairLossTrainer

LN2 = math.log(2)
RATIOS = st.floats(-30, 30)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(x))


def dpo(chosen, rejected, beta):
    return -F.logsigmoid(beta * (chosen - rejected))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # log((e^0 + 1)/2) = 0
        (bdpo_loss(t(0.0), t(0.0), 0.1), LN2),
        # log(½e^(ln 3) + ½) = ln 2; z = 0.5·(1 − 0.6931)
        (bdpo_loss(t(1.0), t(math.log(3)), 0.5), softplus(-0.5 * (1 - LN2))),
        # λ = ¼: log(¼e^(ln 5) + ¾) = ln 2
        (bdpo_loss(t(0.0), t(math.log(5)), 1.0, mixture=0.25), softplus(LN2)),
        # A rejected response that is gone counts ln ½, however far it has gone
        (bdpo_loss(t(0.0), t(-1e4), 0.1), softplus(-0.1 * LN2)),
        # −0.1 + 1 − 50·0.1 = −4.1
        (dpop_loss(t(-0.1), t(-1.0), 0.1), softplus(0.41)),
        # A chosen response that has gained is not penalised
        (dpop_loss(t(2.0), t(-1.0), 0.1), softplus(-0.3)),
        # target ±1: ln 2 + 1 + 1
        (cal_dpo_loss(t(0.0), t(0.0), 0.5), LN2 + 2),
        # both on target: −log σ(2)
        (cal_dpo_loss(t(1.0), t(-1.0), 0.5), softplus(-2)),
        # target ±5
        (cal_dpo_loss(t(3.0), t(-7.0), 0.1), softplus(-10) + 4 + 4),
    ],
)
def test_losses_by_hand(loss, expected):
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@given(chosen=RATIOS, rejected=RATIOS, beta=st.floats(0.01, 2))
def test_limits_are_dpo(chosen, rejected, beta):
    plain = dpo(t(chosen), t(rejected), beta).item()
    assert dpop_loss(t(chosen), t(rejected), beta, penalty=0.0).item() == pytest.approx(plain, rel=1e-9)
    # As long as the rest of the mixture, 10⁻¹⁵, is small against π/π_ref
    rejected = max(rejected, -15.0)
    bounded = bdpo_loss(t(chosen), t(rejected), beta, mixture=1 - 1e-15).item()
    assert bounded == pytest.approx(dpo(t(chosen), t(rejected), beta).item(), rel=1e-6, abs=1e-12)


@given(chosen=RATIOS, rejected=RATIOS, beta=st.floats(0.01, 2))
def test_gradients(chosen, rejected, beta):
    # Away from the kink of the penalty
    chosen = chosen if abs(chosen) > 1e-3 else 1.0

    def gradients(loss):
        inputs = t(chosen).requires_grad_(), t(rejected).requires_grad_()
        return [gradient.item() for gradient in torch.autograd.grad(loss(*inputs, beta).sum(), inputs)]

    def sigma(x):
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    share = 0.5 * math.exp(rejected) / (0.5 * math.exp(rejected) + 0.5)
    push = beta * sigma(-beta * (chosen - math.log(0.5 * math.exp(rejected) + 0.5)))
    assert gradients(bdpo_loss) == pytest.approx([-push, push * share], rel=1e-9, abs=1e-15)

    slope = 1 + 50 * (chosen < 0)
    push = beta * sigma(-beta * (chosen - rejected - 50 * max(0, -chosen)))
    assert gradients(dpop_loss) == pytest.approx([-push * slope, push], rel=1e-9, abs=1e-15)

    push, target = sigma(rejected - chosen), 0.5 / beta
    expected = [-push + 2 * (chosen - target), push + 2 * (rejected + target)]
    assert gradients(cal_dpo_loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_losses_stay_finite():
    for loss in (bdpo_loss, dpop_loss, cal_dpo_loss):
        for chosen, rejected in ((1e4, -1e4), (-1e4, 1e4), (1e4, 1e4)):
            inputs = torch.tensor([chosen]).requires_grad_(), torch.tensor([rejected]).requires_grad_()
            value = loss(*inputs, 0.1)
            gradients = torch.autograd.grad(value.sum(), inputs)
            assert torch.isfinite(torch.stack([value, *gradients])).all()


# --- the trainer ----------------------------------------------------------------------------------------------------


def train(trainer_class, folder, tmp_path, config=CWDPOConfig, options=None, **kwargs):
    reference = AutoModelForCausalLM.from_pretrained(tiny.save_text_model(tmp_path / "reference", seed=7))
    trainer = trainer_class(
        model=folder,
        ref_model=reference,
        args=config(**tiny.training_options(tmp_path / "out", beta=0.3, max_steps=3, **(options or {}))),
        train_dataset=tiny.pairs(),
        **kwargs,
    )
    trainer.train()
    return trainer


def test_the_trainer_with_dpo_as_its_loss_is_dpo(text_model, tmp_path):
    ours = train(PairLossTrainer, text_model, tmp_path, options={**OPTIONS, "share_prefix": False}, pair_loss=dpo)
    theirs = train(DPOTrainer, text_model, tmp_path, config=DPOConfig)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        for mine, other in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_the_trainer_takes_the_loss_it_is_given(text_model, tmp_path):
    seen = []

    def record(chosen, rejected, beta):
        seen.append((chosen.detach(), rejected.detach(), beta))
        return cal_dpo_loss(chosen, rejected, beta)

    trainer = train(PairLossTrainer, text_model, tmp_path, options=OPTIONS, pair_loss=record)
    chosen, rejected, beta = seen[0]
    assert beta == 0.3
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(cal_dpo_loss(chosen, rejected, beta).mean().item(), abs=1e-4)
    assert entry["rewards/chosen"] == pytest.approx(beta * chosen.mean().item(), abs=1e-5)


def test_the_trainer_refuses_what_it_cannot_do(text_model, moe_model, tmp_path):
    with pytest.raises(ValueError, match="would cool a loss"):
        train(PairLossTrainer, text_model, tmp_path, options={"cooling_mode": "constant"}, pair_loss=dpo)
    with pytest.raises(ValueError, match="auxiliary loss"):
        train(PairLossTrainer, moe_model, tmp_path, options=OPTIONS, pair_loss=dpo)


def test_sums_with_the_nll_are_the_sums_they_claim(text_model, tmp_path):
    """From the reference itself: DPO's loss is ln 2, BCO's 2·ln 2, and what is left is the NLL of the chosen."""

    def first_loss(name):
        options = tiny.training_options(tmp_path / name, max_steps=1, beta=0.3, **METHODS[name].options)
        trainer = CWDPOTrainer(model=text_model, args=CWDPOConfig(**options), train_dataset=tiny.pairs())
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        return trainer, batch, trainer.compute_loss(trainer.model, dict(batch)).item()

    trainer, batch, rpo = first_loss("rpo")
    logits = trainer.model(input_ids=batch["input_ids"][:4], attention_mask=batch["attention_mask"][:4]).logits
    labels = batch["input_ids"][:4].masked_fill(batch["completion_mask"][:4] == 0, -100)
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    assert rpo == pytest.approx(LN2 + nll, rel=1e-5)
    assert first_loss("mpo")[2] == pytest.approx(0.8 * LN2 + 0.2 * 2 * LN2 + nll, rel=1e-5)
    assert first_loss("sft-sampled")[2] == pytest.approx(nll, rel=1e-5)


def test_every_method_is_described_and_has_valid_options(tmp_path):
    for method in METHODS.values():
        assert method.summary
        if method.kind != "sft":
            CWDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **method.options)
