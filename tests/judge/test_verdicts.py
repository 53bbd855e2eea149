"""Win rates: closed forms, an independent fit, and intervals that cover what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorat.judge.verdicts import RIDGE, length_controlled, logistic_fit, preference, win_rate


@pytest.mark.parametrize(
    ("straight", "swapped", "expected"),
    [
        ("A", "B", 1.0),  # the first model in both orders
        ("B", "A", 0.0),
        ("A", "A", 0.5),  # the place, not the model
        ("B", "B", 0.5),
        ("tie", "tie", 0.5),
        ("A", "tie", 0.75),
        ("tie", "A", 0.25),
        (None, "B", None),
        ("A", None, None),
    ],
)
def test_a_preference_from_both_orders(straight, swapped, expected):
    assert preference(straight, swapped) == expected


def test_the_interval_is_the_quantiles_of_the_binomial():
    """For wins and losses alone a resampled mean is Binomial(n, p)/n, so its quantiles are known exactly."""
    n, wins = 80, 52
    rate = win_rate([1.0] * wins + [0.0] * (n - wins), resamples=200_000)
    p, total, quantiles = wins / n, 0.0, []
    for k in range(n + 1):
        before, total = total, total + math.comb(n, k) * p**k * (1 - p) ** (n - k)
        quantiles += [k / n] * ((before < 0.025 <= total) + (before < 0.975 <= total))
    assert (rate.value, rate.method) == (0.65, "bootstrap")
    assert [rate.low, rate.high] == pytest.approx(quantiles, abs=1e-12)


def test_samples_of_one_prompt_are_drawn_together():
    """Ten equal samples of each prompt say no more than one does, and the same draws give the same interval."""
    once = [1.0, 0.0, 0.5, 1.0, 0.75, 0.0, 1.0, 1.0]
    single = win_rate(once, seed=3)
    tenfold = win_rate(np.repeat(once, 10), np.repeat(np.arange(8), 10), seed=3)
    assert tenfold == single
    alone = win_rate(np.repeat(once, 10), seed=3)
    assert alone.high - alone.low < 0.5 * (single.high - single.low)


def test_prompts_with_more_samples_weigh_more_but_are_one_draw():
    rate = win_rate([1.0, 1.0, 1.0, 0.0], [7, 7, 7, 2], resamples=100)
    assert rate.value == 0.75 and (rate.low, rate.high) == (0.0, 1.0)  # a resample may hold one prompt alone


@pytest.mark.parametrize("y", [0.0, 0.5, 1.0])
def test_where_every_prompt_ends_alike_the_interval_is_wilsons(y):
    """Its ends are the shares p0 that a normal test of y against p0 just does not reject."""
    n, z = 30, 1.959963984540054
    rate = win_rate([y] * n)
    assert rate.method == "wilson" and rate.value == y
    for end in {rate.low, rate.high} - {0.0, 1.0}:
        assert abs(y - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(z, rel=1e-9)
    assert (rate.low == 0) == (y == 0) and (rate.high == 1) == (y == 1)


def test_the_interval_covers_the_true_win_rate():
    """95 % intervals of 2,000 simulated comparisons of 200 prompts with ties and contradictions."""
    values, chances = np.array([0, 0.25, 0.5, 0.75, 1]), np.array([0.2, 0.05, 0.25, 0.1, 0.4])
    rng, held = np.random.default_rng(0), 0
    for seed in range(2000):
        rate = win_rate(rng.choice(values, 200, p=chances), resamples=1000, seed=seed)
        held += rate.low <= values @ chances <= rate.high
    assert 0.92 <= held / 2000 <= 0.98


def test_the_fit_is_the_maximum_of_its_likelihood():
    """Against torch's own loss and L-BFGS, in float64, with fractional preferences and weights."""
    rng = np.random.default_rng(1)
    x, y = np.tanh(rng.normal(size=60)), rng.choice([0, 0.25, 0.5, 0.75, 1], 60)
    weights = rng.integers(0, 4, (3, 60)).astype(float)
    for w, found in zip(weights, logistic_fit(x, y, weights), strict=True):
        params = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        tx, ty, tw = (torch.tensor(v) for v in (x, y, w))
        optimizer = torch.optim.LBFGS(
            [params], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def loss(params=params, tx=tx, ty=ty, tw=tw, optimizer=optimizer):
            optimizer.zero_grad()
            logits = params[0] + params[1] * tx
            out = torch.nn.functional.binary_cross_entropy_with_logits(logits, ty, tw, reduction="sum")
            out = out + RIDGE / 2 * params.square().sum()
            out.backward()
            return out

        optimizer.step(loss)
        assert found == pytest.approx(params.detach().numpy(), abs=1e-7)


def test_a_judge_that_only_likes_length_gives_one_half_at_equal_length():
    """Wins sigma(2 tanh(d/std)) whoever wrote it, and the first model mostly writes more: raw far above 50 %."""
    d = np.array([-300.0, -100, 100, 200, 300, 400, 500, 600])
    y = 1 / (1 + np.exp(-2 * np.tanh(d / d.std())))
    rate = length_controlled(y, d, resamples=200)
    assert y.mean() > 0.65 and rate.value == pytest.approx(0.5, abs=1e-3)  # the ridge
    flipped = length_controlled(1 - y, -d, resamples=200)
    assert flipped.value == pytest.approx(1 - rate.value, abs=1e-9)


def test_the_length_controlled_interval_covers_its_truth():
    """600 simulated comparisons: a model better at equal length (62 %), that writes shorter answers."""
    rng, held, raw, truth = np.random.default_rng(2), 0, [], 1 / (1 + math.exp(-0.5))
    for seed in range(600):
        d = rng.normal(-250, 400, 150)
        p = 1 / (1 + np.exp(-(0.5 + 1.5 * np.tanh(d / d.std()))))
        y = (rng.random(150) < p).astype(float)
        rate = length_controlled(y, d, resamples=300, seed=seed)
        held += rate.low <= truth <= rate.high
        raw.append(y.mean())
    assert np.mean(raw) < 0.53 and 0.92 <= held / 600 <= 0.98


def test_where_lengths_say_nothing():
    y = [1.0, 0.0, 1.0, 0.5]
    assert length_controlled(y, [0, 0, 0, 0]) == win_rate(y, resamples=2000)
    assert length_controlled(y, [5, 5, 5, 5]) is None  # length and model cannot be told apart
    assert length_controlled([1.0, 1.0], [5, -9]) == win_rate([1.0, 1.0])
    separated = length_controlled([1.0, 1.0, 0.0, 0.0], [9, 8, -9, -8], resamples=50)
    assert 0 < separated.low <= separated.value <= separated.high < 1
    assert separated.value == pytest.approx(0.5, abs=0.02)


def test_samples_of_one_prompt_are_drawn_together_when_length_is_controlled_too():
    d, y = np.array([-50.0, 10, 90, -20, 5, 60]), np.array([0.0, 1, 1, 0, 1, 0.5])
    single, threefold = length_controlled(y, d), length_controlled(np.tile(y, 3), np.tile(d, 3), np.tile(range(6), 3))
    assert [threefold.low, threefold.high] == pytest.approx(
        [single.low, single.high], abs=2e-3
    )  # the ridge weighs less


@pytest.mark.parametrize("arguments", [([],), ([1.0, 0.0], [0])])
def test_input_that_does_not_fit_is_refused(arguments):
    with pytest.raises(ValueError, match="give"):
        win_rate(*arguments)
    with pytest.raises(ValueError, match="one each"):
        length_controlled([1.0, 0.0], [3])
