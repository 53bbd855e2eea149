"""What the commands say on a terminal: errors, bars, how to go on; and what the libraries below do not say."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def terminal() -> Console:
    """Standard output, without rich's colours for numbers and paths."""
    from rich.console import Console

    return Console(highlight=False)


def say_error(text: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}lorat: error:{plain} {text}", file=sys.stderr)


QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
}


def quieten() -> None:
    """Keep the libraries' own bars and notices out of the way; what lorat has to say goes to stderr.

    They read the environment when they are imported, so that none has to be imported for it; what a person set stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="lorat: %(message)s", stream=sys.stderr)
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for lorat's developers, who run the tests
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def out_of_memory(error: BaseException) -> str:
    """`out of GPU memory (what torch says in its first line)`."""
    return f"out of GPU memory ({str(error).splitlines()[0]})"


@contextmanager
def going_on() -> Iterator[None]:
    """Say how to go on after Ctrl-C, and what to set where the GPU's memory does not do."""
    import torch

    try:
        yield
    except KeyboardInterrupt:
        print("\nStopped. What was finished is kept; run the same command again to go on.", file=sys.stderr)
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"{out_of_memory(error)}. Lower --batch-size, --max-new-tokens or --max-tokens-per-pack, and give "
            "--overwrite once, since what was finished belongs to the old ones."
        ) from error


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Inside, `progress(what, total)` opens a bar on stderr (else a line) and gives what moves it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left")
    shown = [TextColumn(c) if isinstance(c, str) else c for c in columns]
    console = Console(stderr=True)
    plain = not console.is_terminal
    with Progress(*shown, TimeRemainingColumn(), console=console, transient=True, disable=plain) as bars:

        def opened(what: str, total: int) -> Callable[[int], None]:
            if plain:
                console.print(f"{what}: {total:,} …", soft_wrap=True, highlight=False)
            task = bars.add_task(what, total=total)
            return lambda n: bars.update(task, advance=n)

        yield opened
