"""A pack's layout, given to Hugging Face attention, with no model patched.

A function registered with transformers' `AttentionInterface` receives the layout as a forward keyword, through PEFT and
through activation checkpointing, and computes exact attention of each sequence on its own keys. A call without the
keyword (generation, ordinary evaluation) goes to the attention that the model had. Only K and V are gathered; nothing
of size T x T is made on a GPU.

Backends: `torch.nn.attention.varlen` (FlashAttention) on CUDA where it takes head size, type and card; else sdpa,
sequence by sequence, on the same gathered keys; a softcap (Gemma 2) is computed in float32, sequence by sequence. A pack
may bring a backend of its own (`Pack.through`), which sees every call of its layers: whoever listens, or runs it without
values, needs to replace nothing.
Left out: attention sinks, position biases, bidirectional layers: these raise, and the probe falls back. A model whose own
attention is neither sdpa nor eager (flash_attention_2, a kernel of the hub) keeps it and takes no layout: those read
their name from the model's configuration, where lorat's would have to stand (`hindrance` says so).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packing import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEYWORD = "pack_layout"  # the forward keyword that carries a `Layout`
NAMES = {"sdpa": "lorat_packs", "eager": "lorat_packs_eager"}  # by what a call without a layout does
UNKNOWN = ("s_aux", "sinks", "position_bias", "score_mod", "head_mask")  # forward keywords that bend attention


class Call(NamedTuple):
    """What a layer asks of its attention, beside q, k, v and the layout."""

    scale: float
    window: int | None  # keys that a query sees, its own among them; None: all that are not after it
    softcap: float | None
    dropout: float


def hindrance(implementation: str | None) -> str | None:
    """Why a model of that attention (`config._attn_implementation`) cannot heed layouts, in words; None if it may."""
    if implementation is None or implementation in (*NAMES, *NAMES.values()):
        return None
    return f"its attention is {implementation}, which takes no layout; leave attn_implementation out, or set sdpa"


def install(model: PreTrainedModel) -> bool:
    """Make `model` (a transformers model) heed layouts; other calls stay as they are.

    False where it cannot: its attention is then what it was.
    """
    before = _implementations(model)
    plain = before[""] or "eager"
    if plain in NAMES.values():
        return True
    if hindrance(plain):
        return False
    name = NAMES[plain]
    AttentionInterface.register(name, _interface(plain))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    model.set_attn_implementation(name)
    if model.config._attn_implementation == name:
        return True
    _restore_(model, before)
    return False


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[bool]:
    """Inside, `model` heeds layouts if it can, and the value says whether; afterwards its attention is what it was."""
    before = _implementations(model)
    try:
        yield install(model)
    finally:
        _restore_(model, before)


def _implementations(model: PreTrainedModel) -> dict[str, str | None]:
    """The attention of a model's configuration and of its parts, as that takes them back."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    own = {"": model.config._attn_implementation}
    return own | {key: part._attn_implementation for key, part in parts.items() if part is not None}


def _restore_(model: PreTrainedModel, before: dict[str, str | None]) -> None:
    """Through the configuration, since `set_attn_implementation` refuses what some models began with."""
    if _implementations(model) != before:
        model.config._attn_implementation = before  # type: ignore[assignment]


