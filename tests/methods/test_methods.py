"""Methods as values: APO-zero, HyPO and the SFT term against closed forms in float64; what the trainer needs of each."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from lorat.methods import KTO, METHODS, APOZero, HyPO
from lorat.methods.losses import apo_zero_loss, dpo_loss, hypo_loss
from lorat.methods.pairs import DPO, IPO
from lorat.packs.logprobs import LogProbs
from lorat.settings import table
from tests.helpers.worlds import make_pairs, nudge, trainer_for


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CHOSEN, REJECTED, REFERENCE = (2.0, -1.0, 0.5, -40.0), (-3.0, 0.25, 4.0, 30.0), (5.0, -2.0, 0.0, -300.0)


def test_apo_zero_by_hand():
    """1 − σ(βΔ_w) + σ(βΔ_l), eq. 7 of arXiv 2408.06266; the gradient of each side by its own derivative."""
    chosen, rejected = t(*CHOSEN).requires_grad_(), t(*REJECTED).requires_grad_()
    out = apo_zero_loss(chosen, rejected, beta=0.3)
    expected = [1 - sigmoid(0.3 * w) + sigmoid(0.3 * r) for w, r in zip(CHOSEN, REJECTED)]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-12)
    out.losses.sum().backward()
    slope = lambda x: 0.3 * sigmoid(0.3 * x) * (1 - sigmoid(0.3 * x))  # noqa: E731
    assert chosen.grad.tolist() == pytest.approx([-slope(w) for w in CHOSEN], rel=1e-9)
    assert rejected.grad.tolist() == pytest.approx([slope(r) for r in REJECTED], rel=1e-9)
    assert out.chosen_rewards.tolist() == pytest.approx([0.3 * w for w in CHOSEN])


def test_hypo_by_hand():
    """−log σ(β(policy margin − max(0, m))), arXiv 2602.11902: DPO where m ≥ 0, the policy's own margin where m < 0."""
    chosen, rejected = t(*CHOSEN).requires_grad_(), t(*REJECTED).requires_grad_()
    out = hypo_loss(chosen, rejected, t(*REFERENCE), beta=0.3)
    policy = [w - r + m for w, r, m in zip(CHOSEN, REJECTED, REFERENCE)]
    expected = [math.log1p(math.exp(-0.3 * (p - max(0.0, m)))) for p, m in zip(policy, REFERENCE)]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-12)
    dpo = dpo_loss(t(*CHOSEN), t(*REJECTED), beta=0.3).losses
    assert [a == b for a, b in zip(out.losses.tolist(), dpo.tolist())] == [True, False, True, False]
    with pytest.raises(ValueError, match=r"reference_margins \(1,\) must be \(n,\)"):
        hypo_loss(t(1, 2), t(1, 2), t(1), beta=0.1)


@pytest.mark.parametrize("kind", [DPO, IPO, APOZero, HyPO])
def test_the_sft_term_is_the_mean_negative_log_likelihood_of_the_chosen(kind):
    logps, lengths = t(-8, -3, -12, -6), torch.tensor([4, 2, 3, 6])
    lp = LogProbs(logps.requires_grad_(), t(0.5, -0.5, 1, 2), lengths, t())
    plain = kind(0.3).score([{}, {}], lp, t(0)[0])
    with_term = kind(0.3, sft_weight=0.7).score([{}, {}], lp, t(0)[0])
    added = (with_term.losses - plain.losses).tolist()
    assert added == pytest.approx([0.7 * 8 / 4, 0.7 * 12 / 3])
    assert with_term.metrics["nll_loss"][0].tolist() == pytest.approx([2, 4]) and "nll_loss" not in plain.metrics
    (grad,) = torch.autograd.grad((with_term.losses - plain.losses).sum(), logps)
    assert grad.tolist() == pytest.approx([-0.7 / 4, 0, -0.7 / 3, 0])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_line_in_the_table_and_its_settings_there(name):
    kind = METHODS[name]
    title, settings = table.METHODS[name]
    assert title == kind.title and {"beta", *settings} == {f.name for f in fields(kind)}
    assert kind.unit == ("single" if kind is KTO else "pair") and kind.companions == (kind is KTO)


@pytest.mark.parametrize(("method", "first"), [("apo_zero", 1.0), ("hypo", None)])
def test_a_run_starts_where_the_equation_does(neox, tmp_path, method, first):
    """Equal adapters: APO-zero's loss is 1; HyPO's is −log σ(β·min(0, m)) with the base's own margin m."""
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), method=method, beta=0.3, sync="hard", sync_every=1)
    planned = trainer.scorer.plan(next(iter(trainer.get_train_dataloader()))["batch"])
    with torch.no_grad():
        lp = trainer.models(trainer.scorer.packer.pack(planned.groups))
    margins = (lp.logps[0::2] - lp.logps[1::2]).double()
    expected = first or torch.nn.functional.softplus(-0.3 * margins.clamp(max=0)).mean().item()
    trainer.train()
    logged = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert logged[0] == pytest.approx(expected, rel=1e-5) and trainer.rule.updates == 1


def test_the_reference_moves_before_any_other_callback_sees_the_step(neox, tmp_path):
    from transformers import TrainerCallback

    from lorat.reference import distance

    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, distance(model)))

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), sync="hard", sync_every=2, callbacks=[Watch()])
    nudge(trainer)
    trainer.train()
    assert [step for step, _ in seen] == [1, 2] and seen[0][1] > 0 and seen[1][1] == 0
