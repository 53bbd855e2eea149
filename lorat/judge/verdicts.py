"""From a judge's verdicts to a win rate, with and without control for length. Pure numbers: numpy alone.

Each prompt is judged in both orders; a preference is the mean of the two, 1 for a win of the first model, 0 for a loss,
0.5 for a tie or for two verdicts that contradict each other. Intervals are percentile bootstraps over prompts: samples
of one prompt are drawn together. Left out: the judge's own error, which no interval over prompts can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["A", "B", "tie"]  # of the two answers as they were shown
SCORES: dict[str, float] = {"A": 1.0, "tie": 0.5, "B": 0.0}
FEW = 50  # pairs; with fewer a rate says so
RIDGE = 1e-3  # keeps a fit finite where one model wins every time; with 100 prompts below 1e-4 of a win rate


@dataclass(frozen=True)
class Rate:
    """A win rate in [0, 1] and its interval; `method`: bootstrap, or wilson where no two prompts differ."""

    value: float
    low: float
    high: float
    method: str


def thin(judged: int, pairs: int) -> str:
    """What to say behind a rate from few of the pairs, or from few in all; else nothing.

    Half: what was left out may then decide the rate. `FEW`: docs/judging.md has how often the intervals hold there.
    """
    if 2 * judged < pairs:
        return f", from only {judged:,} of {pairs:,} pairs"
    return f", from only {judged:,} pairs" if judged < FEW else ""


def preference(straight: Verdict | None, swapped: Verdict | None) -> float | None:
    """Of a prompt, from the verdict with the first model shown first and the one with it shown second.

    None if either could not be read: one order alone carries the judge's liking for a position.
    """
    if straight is None or swapped is None:
        return None
    return (SCORES[straight] + 1 - SCORES[swapped]) / 2


def win_rate(
    preferences: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Rate:
    """Mean of `preferences` (n,), and its bootstrap interval over `groups` (n,), the prompts' numbers (default: each its own).

    Resampling groups with replacement is a multinomial draw over the distinct (sum, count) pairs, which is what is
    drawn here: the cost does not grow with n. Raises `ValueError` without preferences.
    """
    y, g, count = _checked(preferences, groups)
    if np.ptp(y) == 0:
        return Rate(float(y[0]), *_wilson(float(y[0]), count, level), "wilson")
    totals = np.stack([np.bincount(g, y, count), np.bincount(g, minlength=count)], 1)
    kinds, often = np.unique(totals, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(count, often / count, resamples) @ kinds  # (resamples, 2)
    return Rate(float(y.mean()), *_percentiles(drawn[:, 0] / drawn[:, 1], level), "bootstrap")


def length_controlled(
    preferences: Sequence[float] | np.ndarray,
    differences: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray | None = None,
    resamples: int = 2_000,
    level: float = 0.95,
    seed: int = 0,
) -> Rate | None:
    """The win rate at equal length: sigma(theta) of `logit P(win) = theta + phi*tanh(d / std(d))`, d (n,) in characters.

    After AlpacaEval 2 (arXiv 2404.04475, eq. 2), without its term for the difficulty of each instruction, which needs
    many models. Preferences between 0 and 1 count as soft labels. None where length and model cannot be told apart:
    every difference is the same and not 0.
    """
    y, g, count = _checked(preferences, groups)
    d = np.asarray(differences, float)
    if d.shape != y.shape:
        raise ValueError(f"{len(d)} length differences for {len(y)} preferences; give one each.")
    if np.ptp(y) == 0 or not d.any():  # nothing to explain, or nothing to explain it with
        return win_rate(y, g, resamples, level, seed)
    if np.ptp(d) == 0:
        return None
    x = np.tanh(d / d.std())
    rng, drawn = np.random.default_rng(seed), []
    rows = max(1, 2_000_000 // max(count, len(y)))  # of weights at a time
    for begin in range(0, resamples, rows):
        times = rng.multinomial(count, np.full(count, 1 / count), min(rows, resamples - begin))
        drawn.append(logistic_fit(x, y, times[:, g])[:, 0])
    theta = logistic_fit(x, y, np.ones((1, len(y))))[0, 0]
    return Rate(float(_sigmoid(theta)), *_percentiles(_sigmoid(np.concatenate(drawn)), level), "bootstrap")


def logistic_fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """(theta, phi) of `P = sigma(theta + phi*x)` for each row of `weights` (b, n): returns (b, 2).

    Maximises `sum_i w_i (y_i log P_i + (1-y_i) log(1-P_i)) - ridge/2 (theta^2 + phi^2)` by Newton's method, all rows at
    once; steps are held to length 2, so that a first step cannot overshoot.
    """
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(100):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        residual, curvature = weights * (y - p), weights * p * (1 - p)
        g0, g1 = residual.sum(1) - ridge * theta, residual @ x - ridge * phi
        h00, h01, h11 = curvature.sum(1) + ridge, curvature @ x, curvature @ (x * x) + ridge
        determinant = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        shorter = np.minimum(1, 2 / np.maximum(np.hypot(step0, step1), 1e-300))
        theta, phi = theta + shorter * step0, phi + shorter * step1
        if np.hypot(step0, step1).max() < 1e-10:
            break
    return np.stack([theta, phi], 1)


def _checked(preferences, groups) -> tuple[np.ndarray, np.ndarray, int]:
    """`(preferences, group numbers from 0, number of groups)`."""
    y = np.asarray(preferences, float)
    if not len(y):
        raise ValueError("there are no preferences to average; give at least one.")
    g = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if g.shape != y.shape:
        raise ValueError(f"{len(g)} groups for {len(y)} preferences; give one each.")
    return y, g, int(g.max()) + 1


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The interval that holds the middle `level` of `(resamples,)` values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _wilson(p: float, n: int, level: float) -> tuple[float, float]:
    """Wilson's score interval for a share `p` of `n` (Wilson 1927): where resampling knows no other outcome."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Element by element, any shape; no overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))
