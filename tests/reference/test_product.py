"""Product space on PEFT models against dense float64 weights: 200 updates, and every kind of layer.

The oracle is PEFT's own `get_delta_weight` in float64, and the log-probs of a base with those weights merged.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lorat.reference import adapter_parameters, blend_, snapshot
from tests.reference.test_blending import KINDS, peft_model, randomise


def deltas(model, adapter):
    """What PEFT would add to each layer's weight, in float64."""
    wide = copy.deepcopy(model).double()
    return {
        path: layer.get_delta_weight(adapter).detach()
        for path, layer in wide.named_modules()
        if hasattr(layer, "get_delta_weight") and getattr(layer, "scaling", {}).get(adapter)
    }


def deltas_fast(model, adapter="default"):
    """`deltas` without copying the model, for many steps."""
    return {
        path: layer.scaling[adapter] * layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def norm(parts):
    return math.sqrt(sum(t.square().sum().item() for t in parts.values()))


def mix(*terms):
    return {n: sum(w * d[n] for w, d in terms) for n in terms[0][1]}


def apart(model, adapter, exact):
    got = deltas(model, adapter)
    return norm({n: got[n] - exact[n] for n in exact}) / norm(exact)


def others(model, adapter):
    """Everything but LoRA factors, in float64."""
    left = {n: t.double() for n, t in snapshot(model, adapter).items()}
    factor = lambda n: not n.endswith(".bias") and any(k in n for k in (".lora_A", ".lora_B", ".lora_embedding_"))  # noqa: E731
    return {n: t for n, t in left.items() if not factor(n)}


# ---- 200 updates on a NeoX, ΔW and log-probs ----


def neox_with_adapters(folder, ref_rank, rank=4):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    model.add_adapter("ref", LoraConfig(r=ref_rank, lora_alpha=3 * ref_rank, target_modules=targets))
    blend_(model, 1.0)
    return model


def walk(model, step, size=0.02):
    """A policy that keeps moving, A and B alike."""
    g = torch.Generator().manual_seed(step)
    for name, p in adapter_parameters(model, "default").items():
        p.data += size * torch.randn(p.shape, generator=g) * (0.2 if ".lora_B" in name else 1.0)


@torch.no_grad()
def logps(model):
    ids = torch.arange(24).reshape(2, 12) % 20
    out = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return out.gather(2, ids[:, 1:, None])[:, :, 0].sum(1).double()


def logps_with(model, delta):
    """The same from a float64 base with `delta` merged."""
    base = copy.deepcopy(model).double()
    with base.disable_adapter():
        for path, change in delta.items():
            base.get_submodule(path).base_layer.weight.data += change
        return logps(base)


def logps_of(model, adapter):
    """The model as it runs, in float32."""
    model.set_adapter(adapter)
    found = logps(model)
    model.set_adapter("default")
    return found


@pytest.mark.parametrize("alpha", [0.02, 0.6])
def test_200_updates_into_a_rank_that_holds_them_are_exact(neox, alpha):
    """ref_n = a policy_n + (1-a) ref_(n-1) in dense float64: 1e-5 in ΔW and a float32 forward's error in log-probs."""
    model = neox_with_adapters(neox, ref_rank=64)
    exact = deltas(model, "ref")
    for step in range(1, 201):
        walk(model, step)
        exact = mix((alpha, deltas_fast(model)), (1 - alpha, exact))
        assert blend_(model, alpha).item() <= 1e-6
    assert apart(model, "ref", exact) <= 1e-5
    truth = logps_with(model, exact)
    plain = (logps_of(model, "default") - logps_with(model, deltas(model, "default"))).abs().max()
    assert (logps_of(model, "ref") - truth).abs().max() <= plain + 1e-4
    assert (logps_of(model, "default") - truth).abs().max() > 1e-2  # the comparison is not one of equals


@pytest.mark.parametrize("alpha", [0.02, 0.6])
@pytest.mark.parametrize("ref_rank", [4, 8])
def test_200_updates_into_a_small_rank_lose_no_more_than_each_reports(neox, alpha, ref_rank):
    """Errors shrink by 1-a an update and gain what it reports: e_n <= (1-a) e_(n-1) + reported_n ‖mix_n‖."""
    model = neox_with_adapters(neox, ref_rank)
    exact, bound = deltas_fast(model, "ref"), 0.0
    for step in range(1, 201):
        walk(model, step)
        local = mix((alpha, deltas_fast(model)), (1 - alpha, deltas_fast(model, "ref")))
        exact = mix((alpha, deltas_fast(model)), (1 - alpha, exact))
        reported = blend_(model, alpha).item()
        if step % 20 == 0:  # each update is the best there is
            s = {n: torch.linalg.svdvals(d).square() for n, d in local.items()}
            best = math.sqrt(sum(x[ref_rank:].sum().item() for x in s.values())) / norm(local)
            assert reported == pytest.approx(best, rel=1e-4, abs=1e-6)
            assert apart(model, "ref", local) == pytest.approx(best, rel=1e-3, abs=1e-6)
        bound = (1 - alpha) * bound + reported * norm(local)
    got = deltas_fast(model, "ref")
    error = norm({n: got[n] - exact[n] for n in exact})
    assert 0 < error <= bound * (1 + 1e-6) + 1e-5 * norm(exact)
    # the forward pass computes just these weights
    plain = (logps_of(model, "default") - logps_with(model, deltas_fast(model))).abs().max()
    assert (logps_of(model, "ref") - logps_with(model, got)).abs().max() <= plain + 1e-4


@pytest.mark.parametrize("alpha", [0.02, 0.6])
def test_200_updates_of_the_factors_err_by_the_derived_term(neox, alpha):
    """E_n = (1-a) E_(n-1) - a(1-a) s (B_p - B_r)(A_p - A_r) in dense float64, and so do the log-probs."""
    model = neox_with_adapters(neox, ref_rank=4)
    scale = {n: (layer.scaling["default"], layer.scaling["ref"]) for n, layer in layers(model)}
    exact, gone = deltas_fast(model, "ref"), {n: 0.0 for n in scale}
    for step in range(1, 201):
        walk(model, step)
        lost = {}
        for n, layer in layers(model):
            (bp, ap), (br, ar) = (
                (layer.lora_B[x].weight.double(), layer.lora_A[x].weight.double()) for x in ("default", "ref")
            )
            lost[n] = alpha * (1 - alpha) * (scale[n][0] * bp - scale[n][1] * br) @ (ap - ar)
            gone[n] = (1 - alpha) * gone[n] - lost[n]
        local = mix((alpha, deltas_fast(model)), (1 - alpha, deltas_fast(model, "ref")))
        exact = mix((alpha, deltas_fast(model)), (1 - alpha, exact))
        reported = blend_(model, alpha, space="factors").item()
        assert reported == pytest.approx(norm(lost) / norm(local), rel=1e-4, abs=1e-9)
    predicted = {n: exact[n] + gone[n] for n in exact}
    assert apart(model, "ref", predicted) <= 1e-5
    assert apart(model, "ref", exact) > 1e-3  # the term is there
    plain = (logps_of(model, "default") - logps_with(model, deltas_fast(model))).abs().max()
    assert (logps_of(model, "ref") - logps_with(model, predicted)).abs().max() <= plain + 1e-4


def layers(model):
    return [(n, layer) for n, layer in model.named_modules() if hasattr(layer, "lora_A")]


# ---- every kind of adapter ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [{}, {"lora_alpha": 5}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_mixes_products_and_everything_else_linearly(kind, scale, dtype):
    """The reference has the rank of the layers, so nothing is lost but the rounding of its storage."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **KINDS[kind]}
    model = peft_model(ref_config=LoraConfig(**{**config, **scale, "r": 16}), **KINDS[kind])
    for i, adapter in enumerate(("default", "ref")):
        randomise(model, adapter, i)
        for p in adapter_parameters(model, adapter).values():
            p.data = p.data.to(dtype)
    exact = mix((0.3, deltas(model, "default")), (0.7, deltas(model, "ref")))
    rest = {n: (0.3 * x, 0.7 * others(model, "ref")[n]) for n, x in others(model, "default").items()}
    ratio = model_scale(model, "default") / model_scale(model, "ref")
    before = snapshot(model, "default")
    error = blend_(model, 0.3)
    eps = torch.finfo(dtype).eps
    assert error.item() <= 1e-6 and error.dtype == torch.float64 and error.dim() == 0
    assert apart(model, "ref", exact) <= 2 * eps + 1e-6
    for name, (ours, theirs) in rest.items():
        wanted = (ratio if ".lora_B" in name else 1.0) * ours + theirs
        assert ((others(model, "ref")[name] - wanted).abs() <= eps * wanted.abs() + 1e-6).all(), name
    assert bool(rest) == (kind in ("dora", "modules_to_save", "bias"))
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model, "default").items())
    assert {p.dtype for p in adapter_parameters(model, "ref").values()} == {dtype}


def model_scale(model, adapter):
    return next(layer.scaling[adapter] for _, layer in layers(model) if adapter in layer.scaling)


class Pixels(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, groups=groups)
        self.line = nn.Conv1d(6, 8, 1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10, 12))  # three experts


def test_convolutions_are_products_too():
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "line"])
    model = get_peft_model(Pixels(), config)
    model.add_adapter("ref", LoraConfig(r=6, lora_alpha=6, target_modules=["conv", "line"]))
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    exact = mix((0.4, deltas(model, "default")), (0.6, deltas(model, "ref")))
    assert blend_(model, 0.4).item() > 0.05  # rank 9 into 6
    wide = copy.deepcopy(model)
    squares = {n: torch.linalg.svdvals(d.flatten(1)).square() for n, d in exact.items()}
    best = math.sqrt(sum(s[6:].sum().item() for s in squares.values())) / norm(exact)
    assert apart(wide, "ref", exact) == pytest.approx(best, rel=1e-4)


def test_grouped_convolutions_are_refused_by_products_and_left_to_the_factors():
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["conv"])
    with pytest.warns(UserWarning, match="groups"):
        model = get_peft_model(Pixels(groups=2), config)
        model.add_adapter("ref", config)
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    before = snapshot(model, "ref")
    with pytest.raises(ValueError, match='grouped convolution.*space="factors"'):
        blend_(model, 0.4)
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model, "ref").items())
    blend_(model, 0.4, space="factors", measure=False)
    for name, p in adapter_parameters(model, "ref").items():
        wanted = 0.4 * snapshot(model, "default")[name].double() + 0.6 * before[name].double()
        torch.testing.assert_close(p.double(), wanted, rtol=0, atol=1e-6)


def test_each_expert_of_a_parameter_is_its_own_product():
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["experts.weight"])
    wider = LoraConfig(r=5, lora_alpha=4, target_modules=[], target_parameters=["experts.weight"])
    holder = nn.Module()
    holder.experts = Experts()
    holder.forward = lambda x: torch.einsum("bi,eio->beo", x, holder.experts.weight)
    model = get_peft_model(holder, config)
    model.add_adapter("ref", wider)
    randomise(model, "default", 1)
    blend_(model, 1.0)
    torch.testing.assert_close(deltas(model, "ref"), deltas(model, "default"), rtol=1e-6, atol=1e-6)
    randomise(model, "ref", 2)
    exact = mix((0.4, deltas(model, "default")), (0.6, deltas(model, "ref")))
    reported = blend_(model, 0.4).item()
    (delta,) = exact.values()
    assert delta.shape[0] == 3
    s = torch.linalg.svdvals(delta).square()
    assert reported == pytest.approx(math.sqrt(s[:, 5:].sum() / s.sum()), rel=1e-5)
    assert apart(model, "ref", exact) == pytest.approx(reported, rel=1e-4)
