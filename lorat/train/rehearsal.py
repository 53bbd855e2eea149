"""The heaviest pack first: whether a run fits its GPU is known in its first seconds, or it never runs out of memory.

Before the first step the fullest pack that this data can make goes forward and backward once, with room held for the
optimiser's state that the first step will allocate. Nothing is updated, and no random number is drawn from the run's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import TrainerCallback

from ..packs.packing import Batch
from ..reference import POLICY, adapter_parameters
from .engine import Baseline

if TYPE_CHECKING:
    from .trainer import TrustRegionTrainer


class RehearsalCallback(TrainerCallback):
    """Rehearses on a GPU, at the start of training."""

    def __init__(self, trainer: TrustRegionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.device.type == "cuda":
            rehearse(self.trainer)
            torch.cuda.empty_cache()


def fullest(trainer: TrustRegionTrainer, prompts: bool = True) -> list[dict[str, Any]]:
    """The examples that fill one pack the most, longest first, by all their tokens or by completion tokens alone.

    At most a device batch of them; twice that for KTO, whose mismatched completions may share the pack.
    """
    packer, objective, dataset = trainer.engine.packer, trainer.engine.objective, trainer.train_dataset
    columns = [name for name in dataset.column_names if name.endswith("_ids") and (prompts or name != "prompt_ids")]
    lengths = [pc.list_value_length(dataset.with_format("arrow")[:][name]).to_numpy() for name in columns]
    most = trainer.args.per_device_train_batch_size * (2 if objective.baseline else 1)
    chosen: list[dict[str, Any]] = []
    for i in np.argsort(-sum(lengths), kind="stable")[: 4 * most].tolist():
        example = dataset[i]
        if len(chosen) < most and len(packer.split([objective.group(e) for e in [*chosen, example]])) == 1:
            chosen.append(example)
    return chosen


def rehearse(trainer: TrustRegionTrainer) -> list[int]:
    """Forward and backward of the fullest packs; returns their tokens. Parameters, gradients and random state stay."""
    engine, model = trainer.engine, trainer.model
    policy = list(adapter_parameters(model, POLICY).values())
    states = _missing_state(trainer.optimizer, policy)
    training = model.training
    tokens = []
    model.train()
    try:
        with torch.random.fork_rng([trainer.args.device] if trainer.args.device.type == "cuda" else []):
            for prompts in (True, False):
                batch = Batch(fullest(trainer, prompts))
                room = [torch.empty_like(p) for p in policy for _ in range(states)]
                z0 = Baseline(torch.zeros((), device=trainer.args.device))
                out, _ = engine.outcome(model, batch, list(range(len(batch))), z0)
                out.losses.mean().backward()
                del room, out
                tokens.append(engine.packer.tokens(engine.groups(batch)))
    finally:
        for p in policy:
            p.grad = None
        model.train(training)
    return tokens


def _missing_state(optimizer: Any, policy: list[torch.nn.Parameter]) -> int:
    """Tensors of a parameter's size that the optimiser's first step will still make: two for Adam, one with momentum.

    bitsandbytes' 8-bit and paged states are smaller or live in host memory: none is held for them.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner is None or any(p in inner.state for p in policy) or type(inner).__module__.startswith("bitsandbytes"):
        return 0
    group = inner.param_groups[0]
    return 2 if "betas" in group else 1 if group.get("momentum") else 0
