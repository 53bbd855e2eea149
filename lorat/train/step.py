"""The trainer's optimiser step: device batches, pack by pack, into one mean over the step's examples.

Nothing non-finite gets past it: a loss or gradient that is not a number stops the run before the optimiser, the
reference or a checkpoint takes it in, with the rows it came from.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer

from ..errors import NonFiniteError
from ..methods.objectives import Outcome
from ..packs.packing import Batch
from ..runs.checkpoint import last_whole
from ..settings.config import TrustRegionConfig
from .callbacks import Throughput
from .engine import Baseline, Engine
from .metrics import Averages


@dataclass
class Step:
    """An optimiser step in progress: its batches on this rank, and the number of its examples on all ranks."""

    batches: list[Batch]
    count: float
    baseline: Baseline | None = None
    drift: Averages = field(default_factory=Averages)


class StepMixin(Trainer):
    """The optimiser step of `TrustRegionTrainer`; not a trainer on its own."""

    model: Any  # a PeftModel
    train_dataset: Any
    args: TrustRegionConfig
    engine: Engine
    averages: Averages
    tokens: Throughput
    run_dir: Path
    _step: Step | None
    _suspects: list[tuple[list[int], Tensor]]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [s["batch"] for s in samples]
        self._leave_out_filler(batches)
        count = float(sum(sum(b.weights) for b in batches))
        if self.args.world_size > 1:
            count = self.engine.summed(torch.tensor(count)).item()
        self._step = Step(batches, count)
        return samples, None

    def _leave_out_filler(self, batches: list[Batch]) -> None:
        """Weight 0 for the examples that accelerate repeats to give every rank a full last batch."""
        at_end = self.accelerator.gradient_state.end_of_dataloader
        if self.args.world_size == 1 or not batches or not at_end or self.args.dataloader_drop_last:
            return
        # accelerate's own `remainder` is missing in the epoch that a resumed run goes on with
        remainder = len(self.train_dataset) % (self.args.per_device_train_batch_size * self.args.world_size)
        if not remainder:
            return
        last = batches[-1]
        real = min(max(remainder - self.args.process_index * len(last), 0), len(last))
        last.weights = [1.0] * real + [0.0] * (len(last) - real)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Backpropagate a device batch, pack by pack; returns its share of the step's mean loss."""
        model.train()
        if callable(into_train_mode := getattr(self.optimizer, "train", None)):
            into_train_mode()  # schedule-free optimisers
        step, batch = self._step, inputs["batch"]
        assert step is not None, "get_batch_samples comes first"
        if step.baseline is None:
            step.baseline = self.engine.baseline(step.batches)
            self.tokens.local += step.baseline.tokens
            self._suspects.clear()
        self.tokens.local += self.engine.packer.tokens(self.engine.groups(batch))
        packs = self.engine.packs(batch)
        total = torch.zeros((), device=self.args.device)
        for i, indices in enumerate(packs):
            sync = contextlib.nullcontext() if i == len(packs) - 1 else self.accelerator.no_sync(model)
            with sync:
                out, weights = self.engine.outcome(model, batch, indices, step.baseline)
                # DDP averages gradients over ranks, the Trainer averages losses: both want the sum.
                loss = (out.losses * weights).sum() * (self.args.world_size / step.count)
                self.accelerator.backward(loss)
            total += loss.detach()
            self._suspects.append(([batch.examples[j]["row"] for j in indices], out.losses.detach()))
            self._record(out, weights)
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """The gradient norm, and the gate before the optimiser: nothing non-finite passes."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rows = [row for rows, _ in self._suspects for row in rows]
        finite = torch.cat([values for _, values in self._suspects]).isfinite().tolist()  # one wait for the device
        bad = [row for row, ok in zip(rows, finite, strict=True) if not ok]
        lost = self.engine.summed(torch.tensor(float(len(bad)))).item() > 0
        if lost or not (self.args.fp16 or torch.isfinite(torch.as_tensor(grad_norm)).item()):
            rows = bad if lost else rows
            rows = gather_object(rows) if self.args.world_size > 1 else rows
            what = "loss" if lost else f"gradient (norm {float(grad_norm)})"
            last, _ = last_whole(self.run_dir)
            advice = "Start again"
            if last is not None:
                advice = f"Start a new run from {last.name} (policy_adapter: {last}, ref_adapter: {last / 'ref'})"
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the {what} is not finite, for dataset rows {rows[:16]}"
                f"{' …' if len(rows) > 16 else ''}. The run stopped before the policy, the reference or a checkpoint "
                f"could take it in. {advice} in another output_dir, without those rows, with a lower learning_rate or a "
                "lower max_grad_norm."
            )
        return grad_norm

    def _record(self, out: Outcome, weights: Tensor) -> None:
        assert self._step is not None
        self.averages.add("loss", out.losses, weights)
        for name, (values, own) in out.metrics.items():
            self.averages.add(name, values, own * weights)
        drift, tokens = out.metrics["reference/drift"]
        self._step.drift.add("drift", drift, tokens * weights)

    def step_drift(self) -> float:
        """`reference/drift` of the optimiser step just taken, over all ranks: nats a token, before the step moved it."""
        assert self._step is not None
        return self._step.drift.means(self.engine.summed)["drift"]
