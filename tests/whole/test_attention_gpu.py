"""Packs on a GPU: FlashAttention's varlen call against sdpa sequence by sequence, and the probe. Skipped without one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types

import pytest
import torch

from lorat.model.models import Models
from lorat.model.probe import why_not
from lorat.packs import attention
from lorat.packs.attention import install, packed_attention
from lorat.packs.logprobs import per_completion
from lorat.packs.packing import pad_rows, share_prompts
from tests.helpers.architectures import SHARED, adapted, make
from tests.packs.test_exactness import draw_groups, gradients, weighted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = torch.device("cuda")


def attend(q, k, v, layout, **how):
    """`(output, gradients of q, k, v)`."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = packed_attention(types.SimpleNamespace(is_causal=True), *leaves, layout, **how)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("size", [64, 128])
def test_varlen_errs_no_more_than_sdpa(window, heads, size):
    """Against float64, in bf16, forward and backward; three runs give the same bits."""
    layout = share_prompts(draw_groups() * 6).layout.to(GPU)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, len(layout.own), size, generator=draw) for h in (heads[0], heads[1], heads[1]))
    exact = attend(*(x.to(GPU).to(torch.bfloat16).double() for x in (q, k, v)), layout, sliding_window=window)
    q, k, v = (x.to(GPU, torch.bfloat16) for x in (q, k, v))
    if attention.varlen_backend(q[0].transpose(0, 1), v[0].transpose(0, 1), window) is None:
        pytest.skip("this torch or card has no varlen attention for it")
    ours = attend(q, k, v, layout, sliding_window=window)
    again = [attend(q, k, v, layout, sliding_window=window)[0] for _ in range(2)]
    assert all(torch.equal(ours[0], x) for x in again)
    in_turn = functools.partial(attention.attend, varlen=lambda *_: None)
    theirs = attend(q, k, v, dataclasses.replace(layout, backend=in_turn), sliding_window=window)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.isfinite().all()
        errors = [(x.double() - truth).square().mean().sqrt().item() for x in (mine, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-4


@pytest.mark.parametrize("name", SHARED)
def test_the_probe_on_the_gpu(name):
    """bf16 under autocast: siblings bit for bit, and as close to float32 as separate rows are."""
    policy = adapted(make(name, SHARED[name])).to(GPU)
    autocast = lambda: torch.autocast("cuda", torch.bfloat16)  # noqa: E731
    assert why_not(Models(policy, autocast=autocast), GPU, 64) is None
    install(policy.get_base_model())
    groups = draw_groups()
    packs = [share_prompts(groups).to(GPU), pad_rows(groups, 0).to(GPU)]
    with torch.no_grad():
        truth = Models(policy).tokens(packs[0])
        rows = Models(policy).tokens(packs[1])
        with autocast():
            halves = [Models(policy).tokens(p) for p in packs]
    errors = [(half - truth).square().mean().sqrt() for half in halves]
    assert (per_completion(truth - rows, packs[0].lengths)).abs().max() < 1e-3
    assert errors[0] < 2 * errors[1] + 1e-3


@pytest.mark.parametrize("four_bit", [False, True])
def test_fused_layers_on_the_gpu(tmp_path, four_bit):
    """Against PEFT's own layers under autocast, both measured from float32: the fused ones err no more."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lorat.model.fused import fuse_, native

    if four_bit:
        pytest.importorskip("bitsandbytes")
    make("Llama", SHARED["Llama"]).save_pretrained(tmp_path)

    def load(dtype):
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        how = {"quantization_config": quantised} if four_bit else {}
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map={"": 0}, **how)

    exact, half = adapted(load(torch.float32)), adapted(load(torch.bfloat16))
    groups = draw_groups()
    for model in (exact, half):
        install(model.get_base_model())

    def step(model, context):
        pack = share_prompts(groups).to(GPU)
        with context:
            logps = per_completion(Models(model).tokens(pack), pack.lengths)
        weighted(logps.cpu()).backward()
        return logps.detach().double(), gradients(model)

    truth = step(exact, contextlib.nullcontext())
    theirs = step(half, torch.autocast("cuda", torch.bfloat16))
    assert fuse_(half) and native(half, torch.bfloat16)
    ours = step(half, contextlib.nullcontext())
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        assert (mine - right).norm() <= 1.5 * (other - right).norm() + 1e-3 * right.norm()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        pack = share_prompts(groups).to(GPU)
        Models(half).tokens(pack)
    inner = {
        d for d, s in kept if len(s) > 1 and s[-1] == half.config.intermediate_size and pack.input_ids.numel() in s
    }
    assert inner == {torch.bfloat16}
