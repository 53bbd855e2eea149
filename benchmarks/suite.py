"""Everything that this machine can measure, one after another, into `benchmarks/results/`; then the tables.

`make bench`, or `python -m benchmarks.suite --only throughput profile`. Each part is a command of its own, which can be run
by hand; a part that fails is said and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import record as report
from benchmarks import tables

RESULTS = Path(__file__).parent / "results"
BIG = ["--model", "pythia-6.9b", "--load-in-4bit"]
GPU: dict[str, list[str]] = {
    "kernel": ["benchmarks.kernel.compare"],
    "sync": ["benchmarks.reference.sync", "--device", "cuda"],
    "profile": ["benchmarks.step.profile", *BIG, "--packs", "2048", "8192"],
    "memory": ["benchmarks.step.memory", "--model", "pythia-6.9b", "--packs", "2048", "8192", "--parts", "step"],
    "memory-load": ["benchmarks.step.memory", "--model", "pythia-6.9b", "--parts", "load"],
    "memory-8gb": ["benchmarks.step.memory", "--model", "pythia-6.9b", "--parts", "long", "--memory-cap", "8GiB"],
    "throughput-24gb": ["benchmarks.step.throughput", *BIG, "--memory-cap", "24GiB", "--steps", "8", "--repeats", "1"],
}
CPU: dict[str, list[str]] = {
    "throughput": [
        "benchmarks.step.throughput",
        "--pairs",
        "1",
        "2",
        "8",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--repeats",
        "1",
    ],
    "profile": ["benchmarks.step.profile", "--packs", "2048", "--steps", "2", "--warmup", "1"],
    "memory": ["benchmarks.step.memory", "--toy"],  # a step of a model of real size is for a GPU
    "memory-load": ["benchmarks.step.memory", "--model", "pythia-6.9b", "--parts", "load"],  # 14 GB of disk for a while
    "sync": ["benchmarks.reference.sync", "--device", "cpu"],
    "blend-error": ["benchmarks.reference.blend_error"],
    "preparing": ["benchmarks.data.preparing"],
}


def card(device: torch.device) -> str:
    """The machine's name as part of a file's: h200, rtx-4090, cpu."""
    if device.type == "cpu":
        return "cpu"
    words = re.sub(r"nvidia|geforce|[^a-z0-9 ]", " ", report.machine(device)["name"].lower()).split()
    return "-".join(words)


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = GPU if device.type == "cuda" else CPU
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--limit", type=float, default=4 * 3600, help="seconds for each part")
    parser.add_argument("--toy", action="store_true", help="throughput and profile alone, at toy size: for a test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.toy:
        parts = {name: [parts[name][0], "--toy"] for name in ("throughput", "profile")}
        options.only = list(parts)
    told = []
    for name in options.only:
        out = options.results / f"{name}-{card(device)}.json"
        command = [sys.executable, "-m", *parts[name], "--out", str(out)]
        print(f"{name}: python -m {' '.join(parts[name])}", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        try:
            done = subprocess.run(command, timeout=options.limit, capture_output=True, text=True)
            ended, last = done.returncode, (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            ended, last = 124, f"took longer than {options.limit:.0f} s"
        told.append({"part": name, "status": ended, "seconds": round(time.perf_counter() - begun, 1)})
        print(f"  {'done' if not ended else f'status {ended}: {last}'}", file=sys.stderr, flush=True)
    if not options.toy:
        tables.render(options.results)
    print(json.dumps({"command": "python -m benchmarks.suite", "commit": report.commit(), "parts": told}))
    return 1 if any(t["status"] for t in told) else 0


if __name__ == "__main__":
    sys.exit(main())
