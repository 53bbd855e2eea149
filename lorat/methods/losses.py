"""Preference losses as pure functions of log-ratios: DPO (plain, conservative, robust), IPO, APO-zero, HyPO and KTO.

Every function takes log-ratios `Δ = log π(y|x) − log π_ref(y|x)` in nats, summed over a completion's tokens, and
returns one loss and one reward (or two) per example. Take the difference per token and sum it afterwards: sums of
thousands of nats that are subtracted in float32 lose the digits that matter.

Left out on purpose: the mean over the batch (the trainer divides by the examples of the whole optimiser step), the
forward pass, gathering over ranks, and logging. Only torch is imported, so the losses can be used on their own. Inputs
are computed in float32 (float64 stays float64); the cost is a handful of elementwise operations on `n` numbers.

Rewards are `β·Δ` of the sums, detached, whatever the length normalisation: the scale on which TRL logs them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLoss(NamedTuple):
    """Per-pair results, each `(n,)`: losses with gradient; rewards `β·Δ` without."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class UnpairedLoss(NamedTuple):
    """Per-example results, each `(n,)`: losses with gradient; rewards `β·Δ` without."""

    losses: Tensor
    rewards: Tensor


def dpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    length_normalize: bool = False,
) -> PairLoss:
    """DPO: `−log σ(m)` with the margin `m = β(Δ_w − Δ_l)`; eq. 7 of arXiv 2305.18290.

    With `label_smoothing` ε, the probability that a label is flipped:

    - conservative (cDPO; Mitchell 2023, *A note on DPO with noisy preferences*): `−(1−ε) log σ(m) − ε log σ(−m)`,
      least at a finite margin, `m = log((1−ε)/ε)`;
    - `robust=True` (rDPO; arXiv 2403.00409): `(−(1−ε) log σ(m) + ε log σ(−m)) / (1−2ε)`, an unbiased estimate of the
      loss on clean labels, unbounded below.

    `length_normalize=True` divides each log-ratio by its completion's length first (TRL's `sigmoid_norm`); β then
    multiplies nats per token and wants to be larger.

    Log-ratios `(n,)` nats; lengths `(n,)` completion tokens, EOS included, needed only with `length_normalize`.
    Raises `ValueError` for shapes that differ, missing lengths, β ≤ 0 or ε outside [0, 0.5).
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} is outside [0, 0.5): it is the probability that a label is wrong, and "
            "at one half the labels say nothing. Set it below 0.5; 0 trusts every label."
        )
    if length_normalize:
        margins = _per_token(chosen, chosen_lengths, "chosen") - _per_token(rejected, rejected_lengths, "rejected")
    else:
        margins = chosen - rejected
    as_labelled = -F.logsigmoid(beta * margins)
    if label_smoothing == 0.0:
        losses = as_labelled
    else:
        as_flipped = -F.logsigmoid(-beta * margins)
        if robust:
            losses = ((1 - label_smoothing) * as_labelled - label_smoothing * as_flipped) / (1 - 2 * label_smoothing)
        else:
            losses = (1 - label_smoothing) * as_labelled + label_smoothing * as_flipped
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def ipo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    length_normalize: bool = True,
) -> PairLoss:
    """IPO: `(Δ_w − Δ_l − 1/(2β))²`; eq. 17 of arXiv 2310.12036, whose τ is β here.

    By default each Δ is the mean per completion token, as in TRL and HALOs (the form its authors confirmed to TRL);
    `length_normalize=False` takes the sums, as the equation is printed, and needs no lengths.

    Log-ratios `(n,)` nats (sums); lengths `(n,)` completion tokens, EOS included.
    Raises `ValueError` for shapes that differ, missing lengths or β ≤ 0.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta)
    if length_normalize:
        margins = _per_token(chosen, chosen_lengths, "chosen") - _per_token(rejected, rejected_lengths, "rejected")
    else:
        margins = chosen - rejected
    losses = (margins - 1 / (2 * beta)).square()
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> PairLoss:
    """APO-zero: `1 − σ(βΔ_w) + σ(βΔ_l)`; eq. 7 of arXiv 2408.06266.

    For pairs whose chosen completion is better than what the model writes: each side is anchored at the reference, the
    chosen one is to become likelier than there and the rejected one less likely. Between 0 and 2.

    Log-ratios `(n,)` nats. Computed as `σ(−βΔ_w) + σ(βΔ_l)`, which keeps its digits where `1 − σ(x)` rounds to 0.
    Raises `ValueError` for shapes that differ or β ≤ 0.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta)
    losses = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def hypo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, reference_margins: Tensor, *, beta: float
) -> PairLoss:
    """HyPO: `−log σ(β(log π(y_w)/π(y_l) − max(0, m)))` with `m = log ref(y_w)/ref(y_l)`; arXiv 2602.11902.

    DPO where the reference prefers the chosen completion; where it prefers the rejected one (m < 0, a pessimistic
    reference) DPO's gradient would fade before the policy prefers the chosen one, so the reference counts as neutral.

    Log-ratios and `reference_margins`, without gradient, `(n,)` nats. Rewards are `βΔ`, as for DPO.
    Raises `ValueError` for shapes that differ or β ≤ 0.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta)
    if reference_margins.shape != chosen.shape:
        raise ValueError(
            f"reference_margins {tuple(reference_margins.shape)} must be (n,), one per pair, as the log-ratios are."
        )
    pessimism = _as_float(reference_margins.detach()).clamp(max=0)  # Δ_w − Δ_l is the policy's margin minus m
    losses = -F.logsigmoid(beta * (chosen - rejected + pessimism))
    return PairLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def kto_baseline(mismatched_logratios: Tensor) -> Tensor:
    """KTO's reference point `z₀ = max(0, mean Δ(xᵢ, y_j))` over mismatched pairs, j ≠ i; section 4 of arXiv 2402.01306.

    `mismatched_logratios: (m,)` nats, of the **whole** optimiser-step batch: the mean must be taken before the
    maximum. Returns a detached scalar in nats; 0 for an empty input.
    """
    logratios = _as_float(mismatched_logratios.detach())
    if logratios.numel() == 0:
        return logratios.new_zeros(())
    return logratios.mean().clamp(min=0)


