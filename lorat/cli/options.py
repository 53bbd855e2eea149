"""Options that several commands take, and what they mean: a run and how it is loaded, where a result goes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ..data.columns import RowSettings
    from ..measure.lineup import Lineup
    from ..runs.folder import Found


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, and a group of options about how it is loaded and the work divided."""
    run = "output folder or checkpoint of a run, or any PEFT LoRA adapter (folder or hub id)"
    parser.add_argument("run", metavar="RUN", help=run)
    add = parser.add_argument_group("the run, and how the work is divided").add_argument
    add(
        "--overwrite", action="store_true", help="replace an earlier result, and drop unfinished work of other settings"
    )
    add(
        "--batch-size", type=int, default=16, help="completions sampled at once (default: 16): decides memory and speed"
    )
    add("--seed", type=int, default=0, help="decides every sample (default: 0)")
    add("--reference", metavar="ADAPTER", help="the reference, if it is not saved with the run")
    add("--start", metavar="ADAPTER", help="the policy training began from, if it is not saved with the run")
    add("--base-model", help="where the base lies now, if not where it lay in training")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="computing type, if not that of training")
    add("--no-4bit", action="store_true", help="load the base without quantising it")
    add("--cpu", action="store_true", help="use no GPU")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the base")


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """The options about how rows are read, where they are not read as in training."""
    help = "which column is which, if not as in training: prompt=question,chosen=good …"
    parser.add_argument("--columns", type=_mapping, metavar="PART=COLUMN,…", help=help)
    help = "texts as messages (chat), or messages as Human:/Assistant: text (text), if not as in training"
    parser.add_argument("--dialogues", choices=("chat", "text"), help=help)


def _mapping(text: str) -> dict[str, str | None]:
    from ..settings.sources import mapping

    try:
        return mapping(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}") from error


def row_settings(o: argparse.Namespace, settings: Mapping[str, Any]) -> RowSettings:
    """How rows are read: as the options say, else as in training."""
    from ..data.columns import RowSettings

    given = {key: value for key, value in (("columns", o.columns), ("dialogues", o.dialogues)) if value is not None}
    return RowSettings.of({**settings, **given})


def result_path(given: str | None, default: Path | None, overwrite: bool) -> Path:
    """Where the result goes; raises `CheckpointError` where something lies there."""
    path = Path(given) if given else default
    if path is None:
        raise ConfigError("RUN is no local folder, so the result has no place there; name a file with --out.")
    if path.is_dir():
        raise ConfigError(f"--out {str(path)!r} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{str(path)!r} exists; name another file with --out, or give --overwrite to replace it.")
    return path


def lineup_of(found: Found, o: argparse.Namespace) -> Lineup:
    """The run's models on their base, as the options say."""
    from rich.console import Console

    from ..measure.lineup import load

    kwargs: dict[str, Any] = {k: getattr(o, k) for k in ("base_model", "dtype", "cpu", "trust_remote_code")}
    console = Console(stderr=True)
    with console.status("Loading the base and its adapters …") if console.is_terminal else nullcontext():
        return load(found, in_4bit=False if o.no_4bit else None, **kwargs)


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse takes types."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
