"""lorat beside TRL: pairs a second and peak memory of the same training run. `python -m benchmarks.step.throughput --help`.

Every case (workload, method, pairs a step, checkpointing) runs each side in a process of its own, TRL and lorat in
turn, on the same examples with the same settings (`benchmarks.step.sides`), and compares the losses step by step: a ratio
is reported only where all of them agree, and the exit code is 1 where some do not. The reference is frozen, since TRL
has no other with LoRA. TRL gets its best: completion positions alone at the head, and a reference that is the base
with its adapter off (`--trl-reference adapter`: a second adapter, as lorat always has).

Tolerance, relative to the loss: float32 1e-4 (log-probs of a few thousand nats are subtracted as sums by TRL: up to
5e-4 nats, times a slope of at most beta = 0.1, against losses near 0.7). With bf16 or a 4-bit base 5e-2: TRL rounds
logits to bf16 (0.016 nats a token, 0.4 over a pair of 600, times beta / 2 is 3 % of the loss of one pair) and keeps
the adapters of a 4-bit base in bf16.

On a GPU the same command with `--device cuda --model pythia-6.9b --load-in-4bit`; on a CPU memory is read from Linux's
/proc. `--toy` is for tests and says nothing about speed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
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

ROOT = Path(__file__).parents[2]
SMALL = {"layers": 12, "hidden": 512, "heads": 8, "vocab": 50304}  # of these, what no option names
USUAL: dict[str, Any] = dict(
    workloads=list(workloads.SHAPES), methods=["dpo"], pairs=[8], checkpointing="on", repeats=2, warmup=2
)
TOY = dict(workloads=["tldr"], methods=["dpo", "kto"], pairs=[2], repeats=1, warmup=1, steps=2, max_length=128) | dict(
    layers=2, hidden=64, heads=2, vocab=512
)
SHRINK = 8  # lengths of the toy's workloads
NAMES = ("trl", "lorat")
Row = dict[str, Any]


def tolerance(dtype: str, load_in_4bit: bool) -> float:
    """Relative difference of two losses of the same step; the module's docstring says why."""
    return 1e-4 if dtype == "float32" and not load_in_4bit else 5e-2


def bytes_of(text: str) -> int:
    """`24GiB`, `24GB` or `24G` (of 2³⁰) -> bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 24GiB, say")
    unit = {"GiB": 2**30, "G": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, None: 1}
    return int(float(found[1]) * unit[found[2]])


def run(case: sides.Case) -> Row:
    """One side of one case in a fresh process: what `sides.measure` returns, or `failed` and the last of its words."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if case["device"] == "cuda" else ""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step.sides", str(result)],
            input=json.dumps(case),
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},  # one GPU: TRL refuses to choose among several
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return json.loads(result.read_text())
        print(done.stderr[-4000:], file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def compare(trl: list[float], lorat: list[float], bound: float) -> Row:
    """Whether the losses of every step agree within `bound` of TRL's, and the first step where they do not."""
    gaps = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(trl, lorat)]
    agreed = [gap <= bound for gap in gaps]  # False for NaN too
    if len(trl) != len(lorat) or not trl:
        return {"agree": False, "tolerance": bound, "why": f"{len(trl)} steps of TRL, {len(lorat)} of lorat"}
    first = None if all(agreed) else agreed.index(False)
    differing = None if first is None else {"step": first + 1, "trl": trl[first], "lorat": lorat[first]}
    common = {"agree": first is None, "tolerance": bound, "largest_relative_difference": max(gaps)}
    return common | {"first_difference": differing, "trl": trl, "lorat": lorat}


def summary(runs: list[Row], pairs: int, warmup: int) -> Row:
    """One side's runs of a case: time and tokens of a timed step, samples a second, memory (the greatest of the runs)."""
    for word in ("refused", "out_of_memory", "failed"):
        if found := [r[word] for r in runs if word in r]:
            return {word: found[0]}
    seconds = [s for r in runs for s in r["seconds"][warmup:]]
    tokens = runs[0]["tokens"][warmup:]
    memory = max((r["memory_mb"] for r in runs), key=lambda m: m["peak"])
    return {
        "seconds_per_step": report.spread(seconds),
        "samples_per_second": pairs * len(seconds) / sum(seconds),
        "tokens_per_step": {k: sum(t[k] for t in tokens) / len(tokens) for k in ("gradient", "no_gradient")},
        "memory_mb": memory,
    }


