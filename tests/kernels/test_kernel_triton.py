"""The Triton kernels against float64, against plain torch in the same dtype, and against themselves, bit for bit.

On a machine with CUDA they run as they are. Without, they need Triton's interpreter, which must be chosen before Triton
is first imported: `test_kernel.py` runs this file in a process of its own with TRITON_INTERPRET=1; here it is skipped.
"""

import itertools
import math
import os
import sys

import numpy as np
import pytest
import torch
from lorat_kernels import launch, linear_logprob, naive, plans

from tests.kernels.test_linear_logprob import GRAD_EPS, LOGP_EPS, make, plain, run, truth, within

CUDA = torch.cuda.is_available() and launch.available() and os.environ.get("TRITON_INTERPRET") != "1"
if not CUDA and not (launch.available() and os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1 from the start (test_kernel.py does that)", allow_module_level=True)
DEVICE = torch.device("cuda" if CUDA else "cpu")
if CUDA and launch.plan_of(DEVICE) is None:
    pytest.skip("the kernels need compute capability 8.0", allow_module_level=True)
MODULE = sys.modules["lorat_kernels.linear_logprob"]
BLOCKS = launch.plan_of(DEVICE).half
M, N, K = BLOCKS.m, BLOCKS.n, BLOCKS.k
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = list(itertools.product([False, True], [1.0, 0.7], [None, 5.0]))


@pytest.fixture(params=["fused", "cublas"], autouse=True)
def candidate(request, monkeypatch):
    monkeypatch.setattr(launch, "candidate_of", lambda hidden, weight: request.param)
    monkeypatch.setattr(launch, "BLOCK_ROW", 64 if not CUDA else launch.BLOCK_ROW)
    monkeypatch.setattr(MODULE, "_check_range", lambda *_: None)  # as on a GPU: values are not looked at
    return request.param


@pytest.fixture
def fused(candidate):
    if candidate != "fused" and not CUDA:
        pytest.skip("CPU BLAS does not promise a row the same bits at another place; cuBLAS is tried on a GPU")


def cuda(*tensors):
    return tuple(None if x is None else x.to(DEVICE) for x in tensors)


def inputs(*args, **kwargs):
    return cuda(*make(*args, **kwargs))


def check(args, options=None, ours=None, eps=(LOGP_EPS, GRAD_EPS)):
    options = options or {}
    ours = run(linear_logprob, *args, **options) if ours is None else ours
    options = {k: v for k, v in options.items() if k not in ("chunk_rows", "budget")}
    theirs, exact = run(plain, *args, **options), truth(*args, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == args[0].dtype
    within(ours[0], theirs[0], exact[0], eps[0])
    within(ours[1], theirs[1], exact[1], eps[1])


def same(a, b):
    """Equal bits; NaN where NaN."""
    assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"differ by {(a - b).abs().nan_to_num().max().item():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "temperature", "softcap"), SETTINGS)
def test_every_dtype_and_option(dtype, bias, temperature, softcap):
    check(inputs(M + 5, K + 3, 2 * N + 7, dtype, bias=bias), {"temperature": temperature, "softcap": softcap})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_never_rounded(dtype):
    args = inputs(M, 2 * K, 3 * N + 1, dtype)
    error = (linear_logprob(*args).double() - truth(*args)[0]).abs().max().item()
    rounded = (plain(*args).double() - truth(*args)[0]).abs().max().item()
    assert error <= LOGP_EPS < 100 * LOGP_EPS < rounded


@pytest.mark.parametrize("rows", [1, M - 1, M, M + 1, 2 * M + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_around_a_block(rows, dtype):
    check(inputs(rows, K, N + 1, dtype, seed=rows))


@pytest.mark.parametrize("vocab", [1, 2, N - 1, N, N + 1, 2 * N - 1, 2 * N, 3 * N + 1])
def test_vocabularies_around_a_block(vocab):
    hidden, weight, targets, bias = inputs(5, 8, vocab, torch.bfloat16)
    targets[0], targets[1] = vocab - 1, min(N, vocab - 1)
    check((hidden, weight, targets, bias))


@pytest.mark.parametrize("dim", [1, 7, K - 1, K, K + 1, 2 * K, 3 * K + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hidden_sizes_around_a_block(dim, dtype):
    check(inputs(4, dim, N + 3, dtype))


@pytest.mark.parametrize("seed", range(12))
def test_any_shape(seed):
    generator = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(1, top, (1,), generator=generator)) for top in (3 * M, 3 * K, 5 * N))
    options = {"temperature": [1.0, 0.5, 2.0][seed % 3], "softcap": [None, 8.0][seed % 2], "chunk_rows": 1 + seed % 23}
    check(inputs(n, d, v, DTYPES[seed % 3], seed=seed, bias=seed % 4 != 0), options)


def test_more_tiles_than_the_reduction_reads_at_once():
    check(inputs(3, 4, launch.BLOCK_T * N * 2 + 5 if not CUDA else 40 * N, torch.float32))


def test_no_rows():
    for dtype in DTYPES:
        hidden, weight, targets, bias = inputs(0, 8, 12, dtype)
        logp, grad = run(linear_logprob, hidden, weight, targets, bias)
        assert logp.shape == (0,) and logp.dtype == torch.float32 and grad.shape == (0, 8)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_are_finite_differences(softcap):
    args, options = inputs(3, 5, N + 2, torch.float32), {"temperature": 1.3, "softcap": softcap}
    step, grad = 2**-6, run(linear_logprob, *args, **options)[1]
    for i in range(5):
        move = step * torch.eye(5, device=DEVICE)[i]
        up, down = (linear_logprob(args[0] + s * move, *args[1:], **options) for s in (1, -1))
        torch.testing.assert_close((up - down) / (2 * step), grad[:, i], rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients_weigh_rows(dtype):
    args, upstream = inputs(M + 3, K, N, dtype), torch.linspace(-2, 2, M + 3, device=DEVICE)
    upstream[4] = 0
    logp, grad = run(linear_logprob, *args, upstream=upstream)
    theirs, exact = run(plain, *args, upstream=upstream), truth(*args, upstream=upstream)
    within(grad, theirs[1], exact[1], GRAD_EPS)
    assert not grad[4].any() and logp.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("missing", [1e-3, 1e-4, 1e-5, 1e-6])
def test_confident_targets_keep_their_digits(dtype, missing):
    """p = 1 − missing: `1 − p` has no digits left in 16 bits and one in float32; log p and its gradient keep theirs."""
    top = math.log(1 / missing - 1)
    hidden, weight = torch.ones(1, 1, device=DEVICE, dtype=dtype), torch.tensor([[top], [0.0]], device=DEVICE).to(dtype)
    args = (hidden, weight, torch.zeros(1, dtype=torch.long, device=DEVICE))
    exact, ours = truth(*args), run(linear_logprob, *args)
    assert 0.9 < -exact[0].item() / missing < 1.1
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)


def test_an_offset_of_every_logit_changes_nothing():
    hidden, weight, targets, bias = inputs(M, K, 2 * N + 3, torch.float32)
    here = run(linear_logprob, hidden, weight, targets, bias)
    for offset in (-200.0, 64.0):
        there = run(linear_logprob, hidden, weight, targets, bias + offset)
        torch.testing.assert_close(there[0], here[0], rtol=0, atol=1e-4)  # float32 is 1.5e-5 wide at 200
        torch.testing.assert_close(there[1], here[1], rtol=0, atol=1e-4)


def test_what_uninitialised_memory_holds_does_not_matter(monkeypatch):
    """Every buffer starts as NaN, and so does all memory around the operands."""
    args, options = inputs(M + 3, K + 1, N + 5, torch.float32), {"softcap": 6.0, "chunk_rows": M}
    clean = run(linear_logprob, *args, **options)

    def around(x):
        big = torch.full([s + 9 for s in x.shape], torch.nan, dtype=x.dtype, device=x.device)
        inside = big[tuple(slice(4, 4 + s) for s in x.shape)]
        return inside.copy_(x)

    empty, empty_like = torch.empty, torch.empty_like
    poison = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    hidden, weight, targets, bias = args
    leaf = around(hidden).detach().requires_grad_()
    logp = linear_logprob(leaf, around(weight), targets, around(bias), **options)
    (grad,) = torch.autograd.grad(logp.sum(), leaf)
    same(logp.detach(), clean[0])
    same(grad, clean[1])


def test_ignored_rows():
    hidden, weight, targets, bias = inputs(M + 2, K, N + 1, torch.bfloat16)
    targets[[0, 3, M]] = -100
    hidden[3] = torch.nan  # what a padding row holds must not matter
    logp, grad = run(linear_logprob, hidden, weight, targets, bias, softcap=5.0)
    assert logp[[0, 3, M]].tolist() == [0, 0, 0] and not grad[[0, 3, M]].any()
    kept = targets != -100
    args, options = (hidden[kept], weight, targets[kept], bias), {"softcap": 5.0}
    check(args, options, (logp[kept], grad[kept]))


@pytest.mark.parametrize("ignore", [-100, 7, -1])
def test_every_row_ignored(ignore):
    hidden, weight, _, bias = inputs(M + 1, K, N, torch.float16)
    targets = torch.full((M + 1,), ignore, device=DEVICE)
    logp, grad = run(linear_logprob, hidden, weight, targets, bias, ignore_index=ignore)
    assert logp.eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("wrong", [-1, -101, N + 3, N + 4, 2 * N, 2**31 + 1, 2**40])
def test_a_target_outside_the_vocabulary_is_loud(wrong):
    """N + 3 = V lies inside the last tile, beyond the vocabulary."""
    hidden, weight, targets, bias = inputs(9, K, N + 3, torch.float32)
    right = run(linear_logprob, hidden, weight, targets, bias)
    targets[5] = wrong
    logp, grad = run(linear_logprob, hidden, weight, targets, bias)
    others = [i for i in range(9) if i != 5]
    assert logp[5].isnan() and grad[5].isnan().all()
    same(logp[others], right[0][others])
    same(grad[others], right[1][others])


def test_infinite_logits():
    hidden, weight, targets, bias = inputs(7, K, 3 * N + 2, torch.float32)
    bias[N : 2 * N], bias[0] = -torch.inf, -torch.inf  # a whole tile, and a column
    targets[:] = 2 * N + 1
    targets[2] = N + 1  # impossible: log 0
    check_rows = [i for i in range(7) if i not in (2, 4, 5, 6)]
    hidden[4], hidden[5], hidden[6] = torch.inf, -torch.inf, torch.nan
    logp, grad = run(linear_logprob, hidden, weight, targets, bias)
    exact = truth(hidden, weight, targets, bias)
    assert logp[2].item() == -math.inf and exact[0][2].item() == -math.inf
    assert logp[[4, 5, 6]].isnan().all() and exact[0][[4, 5, 6]].isnan().all()
    torch.testing.assert_close(logp[check_rows].double(), exact[0][check_rows], rtol=0, atol=LOGP_EPS)
    torch.testing.assert_close(grad[:4].double(), exact[1][:4], rtol=0, atol=GRAD_EPS)
    nothing = torch.full_like(bias, -torch.inf)
    assert linear_logprob(hidden, weight, targets, nothing).isnan().all()


def test_large_logits():
    args = inputs(9, 16, N + 8, torch.float32, scale=1e4)
    logp, grad = run(linear_logprob, *args)
    assert logp.isfinite().all() and grad.isfinite().all() and logp.min() < -1e4


def test_strided_operands_and_int32_targets():
    hidden, weight, targets, bias = inputs(M + 1, K, N + 1, torch.float32)
    expected = run(linear_logprob, hidden, weight, targets, bias)
    wide = torch.stack([hidden, torch.zeros_like(hidden)], dim=2).flatten(1)[:, ::2].requires_grad_()
    across = weight.T.contiguous().T
    logp = linear_logprob(wide, across, targets.repeat_interleave(2)[::2].int(), bias.repeat(2, 1).T[:, 0])
    assert not wide.is_contiguous() and not across.is_contiguous()
    torch.testing.assert_close(logp.detach(), expected[0], rtol=0, atol=LOGP_EPS)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), wide)[0], expected[1], rtol=0, atol=GRAD_EPS)


@pytest.mark.parametrize("dtypes", itertools.permutations(DTYPES, 2), ids=lambda d: f"{d[0]}-{d[1]}")
def test_mixed_dtypes(dtypes):
    """float32 rows under a bf16 head are multiplied as two bf16 terms: 16 bits of digits, not 8."""
    hidden, weight, targets, bias = inputs(M + 1, K + 1, N + 1, torch.float32)
    args = (hidden.to(dtypes[0]), weight.to(dtypes[1]), targets, bias)
    ours, exact = run(linear_logprob, *args), truth(*args)
    split = dtypes == (torch.float32, torch.bfloat16)
    within(ours[0], exact[0], exact[0], 1e-4 if split else LOGP_EPS)
    if split:
        rounded = truth(args[0].bfloat16(), *args[1:])
        assert (ours[0] - exact[0]).abs().max() < (rounded[0] - exact[0]).abs().max() / 50
    steps = min(torch.finfo(d).bits for d in dtypes) == 16 and torch.finfo(args[0].dtype).eps / 2
    residual = torch.finfo(args[1].dtype).eps / 2
    within(ours[1], exact[1], exact[1], GRAD_EPS + float(exact[1].abs().max()) * (steps + 2 * residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bitwise_equal_with_and_without_gradient(dtype, softcap):
    hidden, weight, targets, bias = inputs(2 * M + 3, K + 1, 3 * N + 2, dtype)
    options = {"softcap": softcap, "temperature": 0.9}
    with_grad = linear_logprob(hidden.clone().requires_grad_(), weight, targets, bias, **options)
    without = linear_logprob(hidden, weight, targets, bias, **options)
    with torch.no_grad():
        under_no_grad = linear_logprob(hidden.clone().requires_grad_(), weight, targets, bias, **options)
    assert with_grad.requires_grad and not without.requires_grad and not under_no_grad.requires_grad
    same(with_grad.detach(), without)
    same(under_no_grad, without)


@pytest.fixture
def dot_by_rows(monkeypatch):
    """The interpreter's `tl.dot` as a product in which a row's sum has one order; a CPU's BLAS does not promise that."""
    if not CUDA:
        from triton.runtime import interpreter

        plain = np.matmul
        by_rows = lambda a, b, dtype=None: np.einsum("ik,kj->ij", a, b, dtype=dtype) if a.ndim == 2 else plain(a, b)  # noqa: E731
        monkeypatch.setattr(interpreter.np, "matmul", by_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, fused, dot_by_rows):
    """Bitwise: alone, in another order, among fewer, beside NaN."""
    hidden, weight, targets, bias = inputs(2 * M + 5, 2 * K + 3, 2 * N + 9, dtype)
    whole = linear_logprob(hidden, weight, targets, bias)
    rows = hidden.shape[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    same(linear_logprob(hidden[order], weight, targets[order], bias), whole[order])
    for kept in ([0], [rows - 1], [3, M, M + 7], list(range(1, rows)), list(range(M + 1))):
        same(linear_logprob(hidden[kept], weight, targets[kept], bias), whole[kept])
    hidden[1::2] = torch.nan
    same(linear_logprob(hidden, weight, targets, bias)[::2], whole[::2])


def test_chunks_change_no_bit(fused, candidate):
    """Of log-probs. In chunks that are no multiple of 512 rows the sums of a gradient may differ in order."""
    args = inputs(3 * M + 1, K, 2 * N + 1, torch.bfloat16)
    whole = run(linear_logprob, *args)
    for chunk in (1, 7, M, M + 1, 2 * M, 5 * M) if candidate == "fused" else (M, 2 * M):
        logp, grad = run(linear_logprob, *args, chunk_rows=chunk)
        if candidate == "fused":
            same(logp, whole[0])
        torch.testing.assert_close(logp, whole[0], rtol=0, atol=LOGP_EPS)
        torch.testing.assert_close(grad, whole[1], rtol=2**-7, atol=GRAD_EPS)
    for budget in (1, 10**6, 10**9):
        same(linear_logprob(*args, budget=budget), whole[0])


def test_chunks_of_whole_blocks_change_no_bit_of_a_gradient(monkeypatch, candidate):
    """The matmul behind a gradient always takes 512 rows, so neither a budget nor chunks of 512, 1024, … show in it."""
    if candidate == "cublas" and DEVICE.type == "cpu":
        pytest.skip("its products come from the CPU's matmul, whose sums go by the shape of the chunk")
    rows, multiply = [], launch._matmul_float32
    monkeypatch.setattr(launch, "_matmul_float32", lambda a, b, out=None: rows.append(len(a)) or multiply(a, b, out))
    args = inputs(520, 2, 20, torch.bfloat16)
    whole = run(linear_logprob, *args)
    for options in ({"chunk_rows": 512}, {"chunk_rows": 1024}, {"budget": 1}):
        rows.clear()
        for mine, theirs in zip(run(linear_logprob, *args, **options), whole):
            same(mine, theirs)
        if candidate == "fused":
            assert rows == [512, 8]


def test_a_budget_sets_the_chunks(monkeypatch, candidate):
    if candidate == "cublas":
        pytest.skip("its chunks have one shape")
    seen = []
    original = launch._fused_chunk
    monkeypatch.setattr(launch, "_fused_chunk", lambda *a: seen.append(a[0].shape[0]) or original(*a))
    args = inputs(600, 2, 40, torch.float32)
    run(linear_logprob, *args, budget=1)
    assert seen == [512, 88]
    seen.clear()
    run(linear_logprob, *args)
    assert seen == [600]


def test_nothing_is_stored_without_gradient(monkeypatch, candidate):
    if candidate == "cublas":
        pytest.skip("it always holds a chunk of products")
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k).numel()) or empty(*a, **k))
    hidden, weight, targets, bias = inputs(M, K, 40 * N, torch.float32)
    with torch.no_grad():
        linear_logprob(hidden.requires_grad_(), weight, targets, bias)
    assert max(sizes) == 2 * 40 * M  # two numbers a row and tile
    sizes.clear()
    linear_logprob(hidden, weight, targets, bias)
    assert max(sizes) == M * 40 * N


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(head):
    hidden, weight, targets, bias = inputs(11, 64, 30, torch.float32)
    args = (hidden, weight.to(head), targets, bias)
    outside = run(linear_logprob, *args)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = run(linear_logprob, *args)
    same(outside[0], inside[0])
    same(outside[1], inside[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    hidden, weight, targets, bias = inputs(M + 1, K, N, torch.float32)
    expected = run(linear_logprob, hidden, weight, targets, bias)
    leaf = hidden.clone().requires_grad_()
    logp = checkpoint(lambda h: linear_logprob(h, weight, targets, bias), leaf, use_reentrant=reentrant)
    logp.sum().backward()
    same(logp.detach(), expected[0])
    same(leaf.grad, expected[1])


@pytest.mark.parametrize("with_grad", [False, True])
def test_opcheck(with_grad):
    hidden, weight, targets, bias = inputs(5, 8, N + 1, torch.float32)
    arguments = (hidden, weight, targets, bias, with_grad, 0.8, 5.0, -100, None, 10**8)
    torch.library.opcheck(torch.ops.lorat.linear_logprob.default, arguments)


def test_policy_and_reference_are_equal_on_a_real_model(neox, fused):
    """Two adapters with equal weights: with gradient and without, in other company, the log-ratio is exactly 0."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(neox, dtype=torch.bfloat16).to(DEVICE)
    config = LoraConfig(r=4, target_modules=["query_key_value", "dense"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("ref", config)
    state = {k: v for k, v in model.named_parameters() if ".default." in k}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ref." in name:
                p.copy_(state[name.replace(".ref.", ".default.")])
    ids = torch.randint(0, base.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    head = base.get_output_embeddings()

    def logprobs(adapter):
        model.set_adapter(adapter)
        hidden = base.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        return linear_logprob(hidden, head.weight.detach(), ids[:, 1:].flatten())

    with torch.no_grad():
        reference = logprobs("ref")
    policy = logprobs("default")
    assert policy.requires_grad and torch.equal(policy.detach() - reference, torch.zeros_like(reference))
    model.set_adapter("default")
    whole = base(input_ids=ids).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    theirs = whole.gather(1, ids[:, 1:].flatten()[:, None])[:, 0]
    torch.testing.assert_close(policy.detach(), theirs.detach(), rtol=0, atol=0.1)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def marked(function):
    for mark in gpu:
        function = mark(function)
    return function


@marked
def test_a_hundred_runs_give_the_same_bits():
    args = inputs(777, 1024, 20011, torch.bfloat16)
    logp, grad = run(linear_logprob, *args)
    for _ in range(100):
        again = run(linear_logprob, *args)
        same(again[0], logp)
        same(again[1], grad)


@marked
@pytest.mark.parametrize(("rows", "dim", "vocab"), [(8320, 64, 262144), (8, 8320, 262144)])
def test_more_than_two_to_the_31_elements(rows, dim, vocab, candidate):
    """N·V and V·D beyond 2³¹: with 32-bit offsets the last rows would read and write elsewhere."""
    assert max(rows * vocab, vocab * dim) > 2**31
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, dim, generator=generator, device=DEVICE, dtype=torch.bfloat16) / math.sqrt(dim)
    targets = torch.randint(vocab - 1000, vocab, (rows,), generator=generator, device=DEVICE)
    logp, grad = run(linear_logprob, hidden, weight, targets, chunk_rows=rows)
    last = slice(rows - 4, rows)
    exact = truth(hidden[last], weight, targets[last]) if dim < 1000 else None
    if exact is None:
        logits = torch.cat([hidden[last].double() @ w.double().T for w in weight.split(16384)], dim=1)
        exact = (logits.log_softmax(-1).gather(1, targets[last][:, None])[:, 0], None)
    torch.testing.assert_close(logp[last].double(), exact[0], rtol=0, atol=1e-4)
    if exact[1] is not None:
        torch.testing.assert_close(grad[last].double(), exact[1], rtol=2**-6, atol=1e-3)


@marked
def test_a_stream_that_is_not_the_default_one():
    args = inputs(300, 512, 5003, torch.bfloat16)
    expected = run(linear_logprob, *args)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(args[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads zeros
        late.copy_(args[0])
        logp, grad = run(linear_logprob, late, *args[1:])
    stream.synchronize()
    same(logp, expected[0])
    same(grad, expected[1])


@marked
def test_the_default_choice_of_this_card(monkeypatch):
    """Without any switch: the plan's candidate, the budget held at the size it was made for."""
    monkeypatch.undo()
    rows, dim, vocab = 8192, 4096, 151936
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    hidden = torch.randn(rows, dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, dim, device=DEVICE, dtype=torch.bfloat16) / 64
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    linear_logprob(hidden, weight, targets).sum().backward()  # compiled, cuBLAS's own workspace there
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logp = linear_logprob(hidden, weight, targets)
    used = torch.cuda.max_memory_allocated() - before
    if plans.plan_for(torch.cuda.get_device_capability()).candidate == "fused":
        assert used <= 300_000_000 + 1_000_000, f"{used / 1e6:.0f} MB"
    exact = naive.linear_logprob(hidden[:64].detach().double(), weight.double(), targets[:64])
    assert (logp[:64].double() - exact).abs().max() < 1e-4


@marked
def test_torch_compile_on_a_gpu():
    args = inputs(M + 1, K, N, torch.bfloat16)
    expected = run(linear_logprob, *args)
    ours = run(torch.compile(linear_logprob, fullgraph=True), *args)
    same(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])
