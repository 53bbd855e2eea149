"""`linear_logprob` in plain torch, in chunks of rows: the path of the CPU, of float64, and of GPUs without a kernel.

Same mathematics and same gradient-in-the-forward as the kernels: `docs/kernel.md`. Cost: beside the result, about three
`(chunk_rows, V)` float32 buffers, one `(VOCAB_BLOCK, D)` float32 piece of the head where it is stored in 16 bits, and
with gradient one `(N, D)` float32 buffer kept for the backward.

Log-probs are bitwise the same with and without gradient: one code path. They are **not** promised to be bitwise the
same when the number of rows changes: BLAS may sum in another order for another shape. The kernels promise that too.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ROWS = 512  # fewer rows re-read the head too often; more only cost memory
VOCAB_BLOCK = 8192  # rows of a 16-bit head that exist in float32 at one time


@torch.no_grad()
def forward(
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
