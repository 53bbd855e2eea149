"""A token MDP in which nothing is estimated: vocabulary 4, length 5, so 1,024 trajectories, all of them enumerated.

Each token has two legal successors, so 4·2⁴ = 64 trajectories are legal. The policy is a small recurrent network; its
distribution over all trajectories is one pass over the tree of 341 prefixes. Expected reward, KL and out-of-distribution
mass are sums over that table, in float64.

Many policies at once: weights are `(R, P)`, one row a run, and nothing mixes rows, so a run gives the same numbers alone
as in company. One world (its legal bigrams, its gold reward, its SFT policy) a seed; `S` worlds are stacked.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB, LENGTH, HIDDEN = 4, 5, 12
TRAJECTORIES = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH))).flip(1)  # (1024, 5); index Σ y_t·4^t
SHAPES = {
    "start": (1, HIDDEN),
    "recurrent": (HIDDEN, HIDDEN),
    "embedding": (VOCAB, HIDDEN),
    "head": (HIDDEN, VOCAB),
    "bias": (1, VOCAB),
}
SIZES = [rows * columns for rows, columns in SHAPES.values()]
PENALTY = 2.0  # gold reward is −PENALTY for each forbidden bigram; where legal it has mean 0 and standard deviation 1


def log_table(weights: Tensor) -> Tensor:
    """Log-probability of every trajectory: `weights: (R, P)`; returns `(R, 1024)` nats, differentiable, same dtype.

    `h₀ = tanh(start)`, `h_{t+1} = tanh(recurrentᵀ·h_t + embedding[y_t])`, `π(y_t | y_<t) = softmax(headᵀ·h_t + bias)`.
    """
    runs = len(weights)
    parts = zip(SHAPES.values(), weights.split(SIZES, 1), strict=True)
    start, recurrent, embedding, head, bias = (flat.view(runs, *shape).transpose(1, 2) for shape, flat in parts)
    hidden = [start.tanh()]  # (R, H, 4^t): one column a prefix
    for _ in range(LENGTH - 1):
        moved = torch.bmm(recurrent, hidden[-1]).unsqueeze(2) + embedding.unsqueeze(3)  # (R, H, 4, 4^t)
        hidden.append(moved.tanh_().flatten(2))
    steps = torch.baddbmm(bias, head, torch.cat(hidden, 2)).log_softmax(1)  # (R, 4, 341)
    logp = weights.new_zeros(runs, 1)
    for step in steps.split([VOCAB**t for t in range(LENGTH)], 2):
        logp = (logp.unsqueeze(1) + step).flatten(1)  # the next token is the slow index
    return logp


def fresh_weights(runs: int, generator: torch.Generator) -> Tensor:
    """`(R, P)` float32: normal, standard deviation 0.5 for the matrices, bias 0."""
    weights = 0.5 * torch.randn(runs, sum(SIZES), generator=generator)
    weights[:, -SIZES[-1] :] = 0
    return weights


def forbidden_bigrams(successors: Tensor) -> Tensor:
    """`successors: (4, 4)` bool, true where a bigram is legal; returns `(1024,)` how many a trajectory breaks."""
    return (~successors[TRAJECTORIES[:, :-1], TRAJECTORIES[:, 1:]]).sum(1)


@dataclass
class Worlds:
    """S worlds: `gold: (S, 1024)` float64; `legal: (S, 1024)` bool; `sft: (S, P)` float32 weights."""

    gold: Tensor
    legal: Tensor
    sft: Tensor
    sft_logp: Tensor  # (S, 1024) float64


def make_worlds(
    seeds: list[int], *, demonstrations: int = 512, noise: float = 0.05, steps: int = 300, lr: float = 0.02
) -> Worlds:
    """One world a seed, each from its own generator, whatever the others are.

    Gold reward: where legal a random score for each bigram and each (position, token), standardised over the 64 legal
    trajectories; where illegal −`PENALTY` for each forbidden bigram, whatever the score. Demonstrations: uniform over the legal trajectories, each token then
    replaced by a uniform one with probability `noise`; SFT is full-batch Adam on their cross-entropy.
    """
    gold, legal, counts, start = [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(7919 * seed + 1)
        successors = torch.rand(VOCAB, VOCAB, generator=generator).argsort(1) < 2  # two legal successors a token
        broken = forbidden_bigrams(successors)
        bigram = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        token = torch.randn(LENGTH, VOCAB, generator=generator, dtype=torch.float64)
        score = bigram[TRAJECTORIES[:, :-1], TRAJECTORIES[:, 1:]].sum(1)
        score += token[torch.arange(LENGTH), TRAJECTORIES].sum(1)
        score = (score - score[broken == 0].mean()) / score[broken == 0].std(correction=0)
        gold.append(torch.where(broken == 0, score, -PENALTY * broken))
        legal.append(broken == 0)
        shown = (broken == 0).nonzero()[:, 0]
        drawn = TRAJECTORIES[shown[torch.randint(len(shown), (demonstrations,), generator=generator)]]
        replace = torch.rand(drawn.shape, generator=generator) < noise
        drawn = torch.where(replace, torch.randint(VOCAB, drawn.shape, generator=generator), drawn)
        index = (drawn * VOCAB ** torch.arange(LENGTH)).sum(1)
        counts.append(torch.bincount(index, minlength=len(TRAJECTORIES)).float() / demonstrations)
        start.append(fresh_weights(1, generator)[0])
    weights = torch.stack(start).requires_grad_()
    frequency = torch.stack(counts)
    optimizer = torch.optim.Adam([weights], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(frequency * log_table(weights)).sum()).backward()
        optimizer.step()
    sft = weights.detach()
    return Worlds(torch.stack(gold), torch.stack(legal), sft, log_table(sft.double()))


def draw_pairs(worlds: Worlds, seeds: list[int], pairs: int, temperature: float = 1.0) -> Tensor:
    """`(S, pairs, 2)` trajectory indices, chosen first: two different draws from SFT, labelled with Bradley-Terry noise.

    P(first is chosen) = σ((gold(first) − gold(second)) / temperature). The second draw skips the first's stretch of the
    cumulative distribution, so it is SFT conditioned on another trajectory.
    """
    out = []
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(7919 * seed + 2)
        probability = worlds.sft_logp[row].exp()
        ends = probability.cumsum(0)
        uniform = torch.rand(3, pairs, generator=generator, dtype=torch.float64)
        first = torch.searchsorted(ends, uniform[0] * ends[-1]).clamp(max=len(ends) - 1)
        point = uniform[1] * (ends[-1] - probability[first])
        point = torch.where(point < ends[first] - probability[first], point, point + probability[first])
        second = torch.searchsorted(ends, point).clamp(max=len(ends) - 1)
        gap = worlds.gold[row, first] - worlds.gold[row, second]
        wins = uniform[2] < torch.sigmoid(gap / temperature)
        out.append(torch.stack([torch.where(wins, first, second), torch.where(wins, second, first)], 1))
    return torch.stack(out)


def expectations(logp: Tensor, worlds: Worlds) -> dict[str, Tensor]:
    """By enumeration: `logp: (..., S, 1024)` float64 nats; gold reward, KL(π ‖ SFT) in nats, illegal mass: `(..., S)`."""
    probability = logp.exp()
    return {
        "gold": (probability * worlds.gold).sum(-1),
        "kl": (probability * (logp - worlds.sft_logp)).sum(-1),
        "ood": (probability * ~worlds.legal).sum(-1),
    }


def frontier(worlds: Worlds, inverse_lambdas: Tensor) -> dict[str, Tensor]:
    """The most gold reward that a KL can buy: π ∝ SFT·exp(gold/λ), exactly; `(n,)` values of 1/λ give `(n, S)` each."""
    tilted = worlds.sft_logp + inverse_lambdas[:, None, None] * worlds.gold
    return expectations(tilted.log_softmax(-1), worlds)
