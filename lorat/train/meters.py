"""What the logs of a run read: averages of per-example metrics, and tokens trained on.

A metric is a sum and a count, added over examples and divided once, when it is logged: exact under accumulation, ragged
batches and several ranks. Names are TRL's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..methods import Outcome
from ..ranks import Ranks


class Averages:
    """Running `sum` and `count` of named per-example values, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """`values`: (n,); `weights`: (n,), 0 leaves an example out."""
        values = values.detach().double().reshape(-1)
        weights = torch.ones_like(values) if weights is None else weights.double().reshape(-1)
        kept = torch.where(weights > 0, values * weights, torch.zeros_like(values))
        self.sums[name] = self.sums.get(name, 0) + kept.sum()
        self.counts[name] = self.counts.get(name, 0) + weights.sum()

    def reduced(self, reduce=None) -> dict[str, tuple[float, float]]:
        """`{name: (sum, count)}`, over all ranks if `reduce` sums a tensor over them. Same names on every rank."""
        if not self.sums:
            return {}
        names = list(self.sums)
        both = torch.stack([torch.stack([self.sums[n], self.counts[n]]) for n in names])
        if reduce is not None:
            both = reduce(both)
        return {n: (s, c) for n, (s, c) in zip(names, both.tolist(), strict=True)}

    def means(self, reduce=None) -> dict[str, float]:
        """`{name: mean}` of what was counted; a metric without examples is left out."""
        return with_kto_margin({n: s / c for n, (s, c) in self.reduced(reduce).items() if c > 0})

    def reset(self) -> None:
        self.sums.clear()
        self.counts.clear()

    def state_dict(self) -> dict[str, list[float]]:
        return {n: [self.sums[n].item(), self.counts[n].item()] for n in self.sums}

    def load_state_dict(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        self.reset()
        for name, (total, count) in state.items():
            self.sums[name] = torch.tensor(total, dtype=torch.float64, device=device)
            self.counts[name] = torch.tensor(count, dtype=torch.float64, device=device)


def with_kto_margin(means: dict[str, float]) -> dict[str, float]:
    """Add `rewards/margins` as the difference of the two means where no pair gave it (KTO), as TRL does."""
    for at in ("", "start/"):
        chosen, rejected, margins = (f"{at}rewards/{kind}" for kind in ("chosen", "rejected", "margins"))
        if margins not in means and {chosen, rejected} <= means.keys():
            means[margins] = means[chosen] - means[rejected]
    return means


class Meters:
    """Since the last log: averages over the examples trained on, and tokens a second; tokens of the whole run."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.averages = Averages()
        self.local = self.total = 0  # tokens: on this rank since the last log, on all ranks before it
        self._at = time.perf_counter()

    def add(self, out: Outcome, weights: Tensor) -> None:
        """Take in n examples; `weights`: (n,)."""
        self.averages.add("loss", out.losses, weights)
        for name, (values, own) in out.metrics.items():
            self.averages.add(name, values, own * weights)

    def restart(self) -> None:
        """Begin the clock anew, without what came before."""
        self._at = time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Leave out time in which nothing was trained on."""
        self._at += seconds

    def logs(self) -> dict[str, float]:
        """What a log shows, over all ranks; counts anew from here."""
        means = self.averages.means(self.ranks.sum)
        self.averages.reset()
        new, now = self._pending(), time.perf_counter()
        rate = new / max(now - self._at, 1e-9)
        self.local, self.total, self._at = 0, self.total + new, now
        return {**means, "num_tokens": self.total, "tokens_per_second": rate}

    def _pending(self) -> int:
        """Tokens of all ranks since the last log."""
        return int(self.ranks.sum(torch.tensor([self.local])).item())

    def state_dict(self) -> dict[str, Any]:
        """Averages and tokens of all ranks; every rank has to ask."""
        averages = {k: list(v) for k, v in self.averages.reduced(self.ranks.sum).items()}
        return {"averages": averages, "tokens": [self.total, self._pending()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; sums over ranks go on from rank 0."""
        first = self.ranks.index == 0
        averages = {k: v if first else [0.0, 0.0] for k, v in state["averages"].items()}
        self.averages.load_state_dict(averages, self.ranks.device)
        self.total, pending = state["tokens"]
        self.local = pending if first else 0
