"""A run on every rank of torchrun; rank r writes what it ended with to OUT/rank-r.pt. `test_distributed.py` starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.helpers.worlds import make_pairs, run_config

SETTINGS = dict(sync="soft", sync_alpha=0.6, sync_every=2, gradient_accumulation_steps=2, num_train_epochs=2, beta=0.3)


def run(model: str, out: str, per_device: int, **changes):
    from datasets import Dataset

    from lorat.train.trainer import TrustRegionTrainer

    resume = changes.pop("resume", None)
    settings = {**SETTINGS, **changes, "per_device_train_batch_size": per_device}
    pairs, held_out = make_pairs(19), make_pairs(7, seed=3)  # 19 = 2 full steps of 8 and a ragged one of 3
    if settings["method"] == "kto":
        pairs, held_out = (
            [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 3 > 0} for i, p in enumerate(rows)]
            for rows in (pairs, held_out)
        )
    args = run_config(model, out, **settings)
    trainer = TrustRegionTrainer(None, args, Dataset.from_list(pairs), Dataset.from_list(held_out))
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    return trainer, metrics


def results(trainer, metrics):
    from lorat.reference import snapshot

    return {
        "history": [
            {k: v for k, v in h.items() if k != "tokens_per_second"} for h in trainer.state.log_history if "loss" in h
        ],
        "metrics": metrics,
        "policy": snapshot(trainer.model, "default"),
        "reference": snapshot(trainer.model, "ref"),
        "rule": trainer.rule.state_dict(),
    }


def resumed(model: str, out: str, per_device: int, **changes):
    """A whole run, and one that goes on from its checkpoint-2, in the middle of the first epoch."""
    import shutil

    settings = dict(save_strategy="steps", save_steps=2, logging_steps=3, lora_dropout=0.1, **changes)
    whole, _ = run(model, f"{out}/whole", per_device, **settings)
    whole.accelerator.wait_for_everyone()
    if whole.args.process_index == 0:
        shutil.copytree(f"{out}/whole", f"{out}/part")
        for name in ("checkpoint-4", "checkpoint-6"):
            shutil.rmtree(f"{out}/part/{name}")
    whole.accelerator.wait_for_everyone()
    part, _ = run(model, f"{out}/part", per_device, resume=True, **settings)
    return {"whole": results(whole, {}), "part": results(part, {})}


def signalled(model: str, out: str, per_device: int, **changes):
    """A run of which the second rank alone is told to stop, during its second step."""
    import os
    import signal

    from lorat.train.callbacks import ReferenceCallback

    move = ReferenceCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        move(self, args, state, control, **kwargs)

    ReferenceCallback.on_step_end = interrupt
    trainer, _ = run(model, out, per_device, **changes)
    return {"step": trainer.state.global_step, "received": trainer.signals.received}


if __name__ == "__main__":
    what, model, out, per_device, changes = sys.argv[1:]
    settings = json.loads(changes)
    if what == "run":
        made = results(*run(model, out, int(per_device), **settings))
    else:
        made = {"resumed": resumed, "signalled": signalled}[what](model, out, int(per_device), **settings)
    rank = int(os.environ["RANK"])
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(made, Path(out) / f"rank-{rank}.pt")
