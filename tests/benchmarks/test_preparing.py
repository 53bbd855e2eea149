"""The benchmark of preparing data, at toy size: both sides, both starts, the same rows."""

import json
import sys

import datasets

from benchmarks.data import preparing
from benchmarks.data.preparing import write_dialogues
from tests.helpers.worlds import make_tokenizer


def test_both_sides_at_toy_size(tmp_path, monkeypatch, capsys):
    """In this process: two imports of everything for each start would take longer than all else."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bars = not datasets.are_progress_bars_disabled()

    def here(side, folder, data, options):
        once = [str(data), options.tokenizer, options.processes]
        return {start: preparing.run_side(side, *once) for start in ("first", "second")}

    monkeypatch.setattr(preparing, "measure", here)
    out = tmp_path / "out.json"
    argv = ["preparing", "--tokenizer", str(tmp_path / "tokenizer"), "--rows", "40", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        assert preparing.main() == 0
    finally:
        if bars:
            datasets.enable_progress_bars()
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"] == 40 and "commit" in found and "--rows 40" in found["command"]
    for side in ("lorat", "trl"):
        for start in ("first", "second"):
            measured = found["results"][side][start]
            assert measured["rows"] == 40 and measured["seconds"] > 0 and measured["peak_mb"] >= measured["before_mb"]


def test_dialogues_share_their_prompt_and_differ_after_it(tmp_path):
    write_dialogues(tmp_path / "x.jsonl", 50, 3)
    write_dialogues(tmp_path / "y.jsonl", 50, 3)
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "y.jsonl").read_bytes()
    for line in (tmp_path / "x.jsonl").read_text().splitlines():
        pair = json.loads(line)
        chosen, rejected = (pair[side].rpartition("\n\nAssistant: ") for side in ("chosen", "rejected"))
        assert chosen[0] == rejected[0] and chosen[0].startswith("\n\nHuman: ") and chosen[2] != rejected[2]
