"""What stands in for a GPU's own operations where a pass runs without values: they allocate what the real ones do.

FlashAttention 2 behind `attention.packed_attention`, the kernel behind `linear_logprob` (by its own table and budget),
and the float32 inputs that CUDA's autocast gives a LayerNorm. Sizes follow the sources of those operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lorat_kernels.launch import chunk_rows_of
from lorat_kernels.linear_logprob import BUDGET
from lorat_kernels.plans import Plan as KernelPlan
from lorat_kernels.torch_path import CHUNK_ROWS, VOCAB_BLOCK
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..model.models import Head
from ..packs import attention
from .ledger import Ledger, empty


class LikeCuda(TorchFunctionMode):
    """CUDA's autocast widens the input of a LayerNorm to float32; the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.layer_norm:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def attention_of(ledger: Ledger) -> Iterator[None]:
    """Inside, packed attention runs FlashAttention's stand-in wherever a GPU would run FlashAttention."""

    def whole(*args: Any, **kwargs: Any) -> Tensor:
        with ledger.naming("attention"):
            return packed(*args, **kwargs)

    packed, chosen = attention.packed_attention, attention.varlen_backend
    attention.packed_attention, attention.varlen_backend = whole, flash  # type: ignore[assignment]
    _Attention.ledger = ledger
    try:
        yield
    finally:
        attention.packed_attention, attention.varlen_backend = packed, chosen
        _Attention.ledger = None


def flash(q: Tensor, v: Tensor, window: int | None) -> Any:
    """As `attention.varlen_backend` on a card of sm_80 or newer."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] != v.shape[-1]:
        return None
    return _varlen if q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 else None


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Any, scale: float, window: int | None) -> Tensor:
    if q.shape[1] != k.shape[1] and "enable_gqa" not in (attention._varlen_parameters() or {"enable_gqa"}):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _Attention.apply(q, k, v, len(layout.queries))


class _Attention(torch.autograd.Function):
    """FlashAttention 2 over S sequences: keeps q, k, v, the output (T, H, d) and a float32 number a query and head.

    Its backward sums dq in float32 over T + 128 S rows, and dk and dv for each query head.
    """

    ledger: Ledger | None = None

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
        out, lse = torch.empty(q.shape, dtype=q.dtype), empty(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sequences = sequences
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        assert _Attention.ledger is not None
        with _Attention.ledger.naming("attention"):
            q, k, v, _, _ = ctx.saved_tensors
            rows = q.shape[0] + 128 * ctx.sequences
            held = [empty(rows, q.shape[1], q.shape[2]), empty(q.shape[1], rows)]
            if q.shape[1] != k.shape[1]:
                held += [empty(x.shape[0], q.shape[1], x.shape[2], dtype=x.dtype) for x in (k, v)]
            found = [empty(*x.shape, dtype=x.dtype) for x in (q, k, v)]
            del held
        return *found, None


class PlannedHead(Head):
    """`Head` for a model without values."""

    ledger: Ledger
    kernel: KernelPlan | None

    @classmethod
    def like(cls, head: Head, ledger: Ledger, kernel: KernelPlan | None) -> PlannedHead:
        made = cls(head.weight, head.bias, head.softcap, head.temperature)
        vars(made).update(ledger=ledger, kernel=kernel)
        return made

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        with self.ledger.naming("logprobs"):
            return _LogProb.apply(hidden, self.weight, self.kernel, torch.is_grad_enabled(), self.ledger)


class _LogProb(torch.autograd.Function):
    """`linear_logprob` on a GPU: log-probs, with gradient (N, D) float32, and what its chunks take."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, kernel: Any, with_grad: bool, ledger: Ledger) -> Tensor:
        (rows, dim), ctx.dtype, ctx.ledger = hidden.shape, hidden.dtype, ledger
        out = empty(rows)
        ctx.save_for_backward(empty(rows if with_grad else 0, dim))
        empty(workspace(rows, dim, weight.shape[0], hidden.dtype, weight.dtype, with_grad, kernel), dtype=torch.uint8)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with ctx.ledger.naming("logprobs"):
            (grad,) = ctx.saved_tensors
            return empty(*grad.shape, dtype=ctx.dtype), None, None, None, None


def workspace(
    rows: int,
    dim: int,
    vocab: int,
    hidden: torch.dtype,
    weight: torch.dtype,
    with_grad: bool,
    kernel: KernelPlan | None,
) -> int:
    """Bytes that `linear_logprob` allocates for one chunk, beside its result and the gradient that it keeps.

    `kernel`: the card's entry of the kernel's table; None where torch computes (cards before sm_80).
    """
    if kernel is None:
        pieces = 0 if weight == torch.float32 else 4 * VOCAB_BLOCK * dim
        return 3 * 4 * min(rows, CHUNK_ROWS) * vocab + pieces
    padded = -(-vocab // 64) * 64
    split = 12 * dim if hidden == torch.float32 and weight != torch.float32 else 0
    if kernel.candidate == "cublas" and hidden == weight != torch.float32:
        return CHUNK_ROWS * (4 * padded + split)
    same = weight != torch.float32
    tile = (kernel.half if same else kernel.full).n
    step = chunk_rows_of(rows, dim, vocab, weight.itemsize, tile, with_grad, BUDGET)
    return step * (8 * -(-vocab // tile) + (weight.itemsize * padded if with_grad else 0) + split)
