"""The definition of `linear_logprob` in four lines of plain torch: what the fast versions are tested against.

Everything is materialised (`N·V` logits, and autograd keeps them), so it is for tests and small models only. The one
version that also differentiates the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`log_softmax(logits)[i, targets[i]]` with `logits = softcap·tanh((hidden Wᵀ + b)/softcap) / temperature`.

    `hidden: (N, D)`, `weight: (V, D)`, `targets: (N,)` integers, `bias: (V,)`; any floating dtype, also mixed.
    Returns `(N,)` nats, computed in float32, or in float64 where hidden or weight is. Rows whose target is
    `ignore_index` give 0 and no gradient. Autograd works through every operand. Raises `IndexError` or `RuntimeError`
    (torch's own) for targets outside the vocabulary.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        ignored = targets == ignore_index
        index = targets.long().masked_fill(ignored, 0)
        logp = logits.log_softmax(dim=-1).gather(1, index[:, None]).squeeze(1)
        return logp.masked_fill(ignored, 0.0)
