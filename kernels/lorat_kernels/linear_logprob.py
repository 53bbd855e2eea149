"""Per-row log-probs of the targets under a frozen head; `(N, V)` logits never exist. The public door of the kernels.

Why: the log-ratio of policy and reference is a small difference of large numbers. Logits rounded to bf16 put noise of
several thousandths of a nat on every token (`docs/kernel.md` has the measurement): over a sequence as much as the
signal early in training. Here products are summed in float32 and logits are never rounded.

How: with a frozen head the gradient of a row depends on nothing upstream but one number,
`∂logp_i/∂h_i = Σ_v (1[v = y_i] − p_iv) · ∂logit_v/∂z_v · W_v`, so it is finished in the forward, while the chunk's
probabilities exist: 4·N·V·D operations with gradient instead of the 6·N·V·D of recomputing, 2·N·V·D without.

One custom operator, `lorat::linear_logprob`, computes both; which code runs behind it (`launch.py` on a GPU, by the
table in `plans.py`; `torch_path.py` elsewhere) depends on device and dtypes alone, never on N or on gradients.

Left out: training the head, double backward, tensor-parallel heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch, torch_path
from .torch_path import CHUNK_ROWS, VOCAB_BLOCK

__all__ = ["BUDGET", "CHUNK_ROWS", "VOCAB_BLOCK", "linear_logprob"]

BUDGET = 300_000_000  # bytes; 8192 rows of a 151,936 × 4096 head with gradient fit with chunks of 512 rows


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    budget: int = BUDGET,
) -> Tensor:
    """`log_softmax(logits)[i, targets[i]]` with `logits = softcap·tanh((hidden Wᵀ + b)/softcap) / temperature`.

    `hidden: (N, D)`, `weight: (V, D)`, `targets: (N,)` integers, `bias: (V,)`; bf16, fp16, float32 or float64, also
    mixed, contiguous or not, N = 0 too; autocast does not reach inside. Returns `(N,)` nats in float32 (float64 if
    hidden or weight is). Rows whose target is `ignore_index` give exactly 0 and no gradient. Only `hidden` gets a
    gradient: summed in float32, returned in its dtype.

    `budget` bounds, in bytes, what a GPU call allocates beside its result; rows are computed in chunks that fit, of at
    least 512 rows. `chunk_rows` sets the chunk directly. A row's log-prob depends on neither.

    Raises `ValueError` for shapes or dtypes that do not fit, a head that is no plain tensor or requires grad (freeze
    it), or, on the CPU, a target outside the vocabulary; on a GPU that target's log-prob is NaN instead, which costs no
    synchronisation.
    """
    _check(hidden, weight, targets, bias, temperature, softcap, chunk_rows, budget)
    with_grad = torch.is_grad_enabled() and hidden.requires_grad
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "The head (weight or bias) requires grad, and linear_logprob computes no gradient for it: it would silently "
            "stay untrained. Freeze it with requires_grad_(False) and adapt other layers, or use "
            "lorat_kernels.naive.linear_logprob, which differentiates the head."
        )
    if not torch.compiler.is_compiling():
        _check_range(targets, weight.shape[0], ignore_index)
    options = (temperature, softcap, ignore_index, chunk_rows, budget)
    if with_grad:
        return _LinearLogprob.apply(hidden, weight, targets, bias, options)
    return _forward(hidden, weight, targets, bias, False, *options)[0]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: tuple):
        """Log-probs (N,) nats; keeps `∂logp_i/∂h_i` (N, D), which is finished here."""
        logp, grad = _forward(hidden, weight, targets, bias, True, *options)
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):
        """`upstream`: (N,) -> the gradient of hidden, (N, D) in its type; nothing for the others."""
        (grad,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return (grad * upstream[:, None]).to(ctx.dtype), None, None, None, None
        product = torch.empty(grad.shape, dtype=ctx.dtype, device=grad.device)
        torch.mul(grad, upstream[:, None], out=product)  # rounded once, and no (N, D) float32 in between
        return product, None, None, None, None


@torch.library.custom_op("lorat::linear_logprob", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    with_grad: bool,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int | None,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Log-probs `(N,)` and `∂logp_i/∂h_i` `(N, D)`, or `(0, D)` without gradient."""
    candidate = launch.candidate_of(hidden, weight)
    with torch.no_grad():
        if candidate == "torch":
            logp, grad = torch_path.forward(
                hidden, weight, targets, bias, with_grad, temperature, softcap, ignore_index, chunk_rows or CHUNK_ROWS
            )
        else:
            options = launch.Options(temperature, softcap, ignore_index)
            logp, grad = launch.forward(
                hidden, weight, targets, bias, with_grad, options, chunk_rows, budget, candidate
            )
    return logp, logp.new_empty(0, hidden.shape[1]) if grad is None else grad


@_operator.register_fake
def _(hidden, weight, targets, bias, with_grad, *options):
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    rows = hidden.shape[0]
    return (
        torch.empty(rows, dtype=dtype, device=hidden.device),
        torch.empty(rows if with_grad else 0, hidden.shape[1], dtype=dtype, device=hidden.device),
    )


_forward = _operator  # the one place where values and gradients come from; tests watch it


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_rows: int | None,
    budget: int,
) -> None:
    """Raise `ValueError` unless hidden (N, D), weight (V, D), targets (N,), bias (V,) and the settings fit."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"weight is a {type(weight).__name__}, not a tensor: pass the head's weight. Of a head under an adapter the "
            "weight alone would be the base's, so leave the head out of the adapter, or merge it first."
        )
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
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1; None lets the budget decide.")
    if budget < 1:
        raise ValueError(
            f"budget={budget} must be positive: the bytes that a call may allocate; {BUDGET} is the default."
        )


def _check_range(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise `ValueError` for a target (N,) outside the vocabulary; on the CPU alone."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return  # on a GPU a look at the values would wait for it; the log-prob is NaN there
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] = {int(targets[row])} is outside the vocabulary of {vocab} and is not "
            f"ignore_index={ignore_index}: tokenizer and head do not belong together, or another padding value is used."
        )
