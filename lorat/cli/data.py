"""`lorat data`: what a run would train on, before it does: the report, lengths, and a few rows as the model meets them."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..data.preview import Look, Side

BINS = 12
SHOWN = 900  # characters of a long text that are shown, where a row was not asked for by its number
DESCRIPTION = (
    "Read and tokenise the data of a run without its model, and show it: the report that `lorat train` prints, the lengths, "
    "and a few rows as the model meets them. Every setting of `lorat train` is taken too, as --key value or with "
    "--config. Exit status: 0, or 2 where `lorat train` would refuse the data."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.set_defaults(settings=[])
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    parser.add_argument(
        "--row", type=int, action="append", metavar="NUMBER", help="show this row, whole; may be repeated"
    )
    parser.add_argument("--out", metavar="DIR", help="write the prepared data there; give DIR as dataset_name then")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier --out wrote")


def run(options: argparse.Namespace) -> int:
    if options.rows < 0 or any(row < 0 for row in options.row or ()):
        raise ConfigError("--rows and --row count from 0; give a number of at least 0.")
    out = _out(options.out, options.overwrite)
    from ..settings.arguments import parse_config

    args = parse_config(_unneeded(options.settings))

    from rich.console import Console

    from ..data.columns import RowSettings
    from ..data.mixture import Mixture, prepare_all, read_evaluation, read_training
    from ..data.prepare import check_budget
    from ..data.tokenization import check_tokenizer
    from ..model.base import load_tokenizer

    console = terminal()
    tokenizer = load_tokenizer(args.base())
    check_tokenizer(tokenizer)
    how: dict[str, Any] = {"method": args.method, "max_length": args.max_length, "overlong": args.overlong}
    how |= {"max_prompt_length": args.max_prompt_length, "rows": RowSettings.of(vars(args))}
    more: dict[str, Any] = {
        "weights": (args.desirable_weight, args.undesirable_weight),
        "num_proc": args.dataset_num_proc,
    }
    with Console(stderr=True).status("Reading …") as status:
        raw = {"train": read_training(vars(args)), "eval": read_evaluation(vars(args))}
        prepared = {}
        for name, data in raw.items():
            if data is not None:
                status.update(f"Tokenising {len(data):,} rows …")
                prepared[name], reports = prepare_all(data, tokenizer, seed=args.seed, name=name, **how, **more)
                for report in reports:
                    console.print(report.render(), soft_wrap=not console.is_terminal, markup=False)
    if not args.gpu_memory:
        for name, result in prepared.items():
            check_budget(result, args.max_tokens_per_pack, args.prefix_sharing is not False, name)
    histogram(console, prepared["train"], args.max_length)
    train = raw["train"]
    parts = (
        [(part.name, data, part) for part, data in train.parts] if isinstance(train, Mixture) else [("", train, None)]
    )
    _show(console, parts, prepared["train"], tokenizer, options, how)
    if out is not None:
        _write(console, out, prepared, tokenizer)
    return 0


def _unneeded(settings: list[str]) -> list[str]:
    """The settings with what the data does not need: a folder for results, and no GPU where there is none."""
    import torch

    from ..settings.arguments import flags
    from ..settings.sources import read_argv, read_yaml

    path, line, _ = read_argv(settings, flags())
    given = (read_yaml(path) if path is not None else {}) | line
    more = [] if "output_dir" in given else ["--output_dir", "none"]
    if "use_cpu" not in given and not torch.cuda.is_available():
        more += ["--use_cpu", "true"]  # else transformers refuses bf16
    return [*settings, *more]


def histogram(console: Console, data: Any, limit: int | None) -> None:
    """Bars of prompt + longest completion, in tokens, at most `BINS` of them."""
    import numpy as np
    from rich.text import Text

    from ..data.prepare import totals

    sizes = totals(data)
    steps = (n * 10**power for power in range(9) for n in (1, 2, 5))
    step = next(step for step in steps if sizes.max() < step * BINS)
    counts = np.bincount(sizes // step)
    room = max(10, min(console.width, 100) - 40)
    shown = False
    console.print("\nprompt + longest completion, in tokens")
    for place, count in enumerate(counts):
        shown = shown or bool(count)
        if not shown:
            continue
        first, last = place * step, (place + 1) * step - 1
        bar = "█" * round(room * count / counts.max()) or ("▏" if count else "")
        mark = " ← max_length" if limit and first <= limit <= last else ""
        line = Text(f"  {first:>6,}–{last:<6,} {count:>9,} ")
        console.print(line + Text(bar, style="cyan") + Text(mark, style="dim"), soft_wrap=True)


def _show(console: Console, parts: list, prepared: Any, tokenizer: Any, options: argparse.Namespace, how: dict) -> None:
    """The rows that were asked for by number, else the first ones that are kept."""
    from dataclasses import asdict, replace

    from ..data.columns import RowSettings
    from ..data.preview import look

    total = sum(len(data) for _, data, _ in parts)
    if options.row is not None:
        numbers = options.row
    elif any("prompt_ids" in data.column_names for _, data, _ in parts):  # all of them were kept, before
        numbers = range(min(options.rows, total))
    else:  # a row may have given several examples
        numbers = list(dict.fromkeys(prepared["row"][:]))[: options.rows]
    for number in numbers:
        if number >= total:
            raise DataError(f"--row {number}: there are {total} rows, numbered from 0 to {total - 1}.")
        place = number
        at = 0
        while place >= len(parts[at][1]):
            place -= len(parts[at][1])
            at += 1
        name, data, part = parts[at]
        settings = how
        if part is not None and part.columns is not None:
            settings = how | {"rows": RowSettings.of(asdict(how["rows"]) | {"columns": part.columns})}
        for found in look(data, tokenizer, place, **settings):
            where = f"row {number}" + (f" ({name}, row {place})" if name else "")
            _example(console, replace(found, row=number), where, tokenizer, whole=options.row is not None)


def _example(console: Console, found: Look, where: str, tokenizer: Any, whole: bool) -> None:
    from rich.text import Text

    console.print()
    line = "─" * max(1, min(console.width, 120) - len(where) - 1)
    console.print(Text.assemble((where, "bold"), " ", (line, "dim")), soft_wrap=True)
    if found.dropped:
        console.print(Text(f"dropped: {found.dropped}", style="red"), soft_wrap=True)
    if not found.prompt:
        return
    told = f"prompt, {len(found.prompt):,} tokens, not trained"
    told += f"; {len(found.cut):,} cut from its start" if found.cut else ""
    console.print(Text(told, style="bold"))
    front, rest = found.prompt[: found.kept_front], found.prompt[found.kept_front :]
    text = _text(front, tokenizer, "cyan") + _text(found.cut, tokenizer, "strike dim red", "✂ ", " ✂")
    _block(console, text + _text(rest, tokenizer, "cyan"), whole)
    for side in found.sides:
        _side(console, found, side, tokenizer, whole)


def _side(console: Console, found: Look, side: Side, tokenizer: Any, whole: bool) -> None:
    from rich.text import Text

    from ..data.preview import pieces

    label = {None: "", True: " (desirable)", False: " (undesirable)"}[side.label]
    ends = tokenizer.eos_token_id in side.ids[-1:]
    told = f"{side.name}{label}, {len(side.ids):,} tokens, "
    told += "not trained, since it is dropped" if found.dropped else "trained"
    told += (
        f"; {len(side.cut):,} cut from its end, so it has no end of text"
        if side.cut
        else ""
        if ends
        else "; no end of text"
    )
    console.print(Text(told, style="bold"))
    before, after = (" ".join(pieces(ids, tokenizer)) for ids in (found.prompt[-3:], side.ids[:3]))
    boundary = Text.assemble(("boundary: ", "dim"), (before, "cyan"), (" ‖ ", "bold"), (after, "green"))
    console.print(boundary, soft_wrap=True)
    _block(
        console, _text(side.ids, tokenizer, "green") + _text(side.cut, tokenizer, "strike dim red", "✂ ", " ✂"), whole
    )


def _text(ids: list[int], tokenizer: Any, style: str, before: str = "", after: str = "") -> Text:
    """Ids in `style`, special tokens reversed; `before` and `after` stand around them, so that a cut shows without colour."""
    from rich.text import Text

    from ..data.preview import spans

    text = Text()
    if ids:
        text.append(before)
        for part, special in spans(ids, tokenizer):
            text.append(part, style=f"{style} reverse" if special else style)
        text.append(after)
    return text


def _block(console: Console, text: Text, whole: bool) -> None:
    """Text behind a bar, wrapped; a long one without its middle unless it is asked for `whole`."""
    from rich.text import Text

    if not whole and len(text) > SHOWN + 100:
        left = len(text) - SHOWN
        text = text[: SHOWN // 2] + Text(f"\n[… {left:,} characters …]\n", style="dim") + text[len(text) - SHOWN // 2 :]
    text.expand_tabs(4)
    for line in text.split("\n", allow_blank=True):
        for piece in line.wrap(console, max(20, min(console.width, 120) - 2), no_wrap=False) or [line]:
            console.print(Text.assemble(("│ ", "dim"), piece), soft_wrap=True)


def _out(given: str | None, overwrite: bool) -> Path | None:
    """Where the prepared data goes. Raises `ConfigError` where something else lies there."""
    if given is None:
        return None
    out = Path(given).expanduser()
    ours = any((out / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    if out.exists() and not (ours and overwrite) and not (out.is_dir() and not any(out.iterdir())):
        advice = "give --overwrite to replace it" if ours else "name a new folder"
        raise ConfigError(f"--out {given!r} exists; {advice}.")
    return out


def _write(console: Console, out: Path, prepared: dict[str, Any], tokenizer: Any) -> None:
    """The prepared splits in one folder, written aside and moved into place."""
    from datasets import DatasetDict

    from ..data.prepare import made_with

    aside = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        DatasetDict({name: made_with(data, tokenizer) for name, data in prepared.items()}).save_to_disk(aside)
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written ({error}); name another folder.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    console.print(f"\nPrepared data: {out}. Train on it with  dataset_name: {out}", soft_wrap=True)
    if "eval" in prepared:
        console.print("  and  eval_dataset_split: eval", soft_wrap=True)
