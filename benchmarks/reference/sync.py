"""What one update of the reference costs, on any device. `python -m benchmarks.reference.sync`.

Adapters alone, without a base: modules that hold LoRA factors of a model's shapes (Pythia-6.9B by default), so that a
6.9B model's adapters fit any machine. Every operation is timed after a warm-up, with the walk over the model in it, and
set against two floors: reading and writing the adapters once, and the step of `--tokens` tokens that it comes after
(8 operations a weight and token: forward of policy and reference, backward and recomputation, on a device that does
`--tflops`). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import record as report
from lorat.reference import adapter_parameters, blend_, copy_, distance

# name: (layers, parameters, [(out, in) of every adapted matrix of a layer])
SHAPES: dict[str, tuple[int, float, list[tuple[int, int]]]] = {
    "pythia-6.9b": (32, 6.9e9, [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]),
    "pythia-2.8b": (32, 2.8e9, [(7680, 2560), (2560, 2560), (10240, 2560), (2560, 10240)]),
    "llama-3-8b": (
        32,
        8.0e9,
        [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
    ),
    "tiny": (2, 1e5, [(192, 64), (64, 64), (256, 64), (64, 256)]),
}


class Layer(nn.Module):
    """The factors of one LoRA layer as PEFT holds them, on no base."""

    def __init__(self, out: int, width: int, ranks: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device, "bias": False}
        self.lora_A = nn.ModuleDict({n: nn.Linear(width, r, **made) for n, r in ranks.items()})
        self.lora_B = nn.ModuleDict({n: nn.Linear(r, out, **made) for n, r in ranks.items()})
        self.scaling = {n: 2.0 for n in ranks}


def adapters_only(shapes: str, rank: int, ref_rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A module with adapters `default` and `ref` on every matrix of `shapes`; values like a trained adapter's."""
    torch.manual_seed(0)
    layers, _, matrices = SHAPES[shapes]
    ranks = {"default": rank, "ref": ref_rank}
    model = nn.ModuleList(
        nn.ModuleList(Layer(out, width, ranks, dtype, device) for out, width in matrices) for _ in range(layers)
    )
    with torch.no_grad():
        for name, p in adapter_parameters(model, "default").items():
            p.normal_(std=0.02 if ".lora_A" in name else 0.002)
        copy_(model)
        for p in adapter_parameters(model, "default").values():
            p.add_(torch.randn_like(p), alpha=0.1 * float(p.std()))
    return model


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` calls, after two that do not count."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference.sync", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="pythia-6.9b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ref-rank", type=int, help="rank of the reference (default: the policy's)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--space", choices=["product", "factors", "both"], default="both")
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the training step to compare with")
    parser.add_argument(
        "--tflops", type=float, help="operations a second of that step, in 1e12 (default: not compared)"
    )
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    ref_rank = chosen.ref_rank or chosen.rank
    model = adapters_only(chosen.shapes, chosen.rank, ref_rank, getattr(torch, chosen.dtype), device)
    sizes = {n: sum(p.nbytes for p in adapter_parameters(model, n).values()) for n in ("default", "ref")}
    once = sizes["default"] + 2 * sizes["ref"]  # read both, write one

    work: dict[str, Callable[[], object]] = {"copy": lambda: copy_(model), "distance": lambda: distance(model)}
    for space in ["product", "factors"] if chosen.space == "both" else [chosen.space]:
        work[f"blend, {space}"] = lambda s=space: blend_(model, chosen.alpha, space=s)  # type: ignore[misc]
    if chosen.space != "product":
        work["blend, factors, unmeasured"] = lambda: blend_(model, chosen.alpha, space="factors", measure=False)
    work["walk over the model"] = lambda: adapter_parameters(model, "ref")
    floor = once / 1e9
    buffer = torch.empty(min(once // 2, 2**28), dtype=torch.uint8, device=device)
    copied = torch.empty_like(buffer)
    bandwidth = 2 * buffer.nbytes / min(timed(lambda: copied.copy_(buffer), 3, device))
    step = None
    if chosen.tflops:
        step = 8 * SHAPES[chosen.shapes][1] * chosen.tokens / (chosen.tflops * 1e12)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    seconds = {name: report.spread(timed(f, chosen.repeats, device)) for name, f in work.items()}
    extra = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None

    table = Table(title=f"{chosen.shapes}, rank {chosen.rank} and {ref_rank}, {chosen.dtype}, {device}")
    for column in ("", "ms", "spread", "of one pass over the bytes", "of the training step"):
        table.add_column(column, justify="left" if not column else "right")
    for name, s in seconds.items():
        share = f"{s['median'] / step:.2%}" if step else "–"
        passes = s["median"] * bandwidth / once
        table.add_row(
            name, f"{1e3 * s['median']:.2f}", f"{1e3 * s['p20']:.2f}–{1e3 * s['p80']:.2f}", f"{passes:.1f} ×", share
        )
    Console(width=120).print(table)
    print(
        f"adapters {sizes['default'] / 1e6:.0f} and {sizes['ref'] / 1e6:.0f} MB; one pass moves {floor:.3f} GB, "
        f"{1e3 * once / bandwidth:.1f} ms at the {bandwidth / 1e9:.1f} GB/s of a plain copy here"
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(chosen).items()}
    document = report.document(
        "benchmarks.reference.sync",
        device,
        settings=settings,
        adapter_bytes=sizes,
        bytes_of_one_pass=once,
        copy_bytes_per_second=bandwidth,
        step_seconds=step,
        extra_bytes=extra,
        seconds=seconds,
    )
    if chosen.out:
        chosen.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
