"""Per-row log-probs of the targets under a frozen head, in chunks of rows; `(N, V)` logits never exist.

Why: the log-ratio of policy and reference is a small difference of large numbers. Logits rounded to bf16 cost
0.013-0.016 nats a token, 0.2-0.3 nats over 256 tokens: as much as the signal early in training. Here products are
summed in float32 and logits are never rounded.

How: with a frozen head the gradient of a row depends on nothing upstream but one number,
`∂logp_i/∂h_i = Σ_v (1[v = y_i] − p_iv) · ∂logit_v/∂z_v · W_v`, so it is finished in the forward, while the chunk's
probabilities exist: 4·N·V·D operations with gradient instead of the 6·N·V·D of recomputing, 2·N·V·D without.

Cost: beside the result, about three `(chunk_rows, V)` float32 buffers, one `(8192, D)` float32 piece of the head where
it is stored in 16 bits, and with gradient one `(N, D)` float32 buffer kept for the backward.

The log-probs are bitwise the same with and without gradient: one code path. They are **not** promised to be bitwise
the same when the number of rows changes: BLAS may sum in another order for another shape.

Left out: training the head, double backward, tensor-parallel heads. Plain torch; a Triton kernel can take over on CUDA
behind the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 512  # fewer rows re-read the head too often; more only cost memory
VOCAB_BLOCK = 8192  # rows of a 16-bit head that exist in float32 at one time


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """`log_softmax(logits)[i, targets[i]]` with `logits = softcap·tanh((hidden Wᵀ + b)/softcap) / temperature`.

    `hidden: (N, D)`, `weight: (V, D)`, `targets: (N,)` integers, `bias: (V,)`; bf16, fp16, float32 or float64, also
    mixed, contiguous or not, N = 0 too; autocast does not reach inside. Returns `(N,)` nats in float32 (float64 if
    hidden or weight is). Rows whose target is `ignore_index` give exactly 0 and no gradient. Only `hidden` gets a
    gradient: summed in float32, returned in its dtype.

    Raises `ValueError` for shapes or dtypes that do not fit, a head that requires grad (freeze it), or, on the CPU, a
    target outside the vocabulary; on a GPU that target's log-prob is NaN instead, which costs no synchronisation.
    """
    _check(hidden, weight, targets, bias, temperature, softcap, chunk_rows)
    with_grad = torch.is_grad_enabled() and hidden.requires_grad
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "The head (weight or bias) requires grad, and linear_logprob computes no gradient for it: it would stay "
            "untrained without a word. Freeze it with requires_grad_(False) and adapt other layers, or use "
            "lorat_kernels.naive.linear_logprob, which differentiates the head."
        )
    _check_range(targets, weight.shape[0], ignore_index)
    options = (temperature, softcap, ignore_index, chunk_rows)
    if with_grad:
        return _LinearLogprob.apply(hidden, weight, targets, bias, options)
    return _forward(hidden, weight, targets, bias, False, *options)[0]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: tuple):
        logp, grad = _forward(hidden, weight, targets, bias, True, *options)
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad * upstream[:, None]).to(ctx.dtype), None, None, None, None


@torch.no_grad()
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    with_grad: bool,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs `(N,)` and, with gradient, `∂logp_i/∂h_i` `(N, D)`."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logp = torch.empty(rows, dtype=dtype, device=hidden.device)
    # float32 whatever hidden is: rounded once, after the upstream factor; fp16 would also lose small gradients before
    # the loss scale reaches them
    grad = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if with_grad else None
    blocks = [slice(v, min(v + VOCAB_BLOCK, vocab)) for v in range(0, vocab, VOCAB_BLOCK)]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            h = hidden[chunk].to(dtype)
            logits = torch.empty(h.shape[0], vocab, dtype=dtype, device=h.device)
            for block in blocks:
                torch.mm(h, weight[block].to(dtype).T, out=logits[:, block])
            if bias is not None:
                logits += bias.to(dtype)
            slope = None  # ∂logit/∂z, times temperature
            if softcap is not None:
                logits.div_(softcap).tanh_()
                if with_grad:
                    slope = 1 - logits.square()
                logits *= softcap
            logits /= temperature

            y = targets[chunk].long()
            ignored = y == ignore_index
            outside = ((y < 0) | (y >= vocab)) & ~ignored
            index = y.masked_fill(ignored | outside, 0)[:, None]
            highest, at = logits.max(dim=1, keepdim=True)
            logits -= highest
            target_logit = logits.gather(1, index)
            probs = logits.exp_()
            # Σ exp without its greatest term, which is 1: log1p keeps the digits of a log-prob near 0
            others = probs.scatter_(1, at, 0.0).sum(dim=1, keepdim=True)
            row_logp = (target_logit - others.log1p()).masked_fill_(outside[:, None], torch.nan)
            row_logp.masked_fill_(ignored[:, None], 0.0)
            logp[chunk] = row_logp.squeeze(1)
            if grad is None:
                continue
            # onehot − p, where 1 − p of the target is −expm1(logp): with p near 1 it keeps its digits too
            residual = probs.scatter_(1, at, 1.0).div_(-1 - others).scatter_(1, index, -row_logp.expm1())
            if slope is not None:
                residual *= slope
            residual /= temperature
            residual.masked_fill_(ignored[:, None], 0.0)
            h_grad = grad[chunk].zero_()
            for block in blocks:
                h_grad.addmm_(residual[:, block], weight[block].to(dtype))
    return logp, grad


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_rows: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D). A head stored "
            "in 4 bits has another shape: leave the head unquantised (transformers does by default)."
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: an empty vocabulary has no log-probs.")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets {tuple(targets.shape)} {targets.dtype} must be ({hidden.shape[0]},) integers, one per row."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be ({weight.shape[0]},), one per row of weight.")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden {hidden.dtype} and weight {weight.dtype} must be floating point: dequantise first.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; 1 leaves the distribution as it is.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for a head without one.")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1; {CHUNK_ROWS} is the default.")


def _check_range(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if targets.device.type != "cpu" or targets.numel() == 0:
        return  # on a GPU a look at the values would wait for it; the log-prob is NaN there
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] = {int(targets[row])} is outside the vocabulary of {vocab} and is not "
            f"ignore_index={ignore_index}: tokenizer and head do not belong together, or another padding value is used."
        )
