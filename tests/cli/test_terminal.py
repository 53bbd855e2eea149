"""What the command does before it works: it answers at once, and keeps the libraries below quiet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.worlds import ROOT

LIGHT = """
import json, sys
from lorat.cli.main import main
status = main({argv})
heavy = [m for m in ("torch", "transformers", "datasets", "peft") if m in sys.modules]
print("\\n" + json.dumps([status, heavy]))
"""
QUIET = """
from lorat.cli.terminal import quieten
quieten()
import json
import datasets, huggingface_hub.utils
from transformers.utils import logging
print(json.dumps([datasets.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled(),
    logging.is_progress_bar_enabled(), datasets.logging.get_verbosity(), logging.get_verbosity()]))
"""


def run(code: str):
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("argv", "status"), [(["train", "--help"], 0), (["train", "--betta", "0.1"], 2), (["trian"], 2), (["--version"], 0)]
)
def test_help_and_typos_wait_for_no_library(argv, status):
    assert run(LIGHT.format(argv=argv)) == [status, []]


def test_libraries_that_are_imported_later_are_quiet():
    assert run(QUIET) == [True, True, False, 40, 40]  # logging.ERROR
