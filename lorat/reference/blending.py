"""Copying, blending, averaging and comparing the adapters of a PEFT model, in place, over all layers at once.

Two spaces. `"product"` mixes what the adapters do, `α s_p B_p A_p + (1−α) s_r B_r A_r`, and keeps the best
approximation that the target's rank can hold. `"factors"` mixes A and B themselves, which leaves out
`α(1−α)(B_p−B_r)(A_p−A_r)`. Biases, DoRA magnitudes and `modules_to_save` are mixed as they are in both.

Ranks, alphas and rsLoRA may differ between the adapters; targets and base may not. Tensors may be bfloat16, float16,
float32 or float64; arithmetic is float64 for products and at least float32 for the rest. Equal inputs give equal bits,
so several ranks need no collective. Cost and derivations: docs/reference.md. torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .lowrank import Factors, differences, factor_error, mix_
from .pairing import POLICY, REFERENCE, Adapter, aligned, check_pairs, find, is_b

Space = Literal["product", "factors"]
SPACES = ("product", "factors")


def _zero(like: Adapter) -> Tensor:
    """0-dim float64 zero where the adapter lies."""
    return torch.zeros((), dtype=torch.float64, device=next(iter(like.tensors.values())).device)


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, of any shapes, in float32 at least: float64 stays, 16-bit types are widened."""
    return [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]


def _scaled(tensors: list[Tensor], factors: list[float]) -> list[Tensor]:
    """n tensors of any shapes, each times its factor, in float32 at least; the very same ones where all factors are 1."""
    if all(f == 1.0 for f in factors):
        return tensors
    return [t if f == 1.0 else w * f for t, w, f in zip(tensors, _wide(tensors), factors, strict=True)]


def _lerp_(targets: list[Tensor], sources: list[Tensor], alpha: float) -> None:
    """`target <- target + alpha * (source - target)`, pair by pair of equal shapes, computed in float32 at least.

    In one fused call where all are float32 or float64 alike; others are rounded once, when they are written.
    """
    if not targets:
        return
    if all(t.dtype == s.dtype and t.dtype in (torch.float32, torch.float64) for t, s in zip(targets, sources)):
        torch._foreach_lerp_(targets, sources, alpha)
        return
    wide = [t.double() if s.dtype == torch.float64 else t for t, s in zip(_wide(targets), _wide(sources))]
    near = [s.to(t.dtype) for t, s in zip(wide, sources)]
    torch._foreach_copy_(targets, list(torch._foreach_lerp(wide, near, alpha)))


def _copy_(source: Adapter, target: Adapter) -> None:
    src, dst, ratio, rest = aligned(source, target)
    if rest:
        torch._foreach_zero_(rest)
    torch._foreach_copy_(dst, _scaled(src, ratio))


@torch.no_grad()
def copy_(model: nn.Module, source: str = POLICY, target: str = REFERENCE) -> None:
    """Make adapter `target` compute what `source` computes (a hard update); `source` is left as it is.

    Bit for bit where both have the same LoRA scale; another alpha or rsLoRA is folded into B. A target of greater
    rank is filled up with zeros. Raises `ValueError` if the two do not pair up or the target's rank is smaller.
    """
    _copy_(find(model, source), find(model, target))


