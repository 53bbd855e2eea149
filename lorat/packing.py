"""Canonical examples -> the rows of forward passes, under a token budget.

A *pack* is what one forward pass sees. Here each completion is one right-padded row, `prompt + completion`,
and only the positions that predict completion tokens are marked for the head. How a batch is split into
packs decides memory, never the mathematics: an example (a pair, a KTO completion) is never divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Pack:
    """One forward pass over R rows of length T that hold n completions with K completion tokens in all."""

    input_ids: Tensor  # (R, T) int64
    attention_mask: Tensor  # (R, T) int64, 0 on padding
    predict: Tensor  # (K,) int64: flat positions in R*T whose hidden state predicts a completion token
    targets: Tensor  # (K,) int64: those tokens
    lengths: list[int]  # n: completion tokens of each completion, in the order of `targets`

    def to(self, device: torch.device | str) -> Pack:
        ids, mask, predict, targets = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.attention_mask, self.predict, self.targets)
        )
        return Pack(ids, mask, predict, targets, self.lengths)


@dataclass
class Batch:
    """The examples of a device batch, opaque to accelerate so that token lists are not walked one by one.

    `weights`: 1, or 0 for an example that only fills the last batch of an epoch on several ranks.
    """

    examples: list[dict[str, Any]]
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.examples)

    def __len__(self) -> int:
        return len(self.examples)


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The dataloader's batch: `row` (n,) int64 first, which tells the Trainer its size, then the examples."""
    return {"row": torch.tensor([e["row"] for e in examples]), "batch": Batch(list(examples))}


def split_rows(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Groups of examples whose padded rows fit `budget` tokens; `rows[i]`: the lengths of example i's rows.

    Examples are taken longest first, so that rows of like length share a pack and little is padded.
    """
    order = sorted(range(len(rows)), key=lambda i: -max(rows[i]))
    groups: list[list[int]] = []
    width = count = 0
    for i in order:
        if groups and (count + len(rows[i])) * max(width, *rows[i]) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
            width = count = 0
        width, count = max(width, *rows[i]), count + len(rows[i])
    return groups


def pad_rows(completions: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Pack:
    """`(prompt ids, completion ids)` each -> one right-padded row each. Prompts and completions are not empty."""
    longest = max(len(p) + len(c) for p, c in completions)
    ids = torch.full((len(completions), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    predict: list[Tensor] = []
    targets: list[int] = []
    for r, (prompt, completion) in enumerate(completions):
        n = len(prompt) + len(completion)
        ids[r, :n] = torch.tensor([*prompt, *completion])
        mask[r, :n] = 1
        predict.append(torch.arange(r * longest + len(prompt) - 1, r * longest + n - 1))
        targets += completion
    return Pack(ids, mask, torch.cat(predict), torch.tensor(targets), [len(c) for _, c in completions])
