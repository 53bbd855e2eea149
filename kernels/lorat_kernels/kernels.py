"""The Triton kernels of `linear_logprob`; `launch.py` allocates and calls them, `docs/kernel.md` derives them.

Three serve the fused candidate: `logits_kernel` (matmul, tile maximum, tile sum), `reduce_kernel` (tiles of a row to
its log-prob) and, with gradient, `residual_kernel` (stored exponentials to `onehot − p`). `row_kernel` serves the
cuBLAS candidate. Importing this module imports Triton; `launch.available` says whether that can be done.

Conventions: `i_` program ids, `o_` offsets, `m_` masks, `b_` blocks in registers with their shape beside them; all
arithmetic in float32; offsets that can pass 2³¹ in int64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expm1(x):
    """`exp(x) − 1` for x ≤ 0 without cancellation: Taylor's series to the 9th power where |x| < 1/2."""
    series = 1.0 + x * (1 / 8) * (1.0 + x * (1 / 9))
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * series)
    series = 1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series)
    series = x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * series))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """`log(1 + x)` for x ≥ −1 without cancellation: the series of artanh where |x| < 1/2."""
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))
    return tl.where((x > -0.5) & (x < 0.5), series, tl.log(1.0 + x))


@triton.jit
def _logits(b_z, softcap, scale, SOFTCAP: tl.constexpr):
    """Logits `scale·softcap·tanh(z/softcap)`, or `scale·z` without softcap, for raw `b_z`."""
    if SOFTCAP:
        b_t = tl.exp(-2.0 * tl.abs(b_z) / softcap)
        b_z = tl.where(b_z < 0, -softcap, softcap) * ((1.0 - b_t) / (1.0 + b_t))
    return b_z * scale


@triton.jit
def _slope(b_z, softcap, scale):
    """`1 − tanh²` of logits."""
    b_t = b_z / (softcap * scale)
    return 1.0 - b_t * b_t


@triton.jit
def _logprob(target, highest, rest):
    """`target − logsumexp` and the sum behind it, where `rest = Σ_{v≠y} exp(z_v − highest)`.

    Where the target is the highest logit the sum is `1 + rest`, and log1p keeps the digits of a log-prob near 0.
    """
    above = target - highest
    others = rest + _expm1(above)  # the whole sum, less 1
    return above - _log1p(others), 1.0 + others


