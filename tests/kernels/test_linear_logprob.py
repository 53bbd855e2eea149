"""`linear_logprob` against float64 truth and against plain torch in the same dtype; see `within`."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from lorat_kernels import linear_logprob, naive
from lorat_kernels.linear_logprob import CHUNK_ROWS, VOCAB_BLOCK

LOGP_EPS = 4e-6  # nats; log-probs here are below 32, where float32 has a spacing of 2e-6
GRAD_EPS = 4e-6  # of gradients of order one


def make(n, d, v, dtype, *, bias=True, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (scale * torch.randn(v, d, generator=generator) / math.sqrt(d) * 2).to(dtype)
    offset = torch.randn(v, generator=generator).to(dtype) if bias else None
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, targets, offset


def plain(hidden, weight, targets, bias=None, *, temperature=1.0, softcap=None, ignore_index=-100):
    """What people write: logits in the dtype of the model, log-softmax in float32."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits / temperature).float()
    ignored = targets == ignore_index
    logp = logits.log_softmax(-1).gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    return logp.masked_fill(ignored, 0)


def run(function, hidden, weight, targets, bias=None, *, upstream=None, **options):
    """Log-probs and the gradient of hidden for `upstream` (ones by default)."""
    leaf = hidden.detach().clone().requires_grad_()
    logp = function(leaf, weight, targets, bias, **options)
    logp.backward(torch.ones_like(logp) if upstream is None else upstream.to(logp))
    return logp.detach(), leaf.grad


def truth(hidden, weight, targets, bias=None, **options):
    double = [None if x is None else x.double() for x in (hidden, weight, bias)]
    return run(naive.linear_logprob, double[0], double[1], targets, double[2], **options)


