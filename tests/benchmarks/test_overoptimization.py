"""The exact study: its world against brute force and closed forms, its runs against lorat's losses and update rules."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.studies import mdp, mdp_training, study_tables
from benchmarks.studies.mdp_training import Job
from benchmarks.studies.study import FROZEN, Reference, Run, adaptive, hard, soft
from lorat.methods.losses import dpo_loss, ipo_loss, kto_baseline, kto_loss
from lorat.reference import Hard, Soft

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worlds():
    return mdp.make_worlds([0, 1, 2], steps=40)


@pytest.fixture(scope="module")
def batches(worlds):
    return mdp.draw_pairs(worlds, [0, 1, 2], 24 * 8).view(3, 24, 8, 2).transpose(0, 1)


def train(worlds, batches, references, method="dpo", beta=0.3, lr=0.01, checkpoints=(0, 8, 24)):
    job = Job("fresh", method, beta, tuple(references), lr, checkpoints)
    return mdp_training.train(job, worlds, batches)


# ---------------------------------------------------------------- the world


def test_the_table_is_the_recurrent_policy_and_sums_to_one():
    weights = mdp.fresh_weights(2, torch.Generator().manual_seed(3)).double()
    weights[:, -4:] = torch.tensor([0.5, -1.0, 0.2, 0.0])
    table = mdp.log_table(weights)
    assert table.shape == (2, 1024)
    assert table.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)
    for run in range(2):
        parts = weights[run].split(mdp.SIZES)
        start, recurrent, embedding, head, bias = (p.view(s) for p, s in zip(parts, mdp.SHAPES.values()))
        for index in (0, 1, 77, 600, 1023):
            hidden, expected = start[0].tanh(), 0.0
            for token in mdp.TRAJECTORIES[index].tolist():
                expected += (hidden @ head + bias[0]).log_softmax(0)[token].item()
                hidden = (hidden @ recurrent + embedding[token]).tanh()
            assert table[run, index].item() == pytest.approx(expected, abs=1e-12)


def test_every_trajectory_has_its_index():
    assert (mdp.TRAJECTORIES * 4 ** torch.arange(5)).sum(1).tolist() == list(range(1024))


def test_64_trajectories_are_legal(worlds):
    assert worlds.legal.sum(1).tolist() == [64, 64, 64]
    successors = torch.zeros(4, 4, dtype=torch.bool)
    allowed = {0: (1, 2), 1: (1, 3), 2: (0, 3), 3: (0, 1)}
    for token, after in allowed.items():
        successors[token, list(after)] = True
    for trajectory, broken in zip(mdp.TRAJECTORIES.tolist(), mdp.forbidden_bigrams(successors).tolist()):
        assert broken == sum(b not in allowed[a] for a, b in itertools.pairwise(trajectory))


def test_gold_reward_is_standardised_where_legal_and_low_elsewhere(worlds):
    assert worlds.gold[~worlds.legal].max() == -2 and worlds.gold.min() == -8
    for gold, legal in zip(worlds.gold, worlds.legal):
        assert gold[legal].mean().item() == pytest.approx(0, abs=1e-12)
        assert gold[legal].std(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_a_world_does_not_depend_on_its_company(worlds):
    alone = mdp.make_worlds([1], steps=40)
    assert torch.equal(alone.gold[0], worlds.gold[1]) and torch.equal(alone.legal[0], worlds.legal[1])
    assert (alone.sft_logp[0] - worlds.sft_logp[1]).abs().max() < 1e-4


def test_expectations_against_sums_by_hand(worlds):
    logp = mdp.log_table(mdp.fresh_weights(3, torch.Generator().manual_seed(4)).double())
    found = mdp.expectations(logp, worlds)
    p, q, gold, legal = (x[1].tolist() for x in (logp, worlds.sft_logp, worlds.gold, worlds.legal))
    assert found["gold"][1].item() == pytest.approx(sum(math.exp(a) * r for a, r in zip(p, gold)), abs=1e-10)
    assert found["kl"][1].item() == pytest.approx(sum(math.exp(a) * (a - b) for a, b in zip(p, q)), abs=1e-10)
    assert found["ood"][1].item() == pytest.approx(sum(math.exp(a) for a, ok in zip(p, legal) if not ok), abs=1e-10)
    assert mdp.expectations(worlds.sft_logp, worlds)["kl"].abs().max() < 1e-12


def test_the_frontier_is_optimal(worlds):
    """π ∝ SFT·exp(r/λ) has E[r] − λ·KL = λ·log E_SFT[exp(r/λ)], and no other distribution has more."""
    for inverse in (0.3, 1.0, 4.0):
        best = mdp.frontier(worlds, torch.tensor([inverse], dtype=torch.float64))
        bound = (worlds.sft_logp + inverse * worlds.gold).logsumexp(-1) / inverse
        torch.testing.assert_close(best["gold"][0] - best["kl"][0] / inverse, bound)
        others = torch.randn(50, 3, 1024, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        tilted = worlds.sft_logp + inverse * worlds.gold
        for nearby in (tilted + 0.1 * others, worlds.sft_logp + 0.1 * others):
            found = mdp.expectations(nearby.log_softmax(-1), worlds)
            assert (found["gold"] - found["kl"] / inverse < bound).all()
    start = mdp.frontier(worlds, torch.zeros(1, dtype=torch.float64))
    assert start["kl"].abs().max() < 1e-12


def test_pairs_are_two_draws_from_sft_with_bradley_terry_labels(worlds):
    pairs = mdp.draw_pairs(worlds, [0, 1, 2], 40_000)
    assert (pairs[..., 0] != pairs[..., 1]).all()
    p = worlds.sft_logp[0].exp()
    both = p[:, None] * p / (1 - p[:, None])
    both.fill_diagonal_(0)  # probability of (first, second)
    wins = (both + both.T) * torch.sigmoid(worlds.gold[0][:, None] - worlds.gold[0]) / 1  # (chosen, rejected)
    assert wins.sum().item() == pytest.approx(1, abs=1e-9)
    for side, expected in ((0, wins.sum(1)), (1, wins.sum(0))):
        seen = torch.bincount(pairs[0, :, side], minlength=1024) / 40_000
        error = (seen - expected) / (expected / 40_000).sqrt()
        assert error[expected > 1e-3].abs().max() < 5
        assert seen[worlds.legal[0]].sum().item() == pytest.approx(expected[worlds.legal[0]].sum().item(), abs=0.01)


# ---------------------------------------------------------------- the runs


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_losses_are_lorats(method):
    generator = torch.Generator().manual_seed(6)
    chosen, rejected = (torch.randn(5, 8, generator=generator) + shift for shift in (0.4, -0.2))
    found = mdp_training.batch_losses(method, 0.3, chosen, rejected)
    lengths = torch.full((8,), 5)
    for run in range(5):
        w, l = chosen[run], rejected[run]  # noqa: E741
        if method == "dpo":
            expected = dpo_loss(w, l, beta=0.3).losses
        elif method == "ipo":
            expected = ipo_loss(w, l, beta=0.3, chosen_lengths=lengths, rejected_lengths=lengths).losses
        else:
            both, labels = torch.cat([w, l]), torch.arange(16) < 8
            expected = kto_loss(both, labels, kto_baseline(both.roll(-1)), beta=0.3).losses
        assert found[run].item() == pytest.approx(expected.mean().item(), rel=1e-6)


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_a_run_is_the_same_alone_as_in_company(worlds, batches, method):
    references = [FROZEN, soft(0.3), hard(4), adaptive(0.05)]
    together = train(worlds, batches, references, method)
    for i, reference in enumerate(references):
        alone_world = mdp.Worlds(worlds.gold[1:2], worlds.legal[1:2], worlds.sft[1:2], worlds.sft_logp[1:2])
        alone = train(alone_world, batches[:, 1:2], [reference], method)
        for name in ("gold", "kl", "ood", "lag", "moves"):
            torch.testing.assert_close(alone[name][0, 0], together[name][i, 1], rtol=1e-4, atol=1e-5)


def test_equivalent_references(worlds, batches):
    never = Reference("soft", 0.0)
    runs = train(worlds, batches, [soft(1.0, 4), hard(4), never, FROZEN, adaptive(1e9), soft(0.5, 25), hard(1)])
    for name in ("gold", "kl", "ood"):
        for left, right in ((0, 1), (2, 3), (4, 3), (5, 3)):
            assert torch.equal(runs[name][left], runs[name][right])
        assert not torch.equal(runs[name][1], runs[name][3])
    assert runs["moves"][:, 0].tolist() == [6, 6, 0, 0, 0, 0, 24]
    assert runs["lag"][6].tolist() == [0, 0, 0]


def test_one_step_of_training_by_hand(worlds, batches):
    """Adam's first step is −lr·sign(gradient) up to eps; then a soft update takes `alpha` of the way."""
    policy = worlds.sft.clone().requires_grad_()
    ratios = (mdp.log_table(policy) - mdp.log_table(worlds.sft)).gather(1, batches[0].flatten(1)).view(3, 8, 2)
    sum(dpo_loss(r[:, 0], r[:, 1], beta=0.3).losses.mean() for r in ratios).backward()
    stepped = (worlds.sft - 0.01 * policy.grad / (policy.grad.abs() + 1e-8)).detach()
    found = train(worlds, batches[:1], [FROZEN], checkpoints=(1,))
    expected = mdp.expectations(mdp.log_table(stepped.double()), worlds)
    torch.testing.assert_close(found["kl"][0, :, 0], expected["kl"], rtol=1e-4, atol=1e-6)

    moving = mdp_training.Moving.at([soft(0.25)] * 3, worlds.sft)
    moving.after_step_(1, stepped, torch.zeros(3))
    torch.testing.assert_close(moving.weights, worlds.sft + 0.25 * (stepped - worlds.sft), rtol=0, atol=1e-7)
    torch.testing.assert_close(moving.table, mdp.log_table(moving.weights))
    assert moving.age.tolist() == [0.75] * 3 and moving.moves.tolist() == [0.25] * 3


