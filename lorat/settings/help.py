"""What `lorat train --help` prints: every setting with its type, default and one line of help.

lorat's own settings come first, by group, then the Trainer's that are used most, then the names of the rest of them,
then TRL's names. All of it is read from `table.py`, so that help is there at once.
"""

from __future__ import annotations

import io
import shutil
import sys

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .aliases import ALIASES, LOSSES
from .arguments import type_of
from .inherited import CHECKPOINTING, installed
from .sources import describe, shown
from .table import GROUPS, IDLE, NOT_SETTABLE, OWN, REFUSED, TRAINER, Setting

DOCUMENTED = "https://huggingface.co/docs/transformers/main_classes/trainer"

EXAMPLES = """\
lorat train --config run.yaml
lorat train --config run.yaml --sync frozen --output_dir baseline
lorat train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized --output_dir out"""


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
    common = {CHECKPOINTING if name == "activation_checkpointing" else name: s for name, s in TRAINER.items()}
    label = max(map(len, [*OWN, *common])) + 2
    for group in GROUPS:
        rows = [(name, _told(name, s)) for name, s in OWN.items() if s.group == group]
        _section(console, group, _grid(rows, label))
    rows = [(name, _told(name, s)) for name, s in common.items()]
    _section(console, "Training (of transformers' Trainer)", _grid(rows, label))
    rest = sorted(installed().keys() - OWN.keys() - common.keys() - {*REFUSED, *IDLE, *NOT_SETTABLE, *ALIASES})
    _section(console, "More of the Trainer's settings", Padding(Text(", ".join(rest), style="cyan"), (0, 0, 0, 2)))
    console.print(Text(f"  What they do: {DOCUMENTED}"))
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


def _grid(rows: list[tuple[str, Text]], label: int) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=label + 1, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, text in rows:
        table.add_row(Text(f"  {name}", style="cyan"), text)
    return table


def _told(name: str, setting: Setting) -> Text:
    """Help, type and default of a setting, as in "Rank of the adapters. [a whole number; 16]"."""
    kind = setting.kind if isinstance(setting.kind, str) else describe(type_of(name))
    kind = kind.removesuffix(" or null").removeprefix("a ").removeprefix("one of: ")
    kind = kind.replace("true or false", "true/false").replace("whole number", "integer")
    if setting.default is not None:
        kind += f"; {shown(setting.default)}"
    text = Text(setting.help)
    text.append(f" [{kind}]", style="dim")
    return text


def _trl() -> list[tuple[str, Text]]:
    rows = [
        ("sync_ref_model", "true: sync soft, with TRL's 0.6 every 512; false: sync frozen"),
        ("loss_type", ", ".join(LOSSES) + " → method and what belongs to it"),
        ("use_peft", "true: left out; false: refused, lorat trains adapters"),
        ("disable_dropout", "true: left out; false: refused"),
    ]
    return [(old, Text(f"→ {new}")) for old, new in ALIASES.items()] + [(old, Text(told)) for old, told in rows]
