"""Packs are exact: prompts shared and nothing padded gives what each completion alone gives, on many architectures.

The oracle is plain transformers: each completion in a forward pass of its own, without padding, log-softmax of the
model's own logits in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
import types

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorat.errors import ModelError
from lorat.model.models import Head, Models
from lorat.model.probe import why_not
from lorat.packs import attention
from lorat.packs.attention import NAMES, Gather, install, installed, packed_attention
from lorat.packs.logprobs import per_completion
from lorat.packs.packing import Packer, pad_rows, share_prompts, split_groups
from tests.helpers.architectures import SHARED, adapted, make


def draw_groups(seed=0, vocabulary=97):
    """Prompts of 1 to 9 tokens with two completions of 1 to 12, and one prompt with three."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(3, vocabulary) for _ in range(n)]  # noqa: E731
    pairs = [(ids(rng.randint(1, 9)), [ids(rng.randint(1, 12)), ids(rng.randint(1, 12))]) for _ in range(4)]
    return [*pairs, (ids(5), [ids(2), ids(8), ids(4)]), (ids(3), [ids(1)])]


def weighted(logps):
    return (logps * torch.linspace(-1, 1, len(logps))).sum()


def gradients(policy):
    grads = [p.grad.flatten().double() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    return torch.cat(grads)


def alone(policy, groups):
    """Log-probs (n,) of completions, each in a plain forward pass of its own, with gradient."""
    out = []
    for prompt, completions in groups:
        for completion in completions:
            row = torch.tensor([[*prompt, *completion]])
            logits = policy.get_base_model()(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
            tokens = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
            out.append(tokens.sum())
    return torch.stack(out)


def compare(policy, groups, backend=attention.attend):
    """`(greatest difference in nats, relative difference of the adapters' gradients)` of packs and plain passes."""
    expected = alone(policy, groups)
    weighted(expected).backward()
    g_expected = gradients(policy)
    assert install(policy.get_base_model())
    pack = share_prompts(groups).through(backend)
    ours = per_completion(Models(policy).tokens(pack), pack.lengths)
    weighted(ours).backward()
    g_ours = gradients(policy)
    assert g_expected.norm() > 0
    return (ours - expected).abs().max().item(), ((g_ours - g_expected).norm() / g_expected.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SHARED)
def test_a_pack_is_what_each_completion_alone_is(name, checkpointing):
    policy = adapted(make(name, SHARED[name]))
    if checkpointing:
        policy.enable_input_require_grads()
        policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    seen = []

    def listening(module, *args):
        seen.append(module)
        return attention.attend(module, *args)

    nats, relative = compare(policy, draw_groups(), listening)
    assert len(seen) == 2 * (1 + checkpointing)  # layers, forward and again in the backward
    assert nats < 5e-5
    assert relative < 1e-5


@pytest.mark.parametrize("name", ["GPTNeoX", "Llama", "Gemma2", "Qwen3Moe", "Mistral"])
def test_on_a_base_in_4_bit(name, tmp_path):
    from lorat.model.base import load_base
    from tests.helpers.worlds import run_config

    make(name, SHARED[name]).save_pretrained(tmp_path)
    model = load_base(run_config(str(tmp_path), tmp_path, load_in_4bit=True).base())
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    assert model.config._attn_implementation == ("eager" if name == "Gemma2" else "sdpa")  # sdpa leaves a soft cap out
    nats, relative = compare(adapted(model), draw_groups())
    assert nats < 5e-5
    assert relative < 1e-5


@pytest.mark.parametrize("name", ["GPTNeoX", "Mistral", "Gemma2"])
def test_a_completion_does_not_see_its_sibling_nor_another_pair(name):
    """Bit for bit, and without gradient from one to the other's embeddings."""
    policy = adapted(make(name, SHARED[name]))
    install(policy.get_base_model())
    head, groups = Head.of(policy), draw_groups()
    tokens = lambda g: Models(policy, head).tokens(share_prompts(g)).detach().split(share_prompts(g).lengths)  # noqa: E731
    before = tokens(groups)
    prompt, (first, second) = groups[1]
    other = [(t + 7) % 90 + 3 for t in second]
    after = tokens([groups[0], (prompt, [first, other]), *groups[2:]])
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [k != 3 for k in range(len(before))]
    embeddings = policy.get_base_model().get_input_embeddings()
    seen = []
    hook = embeddings.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad_()) or o)
    pack = share_prompts(groups)
    per_completion(Models(policy, head).tokens(pack), pack.lengths)[3].backward(inputs=seen)
    hook.remove()
    start = sum(len(p) + sum(map(len, cs)) for p, cs in groups[:1])
    mine = [*range(start, start + len(prompt))]
    mine += range(start + len(prompt) + len(first), start + len(prompt) + len(first) + len(second) - 1)
    assert seen[0].grad[0].abs().sum(-1).nonzero().flatten().tolist() == mine


