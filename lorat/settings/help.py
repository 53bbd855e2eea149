"""What `lorat train --help` prints: every setting with its type, default and one line of help.

lorat's own fields come first, by group, then the Trainer's that are used most, then the rest of them by
their first sentence, then TRL's names. Nothing is listed by hand that the fields know themselves.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from dataclasses import fields
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .aliases import ALIASES, CHECKPOINTING, LOSSES
from .arguments import types
from .coercion import describe, shown
from .config import GROUPS, TrustRegionConfig, field_default

EXAMPLES = """\
lorat train --config run.yaml
lorat train --config run.yaml --sync frozen --output_dir baseline
lorat train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized --output_dir out"""

COMMON = {
    "output_dir": "Folder for checkpoints and the finished adapter.",
    "learning_rate": None,
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Optimiser steps of the run, instead of num_train_epochs.",
    "per_device_train_batch_size": "Pairs (KTO: completions) per device and accumulation step.",
    "gradient_accumulation_steps": "Such batches in one optimiser step.",
    "warmup_steps": "Steps until the peak learning rate; below 1: share of the run.",
    "lr_scheduler_type": "linear, cosine, constant, constant_with_warmup …",
    "max_grad_norm": "Clip the gradient's norm here; 0: never.",
    "optim": "adamw_torch_fused, paged_adamw_8bit …",
    CHECKPOINTING: "Recompute activations in the backward pass. Unset: on.",
    "bf16": None,
    "seed": "Seed of the adapter's first values and of the order of the data.",
    "logging_steps": None,
    "report_to": "none, tensorboard, wandb …, or a list of them.",
    "eval_strategy": "When to evaluate during the run; at its end always, if there is data for it.",
    "eval_steps": "Optimiser steps between evaluations. Unset: logging_steps.",
    "save_steps": "Optimiser steps between checkpoints.",
    "save_total_limit": "Newest checkpoints to keep. Unset: all.",
    "resume_from_checkpoint": "true: the newest whole one; auto: the same or a fresh start; or a folder.",
}
REFUSED = ["auto_find_batch_size", "deepspeed", "fsdp", "label_smoothing_factor"]
REFUSED += ["neftune_noise_alpha", "use_liger_kernel"]
_HIDDEN = {*REFUSED, *ALIASES, "fsdp_config", "liger_kernel_config", "parallelism_config", "local_rank", "do_train"}
_HIDDEN |= {"do_eval", "do_predict", "remove_unused_columns", "logging_nan_inf_filter"}


def render(width: int | None = None) -> str:
    """The help text, `width` columns wide (default: the terminal's, at most 120); bold headings on a terminal."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    out = io.StringIO()
    terminal = sys.stdout.isatty()
    console = Console(file=out, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    console.print(Text("usage: lorat train --config run.yaml [--key value …]\n"))
    console.print(Text(INTRODUCTION + "\n"))
    _section(console, "Examples", None)
    for line in EXAMPLES.splitlines():
        console.print(Text(f"  {line}", no_wrap=True), soft_wrap=True)
    known = {f.name: f for f in fields(TrustRegionConfig) if f.init}
    own = {name: f for name, f in known.items() if "group" in f.metadata}
    label = max(map(len, [*own, *COMMON])) + 2
    for group in GROUPS:
        rows = [(n, _told(f, f.metadata["help"])) for n, f in own.items() if f.metadata["group"] == group]
        _section(console, group, _grid(rows, label))
    rows = [(name, _told(known[name], help or known[name].metadata["help"])) for name, help in COMMON.items()]
    _section(console, "Training (of transformers' Trainer)", _grid(rows, label))
    rest = {n: f for n, f in known.items() if n not in own and n not in COMMON and n not in _HIDDEN}
    label = min(max(map(len, rest)), 40) + 2
    rows = [(name, Text(_first_sentence(f.metadata.get("help", "")))) for name, f in sorted(rest.items())]
    names = Padding(Text(", ".join(sorted(rest)), style="cyan"), (0, 0, 0, 2))
    title = "More of the Trainer's settings (see transformers.TrainingArguments)"
    _section(console, title, _grid(rows, label, one_line=True) if width >= 100 else names)
    _section(console, "TRL's names, which are understood too", _grid(_trl(), 31))
    console.print(Text(f"\nRefused, with the reason: {', '.join(REFUSED)}."))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


INTRODUCTION = """\
Fine-tune a causal language model on preference data with a moving reference. Every setting below may stand in the \
YAML file, as `key: value`, and on the command line, which wins. A boolean needs no value there; null unsets. \
Brackets hold the type and the default."""


def _section(console: Console, title: str, body: RenderableType | None) -> None:
    console.print(Text(f"\n{title}" if body else title, style="bold"))
    if body:
        console.print(body)


def _grid(rows: list[tuple[str, Text]], label: int, one_line: bool = False) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=label + 1, no_wrap=True)
    table.add_column(ratio=1, no_wrap=one_line, overflow="ellipsis" if one_line else "fold")
    for name, text in rows:
        table.add_row(Text(f"  {name}", style="cyan"), text)
    return table


def _told(field: Any, help: str) -> Text:
    """Help, type and default of a field, as in "Rank of the adapters. [a whole number; 16]"."""
    hint, default = types()[field.name], field_default(field)
    kind = describe(hint).removesuffix(" or null").removeprefix("a ").removeprefix("one of: ")
    kind = kind.replace("true or false", "true/false").replace("whole number", "integer")
    if len(kind) > 60:  # an enumeration that the help gives examples of
        kind = "name"
    if default is not None:
        kind += f"; {shown(getattr(default, 'value', default))}"
    text = Text(help)
    text.append(f" [{kind}]", style="dim")
    return text


def _first_sentence(help: str) -> str:
    text = re.sub(r"\s+", " ", help.replace("%%", "%")).strip()
    text = re.sub(r"^(Whether (or not )?to |The |When using distributed training, (the )?)", "", text)
    text = re.split(r"(?<=[^.][^.][.])\s", text)[0]
    return text[:1].upper() + text[1:]


def _trl() -> list[tuple[str, Text]]:
    rows = [
        ("sync_ref_model", "true: sync soft, with TRL's 0.6 every 512; false: sync frozen"),
        ("loss_type", ", ".join(LOSSES) + " → method and what belongs to it"),
        ("use_peft", "true: left out; false: refused, lorat trains adapters"),
        ("disable_dropout", "true: left out; false: refused"),
    ]
    return [(old, Text(f"→ {new}")) for old, new in ALIASES.items()] + [(old, Text(told)) for old, told in rows]
