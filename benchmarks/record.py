"""What every benchmark says about itself: command, commit, machine, versions, spread; one JSON document at the end."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lorat.runs.versions import versions

PACKAGES = [
    *("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("trl", "liger-kernel", "cut-cross-entropy"),
]


def commit() -> str:
    """The commit of the checkout, with `+changes` where the working tree differs from it; `unknown` outside one."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return (head + ("+changes" if git("status", "--porcelain") else "")) or "unknown"
    except OSError:
        return "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {
            "name": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "memory_gb": round(card.total_memory / 1e9, 1),
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {"name": f"CPU, {platform.machine()}", "threads": torch.get_num_threads()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many there were."""
    ordered = sorted(values)
    at = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8), "n": len(ordered)}


def document(module: str, device: torch.device, **content: Any) -> str:
    """One line of JSON: who measured what on what, then `content`."""
    whole = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "device": machine(device),
        "versions": versions(PACKAGES, "not installed"),
        **content,
    }
    return json.dumps(whole)
