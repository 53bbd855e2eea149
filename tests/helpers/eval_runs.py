"""A finished run to evaluate, and its models once more by plain transformers and PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers.worlds import make_pairs, trainer_for

PAIRS = 16


def make_run(neox: str, out: Path, **settings) -> Path:
    """A few steps of TR-DPO from a nudged start, in float32 without 4-bit unless asked: all models differ."""
    from tests.helpers.worlds import nudge

    common = dict(load_in_4bit=False, sync="soft", sync_alpha=0.5, sync_every=2, beta=0.3, save_strategy="steps")
    first = trainer_for(neox, out / "sft", make_pairs(4, seed=9), **{**common, **settings, "save_strategy": "no"})
    nudge(first, scale=0.08)
    first.save_model()
    settings = {"policy_adapter": str(out / "sft"), "save_steps": 2, **common, **settings}
    trainer = trainer_for(neox, out / "run", make_pairs(PAIRS), eval_pairs=make_pairs(12, seed=3), **settings)
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())
    return out / "run"


def folders(run: Path) -> dict[str, Path | None]:
    last = run / f"checkpoint-{PAIRS // 4}"
    return {"policy": run, "reference": last / "ref", "start": run / "start", "base": None}


def plain(neox: str, folder: Path | None) -> torch.nn.Module:
    """The model by PEFT alone, float32."""
    base = AutoModelForCausalLM.from_pretrained(neox)
    return (PeftModel.from_pretrained(base, str(folder)) if folder else base).eval()


@torch.no_grad()
def next_logprobs(model, rows: list[list[int]]) -> torch.Tensor:
    """(n, V) float64 log-probs of the token after each row; rows of one length."""
    return model(input_ids=torch.tensor(rows)).logits[:, -1].double().log_softmax(-1)


@torch.no_grad()
def token_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def outcomes(model, prompt: list[int], end: int, longest: int) -> dict[tuple[int, ...], float]:
    """Log-prob of every completion of at most `longest` tokens: ended by `end`, or cut at `longest`."""
    done: dict[tuple[int, ...], float] = {}
    open_rows: dict[tuple[int, ...], float] = {(): 0.0}
    for step in range(longest):
        logp = next_logprobs(model, [[*prompt, *row] for row in open_rows])
        grown = {}
        for (row, before), nexts in zip(open_rows.items(), logp.tolist(), strict=True):
            for token, value in enumerate(nexts):
                kept = done if token == end or step == longest - 1 else grown
                kept[(*row, token)] = before + value
        open_rows = grown
    return done
