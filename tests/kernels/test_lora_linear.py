"""One operation for a frozen linear layer with an adapter: PEFT's numbers, float64's gradients, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from lorat_kernels.lora_linear import lora_linear
from peft import LoraConfig, get_peft_model
from torch import nn

from lorat.model.fused import fits, fuse_
from lorat.model.models import Head, Models
from lorat.packs.logprobs import per_completion
from lorat.packs.packing import pad_rows
from tests.helpers.architectures import SHARED, adapted, make
from tests.helpers.worlds import make_pairs, nudge, trainer_for
from tests.packs.test_exactness import draw_groups, gradients, weighted


def drawn(dtype=torch.float32, bias=True):
    draw = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    return new(2, 7, 24), new(40, 24), new(4, 24), new(40, 4), new(40) if bias else None


@pytest.mark.parametrize("bias", [True, False])
def test_in_float64_it_is_the_formula_and_autograds_gradient(bias):
    x, w, a, b, bias = drawn(torch.float64, bias)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    weight = torch.randn(2, 7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = lora_linear(x, w, a, b, scale=0.7, bias=bias)
    theirs = x @ w.T + 0.7 * (x @ a.T) @ b.T + (0 if bias is None else bias)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    mine = torch.autograd.grad((ours * weight).sum(), (x, a, b))
    expected = torch.autograd.grad((theirs * weight).sum(), (x, a, b))
    for left, right in zip(mine, expected):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_gradients_that_nobody_asks_for_are_left_out():
    x, w, a, b, _ = drawn()
    a.requires_grad_()
    lora_linear(x, w, a, b, scale=1.0).sum().backward()
    assert a.grad is not None and x.grad is None and b.grad is None
    w.requires_grad_()
    lora_linear(x, w, a, b, scale=1.0).sum().backward()
    assert w.grad is None


def test_bf16_computes_in_bf16_and_gives_float32_gradients():
    """As near to float64 as PEFT's composition is, which rounds at each of its steps."""
    x, w, a, b, bias = drawn()
    exact = [t.double() for t in (x, w, a, b, bias)]
    truth = exact[0] @ exact[1].T + 2 * (exact[0] @ exact[2].T) @ exact[3].T + exact[4]
    half = torch.bfloat16
    a32, b32 = a.requires_grad_(), b.requires_grad_()
    ours = lora_linear(x, w.to(half), a32, b32, scale=2.0, bias=bias, dtype=half)
    h = x.to(half)
    composed = (h @ w.to(half).T + bias.to(half)) + ((h @ a.to(half).T) @ b.to(half).T) * 2.0
    error = lambda y: (y.double() - truth).norm().item()  # noqa: E731
    assert ours.dtype == half and 0 < error(ours) <= 1.1 * error(composed)
    ours.float().sum().backward()
    assert a32.grad.dtype == b32.grad.dtype == torch.float32


