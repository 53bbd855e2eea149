"""The trainer's evaluation: losses and metrics of held-out examples, in the same packs as training.

Rewards against a moving reference fall back to zero whenever it moves. So each example is measured against the start as
well, the policy the run began from: its log-probs never change, so they cost one forward pass in the whole run, and
no adapter more.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..packs.packing import Batch
from ..reference import POLICY, adapter_parameters, snapshot
from .callbacks import Throughput
from .engine import Engine
from .metrics import Averages


@contextmanager
def policy_as(model: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the policy holds `values` (a `snapshot`); afterwards what it held, bit for bit."""
    held = snapshot(model, POLICY)
    try:
        _fill_(model, values)
        yield
    finally:
        _fill_(model, held)


def _fill_(model: Any, values: Mapping[str, Tensor]) -> None:
    for name, p in adapter_parameters(model, POLICY).items():
        p.data.copy_(values[name])


class EvaluationMixin(Trainer):
    """Evaluation of `TrustRegionTrainer`; not a trainer on its own."""

    model: Any  # a PeftModel
    engine: Engine
    eval_averages: Averages
    tokens: Throughput
    start: dict[str, Tensor]
    _start_cache: dict[bytes, list[Tensor]]

    def _start_logprobs(self, batch: Batch) -> list[list[Tensor]]:
        """For each example, its completions' token log-probs under the start; computed once in a run for each."""
        groups = [self.engine.objective.group(e) for e in batch.examples]
        keys = [hashlib.blake2b(repr(g).encode(), digest_size=16).digest() for g in groups]
        if fresh := [k for k, key in enumerate(keys) if key not in self._start_cache]:
            with policy_as(self.model, self.start):
                tokens = iter(self.engine.token_logprobs([groups[k] for k in fresh]))
            for k in fresh:
                self._start_cache[keys[k]] = [next(tokens) for _ in groups[k][1]]
        return [self._start_cache[key] for key in keys]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses and metrics of one evaluation batch, nothing else; returns `(mean loss, None, None)`."""
        batch = inputs["batch"]
        baseline = self.engine.baseline([batch])
        with torch.no_grad():
            start = self._start_logprobs(batch)
            parts = [
                (i, self.engine.outcome(self.model, batch, i, baseline, [t for k in i for t in start[k]])[0])
                for i in self.engine.packs(batch)
            ]
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
        begun = time.perf_counter()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.tokens.skip(time.perf_counter() - begun)
        means = {f"{metric_key_prefix}_{k}": v for k, v in self.eval_averages.means().items()}
        return output._replace(metrics={**(output.metrics or {}), **means})
