"""Copying, mixing factors, pairing and distances on PEFT models; expected values come from float64 arithmetic.

Product space is in test_reference_product.py, the rules in test_rules.py.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorat.reference import adapter_parameters, blend_, copy_, distance, paired, relative_distance, snapshot


def peft_model(ref_config: LoraConfig | None = None, **config):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    mine = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **config})
    model = get_peft_model(base, mine)
    model.add_adapter("ref", copy.deepcopy(ref_config or mine))
    return model


def randomise(model, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model, adapter).values():
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype)


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_copy_makes_every_tensor_equal_and_the_two_models_compute_the_same(kind):
    model = peft_model(**KINDS[kind])
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    kept = snapshot(model, "default")
    copy_(model)
    for name, policy, reference in paired(model, "default", "ref"):
        assert torch.equal(policy, kept[name]), name
        assert torch.equal(reference, kept[name]), name
        assert reference.data_ptr() != policy.data_ptr()
    ids = torch.arange(8)[None]
    model.set_adapter("default")
    policy_logits = model(input_ids=ids).logits
    model.set_adapter("ref")
    assert torch.equal(policy_logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.6, 1.0])
def test_mixing_factors_follows_the_closed_form_over_many_steps(kind, alpha):
    """ref_n = (1-a)^n ref_0 + sum_k a(1-a)^(n-k) policy_k, in float64 from the policies that were shown."""
    model = peft_model(**KINDS[kind])
    randomise(model, "ref", 2)
    steps = 40
    expected = {name: p.double() * (1 - alpha) ** steps for name, p in snapshot(model, "ref").items()}
    for k in range(1, steps + 1):
        randomise(model, "default", 100 + k)
        for name, p in adapter_parameters(model, "default").items():
            expected[name] = expected[name] + alpha * (1 - alpha) ** (steps - k) * p.detach().double()
        blend_(model, alpha, space="factors")
    for name, p in adapter_parameters(model, "ref").items():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_reference_of_another_dtype_is_mixed_in_float32_or_better(dtype):
    model = peft_model()
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    for p in adapter_parameters(model, "ref").values():
        p.data = p.data.to(dtype)
    before = snapshot(model, "ref")
    policy = snapshot(model, "default")
    blend_(model, 0.3, space="factors")
    for name, p in adapter_parameters(model, "ref").items():
        exact = 0.3 * policy[name].double() + 0.7 * before[name].double()
        assert p.dtype == dtype
        # half a unit in the last place of the storage, and float32 arithmetic
        assert ((p.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all(), name


@pytest.mark.parametrize("other", [{"lora_alpha": 32}, {"use_rslora": True}])
def test_another_scale_is_folded_into_b(other):
    """The reference has another alpha or rsLoRA: after a copy both adapters still compute the same weights."""
    ref_config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **other})
    model = peft_model(ref_config=ref_config)
    randomise(model, "default", 1)
    copy_(model)
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight") and getattr(layer, "lora_A", None):
            torch.testing.assert_close(
                layer.get_delta_weight("ref"), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-6
            )
    assert distance(model) == pytest.approx(0, abs=1e-5)


def test_what_does_not_pair_up_is_listed():
    ref_config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    model = peft_model(ref_config=ref_config)
    with pytest.raises(ValueError, match="do not match") as error:
        copy_(model)
    text = str(error.value)
    assert "down_proj" in text or "and" in text
    assert "only in" in text
    rank_only = peft_model(ref_config=LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with pytest.raises(ValueError, match=r"\(4, 16\) in 'default', \(2, 16\) in 'ref'"):
        paired(rank_only, "default", "ref")
    assert len(paired(rank_only, "default", "ref", any_rank=True)) == 8
    for move in (copy_, lambda model: blend_(model, 0.5, space="factors")):
        with pytest.raises(ValueError, match=r"rank 4 in 'default', 2 in 'ref'.*blend_\(model, 1.0"):
            move(rank_only)


@pytest.mark.parametrize("other", [{}, {"lora_alpha": 32}, {"use_rslora": True}])
def test_a_copy_into_a_greater_rank_is_exact_and_padded_with_zeros(other):
    ref_config = LoraConfig(**{"r": 7, "lora_alpha": 14, "target_modules": ["q_proj", "down_proj"], **other})
    model = peft_model(ref_config=ref_config)
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    copy_(model)
    ours = adapter_parameters(model, "default")
    scale = {"lora_alpha": 32 / 7, "use_rslora": 14 / math.sqrt(7)}.get(next(iter(other), ""), 2.0)
    for name, p in adapter_parameters(model, "ref").items():
        if ".lora_A" in name:
            assert torch.equal(p[:4], ours[name]) and not p[4:].any()
        else:
            torch.testing.assert_close(p[:, :4].double(), ours[name].double() * 2 / scale, rtol=2e-7, atol=0)
            assert not p[:, 4:].any()
            assert scale != 2.0 or torch.equal(p[:, :4], ours[name])
    assert relative_distance(model) <= 1e-6


def test_mixing_factors_into_a_greater_rank():
    """Leading components are mixed, the others fade: B and A of the reference beyond the policy's rank times 1 - a."""
    model = peft_model(ref_config=LoraConfig(r=7, lora_alpha=14, target_modules=["q_proj", "down_proj"]))
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    ours, before = snapshot(model, "default"), snapshot(model, "ref")
    blend_(model, 0.25, space="factors")
    for name, p in adapter_parameters(model, "ref").items():
        short = 7 - 4
        padding = (0, 0, 0, short) if ".lora_A" in name else (0, short)
        exact = 0.25 * torch.nn.functional.pad(ours[name], padding).double() + 0.75 * before[name].double()
        torch.testing.assert_close(p.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="outside"):
        blend_(peft_model(), alpha)


