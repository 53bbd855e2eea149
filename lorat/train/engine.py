"""From a batch to losses: packs, forward passes of policy and reference, KTO's baseline.

What the trainer's step and evaluation have in common. A batch is the statistical unit; the packs it is split
into decide memory alone. Several ranks go through the wrapper (DDP) that the Trainer put around the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn

from ..methods.losses import kto_baseline
from ..methods.objectives import Objective, Outcome, mismatched
from ..model.logprobs import Head, policy_and_reference, token_logprobs
from ..packs.logprobs import LogProbs, per_completion
from ..packs.packing import Batch, Group, Packer

if TYPE_CHECKING:
    from ..settings.config import TrustRegionConfig


@dataclass
class Baseline:
    """KTO's z0 of an optimiser step (0 for the other methods), and the tokens that it takes on this rank.

    Where the whole step is one pack, z0 is None and comes with the losses, in one pass: `partners` are then the
    mismatched completions, one for each example of the batch (None for one that only fills it up).
    """

    z0: Tensor | None
    tokens: int = 0
    partners: list[Sequence[int] | None] = field(default_factory=list)


@dataclass
class Engine:
    """Computes losses of batches with one model."""

    model: PeftModel
    head: Head
    objective: Objective
    packer: Packer
    args: TrustRegionConfig
    accelerator: Accelerator
    autocast: Callable[[], AbstractContextManager[Any]]

    def groups(self, batch: Batch) -> list[Group]:
        """The batch's examples as prompts with their completions, without those that only fill it up."""
        return [self.objective.group(e) for e, w in zip(batch.examples, batch.weights) if w]

    def packs(self, batch: Batch) -> list[list[int]]:
        """Which examples go through the model together, within `max_tokens_per_pack`."""
        return self.packer.split([self.objective.group(e) for e in batch.examples])

    def outcome(
        self,
        wrapper: nn.Module,
        batch: Batch,
        indices: list[int],
        baseline: Baseline,
        start: list[Tensor] | None = None,
    ) -> tuple[Outcome, Tensor]:
        """Losses and metrics of the batch's examples `indices`, and their weights (n,).

        `start`: log-probs of each completion's tokens under the policy the run began with; rewards against it are then
        among the metrics, as `start/rewards/…` and `start/drift`.
        """
        examples = [batch.examples[i] for i in indices]
        z0, partners = baseline.z0, baseline.partners or [None] * len(batch)
        groups = self._joined(examples, [partners[i] for i in indices])
        lp = self.logprobs(wrapper, groups)
        if z0 is None:
            other = torch.tensor([k > 0 for _, cs in groups for k in range(len(cs))], device=lp.logps.device)
            z0 = self._mean(lp.logratios.detach()[other])
            mine = other.logical_not().repeat_interleave(lp.lengths)
            lp = LogProbs(lp.logps[~other], lp.logratios[~other], lp.lengths[~other], lp.tokens[mine])
        weights = torch.tensor([batch.weights[i] for i in indices], device=self.args.device)
        out = self.objective.outcome(examples, lp, z0, self.args)
        if start is not None:
            ratios = per_completion(lp.tokens - torch.cat(start).to(lp.tokens.device), lp.lengths.tolist())
            other_out = self.objective.outcome(examples, lp._replace(logratios=ratios), z0, self.args)
            out.metrics.update({f"start/{k}": v for k, v in other_out.metrics.items() if k.startswith("rewards/")})
            out.metrics["start/drift"] = other_out.metrics["reference/drift"]
        return out, weights

    @torch.no_grad()
    def token_logprobs(self, groups: list[Group]) -> list[Tensor]:
        """Log-probs of each completion's tokens under the active adapter, pack by pack, in host memory."""
        out: dict[int, Tensor] = {}
        for indices, places in self.packer.places(groups):
            pack = self.packer.pack([groups[i] for i in indices]).to(self.args.device)
            with self.autocast():
                tokens = token_logprobs(self.model, self.head, pack)
            out.update(zip(places, tokens.cpu().split(pack.lengths), strict=True))
        return [out[k] for k in sorted(out)]

    def logprobs(self, wrapper: nn.Module, groups: list[Group]) -> LogProbs:
        """Of every completion of `groups`, through one forward pass of each adapter."""
        pack = self.packer.pack(groups).to(self.args.device)

        def forward(*_: Any) -> LogProbs:
            with self.autocast():
                return policy_and_reference(self.model, self.head, pack)

        return forward() if wrapper is self.model else through(wrapper, self.model, forward, pack.input_ids)

    @torch.no_grad()
    def baseline(self, batches: list[Batch]) -> Baseline:
        """KTO's z0 over all of `batches` on all ranks: now, or with the losses where that costs less."""
        if not self.objective.baseline:
            return Baseline(torch.zeros((), device=self.args.device))
        mine = [self.groups(b) for b in batches]
        everyone = gather_object([mine]) if self.args.world_size > 1 else [mine]
        groups = mismatched(everyone, self.args.process_index)
        if len(batches) == 1:
            rest = iter(groups)
            partners = [next(rest)[1][0] if w and groups else None for w in batches[0].weights]
            if self._one_pass(batches[0], partners):
                return Baseline(None, sum(len(m) for m in partners if m is not None), partners)
        training = self.model.training
        self.model.eval()
        parts = [self.logprobs(self.model, [groups[i] for i in pack]).logratios for pack in self.packer.split(groups)]
        self.model.train(training)
        return Baseline(self._mean(torch.cat(parts) if parts else torch.zeros(0)), self.packer.tokens(groups))

    def _one_pass(self, batch: Batch, partners: list[Sequence[int] | None]) -> bool:
        """Whether the step fits one pack with its mismatched completions, and saves by it, on every rank.

        With gradient their tokens go through backward and recomputation too, where a pass of their own repeats the
        prompts in two forward passes. z0 is taken without dropout, so dropout wants that pass of its own.
        """
        groups = self._joined(batch.examples, partners)
        prompts, added = (sum(len(p) for p, _ in groups), sum(len(m) for m in partners if m is not None))
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
        worth = not self.model.training or (prompts > 2 * added and not dropout)
        fits = self.packer.shared and worth and self.packer.tokens(groups) <= self.packer.budget
        return self.summed(torch.tensor(float(not fits))).item() == 0

    def _joined(self, examples: Sequence[Any], partners: Sequence[Sequence[int] | None]) -> list[Group]:
        groups = (self.objective.group(e) for e in examples)
        return [(p, [*cs, m] if m is not None else cs) for (p, cs), m in zip(groups, partners, strict=True)]

    def _mean(self, logratios: Tensor) -> Tensor:
        """z0 from this rank's mismatched log-ratios (m,) and those of all others."""
        sums = torch.stack([logratios.double().sum(), torch.tensor(float(len(logratios))).to(logratios.device)])
        total, n = self.summed(sums)
        return kto_baseline((total / n).reshape(1) if n > 0 else total.new_zeros(0)).float().to(self.args.device)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, on this rank's device."""
        return self.accelerator.reduce(x.to(self.args.device), "sum") if self.args.world_size > 1 else x


def through(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """Call `function` as if it were `module.forward`, through `wrapper` (DDP), so that its hooks run."""
    mine = module.__dict__.get("forward")
    module.forward = function
    try:
        return wrapper(*inputs)
    finally:
        if mine is None:
            del module.forward
        else:
            module.forward = mine
