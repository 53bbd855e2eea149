"""From a batch to losses: packs, log-probs of their completions, and a method's companions (KTO's mismatched ones).

What the trainer's step and its evaluation have in common. A batch is the statistical unit; the packs it is split
into decide memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method, Outcome
from ..model.models import Models
from ..packs.logprobs import LogProbs, per_completion
from ..packs.packing import Batch, Group, Packer
from ..ranks import Ranks

Compute = Callable[[Any], LogProbs]  # a pack on the device -> log-probs; `Models`, or DDP around it


@dataclass
class Planned:
    """A device batch, divided into packs: which examples go through the model together."""

    batch: Batch
    groups: list[Group]
    packs: list[list[int]]

    @property
    def counted(self) -> list[Group]:
        """The groups without those that only fill the batch up."""
        return [g for g, w in zip(self.groups, self.batch.weights) if w]


@dataclass
class Baseline:
    """What a method's companions give for an optimiser step (KTO's z0), and the tokens that they take on this rank.

    Where the whole step is one pack, `value` is None and comes with the losses, in one pass: `partners` are then the
    companions, one for each example of the batch (None for one that only fills it up).
    """

    value: Tensor | None  # ()
    tokens: int = 0
    partners: list[Sequence[int] | None] = field(default_factory=list)


@dataclass
class Scorer:
    """Computes losses of batches: `method` on the log-probs that `models` give, in packs of `packer`."""

    models: Models
    method: Method
    packer: Packer
    ranks: Ranks

    def plan(self, batch: Batch) -> Planned:
        """The batch's packs, within `max_tokens_per_pack`."""
        groups = [self.method.group(e) for e in batch.examples]
        return Planned(batch, groups, self.packer.split(groups))

    def score(
        self,
        compute: Compute,
        planned: Planned,
        indices: list[int],
        baseline: Baseline,
        start: list[Tensor] | None = None,
    ) -> tuple[Outcome, Tensor]:
        """Losses and metrics of the batch's examples `indices`, and their weights (n,).

        `start`: log-probs of each completion's tokens under the policy the run began with; rewards against it are then
        among the metrics, as `start/rewards/…` and `start/drift`.
        """
        examples = [planned.batch.examples[i] for i in indices]
        value, partners = baseline.value, baseline.partners
        groups = [planned.groups[i] for i in indices]
        if partners:
            groups = _joined(groups, [partners[i] for i in indices])
        lp = compute(self.packer.pack(groups).to(self.ranks.device))
        if value is None:
            other = torch.tensor([k > 0 for _, cs in groups for k in range(len(cs))], device=lp.logps.device)
            value = self._mean(lp.logratios.detach()[other])
            mine = other.logical_not().repeat_interleave(lp.lengths)
            lp = LogProbs(lp.logps[~other], lp.logratios[~other], lp.lengths[~other], lp.tokens[mine])
        weights = torch.tensor([planned.batch.weights[i] for i in indices], device=self.ranks.device)
        out = self.method.score(examples, lp, value)
        if start is not None:
            ratios = per_completion(lp.tokens - torch.cat(start).to(lp.tokens.device), lp.lengths.tolist())
            from_start = self.method.score(examples, lp._replace(logratios=ratios), value)
            out.metrics.update({f"start/{k}": v for k, v in from_start.metrics.items() if k.startswith("rewards/")})
            out.metrics["start/drift"] = (from_start.drift, from_start.tokens)
        return out, weights

    @torch.no_grad()
    def tokens(self, groups: list[Group]) -> list[Tensor]:
        """Log-probs of each completion's tokens under the active adapter, pack by pack, in host memory."""
        out: dict[int, Tensor] = {}
        for indices, places in self.packer.places(groups):
            pack = self.packer.pack([groups[i] for i in indices]).to(self.ranks.device)
            with self.models.autocast():
                tokens = self.models.tokens(pack)
            out.update(zip(places, tokens.cpu().split(pack.lengths), strict=True))
        return [out[k] for k in sorted(out)]

    @torch.no_grad()
    def baseline(self, step: list[Planned]) -> Baseline:
        """What the companions of a whole step on all ranks give: now, or with the losses where that costs less."""
        if not self.method.companions:
            return Baseline(torch.zeros((), device=self.ranks.device))
        groups = self.method.partners(self.ranks.gather([[p.counted for p in step]]), self.ranks.index)
        if len(step) == 1:
            rest = iter(groups)
            partners = [next(rest)[1][0] if w and groups else None for w in step[0].batch.weights]
            if self._one_pass(step[0], partners):
                return Baseline(None, sum(len(m) for m in partners if m is not None), partners)
        training = self.models.peft.training
        self.models.peft.eval()
        packs = [self.packer.pack([groups[i] for i in pack]) for pack in self.packer.split(groups)]
        parts = [self.models(pack.to(self.ranks.device)).logratios for pack in packs]
        self.models.peft.train(training)
        return Baseline(self._mean(torch.cat(parts) if parts else torch.zeros(0)), self.packer.tokens(groups))

    def _one_pass(self, planned: Planned, partners: list[Sequence[int] | None]) -> bool:
        """Whether the step fits one pack with its companions, and saves by it, on every rank.

        With gradient their tokens go through backward and recomputation too, where a pass of their own repeats the
        prompts in two forward passes. The baseline is taken without dropout, so dropout wants that pass of its own.
        """
        groups = _joined(planned.groups, partners)
        prompts, added = (sum(len(p) for p, _ in groups), sum(len(m) for m in partners if m is not None))
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.models.modules())
        worth = not self.models.peft.training or (prompts > 2 * added and not dropout)
        fits = self.packer.shared and worth and self.packer.tokens(groups) <= self.packer.budget
        return not self.ranks.any(not fits)

    def _mean(self, logratios: Tensor) -> Tensor:
        """The method's baseline () from this rank's companions' log-ratios (m,) and those of all others."""
        sums = torch.stack([logratios.double().sum(), torch.tensor(float(len(logratios))).to(logratios.device)])
        total, n = self.ranks.sum(sums)
        if n == 0:  # a step of one example has no companion
            return torch.zeros((), device=self.ranks.device)
        return self.method.baseline(total / n).float().to(self.ranks.device)


def _joined(groups: Sequence[Group], partners: Sequence[Sequence[int] | None]) -> list[Group]:
    return [(p, [*cs, m] if m is not None else cs) for (p, cs), m in zip(groups, partners, strict=True)]