def kto_loss(
    logratios: Tensor,
    labels: Tensor,
    z0: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """KTO: `λ_D(1 − σ(β(Δ − z₀)))` where desirable, `λ_U(1 − σ(β(z₀ − Δ)))` where not; eq. 7 and 8 of arXiv 2402.01306.

    `logratios: (n,)` nats; `labels: (n,)` bool, true where desirable; `z0`: a scalar from `kto_baseline`, never
    differentiated. Computed as `λ·σ(−x)`, which keeps its digits where `1 − σ(x)` rounds to 0.
    Raises `ValueError` for shapes that differ, labels that are not bool, a `z0` that is not a scalar or β ≤ 0.
    """
    _check_beta(beta)
    if logratios.dim() != 1 or labels.shape != logratios.shape:
        raise ValueError(
            f"logratios {tuple(logratios.shape)} and labels {tuple(labels.shape)} must both be (n,), one per example."
        )
    if labels.dtype != torch.bool:
        raise ValueError(f"labels are {labels.dtype}, not torch.bool: pass `labels > 0` or `labels.bool()`.")
    if z0.numel() != 1:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}: it is one number for the whole batch, see kto_baseline.")
    deltas = _as_float(logratios)
    advantages = deltas - z0.detach().to(deltas).reshape(())
    losses = torch.where(
        labels,
        desirable_weight * torch.sigmoid(-beta * advantages),
        undesirable_weight * torch.sigmoid(beta * advantages),
    )
    return UnpairedLoss(losses, beta * deltas.detach())


def _as_float(values: Tensor) -> Tensor:
    """Any shape; float64 stays, all else becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive: it scales every log-ratio; the usual range is 0.01 to 0.5.")


def _pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The log-ratios of n pairs, `(n,)` nats each, in float32 or float64; `ValueError` for other shapes or β ≤ 0."""
    _check_beta(beta)
    if chosen_logratios.dim() != 1 or chosen_logratios.shape != rejected_logratios.shape:
        raise ValueError(
            f"chosen_logratios {tuple(chosen_logratios.shape)} and rejected_logratios "
            f"{tuple(rejected_logratios.shape)} must both be (n,), one per pair."
        )
    return _as_float(chosen_logratios), _as_float(rejected_logratios)


def _per_token(logratios: Tensor, lengths: Tensor | None, which: str) -> Tensor:
    """`(n,)` sums and `(n,)` lengths -> `(n,)` nats a token; an empty completion counts one, so that its 0 stays 0."""
    if lengths is None:
        raise ValueError(f"length_normalize=True needs {which}_lengths: pass them, or set length_normalize=False.")
    if lengths.shape != logratios.shape:
        raise ValueError(
            f"{which}_lengths {tuple(lengths.shape)} and {which}_logratios {tuple(logratios.shape)} must both be (n,)."
        )
    return logratios / lengths.clamp(min=1)
