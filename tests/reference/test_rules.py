"""Update rules: when they move, what they remember, their lag, presets; expected values by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from lorat.reference import (
    Adaptive,
    Frozen,
    Hard,
    Soft,
    UpdateRule,
    adapter_parameters,
    blend_,
    copy_,
    preset,
    relative_distance,
    snapshot,
)
from tests.reference.test_blending import peft_model, randomise


def same(left, right):
    theirs = adapter_parameters(right, "ref")
    return all(torch.equal(p, theirs[name]) for name, p in adapter_parameters(left, "ref").items())


@pytest.mark.parametrize("space", ["product", "factors"])
def test_soft_zero_is_frozen_and_soft_one_is_hard(space):
    for pair in ((Soft(0.0, space=space), Frozen()), (Soft(1.0, every=3, space=space), Hard(3))):
        left, right = (peft_model() for _ in pair)
        for step in range(1, 8):
            for rule, model in zip(pair, (left, right)):
                randomise(model, "default", step)
                rule.after_step_(model, step)
            assert same(left, right)
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


@pytest.mark.parametrize("space", ["product", "factors"])
def test_soft_blends_in_its_space_and_keeps_the_error(space):
    left, right, rule = peft_model(), peft_model(), Soft(0.3, 2, space=space)
    for model in (left, right):
        randomise(model, "default", 1)
        randomise(model, "ref", 2)
    assert not rule.after_step_(left, 1) and rule.error is None
    assert rule.after_step_(left, 2)
    error = blend_(right, 0.3, space=space)
    assert same(left, right)
    assert rule.error == error if space == "product" else rule.error is None


def test_other_adapters_can_be_named():
    model = peft_model()
    model.add_adapter("third", copy.deepcopy(model.peft_config["default"]))
    randomise(model, "third", 4)
    held = snapshot(model, "ref")
    assert Hard(1).after_step_(model, 1, source="third", target="default")
    for name, p in adapter_parameters(model, "default").items():
        assert torch.equal(p, adapter_parameters(model, "third")[name])
    assert all(torch.equal(p, held[name]) for name, p in adapter_parameters(model, "ref").items())


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


def test_planned_updates():
    assert [Soft(0.6, 3).planned_updates(n) for n in (2, 3, 8)] == [0, 1, 2]
    assert Frozen().planned_updates(100) == 0
    assert Adaptive(drift_limit=1.0).planned_updates(100) is None


def test_adaptive_moves_by_drift_exactly_where_predicted():
    """Limit 0.5 (must be exceeded), at least 2 steps apart: moves at 2 (0.6) and 5 (0.9), not at 4 (0.5) or 6 (9.9)."""
    drifts = [0.7, 0.6, 0.8, 0.5, 0.9, 9.9, -3.0]
    model, rule, moved, reasons = peft_model(), Adaptive(drift_limit=0.5, every=2), [], []
    assert rule.needs_drift and math.isnan(rule.lag) and rule.moves
    for step, drift in enumerate(drifts, 1):
        randomise(model, "default", step)
        before = snapshot(model, "ref")
        expected = snapshot(model, "default") if step in (2, 5) else before
        if rule.after_step_(model, step, drift):
            moved.append(step)
        for name, p in adapter_parameters(model, "ref").items():
            assert torch.equal(p, expected[name])
        reasons.append(rule.decision and (rule.decision["step"], rule.decision["reason"]))
    assert moved == [2, 5]
    assert reasons == [None, (2, "drift"), (2, "drift"), (4, ""), (5, "drift"), (5, "drift"), (7, "")]
    # ages with a copy at 2 and 5: 1, 0, 1, 2, 0, 1, 2
    assert (rule.updates, rule.last_step, rule.age) == (2, 5, 2.0)


def scaled_policy(model, factor):
    """The policy does `factor` times what the reference does, so that the relative distance is 1 - 1/factor."""
    copy_(model, "ref", "default")
    for name, p in adapter_parameters(model, "default").items():
        if ".lora_B" in name:
            p.data *= factor


def test_adaptive_moves_by_distance_exactly_where_predicted():
    """‖ΔW_p − ΔW_r‖/‖ΔW_p‖ is 1 − 1/f when the policy does f times as much: 0.2 at 1.25, 0.5 at 2, 0.75 at 4."""
    model, rule = peft_model(), Adaptive(distance_limit=0.4)
    assert not rule.needs_drift
    randomise(model, "ref", 2)
    scaled_policy(model, 1.25)
    assert relative_distance(model) == pytest.approx(0.2, rel=1e-5)
    assert not rule.after_step_(model, 1)
    assert rule.decision["distance"] == pytest.approx(0.2, rel=1e-5) and rule.decision["reason"] == ""
    scaled_policy(model, 2.0)
    assert rule.after_step_(model, 2)
    assert rule.decision["distance"] == pytest.approx(0.5, rel=1e-5) and rule.decision["reason"] == "distance"
    assert relative_distance(model) == 0.0
    assert not rule.after_step_(model, 3)
    gentle = Adaptive(distance_limit=0.7, alpha=0.5)
    scaled_policy(model, 4.0)
    assert gentle.after_step_(model, 1) and gentle.age == 0.5
    # the mean of 4 and 1 is 2.5: 1 − 2.5/4 remains
    assert relative_distance(model) == pytest.approx(0.375, rel=1e-5)


def test_either_limit_is_enough_and_both_are_named():
    model = peft_model()
    randomise(model, "ref", 2)
    found = []
    for drift, factor in ((0.1, 1.25), (0.9, 1.25), (0.1, 4.0), (0.9, 4.0)):
        scaled_policy(model, factor)
        held = snapshot(model, "ref")
        rule = Adaptive(drift_limit=0.5, distance_limit=0.5)
        found.append((rule.after_step_(model, 1, drift), rule.decision["reason"]))
        for name, p in adapter_parameters(model, "ref").items():
            p.data = held[name]
    assert found == [(False, ""), (True, "drift"), (True, "distance"), (True, "drift and distance")]


def test_a_reference_apart_from_a_policy_that_does_nothing_is_infinitely_far():
    model, rule = peft_model(), Adaptive(distance_limit=0.5)
    assert relative_distance(model) == 0.0  # both do nothing
    randomise(model, "ref", 2)
    assert relative_distance(model) == math.inf
    assert rule.after_step_(model, 1)
    json.dumps(rule.state_dict(), allow_nan=False)


@pytest.mark.parametrize("drift", [math.nan, math.inf, -math.inf])
def test_a_drift_that_is_not_finite_stops_before_anything_moves(drift):
    model, rule = peft_model(), Adaptive(drift_limit=0.5)
    randomise(model, "default", 1)
    before, state = snapshot(model, "ref"), rule.state_dict()
    with pytest.raises(ValueError, match="step 1: drift=.* not a finite number"):
        rule.after_step_(model, 1, drift)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model, "ref").items())
    assert rule.state_dict() == state


def test_a_missing_drift_is_asked_for_only_where_it_is_needed():
    model, rule = peft_model(), Adaptive(drift_limit=0.5, every=2)
    assert not rule.is_due(1) and rule.is_due(2)
    assert not rule.after_step_(model, 1)
    with pytest.raises(ValueError, match="was given no drift"):
        rule.after_step_(model, 2)
    assert Soft(1.0).after_step_(model, 1, drift=3.0)  # others take it and do not mind


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_rule_decides_as_an_uninterrupted_one(stop):
    drifts = [0.2, 0.6, 0.9, 0.9, 0.1, 0.7]
    make = lambda: Adaptive(drift_limit=0.5, distance_limit=5.0, every=2, alpha=0.5)  # noqa: E731

    def go(rule, model, steps):
        for step in steps:
            randomise(model, "default", step)
            rule.after_step_(model, step, drifts[step - 1])

    whole, model = make(), peft_model()
    go(whole, model, range(1, 7))
    first, other = make(), peft_model()
    go(first, other, range(1, stop + 1))
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    go(second, other, range(stop + 1, 7))
    assert second.state_dict() == whole.state_dict() and whole.updates == 3
    assert same(model, other)


def test_state_round_trip_and_states_from_before():
    rule = Soft(0.5, 2)
    model = peft_model()
    for step in range(1, 6):
        rule.after_step_(model, step)
    other = Soft(0.5, 2)
    other.load_state_dict(rule.state_dict())
    # ages by hand: 1, (1+1)/2=1, 2, (2+1)/2=1.5, 2.5
    assert other.state_dict() == {"updates": 2, "last_step": 4, "age": 2.5, "decision": None}
    old = Adaptive(drift_limit=1.0)
    old.load_state_dict({"updates": 2, "last_step": 4, "age": 2.5})
    assert old.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("paper-soft", Soft(0.6, 1)),
        ("paper-hard", Hard(512)),
        ("trl", Soft(0.6, 512)),
        ("frozen", Frozen()),
        # lag = every*7/6 - 1/2: 2/3 at 1, 11/6 at 2, 3 at 3, 59.0 at 51, 100.17 at 86, 512.83 at 440
        ("lag-1", Soft(0.6, 1)),
        ("lag-2", Soft(0.6, 2)),
        ("lag-3", Soft(0.6, 3)),
        ("lag-59", Soft(0.6, 51)),
        ("lag-100", Soft(0.6, 86)),
        ("lag-512", Soft(0.6, 439)),
    ],
)
def test_presets(name, rule):
    assert preset(name) == rule


def test_a_lag_preset_is_the_nearest_there_is():
    for wanted in range(1, 400):
        off = abs(preset(f"lag-{wanted}").lag - wanted)
        assert off <= min(abs(every * 0.4 / 0.6 + (every - 1) / 2 - wanted) for every in range(1, 500)) + 1e-9


@pytest.mark.parametrize("name", ["lag-0", "lag--1", "lag-1.5", "lag-", "soft", "", "lag-07"])
def test_unknown_presets_list_those_there_are(name):
    with pytest.raises(ValueError, match="paper-soft, paper-hard, trl, lag-N, frozen"):
        preset(name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Soft(1.2), "outside"),
        (lambda: Soft(-0.1), "outside"),
        (lambda: Hard(0), "whole number"),
        (lambda: Soft(0.5, 1.5), "whole number"),
        (lambda: Soft(0.5, space="weights"), "product, factors"),
        (lambda: Adaptive(), "no limit"),
        (lambda: Adaptive(drift_limit=0.1, alpha=0), "Frozen"),
        (lambda: Adaptive(drift_limit=math.nan), "drift_limit=nan"),
        (lambda: Adaptive(distance_limit=-1), "distance_limit=-1"),
        (lambda: UpdateRule(alpha=math.nan), "outside"),
    ],
)
def test_impossible_rules_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