def test_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match="product, factors"):
        blend_(peft_model(), 0.5, space="weights")


def test_a_module_used_twice_is_moved_once():
    """Tied layers hold one adapter; blending it twice would be alpha of alpha."""
    model = peft_model()
    model.get_base_model().model.layers[1] = model.get_base_model().model.layers[0]
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    before, ours = snapshot(model, "ref"), snapshot(model, "default")
    blend_(model, 0.5, space="factors")
    for name, p in adapter_parameters(model, "ref").items():
        torch.testing.assert_close(p, 0.5 * before[name] + 0.5 * ours[name], rtol=0, atol=1e-6)


def test_an_adapter_that_was_deleted_and_added_anew_is_found_anew():
    model = peft_model()
    randomise(model, "default", 1)
    copy_(model)
    model.delete_adapter("ref")
    with pytest.raises(ValueError, match="'ref' is not in this model"):
        copy_(model)
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    copy_(model)
    assert distance(model) == 0.0


def test_an_unknown_adapter_names_those_there_are():
    with pytest.raises(ValueError, match=r"'reference' is not in this model, which has \['default', 'ref'\]"):
        copy_(peft_model(), "default", "reference")


@pytest.mark.parametrize("kind", ["lora", "rslora", "embedding", "modules_to_save", "bias"])
@pytest.mark.parametrize("gap", [1.0, 1e-4])
def test_distance_is_the_norm_of_the_dense_difference(kind, gap):
    model = peft_model(**KINDS[kind])
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    for _, p, r in paired(model, "default", "ref"):
        r.data = p.data + gap * r.data
    total = 0.0
    for path, layer in model.named_modules():
        for _, a_name, b_name in (("", "lora_A", "lora_B"), ("", "lora_embedding_A", "lora_embedding_B")):
            a, b = getattr(layer, a_name, None), getattr(layer, b_name, None)
            if a is None or b is None or "default" not in a:
                continue
            dense = {}
            for n in ("default", "ref"):
                wa, wb = (getattr(x[n], "weight", x[n]).double() for x in (a, b))
                dense[n] = layer.scaling[n] * wb @ wa
            total += (dense["default"] - dense["ref"]).square().sum().item()
        if path.endswith("modules_to_save"):
            for p, r in zip(layer["default"].parameters(), layer["ref"].parameters()):
                total += (p.double() - r.double()).square().sum().item()
        if kind == "bias" and getattr(layer, "lora_B", None):
            p, r = (layer.scaling[n] * layer.lora_B[n].bias.double() for n in ("default", "ref"))
            total += (p - r).square().sum().item()
    assert distance(model) == pytest.approx(math.sqrt(total), rel=1e-5)
    assert distance(model, "default", snapshot(model, "default")) == 0.0


def test_reference_and_losses_need_torch_alone():
    code = (
        "import sys, lorat.reference, lorat.losses; "
        "heavy = [m for m in ('transformers', 'peft', 'datasets', 'bitsandbytes', 'trl') if m in sys.modules]; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
