"""DPO, IPO and KTO with a moving reference on the token MDP of `mdp.py`, many runs at once.

A job is one method and one β; its runs are every reference times every world, and they share nothing but the Adam call,
which is elementwise. The losses are lorat's own functions, mapped over runs. No sampling happens here: the pairs are
given, the optimiser starts at the SFT weights, and what is recorded comes from enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.studies.mdp import LENGTH, Worlds, expectations, log_table
from benchmarks.studies.study import Reference
from lorat.methods.losses import dpo_loss, ipo_loss, kto_baseline, kto_loss


@dataclass(frozen=True)
class Job:
    """`regime`: the name of the batches to train on; `checkpoints`: after how many steps to enumerate."""

    regime: str
    method: str
    beta: float
    references: tuple[Reference, ...]
    lr: float
    checkpoints: tuple[int, ...] = field(default=(0,))


def batch_losses(method: str, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean loss of each run: log-ratios of B chosen and B rejected completions, `(R, B)` nats each; returns `(R,)`.

    KTO sees the 2B completions as unpaired. The MDP has one prompt, so the mismatched completions of z₀ are the batch
    rotated by one: the batch itself. Shifting Δ by z₀ and giving `kto_loss` a zero is the same function.
    """
    if method == "kto":
        deltas = torch.cat([chosen, rejected], 1)
        z0 = torch.vmap(kto_baseline)(deltas.detach())
        label = torch.cat([torch.ones_like(chosen), torch.zeros_like(rejected)], 1).bool()
        zero = z0.new_zeros(())
        losses = torch.vmap(lambda d, y: kto_loss(d, y, zero, beta=beta).losses)(deltas - z0[:, None], label)
    elif method == "ipo":
        lengths = torch.full_like(chosen[0], LENGTH)

        def ipo(won: Tensor, lost: Tensor) -> Tensor:
            """One run: `(B,)` and `(B,)` nats -> `(B,)` losses."""
            return ipo_loss(won, lost, beta=beta, chosen_lengths=lengths, rejected_lengths=lengths).losses

        losses = torch.vmap(ipo)(chosen, rejected)
    else:
        losses = torch.vmap(lambda won, lost: dpo_loss(won, lost, beta=beta).losses)(chosen, rejected)
    return losses.mean(1)


@dataclass
class Moving:
    """The references of R runs: weights `(R, P)`, their log-table `(R, 1024)` nats; age in steps and so on, `(R,)`."""

    rules: list[Reference]
    weights: Tensor
    table: Tensor
    age: Tensor
    summed_age: Tensor
    moves: Tensor  # α summed over the updates: how often the reference went the whole way to the policy

    @classmethod
    def at(cls, rules: list[Reference], weights: Tensor) -> Moving:
        """References that stand at `weights: (R, P)`."""
        zeros = torch.zeros(len(rules), dtype=torch.float64)
        with torch.no_grad():
            return cls(rules, weights.clone(), log_table(weights), zeros, zeros.clone(), zeros.clone())

    def __post_init__(self) -> None:
        self.alpha = torch.tensor([rule.alpha for rule in self.rules])
        self.every = torch.tensor([rule.every for rule in self.rules])
        self.limit = torch.tensor([rule.limit for rule in self.rules])

    @torch.no_grad()
    def after_step_(self, step: int, policy: Tensor, distance: Tensor) -> None:
        """`step` from 1; `policy: (R, P)` after it; `distance: (R,)` mean |log-ratio| per token in its forward, nats."""
        self.age += 1
        due = (self.alpha > 0) & (step % self.every == 0) & ((self.limit == 0) | (distance > self.limit))
        rows = due.nonzero()[:, 0]
        if len(rows):
            alpha = self.alpha[rows, None]
            self.weights[rows] = torch.lerp(self.weights[rows], policy[rows], alpha)
            self.table[rows] = log_table(self.weights[rows])
            self.age[rows] *= 1 - alpha[:, 0].double()
            self.moves[rows] += alpha[:, 0].double()
        self.summed_age += self.age


def train(job: Job, worlds: Worlds, batches: Tensor) -> dict[str, Tensor]:
    """Train every (reference, world) of a job: `batches: (T, S, B, 2)` trajectory indices, chosen first.

    Returns `gold`, `kl` and `ood` as `(references, S, checkpoints)`, the mean age `lag` in steps and `moves` as
    `(references, S)`, all float64. Adam with betas (0.9, 0.999), constant learning rate, no clipping. References move
    after the optimiser's step; the adaptive limit is compared with the log-ratios of that step's forward.
    """
    many, seeds = len(job.references), len(worlds.sft)
    policy = worlds.sft.repeat(many, 1).requires_grad_()  # run = reference·S + world
    reference = Moving.at([rule for rule in job.references for _ in range(seeds)], policy.detach())
    optimizer = torch.optim.Adam([policy], lr=job.lr)
    measured: list[dict[str, Tensor]] = []

    def measure() -> None:
        with torch.no_grad():
            logp = log_table(policy.double()).view(many, seeds, -1)
        measured.append(expectations(logp, worlds))

    if 0 in job.checkpoints:
        measure()
    for step, batch in enumerate(batches, 1):
        index = batch.flatten(1).repeat(many, 1)  # (R, 2B): chosen, rejected alternating
        ratios = log_table(policy).gather(1, index) - reference.table.gather(1, index)
        optimizer.zero_grad()
        batch_losses(job.method, job.beta, ratios[:, 0::2], ratios[:, 1::2]).sum().backward()
        optimizer.step()
        reference.after_step_(step, policy.detach(), ratios.detach().abs().mean(1) / LENGTH)
        if step in job.checkpoints:
            measure()
    found = {name: torch.stack([m[name] for m in measured], -1) for name in ("gold", "kl", "ood")}
    ages = {"lag": reference.summed_age / len(batches), "moves": reference.moves}
    return {**found, **{name: values.view(many, seeds) for name, values in ages.items()}}