@triton.jit
def logits_kernel(
    x_ptr,  # (PARTS, N, D)
    w_ptr,  # (V, D)
    b_ptr,  # (V,); not read without BIAS
    y_ptr,  # (N,) int64
    highest_ptr,  # (T, N) float32: greatest logit of the tile; T = ⌈V / BLOCK_N⌉
    rest_ptr,  # (T, N) float32: Σ exp(z − highest) of the tile, the target left out
    target_ptr,  # (N,) float32: the target's logit; stays what it was where no tile holds the target
    exp_ptr,  # (N, ≥ V): exp(z − highest)·slope·unit; not written without STORE
    N,
    V,
    D,
    stride_xp,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_en,
    softcap,
    scale,
    unit,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: mixed dtypes, and Triton's interpreter, whose bf16 dot is wrong
    EVEN_D: tl.constexpr,  # D is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of logits: multiply, reduce, and keep two numbers a row (and, with STORE, the exponentials).

    Programs that run together share columns of W: rows turn fastest.
    """
    i_m, i_n = tl.program_id(0) % tl.cdiv(N, BLOCK_M), tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < N, o_n < V
    # rows beyond the end read the last one instead: no mask in the loop, and what they give is not stored
    o_x = tl.minimum(o_m, N - 1).to(tl.int64) * stride_xn
    o_w = tl.minimum(o_n, V - 1).to(tl.int64) * stride_wv

    b_z = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_part in tl.static_range(PARTS):
        p_x = x_ptr + i_part * stride_xp + o_x[:, None] + (o_k * stride_xd)[None, :]
        p_w = w_ptr + o_w[None, :] + (o_k * stride_wd)[:, None]
        for i_k in range(0, tl.cdiv(D, BLOCK_K)):
            if EVEN_D:
                b_x = tl.load(p_x)  # (BLOCK_M, BLOCK_K)
                b_w = tl.load(p_w)  # (BLOCK_K, BLOCK_N)
            else:
                m_k = o_k < D - i_k * BLOCK_K
                b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
                b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
            if UPCAST:
                b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
            b_z = tl.dot(b_x, b_w, b_z, input_precision="ieee")
            p_x += BLOCK_K * stride_xd
            p_w += BLOCK_K * stride_wd

    if BIAS:
        b_z += tl.load(b_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_z = tl.where(m_n[None, :], _logits(b_z, softcap, scale, SOFTCAP), float("-inf"))
    b_y = tl.load(y_ptr + o_m, mask=m_m, other=-1)  # (BLOCK_M,)
    m_y = o_n[None, :] == b_y[:, None]
    m_here = m_m & (b_y >= i_n * BLOCK_N) & (b_y < i_n * BLOCK_N + BLOCK_N) & (b_y < V)
    tl.store(target_ptr + o_m, tl.sum(tl.where(m_y, b_z, 0.0), axis=1), mask=m_here)

    b_highest = tl.max(b_z, axis=1)  # (BLOCK_M,)
    # a tile of nothing but −inf has the sum 0; a NaN or +inf makes it NaN
    b_e = tl.exp(b_z - tl.where(b_highest == float("-inf"), 0.0, b_highest)[:, None])
    b_rest = tl.sum(tl.where(m_y, 0.0, b_e), axis=1)
    o_t = i_n.to(tl.int64) * N + o_m
    tl.store(highest_ptr + o_t, b_highest, mask=m_m)
    tl.store(rest_ptr + o_t, b_rest, mask=m_m)
    if STORE:
        if SOFTCAP:
            b_e *= _slope(b_z, softcap, scale)
        p_e = exp_ptr + o_m.to(tl.int64)[:, None] * stride_en + o_n[None, :]
        tl.store(p_e, (b_e * unit).to(exp_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def reduce_kernel(
    highest_ptr,  # (T, N) float32
    rest_ptr,  # (T, N) float32; with FACTOR overwritten by exp(highest − greatest) / Σ exp
    target_ptr,  # (N,) float32
    y_ptr,  # (N,) int64
    logp_ptr,  # (N,) float32
    N,
    T,
    ignore_index,
    FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tiles of BLOCK_R rows to their log-probs, always in the same order; ignored rows give 0."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_t = tl.arange(0, BLOCK_T)
    m_r = o_r < N

    b_top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for i_t in range(0, T, BLOCK_T):
        m_tr = (i_t + o_t < T)[:, None] & m_r[None, :]
        o_tr = (i_t + o_t).to(tl.int64)[:, None] * N + o_r[None, :]
        b_h = tl.load(highest_ptr + o_tr, mask=m_tr, other=float("-inf"))  # (BLOCK_T, BLOCK_R)
        b_top = tl.maximum(b_top, tl.max(b_h, axis=0))
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)

    b_rest = tl.zeros([BLOCK_R], dtype=tl.float32)
    for i_t in range(0, T, BLOCK_T):
        m_tr = (i_t + o_t < T)[:, None] & m_r[None, :]
        o_tr = (i_t + o_t).to(tl.int64)[:, None] * N + o_r[None, :]
        b_h = tl.load(highest_ptr + o_tr, mask=m_tr, other=float("-inf"))
        b_s = tl.load(rest_ptr + o_tr, mask=m_tr, other=0.0)
        b_rest += tl.sum(b_s * tl.exp(b_h - b_top[None, :]), axis=0)

    b_target = tl.load(target_ptr + o_r, mask=m_r, other=0.0)
    b_y = tl.load(y_ptr + o_r, mask=m_r, other=0)
    b_logp, b_total = _logprob(b_target, b_top, b_rest)
    tl.store(logp_ptr + o_r, tl.where(b_y == ignore_index, 0.0, b_logp), mask=m_r)
    if FACTOR:
        tl.debug_barrier()  # every warp has read `rest`
        for i_t in range(0, T, BLOCK_T):
            m_tr = (i_t + o_t < T)[:, None] & m_r[None, :]
            o_tr = (i_t + o_t).to(tl.int64)[:, None] * N + o_r[None, :]
            b_h = tl.load(highest_ptr + o_tr, mask=m_tr, other=float("-inf"))
            b_f = tl.exp(b_h - b_top[None, :]) / b_total[None, :]
            tl.store(rest_ptr + o_tr, b_f, mask=m_tr)


@triton.jit
def residual_kernel(
    exp_ptr,  # (N, ≥ V), in place: exp(z − highest)·slope·unit to (onehot − p)·slope·unit
    factor_ptr,  # (T, N) float32
    logp_ptr,  # (N,) float32
    target_ptr,  # (N,) float32; not read without SOFTCAP
    y_ptr,  # (N,) int64
    N,
    V,
    stride_en,
    ignore_index,
    softcap,
    scale,
    unit,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,  # columns behind one factor
    BLOCK: tl.constexpr,
):
    """A piece of one row; the target's `1 − p` is `−expm1(logp)`, which keeps its digits where p is nearly 1."""
    i_r, o_v = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    p_e = exp_ptr + i_r.to(tl.int64) * stride_en + o_v
    y = tl.load(y_ptr + i_r)
    at_target = -_expm1(tl.load(logp_ptr + i_r)) * unit
    if SOFTCAP:
        at_target *= _slope(tl.load(target_ptr + i_r), softcap, scale)
    b_f = tl.load(factor_ptr + (o_v // TILE).to(tl.int64) * N + i_r, mask=m_v, other=0.0)  # (BLOCK,)
    b_r = -tl.load(p_e, mask=m_v, other=0.0).to(tl.float32) * b_f
    b_r = tl.where(o_v == y, at_target, b_r)
    b_r = tl.where(y == ignore_index, 0.0, b_r)
    tl.store(p_e, b_r.to(exp_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def row_kernel(
    z_ptr,  # (N, V) float32: hidden @ Wᵀ
    r_ptr,  # the same memory, in the head's dtype, with GRAD: (onehot − p)·slope·unit over the front half of each row
    b_ptr,  # (V,); not read without BIAS
    y_ptr,  # (N,) int64
    logp_ptr,  # (N,) float32
    V,
    stride_zn,
    stride_rn,
    ignore_index,
    softcap,
    scale,
    unit,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of finished products: log-prob in one reading, residual in a second.

    The residual lands where the products were. It is no wider than they are, so a block is written only over blocks
    that have been read; the barrier keeps that true inside a block.
    """
    i_r = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + i_r)
    p_z = z_ptr + i_r * stride_zn
    b_top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_rest = tl.zeros([BLOCK], dtype=tl.float32)
    target = tl.load(logp_ptr + i_r)  # NaN, unless a column below is the target
    for i_v in range(0, V, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        m_v = o_v < V
        b_z = tl.load(p_z + o_v, mask=m_v, other=float("-inf"))  # (BLOCK,)
        if BIAS:
            b_z += tl.load(b_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_z = tl.where(m_v, _logits(b_z, softcap, scale, SOFTCAP), float("-inf"))
        b_new = tl.maximum(b_top, b_z)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_e = tl.where((o_v == y) | ~m_v, 0.0, tl.exp(b_z - b_base))
        b_rest = b_rest * tl.exp(b_top - b_base) + b_e
        b_top = b_new
        if (y >= i_v) & (y < i_v + BLOCK) & (y < V):
            target = tl.sum(tl.where(o_v == y, b_z, 0.0), axis=0)
    top = tl.max(b_top, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    logp, total = _logprob(target, top, tl.sum(b_rest * tl.exp(b_top - top), axis=0))
    tl.store(logp_ptr + i_r, tl.where(y == ignore_index, 0.0, logp))
    if GRAD:
        p_r = r_ptr + i_r * stride_rn
        for i_v in range(0, V, BLOCK):
            o_v = i_v + tl.arange(0, BLOCK)
            m_v = o_v < V
            b_z = tl.load(p_z + o_v, mask=m_v, other=float("-inf"))
            if BIAS:
                b_z += tl.load(b_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_z = _logits(b_z, softcap, scale, SOFTCAP)
            b_r = tl.where(o_v == y, -_expm1(logp), -tl.exp(b_z - top) / total) * unit
            if SOFTCAP:
                b_r *= _slope(b_z, softcap, scale)
            b_r = tl.where(y == ignore_index, 0.0, b_r)
            tl.debug_barrier()
            tl.store(p_r + o_v, b_r.to(r_ptr.dtype.element_ty), mask=m_v)
