"""What the two studies of a moving reference share: a reference's settings, and a setting's runs over all worlds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lorat.reference import UpdateRule


@dataclass(frozen=True)
class Reference:
    """When the reference moves: after every `every` steps by `alpha`, or to the policy once it is `limit` away.

    `limit`: mean |log-ratio| of policy against reference per token of the batch's completions, nats; 0 for no limit.
    """

    kind: str  # frozen, soft, hard or adaptive
    alpha: float = 0.0
    every: int = 1
    limit: float = 0.0

    @property
    def lag(self) -> float:
        """Mean age in optimiser steps in the long run; infinite if frozen, nan if adaptive (it has to be measured)."""
        return math.nan if self.limit else UpdateRule(self.alpha, self.every).lag

    def __str__(self) -> str:
        if self.kind == "soft":
            return f"soft α={self.alpha:g}" + (f" every {self.every}" if self.every > 1 else "")
        return {"hard": f"hard τ={self.every}", "adaptive": f"adaptive {self.limit:g}"}.get(self.kind, self.kind)


FROZEN = Reference("frozen")


def soft(alpha: float, every: int = 1) -> Reference:
    return Reference("soft", alpha, every)


def hard(every: int) -> Reference:
    return Reference("hard", 1.0, every)


def adaptive(limit: float) -> Reference:
    return Reference("adaptive", 1.0, 1, limit)


@dataclass(frozen=True)
class Run:
    """One setting over all S worlds: `gold`, `kl`, `ood` are `(S, checkpoints)`; `lag` and `moves` `(S,)`; float64."""

    regime: str
    method: str
    beta: float
    reference: Reference
    gold: Tensor
    kl: Tensor
    ood: Tensor
    lag: Tensor
    moves: Tensor

    @property
    def name(self) -> str:
        return f"β={self.beta:g}, {self.reference}"

    @property
    def beta_lag(self) -> float:
        """β times the lag in steps: by formula, or measured where the reference is adaptive."""
        lag = self.lag.mean().item() if math.isnan(self.reference.lag) else self.reference.lag
        return self.beta * lag

    @property
    def strength(self) -> float:
        """`λ = β / (1 + Σα)`: the tilt SFT·exp(r/λ) that this run would end at, were every optimum reached at once."""
        return self.beta / (1 + self.moves.mean().item())
