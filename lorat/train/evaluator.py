"""The trainer's evaluation: losses and metrics of held-out examples, in the same packs as training.

Rewards against a moving reference fall back to zero whenever it moves. So each example is measured against the start as
well, the policy the run began from: its log-probs never change, so they cost one forward pass in the whole run, and
no adapter more.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..packs.packing import Batch
from ..reference import POLICY, snapshot
from .meters import Averages
from .scorer import Planned, Scorer


class Evaluator:
    """Measures batches with `scorer`, against the reference and against the start, the policy as it is now."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.averages = Averages()
        self.start = snapshot(scorer.models.peft, POLICY)
        self._cache: dict[bytes, list[Tensor]] = {}

    def start_from(self, values: dict[str, Tensor]) -> None:
        """Measure against `values`, a `snapshot` of the policy: that of the run which goes on."""
        self.start = values
        self._cache.clear()

    @torch.no_grad()
    def measure(self, batch: Batch) -> Tensor:
        """Take the losses and metrics of a batch on all ranks into `averages`; returns this rank's losses (n,)."""
        scorer = self.scorer
        planned = scorer.plan(batch)
        baseline = scorer.baseline([planned])
        start = self._start_logprobs(planned)
        parts = [
            (i, scorer.score(scorer.models, planned, i, baseline, [t for k in i for t in start[k]])[0])
            for i in planned.packs
        ]
        order = torch.tensor([j for i, _ in parts for j in i]).argsort().to(scorer.ranks.device)
        losses = torch.cat([out.losses for _, out in parts])[order]
        names = list(parts[0][1].metrics)
        columns = [losses, torch.ones_like(losses)]
        for name in names:
            for k in (0, 1):
                columns.append(torch.cat([out.metrics[name][k] for _, out in parts])[order])
        table = scorer.ranks.rows(torch.stack(columns, 1))
        for k, name in enumerate(["loss", *names]):
            self.averages.add(name, table[:, 2 * k], table[:, 2 * k + 1])
        return losses

    def _start_logprobs(self, planned: Planned) -> list[list[Tensor]]:
        """For each example, its completions' token log-probs under the start; computed once in a run for each."""
        groups = planned.groups
        keys = [hashlib.blake2b(repr(g).encode(), digest_size=16).digest() for g in groups]
        if fresh := [k for k, key in enumerate(keys) if key not in self._cache]:
            with self.scorer.models.policy_as(self.start):
                tokens = iter(self.scorer.tokens([groups[k] for k in fresh]))
            for k in fresh:
                self._cache[keys[k]] = [next(tokens) for _ in groups[k][1]]
        return [self._cache[key] for key in keys]