@lru_cache
def _interface(plain: str) -> Callable[..., tuple[Tensor, Any]]:
    """For `AttentionInterface`: `query` (B, H, T, d), `key`, `value` (B, Hkv, T, d) -> (B, T, H, d), weights or None."""

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        layout = kwargs.pop(KEYWORD, None)
        if layout is not None:
            return packed_attention(module, query, key, value, layout, *args, **kwargs), None
        if plain == "eager":  # each model file has its own
            owner = next(
                c for c in type(module).__mro__ if hasattr(sys.modules[c.__module__], "eager_attention_forward")
            )
            function = sys.modules[owner.__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[plain]
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Exact attention in one row: `query` (1, H, T, d), `key`, `value` (1, Hkv, T, d) -> (1, T, H, d).

    A token sees those of its sequence's keys that are not after it, the last `sliding_window` of them where one is
    given. Computed by `layout.backend`, or by `attend`. Raises `NotImplementedError` for what this cannot express.
    """
    known = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if known or not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        raise NotImplementedError(f"its attention uses {known[0]}" if known else "its attention looks ahead")
    if query.shape[0] != 1 or query.shape[2] != len(layout.own) or key.shape[2] != len(layout.own):
        raise NotImplementedError("its attention does not see the row token by token")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    backend = layout.backend or attend
    return backend(module, query, key, value, layout, Call(scale, sliding_window, softcap, dropout))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    call: Call,
    varlen: Callable[[Tensor, Tensor, int | None], Callable[..., Tensor] | None] | None = None,
) -> Tensor:
    """The backend that a layout has by default; shapes as `packed_attention`.

    `varlen`: chooses one call for all sequences, or None for sdpa sequence by sequence (default: `varlen_backend`).
    """
    if torch.is_autocast_enabled(query.device.type):  # rotary positions may have widened q and k
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    elif not query.dtype == key.dtype == value.dtype:
        query, key = query.to(value.dtype), key.to(value.dtype)
    q = query[0].transpose(0, 1)  # (T, H, d)
    k, v = (Gather.apply(x[0].transpose(0, 1), layout) for x in (key, value))  # (Tk, Hkv, d)
    if (
        call.softcap is None
        and call.dropout == 0
        and (one := (varlen or varlen_backend)(q, v, call.window)) is not None
    ):
        return one(q, k, v, layout, call.scale, call.window)[None]
    rows = zip(q.split(layout.queries), k.split(layout.keys), v.split(layout.keys), strict=True)
    return torch.cat([_one_sequence(*one, call) for one in rows])[None]


class Gather(torch.autograd.Function):
    """`x[layout.gather]` whose gradient adds in a fixed order: (T, H, d) -> (Tk, H, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        """(T, H, d) -> (Tk, H, d): each sequence's keys beside each other, a shared prompt as often as it is read."""
        ctx.layout = layout
        return x.index_select(0, layout.gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """(Tk, H, d) -> (T, H, d): a prompt's gradients from all its readers, added in the order of the layout."""
        (g,) = grads
        out = g.index_select(0, ctx.layout.own)
        for rows, places in ctx.layout.again:  # rows are unique: no two additions meet, and the order is ours
            out.index_add_(0, rows, g.index_select(0, places))
        return out, None


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(m, H, d) on (n, Hkv, d), the queries being the last m of n keys -> (m, H, d)."""
    scale, window, softcap, dropout = call
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    m, n = q.shape[2], k.shape[2]
    mask = None
    if softcap is not None or m != n or (window is not None and window < n):
        behind = torch.arange(n - m, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if softcap is None:
        out = scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scale)
        return out[0].transpose(0, 1)
    scores = (q.float() @ k.float().transpose(2, 3) * scale / softcap).tanh() * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # type: ignore[operator]
    return (nn.functional.dropout(weights, dropout) @ v.float()).to(v.dtype)[0].transpose(0, 1)


def varlen_backend(q: Tensor, v: Tensor, window: int | None) -> Callable[..., Tensor] | None:
    """One FlashAttention call for all sequences, or None where card, type, head size or version have none.

    `q`: (T, H, d), `v`: (Tk, Hkv, dv), in the computing type; `window`: tokens, or None.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return None
    accepted = _varlen_parameters()
    if not accepted or torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    if window is not None and "window_size" not in accepted:
        return None
    return _varlen


@lru_cache
def _varlen_parameters() -> frozenset[str]:
    """The keywords of this torch's `varlen_attn`, whose signature has changed; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """(T, H, d) on (Tk, Hkv, d) -> (T, H, d); windows are aligned at the last key."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = _varlen_parameters()
    kwargs: dict[str, Any] = {"is_causal": True}
    if "window_size" in accepted:
        kwargs = {"window_size": (-1, 0) if window is None else (window - 1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            kwargs["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "scale" in accepted:
        kwargs["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    out: Any = varlen_attn(q, k, v, layout.cu_queries, layout.cu_keys, max(layout.queries), max(layout.keys), **kwargs)
    return out
