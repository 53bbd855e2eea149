"""Averages of per-example metrics, exact under accumulation, ragged batches and several ranks.

A metric is a sum and a count, added over examples and divided once, when it is logged. Names are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


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
