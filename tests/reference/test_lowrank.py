"""Low-rank algebra against dense float64 arithmetic: exact where the rank allows it, Eckart–Young where not."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from lorat.reference import lowrank
from lorat.reference.lowrank import Factors, differences, factor_error, mix_, recompress


def factors(out, width, rank, seed, dtype=torch.float32, scale=1.0, b=1.0, a=1.0):
    g = torch.Generator().manual_seed(seed)
    return Factors(
        (b * torch.randn(out, rank, generator=g, dtype=torch.float64)).to(dtype),
        (a * torch.randn(rank, width, generator=g, dtype=torch.float64)).to(dtype),
        scale,
    )


def dense(f):
    return f.scale * f.b.double() @ f.a.double()


def mixed(terms):
    return sum(w * dense(f) for w, f in terms)


def missing(exact, rank):
    """Relative Frobenius norm of what the best approximation of `rank` lacks."""
    s = torch.linalg.svdvals(exact).square()
    return math.sqrt(s[rank:].sum() / s.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [8, 11])
def test_a_mix_that_fits_is_exact(dtype, rank):
    """Ranks 3 and 5 into 8 or 11, other scales on each: one rounding of the factors is all that is left."""
    terms = [(0.3, factors(40, 30, 3, 1, dtype, 2.0)), (0.7, factors(40, 30, 5, 2, dtype, 0.25))]
    target = factors(40, 30, rank, 3, dtype, 4.0)
    error = mix_([target], [terms])
    exact = mixed(terms)
    eps = torch.finfo(dtype).eps
    assert (dense(target) - exact).norm() <= 4 * eps * exact.norm()
    assert error.item() <= 1e-7
    assert not target.b[:, 8:].any() and not target.a[8:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_mix_that_does_not_fit_is_the_best_approximation_and_says_what_it_lacks(dtype):
    terms = [(0.6, factors(50, 33, 4, 1, dtype, 2.0)), (0.4, factors(50, 33, 4, 2, dtype, 2.0))]
    target = factors(50, 33, 4, 3, dtype, 2.0)
    error = mix_([target], [terms]).item()
    exact = mixed(terms)
    best = missing(exact, 4)
    assert error == pytest.approx(best, rel=1e-6)
    u, s, vh = torch.linalg.svd(exact)
    approximation = u[:, :4] * s[:4] @ vh[:4]
    assert (dense(target) - approximation).norm() <= max(4 * torch.finfo(dtype).eps, 1e-12) * exact.norm()


def test_the_error_is_that_of_all_layers_together():
    """Different shapes and ranks in one call; root of summed squares over root of summed squares."""
    shapes = [(20, 30, 2, 2), (20, 30, 2, 2), (30, 20, 2, 2), (16, 16, 3, 2), (20, 30, 2, 4)]
    terms, targets, lost, total = [], [], 0.0, 0.0
    for i, (out, width, source_rank, rank) in enumerate(shapes):
        row = [(0.5, factors(out, width, source_rank, 10 + i)), (0.5, factors(out, width, rank, 20 + i, a=2.0**i))]
        exact = mixed(row)
        s = torch.linalg.svdvals(exact).square()
        lost, total = lost + s[rank:].sum().item(), total + s.sum().item()
        terms.append(row)
        targets.append(factors(out, width, rank, 30 + i))
    exacts = [mixed(row) for row in terms]
    assert mix_(targets, terms).item() == pytest.approx(math.sqrt(lost / total), rel=1e-6)
    for target, exact, (_, _, _, rank) in zip(targets, exacts, shapes):
        assert (dense(target) - exact).norm() / exact.norm() == pytest.approx(missing(exact, rank), abs=1e-6)


HARD = {
    "close factors": lambda: (f := factors(60, 50, 4, 1), Factors(f.b + 1e-5, f.a - 1e-5, 1.0)),
    "the same A": lambda: (f := factors(60, 50, 4, 1), Factors(factors(60, 50, 4, 2).b, f.a.clone(), 1.0)),
    "the same B": lambda: (f := factors(60, 50, 4, 1), Factors(f.b.clone(), factors(60, 50, 4, 2).a, 1.0)),
    "one adapter twice": lambda: (f := factors(60, 50, 4, 1), Factors(f.b.clone(), f.a.clone(), 1.0)),
    "one B is zero": lambda: (factors(60, 50, 4, 1), factors(60, 50, 4, 2, b=0.0)),
    "one A is zero": lambda: (factors(60, 50, 4, 1), factors(60, 50, 4, 2, a=0.0)),
    "tiny B": lambda: (factors(60, 50, 4, 1, b=1e-9), factors(60, 50, 4, 2, b=1e-9)),
    "unbalanced components": lambda: (
        f := factors(60, 50, 4, 1),
        Factors(f.b * torch.tensor([1e6, 1.0, 1e-6, 1e3]), f.a * torch.tensor([[1e-6], [1.0], [1e6], [1e-3]]), 1.0),
    ),
    "rank beyond the layer": lambda: (factors(6, 5, 4, 1), factors(6, 5, 4, 2)),
}


@pytest.mark.parametrize("case", HARD)
def test_singular_and_badly_scaled_gram_matrices(case):
    """Exact to 1e-5 at the sum of the ranks, as near as Eckart–Young allows plus 1e-5 at half of it."""
    p, r = HARD[case]()
    for rank in (8, 4):
        target = factors(p.b.shape[0], p.a.shape[1], rank, 3)
        terms = [(0.4, p), (0.6, r)]
        exact = mixed(terms)
        error = mix_([target], [terms]).item()
        best = missing(exact, rank) if rank < min(exact.shape) else 0.0
        got = ((dense(target) - exact).norm() / exact.norm()).item()
        assert got <= best + 1e-6, (rank, got, best)
        assert abs(error - best) <= 1e-6


def test_nothing_stays_nothing_and_finite():
    """Both B zero, as before the first step: B is exactly 0 and A usable; both A zero: all 0."""
    p, r = factors(20, 30, 3, 1, b=0.0), factors(20, 30, 3, 2, b=0.0)
    target = factors(20, 30, 3, 3)
    assert mix_([target], [[(0.5, p), (0.5, r)]]).item() == 0.0
    assert not target.b.any()
    torch.testing.assert_close(target.a @ target.a.T, torch.eye(3), rtol=0, atol=1e-5)
    p, r = factors(20, 30, 3, 1, a=0.0), factors(20, 30, 3, 2, a=0.0)
    assert mix_([target], [[(0.5, p), (0.5, r)]]).item() == 0.0
    assert not dense(target).any() and target.a.isfinite().all() and target.b.isfinite().all()


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_before_anything_is_written(side, value):
    good, bad = factors(10, 12, 2, 1), factors(30, 12, 2, 2)
    getattr(bad, side)[0, 0] = value
    targets = [factors(10, 12, 2, 3), factors(30, 12, 2, 4)]
    before = [t.b.clone() for t in targets]
    with pytest.raises(ValueError, match="not finite"):
        mix_(targets, [[(0.5, good), (0.5, good)], [(0.5, bad), (0.5, bad)]])
    assert all(torch.equal(t.b, b) for t, b in zip(targets, before))


def test_the_factors_come_out_balanced():
    """A has orthogonal rows of one length, the root of the largest singular value; B carries the singular values."""
    p, r = factors(40, 30, 3, 1), factors(40, 30, 3, 2)
    target = factors(40, 30, 6, 3, torch.float64)
    mix_([target], [[(0.5, p), (0.5, r)]])
    s = torch.linalg.svdvals(mixed([(0.5, p), (0.5, r)]))[:6]
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(target.a @ target.a.T, s[0] * eye, rtol=0, atol=1e-6 * s[0].item())
    torch.testing.assert_close(target.b.T @ target.b, torch.diag(s.square() / s[0]), rtol=0, atol=1e-6 * s[0].item())


def test_equal_input_gives_equal_bits_whatever_the_workspace(monkeypatch):
    def outcome():
        terms = [[(0.6, factors(24, 18, 3, i)), (0.4, factors(24, 18, 3, 50 + i))] for i in range(7)]
        targets = [factors(24, 18, 3, 100 + i) for i in range(7)]
        error = mix_(targets, terms)
        return [error, *(t.b for t in targets), *(t.a for t in targets)]

    first = outcome()
    assert all(torch.equal(x, y) for x, y in zip(first, outcome()))
    monkeypatch.setattr(lowrank, "WORKSPACE", 2 * 8 * (24 + 18) * 6)  # two layers at a time
    for x, y in zip(first, outcome()):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_recompress_by_hand():
    """L = R = I of two components with singular values 3 and 4: rank 1 keeps 4 and loses 3² of 3² + 4²."""
    gram = torch.diag(torch.tensor([9.0, 16.0], dtype=torch.float64))[None]
    x, y, lost, total = recompress(gram, torch.eye(2, dtype=torch.float64)[None], 1)
    assert lost.item() == pytest.approx(9, rel=1e-9) and total.item() == pytest.approx(25, rel=1e-12)
    torch.testing.assert_close(
        x @ y, torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))[None], rtol=0, atol=1e-9
    )


def test_what_is_no_gram_matrix_is_refused():
    indefinite = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    with pytest.raises(ValueError, match="no decomposition"):
        recompress(torch.eye(2, dtype=torch.float64)[None], indefinite, 1)


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-6])
def test_differences_are_those_of_the_dense_matrices(gap):
    """Also of close adapters: in float64 storage the difference keeps its digits."""
    one = [factors(20, 30, 3, i, torch.float64, 2.0) for i in range(3)] + [factors(8, 9, 2, 9, torch.float64)]
    two = [Factors(f.b + gap * 0.5, f.a - gap * 0.25, f.scale) for f in one]
    two[1] = Factors(torch.nn.functional.pad(two[1].b, (0, 2)), torch.nn.functional.pad(two[1].a, (0, 0, 0, 2)), 2.0)
    apart, size = differences(one, two)
    exact = sum((dense(x) - dense(y)).square().sum().item() for x, y in zip(one, two))
    assert apart.item() == pytest.approx(exact, rel=1e-7)
    assert size.item() == pytest.approx(sum(dense(x).square().sum().item() for x in one), rel=1e-10)
    assert differences(one, one)[0].item() == 0.0


def test_the_error_of_mixing_factors_is_the_derived_term():
    p, r = factors(20, 30, 3, 1, torch.float64, 2.0), factors(20, 30, 5, 2, torch.float64, 0.5)
    alpha = 0.3
    b = torch.nn.functional.pad(p.b * 4, (0, 2))  # in the scale of the other, to its rank
    a = torch.nn.functional.pad(p.a, (0, 0, 0, 2))
    made = 0.5 * (alpha * b + (1 - alpha) * r.b) @ (alpha * a + (1 - alpha) * r.a)
    exact = mixed([(alpha, p), (1 - alpha, r)])
    assert factor_error(alpha, [p], [r]).item() == pytest.approx(
        ((made - exact).norm() / exact.norm()).item(), rel=1e-9
    )


def test_repeated_calls_hold_no_memory():
    """As many tensors are alive after fifty mixes as after one."""
    p, target = factors(24, 18, 3, 1), factors(24, 18, 3, 2)
    counts = []
    for times in (1, 50):
        for _ in range(times):
            mix_([target], [[(0.1, p), (0.9, target)]])
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert counts[1] == counts[0]
