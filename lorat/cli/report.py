"""`lorat report`: one HTML file about one or more runs."""

from __future__ import annotations

import argparse

from .options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "One self-contained HTML file about runs."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, finished or not")
    parser.add_argument("--out", default="report.html", help="the file to write (default: report.html)")
    parser.add_argument(
        "--samples",
        nargs="+",
        metavar="FILE",
        default=[],
        help="answers to show side by side, beside *samples*.jsonl in the runs",
    )
    parser.add_argument("--rows", type=positive, default=12, help="prompts to show (default: 12)")
    parser.add_argument("--title", help="the page's heading (default: the runs' names)")


def run(options: argparse.Namespace) -> int:
    from ..report.page import write_report

    path = write_report(options.runs, options.out, options.samples, options.rows, options.title)
    print(f"{path} ({path.stat().st_size / 1024:.0f} KiB) opens in any browser, without a network.")
    return 0