def test_the_layout_of_a_small_row():
    """[5 6 | 7 | 8 9] [4 | 3]: keys of the second completion are 5 6 8 9."""
    pack = share_prompts([([5, 6], [[7], [8, 9]]), ([4], [[3]])])
    assert pack.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert pack.predict.tolist() == [1, 1, 3, 5] and pack.targets.tolist() == [7, 8, 9, 3]
    assert pack.lengths == [1, 2, 1]
    layout = pack.layout
    assert (layout.queries, layout.keys) == ([3, 2, 2], [3, 4, 2])
    assert layout.gather.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert layout.own.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert [(rows.tolist(), places.tolist()) for rows, places in layout.again] == [([0, 1], [3, 4])]
    assert layout.cu_queries.tolist() == [0, 3, 5, 7] and layout.cu_keys.tolist() == [0, 3, 7, 9]
    assert layout.cu_queries.dtype == layout.cu_keys.dtype == torch.int32


def test_first_fit_decreasing():
    assert split_groups([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert split_groups([3, 30, 3], 10) == [[1], [0, 2]]  # a larger one is alone
    assert split_groups([], 10) == []
    rng = random.Random(0)
    for _ in range(20):
        sizes = [rng.randint(1, 50) for _ in range(rng.randint(1, 40))]
        bins = split_groups(sizes, 50)
        assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in b) <= 50 for b in bins)
        assert len(bins) <= 1.5 * -(-sum(sizes) // 50) + 1  # of the optimum, at least the volume: 11/9 + 6/9 in theory


def test_tokens_are_counted_once_where_prompts_are_shared():
    groups = [([1] * 10, [[1] * 3, [1] * 4]), ([1] * 5, [[1]])]
    assert Packer(True, 100, 0).tokens(groups) == 10 + 3 + 4 + 5 + 1
    assert Packer(False, 100, 0).tokens(groups) == 13 + 14 + 6


def test_the_gather_is_indexing_and_its_gradient_the_sum():
    layout = share_prompts(draw_groups()).layout
    x = torch.randn(len(layout.own), 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(layout.gather), 2, 3, dtype=torch.float64)
    (Gather.apply(x, layout) * weight).sum().backward()
    y = x.detach().clone().requires_grad_()
    (y[layout.gather] * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)
    assert torch.equal(Gather.apply(x, layout), x[layout.gather])


def varlen_in_float64(record):
    """What FlashAttention's varlen call is documented to do, in float64: a window is aligned at the last key."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        record.append(window_size)
        assert key.shape[0] == value.shape[0] == int(cu_seq_k[-1]) and query.shape[0] == int(cu_seq_q[-1])
        out = []
        for i in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[i] : cu_seq_q[i + 1]].double()
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].double() for x in (key, value))
            assert len(q) <= max_q and len(k) <= max_k
            if enable_gqa:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            at = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
            seen = (at >= -window_size[1]) & ((at <= window_size[0]) | (window_size[0] < 0))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
        return torch.cat(out).to(query.dtype)

    return varlen_attn


def older_varlen(record):
    new = varlen_in_float64(record)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        window = (-1, 0 if is_causal else -1)
        scale = query.shape[-1] ** -0.5
        return new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window)

    return varlen_attn


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("signature", [varlen_in_float64, older_varlen])
def test_what_is_handed_to_flash_attention_is_the_same_attention(monkeypatch, window, signature):
    """All of the GPU's path but the call itself: grouped heads, scale, windows, and an older signature."""
    record = []
    fake = types.ModuleType("torch.nn.attention.varlen")
    fake.varlen_attn = signature(record)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    attention._varlen_parameters.cache_clear()
    layout = share_prompts(draw_groups()).layout
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, len(layout.own), 8) for h in (4, 2, 2))
    module = types.SimpleNamespace(is_causal=True)
    expected = packed_attention(module, q, k, v, layout, scaling=0.3, sliding_window=window)
    if signature is older_varlen and window:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=q.shape)
        assert attention.varlen_backend(on_gpu, on_gpu, None) and not attention.varlen_backend(on_gpu, on_gpu, window)
    else:
        backend = functools.partial(attention.attend, varlen=lambda *_: attention._varlen)
        layout = dataclasses.replace(layout, backend=backend)
        ours = packed_attention(module, q, k, v, layout, scaling=0.3, sliding_window=window)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        assert record == [(-1, 0) if window is None else (window - 1, 0)]
    attention._varlen_parameters.cache_clear()


