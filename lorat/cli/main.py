"""The `lorat` command: finds the command's file, parses its options, runs it, and turns errors into an exit status.

A command is a file of this folder with `add_arguments(parser)` and `run(options)`, which returns the exit status; it is
listed in `COMMANDS`. One that takes the settings of a run as `--key value` sets the default `settings`: what argparse
does not know is kept there, for `lorat.settings` to read.

Every error that a person can cause is printed as a few plain lines, without a traceback, and exits with 2.
A run stopped by a signal saves a checkpoint and exits with 128 + the signal's number, as shells expect.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from ..errors import LoratError
from .terminal import quieten, say_error

COMMANDS = {  # the file's name: what it does, and how it is called
    "train": ("fine-tune on preference data", "--config run.yaml [--key value …]"),
    "data": ("what a run would train on", "--config run.yaml [--rows 3] [--row 17] [--out DIR]"),
    "plan": ("will it fit, and with what settings", "--config run.yaml [--gpu-memory 12GiB]"),
    "demo": ("a small run, to look at", "[--out DIR]"),
    "merge": ("fold an adapter into its base", "RUN --out DIR [--base original|dequantized]"),
    "eval": ("rewards, calibration, KL, diversity", "RUN --data PAIRS [--samples N] [--out FILE]"),
    "generate": ("answer a file of prompts", "RUN --prompts FILE --out FILE [--adapter policy|…]"),
    "judge": ("compare two sets of answers", "A.jsonl B.jsonl --model NAME [--base-url URL]"),
    "report": ("one HTML file about runs", "RUN [RUN …] --out report.html"),
}


def usage() -> str:
    lines = (f"  {name:<9} {what:<36} lorat {name} {how}\n" for name, (what, how) in COMMANDS.items())
    more = "`lorat <command> --help` says more. `lorat --version` prints the version.\n"
    return f"usage: lorat <command> [options]\n\n{''.join(lines)}\n{more}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        print(f"lorat {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"lorat: {argv[0]!r} is not a command.\n\n{usage()}", file=sys.stderr, end="")
        return 2
    if not {"-h", "--help"} & set(argv):  # the libraries take seconds to import
        quieten()
    try:
        command = import_module(f".{argv[0]}", __package__)
        return command.run(parse(command, argv[0], argv[1:]))
    except LoratError as error:
        say_error(str(error))
        return 2
    except SystemExit as ended:  # argparse, after --help and where options are wrong
        return int(ended.code or 0)
    except KeyboardInterrupt:
        say_error("interrupted; checkpoints that were saved before are whole.")
        return 130
    except BrokenPipeError:  # `lorat train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(command: object, name: str, argv: list[str]) -> argparse.Namespace:
    """The options of a command (a module); exits, as argparse does, after `--help` and for options that are wrong."""
    parser = argparse.ArgumentParser(prog=f"lorat {name}", allow_abbrev=False)
    command.add_arguments(parser)  # type: ignore[attr-defined]
    options, unknown = parser.parse_known_args(argv)
    if "settings" in options:
        options.settings = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options