def test_an_adaptive_reference_moves_past_its_limit_only(worlds):
    moving = mdp_training.Moving.at([adaptive(0.2)] * 3, worlds.sft)
    policy = worlds.sft + 1
    moving.after_step_(1, policy, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(moving.weights[:2], worlds.sft[:2]) and torch.equal(moving.weights[2], policy[2])
    assert moving.age.tolist() == [1, 1, 0]


def test_lag_is_the_measured_mean_age(worlds, batches):
    long = batches.repeat(12, 1, 1, 1)
    runs = train(worlds, long, [soft(0.3), hard(8), soft(0.5, 4)], lr=0.0, checkpoints=(0,))
    assert [r.lag for r in (soft(0.3), hard(8), soft(0.5, 4))] == [Soft(0.3).lag, Hard(8).lag, Soft(0.5, 4).lag]
    assert runs["lag"][:, 0].tolist() == pytest.approx([Soft(0.3).lag, Hard(8).lag, Soft(0.5, 4).lag], rel=0.03)


# ---------------------------------------------------------------- the comparison


def test_reading_at_equal_kl():
    kl = torch.tensor([[0.0, 1.0, 4.0, 2.0], [0.0, 0.25, 0.5, 0.7]], dtype=torch.float64)
    gold = torch.tensor([[0.0, 1.0, 3.0, 9.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    read = study_tables.at_kl(kl, gold, 2.25).tolist()  # √2.25 lies half-way between √1 and √4
    assert read[0] == pytest.approx(2.0) and math.isnan(read[1])


def test_the_path_of_ends_starts_at_sft_and_follows_falling_beta():
    one = torch.ones(2, 1, dtype=torch.float64)
    runs = [
        Run("fresh", "dpo", beta, FROZEN, *(one * torch.tensor([i, x]) for i in range(3)), one[:, 0], one[:, 0])
        for beta, x in ((0.1, 30.0), (1.0, 10.0), (0.3, 20.0))
    ]
    found = study_tables.ends(runs)
    assert {name: path[1].tolist() for name, path in found.items()} == {
        "gold": [0, 10, 20, 30],
        "kl": [1, 10, 20, 30],
        "ood": [2, 10, 20, 30],
    }


def test_the_best_setting_is_chosen_on_the_other_half_of_the_worlds():
    score = torch.tensor([[9.0, 0.0, 9.0, 1.0], [1.0, 2.0, 3.0, 4.0], [math.nan, 50.0, 50.0, 50.0]])
    gold, other = study_tables.picked_elsewhere(score, score * 10)
    assert gold.tolist() == [1, 0, 3, 1] and other.tolist() == [10, 0, 30, 10]
    assert study_tables.paired(torch.tensor([1.0, 2.0, 3.0])) == {"mean": 2.0, "se": pytest.approx(1 / math.sqrt(3))}


def test_decades_of_beta_that_are_good():
    gold = {0.01: 0.0, 0.1: 2.0, 1.0: 1.0, 10.0: 0.0}
    assert study_tables.good_decades(gold, 1.5) == pytest.approx(0.25 + 0.5)
    assert study_tables.good_decades(gold, 1.0) == pytest.approx(0.5 + 1.0)
    assert study_tables.good_decades(gold, 0.0) == pytest.approx(3.0) and study_tables.good_decades(gold, 3.0) == 0


def test_the_command_gives_the_same_numbers_again(tmp_path):
    found = []
    for name, workers in (("a", "1"), ("b", "2")):
        out = tmp_path / f"{name}.json"
        asked = ["--toy", "--methods", "dpo", "--workers", workers, "--out", str(out)]
        command = [sys.executable, "-m", "benchmarks.studies.overoptimization", *asked]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        printed, written = json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())
        assert printed["commit"] and printed["results"] == written["results"]
        assert "NaN" not in out.read_text()
        found.append((written["results"], written["runs"]))
    assert found[0] == found[1]
    assert set(found[0][0]) == {"sft", "frontier", "fresh dpo", "few dpo"}
    assert len(found[0][1]) == 2 * (2 * 6 + 1)