@pytest.mark.parametrize(
    "device, dtype, head, ok",
    [
        ("cpu", torch.bfloat16, 64, False),
        ("cuda", torch.float32, 64, False),
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.float16, 256, True),
        ("cuda", torch.bfloat16, 264, False),
        ("cuda", torch.bfloat16, 20, False),
    ],
)
def test_flash_attention_is_taken_where_it_fits(monkeypatch, device, dtype, head, ok):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset({"window_size", "scale", "enable_gqa"}))
    x = types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 9, head))
    assert (attention.varlen_backend(x, x, 7) is not None) == ok
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert attention.varlen_backend(x, x, 7) is None


@pytest.mark.parametrize("name", ["GPTNeoX", "Gemma2"])
def test_other_calls_are_what_they_were(name):
    """Padded batches, generation and caches, before and after, for an sdpa and for an eager model; twice installed."""
    model = make(name, SHARED[name])
    ids = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def outputs():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
            tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        return logits, tokens

    before = outputs()
    plain = model.config._attn_implementation
    assert install(model) and install(model)
    assert model.config._attn_implementation == NAMES[plain]
    assert plain == ("eager" if name == "Gemma2" else "sdpa")
    after = outputs()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn3", "test_own"])
def test_an_attention_that_takes_no_layout_is_kept_and_refused_in_words(name, monkeypatch):
    """Whether transformers' own, a kernel of the hub, or one that somebody registered: nothing is put in its place."""
    model = make("Llama", SHARED["Llama"])
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, name, lambda *a, **k: calls.append(name) or sdpa(*a, **k))
    model.config._attn_implementation = name
    with installed(model) as told:
        assert not told and not install(model)
        assert name in attention.hindrance(name) and "attn_implementation" in attention.hindrance(name)
        assert model.config._attn_implementation == name
    policy = adapted(model)
    assert name in why_not(Models(policy), torch.device("cpu"), 64)
    policy.get_base_model()(input_ids=torch.tensor([[3, 4, 5]]))
    assert calls == [name] * 2 and model.config._attn_implementation == name  # a layer each


def test_a_model_is_told_for_a_while():
    model = make("Gemma2", SHARED["Gemma2"])
    with installed(model) as told:
        assert told and model.config._attn_implementation == NAMES["eager"]
    assert model.config._attn_implementation == "eager"
    with pytest.raises(KeyError), installed(model):
        raise KeyError
    assert model.config._attn_implementation == "eager"


def test_what_attention_cannot_express_is_refused():
    layout = share_prompts([([1, 2], [[3], [4]])]).layout
    x = torch.randn(1, 2, 4, 8)
    causal, both_ways = (types.SimpleNamespace(is_causal=c) for c in (True, False))
    with pytest.raises(NotImplementedError, match="s_aux"):
        packed_attention(causal, x, x, x, layout, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="ahead"):
        packed_attention(both_ways, x, x, x, layout)
    with pytest.raises(NotImplementedError, match="token by token"):
        packed_attention(causal, x[:, :, :3], x, x, layout)


def test_a_model_that_was_not_told_of_layouts_is_refused():
    """It would drop the keyword, and every number would silently be wrong."""
    policy = adapted(make("Llama", SHARED["Llama"]))
    with pytest.raises(ModelError, match="install"):
        Models(policy).tokens(share_prompts(draw_groups()))


def test_padded_rows_and_shared_prompts_agree_in_bf16_to_its_rounding():
    """Under autocast, as on a GPU: against float32, packs err no more than rows do, within a factor of two."""
    policy = adapted(make("Llama", SHARED["Llama"]))
    install(policy.get_base_model())
    head, groups = Head.of(policy), draw_groups()
    packs = share_prompts(groups), pad_rows(groups, 0)
    with torch.no_grad():
        truth = Models(policy, head).tokens(packs[0])
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(Models(policy, head).tokens(p) - truth).square().mean().sqrt().item() for p in packs]
    assert 0 < errors[0] < 2 * errors[1]


def test_a_pack_goes_to_a_device_whole():
    pack = share_prompts(draw_groups()).to("meta")
    tensors = [v for v in vars(pack).values() if isinstance(v, torch.Tensor)]
    tensors += [v for v in vars(pack.layout).values() if isinstance(v, torch.Tensor)]
    tensors += [t for pair in pack.layout.again for t in pair]
    assert len(tensors) == 4 + 4 + 4 and all(t.device.type == "meta" for t in tensors)
    assert dataclasses.asdict(pad_rows(draw_groups(), 0))["layout"] is None
