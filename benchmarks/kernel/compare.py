"""`linear_logprob` beside its peers: time, memory and error in one row. `python -m benchmarks.kernel.compare --help`.

One command on a GPU: `python -m benchmarks.kernel.compare --out benchmarks/results/kernel-CARD.json`. On a CPU it runs at toy
sizes, so that it is known to work; times measured there say nothing about a GPU. The head is frozen for everyone. A
peer that is not installed, or fails, is recorded as that. The last line is one JSON document.

Floor: a bare matmul of the same shape in the same dtype, once without gradient, twice with (`docs/kernel.md`).
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lorat_kernels import launch, linear_logprob
from torch import Tensor

from benchmarks import record as report
from lorat.packs.logprobs import logprobs_of

FULL = [(n, d, v) for d, v in [(4096, 50432), (4096, 151936), (3584, 256000)] for n in (256, 1024, 2048, 8192)]
TOY = [(n, 32, v) for v in (101, 512) for n in (5, 16)]
MODES = ["no-grad", "forward", "forward+backward"]
SAMPLE = 64  # rows whose error against float64 is measured
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`(N, D)`, `(V, D)`, `(N,)` -> `(N,)` nats, through logits in the type of the operands."""
    return logprobs_of((hidden @ weight.T).float(), targets)


def peers() -> dict[str, Function | str]:
    """Every implementation by name: `(hidden, weight, targets) -> (N,)` log-probs, or why it is missing."""
    found: dict[str, Function | str] = {"lorat": linear_logprob, "naive eager": naive}
    for candidate in ("fused", "cublas"):
        found[f"lorat, {candidate}"] = with_candidate(candidate)
    found["torch.compile"] = torch.compile(naive, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        options = {"options": chunked()} if chunked else {}
        found["torch linear_cross_entropy"] = lambda h, w, t: (
            -F.linear_cross_entropy(h, w, t, reduction="none", **options)
        )
    else:
        found["torch linear_cross_entropy"] = f"not in torch {torch.__version__}"
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

        found["TRL chunked"] = lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, width, None, 1.0, ())[0]
    except ImportError:
        found["TRL chunked"] = "not installed"
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["Liger"] = lambda h, w, t: -liger(h, w, t, reduction="none")
    except ImportError:
        found["Liger"] = "not installed"
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["Cut Cross Entropy"] = lambda h, w, t: -cut(h, w, t, reduction="none")
    except ImportError:
        found["Cut Cross Entropy"] = "not installed"
    return found


