"""Allocates for the kernels of `kernels.py` and calls them, chunk by chunk of rows, under a byte budget.

With gradient a chunk lives once in `(rows, V)` numbers of the head's dtype: exponentials, turned in place into
`onehot − p`, multiplied with W into float32. Without gradient nothing of size `rows·V` exists in the fused candidate.

Left out: cards older than sm_80 and float64 operands, which `torch_path.py` serves on any device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from .plans import INTERPRETED, Plan, plan_for
from .torch_path import CHUNK_ROWS as MIN_ROWS

NO_GRAD_ROWS = 2048  # rows of one launch without gradient: their part of hidden stays in the L2 cache
BLOCK_V = 1024  # columns of a row in one program of residual_kernel
BLOCK_ROW = 4096  # columns that row_kernel reads at once
BLOCK_T, BLOCK_R = 64, 16  # tiles × rows of reduce_kernel


class Options(NamedTuple):
    temperature: float
    softcap: float | None
    ignore_index: int


@functools.cache
def available() -> bool:
    """Whether Triton can be imported (its wheels are for Linux; torch's CUDA builds bring it)."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU, by TRITON_INTERPRET=1 before its first import."""
    if not available():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def plan_of(device: torch.device) -> Plan | None:
    if device.type == "cpu":
        return INTERPRETED if interpreted() else None
    return plan_for(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def candidate_of(hidden: Tensor, weight: Tensor) -> str:
    """What serves `hidden: (N, D)`, `weight: (V, D)`: `"fused"`, `"cublas"`, or `"torch"` where there is no kernel."""
    if hidden.device.type != "cuda" or not available() or torch.float64 in (hidden.dtype, weight.dtype):
        return "torch"
    plan = plan_of(hidden.device)
    if plan is None:
        return "torch"
    # float32 operands stay in the kernel: whether cuBLAS rounds them to TF32 is a global switch of torch's
    return plan.candidate if hidden.dtype == weight.dtype != torch.float32 else "fused"


def chunk_rows_of(rows: int, dim: int, vocab: int, itemsize: int, tile: int, with_grad: bool, budget: int) -> int:
    """Rows of a chunk so that all that is allocated stays under `budget` bytes, in multiples of `MIN_ROWS`.

    With gradient: the `(rows, D)` float32 gradient, kept for the backward; per row of a chunk the exponentials and two
    float32 a tile. Never fewer: W is read again for every chunk.
    """
    a_row = 8 * -(-vocab // tile) + (itemsize * vocab if with_grad else 0)
    left = budget - (4 * rows * dim if with_grad else 0)
    fits = max(left // a_row // MIN_ROWS, 1) * MIN_ROWS
    return max(1, min(rows, fits, NO_GRAD_ROWS))


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    with_grad: bool,
    options: Options,
    chunk_rows: int | None,
    budget: int,
    candidate: str,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs `(N,)` float32 and, with gradient, `∂logp_i/∂h_i` `(N, D)` float32."""
    plan = plan or plan_of(hidden.device)
    assert plan is not None
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    logp = torch.full((rows,), torch.nan, dtype=torch.float32, device=hidden.device)
    grad = torch.empty(rows, dim, dtype=torch.float32, device=hidden.device) if with_grad else None
    if rows == 0:
        return logp, grad
    targets, bias = targets.long().contiguous(), None if bias is None else bias.contiguous()
    if candidate == "cublas":
        step = max(chunk_rows or MIN_ROWS, 1)  # the same for every N, with and without gradient: cuBLAS goes by shape
    else:
        tile = (plan.half if weight.dtype.itemsize == 2 else plan.full).n
        itemsize = weight.dtype.itemsize
        step = chunk_rows or chunk_rows_of(rows, dim, vocab, itemsize, tile, with_grad, budget)
    unit = unit_of(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False), _on(hidden.device):
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            run = _cublas_chunk if candidate == "cublas" else _fused_chunk
            residual = run(
                hidden[chunk], weight, targets[chunk], bias, logp[chunk], with_grad, options, unit, step, plan
            )
            if grad is None or residual is None:
                continue
            for first in range(0, residual.shape[0], MIN_ROWS):  # always this many rows: no chunk size shows in a bit
                _matmul_float32(residual[first : first + MIN_ROWS], weight, out=grad[chunk][first : first + MIN_ROWS])
            if unit * options.temperature != 1:
                grad[chunk] /= unit * options.temperature
    return logp, grad


def unit_of(dtype: torch.dtype) -> float:
    """What 1 is stored as in `onehot − p`: fp16's least positive number is 6e-8, too much for a small p."""
    return 2.0**15 if dtype == torch.float16 else 1.0


def _on(device: torch.device):
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def parts_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden` as `(PARTS, N, D)`: float32 rows under a bf16 head become two bf16 terms with 16 bits of digits.

    Twice the multiplications, but on tensor cores: float32 ones have an eighth of the rate or less.
    """
    if hidden.dtype == torch.float32 and weight.dtype == torch.bfloat16:
        high = hidden.bfloat16()
        return torch.stack([high, (hidden - high).bfloat16()])
    return hidden[None]


def _fused_chunk(hidden, weight, targets, bias, logp, with_grad, options: Options, unit, step, plan) -> Tensor | None:
    """A chunk of n rows by the logits kernel: `hidden: (n, D)`, `weight: (V, D)`, `targets: (n,)`, `bias: (V,)` or None.

    Writes `logp: (n,)` float32 nats; returns `(n, V)` residuals `(onehot − p)·slope·unit` in the head's type, whose
    product with the head is the gradient times `unit·temperature`; None without gradient.
    """
    from .kernels import logits_kernel, reduce_kernel, residual_kernel

    (rows, dim), vocab = hidden.shape, weight.shape[0]
    x = parts_of(hidden, weight)
    same = x.dtype == weight.dtype and x.dtype != torch.float32
    blocks = plan.half if same else plan.full
    tiles = -(-vocab // blocks.n)
    highest, rest = torch.empty(2, tiles, rows, dtype=torch.float32, device=x.device)
    target = torch.full_like(logp, torch.nan)
    # under the interpreter a cast to bf16 truncates: it keeps float32
    stored = torch.float32 if interpreted() else weight.dtype
    # rows begin at multiples of 128 bytes, which the matmul that follows wants
    exp = torch.empty(rows if with_grad else 0, -(-vocab // 64) * 64, dtype=stored, device=x.device)[:, :vocab]
    softcap = options.softcap or 1.0
    logits_kernel[(-(-rows // blocks.m) * tiles,)](
        x,
        weight,
        weight if bias is None else bias,
        targets,
        highest,
        rest,
        target,
        exp,
        rows,
        vocab,
        dim,
        *x.stride(),
        *weight.stride(),
        exp.stride(0),
        softcap,
        1 / options.temperature,
        unit,
        PARTS=x.shape[0],
        BIAS=bias is not None,
        SOFTCAP=options.softcap is not None,
        STORE=with_grad,
        UPCAST=not same or interpreted(),
        EVEN_D=dim % blocks.k == 0,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    reduce_kernel[(-(-rows // BLOCK_R),)](
        highest,
        rest,
        target,
        targets,
        logp,
        rows,
        tiles,
        options.ignore_index,
        FACTOR=with_grad,
        BLOCK_T=BLOCK_T,
        BLOCK_R=BLOCK_R,
        num_warps=4,
    )
    if not with_grad:
        return None
    residual_kernel[(rows, -(-vocab // BLOCK_V))](
        exp,
        rest,
        logp,
        target,
        targets,
        rows,
        vocab,
        exp.stride(0),
        options.ignore_index,
        softcap,
        1 / options.temperature,
        unit,
        SOFTCAP=options.softcap is not None,
        TILE=blocks.n,
        BLOCK=BLOCK_V,
        num_warps=4,
    )
    return exp


def _cublas_chunk(hidden, weight, targets, bias, logp, with_grad, options: Options, unit, step, plan) -> Tensor | None:
    """As `_fused_chunk`, with the product by cuBLAS in float32 and one kernel a row; `step`: rows of a full chunk."""
    from .kernels import row_kernel

    rows, vocab = hidden.shape[0], weight.shape[0]
    x = parts_of(hidden, weight)
    if rows < step:  # the last chunk in the shape of the others: cuBLAS chooses its order of summation by shape
        x = torch.cat([x, x.new_zeros(x.shape[0], step - rows, x.shape[2])], dim=1)
    z = torch.empty(step, -(-vocab // 64) * 64, dtype=torch.float32, device=x.device)[:, :vocab]
    _matmul_float32(x[0], weight.T, out=z)
    if x.shape[0] == 2:
        z += _matmul_float32(x[1], weight.T)
    stored = torch.float32 if interpreted() else weight.dtype
    residual = _front(z, stored)
    row_kernel[(rows,)](
        z,
        residual,
        weight if bias is None else bias,
        targets,
        logp,
        vocab,
        z.stride(0),
        residual.stride(0),
        options.ignore_index,
        options.softcap or 1.0,
        1 / options.temperature,
        unit,
        BIAS=bias is not None,
        SOFTCAP=options.softcap is not None,
        GRAD=with_grad,
        BLOCK=BLOCK_ROW,
        num_warps=8,
        num_stages=1,
    )
    return residual[:rows] if with_grad else None


def _front(z: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of `z: (N, V)` float32, seen as `(N, V)` of a dtype no wider: the front of each row."""
    whole = z.as_strided((z.shape[0], z.stride(0)), (z.stride(0), 1)).view(dtype)
    return whole[:, : z.shape[1]]


def _matmul_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b`, (m, k) by (k, n) -> (m, n), summed and returned in float32 whatever the operands; into `out` if given."""
    if a.device.type == "cuda" and a.dtype == b.dtype and a.dtype != torch.float32:
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)