def ratios(runs: dict[str, list[Row]], warmup: int) -> Row:
    """TRL's time over lorat's: of all timed steps together, and the spread over steps (each on the same examples)."""
    trl, lorat = ([s for r in runs[name] for s in r["seconds"][warmup:]] for name in NAMES)
    return {"throughput": sum(trl) / sum(lorat), "by_step": report.spread([a / b for a, b in zip(trl, lorat)])}


def measure(case: sides.Case, settings: Row) -> Row:
    """One row of the report: both sides of `case`, `repeats` times in turn."""
    warmup, pairs, method = settings["warmup"], case["pairs"], case["method"]
    runs: dict[str, list[Row]] = {name: [] for name in NAMES}
    for _ in range(settings["repeats"]):
        for name in NAMES:
            own = {"beta": settings["lorat_beta"]} if name == "lorat" and settings["lorat_beta"] else {}
            runs[name].append(run(case | {"side": name} | own))
    batches = [case["examples"][i : i + pairs] for i in range(warmup * pairs, len(case["examples"]), pairs)]
    counts = [workloads.count(batch, method) for batch in batches]
    row: Row = {name: summary(runs[name], pairs, warmup) for name in NAMES}
    row["tokens_per_pass"] = {k: sum(c[k] for c in counts) / len(counts) for k in counts[0]}
    row |= {"losses": None, "ratio": None}
    if all("seconds_per_step" in row[name] for name in NAMES):
        bound = tolerance(case["dtype"], case["load_in_4bit"])
        found = [compare(a["losses"], b["losses"], bound) for a, b in zip(*runs.values())]
        row["losses"] = next((c for c in found if not c["agree"]), found[0])
        row["ratio"] = ratios(runs, warmup) if row["losses"]["agree"] else None
    return row


def why_not(row: Row) -> str:
    """Why a row has no ratio."""
    parts = [f"{name} {word}" for name in NAMES for word in ("refused", "out_of_memory", "failed") if word in row[name]]
    return ", ".join(parts) or "losses differ"


def table(rows: list[Row]) -> Table:
    shown = Table(
        title="TRL and lorat: seconds a step, tokens a step (all passes, padding included), peak memory in MB"
    )
    for name in ("workload", "method", "pairs", "checkpointing"):
        shown.add_column(name)
    for name in ("TRL s", "lorat s", "ratio (p20 to p80)", "TRL tokens", "lorat tokens", "TRL MB", "lorat MB"):
        shown.add_column(name, justify="right")
    for row in rows:
        times, tokens, memory = [], [], []
        for side in (row[name] for name in NAMES):
            known = "seconds_per_step" in side
            times.append(f"{side['seconds_per_step']['median']:.3f}" if known else next(iter(side)))
            tokens.append(f"{sum(side['tokens_per_step'].values()):.0f}" if known else "-")
            memory.append(f"{side['memory_mb']['peak']:.0f} (+{side['memory_mb']['above']:.0f})" if known else "-")
        ratio = why_not(row)
        if row["ratio"]:
            by_step = row["ratio"]["by_step"]
            ratio = f"{row['ratio']['throughput']:.2f} ({by_step['p20']:.2f} to {by_step['p80']:.2f})"
        case = [row["workload"], row["method"], str(row["pairs"]), "on" if row["checkpointing"] else "off"]
        shown.add_row(*case, *times, ratio, *tokens, *memory)
    return shown


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.throughput", description=__doc__.splitlines()[0])
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 on the CPU")
    add("--model", choices=list(models.SHAPES), help="the shape of a real model, instead of the options that follow")
    add("--model-type", default="gpt_neox", choices=["gpt_neox", "llama", "qwen2"])
    for name, value in SMALL.items():
        add(f"--{name}", type=int, help=f"default {value}")
    add("--load-in-4bit", action="store_true", help="the base in NF4 with double quantisation")
    add("--workloads", nargs="+", choices=list(workloads.SHAPES), help="default: all")
    add("--methods", nargs="+", choices=["dpo", "ipo", "kto"], help="default: dpo")
    add("--pairs", type=int, nargs="+", help="pairs (KTO: completions) of a step; several are reported each; default 8")
    add("--checkpointing", choices=["on", "off", "both"], help="activation checkpointing; default on")
    add("--max-length", type=int, help="longest prompt + completion; default 1024")
    add("--max-tokens-per-pack", type=int, help="of lorat; default: lorat's own")
    add("--trl-reference", default="disabled", choices=["disabled", "adapter"], help="how TRL computes its reference")
    add("--beta", type=float, default=0.1)
    add("--learning-rate", type=float, default=1e-4)
    add("--lora-r", type=int, default=16)
    add("--steps", type=int, help="timed steps; default 6 on the CPU, 20 on CUDA")
    add("--warmup", type=int, help="steps before them; default 2")
    add("--repeats", type=int, help="times that each side runs, in turn; default 2")
    add("--seed", type=int, default=0, help="of the workloads")
    add("--memory-cap", type=bytes_of, help="of the GPU's memory, for each side: 24GiB, say")
    add("--data", type=Path, default=Path(os.environ.get("LORAT_DATA", ROOT.parent / "shared" / "data")))
    add("--toy", action="store_true", help="everything small, for a test")
    add("--out", type=Path, help="also write the JSON document here")
    add("--lorat-beta", type=float, help=argparse.SUPPRESS)  # another beta for lorat alone: must be refused
    return parser