def test_what_is_kept_for_the_backward_is_the_input_and_a_rank():
    x, w, a, b, _ = drawn()
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, w, a, b, scale=1.0)
    given = {t.data_ptr() for t in (x, a, b, w)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in given] == [(14, 4)]


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_model_is_what_pefts_layers_make_it(tmp_path, four_bit):
    """Log-probs and gradients of both adapters against PEFT's own forward, float32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lorat.model.base import keep_trainable_on_cpu_

    make("Llama", SHARED["Llama"]).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    how = {"quantization_config": quantised} if four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how)
    keep_trainable_on_cpu_(model)
    policy = adapted(model)
    pack, head = pad_rows(draw_groups(), 0), Head.of(policy)

    def measured():
        ours = per_completion(Models(policy, head).tokens(pack), pack.lengths)
        weighted(ours).backward()
        with torch.no_grad(), Models(policy).reference():
            reference = Models(policy, head).tokens(pack)
        with torch.no_grad(), policy.disable_adapter():
            base = Models(policy, head).tokens(pack)
        return ours.detach(), gradients(policy), reference, base

    plain = measured()
    assert fuse_(policy)
    layers = [m for m in policy.modules() if hasattr(m, "lora_A")]
    assert layers and all("forward" in m.__dict__ and fits(m) for m in layers)
    fused = measured()
    torch.testing.assert_close(fused[0], plain[0], rtol=0, atol=2e-5)
    assert (fused[1] - plain[1]).norm() < 1e-5 * plain[1].norm()
    torch.testing.assert_close(fused[2], plain[2], rtol=0, atol=2e-5)
    assert torch.equal(fused[3], plain[3])
    assert fuse_(policy)  # twice changes nothing


@pytest.mark.parametrize(
    "change",
    [
        dict(lora_dropout=0.1),
        dict(use_dora=True),
        dict(lora_bias=True),
        dict(modules_to_save=["norm"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
    ],
)
def test_other_layers_keep_pefts_forward(change):
    model = make("Llama", SHARED["Llama"])
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **change})
    policy = get_peft_model(model, config).eval()
    with torch.no_grad():
        for n, p in policy.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    twin = copy.deepcopy(policy)
    assert not fuse_(policy)
    ids = torch.randint(3, 97, (2, 9))
    torch.testing.assert_close(policy(input_ids=ids).logits, twin(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("late", [dict(lora_bias=True), dict(use_dora=True)])
def test_an_adapter_that_comes_after_fusing_is_looked_at_too(late):
    policy = adapted(make("Llama", SHARED["Llama"]))
    assert fuse_(policy)
    policy.add_adapter("late", LoraConfig(r=4, target_modules=["q_proj"], **late))
    with torch.no_grad():
        for n, p in policy.named_parameters():
            if "lora_" in n and ".late" in n:
                p.normal_(std=0.1)
    policy.set_adapter("late")
    ids = torch.randint(3, 97, (2, 9))
    found = policy(input_ids=ids).logits
    for module in policy.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward", None)
    torch.testing.assert_close(found, policy(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_two_adapters_at_once_and_merged_weights_go_pefts_way():
    policy = adapted(make("Llama", SHARED["Llama"]))
    fuse_(policy)
    ids = torch.randint(3, 97, (1, 9))
    with torch.no_grad():
        one = policy(input_ids=ids).logits
        policy.base_model.set_adapter(["default", "ref"])
        both = policy(input_ids=ids).logits
        policy.base_model.set_adapter("default")
        policy.merge_adapter(["default"])
        merged = policy(input_ids=ids).logits
    assert (both - one).abs().max() < 1e-5  # the reference's B is zero
    torch.testing.assert_close(merged, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "autocast"),
    [
        (dict(bf16=True, dtype="bfloat16"), False),
        (dict(bf16=True, dtype="float32"), True),  # a float32 base wants autocast
        (dict(bf16=True, dtype="bfloat16", lora_dropout=0.1), True),  # PEFT's own forward does
        (dict(bf16=False), False),
    ],
)
def test_a_bf16_model_computes_in_bf16_without_autocast(neox, tmp_path, monkeypatch, settings, autocast):
    """So no norm widens hidden states to float32: all that is kept of the width of the model is bf16."""
    from lorat.packs import attention

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), **settings)
    nudge(trainer)
    seen, kept = set(), []
    packed = attention.packed_attention
    monkeypatch.setattr(
        attention, "packed_attention", lambda *a, **k: seen.add(torch.is_autocast_enabled("cpu")) or packed(*a, **k)
    )
    groups = [trainer.scorer.method.group(r) for r in trainer.train_dataset]
    tokens = trainer.scorer.packer.tokens(groups)
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        lp = trainer.models(trainer.scorer.packer.pack(groups))
    assert lp.logratios.abs().max() > 0 and seen == {autocast}
    wide = {dtype for dtype, shape in kept if tokens in shape and shape[-1] >= 64}
    if not autocast:
        assert wide == {torch.bfloat16 if settings["bf16"] else torch.float32}


def test_offloading_and_checkpointing_options_reach_the_layers(tmp_path):
    from lorat.settings.config import CHECKPOINTING
    from tests.helpers.worlds import run_config

    kwargs = {f"{CHECKPOINTING}_kwargs": {"offload": True}}
    config = run_config("x", tmp_path, activation_checkpointing=True, **kwargs).resolved()
    assert getattr(config, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False, "offload": True}


def test_offloaded_checkpoints_change_no_weight(neox, tmp_path, monkeypatch):
    """transformers' own option, in a whole run in 4-bit; without a GPU there is no pinned memory to offload to."""
    from transformers import modeling_utils

    from lorat.reference import snapshot
    from lorat.settings.config import CHECKPOINTING
    from tests.helpers.worlds import make_pairs, trainer_for

    offloading, used = modeling_utils.save_on_cpu, []
    monkeypatch.setattr(modeling_utils, "save_on_cpu", lambda **_: used.append(1) or offloading(pin_memory=False))

    def run(name, **how):
        kwargs = {f"{CHECKPOINTING}_kwargs": how} if how else {}
        trainer = trainer_for(neox, tmp_path / name, make_pairs(8), activation_checkpointing=True, **kwargs)
        trainer.train()
        return snapshot(trainer.model)

    plain = run("plain")
    assert not used
    offloaded = run("offloaded", offload=True)
    assert len(used) >= 2 * 2  # each of two layers in each of two steps
    assert all(torch.equal(offloaded[name], tensor) for name, tensor in plain.items())


def test_a_plain_linear_layer_is_left_alone():
    assert fuse_(nn.Sequential(nn.Linear(3, 3)))
