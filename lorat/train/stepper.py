"""One optimiser step: device batches, pack by pack, into one mean over the step's examples.

Nothing non-finite gets past it: a loss or gradient that is not a number stops the run before the optimiser, the
reference or a checkpoint takes it in, with the rows it came from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..packs.packing import Batch
from .meters import Averages, Meters
from .scorer import Baseline, Planned, Scorer

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stepper:
    """Backpropagates optimiser steps of `scorer`'s losses.

    `remainder`: real examples on all ranks in the last, ragged round of device batches; 0 where accelerate fills none up.
    """

    def __init__(self, scorer: Scorer, meters: Meters, accelerator: Accelerator, remainder: int) -> None:
        self.scorer, self.meters, self.accelerator, self.remainder = scorer, meters, accelerator, remainder
        self._step: list[Planned] = []  # this rank's device batches
        self._count = 0.0  # examples of the step on all ranks
        self._baseline: Baseline | None = None
        self._drift = Averages()
        self._suspects: list[tuple[list[int], Tensor]] = []

    def begin(self, batches: list[Batch]) -> None:
        """An optimiser step of this rank's `batches`: their examples are counted and divided into packs."""
        ranks = self.scorer.ranks
        if batches and self.remainder and self.accelerator.gradient_state.end_of_dataloader:
            # accelerate repeats examples to give every rank a full last batch; they weigh nothing
            last = batches[-1]
            real = min(max(self.remainder - ranks.index * len(last), 0), len(last))
            last.weights = [1.0] * real + [0.0] * (len(last) - real)
        count = float(sum(sum(b.weights) for b in batches))
        self._count = ranks.sum(torch.tensor(count)).item() if ranks.count > 1 else count
        self._step = [self.scorer.plan(b) for b in batches]
        self._baseline, self._drift = None, Averages()

    def backward(self, compute: Any, batch: Batch) -> Tensor:
        """Backpropagate a device batch of the step, pack by pack; returns its share () of the step's mean loss.

        `compute`: `Models`, as the Trainer wrapped it.
        """
        planned = next((p for p in self._step if p.batch is batch), None)
        assert planned is not None, "begin comes first"
        if self._baseline is None:
            self._baseline = self.scorer.baseline(self._step)
            self.meters.local += self._baseline.tokens
            self._suspects.clear()
        self.meters.local += self.scorer.packer.tokens(planned.counted)
        total = torch.zeros((), device=self.scorer.ranks.device)
        for i, indices in enumerate(planned.packs):
            last = i == len(planned.packs) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(compute):
                out, weights = self.scorer.score(compute, planned, indices, self._baseline)
                # DDP averages gradients over ranks, the Trainer averages losses: both want the sum.
                loss = (out.losses * weights).sum() * (self.scorer.ranks.count / self._count)
                self.accelerator.backward(loss)
            total += loss.detach()
            self._suspects.append(([planned.batch.examples[j]["row"] for j in indices], out.losses.detach()))
            self.meters.add(out, weights)
            self._drift.add("drift", out.drift, out.tokens * weights)
        return total

    def verify(self, grad_norm: Any, step: int, scaled: bool, last_whole: Callable[[], Path | None]) -> None:
        """The gate before the optimiser: raises `NonFiniteError` unless losses and gradient of `step` are finite.

        `scaled`: fp16, whose scaler skips a step with an infinite gradient. `last_whole`: the newest good checkpoint.
        """
        ranks = self.scorer.ranks
        rows = [row for rows, _ in self._suspects for row in rows]
        finite = torch.cat([values for _, values in self._suspects]).isfinite().tolist()  # one wait for the device
        bad = [row for row, ok in zip(rows, finite, strict=True) if not ok]
        lost = ranks.any(bool(bad))
        if not lost and (scaled or torch.isfinite(torch.as_tensor(grad_norm)).item()):
            return
        rows = ranks.gather(bad if lost else rows)
        what = "loss" if lost else f"gradient (norm {float(grad_norm)})"
        last = last_whole()
        advice = "Start again"
        if last is not None:
            advice = f"Start a new run from {last.name} (policy_adapter: {last}, ref_adapter: {last / 'ref'})"
        raise NonFiniteError(
            f"step {step}: the {what} is not finite, for dataset rows {rows[:16]}"
            f"{' …' if len(rows) > 16 else ''}. The run stopped before the policy, the reference or a checkpoint "
            f"could take it in. {advice} in another output_dir, without those rows, with a lower learning_rate or a "
            "lower max_grad_norm."
        )

    def drift(self) -> float:
        """`reference/drift` of the optimiser step just taken, over all ranks: nats a token, before the step moved it."""
        return self._drift.means(self.scorer.ranks.sum)["drift"]