def chosen_settings(arguments: list[str] | None = None) -> Row:
    settings = vars(options().parse_args(arguments))
    cuda = settings["device"] == "cuda"
    standard = USUAL | SMALL | {"max_length": 1024, "steps": 20 if cuda else 6} | (TOY if settings["toy"] else {})
    standard["dtype"] = "bfloat16" if cuda else "float32"
    return {k: standard.get(k) if v is None else v for k, v in settings.items()}


def main() -> int:
    settings = chosen_settings()
    out, data = settings.pop("out"), settings.pop("data")
    shape = {"type": settings["model_type"]} | {k: settings[k] for k in SMALL}
    if settings["model"]:
        shape = models.SHAPES[settings["model"]]
    shared = ("device", "dtype", "load_in_4bit", "max_length", "max_tokens_per_pack", "beta", "learning_rate", "lora_r")
    fixed = {k: settings[k] for k in (*shared, "trl_reference", "memory_cap")} | {"shape": shape}
    switches = {"on": [True], "off": [False], "both": [True, False]}[settings["checkpointing"]]
    cases = itertools.product(settings["workloads"], settings["methods"], settings["pairs"], switches)
    rows = []
    for name, method, pairs, checkpointing in cases:
        n = pairs * (settings["warmup"] + settings["steps"])
        shrink = SHRINK if settings["toy"] else 1
        drawn, source = workloads.draw(name, n, settings["seed"], shape["vocab"], settings["max_length"], shrink, data)
        case = {"method": method, "pairs": pairs, "checkpointing": checkpointing}
        told = {"workload": name, "lengths": source, **case, "sample": "completion" if method == "kto" else "pair"}
        row = told | measure(fixed | case | {"examples": workloads.for_method(drawn, method)}, settings)
        rows.append(row)
        result = f"{row['ratio']['throughput']:.2f} x" if row["ratio"] else f"no ratio: {why_not(row)}"
        print(f"{name}, {method}, {pairs} a step, checkpointing {checkpointing}: {result}", file=sys.stderr, flush=True)
        if row["losses"] and (first := row["losses"].get("first_difference")):
            print(f"  first at step {first['step']}: TRL {first['trl']:.7g}, lorat {first['lorat']:.7g}", flush=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(rows))
    text = report.document(
        "benchmarks.step.throughput",
        torch.device(settings["device"]),
        settings=settings | {"shape": shape},
        trl_changes=sides.TRL_CHANGES,
        rows=rows,
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)
    wrong = [r for r in rows if any("failed" in r[n] for n in NAMES) or (r["losses"] and not r["losses"]["agree"])]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
