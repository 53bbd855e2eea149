"""`make bench` at toy size: the parts run, their JSON is there, the tables are made from it and from nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.step.profile", "--toy", "--out", str(folder / "profile-cpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((folder / "profile-cpu.json").read_text())
    return folder


def test_a_profile_adds_up(results):
    """The floor by hand; kinds are sums of kernels; the pack is full and not beyond its tokens."""
    document = json.loads((results / "profile-cpu.json").read_text())
    (row,) = document["rows"]
    assert 0.7 * row["pack"] < row["tokens"] <= row["pack"] and row["pairs"] > 1
    parameters = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 4 * 64 * 64)  # two layers of qkv, dense and the feed-forward's two
    assert row["floor_operations"] == 8 * parameters * row["tokens"]
    assert {"matrix products", "attention", "log-probs"} <= row["ms_by_kind"].keys()
    assert row["matrix_unit_use"] == pytest.approx(
        row["floor_operations"] / row["seconds_per_step"]["median"] / row["product_rate"]
    )
    assert all(row["ms_by_kind"][k["kind"]] >= k["ms"] > 0 for k in row["kernels"])


def test_tables_come_from_results_alone(results, tmp_path):
    from benchmarks import tables

    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: profile -->\nby hand\n<!-- end -->\n<!-- table: throughput -->\n<!-- end -->\nafter\n"
    )
    assert tables.render(results, [page]) == ["profile", "throughput"]
    text = page.read_text()
    document = json.loads((results / "profile-cpu.json").read_text())
    assert "by hand" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert f"commit {document['commit']}" in text and "*Not measured yet.*" in text
    assert f"| {document['rows'][0]['matrix_unit_use']:.1%} |" in text
    tables.render(results, [page])
    assert page.read_text() == text  # again is the same


def test_a_throughput_table_says_when_there_is_no_ratio():
    from benchmarks import tables

    side = {
        "seconds_per_step": {"median": 2.0},
        "tokens_per_step": {"gradient": 10, "no_gradient": 10},
        "memory_mb": {"above": 5.0},
    }
    row = dict(workload="tldr", lengths="synthetic", method="kto", pairs=1, checkpointing=True, lorat=side, ratio=None)
    text = tables.throughput({"rows": [{**row, "trl": {"refused": "batch size"}}]})
    assert text.splitlines()[-1] == "| tldr (synthetic), kto, 1 a step | refused | 2.00 | - | - | 20 | - | 5 |"


def test_a_table_takes_its_own_files_and_not_those_of_a_longer_name(tmp_path):
    from benchmarks import tables

    mb = {"VmRSS": 3221.225472, "RssFile": 536.870912}  # 3 GiB and half a GiB
    load = {"checkpoint": {"shards": 4, "mb": 4294.967296}, "quantised_mb": 2147.483648, "peak_mb": mb, "grown_mb": mb}
    about = {"command": "c", "commit": "f00", "device": {"name": "CPU"}, "versions": {}, "step": [], "long": None}
    (tmp_path / "memory-load-cpu.json").write_text(json.dumps(about | {"load": load}))
    assert tables.table("memory", tmp_path) == "*Not measured yet.*"
    text = tables.table("memory-load", tmp_path)
    assert "| checkpoint in bf16, 4 files | 4.00 |  |" in text and "| the model in 4-bit | 2.00 | 1.00 |" in text
    assert "| grown while loading | 3.00 | 1.50 |" in text and "| of it mapped files | 0.50 | 0.25 |" in text
    assert "commit f00" in text
