"""The memory benchmark at toy size: every part runs, and its own arithmetic holds."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.step import loading, memory, models
from lorat.model.base import load_base, reading_in_turn
from lorat.settings.config import TrustRegionConfig

ROOT = Path(__file__).parents[2]


def test_at_toy_size_every_part_runs(tmp_path):
    out = tmp_path / "results" / "memory.json"
    command = [sys.executable, "-m", "benchmarks.step.memory", "--toy", "--device", "cpu", "--checkpointing", "on"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == found and "Peak memory" in done.stdout
    (row,) = found["step"]
    for side in ("lorat", "trl"):
        assert 0 < row[side]["memory_mb"]["base"] < row[side]["memory_mb"]["peak"]
    items = row["predicted"]["items_mb"]
    assert sum(items.values()) == pytest.approx(row["predicted"]["total_mb"])
    assert items["4-bit weights"] == 2 * 12 * 64**2 / 2 / 1e6
    assert "error_percent" not in row  # a GPU's prediction is not compared with a CPU's memory
    assert found["long"]["finished"] and found["long"]["steps"] == 3
    load = found["load"]
    numbers = 2 * (12 * 64**2 + 64 * 13) + 2 * 64 + 2 * 512 * 64  # matrices, biases and norms of 2 layers; the ends
    assert load["checkpoint"]["mb"] == pytest.approx(2 * numbers / 1e6, rel=0.05) and load["checkpoint"]["shards"] > 1
    assert load["grown_mb"]["RssAnon"] == pytest.approx(load["over_quantised"]["RssAnon"] * load["quantised_mb"])
    assert load["peak_mb"]["VmRSS"] >= load["after_mb"]["VmRSS"] > 0


@pytest.mark.parametrize("tokens", [128, 1024, 2048])
def test_a_step_is_one_pack_of_exactly_so_many_tokens(tokens):
    made = memory.examples(tokens, 512, 3)
    per_step = [made[i : i + len(made) // 3] for i in range(0, len(made), len(made) // 3)]
    sizes = [sum(len(v) for e in step for k, v in e.items() if k != "row") for step in per_step]
    assert sizes == [tokens] * 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are listed on Linux only")
def test_a_checkpoint_is_not_mapped_while_it_is_loaded_in_4bit(tmp_path, monkeypatch):
    """What is mapped stays resident: with the shards of a 16-bit base that is more than the base in 4-bit."""
    import bitsandbytes.functional as bnb
    from transformers import modeling_utils

    folder = tmp_path / "model"
    loading.save(memory.TOY, str(folder), "200KB")
    quantize, opened, seen = bnb.quantize_4bit, modeling_utils.safe_open, []

    def looking(*args, **kwargs):
        seen.append(str(folder) in Path("/proc/self/maps").read_text())
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bnb, "quantize_4bit", looking)
    load_base(
        TrustRegionConfig(output_dir=str(tmp_path), model_name_or_path=str(folder), use_cpu=True, bf16=False).base()
    )
    assert len(seen) == 8 and not any(seen)
    assert modeling_utils.safe_open is opened


def test_other_threads_open_files_as_ever(monkeypatch):
    from transformers import modeling_utils

    asked = []
    monkeypatch.setattr(modeling_utils, "safe_open", lambda *_, **how: asked.append(how["backend"]))
    with reading_in_turn():
        other = threading.Thread(target=lambda: modeling_utils.safe_open("file", backend="mmap"))
        other.start()
        other.join()
        modeling_utils.safe_open("file", backend="mmap")
    modeling_utils.safe_open("file", backend="mmap")
    assert asked == ["mmap", "pread", "mmap"]


def test_the_watch_sees_memory_that_comes_and_goes():
    with loading.Watch() as watch:
        before = loading.status()["RssAnon"]
        block = mmap.mmap(-1, 64_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # no hole of the heap serves it
        block.write(b"x" * 64_000_000)
        watch.most = {k: max(v, watch.most[k]) for k, v in loading.status().items()}
        del block
    assert 60 < watch.most["RssAnon"] - before < 200


def test_a_case_that_breaks_is_reported():
    found = memory.child({"device": "cpu", "side": "lorat", "shape": models.SHAPES["pythia-1.4b"]})
    assert "failed" in found
