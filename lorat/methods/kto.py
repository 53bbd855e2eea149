"""KTO (arXiv 2402.01306): single completions, desirable or not, against a baseline of mismatched ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..packs.logprobs import LogProbs
from ..packs.packing import Group
from . import losses
from .method import Example, Method, Outcome, drift


@dataclass(frozen=True)
class KTO(Method):
    """KTO with the weights of its two classes; see `losses.kto_loss` and, for z0, `losses.kto_baseline`."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    name: ClassVar[str] = "kto"
    title: ClassVar[str] = "KTO"
    unit = "single"
    companions = True

    def group(self, example: Example) -> Group:
        return example["prompt_ids"], [example["completion_ids"]]

    def partners(self, steps: list[list[list[Group]]], rank: int) -> list[Group]:
        """Mismatched completions (x_i, y_{i+1}) of this rank's examples, over the optimiser step's whole batch.

        They are taken in the order the sampler drew them (batch m of rank 0, of rank 1, …; then batch m+1), so the
        result does not depend on how the batch was divided. A step of one example has none, and z0 is 0.
        """
        order = [
            (r, group)
            for m in range(max((len(batches) for batches in steps), default=0))
            for r, batches in enumerate(steps)
            if m < len(batches)
            for group in batches[m]
        ]
        if len(order) < 2:
            return []
        following = order[1:] + order[:1]
        pairs = zip(order, following, strict=True)
        return [(prompt, completions) for (r, (prompt, _)), (_, (_, completions)) in pairs if r == rank]

    def baseline(self, mean: Tensor) -> Tensor:
        return losses.kto_baseline(mean.reshape(1))

    def score(self, examples: Sequence[Example], lp: LogProbs, baseline: Tensor) -> Outcome:
        """`baseline`: z0. Chosen and rejected metrics average over their own kind."""
        labels = torch.tensor([bool(e["label"]) for e in examples], device=lp.logps.device)
        out = losses.kto_loss(
            lp.logratios,
            labels,
            baseline,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics = {"kl": (baseline.detach().expand_as(out.losses), torch.ones_like(out.rewards))}
        for kind, chosen in (("chosen", labels), ("rejected", ~labels)):
            metrics[f"rewards/{kind}"] = (out.rewards, chosen.float())
            metrics[f"logps/{kind}"] = (lp.logps.detach(), chosen.float())
        far, tokens, more = drift(lp.logratios[:, None], lp.lengths[:, None], out.rewards)
        return Outcome(out.losses, far, tokens, metrics | more)
