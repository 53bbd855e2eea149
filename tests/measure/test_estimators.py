"""Estimators against enumeration and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lorat.measure.estimators import calibration, distinct, estimate, self_bleu, token_kl


def test_the_standard_error_of_independent_values():
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])
    mean, error = estimate(x)
    assert mean == 4.0
    assert error == pytest.approx(x.double().std().item() / 2)
    assert estimate(x, [0, 1, 2, 3]).error == pytest.approx(error)


def test_the_standard_error_of_clusters_by_hand():
    # clusters (1, 3) and (5, 11): mean 5, sums of deviations −6 and 6: 2/1 · (36 + 36) / 16 = 9
    assert estimate(torch.tensor([1.0, 3.0, 5.0, 11.0]), ["a", "a", "b", "b"]) == pytest.approx((5.0, 3.0))
    # four copies of each of 3 values know no more than the 3 values
    x = torch.tensor([1.0, 2.0, 6.0])
    assert estimate(x.repeat(4), [0, 1, 2] * 4).error == pytest.approx(estimate(x).error)
    assert estimate(x.repeat(4)).error < 0.6 * estimate(x).error


def test_the_standard_error_covers_what_it_should():
    """400 experiments of 30 clusters of 5: the errors' mean square is the variance of the means."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, 1, generator=draw) + 0.5 * torch.randn(400, 30, 5, generator=draw)
    clusters = [g for g in range(30) for _ in range(5)]
    got = [estimate(row.flatten(), clusters) for row in x]
    means = torch.tensor([e.mean for e in got])
    square = sum(e.error**2 for e in got) / len(got)
    assert square == pytest.approx((1 + 0.25 / 5) / 30, rel=0.1)
    assert square == pytest.approx(means.var().item(), rel=0.25)


def test_one_value_says_nothing_of_its_error():
    assert estimate(torch.tensor([3.0])).mean == 3.0 and math.isnan(estimate(torch.tensor([3.0])).error)
    assert estimate(torch.tensor([1.0, 3.0]), ["a", "a"]).error == pytest.approx(1.0)  # one cluster: as if independent
    with pytest.raises(ValueError, match="no values"):
        estimate(torch.zeros(0))


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    """Predictions of 0.75 and 0.65 that are right, of 0.75 the wrong way round, and a coin."""
    fit = calibration(torch.tensor([logit(0.75), logit(0.65), -logit(0.75), 0.0]), bins=5)
    assert [b.pairs for b in fit.table] == [1, 1, 2]
    assert fit.ece == pytest.approx((abs(0.5 - 0.5) + abs(1 - 0.65) + 2 * abs(0.5 - 0.75)) / 4)
    assert fit.brier == pytest.approx((0.25**2 + 0.35**2 + 0.75**2 + 0.5**2) / 4)
    assert fit.log_loss == pytest.approx(-sum(map(math.log, (0.75, 0.65, 0.25, 0.5))) / 4)


def test_a_reliability_table_by_hand():
    confident = torch.tensor([logit(0.95)] * 3 + [-logit(0.95)])  # sure at 95 %, right at 75 %
    unsure = torch.tensor([logit(0.55), -logit(0.55)])
    fit = calibration(torch.cat([confident, unsure]), bins=5)
    first, last = fit.table
    assert (first.low, first.high, first.pairs) == pytest.approx((0.5, 0.6, 2))
    assert (first.confidence, first.accuracy) == pytest.approx((0.55, 0.5))
    assert (last.low, last.high, last.pairs) == pytest.approx((0.9, 1.0, 4))
    assert (last.confidence, last.accuracy) == pytest.approx((0.95, 0.75))
    assert fit.ece == pytest.approx((2 * 0.05 + 4 * 0.20) / 6)


def test_a_calibrated_predictor_has_no_calibration_error():
    draw = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(200_000, generator=draw)
    right = torch.rand(len(margins), generator=draw) < margins.sigmoid()
    fit = calibration(torch.where(right, margins, -margins))
    assert fit.ece < 0.005
    assert calibration(3 * torch.where(right, margins, -margins)).ece > 0.05  # three times too sure
    assert calibration(torch.tensor([1e4, -1e4])).log_loss == pytest.approx(5e3)  # no overflow


def test_token_kl_by_enumeration():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    p[0, 2] = -torch.inf  # impossible under p: adds nothing
    a, b = p.softmax(-1), q.softmax(-1)
    by_hand = [sum(a[i, v] * math.log(a[i, v] / b[i, v]) for v in range(7) if a[i, v] > 0) for i in range(5)]
    torch.testing.assert_close(token_kl(p, q), torch.tensor(by_hand, dtype=torch.float64))
    assert (token_kl(p, p) == 0).all()


def test_small_divergences_survive_float32():
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(50, 30_000, generator=draw, dtype=torch.float64)
    q = p + 1e-3 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(token_kl(p.float(), q.float()).double(), token_kl(p, q), rtol=2e-2, atol=0)


def test_distinct_by_hand():
    said = [["a", "b", "a", "b"], ["a", "c"]]
    assert distinct(said, 1) == 3 / 6  # a b c of six
    assert distinct(said, 2) == 3 / 4  # ab ba (ab) ac
    assert distinct(said, 3) == 2 / 2  # aba bab
    assert math.isnan(distinct(said, 5))


def test_self_bleu():
    pytest.importorskip("sacrebleu")
    same = self_bleu(["the cat sat on the mat ."] * 4)
    other = self_bleu(["the cat sat on the mat .", "a dog runs in parks daily !", "no birds sing here now ,"])
    assert same == pytest.approx(100) and other < 10
    half = self_bleu(["the cat sat on the mat .", "the cat sat on the mat .", "q w e r t y"])
    assert other < half < same
    assert math.isnan(self_bleu(["alone"]))
    many = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}" for i in range(30)]
    assert self_bleu(many, limit=5, seed=1) == self_bleu(many, limit=5, seed=1) != self_bleu(many)
