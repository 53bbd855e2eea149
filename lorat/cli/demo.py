"""`lorat demo`: a small run from scratch, to look at."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "A small run from scratch, to look at."
    parser.add_argument("--out", default="demo-output", help="where models and adapters go (default: demo-output)")
    parser.add_argument("--seed", type=int, default=0, help="decides everything (default: 0)")


def run(options: argparse.Namespace) -> int:
    from ..demo.demo import run as demo

    demo(Path(options.out), seed=options.seed)
    return 0
