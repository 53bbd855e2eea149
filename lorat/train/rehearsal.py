"""The heaviest pack first: whether a run fits its GPU is known in its first seconds, or it never runs out of memory.

Before the first step the fullest pack that this data can make goes forward and backward once, with room held for the
optimiser's state that the first step will allocate. Nothing is updated, and no random number is drawn from the run's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import TrainerCallback

from ..packs.packing import Batch
from ..reference import POLICY, adapter_parameters
from .scorer import Baseline, Scorer


class RehearsalCallback(TrainerCallback):
    """Rehearses on a GPU, at the start of training, the packs that batches of `batch_size` rows of `dataset` can make."""

    def __init__(self, scorer: Scorer, dataset: Any, batch_size: int) -> None:
        self.scorer, self.dataset, self.batch_size = scorer, dataset, batch_size

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        if args.device.type == "cuda":
            rehearse(self.scorer, self.dataset, self.batch_size, optimizer)
            torch.cuda.empty_cache()


def fullest(scorer: Scorer, dataset: Any, batch_size: int, prompts: bool = True) -> list[dict[str, Any]]:
    """The examples that fill one pack the most, longest first, by all their tokens or by completion tokens alone.

    At most a device batch of them; twice that for a method with companions, which may share the pack.
    """
    packer, method = scorer.packer, scorer.method
    columns = [name for name in dataset.column_names if name.endswith("_ids") and (prompts or name != "prompt_ids")]
    lengths = [pc.list_value_length(dataset.with_format("arrow")[:][name]).to_numpy() for name in columns]
    most = batch_size * (2 if method.companions else 1)
    chosen: list[dict[str, Any]] = []
    for i in np.argsort(-sum(lengths), kind="stable")[: 4 * most].tolist():
        example = dataset[i]
        if len(chosen) < most and len(packer.split([method.group(e) for e in [*chosen, example]])) == 1:
            chosen.append(example)
    return chosen


def rehearse(scorer: Scorer, dataset: Any, batch_size: int, optimizer: Any) -> list[int]:
    """Forward and backward of the fullest packs; returns their tokens. Parameters, gradients and random state stay."""
    models, device = scorer.models, scorer.ranks.device
    policy = list(adapter_parameters(models.peft, POLICY).values())
    states = _missing_state(optimizer, policy)
    training = models.peft.training
    tokens = []
    models.peft.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for prompts in (True, False):
                planned = scorer.plan(Batch(fullest(scorer, dataset, batch_size, prompts)))
                room = [torch.empty_like(p) for p in policy for _ in range(states)]
                none = Baseline(torch.zeros((), device=device))
                out, _ = scorer.score(models, planned, list(range(len(planned.batch))), none)
                out.losses.mean().backward()
                del room, out
                tokens.append(scorer.packer.tokens(planned.counted))
    finally:
        for p in policy:
            p.grad = None
        models.peft.train(training)
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
