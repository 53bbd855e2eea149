"""Where the time of lorat's training step goes, by kernel, and how near it is to the floor.

`python -m benchmarks.step.profile --model pythia-6.9b --load-in-4bit --packs 8192` on a GPU; small and honest on a CPU.

The floor is the matrix products that cannot be left out: for P weights of the body and T tokens, forward and gradient of
the input for the policy, forward for the reference, forward once more where activations are recomputed: 6PT operations,
8PT with checkpointing (adapters, attention and head come on top and are not counted). The rate of the machine is that
of plain products of the model's own shapes, measured in the same run.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from benchmarks import record as report
from benchmarks.step import models, sides, workloads

# first match wins; names are kernels' on CUDA and operators' on the CPU
KINDS = {
    "log-probs": r"logprob|^(logits|reduce|residual|row)_kernel",
    "dequantisation": r"dequant",
    "attention": r"flash|fmha|attention|attn|softmax",
    "optimiser": r"adam|optimizer|multi_tensor|foreach|lerp",
    "matrix products": r"gemm|cutlass|nvjet|cublas|aten::(mm|addmm|addmm_|bmm|matmul|linear)$|mkldnn",
    "copies and casts": r"copy|memcpy|memset|cast|aten::(to|_to_copy|fill_|zero_|index_select|cat|index_add_)$|gather",
}
TOY = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 512}


class Profiled(TrainerCallback):
    """Times every step and profiles the last one."""

    def __init__(self, device: torch.device, steps: int) -> None:
        cuda = device.type == "cuda"
        kind = torch.profiler.ProfilerActivity
        self.device, self.steps = device, steps
        self.stamps: list[float] = []
        self.profiler = torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if cuda else [kind.CPU])

    def stamp(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps - 1:
            self.profiler.start()
        self.stamp()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stamp()
        if state.global_step == self.steps:
            self.profiler.stop()

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps[::2], self.stamps[1::2])]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "norms and elementwise")


def by_kernel(profiler: Any, cuda: bool) -> list[dict[str, Any]]:
    """`{name, kind, ms, calls}` of the profiled step, slowest first: time on the device, or an operator's own time."""
    rows = []
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device != cuda or getattr(event, "is_user_annotation", False):  # ranges hold kernels that are here too
            continue
        took = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        if took > 0:
            rows.append({"name": event.key[:120], "kind": kind_of(event.key), "ms": took, "calls": event.count})
    return sorted(rows, key=lambda r: -r["ms"])


def product_rate(weights: list[tuple[int, int]], tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of plain products `(tokens, in) x (in, out)` over the given shapes `(out, in)`."""
    done = took = 0.0
    for out, width in sorted(set(weights)):
        x, w = (torch.randn(shape, device=device).to(dtype) for shape in ((tokens, width), (out, width)))
        for timed in (False, True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(3):
                x @ w.T
            if device.type == "cuda":
                torch.cuda.synchronize()
            if timed:
                took += time.perf_counter() - begun
                done += 3 * 2 * tokens * out * width
    return done / took


def body(model: Any) -> list[tuple[int, int]]:
    """Shapes (out, in) of the linear layers below the head; those of experts are not counted apart."""
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return [(m.out_features, m.in_features) for m in layers]


def measure(options: argparse.Namespace, shape: dict[str, Any], tokens: int) -> dict[str, Any]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    length = min(options.max_length, tokens)
    drawn = workloads.synthetic(options.workload, 4000, 0, shape["vocab"], length, 16 if options.toy else 1)
    chosen, filled = [], 0
    for pair in drawn:  # one pack of `tokens` a step
        need = sum(len(ids) for ids in pair.values())
        if filled + need <= tokens:
            chosen.append(pair)
            filled += need
    steps = options.warmup + options.steps + 1
    case = dict(
        method="dpo", pairs=len(chosen), examples=workloads.for_method(chosen * steps, "dpo"), device=options.device,
        dtype=options.dtype, load_in_4bit=options.load_in_4bit, lora_r=options.lora_r, learning_rate=1e-4, beta=0.1,
        max_length=length, checkpointing=options.checkpointing == "on", max_tokens_per_pack=tokens,
    )  # fmt: skip
    from lorat.model.base import keep_trainable_on_cpu_

    model = models.build(shape, device, dtype, options.load_in_4bit)
    keep_trainable_on_cpu_(model)
    weights = body(model)
    watch = Profiled(device, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sides.lorat_trainer(case, model, folder, watch)  # type: ignore[arg-type]
        trainer.train()
    seconds = watch.seconds()[options.warmup : -1]
    kernels = by_kernel(watch.profiler, device.type == "cuda")
    kinds: dict[str, float] = defaultdict(float)
    for row in kernels:
        kinds[row["kind"]] += row["ms"]
    parameters = sum(out * width for out, width in weights)
    floor = (8 if case["checkpointing"] else 6) * parameters * filled
    rate = product_rate(weights, filled, device, dtype)
    spread = report.spread(seconds)
    return {
        "pack": tokens, "tokens": filled, "pairs": len(chosen), "checkpointing": case["checkpointing"],
        "seconds_per_step": spread, "floor_operations": floor, "product_rate": rate,
        "matrix_unit_use": floor / spread["median"] / rate, "ms_by_kind": dict(sorted(kinds.items(), key=lambda i: -i[1])),
        "kernels": kernels[:20],
    }  # fmt: skip


def show(console: Console, row: dict[str, Any]) -> None:
    table = Table(title=f"A step of {row['tokens']} tokens: {1e3 * row['seconds_per_step']['median']:.1f} ms")
    for name in ("kind", "ms", "share"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    total = sum(row["ms_by_kind"].values())
    for kind, took in row["ms_by_kind"].items():
        table.add_row(kind, f"{took:.1f}", f"{took / total:.1%}")
    console.print(table)
    console.print(
        f"floor {row['floor_operations']:.3g} operations at {row['product_rate'] / 1e12:.2f} T/s of plain products: "
        f"{row['matrix_unit_use']:.1%} of the step"
    )


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.profile", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    add("--dtype", default="bfloat16" if cuda else "float32", choices=["float32", "bfloat16"])
    add("--model", choices=list(models.SHAPES), help="default: 12 layers of 512, GPT-NeoX")
    add("--load-in-4bit", action="store_true")
    add("--packs", type=int, nargs="+", default=[2048])
    add("--workload", default="tldr", choices=list(workloads.SHAPES))
    add("--checkpointing", default="on", choices=["on", "off"])
    add("--max-length", type=int, default=1024)
    add("--lora-r", type=int, default=16)
    add("--steps", type=int, default=5)
    add("--warmup", type=int, default=2)
    add("--toy", action="store_true", help="everything small, for a test")
    add("--out", type=Path)
    options = parser.parse_args()
    small = {"layers": 12, "hidden": 512, "heads": 8, "vocab": 50304}
    shape = models.SHAPES[options.model] if options.model else {"type": "gpt_neox", **(TOY if options.toy else small)}
    rows = [measure(options, shape, 256 if options.toy else tokens) for tokens in options.packs]
    console = Console(width=None if sys.stdout.isatty() else 120)
    for row in rows:
        show(console, row)
    settings = {k: v for k, v in vars(options).items() if k != "out"} | {"shape": shape}
    text = report.document("benchmarks.step.profile", torch.device(options.device), settings=settings, rows=rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
