"""Losses against closed forms worked out by hand, and against TRL's own `_compute_loss` on the same log-probs."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.dpo_trainer as trl_dpo
import trl.trainer.kto_trainer as trl_kto

from lorat.methods.losses import dpo_loss, ipo_loss, kto_baseline, kto_loss

LN2 = math.log(2)
EPS = 2e-6  # a float32 rounding or two on values of order one


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: torch.Tensor, expected: list[float], eps: float = EPS) -> None:
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(expected, rel=eps, abs=eps)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- closed forms


def test_dpo_is_ln2_at_equal_models():
    result = dpo_loss(t(0, 0), t(0, 0), beta=0.1)
    assert result.losses.tolist() == [pytest.approx(LN2, abs=1e-7)] * 2
    assert result.chosen_rewards.tolist() == [0, 0]
    assert result.rejected_rewards.tolist() == [0, 0]


def test_dpo_by_hand():
    # β(Δ_w − Δ_l) = 0.1·(5 − (−15)) = 2 → −log σ(2) = log(1 + e⁻²) = 0.126928; and −2 → 2.126928
    result = dpo_loss(t(5, -15), t(-15, 5), beta=0.1)
    close(result.losses, [0.126928011, 2.126928011])
    close(result.chosen_rewards, [0.5, -1.5])
    close(result.rejected_rewards, [-1.5, 0.5])


def test_conservative_dpo_by_hand():
    # m = 2, ε = 0.1: 0.9·0.126928 + 0.1·2.126928 = 0.326928
    close(dpo_loss(t(5), t(-15), beta=0.1, label_smoothing=0.1).losses, [0.326928011])


def test_conservative_dpo_is_least_at_the_log_odds():
    margin = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, torch.zeros_like(margin), beta=1.0, label_smoothing=0.2).losses.sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-15)


def test_robust_dpo_by_hand():
    # m = 2, ε = 0.1: (0.9·0.126928 − 0.1·2.126928) / 0.8 = −0.0984299 / 0.8 = −0.123072
    close(dpo_loss(t(5), t(-15), beta=0.1, label_smoothing=0.1, robust=True).losses, [-0.123071989])


def test_robust_dpo_is_unbiased():
    """Averaged over the labels' noise, rDPO is the plain loss on clean labels; cDPO is not."""
    clean = dpo_loss(t(3), t(-1), beta=0.3).losses.item()

    def expected(robust: bool) -> float:
        options = {"beta": 0.3, "label_smoothing": 0.2, "robust": robust}
        kept, flipped = dpo_loss(t(3), t(-1), **options), dpo_loss(t(-1), t(3), **options)
        return 0.8 * kept.losses.item() + 0.2 * flipped.losses.item()

    assert expected(robust=True) == pytest.approx(clean, abs=1e-6)
    assert expected(robust=False) > clean + 0.1


def test_robust_without_smoothing_is_plain():
    options = {"chosen_logratios": t(1, -2), "rejected_logratios": t(0.5, 3), "beta": 0.4}
    assert torch.equal(dpo_loss(**options, robust=True).losses, dpo_loss(**options).losses)


def test_dpo_per_token_by_hand():
    # Δ_w/|y_w| − Δ_l/|y_l| = 6/3 − (−4)/8 = 2.5; β = 2 → −log σ(5) = log(1 + e⁻⁵) = 0.00671535
    result = dpo_loss(
        t(6),
        t(-4),
        beta=2.0,
        chosen_lengths=torch.tensor([3]),
        rejected_lengths=torch.tensor([8]),
        length_normalize=True,
    )
    close(result.losses, [0.00671534849])
    close(result.chosen_rewards, [12.0])  # of the sums, not of the means
    close(result.rejected_rewards, [-8.0])


def test_ipo_by_hand():
    lengths = {"chosen_lengths": torch.tensor([3]), "rejected_lengths": torch.tensor([8])}
    # per token 2.5 − 1/(2·0.1) = −2.5 → 6.25; sums 10 − 5 = 5 → 25; at zero (1/(2β))² = 25
    close(ipo_loss(t(6), t(-4), beta=0.1, **lengths).losses, [6.25])
    close(ipo_loss(t(6), t(-4), beta=0.1, length_normalize=False).losses, [25.0])
    close(ipo_loss(t(0), t(0), beta=0.1, **lengths).losses, [25.0])
    result = ipo_loss(t(6), t(-4), beta=0.1, **lengths)
    close(result.chosen_rewards, [0.6])
    close(result.rejected_rewards, [-0.4])


def test_kto_baseline_by_hand():
    # the mean first, then the maximum: mean(3, −1, 1) = 1; mean(1, −4) < 0 → 0
    assert kto_baseline(t(3, -1, 1)).item() == 1.0
    assert kto_baseline(t(1, -4)).item() == 0.0
    assert kto_baseline(t()).item() == 0.0
    moving = t(3, 1).requires_grad_()
    assert kto_baseline(moving).shape == () and not kto_baseline(moving).requires_grad


