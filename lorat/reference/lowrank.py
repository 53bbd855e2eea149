"""Sums of low-rank products, recompressed and measured without ever being multiplied out.

A layer's problem is `M = sum_i w_i s_i B_i A_i = L R` with `L = [.. w_i s_i B_i ..] (out, k)` and `R = [.. A_i ..]
(k, in)`, k the sum of the ranks. Everything that is asked of M is in the k×k Gram matrices `LᵀL` and `RRᵀ`: its norm,
its singular values, its best approximation of a lower rank. All layers of equal k share one batched eigendecomposition.

Arithmetic is float64: products of float32 numbers are exact in it, and squaring the condition number still leaves
1e-7 of the largest singular value. Factors are converted in chunks of at most `WORKSPACE` bytes, freed as they go.
Left out: adapters and their names (`pairing`), and what is no product (`blending`). torch alone; see docs/reference.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE = 64 * 2**20  # bytes of float64 factors at a time
_JITTER = 1e-14  # of the trace; a hundred times what float64 rounds a Gram matrix of unit trace by


class Factors(NamedTuple):
    """A layer's change of weight `scale * b @ a`: `b (out, r)`, `a (r, in)`, any floating dtype."""

    b: Tensor
    a: Tensor
    scale: float


class Chunk(NamedTuple):
    """Layers of one shape on one device: their places in the list, and the ranks of their terms."""

    indices: list[int]
    ranks: tuple[int, ...]


Part = tuple[Chunk, Tensor, Tensor, Tensor]  # a chunk, its weights (n, k), its Gram matrices (n, k, k)