def with_candidate(candidate: str) -> Function | str:
    """`linear_logprob` with one of its two candidates in place of the table's choice."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """As `linear_logprob`: `(N, D)`, `(V, D)`, `(N,)` -> `(N,)` nats."""
        chosen, launch.candidate_of = launch.candidate_of, lambda *_: candidate
        try:
            return linear_logprob(hidden, weight, targets)
        finally:
            launch.candidate_of = chosen

    return function


def inputs(rows: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device):
    """Logits of standard deviation 4, targets drawn from their distribution: log-probs of real text's size."""
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator, device=device).to(dtype)
    weight = torch.empty(vocab, dim, dtype=dtype, device=device)
    for block in weight.split(16384):
        block.copy_(torch.randn(block.shape, generator=generator, device=device) * (4 / math.sqrt(dim)))
    pieces = []
    for chunk in hidden.split(512):
        logits = (chunk @ weight.T).float()
        uniform = torch.rand(logits.shape, generator=generator, device=device).clamp_(1e-20)
        pieces.append((logits - (-uniform.log()).log()).argmax(1))
    return hidden, weight, torch.cat(pieces)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`(N, D)`, `(V, D)`, `(N,)` -> log-probs `(n,)` nats, gradient of their sum `(n, D)`; float64, n = SAMPLE rows."""
    h, y = hidden[:SAMPLE].double(), targets[:SAMPLE]
    logits = torch.cat([h @ w.double().T for w in weight.split(16384)], dim=1)
    logp = logits.log_softmax(-1)
    residual = -logp.exp()
    residual.scatter_add_(1, y[:, None], torch.ones_like(residual[:, :1]))
    parts = zip(residual.split(16384, dim=1), weight.split(16384))
    return logp.gather(1, y[:, None])[:, 0], sum(r @ w.double() for r, w in parts)


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of `call`, after two runs that do not count."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            took = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            took = 1e3 * (time.perf_counter() - begin)
        if i >= 2:
            times.append(took)
    return report.spread(times)


def peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """Greatest megabytes beyond what was allocated before `call`; None where nothing counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def calls(function: Function, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by mode: `function` on `(N, D)`, `(V, D)`, `(N,)`, alone and with the gradient of hidden."""
    leaf = hidden.detach().requires_grad_()

    def no_grad():
        with torch.no_grad():
            return function(hidden, weight, targets)

    def backward():
        return torch.autograd.grad(function(leaf, weight, targets).sum(), leaf)[0]

    return {"no-grad": no_grad, "forward": lambda: function(leaf, weight, targets), "forward+backward": backward}


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int, only: list[str]):
    torch._dynamo.reset()  # else torch.compile gives up after a few shapes and measures eager
    rows, dim, vocab = shape
    hidden, weight, targets = inputs(rows, dim, vocab, dtype, device)
    bare = timed(lambda: hidden @ weight.T, device, repeats)["median"]
    truth = exact(hidden, weight, targets)
    for name, function in peers().items():
        if only and not any(name.startswith(o) for o in only):
            continue
        common = {"implementation": name, "rows": rows, "dim": dim, "vocab": vocab, "bare_matmul_ms": bare}
        if isinstance(function, str):
            yield common | {"missing": function}
            continue
        for mode, call in calls(function, hidden, weight, targets).items():
            products = 4 if mode == "forward+backward" else 2  # the least: 2NVD, and 2NVD for the gradient
            try:
                call()  # compiles
                value = call()
                time_ms, memory = timed(call, device, repeats), peak(call, device)
            except Exception as error:
                yield common | {"mode": mode, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                continue
            row = common | {"mode": mode, "ms": time_ms, "peak_mb": memory}
            row["tflops"] = products * rows * vocab * dim / time_ms["median"] / 1e9
            row["over_floor"] = time_ms["median"] / (bare * products / 2)
            if mode == "forward+backward":
                gap = (value[:SAMPLE].double() - truth[1]).abs().max() / truth[1].abs().max()
                row["gradient_error"] = gap.item()
            else:
                row["logp_error"] = (value[:SAMPLE].double() - truth[0]).abs().max().item()
            yield row
            del value
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def targets_met(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, shape by shape, for the default choice of lorat."""
    ours = {
        (r["rows"], r["dim"], r["vocab"], r["mode"]): r for r in rows if r["implementation"] == "lorat" and "ms" in r
    }
    trl = {
        (r["rows"], r["dim"], r["vocab"], r["mode"]): r
        for r in rows
        if r["implementation"] == "TRL chunked" and "ms" in r
    }
    found = []
    for key, row in ours.items():
        aims: dict[str, tuple[float, float]] = {}
        if row["mode"] == "no-grad":
            aims["no-grad over a bare matmul"] = (row["over_floor"], 1.25)
        if "logp_error" in row:
            aims["log-prob error, nats"] = (row["logp_error"], 1e-4)
        if row["mode"] == "forward+backward" and key in trl:
            aims["forward+backward over TRL"] = (row["ms"]["median"] / trl[key]["ms"]["median"], 0.85)
        if row["peak_mb"] is not None:
            aims["peak memory, MB"] = (row["peak_mb"], 300)
        found += [
            {"shape": key[:3], "mode": key[3], "target": name, "value": value, "at_most": most, "met": value <= most}
            for name, (value, most) in aims.items()
        ]
    return found


def line(row: dict[str, Any]) -> str:
    where = f"{row['rows']:>5} × {row['dim']} × {row['vocab']:<6} {row['implementation']:<26}"
    if "missing" in row or "failed" in row:
        return f"{where} {row.get('mode', ''):<17} {row.get('missing') or row['failed']}"
    memory = "      -" if row["peak_mb"] is None else f"{row['peak_mb']:7.0f}"
    error = row.get("logp_error", row.get("gradient_error"))
    ms = row["ms"]
    return (
        f"{where} {row['mode']:<17} {ms['median']:9.3f} ms ({ms['p20']:.3f} to {ms['p80']:.3f}) {memory} MB "
        f"{row['tflops']:7.1f} TFLOP/s {row['over_floor']:6.2f} × floor   error {error:.2e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", choices=["full", "toy"], help="default: full on a GPU, toy on a CPU")
    parser.add_argument("--rows", type=int, nargs="*", help="only these numbers of rows")
    parser.add_argument("--vocab", type=int, nargs="*", help="only these vocabularies")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each call (default 20)")
    parser.add_argument("--only", nargs="*", default=[], help="only implementations whose names begin so")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    chosen = parser.parse_args()
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    sizes = chosen.sizes or ("full" if device.type == "cuda" else "toy")
    shapes = [
        s
        for s in (FULL if sizes == "full" else TOY)
        if (not chosen.rows or s[0] in chosen.rows) and (not chosen.vocab or s[2] in chosen.vocab)
    ]
    rows = []
    for shape in shapes:
        for row in measure(shape, dtype, device, chosen.repeats, chosen.only):
            rows.append(row)
            print(line(row), flush=True)
    plan = launch.plan_of(device)
    settings = {"sizes": sizes, "dtype": chosen.dtype, "repeats": chosen.repeats, "error_rows": SAMPLE}
    text = report.document(
        "benchmarks.kernel.compare",
        device,
        settings=settings,
        plan=plan and plan._asdict(),
        rows=rows,
        targets=targets_met(rows),
    )
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