def within(ours, theirs, exact, eps):
    """Three-way tolerance: the greatest error of ours is at most that of plain torch in the same dtype, plus eps."""
    assert ours.shape == exact.shape
    error = (ours.double() - exact).abs().max().item()
    allowed = (theirs.double() - exact).abs().max().item() + eps
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = list(itertools.product([False, True], [1.0, 0.7], [None, 5.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "temperature", "softcap"), SETTINGS)
def test_values_and_gradients_are_no_worse_than_plain_torch(dtype, bias, temperature, softcap):
    inputs = make(37, 48, 203, dtype, bias=bias)
    options = {"temperature": temperature, "softcap": softcap}
    ours, theirs, exact = run(linear_logprob, *inputs, **options), run(plain, *inputs, **options), None
    exact = truth(*inputs, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    within(ours[0], theirs[0], exact[0], LOGP_EPS)
    within(ours[1], theirs[1], exact[1], GRAD_EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_never_rounded_to_sixteen_bits(dtype):
    """The point of the function: the log-probs of 16-bit operands are as exact as those of float32 ones."""
    inputs = make(64, 96, 501, dtype)
    error = (linear_logprob(*inputs).double() - truth(*inputs)[0]).abs().max().item()
    rounded = (plain(*inputs).double() - truth(*inputs)[0]).abs().max().item()
    assert error <= LOGP_EPS < 100 * LOGP_EPS < rounded


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 15, 16, 17, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunk_boundaries(n, dtype):
    inputs = make(n, 17, 31, dtype, seed=n)
    logp, grad = run(linear_logprob, *inputs, chunk_rows=8)
    assert logp.shape == (n,) and grad.shape == (n, 17)
    if n:
        exact, theirs = truth(*inputs), run(plain, *inputs)
        within(logp, theirs[0], exact[0], LOGP_EPS)
        within(grad, theirs[1], exact[1], GRAD_EPS)


@pytest.mark.parametrize("n", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_default_chunk_boundaries(n):
    inputs = make(n, 16, 33, torch.float32)
    within(linear_logprob(*inputs), plain(*inputs), truth(*inputs)[0], LOGP_EPS)


@pytest.mark.parametrize("v", [1, 2, VOCAB_BLOCK - 1, VOCAB_BLOCK, VOCAB_BLOCK + 1, 2 * VOCAB_BLOCK + 5])
def test_vocabulary_block_boundaries(v):
    hidden, weight, targets, bias = make(5, 8, v, torch.bfloat16)
    targets[0], targets[1] = v - 1, min(VOCAB_BLOCK, v - 1)
    exact, theirs = truth(hidden, weight, targets, bias), run(plain, hidden, weight, targets, bias)
    ours = run(linear_logprob, hidden, weight, targets, bias)
    within(ours[0], theirs[0], exact[0], LOGP_EPS)
    within(ours[1], theirs[1], exact[1], GRAD_EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bitwise_equal_with_and_without_gradient(dtype, softcap):
    hidden, weight, targets, bias = make(29, 24, 77, dtype)
    options = {"softcap": softcap, "temperature": 0.9, "chunk_rows": 8}
    with_grad = linear_logprob(hidden.clone().requires_grad_(), weight, targets, bias, **options)
    without = linear_logprob(hidden, weight, targets, bias, **options)
    with torch.no_grad():
        under_no_grad = linear_logprob(hidden.clone().requires_grad_(), weight, targets, bias, **options)
    assert with_grad.requires_grad and not without.requires_grad and not under_no_grad.requires_grad
    assert torch.equal(with_grad, without) and torch.equal(with_grad, under_no_grad)


def test_no_gradient_is_computed_when_none_is_asked_for(monkeypatch):

    module, asked = sys.modules["lorat_kernels.linear_logprob"], []
    original = module._forward
    monkeypatch.setattr(module, "_forward", lambda *a: asked.append(a[4]) or original(*a))
    hidden, weight, targets, _ = make(3, 4, 5, torch.float32)
    with torch.no_grad():
        module.linear_logprob(hidden.requires_grad_(), weight, targets)
    assert asked == [False]
    module.linear_logprob(hidden, weight, targets)
    assert asked == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_give_zero_and_no_gradient(dtype):
    hidden, weight, targets, bias = make(11, 16, 23, dtype)
    targets[[0, 4, 10]] = -100
    hidden[4] = torch.nan  # what a padding row holds must not matter
    logp, grad = run(linear_logprob, hidden, weight, targets, bias, softcap=5.0, chunk_rows=4)
    assert logp[[0, 4, 10]].tolist() == [0, 0, 0] and not grad[[0, 4, 10]].any()
    kept = targets != -100
    alone = truth(hidden[kept], weight, targets[kept], bias, softcap=5.0)
    theirs = run(plain, hidden[kept], weight, targets[kept], bias, softcap=5.0)
    within(logp[kept], theirs[0], alone[0], LOGP_EPS)
    within(grad[kept], theirs[1], alone[1], GRAD_EPS)


def test_all_ignored_and_another_ignore_index():
    hidden, weight, targets, bias = make(9, 8, 12, torch.float32)
    logp, grad = run(linear_logprob, hidden, weight, torch.full((9,), -100), bias)
    assert not logp.any() and not grad.any()
    targets[3] = 7
    logp = linear_logprob(hidden, weight, targets, bias, ignore_index=7)
    assert torch.equal(logp == 0, targets == 7)


@pytest.mark.parametrize("wrong", [-1, 12, 2**40, -101])
def test_a_target_outside_the_vocabulary_is_an_error(wrong):
    hidden, weight, targets, bias = make(9, 8, 12, torch.float32)
    targets[5] = wrong
    with pytest.raises(ValueError, match=rf"targets\[5\] = {wrong} is outside the vocabulary of 12"):
        linear_logprob(hidden, weight, targets, bias)


def test_a_target_outside_the_vocabulary_is_nan_where_values_are_not_looked_at(monkeypatch):
    """The path of a GPU, where looking would wait for it: only the wrong row becomes NaN, gradient too."""
    monkeypatch.setattr(sys.modules["lorat_kernels.linear_logprob"], "_check_range", lambda *_: None)
    hidden, weight, targets, bias = make(9, 8, 12, torch.float32)
    targets[5] = 12
    logp, grad = run(linear_logprob, hidden, weight, targets, bias)
    assert logp.isnan().tolist() == [i == 5 for i in range(9)]
    assert grad.isnan().any(dim=1).tolist() == [i == 5 for i in range(9)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_finite_differences(softcap, bias):
    hidden, weight, targets, offset = make(7, 5, 11, torch.float64, bias=bias)
    targets[2] = -100
    options = {"temperature": 1.3, "softcap": softcap, "chunk_rows": 3}
    assert torch.autograd.gradcheck(
        lambda h: linear_logprob(h, weight, targets, offset, **options), [hidden.requires_grad_()]
    )


def test_float64_equals_autograd_through_the_definition():
    hidden, weight, targets, bias = make(13, 9, 21, torch.float64)
    upstream = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"temperature": 0.8, "softcap": 3.0, "upstream": upstream}
    ours, exact = (
        run(linear_logprob, hidden, weight, targets, bias, **options),
        truth(hidden, weight, targets, bias, **options),
    )
    assert ours[0].dtype == torch.float64
    torch.testing.assert_close(ours[0], exact[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(ours[1], exact[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients_weigh_rows(dtype):
    inputs = make(21, 16, 40, dtype)
    upstream = torch.linspace(-2, 2, 21)
    upstream[10] = 0
    ours, theirs = (
        run(f, *inputs, upstream=upstream, **o) for f, o in ((linear_logprob, {"chunk_rows": 8}), (plain, {}))
    )
    within(ours[1], theirs[1], truth(*inputs, upstream=upstream)[1], GRAD_EPS)
    assert not ours[1][10].any()


def test_a_small_fp16_gradient_survives_until_the_loss_scale_reaches_it():
    """log p ≈ −1e-6: a gradient of 1e-6 stored in fp16 would keep four bits."""
    hidden, weight = torch.tensor([[1.0, 0.5]]).half(), torch.tensor([[14.0, 0.0], [0.0, 0.3]]).half()
    upstream = torch.tensor([65536.0])
    ours = run(linear_logprob, hidden, weight, torch.tensor([0]), upstream=upstream)[1]
    exact = truth(hidden, weight, torch.tensor([0]), upstream=upstream)[1]
    torch.testing.assert_close(ours.double(), exact, rtol=2**-11, atol=0)


def test_a_confident_row_keeps_the_digits_of_its_gradient():
    """p = 1 − 2e-9: `1 − p` is 0 in float32, `−expm1(log p)` is not."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[20.0], [0.0]])
    _, grad = run(linear_logprob, hidden, weight, torch.tensor([0]))
    assert grad.item() == pytest.approx(20 / (1 + math.exp(20)), rel=1e-5)


def test_large_logits_stay_finite():
    hidden, weight, targets, bias = make(9, 16, 40, torch.float32, scale=1e4)
    logp, grad = run(linear_logprob, hidden, weight, targets, bias)
    assert logp.isfinite().all() and grad.isfinite().all() and logp.min() < -1e4


def test_strided_operands_and_int32_targets():
    hidden, weight, targets, bias = make(11, 16, 30, torch.float32)
    expected = run(linear_logprob, hidden, weight, targets, bias)
    wide = torch.stack([hidden, torch.zeros_like(hidden)], dim=2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    logp = linear_logprob(
        wide.requires_grad_(),
        weight.T.contiguous().T,
        targets.repeat_interleave(2)[::2].int(),
        bias.repeat(2, 1).T[:, 0],
    )
    torch.testing.assert_close(logp, expected[0], rtol=0, atol=LOGP_EPS)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), wide)[0], expected[1], rtol=0, atol=GRAD_EPS)


def test_mixed_dtypes_are_not_rounded_to_the_narrower():
    hidden, weight, targets, bias = make(11, 16, 30, torch.float32)
    logp, grad = run(linear_logprob, hidden, weight.bfloat16(), targets, bias.half())
    exact = truth(hidden, weight.bfloat16(), targets, bias.half())
    within(logp, exact[0], exact[0], LOGP_EPS)
    within(grad, exact[1], exact[1], GRAD_EPS)


def test_autocast_changes_nothing():
    inputs = make(11, 64, 30, torch.float32)
    outside, defined = run(linear_logprob, *inputs), naive.linear_logprob(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(linear_logprob, *inputs)
        assert torch.equal(naive.linear_logprob(*inputs), defined)
    assert torch.equal(outside[0], inside[0]) and torch.equal(outside[1], inside[1])


def test_gradients_flow_on_below_the_head():
    hidden, weight, targets, bias = make(7, 8, 12, torch.float64)
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(linear_logprob(factor * hidden, weight, targets, bias).sum(), factor)
    exact = torch.autograd.grad(naive.linear_logprob(factor * hidden, weight, targets, bias).sum(), factor)
    torch.testing.assert_close(ours, exact)


def test_a_trainable_head_is_refused():
    hidden, weight, targets, bias = make(3, 4, 5, torch.float32)
    for trainable in (weight, bias):
        trainable.requires_grad_()
        for h in (hidden, hidden.clone().requires_grad_()):
            with pytest.raises(ValueError, match="Freeze it"):
                linear_logprob(h, weight, targets, bias)
        with torch.no_grad():
            linear_logprob(hidden, weight, targets, bias)
        trainable.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"\(3, 5\)"),
        ({"hidden": torch.zeros(1, 3, 4)}, r"\(1, 3, 4\)"),
        ({"weight": torch.zeros(5, 4, dtype=torch.uint8)}, "floating point"),
        ({"weight": torch.zeros(0, 4)}, "empty vocabulary"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets \(4,\)"),
        ({"targets": torch.zeros(3)}, "integers"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": 0.0}, "softcap"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_errors_name_what_was_given(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))


def test_the_definition_by_hand():
    # logits (ln 2, 0)·… : hidden 1, weight (ln 2, 0) → p = (2/3, 1/3); bias (0, ln 2) evens it out; T = 0.5 squares
    hidden, weight = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[math.log(2)], [0.0]], dtype=torch.float64)
    targets, bias = torch.tensor([0, 1]), torch.tensor([0, math.log(2)], dtype=torch.float64)
    for function in (naive.linear_logprob, linear_logprob):
        assert function(hidden, weight, targets).exp().tolist() == pytest.approx([2 / 3, 1 / 3])
        assert function(hidden, weight, targets, bias).exp().tolist() == pytest.approx([1 / 2, 1 / 2])
        assert function(hidden, weight, targets, temperature=0.5).exp().tolist() == pytest.approx([4 / 5, 1 / 5])
        # softcap c = ln 2: tanh(1)·ln 2 = 0.527896 → σ(0.527896) = 0.628992
        capped = function(hidden, weight, targets, softcap=math.log(2)).exp().tolist()
        assert capped == pytest.approx([0.628992, 0.371008], abs=1e-6)
