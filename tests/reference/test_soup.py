"""The ends of the range, soups, interpolation and extrapolation against dense float64 weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig

from lorat.reference import (
    adapter_parameters,
    blend_,
    distance,
    extrapolate_,
    interpolate_,
    relative_distance,
    snapshot,
    soup_,
)
from tests.reference.test_blending import peft_model, randomise
from tests.reference.test_product import apart, deltas, mix, norm, others

# ---- the ends of the range ----


@pytest.mark.parametrize("space", ["product", "factors"])
def test_alpha_0_changes_no_bit_and_alpha_1_copies_every_bit(space):
    model = peft_model(use_dora=True)
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    before = snapshot(model, "ref")
    assert blend_(model, 0.0, space=space).item() == 0.0
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model, "ref").items())
    assert blend_(model, 1.0, space=space).item() == 0.0
    ours = adapter_parameters(model, "default")
    assert all(torch.equal(p, ours[n]) for n, p in adapter_parameters(model, "ref").items())


def test_a_reference_of_smaller_rank_gets_the_best_approximation():
    model = peft_model(ref_config=LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    randomise(model, "default", 1)
    exact = deltas(model, "default")
    reported = blend_(model, 1.0).item()
    s = [torch.linalg.svdvals(d).square() for d in exact.values()]
    best = math.sqrt(sum(x[2:].sum().item() for x in s)) / norm(exact)
    assert reported == pytest.approx(best, rel=1e-5)
    assert apart(model, "ref", exact) == pytest.approx(best, rel=1e-4)


def test_two_models_with_equal_adapters_get_equal_bits():
    left, right = peft_model(), peft_model()
    for step in range(5):
        for model in (left, right):
            randomise(model, "default", step)
            blend_(model, 0.3)
    theirs = adapter_parameters(right, "ref")
    assert all(torch.equal(p, theirs[n]) for n, p in adapter_parameters(left, "ref").items())


# ---- soups, interpolation, extrapolation ----


def soup_model(target_rank):
    model = peft_model()
    names = ["default", "b", "c"]
    for i, name in enumerate(names):
        if name != "default":
            config = LoraConfig(r=2 + i, lora_alpha=3 * i, target_modules=["q_proj", "down_proj"])
            model.add_adapter(name, config)
        randomise(model, name, i)
    model.delete_adapter("ref")
    model.add_adapter("ref", LoraConfig(r=target_rank, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    return model


@pytest.mark.parametrize("rank", [11, 4])
def test_a_soup_is_the_weighted_mean_of_what_its_adapters_do(rank):
    """Ranks 4, 3 and 4 with three scales; rank 11 holds all of it, 4 the best part."""
    model = soup_model(rank)
    weights = {"default": 0.5, "b": 0.3, "c": 0.2}
    exact = mix(*((w, deltas(model, n)) for n, w in weights.items()))
    reported = soup_(model, weights, "ref").item()
    s = [torch.linalg.svdvals(d).square() for d in exact.values()]
    best = math.sqrt(sum(x[rank:].sum().item() for x in s)) / norm(exact)
    assert reported == pytest.approx(best, abs=1e-6)
    assert apart(model, "ref", exact) == pytest.approx(best, abs=1e-6)


def test_a_soup_into_one_of_its_own_and_of_what_is_no_product():
    model = peft_model(use_dora=True, modules_to_save=["norm"])
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    wanted = {n: 0.75 * x + 0.25 * others(model, "ref")[n] for n, x in others(model, "default").items()}
    twin = copy.deepcopy(model)
    soup_(model, {"default": 0.75, "ref": 0.25}, "ref")
    blend_(twin, 0.75)
    assert relative_distance(model) == pytest.approx(relative_distance(twin), rel=1e-6)
    for name, x in others(model, "ref").items():
        torch.testing.assert_close(x, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [{"default": 0.5, "ref": 0.6}, {}, {"default": math.nan}])
def test_weights_that_are_no_average_are_refused(weights):
    with pytest.raises(ValueError, match="not to 1"):
        soup_(peft_model(), weights, "ref")


@pytest.mark.parametrize("move", ["interpolate", "extrapolate"])
def test_along_the_line_to_another_adapter(move):
    """(1-t) policy + t ref, and (1+t) policy - t ref; the policy has the rank for it, the reference stays."""
    model = peft_model(ref_config=LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]), r=8)
    randomise(model, "ref", 2)
    for name, p in adapter_parameters(model, "default").items():  # a policy of rank 4, with room for the sum
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        (p.data[4:] if ".lora_A" in name else p.data[:, 4:]).zero_()
    policy, reference = deltas(model, "default"), deltas(model, "ref")
    before = snapshot(model, "ref")
    if move == "interpolate":
        error, exact = interpolate_(model, 0.3, toward="ref"), mix((0.7, policy), (0.3, reference))
    else:
        error, exact = extrapolate_(model, 0.3, away_from="ref"), mix((1.3, policy), (-0.3, reference))
    assert error.item() <= 1e-6
    assert apart(model, "default", exact) <= 1e-6
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model, "ref").items())


def test_toward_and_away_from_the_base_only_b_is_scaled():
    model = peft_model(lora_bias=True)
    randomise(model, "default", 1)
    before = snapshot(model)
    for moved, factor in (
        (lambda: interpolate_(model, 0.25), 0.75),
        (lambda: extrapolate_(model, 1.0), 1.5),
        (lambda: interpolate_(model, 0.0), 1.5),
        (lambda: interpolate_(model, 1.0), 0.0),
    ):
        assert moved().item() == 0.0
        for name, p in adapter_parameters(model, "default").items():
            wanted = before[name] * (factor if ".lora_B" in name else 1.0)
            torch.testing.assert_close(p.data, wanted, rtol=1e-6, atol=0)


def test_the_base_has_no_value_for_whole_tensors():
    model = peft_model(modules_to_save=["norm"])
    with pytest.raises(ValueError, match="name an adapter that holds the start"):
        interpolate_(model, 0.5)


@pytest.mark.parametrize(
    ("move", "amount"), [(interpolate_, 1.1), (interpolate_, -0.1), (extrapolate_, -0.1), (extrapolate_, math.inf)]
)
def test_amounts_outside_their_range_are_refused(move, amount):
    with pytest.raises(ValueError, match=f"amount={amount}"):
        move(peft_model(), amount, "ref")


def test_distance_between_adapters_of_different_ranks():
    model = peft_model(ref_config=LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    randomise(model, "default", 1)
    randomise(model, "ref", 2)
    policy, reference = deltas(model, "default"), deltas(model, "ref")
    gap = norm(mix((1.0, policy), (-1.0, reference)))
    assert distance(model) == pytest.approx(gap, rel=1e-6)
    assert relative_distance(model) == pytest.approx(gap / norm(policy), rel=1e-6)
