"""lorat's memory, measured beside `lorat plan`'s prediction. `python -m benchmarks.step.memory --help`.

Three parts. "step": the peak of a real training step, the model made directly in 4-bit with random weights, packs of exactly
so many tokens, with and without activation checkpointing, each in a process of its own. "long": `--steps` steps on pairs of
up to 1,024 tokens under `--memory-cap`, with the packs that `lorat plan` chose: it must not run out of memory. "load": host
memory while a checkpoint of shards is loaded in 4-bit (`benchmarks.step.loading`); the goal is under twice the 4-bit size.

On CUDA memory is torch's own count (allocated, reserved) and what the driver says of the card. On a CPU it is the
process's resident memory, beside TRL's in the same run: a prediction for a GPU cannot be checked there, since attention
and log-probs take other paths and the C allocator keeps what is freed, so no error is stated. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record as report
from benchmarks.step import models, sides, workloads
from benchmarks.step.throughput import ROOT, Row, bytes_of

PAIR = (256, 128, 128)  # prompt, chosen, rejected of the pairs that fill a pack
TOY = {"type": "gpt_neox", "layers": 2, "hidden": 64, "heads": 2, "vocab": 512}


def examples(tokens: int, vocab: int, steps: int) -> list[Row]:
    """Pairs for `steps` steps, each step one pack of exactly `tokens` tokens, a multiple of 512 (or one pair of fewer)."""
    n = max(1, tokens // sum(PAIR))
    p, c, r = PAIR if tokens >= sum(PAIR) else (tokens // 2, tokens // 4, tokens - tokens // 2 - tokens // 4)
    draw = torch.Generator().manual_seed(0)
    ids = lambda k: torch.randint(2, vocab, (k,), generator=draw).tolist()  # noqa: E731
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(ids, (p, c, r)))) | {"row": i} for i in range(n * steps)]


def settings_of(case: Row) -> Any:
    """The configuration that `benchmarks.step.sides` trains `case` with, as a GPU would have it where that is meant."""
    from lorat.settings.config import CHECKPOINTING, TrustRegionConfig

    common = sides.common(case, "unused") | {"use_cpu": True, "bf16": False, "sync": "frozen"}
    own = {"load_in_4bit": case["load_in_4bit"], "lora_r": case["lora_r"], CHECKPOINTING: case["checkpointing"]}
    config = TrustRegionConfig(**common | own)
    config.bf16 = case["dtype"] == "bfloat16"
    return config


def predict(case: Row, tokens: int, capability: tuple[int, int] | None) -> Row:
    """What `lorat plan` says of a case, item by item, in MB."""
    from lorat.plan.memory import Planner

    planner = Planner(settings_of(case).workload(), models.configuration(case["shape"]), capability=capability)
    lengths = [(len(e["prompt_ids"]), [len(e["chosen_ids"]), len(e["rejected_ids"])]) for e in case["examples"]]
    plan = planner.at(tokens, lengths[: case["pairs"]])
    items = {i.name: i.bytes / 1e6 for i in plan.items}
    return {"allocated_mb": plan.allocated / 1e6, "total_mb": plan.total / 1e6, "items_mb": items}


def child(case: Row, module: str = "benchmarks.step.memory", *words: str) -> Row:
    """A case in a fresh process: its JSON, or `failed` and the last of its words."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if case.get("device") == "cuda" else ""
    done = subprocess.run(
        [sys.executable, "-m", module, *(words or ("--case",))],
        input=json.dumps(case),
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr[-4000:], file=sys.stderr)
    return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def measure(case: Row) -> Row:
    """In the child: a side's run, and what the driver says of the card before and after it."""
    cuda = case["device"] == "cuda"

    def used() -> float:
        free, whole = torch.cuda.mem_get_info()
        return (whole - free) / 1e6

    before = used() if cuda else None  # the context, on a card that nothing else uses
    with tempfile.TemporaryDirectory() as folder:
        out = sides.measure(case, folder)
    out["card_mb"] = {"before": before, "after": used()} if cuda else None
    return out


def step_row(case: Row, tokens: int) -> Row:
    """One configuration: predicted, measured, and the error of the prediction in percent (CUDA)."""
    row: Row = {"tokens": tokens, "checkpointing": case["checkpointing"]}
    row["lorat"] = _short(child(case | {"side": "lorat"}))
    capability = torch.cuda.get_device_capability() if case["device"] == "cuda" else (8, 9)
    row["predicted"] = predict(case, tokens, capability)
    if case["device"] == "cpu":
        row["trl"] = _short(child(case | {"side": "trl"}))
    elif "memory_mb" in row["lorat"]:
        peak = row["lorat"]["memory_mb"]["peak"]
        row["error_percent"] = 100 * (row["predicted"]["allocated_mb"] - peak) / peak
    return row


def _short(found: Row) -> Row:
    return {k: v for k, v in found.items() if k in ("memory_mb", "card_mb", "failed", "refused", "out_of_memory")}


