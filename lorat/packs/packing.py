"""Canonical examples -> the rows of forward passes, under a token budget.

A *pack* is what one forward pass sees. By default it is one row without padding, `[prompt | chosen | rejected]` after
`[prompt | chosen | rejected]`, in which each prompt stands once: a completion sees its own prompt and itself
(`Layout`, which `attention.py` hands to the model). For a model that cannot, each completion is one right-padded row.
Either way only the positions that predict completion tokens are marked for the head. How a batch is split into
packs decides memory, never the mathematics: an example (a pair, a KTO completion) is never divided.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # prompt ids, and ids of each completion of it; none is empty


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a row of T tokens, as S sequences of queries in row order, each with keys of its own.

    The first sequence of a group is prompt + first completion on the same keys; each further completion is a sequence
    whose keys are the prompt and itself. Queries are the last of their keys, and causal among them.
    """

    queries: list[int]  # S: tokens of each sequence, T in all
    keys: list[int]  # S: keys of each sequence, Tk in all
    gather: Tensor  # (Tk,) int64: row position of each key
    own: Tensor  # (T,) int64: where in `gather` each row position stands in its own sequence
    again: list[tuple[Tensor, Tensor]]  # round by round, prompt positions (unique) and where in `gather` they recur
    cu_queries: Tensor  # (S+1,) int32: running sums of `queries`
    cu_keys: Tensor  # (S+1,) int32
    backend: Callable[..., Tensor] | None = None  # what attends, with the arguments of `attention.attend`, the default

    def to(self, device: torch.device | str) -> Layout:
        on = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        again = [(on(rows), on(places)) for rows, places in self.again]
        gather, own, cu_queries, cu_keys = map(on, (self.gather, self.own, self.cu_queries, self.cu_keys))
        return replace(self, gather=gather, own=own, again=again, cu_queries=cu_queries, cu_keys=cu_keys)


@dataclass
class Pack:
    """One forward pass over R rows of length T that hold n completions with K completion tokens in all."""

    input_ids: Tensor  # (R, T) int64
    predict: Tensor  # (K,) int64: flat positions in R*T whose hidden state predicts a completion token
    targets: Tensor  # (K,) int64: those tokens
    lengths: list[int]  # n: completion tokens of each completion, in the order of `targets`
    attention_mask: Tensor | None = None  # (R, T) int64, 0 on padding; None with a layout
    position_ids: Tensor | None = None  # (1, T) int64, with a layout
    layout: Layout | None = None  # R = 1

    def to(self, device: torch.device | str) -> Pack:
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved, layout=self.layout.to(device) if self.layout else None)

    def through(self, backend: Callable[..., Tensor]) -> Pack:
        """The same pack, with attention computed by `backend` (arguments and result of `attention.attend`)."""
        return replace(self, layout=replace(self.layout, backend=backend) if self.layout else None)


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


@dataclass(frozen=True)
class Packer:
    """Splits groups into packs of at most `budget` tokens and lays them out; `pad_id` fills rows, never attended to.

    `shared`: one row without padding, prompts once; else a padded row per completion.
    """

    shared: bool
    budget: int
    pad_id: int

    def tokens(self, groups: Sequence[Group]) -> int:
        """Tokens that go through the model for `groups`, padding not counted."""
        return sum(len(p) * (1 if self.shared else len(cs)) + sum(map(len, cs)) for p, cs in groups)

    def split(self, groups: Sequence[Group]) -> list[list[int]]:
        """Which groups share a forward pass; a group beyond the budget is alone."""
        if self.shared:
            return split_groups([self.tokens([g]) for g in groups], self.budget)
        return split_rows([[len(p) + len(c) for c in cs] for p, cs in groups], self.budget)

    def places(self, groups: Sequence[Group]) -> list[tuple[list[int], list[int]]]:
        """For each pack of `split`: its groups, and where their completions stand among those of all groups."""
        firsts = [0, *itertools.accumulate(len(cs) for _, cs in groups)]
        return [(pack, [k for i in pack for k in range(firsts[i], firsts[i + 1])]) for pack in self.split(groups)]

    def pack(self, groups: Sequence[Group]) -> Pack:
        return share_prompts(groups) if self.shared else pad_rows(groups, self.pad_id)


def split_groups(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices of `sizes` (tokens) in bins of at most `budget`; a larger one is alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((b for b, left in enumerate(room) if sizes[i] <= left), None)
        if at is None:
            bins.append([])
            room.append(budget)
            at = len(bins) - 1
        bins[at].append(i)
        room[at] -= sizes[i]
    return bins


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


def share_prompts(groups: Sequence[Group]) -> Pack:
    """All groups in one row, each prompt once before its completions; positions of a completion go on from its prompt."""
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    queries: list[int] = []
    gather: list[int] = []
    keys: list[int] = []
    own: list[int] = []
    again: list[tuple[list[int], list[int]]] = []
    for prompt, completions in groups:
        start, n = len(ids), len(prompt)
        ids += prompt
        positions += range(n)
        for j, completion in enumerate(completions):
            first, m = len(ids), len(completion)
            ids += completion
            positions += range(n, n + m)
            predict += [start + n - 1, *range(first, first + m - 1)]
            targets += completion
            place = len(gather)
            gather += [*range(start, start + n), *range(first, first + m)]
            keys.append(n + m)
            if j == 0:
                queries.append(n + m)
                own += range(place, place + n + m)
            else:
                queries.append(m)
                own += range(place + n, place + n + m)
                if len(again) < j:
                    again.append(([], []))
                again[j - 1][0].extend(range(start, start + n))
                again[j - 1][1].extend(range(place, place + n))
    running = lambda sizes: torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)  # noqa: E731
    layout = Layout(
        queries=queries,
        keys=keys,
        gather=torch.tensor(gather),
        own=torch.tensor(own),
        again=[(torch.tensor(rows), torch.tensor(places)) for rows, places in again],
        cu_queries=running(queries),
        cu_keys=running(keys),
    )
    return Pack(
        input_ids=torch.tensor([ids]),
        predict=torch.tensor(predict),
        targets=torch.tensor(targets),
        lengths=[len(c) for _, cs in groups for c in cs],
        position_ids=torch.tensor([positions]),
        layout=layout,
    )


def pad_rows(groups: Sequence[Group], pad_id: int) -> Pack:
    """One right-padded row `prompt + completion` per completion."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    longest = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    predict: list[Tensor] = []
    targets: list[int] = []
    for r, (prompt, completion) in enumerate(rows):
        n = len(prompt) + len(completion)
        ids[r, :n] = torch.tensor([*prompt, *completion])
        mask[r, :n] = 1
        predict.append(torch.arange(r * longest + len(prompt) - 1, r * longest + n - 1))
        targets += completion
    return Pack(ids, torch.cat(predict), torch.tensor(targets), [len(c) for _, c in rows], attention_mask=mask)