@torch.no_grad()
def blend_(
    model: nn.Module,
    alpha: float,
    source: str = POLICY,
    target: str = REFERENCE,
    space: Space = "product",
    *,
    measure: bool = True,
) -> Tensor:
    """`target <- alpha * source + (1 - alpha) * target` (a soft update, eq. 3 of arXiv 2404.09656).

    Returns the relative error in ΔW that the mix has, `‖written − exact‖ / ‖exact‖` over all LoRA layers before
    rounding to the target's dtype: a 0-dim float64 tensor where the adapters lie, so that reading it is the caller's
    choice. `measure=False` saves the factor space the Gram matrices and returns NaN there. 0 leaves the target alone,
    1 copies (or, in product space with a target of smaller rank, keeps the best approximation). Raises `ValueError`
    for alpha outside [0, 1], an unknown space, values that are not finite (product), or adapters that do not pair up.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is outside [0, 1]; 0 leaves the target alone, 1 copies the source.")
    if space not in SPACES:
        raise ValueError(f"space={space!r} is unknown; set one of {', '.join(SPACES)}.")
    policy, reference = find(model, source), find(model, target)
    check_pairs(policy, reference, any_rank=True)
    if alpha == 0:
        return _zero(reference)
    if space == "product":
        if alpha < 1 or _smaller(policy, reference):
            return _combine_(reference, [(float(alpha), policy), (1.0 - float(alpha), reference)])
        _copy_(policy, reference)
        return _zero(reference)
    src, dst, ratio, rest = aligned(policy, reference)
    if alpha == 1:
        _copy_(policy, reference)
        return _zero(reference)
    error = torch.full_like(_zero(reference), math.nan)
    if measure:
        ours, theirs = policy.factors(), reference.factors()
        keys = list(theirs)
        error = factor_error(float(alpha), [ours[k] for k in keys], [theirs[k] for k in keys]) if keys else error * 0
    _lerp_(dst, _scaled(src, ratio), float(alpha))
    if rest:
        torch._foreach_mul_(rest, 1.0 - float(alpha))
    return error


def _smaller(source: Adapter, target: Adapter) -> bool:
    """Whether a LoRA layer of `target` has a smaller rank than that of `source`."""
    return any(target.tensors[n].numel() < t.numel() for n, t in source.tensors.items())


def _combine_(target: Adapter, terms: list[tuple[float, Adapter]]) -> Tensor:
    """`target <- sum of weight * adapter` in product space; returns the relative error in ΔW, 0-dim float64."""
    terms = [(w, adapter) for w, adapter in terms if w != 0] or terms[:1]
    factors = [(w, adapter.factors()) for w, adapter in terms]
    written = target.factors()
    keys = list(written)
    rows: list[list[tuple[float, Factors]]] = [[(w, f[key]) for w, f in factors] for key in keys]
    error = mix_([written[key] for key in keys], rows) if keys else _zero(target)
    names = list(target.others())
    if names:
        mine = [target.tensors[n].detach() for n in names]
        parts = []
        for w, adapter in terms:
            ratios = [w * adapter.scale_of(n) / target.scale_of(n) for n in names]
            parts.append([t.double() * r for t, r in zip((adapter.tensors[n].detach() for n in names), ratios)])
        for more in parts[1:]:
            torch._foreach_add_(parts[0], more)
        torch._foreach_copy_(mine, parts[0])
    return error


@torch.no_grad()
def soup_(model: nn.Module, weights: Mapping[str, float], target: str = REFERENCE) -> Tensor:
    """`target <- sum of weights[name] * adapter name`: an average of what several adapters do, in product space.

    For one reference made of several models (a soup, as in SALSA, arXiv 2411.01798). `target` must exist; it may be
    among the averaged and have any rank: at the sum of theirs nothing is lost. Returns the relative error, as
    `blend_`. Raises `ValueError` unless the weights are finite and sum to 1, or for adapters that do not pair up.
    """
    if not weights or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights={dict(weights)} sum to {sum(weights.values())}, not to 1; divide each by their sum.")
    into = find(model, target)
    terms = [(float(w), find(model, name)) for name, w in weights.items()]
    for _, adapter in terms:
        check_pairs(adapter, into, any_rank=True)
    return _combine_(into, terms)


@torch.no_grad()
def interpolate_(model: nn.Module, amount: float, toward: str | None = None, target: str = POLICY) -> Tensor:
    """`target <- (1 - amount) * target + amount * toward`; `toward=None` is the base, on which an adapter does nothing.

    Linear interpolation toward the start, as WARP ends each round (LITI, arXiv 2406.16768; its η is 1 − amount).
    Toward the base only B is scaled, so a policy stays trainable as it is; toward an adapter its factors are new ones.
    Returns the relative error, as `blend_`. Raises `ValueError` for amounts outside [0, 1].
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount} is outside [0, 1]; to go beyond the target, use extrapolate_.")
    return _along_(model, -float(amount), toward, target)


