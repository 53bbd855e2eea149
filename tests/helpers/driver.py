"""A short run in a process of its own, to be killed at a chosen moment. Not a test; `test_resume.py` starts it.

usage: driver.py MODEL OUT MOMENT RESUME     MOMENT: never | step:N | saving:N | published:N
"""

from __future__ import annotations

import os
import signal
import sys

from tests.helpers.worlds import make_pairs, run_config

SETTINGS = dict(
    method="dpo",
    sync="soft",
    sync_alpha=0.6,
    sync_every=3,
    lora_dropout=0.1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    lr_scheduler_type="cosine",
    logging_steps=3,
    save_strategy="steps",
    save_steps=2,
)


def make(model: str, out: str, **changes):
    from datasets import Dataset

    from lorat.train.trainer import TrustRegionTrainer

    settings = {**SETTINGS, **changes}
    eval_pairs = settings.pop("eval_pairs", None)
    held_out = Dataset.from_list(eval_pairs) if eval_pairs else None
    pairs = make_pairs(19)  # 5 steps an epoch, the last one ragged
    if settings["method"] == "kto":
        pairs = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 3 > 0} for i, p in enumerate(pairs)]
    return TrustRegionTrainer(None, run_config(model, out, **settings), Dataset.from_list(pairs), held_out)


def die_at(trainer, moment: str) -> None:
    """SIGKILL after step N; while checkpoint-N is being written; or once it is there, with a file of it torn."""
    from lorat.runs import checkpoint as ck

    kind, _, number = moment.partition(":")
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    publish = ck.publish

    def at_publish(staged, final):
        if final.name != f"checkpoint-{number}":
            return publish(staged, final)
        if kind == "saving":
            kill()
        publish(staged, final)
        path = final / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-100])
        kill()

    def at_step(args, state, control, **kwargs):
        if state.global_step == int(number):
            kill()

    if kind == "step":
        trainer.progress.on_step_end = at_step
    elif kind in ("saving", "published"):
        ck.publish = at_publish


if __name__ == "__main__":
    model, out, moment, resume = sys.argv[1:]
    trainer = make(model, out)
    die_at(trainer, moment)
    trainer.train(resume_from_checkpoint=None if resume == "no" else resume)
