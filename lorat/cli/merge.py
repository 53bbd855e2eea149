"""`lorat merge`: an adapter folded into its base, so that the result needs neither PEFT nor bitsandbytes."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fold a trained adapter into its base."
    parser.add_argument("run", help="output folder or checkpoint of a run, or any PEFT LoRA adapter")
    parser.add_argument("--out", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="dequantized",
        help="dequantized: what was trained, to the digit (default); original: the 16-bit weights",
    )
    parser.add_argument("--base-model", help="where the base lies now, if not where it lay in training")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="type to save in"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")


def run(options: argparse.Namespace) -> int:
    from ..runs.merge import merge

    o = options
    print(merge(o.run, o.out, o.base, o.base_model, o.dtype, o.trust_remote_code).render())
    return 0
