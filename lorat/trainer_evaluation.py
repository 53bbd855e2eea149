"""The trainer's evaluation: losses and metrics of held-out examples, in the same packs as training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from .engine import Engine
from .metrics import Averages


class EvaluationMixin(Trainer):
    """Evaluation of `TrustRegionTrainer`; not a trainer on its own."""

    model: Any  # a PeftModel
    engine: Engine
    eval_averages: Averages

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses and metrics of one evaluation batch, nothing else; returns `(mean loss, None, None)`."""
        batch = inputs["batch"]
        baseline = self.engine.baseline([batch])
        with torch.no_grad():
            parts = [(i, self.engine.outcome(self.model, batch, i, baseline)[0]) for i in self.engine.packs(batch)]
        order = torch.tensor([j for i, _ in parts for j in i]).argsort().to(self.args.device)
        losses = torch.cat([out.losses for _, out in parts])[order]
        names = list(parts[0][1].metrics)
        columns = [losses, torch.ones_like(losses)]
        for name in names:
            for k in (0, 1):
                columns.append(torch.cat([out.metrics[name][k] for _, out in parts])[order])
        table = self.accelerator.gather_for_metrics(torch.stack(columns, 1))
        for k, name in enumerate(["loss", *names]):
            self.eval_averages.add(name, table[:, 2 * k], table[:, 2 * k + 1])
        return losses.mean(), None, None

    def evaluation_loop(  # the signature is the Trainer's
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self.eval_averages.reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {f"{metric_key_prefix}_{k}": v for k, v in self.eval_averages.means().items()}
        return output._replace(metrics={**(output.metrics or {}), **means})
