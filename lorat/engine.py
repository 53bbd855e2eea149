"""From a batch to losses: packs, forward passes of policy and reference, KTO's baseline.

What the trainer's step and evaluation have in common. A batch is the statistical unit; the packs it is split
into decide memory alone. Several ranks go through the wrapper (DDP) that the Trainer put around the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn

from .logprobs import Head, LogProbs, policy_and_reference
from .losses import kto_baseline
from .objectives import Objective, Outcome, Row, mismatched_rows
from .packing import Batch, pad_rows, split_rows

if TYPE_CHECKING:
    from .config import TrustRegionConfig


@dataclass
class Engine:
    """Computes losses of batches with one model; `pad_id` fills rows and is never attended to."""

    model: PeftModel
    head: Head
    objective: Objective
    args: TrustRegionConfig
    accelerator: Accelerator
    pad_id: int

    def real_rows(self, batch: Batch) -> list[Row]:
        """The batch's completions, without those that only fill it up."""
        return [row for e, w in zip(batch.examples, batch.weights) if w for row in self.objective.rows(e)]

    def packs(self, batch: Batch) -> list[list[int]]:
        """Which examples go through the model together, within `max_tokens_per_pack`."""
        lengths = [[len(p) + len(c) for p, c in self.objective.rows(e)] for e in batch.examples]
        return split_rows(lengths, self.args.max_tokens_per_pack)

    def outcome(self, wrapper: nn.Module, batch: Batch, indices: list[int], z0: Tensor) -> tuple[Outcome, Tensor]:
        """Losses and metrics of the batch's examples `indices`, and their weights (n,)."""
        examples = [batch.examples[i] for i in indices]
        lp = self.logprobs(wrapper, [row for e in examples for row in self.objective.rows(e)])
        weights = torch.tensor([batch.weights[i] for i in indices], device=self.args.device)
        return self.objective.outcome(examples, lp, z0, self.args), weights

    def logprobs(self, wrapper: nn.Module, rows: list[Row]) -> LogProbs:
        pack = pad_rows(rows, self.pad_id).to(self.args.device)

        def forward(*_: Any) -> LogProbs:
            with self.accelerator.autocast():
                return policy_and_reference(self.model, self.head, pack)

        return forward() if wrapper is self.model else through(wrapper, self.model, forward, pack.input_ids)

    @torch.no_grad()
    def baseline(self, batches: list[Batch]) -> tuple[Tensor, int]:
        """KTO's z0 over all of `batches` on all ranks (0 for the other methods), and the tokens that it took here."""
        if not self.objective.baseline:
            return torch.zeros((), device=self.args.device), 0
        mine = [self.real_rows(b) for b in batches]
        everyone = gather_object([mine]) if self.args.world_size > 1 else [mine]
        rows = mismatched_rows(everyone, self.args.process_index)
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for indices in split_rows([[len(p) + len(c)] for p, c in rows], self.args.max_tokens_per_pack):
            lp = self.logprobs(self.model, [rows[i] for i in indices])
            sums += torch.stack([lp.logratios.double().sum(), torch.tensor(float(len(indices))).to(sums)])
        self.model.train(training)
        total, n = self.summed(sums)
        z0 = kto_baseline((total / n).reshape(1) if n > 0 else total.new_zeros(0)).float()
        return z0, sum(len(p) + len(c) for p, c in rows)

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
