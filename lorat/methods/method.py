"""A method as a value: what it asks of an example, and what it makes of log-probs.

The trainer knows a method by this alone. A method is a frozen dataclass whose fields are settings of the same names, so
that a new one is a file of its own and a line in `METHODS`. Log-ratios are policy minus reference. Metrics carry TRL's
names, one value an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..packs.logprobs import LogProbs
from ..packs.packing import Group

Example = dict[str, Any]
Metrics = dict[str, tuple[Tensor, Tensor]]  # name: values (n,) and weights (n,), without gradient


@dataclass
class Outcome:
    """Of n examples."""

    losses: Tensor  # (n,) with gradient
    drift: Tensor  # (n,) sum of |log-ratio| over completions by their tokens, nats a token, without gradient
    tokens: Tensor  # (n,) float64, completion tokens: the weights of `drift`
    metrics: Metrics


@dataclass(frozen=True)
class Method:
    """One preference loss with its settings; `beta`: strength of the tie to the reference."""

    beta: float

    name: ClassVar[str]
    title: ClassVar[str]  # as one writes it
    unit: ClassVar[Literal["pair", "single"]]  # what an example is
    companions: ClassVar[bool] = False  # whether log-ratios of other completions are wanted beside an example's own

    def group(self, example: Example) -> Group:
        """The example's prompt with its completions, in the order in which `score` expects them."""
        raise NotImplementedError

    def partners(self, steps: list[list[list[Group]]], rank: int) -> list[Group]:
        """The companions of this rank's examples, one each, over a whole optimiser step; none by default.

        `steps[r][m]`: the examples of rank r's m-th device batch.
        """
        return []

    def baseline(self, mean: Tensor) -> Tensor:
        """A scalar for `score` from the mean log-ratio () of all companions of the step; not asked for without any."""
        raise NotImplementedError

    def score(self, examples: Sequence[Example], lp: LogProbs, baseline: Tensor) -> Outcome:
        """Losses and metrics of n examples from the log-probs of their completions, example by example."""
        raise NotImplementedError


def drift(logratios: Tensor, lengths: Tensor, bind: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """How far the policy is from its reference, for n examples of k completions each: `(n, k)`, `(n, k)`, `(n,)`.

    Returns drift (n,), its weights (n,) and both as metrics: `reference/drift`, nats a token, and `reference/bind`, the
    size of what is given, in rewards.
    """
    tokens = lengths.sum(1).double()
    far = logratios.detach().abs().sum(1) / tokens
    bound = bind.detach().abs()
    return far, tokens, {"reference/drift": (far, tokens), "reference/bind": (bound, bound.new_ones(bound.shape))}
