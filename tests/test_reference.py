"""The moving reference against closed forms, on PEFT models; expected values come from float64 arithmetic."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorat.reference import Frozen, Hard, Soft, adapter_parameters, blend_, copy_, distance, paired, snapshot


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
def test_blend_follows_the_closed_form_over_many_steps(kind, alpha):
    """ref_n = (1-a)^n ref_0 + sum_k a(1-a)^(n-k) policy_k, in float64 from the policies that were shown."""
    model = peft_model(**KINDS[kind])
    randomise(model, "ref", 2)
    steps = 40
    expected = {name: p.double() * (1 - alpha) ** steps for name, p in snapshot(model, "ref").items()}
    for k in range(1, steps + 1):
        randomise(model, "default", 100 + k)
        for name, p in adapter_parameters(model, "default").items():
            expected[name] = expected[name] + alpha * (1 - alpha) ** (steps - k) * p.detach().double()
        blend_(model, alpha)
    for name, p in adapter_parameters(model, "ref").items():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=2e-6, msg=name)


def test_a_bf16_reference_is_blended_in_float32():
    model = peft_model()
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    for p in adapter_parameters(model, "ref").values():
        p.data = p.data.bfloat16()
    before = snapshot(model, "ref")
    policy = snapshot(model, "default")
    blend_(model, 0.3)
    for name, p in adapter_parameters(model, "ref").items():
        exact = 0.3 * policy[name].double() + 0.7 * before[name].double()
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.data, exact.bfloat16()) or (p.double() - exact).abs().max() < 2**-8 * exact.abs().max()


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
        blend_(rank_only, 0.5)


def test_an_unknown_adapter_names_those_there_are():
    with pytest.raises(ValueError, match=r"'reference' is not in this model, which has \['default', 'ref'\]"):
        copy_(peft_model(), "default", "reference")


@pytest.mark.parametrize("kind", ["lora", "rslora", "embedding", "modules_to_save"])
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
    assert distance(model) == pytest.approx(math.sqrt(total), rel=1e-5)
    assert distance(model, "default", snapshot(model, "default")) == 0.0


def test_soft_zero_is_frozen_and_soft_one_is_hard():
    for pair in ((Soft(0.0), Frozen()), (Soft(1.0, every=3), Hard(3))):
        left, right = (peft_model() for _ in pair)
        for step in range(1, 8):
            for rule, model in zip(pair, (left, right)):
                randomise(model, "default", step)
                rule.after_step_(model, step)
            for name, p in adapter_parameters(left, "ref").items():
                assert torch.equal(p, adapter_parameters(right, "ref")[name])
        assert pair[0].state_dict() == pair[1].state_dict()


def test_hard_copies_at_its_steps_and_at_no_other():
    model, rule = peft_model(), Hard(3)
    shown = {}
    for step in range(1, 8):
        randomise(model, "default", step)
        shown[step] = snapshot(model, "default")
        assert rule.after_step_(model, step) == (step in (3, 6))
        if step >= 3:
            for name, p in adapter_parameters(model, "ref").items():
                assert torch.equal(p, shown[3 if step < 6 else 6][name])
    assert (rule.updates, rule.last_step, rule.age) == (2, 6, 1.0)


@pytest.mark.parametrize(
    ("rule", "lag"),
    [(Soft(0.6), 2 / 3), (Soft(0.6, 512), 512 * 2 / 3 + 255.5), (Hard(512), 255.5), (Frozen(), math.inf)],
)
def test_lag_is_the_mean_age_of_the_reference(rule, lag):
    """DESIGN: lag = every(1-a)/a + (every-1)/2; the ages that the rule keeps average to it in the long run."""
    assert rule.lag == pytest.approx(lag)
    if rule.moves:
        model, ages = peft_model(), []
        copy_(model)
        steps = 60 * rule.every
        small = copy.copy(rule)
        for step in range(1, steps + 1):
            if step % rule.every:  # nothing moves: only the age changes
                small.age += 1
            else:
                small.after_step_(model, step)
            ages.append(small.age)
        late = ages[-20 * rule.every :]
        assert sum(late) / len(late) == pytest.approx(lag, rel=1e-6)


def test_state_round_trip():
    rule = Soft(0.5, 2)
    model = peft_model()
    for step in range(1, 6):
        rule.after_step_(model, step)
    other = Soft(0.5, 2)
    other.load_state_dict(rule.state_dict())
    # ages by hand: 1, (1+1)/2=1, 2, (2+1)/2=1.5, 2.5
    assert other.state_dict() == {"updates": 2, "last_step": 4, "age": 2.5}


@pytest.mark.parametrize("make", [lambda: Soft(1.2), lambda: Soft(-0.1), lambda: Hard(0), lambda: Soft(0.5, 1.5)])
def test_impossible_rules_are_refused(make):
    with pytest.raises(ValueError, match="outside|whole number"):
        make()


def test_reference_and_losses_need_torch_alone():
    code = (
        "import sys, lorat.reference, lorat.losses; "
        "heavy = [m for m in ('transformers', 'peft', 'datasets', 'bitsandbytes', 'trl') if m in sys.modules]; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