def _chunks(problems: Sequence[Sequence[Factors]]) -> Iterator[Chunk]:
    """Problems of equal shapes together, as many as the workspace holds; the order depends on shapes alone."""
    groups: dict[tuple, list[int]] = {}
    for i, terms in enumerate(problems):
        first = terms[0]
        ranks = tuple(t.a.shape[0] for t in terms)
        groups.setdefault((first.b.device, first.b.shape[0], first.a.shape[1], ranks), []).append(i)
    for (_, out, width, ranks), indices in groups.items():
        at_once = max(1, WORKSPACE // max(1, 8 * (out + width) * sum(ranks)))
        for start in range(0, len(indices), at_once):
            yield Chunk(indices[start : start + at_once], ranks)


def _stack(problems: Sequence[Sequence[Factors]], chunk: Chunk) -> tuple[Tensor, Tensor]:
    """`(L (n, out, k), R (n, k, in))` in float64, unscaled, on the first term's device."""
    first = problems[chunk.indices[0]][0]
    n, k, device = len(chunk.indices), sum(chunk.ranks), first.b.device
    left = torch.empty(n, first.b.shape[0], k, dtype=torch.float64, device=device)
    right = torch.empty(n, k, first.a.shape[1], dtype=torch.float64, device=device)
    at = 0
    for j, rank in enumerate(chunk.ranks):
        left[:, :, at : at + rank] = torch.stack([problems[i][j].b for i in chunk.indices])
        right[:, at : at + rank] = torch.stack([problems[i][j].a for i in chunk.indices])
        at += rank
    return left, right


def _weights(values: list[list[float]], ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """`(n, k)` float64: each term's number, once for each of its components."""
    spread = [[v for v, rank in zip(row, ranks) for _ in range(rank)] for row in values]
    return torch.tensor(spread, dtype=torch.float64).to(device, non_blocking=True)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, batched: `(n, k, k)` float64 -> values `(n, k)`, ascending, and vectors `(n, k, k)`.

    On a GPU beyond k = 32 it goes over the host, since torch then loops (pytorch/pytorch#175585). Either way the host
    waits for a GPU once: torch checks for convergence.
    """
    away = matrices.is_cuda and matrices.shape[-1] > 32
    try:
        values, vectors = torch.linalg.eigh(matrices.cpu() if away else matrices)
        finite = bool(values.isfinite().all())  # small matrices of NaN pass through LAPACK
    except torch.linalg.LinAlgError:
        finite = False
    if not finite:
        raise ValueError(
            "the adapters hold values that are not finite, so their mix has no decomposition; nothing was changed. "
            "Go back to a checkpoint from before, with a lower learning rate."
        )
    return values.to(matrices.device), vectors.to(matrices.device)


def recompress(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best approximation of `M = L R` with `rank` components, from `left = LᵀL` and `right = RRᵀ`, each `(n, k, k)`.

    Returns `(X (n, k, m), Y (n, m, k), lost (n,), total (n,))` with m = min(rank, k): the approximation is
    `(L X)(Y R)`, and `lost` of the squared Frobenius norm `total` is missing from it (Eckart–Young). `Y R` has
    orthogonal rows of equal length, the root of M's largest singular value; `L X` carries the singular values.
    With `R = C Qᵀ` from a Cholesky factor C of RRᵀ, `M Mᵀ` has the eigenvalues of `Cᵀ(LᵀL)C`.
    """
    k = left.shape[1]
    total = (left * right).sum((1, 2)).clamp(min=0)
    long, wide = (g.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for g in (left, right))
    # Components balanced between the two sides; a null one stays small, and nothing is divided by zero.
    long, wide = (x + 1e-6 * x.amax(1, keepdim=True) + 1e-60 for x in (long, wide))
    d = (long / wide).sqrt()
    both = d[:, :, None] * d[:, None, :]
    right = right * both
    trace = right.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-200
    right = right / trace + _JITTER * torch.eye(k, dtype=right.dtype, device=right.device)
    c, failed = torch.linalg.cholesky_ex(right)
    c = torch.where((failed == 0)[:, None, None], c, torch.nan)  # loud in _eigh, before anything is written
    core = c.mT @ (left / both) @ c * trace
    values, vectors = _eigh((core + core.mT) / 2)
    values = values.clamp(min=0)
    m = min(rank, k)
    lost, kept = values[:, : k - m].sum(1), vectors[:, :, k - m :].flip(2)
    largest = values[:, -1].sqrt()
    g = torch.where(largest > 1e-60, largest.sqrt(), 1.0)[:, None, None]
    x = (c @ kept) * (trace.sqrt() / g) / d[:, :, None]
    y = torch.linalg.solve_triangular(c.mT, kept, upper=True).mT * (g / trace.sqrt()) * d[:, None, :]
    return x, y, lost, total


def mix_(targets: Sequence[Factors], terms: Sequence[Sequence[tuple[float, Factors]]]) -> Tensor:
    """Write the best approximation of `sum_i w_i s_i B_i A_i` into each target, which may be one of its own terms.

    `terms[j]`: the weighted products of layer j. A target of greater rank than the terms together is filled up with
    zeros. Returns the relative error `‖written − exact‖ / ‖exact‖` over all layers, a 0-dim float64 tensor: exact
    for the discarded singular values, blind to the rounding to the target's dtype, and not known below 1e-6.
    """
    problems = [[factors for _, factors in row] for row in terms]
    chunks = list(_chunks(problems))
    grams: dict[tuple, list[Part]] = {}
    for chunk in chunks:
        left, right = _stack(problems, chunk)
        weights = _weights([[w * f.scale for w, f in terms[i]] for i in chunk.indices], chunk.ranks, left.device)
        gram = left.mT @ left * weights[:, :, None] * weights[:, None, :]
        alike = (left.device, left.shape[2], targets[chunk.indices[0]].a.shape[0])
        grams.setdefault(alike, []).append((chunk, weights, gram, right @ right.mT))
        del left, right
    home = targets[0].b.device
    lost = total = torch.zeros((), dtype=torch.float64, device=home)
    solved: list[tuple[Part, Tensor, Tensor]] = []
    for (_, _, rank), parts in grams.items():
        chunk_sizes = [len(chunk.indices) for chunk, *_ in parts]
        x, y, gone, whole = recompress(torch.cat([p[2] for p in parts]), torch.cat([p[3] for p in parts]), rank)
        lost, total = lost + gone.sum().to(home), total + whole.sum().to(home)
        solved += zip(parts, x.split(chunk_sizes), y.split(chunk_sizes))
    for (chunk, weights, *_), x, y in solved:  # the second pass, after every decomposition has succeeded
        left, right = _stack(problems, chunk)
        mine = [targets[i] for i in chunk.indices]
        scale = torch.tensor([t.scale for t in mine], dtype=torch.float64).to(left.device, non_blocking=True)
        b, a = left @ (weights[:, :, None] * x / scale[:, None, None]), y @ right
        m = x.shape[2]
        torch._foreach_copy_([t.b[:, :m] for t in mine], list(b.unbind(0)))
        torch._foreach_copy_([t.a[:m] for t in mine], list(a.unbind(0)))
        if m < mine[0].a.shape[0]:
            torch._foreach_zero_([t.b[:, m:] for t in mine] + [t.a[m:] for t in mine])
        del left, right, b, a
    return relative(lost, total)


def relative(lost: Tensor, total: Tensor) -> Tensor:
    """`sqrt(lost / total)` of squared norms, 0-dim or of one shape; 0 where nothing is lost, else infinite where total is 0."""
    return torch.where(lost <= 1e-60, 0.0, lost / total).sqrt()


def _padded(first: Sequence[Factors], second: Sequence[Factors]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Chunks of `(s_1 B_1, A_1, s_2 B_2, A_2)` in float64, zero-padded to one rank, on the first's device."""
    problems = list(zip(first, second, strict=True))
    for chunk in _chunks(problems):
        device, most = first[chunk.indices[0]].b.device, max(chunk.ranks)
        out = []
        for j in (0, 1):
            b = torch.stack([problems[i][j].b for i in chunk.indices]).to(device, torch.float64)
            a = torch.stack([problems[i][j].a for i in chunk.indices]).to(device, torch.float64)
            b = b * _weights([[problems[i][j].scale] for i in chunk.indices], (1,), device)[:, :, None]
            short = most - chunk.ranks[j]
            out += [torch.nn.functional.pad(b, (0, short)), torch.nn.functional.pad(a, (0, 0, 0, short))]
        yield out[0], out[1], out[2], out[3]


def _squared(left: Tensor, right: Tensor) -> Tensor:
    """`‖L R‖²` of `(n, out, k)`, `(n, k, in)`, summed over the batch: 0-dim, from Gram matrices, never negative."""
    return ((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0)


def differences(first: Sequence[Factors], second: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """`(‖ΔW_1 − ΔW_2‖², ‖ΔW_1‖²)` over all layers, 0-dim float64.

    Through `(B_1−B_2)A_1 + B_2(A_1−A_2)`: adapters with close factors lose no digits, equal ones give exactly 0.
    """
    apart = size = torch.zeros((), dtype=torch.float64, device=first[0].b.device)
    for b1, a1, b2, a2 in _padded(first, second):
        apart = apart + _squared(torch.cat([b1 - b2, b2], 2), torch.cat([a1, a1 - a2], 1)).to(apart.device)
        size = size + _squared(b1, a1).to(size.device)
    return apart, size


def factor_error(alpha: float, source: Sequence[Factors], target: Sequence[Factors]) -> Tensor:
    """Relative error in ΔW of mixing factors, before it is done: `α(1−α)(B_p−B_r)(A_p−A_r)` against the exact mix.

    One `Factors` a layer in both lists, ranks may differ; returns a 0-dim float64 tensor on the first target's device.
    """
    lost = total = torch.zeros((), dtype=torch.float64, device=target[0].b.device)
    for b1, a1, b2, a2 in _padded(target, source):
        lost = lost + (alpha * (1 - alpha)) ** 2 * _squared(b2 - b1, a2 - a1).to(lost.device)
        mixed = torch.cat([(1 - alpha) * b1, alpha * b2], 2), torch.cat([a1, a2], 1)
        total = total + _squared(*mixed).to(total.device)
    return relative(lost, total)
