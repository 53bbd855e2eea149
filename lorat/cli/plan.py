"""`lorat plan` as a person types it: the settings of `lorat train`, and a bar of what will lie in the GPU's memory."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..plan.memory import Plan
    from ..settings.config import TrustRegionConfig

COLOURS = "blue cyan green bright_green yellow magenta bright_magenta bright_blue bright_cyan".split()
COLOURS += "red bright_red orange3 gold3 purple grey62 grey42".split()
LETTERS = "WSEHNPRGOKLADBCFX"
PACKS = (1024, 2048, 4096, 8192)  # shown where no card is named
DESCRIPTION = (
    "Predict the peak of GPU memory of a run from the model's configuration alone, item by item, and find the largest "
    "max_tokens_per_pack that fits. Every setting of `lorat train` is taken too, as --key value or with --config. Exit "
    "status: 0 it fits, 1 it does not, 2 the settings cannot work."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.set_defaults(settings=[])
    parser.add_argument("--gpu-memory", "--gpu_memory", help="12GiB, say; auto: what this card has free")
    parser.add_argument("--gpu", help="a card by name, such as 4090: its memory and what it computes in")
    parser.add_argument("--longest-example", type=int, help="tokens of the data's longest example; else of max_length")
    parser.add_argument("--cuda-context", default="500MiB", help="what CUDA takes for itself (assumed: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(options: argparse.Namespace) -> int:
    """Print the prediction; returns 0 if it fits (or nothing was asked to be fitted into), 1 if not."""
    from ..plan.advice import advised
    from ..plan.blueprint import read_model_config
    from ..plan.card import bytes_of, card_of
    from ..plan.memory import Planner

    card = card_of(options.gpu) if options.gpu else None
    config, fixed = _config(options.settings, card is None or card.bf16)
    gpu_memory = options.gpu_memory or (None if card else config.gpu_memory)
    available = bytes_of(gpu_memory) if gpu_memory else card.memory if card else None
    if available is None and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    workload = config.workload()
    capability = card.capability if card else None
    planner = Planner(workload, read_model_config(workload.base), bytes_of(options.cuda_context), capability)
    others: list[Plan] = []
    if available is None or fixed:
        out = planner.at(config.max_tokens_per_pack, available=available)
        others = [planner.at(n) for n in PACKS] if available is None else []
    else:
        out = planner.largest(available, options.longest_example)
    if not out.fits:
        out = advised(planner, out, options.longest_example)
    if options.json:
        print(json.dumps({"model": config.model_name_or_path, **out.as_dict()}))
    else:
        show(out, str(config.model_name_or_path), others, fixed)
    return 0 if out.fits else 1


def _config(argv: list[str], bf16: bool) -> tuple[TrustRegionConfig, bool]:
    """The run's settings; those that a plan does not need may be missing. Also: whether packs of a size were asked for.

    `bf16`: whether the card that is planned for has it.
    """
    from ..settings.arguments import REQUIRED, flags, parse_config
    from ..settings.sources import read_argv, read_yaml

    path, line, _ = read_argv(argv, flags())
    given = (read_yaml(path) if path is not None else {}) | line
    for key in REQUIRED:
        if key != "model_name_or_path" and key not in given:
            argv = [*argv, f"--{key}", "none"]
    if "use_cpu" not in given and not torch.cuda.is_available():
        argv = [*argv, "--use_cpu", "true"]  # else transformers refuses bf16 where no GPU is
    config = parse_config(argv)
    if not {"bf16", "fp16", "use_cpu"} & given.keys():
        config.bf16 = bf16
    return config, "max_tokens_per_pack" in line


def show(plan: Plan, name: str, others: list[Plan], fixed: bool = False, console: Console | None = None) -> None:
    """The bar, its legend, and what to do."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    size = f"of {gib(plan.available)} GiB" if plan.available else "of GPU memory"
    console.print(
        Text(f"{name}, packs of {plan.tokens:,} tokens: {gib(plan.total)} GiB {size}", style="bold"), soft_wrap=True
    )
    console.print(bar(plan, min(console.width - 2, 96), console.is_terminal))
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "left", "right", "left"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    for i, item in enumerate(plan.items):
        glyph = "█" if console.is_terminal else LETTERS[i % len(LETTERS)]
        square = Text(glyph, style=COLOURS[i % len(COLOURS)])
        table.add_row(square, Text(item.name), f"{item.bytes / 2**20:,.1f} MiB", Text(item.note, style="dim"))
    table.add_row("", Text("allocated by torch at the peak", style="bold"), f"{gib(plan.allocated)} GiB", "")
    table.add_row("", Text("in all", style="bold"), f"{gib(plan.total)} GiB", "")
    console.print(table)
    if plan.host:
        console.print(
            f"{plan.host / 2**20:,.1f} MiB of optimiser state are paged: in host memory when the GPU is full."
        )
    for note in plan.notes:
        console.print(f"Note: {note}.")
    for line in verdict(plan, fixed):
        console.print(Text(line))
    for other in others:
        console.print(
            f"Packs of {other.tokens:>5,}: {gib(other.allocated)} GiB allocated, {gib(other.total)} GiB in all."
        )


def verdict(plan: Plan, fixed: bool) -> list[str]:
    """What the numbers mean, in words."""
    if plan.available is None:
        return ["--gpu-memory 12GiB, or --gpu 4090, finds the largest packs that fit a card."]
    if plan.fits and fixed:
        return ["It fits."]
    if plan.fits:
        return [f"It fits. Set max_tokens_per_pack: {plan.tokens}"]
    lines = [f"It does not fit: {gib(plan.total - plan.available)} GiB too much."]
    if plan.needed and not fixed:
        lines = [
            f"It does not fit: a pack has to hold an example, of up to {plan.tokens:,} tokens here, and that is "
            f"{gib(plan.total - plan.available)} GiB too much."
        ]
    return (
        lines + ["What to change, each on top of those before:"] * bool(plan.advice) + [f"  {a}" for a in plan.advice]
    )


def bar(plan: Plan, width: int, colour: bool) -> Text:
    """The items side by side, to scale, in `width` cells; free memory is dotted, what is too much comes after a `|`."""
    whole = max(plan.total, plan.available or 0)
    edges, at = [0], 0
    for item in plan.items:
        at += item.bytes
        edges.append(round(at / whole * width))
    text = Text()
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        text.append(("█" if colour else LETTERS[i % len(LETTERS)]) * (b - a), style=COLOURS[i % len(COLOURS)])
    text.append("·" * (width - edges[-1]), style="dim")
    if plan.available and plan.total > plan.available:
        cut = round(plan.available / whole * width)
        return Text.assemble(text[:cut], ("|", "bold"), text[cut:])
    return text


def gib(number: int | None) -> str:
    return f"{(number or 0) / 2**30:.2f}"