@torch.no_grad()
def extrapolate_(model: nn.Module, amount: float, away_from: str | None = None, target: str = POLICY) -> Tensor:
    """`target <- target + amount * (target - away_from)`: on in the direction it came, as ExPO (arXiv 2404.16792).

    `away_from`: the adapter it came from, or None for the base. Returns the relative error that the target's rank
    leaves, as `blend_`. Raises `ValueError` for amounts below 0.
    """
    if not 0 <= amount < math.inf:
        raise ValueError(f"amount={amount} is not a finite number of at least 0; to go back, use interpolate_.")
    return _along_(model, float(amount), away_from, target)


def _along_(model: nn.Module, amount: float, other: str | None, target: str) -> Tensor:
    """`target <- (1 + amount) * target - amount * other`; returns the relative error, 0-dim float64."""
    into = find(model, target)
    if amount == 0:
        return _zero(into)
    if other is not None:
        if amount == -1:
            return blend_(model, 1.0, other, target)
        away = find(model, other)
        check_pairs(away, into, any_rank=True)
        return _combine_(into, [(1 + amount, into), (-amount, away)])
    left_out = [n for n in into.others() if not is_b(n)]
    if left_out:
        raise ValueError(
            f"adapter {target!r} holds whole tensors ({left_out[0]} and others: {len(left_out)}) whose value in the base "
            "is not among the adapters; name an adapter that holds the start instead of None."
        )
    torch._foreach_mul_([t.detach() for n, t in into.tensors.items() if is_b(n)], 1 + amount)
    return _zero(into)


def _changes(
    model: nn.Module, first: str, second: str | Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """`(‖ΔW_1 − ΔW_2‖², ‖ΔW_1‖²)` of the LoRA layers, 0-dim float64, and the pairs of all other tensors.

    A pair is of one shape, float64, on the first's device, and as its layer reads it.
    """
    one = find(model, first)
    two = find(model, second) if isinstance(second, str) else one.reading(second)
    check_pairs(one, two, any_rank=True)
    ours, theirs = one.factors(), two.factors()
    keys = list(ours)
    nothing = _zero(one)
    apart, size = differences([ours[k] for k in keys], [theirs[k] for k in keys]) if keys else (nothing, nothing)
    pairs = [
        (t.double() * one.scale_of(n), two.tensors[n].to(t.device).double() * two.scale_of(n))
        for n, t in one.others().items()
    ]
    return apart, size, pairs


@torch.no_grad()
def distance(model: nn.Module, first: str = POLICY, second: str | Mapping[str, Tensor] = REFERENCE) -> float:
    """Frobenius norm of the difference of two adapters' weight changes, over all adapted layers; waits for the device.

    `second` is an adapter or a `snapshot` of `first`. A LoRA layer's change `s*B@A` is never materialised; close
    adapters lose no digits. Biases, DoRA magnitudes and `modules_to_save` add the norm of their own difference; for
    DoRA the direction is compared before it is normalised. Raises `ValueError` if the two do not pair up.
    """
    total, _, pairs = _changes(model, first, second)
    for x, y in pairs:
        total = total + (x - y.to(x)).square().sum().to(total.device)
    return math.sqrt(total.item())


@torch.no_grad()
def relative_distance(model: nn.Module, first: str = POLICY, second: str = REFERENCE) -> float:
    """`‖ΔW_1 − ΔW_2‖ / ‖ΔW_1‖` over the LoRA products alone; 0 where nothing differs, infinite where only ΔW_1 is 0."""
    apart, size, _ = _changes(model, first, second)
    apart_, size_ = torch.stack([apart, size]).tolist()
    return math.sqrt(apart_ / size_) if size_ > 0 else (math.inf if apart_ > 0 else 0.0)
