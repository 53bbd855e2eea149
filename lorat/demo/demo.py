"""`lorat demo`: the whole job at a size where one can look on: SFT, preferences, DPO and TR-DPO, samples before and after.

A tiny language model learns a small English (`toy.py`), is saved, and is loaded back in real 4-bit. Its own samples,
judged by a known reward with noise, become preference pairs. It is then aligned twice with the same trainer that
trains a 7B model: once against a frozen reference, once against a moving one. Cost: about a minute on two CPU cores.
What the table shows is one small run; it says how the parts fit together, not which method is better.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..files import write_whole
from ..model.base import load_base
from ..runs import checkpoint as ck
from ..settings.config import CHECKPOINTING, TrustRegionConfig
from ..train.trainer import TrustRegionTrainer
from . import toy

RUNS: dict[str, dict[str, Any]] = {
    "DPO": dict(sync="frozen"),
    "TR-DPO": dict(sync="soft", sync_alpha=0.1, sync_every=4),
}
SAMPLED = 768  # completions behind each figure of the table


@dataclass
class Row:
    """A line of the table: means over sampled completions, with the standard error of the first two."""

    gold: float
    gold_error: float
    kl: float
    kl_error: float
    accuracy: float | None
    samples: list[str]


def run(out: Path, seed: int = 0, pairs: int = 3072) -> dict[str, Row]:
    """Run the demo into `out`; returns the table's rows. Raises `CheckpointError` if `out` holds something else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small gains nothing from more, and loses much on a busy machine
    try:
        return _run(out, seed, pairs)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, pairs: int) -> dict[str, Row]:
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    if (out / "demo.json").exists():
        for name in RUNS:
            ck.guard_output_dir(out / name.lower(), resuming=False, overwrite=True)
    elif out.exists() and any(out.iterdir()):
        raise ck.CheckpointError(
            f"{str(out)!r} is not empty and holds no earlier demo; name another folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "demo.json", "{}\n")

    tokenizer = toy.make_tokenizer()
    with console.status("Teaching a tiny GPT-NeoX to speak from sloppy demonstrations (SFT) …"):
        sft = toy.make_sft_model(tokenizer, seed)
        sft.save_pretrained(out / "sft")
        tokenizer.save_pretrained(out / "sft")
    console.print(f"SFT model: {sum(p.numel() for p in sft.parameters()):,} parameters, saved to {out / 'sft'}")

    config = _config(out / "sft", out / "none", seed, sync="frozen")
    base = load_base(config.base())
    count = sum(p.numel() * p.element_size() for p in base.parameters() if p.dtype == torch.uint8)
    console.print(
        f"Loaded back in 4-bit NF4 (bitsandbytes): {count / 1024:.0f} KiB for the {2 * count:,} weights of its layers"
    )
    with console.status("Sampling completions and judging them (Bradley-Terry noise on a known reward) …"):
        train = toy.preference_pairs(base, tokenizer, pairs, seed=seed + 1)
        held_out = toy.preference_pairs(base, tokenizer, pairs // 8, seed=seed + 2)
        prompts = random.Random(seed).choices(toy.PROMPTS, k=SAMPLED)
        rows = {"SFT": _measure(base, None, tokenizer, prompts, held_out, seed)}
    write_whole(out / "held-out.jsonl", "".join(json.dumps(pair) + "\n" for pair in held_out))
    write_whole(out / "prompts.txt", "".join(f"{prompt}\n" for prompt in toy.PROMPTS))
    console.print(f"Preference pairs: {len(train)} to train on, {len(held_out)} held out\n")

    for name, settings in RUNS.items():
        args = _config(out / "sft", out / name.lower(), seed, **settings)
        trainer = TrustRegionTrainer(None, args, Dataset.from_list(train), Dataset.from_list(held_out), tokenizer)
        trainer.progress.label = name
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        with console.status(f"Sampling from {name} …"):
            rows[name] = _measure(trainer.model, trainer.model.disable_adapter, tokenizer, prompts, held_out, seed)

    _show(console, rows, prompts)
    took = time.perf_counter() - began
    summary = {name: {k: v for k, v in vars(row).items() if k != "samples"} for name, row in rows.items()}
    write_whole(
        out / "demo.json", json.dumps({"seed": seed, "seconds": round(took, 1), "rows": summary}, indent=1) + "\n"
    )
    console.print(
        f"Adapters: {out / 'dpo'} and {out / 'tr-dpo'} (plain PEFT adapters; README.md in each says how to load it)."
    )
    console.print(f"Took {took:.0f} s. A model without PEFT: lorat merge {out / 'tr-dpo'} --out {out / 'merged'}")
    return rows


def _config(model: Path, out: Path, seed: int, **settings: Any) -> TrustRegionConfig:
    common: dict[str, Any] = dict(
        model_name_or_path=str(model),
        output_dir=str(out),
        method="dpo",
        beta=2.0,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        num_train_epochs=1,
        max_length=64,
        lora_r=16,
        lora_alpha=32,
        logging_steps=8,
        eval_strategy="steps",
        eval_steps=64,
        save_strategy="no",
        save_reference=True,
        report_to="none",
        seed=seed,
    )
    common[CHECKPOINTING] = False
    return TrustRegionConfig(**common, **settings)


@torch.no_grad()
def _measure(model, without_adapter, tokenizer, prompts: list[str], held_out: list[dict], seed: int) -> Row:
    """Gold reward and KL to SFT from samples at temperature 1; reward accuracy against SFT on held-out pairs."""
    samples = toy.sample(model, tokenizer, prompts, seed=seed + 3)
    gold = torch.tensor([toy.gold_reward(p, s) for p, s in zip(prompts, samples)])
    row = Row(gold.mean().item(), _error(gold), 0.0, 0.0, None, samples)
    if without_adapter is None:
        return row

    def log_ratio(texts: list[str], completions: list[str]) -> torch.Tensor:
        """Policy minus SFT of n completions, `(n,)` nats."""
        policy = toy.sequence_logps(model, tokenizer, texts, completions)
        with without_adapter():
            return policy - toy.sequence_logps(model, tokenizer, texts, completions)

    kl = log_ratio(prompts, samples)
    texts = [p["prompt"] for p in held_out]
    margin = log_ratio(texts, [p["chosen"] for p in held_out]) - log_ratio(texts, [p["rejected"] for p in held_out])
    row.kl, row.kl_error, row.accuracy = kl.mean().item(), _error(kl), (margin > 0).float().mean().item()
    return row


def _error(x: torch.Tensor) -> float:
    """Standard error of the mean of `(n,)` values."""
    return (x.std() / len(x) ** 0.5).item()


def _show(console: Console, rows: dict[str, Row], prompts: list[str]) -> None:
    table = Table(title=f"\nAfter alignment ({SAMPLED} samples each, ± standard error)", title_justify="left")
    for heading in ("", f"gold reward (best {toy.BEST_REWARD:g})", "reward accuracy", "KL to SFT, nats"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        accuracy = "-" if row.accuracy is None else f"{row.accuracy:.1%}"
        kl = "0" if row.accuracy is None else f"{row.kl:.2f} ± {row.kl_error:.2f}"
        table.add_row(name, f"{row.gold:.2f} ± {row.gold_error:.2f}", accuracy, kl)
    console.print(table)
    console.print(
        "One run each at the same beta, at which a moving reference lets the policy go further: no ranking of methods.\n"
        "Gold reward: asked animal, grammar and kind words count for an answer; rude and repeated words against it.\n"
        "Reward accuracy: held-out pairs that policy minus SFT ranks as the noisy judge did.\n",
        style="dim",
    )
    shown = Table(title="What they say", title_justify="left", show_lines=True)
    shown.add_column("prompt", ratio=2)
    for name in rows:
        shown.add_column(name, ratio=3)
    for i in dict.fromkeys(prompts.index(p) for p in prompts):
        cells = [f"{r.samples[i]}  [dim]({toy.gold_reward(prompts[i], r.samples[i]):+g})[/dim]" for r in rows.values()]
        shown.add_row(prompts[i], *cells)
        if shown.row_count == 4:
            break
    console.print(shown)
