"""When and how far the reference moves: frozen, soft, hard, adaptive, and the names of known settings.

A rule is a small dataclass: settings and what has happened so far. It decides from the step's number, from a drift that
its caller measured, or from the adapters' distance; it measures nothing else, and every rank that calls it with the
same numbers does the same. torch alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .blending import SPACES, Space, blend_, relative_distance
from .pairing import POLICY, REFERENCE


@dataclass
class UpdateRule:
    """When and how far the reference moves; `alpha` 0 never moves it. State: what has happened so far.

    `age` is the reference's mean age in optimiser steps: the policy `n` steps ago has weight
    `alpha*(1-alpha)^k` in it, so each step adds 1 and each update multiplies by `1 - alpha`. `error` is the relative
    error in ΔW of the last blend in product space, a 0-dim tensor, or None; it is no part of the state.
    """

    alpha: float = 0.0
    every: int = 1
    space: Space = "product"
    drift_limit: float | None = None
    distance_limit: float | None = None
    updates: int = field(default=0, init=False)
    last_step: int = field(default=0, init=False)
    age: float = field(default=0.0, init=False)
    decision: dict[str, Any] | None = field(default=None, init=False)  # of an adaptive rule: the last one it took
    error: Tensor | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; 0 never moves the reference, 1 copies the policy.")
        if self.every < 1 or self.every != int(self.every):
            raise ValueError(f"every={self.every} is not a whole number of optimiser steps of at least 1.")
        if self.space not in SPACES:
            raise ValueError(f"space={self.space!r} is unknown; set one of {', '.join(SPACES)}.")
        for name, limit in (("drift_limit", self.drift_limit), ("distance_limit", self.distance_limit)):
            if limit is not None and not 0 <= limit < math.inf:
                raise ValueError(f"{name}={limit} is not a finite number of at least 0; leave it out to ignore it.")

    @property
    def moves(self) -> bool:
        return self.alpha > 0

    @property
    def adaptive(self) -> bool:
        return self.drift_limit is not None or self.distance_limit is not None

    @property
    def needs_drift(self) -> bool:
        """Whether `after_step_` has to be given a drift at the steps where `is_due`."""
        return self.moves and self.drift_limit is not None

    @property
    def lag(self) -> float:
        """Mean age of the reference in the long run, in optimiser steps: `every*(1-a)/a + (every-1)/2`.

        Infinite if it never moves, NaN if the rule is adaptive: then only `age`, the lag so far, is known.
        """
        if self.adaptive and self.moves:
            return math.nan
        return self.every * (1 - self.alpha) / self.alpha + (self.every - 1) / 2 if self.moves else math.inf

    def planned_updates(self, steps: int) -> int | None:
        """How often a run of `steps` optimiser steps moves the reference; None if the rule is adaptive."""
        if self.adaptive and self.moves:
            return None
        return steps // self.every if self.moves else 0

    def is_due(self, step: int) -> bool:
        """Whether the reference may move after `step`: an adaptive rule still asks its limits."""
        if not self.moves:
            return False
        return step - self.last_step >= self.every if self.adaptive else step % self.every == 0

    def after_step_(
        self,
        model: nn.Module,
        step: int,
        drift: float | None = None,
        *,
        source: str = POLICY,
        target: str = REFERENCE,
    ) -> bool:
        """Call once after each optimiser step, counted from 1; moves the reference if due and says whether it did.

        `drift`: nats per token, of this step; only a rule with `needs_drift` reads it. Raises `ValueError` for a drift
        that is missing or not finite, before anything moves.
        """
        if drift is not None and not math.isfinite(drift):
            raise ValueError(
                f"step {step}: drift={drift} is not a finite number of nats per token, so whether the reference should "
                "move cannot be told. Look for the loss or gradient that stopped being finite."
            )
        due = self.is_due(step)
        if due and self.needs_drift and drift is None:
            raise ValueError(
                f"step {step}: this rule has drift_limit={self.drift_limit} and was given no drift; pass "
                "after_step_(model, step, drift=nats per token), or set distance_limit instead."
            )
        self.age += 1
        if not due or (self.adaptive and not self._beyond(model, step, drift, source, target)):
            return False
        measure = self.space == "product"  # there the error costs nothing
        error = blend_(model, self.alpha, source, target, self.space, measure=measure)
        self.error = error if measure else None
        self.updates, self.last_step, self.age = self.updates + 1, step, self.age * (1 - self.alpha)
        return True

    def _beyond(self, model: nn.Module, step: int, drift: float | None, source: str, target: str) -> bool:
        """Whether a limit is passed; records the decision."""
        apart = None if self.distance_limit is None else relative_distance(model, source, target)
        if apart is not None and math.isnan(apart):
            raise ValueError(f"step {step}: the adapters hold values that are not finite; their distance is none.")
        reasons = []
        if self.drift_limit is not None and drift is not None and drift > self.drift_limit:
            reasons.append("drift")
        if self.distance_limit is not None and apart is not None and apart > self.distance_limit:
            reasons.append("distance")
        shown = None if apart is None or math.isinf(apart) else apart  # JSON has no infinity
        self.decision = {"step": step, "drift": drift, "distance": shown, "reason": " and ".join(reasons)}
        return bool(reasons)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, of JSON's own types."""
        decision = None if self.decision is None else dict(self.decision)
        return {"updates": self.updates, "last_step": self.last_step, "age": self.age, "decision": decision}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s answer; keys that older states did not have may be missing."""
        self.updates, self.last_step = int(state["updates"]), int(state["last_step"])
        self.age = float(state["age"])
        self.decision = dict(state["decision"]) if state.get("decision") else None


def Frozen() -> UpdateRule:
    """The reference never moves: plain DPO, IPO or KTO."""
    return UpdateRule(alpha=0.0)


def Soft(alpha: float, every: int = 1, space: Space = "product") -> UpdateRule:
    """Every `every` optimiser steps `ref <- alpha*policy + (1-alpha)*ref`. `Soft(1, n)` is `Hard(n)`."""
    return UpdateRule(alpha=alpha, every=every, space=space)


def Hard(every: int) -> UpdateRule:
    """Every `every` optimiser steps `ref <- policy`."""
    return UpdateRule(alpha=1.0, every=every)


def Adaptive(
    drift_limit: float | None = None,
    distance_limit: float | None = None,
    every: int = 1,
    alpha: float = 1.0,
    space: Space = "product",
) -> UpdateRule:
    """Move when the policy has gone far: `ref <- alpha*policy + (1-alpha)*ref`, a copy by default.

    At least `every` steps after the last update, and when the drift handed in exceeds `drift_limit` (nats per token) or
    `‖ΔW_p − ΔW_r‖/‖ΔW_p‖` exceeds `distance_limit`. Raises `ValueError` without a limit or without an alpha.
    """
    if drift_limit is None and distance_limit is None:
        raise ValueError("Adaptive() has no limit and would never move; set drift_limit or distance_limit.")
    if alpha == 0:
        raise ValueError("alpha=0 never moves the reference; use Frozen(), or set alpha above 0.")
    return UpdateRule(alpha, every, space, drift_limit, distance_limit)


PRESETS = ("paper-soft", "paper-hard", "trl", "lag-N", "frozen")


def preset(name: str) -> UpdateRule:
    """A rule by name.

    `paper-soft`: alpha 0.6 every step, `paper-hard`: a copy every 512 (both arXiv 2404.09656); `trl`: alpha 0.6 every
    512, TRL's defaults; `lag-N`, N a positive integer: alpha 0.6 every so many steps that the lag is nearest N;
    `frozen`. Raises `ValueError` that lists them for any other.
    """
    if name == "paper-soft":
        return Soft(0.6, 1)
    if name == "paper-hard":
        return Hard(512)
    if name == "trl":
        return Soft(0.6, 512)
    if name == "frozen":
        return Frozen()
    if found := re.fullmatch(r"lag-([1-9][0-9]*)", name):
        wanted = int(found[1])
        near = int((wanted + 0.5) * 6 / 7)  # lag = every*7/6 - 1/2 at alpha 0.6
        return min((Soft(0.6, every) for every in (max(1, near), near + 1)), key=lambda rule: abs(rule.lag - wanted))
    raise ValueError(
        f"preset {name!r} is unknown; there are {', '.join(PRESETS)} (N a positive whole number of steps)."
    )