def long_row(case: Row, steps: int, data: Path) -> Row:
    """`steps` steps on pairs of up to 1,024 tokens with the packs that fit the cap: finished, or where it broke."""
    from lorat.plan.memory import Planner

    case = copy.deepcopy(case) | {"pairs": 4 if case["toy"] else 64, "max_length": 1024 if not case["toy"] else 64}
    drawn, source = workloads.draw(
        "ultrafeedback",
        case["pairs"] * steps,
        0,
        case["shape"]["vocab"],
        case["max_length"],
        16 if case["toy"] else 1,
        data,
    )
    case["examples"] = drawn
    planner = Planner(settings_of(case).workload(), models.configuration(case["shape"]))
    plan = planner.largest(case["memory_cap"] or 2**40)
    found = child(case | {"side": "lorat", "max_tokens_per_pack": plan.tokens})
    return {
        "steps": steps,
        "finished": len(found.get("losses", [])) == steps,
        "lengths": source,
        "max_tokens_per_pack": plan.tokens,
        "predicted_mb": plan.total / 1e6,
        **_short(found),
    }


def load_row(shape: Row, device: str, shard: str) -> Row:
    """Host memory while a checkpoint of `shape` is saved to disk and loaded in 4-bit."""
    from lorat.plan.blueprint import draw, stored
    from lorat.settings.config import TrustRegionConfig

    config = TrustRegionConfig(output_dir="unused", use_cpu=True, bf16=False, dtype="bfloat16")
    model = draw(config.base(), config.adapter(), models.configuration(shape))
    size = sum(t.untyped_storage().nbytes() for what, t in stored(model) if what not in ("policy", "reference"))
    with tempfile.TemporaryDirectory() as folder:
        saved = child({"shape": shape, "shard": shard}, "benchmarks.step.loading", "save", folder)
        found = child({"device": device, "quantised_mb": size / 1e6}, "benchmarks.step.loading", "load", folder)
    return {"shape": shape, "checkpoint": saved, **found}


def table(rows: list[Row]) -> Table:
    shown = Table(title="Peak memory of a training step, MB")
    for name in ("pack", "checkpointing", "measured", "TRL", "predicted for a GPU", "error"):
        shown.add_column(name, justify="right")
    for row in rows:
        told = [f"{r['memory_mb']['peak']:.0f}" if "memory_mb" in r else "-" for r in (row["lorat"],)]
        trl = row.get("trl", {}).get("memory_mb", {}).get("peak")
        error = f"{row['error_percent']:+.1f} %" if "error_percent" in row else "-"
        case = [str(row["tokens"]), "on" if row["checkpointing"] else "off"]
        shown.add_row(*case, *told, f"{trl:.0f}" if trl else "-", f"{row['predicted']['allocated_mb']:.0f}", error)
    return shown


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.memory", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--parts", nargs="+", choices=["step", "long", "load"], default=["step", "long", "load"])
    add("--model", default="pythia-6.9b", choices=list(models.SHAPES))
    add("--packs", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    add("--checkpointing", choices=["on", "off", "both"], default="both")
    add("--lora-r", type=int, default=16)
    add("--steps", type=int, default=200, help="of the long run")
    add("--memory-cap", type=bytes_of, help="of the GPU's memory, as a stand-in for a smaller card: 8GiB, say")
    add("--shard", default="5GB", help="size of a file of the checkpoint that is loaded")
    add("--data", type=Path, default=Path(os.environ.get("LORAT_DATA", ROOT.parent / "shared" / "data")))
    add("--toy", action="store_true", help="everything small, for a test")
    add("--out", type=Path, help="also write the JSON document here")
    add("--case", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    chosen = options().parse_args()
    if chosen.case:
        print(json.dumps(measure(json.load(sys.stdin))))
        return 0
    cuda = chosen.device == "cuda"
    shape: dict[str, Any] = TOY if chosen.toy else models.SHAPES[chosen.model]
    packs = [128] if chosen.toy else chosen.packs
    steps = 3 if chosen.toy else chosen.steps
    case: Row = dict(
        device=chosen.device,
        dtype="bfloat16" if cuda else "float32",
        load_in_4bit=True,
        method="dpo",
        max_length=1024,
        max_tokens_per_pack=None,
        beta=0.1,
        learning_rate=1e-4,
        lora_r=chosen.lora_r,
        trl_reference="disabled",
        memory_cap=chosen.memory_cap,
        shape=shape,
        checkpointing=True,
        toy=chosen.toy,
    )
    found: Row = {"step": [], "long": None, "load": None}
    if "step" in chosen.parts:
        for tokens in packs:
            for on in {"on": [True], "off": [False], "both": [True, False]}[chosen.checkpointing]:
                pairs = max(1, tokens // sum(PAIR))
                own = {"checkpointing": on, "pairs": pairs, "max_tokens_per_pack": tokens}
                found["step"].append(step_row(case | own | {"examples": examples(tokens, shape["vocab"], 3)}, tokens))
        Console(width=None if sys.stdout.isatty() else 120).print(table(found["step"]))
    if "long" in chosen.parts:
        found["long"] = long_row(case, steps, chosen.data)
    if "load" in chosen.parts:
        found["load"] = load_row(shape, chosen.device, "200KB" if chosen.toy else chosen.shard)
    settings = {k: v for k, v in vars(chosen).items() if k not in ("out", "data", "case")} | {"shape": shape}
    text = report.document("benchmarks.step.memory", torch.device(chosen.device), settings=settings, **found)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text + "\n")
    print(text)
    ran = [row["lorat"] for row in found["step"]] + [found[k] for k in ("long", "load") if found[k]]
    broken = [r for r in ran if "failed" in r] + (
        [found["long"]] if found["long"] and not found["long"]["finished"] else []
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
