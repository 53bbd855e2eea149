"""A frozen linear layer, 4-bit or not, with a LoRA adapter on it, as one operation with its own backward.

PEFT composes it of six: the 4-bit product, a defensive clone, the adapter's two products, a scaling and an addition, each
with a tensor of the output's size, in float32 wherever the input is. Here the output is written once and the adapter
is added into it, in the computing type; kept for the backward are the input in that type (shared by layers that read the
same one) and `x A^T` of rank size. The weight is dequantised for each product and let go; nothing of it is kept.

`y = x W^T + b + s (x A^T) B^T`. Left out: dropout, DoRA, trainable W or b, several adapters at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def dense(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`; `state` is bitsandbytes' quantisation state, or None for a plain weight."""
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.view(-1, 1), state).to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, state: Any, bias: Any, scale: float
    ) -> Tensor:
        """`x`: (…, in), `a`: (r, in), `b`: (out, r), `weight`: (out, in) or packed -> (…, out) in the type of x."""
        rows = x.reshape(-1, x.shape[-1])
        y = linear(rows, dense(weight, state, x.dtype), bias if bias is None else bias.to(x.dtype))
        inner = rows @ a.to(x.dtype).T
        y.addmm_(inner, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.state, ctx.scale = state, scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradient (…, out) -> those of x (…, in), a (r, in) and b (out, r), each in its own type."""
        x, inner, a, b, weight = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        through = (g @ b.to(g.dtype)).mul_(ctx.scale) if needs_x or needs_a else None  # (rows, r)
        gx = ga = gb = None
        if needs_x:
            assert through is not None
            gx = (g @ dense(weight, ctx.state, g.dtype)).addmm_(through, a.to(g.dtype)).view(x.shape)
        if needs_a:
            assert through is not None
            ga = (through.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        if needs_b:
            gb = (g.T @ inner).mul_(ctx.scale).to(b.dtype)
        return gx, ga, gb, None, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    state: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T + bias + scale (x A^T) B^T`: x (…, in), W (out, in), A (r, in), B (out, r) -> (…, out).

    `state`: bitsandbytes' quantisation state where `weight` is packed in 4 bits. `dtype`: what is computed in and
    returned (default: x's type), whatever x, A and B are held in; gradients of A and B come in their own types.
    W and bias are frozen: no gradient flows to them.
    """
    x = x if dtype is None else x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinear.apply(x, a, b, weight.detach(), state, None if bias is None else bias.detach(), scale)
