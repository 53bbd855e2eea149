"""A run on every rank of torchrun; rank r writes what it ended with to OUT/rank-r.pt. `test_distributed.py` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conftest import make_pairs, run_config

SETTINGS = dict(sync="soft", sync_alpha=0.6, sync_every=2, gradient_accumulation_steps=2, num_train_epochs=2, beta=0.3)


def run(model: str, out: str, per_device: int, **changes):
    from datasets import Dataset

    from lorat.trainer import TrustRegionTrainer

    settings = {**SETTINGS, **changes, "per_device_train_batch_size": per_device}
    pairs, held_out = make_pairs(19), make_pairs(7, seed=3)  # 19 = 2 full steps of 8 and a ragged one of 3
    if settings["method"] == "kto":
        pairs, held_out = (
            [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 3 > 0} for i, p in enumerate(rows)]
            for rows in (pairs, held_out)
        )
    args = run_config(model, out, **settings)
    trainer = TrustRegionTrainer(None, args, Dataset.from_list(pairs), Dataset.from_list(held_out))
    trainer.train()
    metrics = trainer.evaluate()
    return trainer, metrics


def results(trainer, metrics):
    from lorat.reference import snapshot

    return {
        "history": [h for h in trainer.state.log_history if "loss" in h],
        "metrics": metrics,
        "policy": snapshot(trainer.model, "default"),
        "reference": snapshot(trainer.model, "ref"),
        "rule": trainer.rule.state_dict(),
    }


if __name__ == "__main__":
    model, out, per_device, changes = sys.argv[1:]
    trainer, metrics = run(model, out, int(per_device), **json.loads(changes))
    torch.save(results(trainer, metrics), Path(out) / f"rank-{trainer.args.process_index}.pt")