def test_kto_by_hand():
    # β = 0.5, z₀ = 1: desirable Δ = 5 → 1 − σ(2) = 0.119203; undesirable Δ = 5 → 1 − σ(−2) = 0.880797
    result = kto_loss(
        t(5, 5, 1, 1),
        torch.tensor([True, False, True, False]),
        torch.tensor(1.0),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    close(result.losses, [2 * 0.119202922, 3 * 0.880797078, 2 * 0.5, 3 * 0.5])
    close(result.rewards, [2.5, 2.5, 0.5, 0.5])
    assert sigmoid(2) == pytest.approx(0.880797078)


def test_kto_keeps_digits_where_the_loss_is_tiny():
    loss = kto_loss(t(40), torch.tensor([True]), torch.tensor(0.0), beta=1.0).losses.item()
    assert loss == pytest.approx(math.exp(-40), rel=1e-5, abs=0)  # 1 − σ(40) is 0 in float32


def test_z0_gets_no_gradient():
    z0 = torch.tensor(1.0, requires_grad=True)
    logratios = t(1, 2).requires_grad_()
    kto_loss(logratios, torch.tensor([True, False]), z0, beta=0.1).losses.sum().backward()
    assert z0.grad is None and logratios.grad is not None


# ---------------------------------------------------------------- TRL


class StubModel(torch.nn.Module):
    """Stands for a causal model with TRL's fused head: returns the per-token log-probs it was given."""

    is_gradient_checkpointing = False

    def __init__(self, *per_token: torch.Tensor):
        super().__init__()
        self.calls = list(per_token)

    def forward(self, **kwargs) -> SimpleNamespace:
        logps = self.calls.pop(0)
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_self(policy: StubModel, reference: StubModel, **attributes) -> SimpleNamespace:
    """The attributes that `_compute_loss` reads from a trainer on one process, without building one."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    defaults = dict(
        model=policy,
        ref_model=reference,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return SimpleNamespace(**(defaults | attributes))


def random_logps(n: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token policy and reference log-probs (n, tokens), zero after each completion, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (n,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    policy = -3 * torch.rand(n, tokens, generator=generator) * mask
    reference = (policy + 0.5 * torch.randn(n, tokens, generator=generator)) * mask
    return policy, reference, mask


def batch(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """One prompt token before each completion: log-probs are of positions 1, 2, ..."""
    full = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)
    return {"input_ids": torch.ones_like(full), "attention_mask": torch.ones_like(full), "completion_mask": full}


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("ipo", 0.0), ("robust", 0.2)]
)
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_pairs_against_trl(loss_type, label_smoothing, beta):
    n, tokens = 6, 9
    chosen, rejected = random_logps(n, tokens, seed=1), random_logps(n, tokens, seed=2)
    for i in range(n):  # TRL returns the mean, so one pair at a time gives the value per example
        one = [torch.cat([c[i : i + 1], r[i : i + 1]]) for c, r in zip(chosen, rejected)]
        trainer = trl_self(
            StubModel(one[0]),
            StubModel(one[1]),
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=False,
        )
        theirs = trl_dpo.DPOTrainer._compute_loss(trainer, trainer.model, batch(one[2]), False)

        deltas = (one[0] - one[1]).sum(dim=1)
        lengths = one[2].sum(dim=1)
        options = {"beta": beta, "chosen_lengths": lengths[:1], "rejected_lengths": lengths[1:]}
        if loss_type == "ipo":
            ours = ipo_loss(deltas[:1], deltas[1:], **options)
        else:
            ours = dpo_loss(
                deltas[:1],
                deltas[1:],
                **options,
                label_smoothing=label_smoothing,
                robust=loss_type == "robust",
                length_normalize=loss_type == "sigmoid_norm",
            )
        close(ours.losses, [theirs.item()], eps=1e-5)  # TRL subtracts sums
        close(ours.chosen_rewards, trainer._metrics["train"]["rewards/chosen"], eps=1e-5)
        close(ours.rejected_rewards, trainer._metrics["train"]["rewards/rejected"], eps=1e-5)


@pytest.mark.parametrize("shift", [0.5, -0.5], ids=["baseline above zero", "baseline clamped to zero"])
def test_kto_against_trl(shift):
    n, tokens, beta = 7, 9, 0.3
    policy, reference, mask = random_logps(n, tokens, seed=3)
    kl_policy, kl_reference, kl_mask = random_logps(n, tokens, seed=4)
    kl_policy = kl_policy + shift * kl_mask
    labels = torch.tensor([True, False, False, True, True, False, True])
    trainer = trl_self(
        StubModel(kl_policy, policy),
        StubModel(kl_reference, reference),
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=1.5,
        undesirable_weight=0.7,
    )
    trainer._compute_kl_logps = lambda model, inputs: trl_kto.KTOTrainer._compute_kl_logps(trainer, model, inputs)
    inputs = batch(mask) | {f"KL_{key}": value for key, value in batch(kl_mask).items()} | {"label": labels}
    theirs = trl_kto.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)

    z0 = kto_baseline((kl_policy - kl_reference).sum(dim=1))
    assert (z0.item() > 0) == (shift > 0)
    assert z0.item() == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-5)
    deltas = (policy - reference).sum(dim=1)
    ours = kto_loss(deltas, labels, z0, beta=beta, desirable_weight=1.5, undesirable_weight=0.7)
    assert ours.losses.mean().item() == pytest.approx(theirs.item(), abs=1e-5)
    for name, which in (("rewards/chosen", labels), ("rewards/rejected", ~labels)):
        assert ours.rewards[which].mean().item() == pytest.approx(trainer._metrics["train"][name][0], abs=1e-5)


# ---------------------------------------------------------------- gradients, extremes, errors

LENGTHS = {"chosen_lengths": torch.tensor([1, 4, 7]), "rejected_lengths": torch.tensor([2, 3, 9])}
PAIR_LOSSES = {
    "dpo": lambda c, r: dpo_loss(c, r, beta=0.2),
    "cdpo": lambda c, r: dpo_loss(c, r, beta=0.2, label_smoothing=0.1),
    "rdpo": lambda c, r: dpo_loss(c, r, beta=0.2, label_smoothing=0.1, robust=True),
    "dpo per token": lambda c, r: dpo_loss(c, r, beta=0.2, **LENGTHS, length_normalize=True),
    "ipo": lambda c, r: ipo_loss(c, r, beta=0.2, **LENGTHS),
    "ipo of sums": lambda c, r: ipo_loss(c, r, beta=0.2, **LENGTHS, length_normalize=False),
}


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES.keys())
def test_pair_gradients_are_finite_differences(loss):
    generator = torch.Generator().manual_seed(5)
    inputs = [3 * torch.randn(3, dtype=torch.float64, generator=generator) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r).losses, [x.requires_grad_() for x in inputs])
    assert not loss(*inputs).chosen_rewards.requires_grad and not loss(*inputs).rejected_rewards.requires_grad


def test_kto_gradients_are_finite_differences():
    logratios = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    labels, z0 = torch.tensor([True, False, True]), torch.tensor(0.4)
    assert torch.autograd.gradcheck(
        lambda x: kto_loss(x, labels, z0, beta=0.7, desirable_weight=2.0, undesirable_weight=0.5).losses, [logratios]
    )
    assert not kto_loss(logratios, labels, z0, beta=0.7).rewards.requires_grad


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES.keys())
def test_extreme_pairs_stay_finite(loss):
    chosen, rejected = t(1e4, -1e4, 1e4).requires_grad_(), t(-1e4, 1e4, 1e4).requires_grad_()
    losses = loss(chosen, rejected).losses
    losses.sum().backward()
    assert losses.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_extreme_kto_stays_finite():
    logratios = t(1e4, -1e4, 1e4, -1e4).requires_grad_()
    losses = kto_loss(logratios, torch.tensor([True, True, False, False]), torch.tensor(0.0), beta=1.0).losses
    losses.sum().backward()
    assert losses.tolist() == [0, 1, 1, 0] and logratios.grad.isfinite().all()


def test_half_precision_inputs_are_computed_in_float32():
    chosen, rejected = torch.tensor([5.0]).bfloat16(), torch.tensor([-15.0]).bfloat16()
    close(dpo_loss(chosen, rejected, beta=0.1).losses, [0.126928011])
    close(kto_loss(chosen, torch.tensor([True]), torch.tensor(1.0), beta=0.5).losses, [0.119202922])


def test_an_empty_batch_gives_empty_losses():
    assert dpo_loss(t(), t(), beta=0.1).losses.shape == (0,)
    assert kto_loss(t(), t().bool(), kto_baseline(t()), beta=0.1).losses.shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo_loss(t(1, 2), t(1), beta=0.1), r"\(2,\).*\(1,\)"),
        (lambda: dpo_loss(t(1)[None], t(1)[None], beta=0.1), r"must both be \(n,\)"),
        (lambda: dpo_loss(t(1), t(1), beta=0.0), "beta"),
        (lambda: dpo_loss(t(1), t(1), beta=0.1, label_smoothing=0.5), "label_smoothing"),
        (lambda: dpo_loss(t(1), t(1), beta=0.1, label_smoothing=-0.1), "label_smoothing"),
        (lambda: dpo_loss(t(1), t(1), beta=0.1, length_normalize=True), "chosen_lengths"),
        (lambda: ipo_loss(t(1), t(1), beta=0.1, chosen_lengths=t(1)), "rejected_lengths"),
        (lambda: ipo_loss(t(1), t(1), beta=0.1, chosen_lengths=t(1, 2), rejected_lengths=t(1)), "chosen_lengths"),
        (lambda: kto_loss(t(1, 2), torch.tensor([True]), t(0), beta=0.1), "labels"),
        (lambda: kto_loss(t(1), torch.tensor([1]), t(0), beta=0.1), "bool"),
        (lambda: kto_loss(t(1), torch.tensor([True]), t(0, 1), beta=0.1), "z0"),
        (lambda: kto_loss(t(1), torch.tensor([True]), t(0), beta=-1.0), "beta"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
