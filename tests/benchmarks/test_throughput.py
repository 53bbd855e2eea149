"""The benchmark against TRL: it runs at toy size, counts tokens as arithmetic does, and refuses sides that differ."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from benchmarks.step import models, throughput, workloads

ROOT = Path(__file__).parents[2]
SMALL = {"type": "gpt_neox", "layers": 2, "hidden": 64, "heads": 2, "vocab": 128}


def document(code, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.step.throughput", "--toy", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["command"].startswith("python -m benchmarks.step.throughput --toy") and found["commit"]
    assert found["versions"]["trl"].startswith("1.") and any("_use_triton" in change for change in found["trl_changes"])
    return found, done.stdout


def test_at_toy_size_both_sides_learn_the_same_and_count_the_same(tmp_path):
    out = tmp_path / "results" / "throughput.json"
    found, text = document(0, "--out", str(out))
    assert json.loads(out.read_text()) == found and "TRL tokens" in text
    assert [(row["workload"], row["method"], row["pairs"]) for row in found["rows"]] == [
        ("tldr", "dpo", 2),
        ("tldr", "kto", 2),
    ]
    settings = found["settings"]
    pairs = workloads.synthetic("tldr", 6, 0, settings["vocab"], settings["max_length"], throughput.SHRINK)
    timed = [[{k: len(v) for k, v in pair.items()} for pair in pairs[i : i + 2]] for i in (2, 4)]  # 1 step warms up
    for row in found["rows"]:
        assert row["losses"]["agree"] and row["losses"]["largest_relative_difference"] < 1e-5
        assert len(row["losses"]["trl"]) == len(row["losses"]["lorat"]) == 3
        assert row["ratio"]["throughput"] > 0 and row["ratio"]["by_step"]["n"] == 2
        for side in (row["trl"], row["lorat"]):
            assert side["samples_per_second"] == pytest.approx(2 / side["seconds_per_step"]["median"], rel=1e-6)
            assert 0 < side["memory_mb"]["base"] <= side["memory_mb"]["peak"]
    dpo, kto = found["rows"]
    padded = [4 * max(p["prompt_ids"] + max(p["chosen_ids"], p["rejected_ids"]) for p in batch) for batch in timed]
    unique = [sum(sum(p.values()) for p in batch) for batch in timed]
    assert dpo["tokens_per_pass"]["padded"] == statistics.mean(padded)
    assert dpo["tokens_per_pass"]["unique"] == statistics.mean(unique)
    assert dpo["trl"]["tokens_per_step"] == {
        "gradient": statistics.mean(padded),
        "no_gradient": statistics.mean(padded),
    }
    assert statistics.mean(unique) <= dpo["lorat"]["tokens_per_step"]["gradient"] <= statistics.mean(padded)
    assert dpo["lorat"]["tokens_per_step"]["gradient"] == dpo["lorat"]["tokens_per_step"]["no_gradient"]
    total = {name: sum(kto[name]["tokens_per_step"].values()) for name in ("trl", "lorat")}
    assert total["trl"] == 2 * kto["tokens_per_pass"]["padded"]
    assert 2 * kto["tokens_per_pass"]["unique"] <= total["lorat"] <= total["trl"]


def test_no_ratio_where_the_losses_differ():
    found, text = document(1, "--methods", "dpo", "--lorat-beta", "0.11", "--steps", "1")
    (row,) = found["rows"]
    assert row["ratio"] is None and not row["losses"]["agree"]
    assert row["losses"]["first_difference"]["step"] == 1 and "first at step 1: TRL 0." in text


def test_trl_refuses_kto_with_one_completion():
    settings = throughput.chosen_settings(["--toy", "--device", "cpu"])
    del settings["data"], settings["out"]
    examples = workloads.for_method(workloads.synthetic("tldr", 1, 0, 128, 128, 8), "kto")
    case = settings | {"side": "trl", "method": "kto", "pairs": 1, "checkpointing": False, "shape": SMALL}
    assert "batch size must be > 1" in throughput.run(case | {"examples": examples})["refused"]


def test_a_loss_that_differs_is_found_at_its_step():
    same = throughput.compare([0.7, 0.6], [0.70001, 0.6], 1e-4)
    assert same["agree"] and same["first_difference"] is None
    other = throughput.compare([0.7, 0.6, 0.5], [0.7, 0.601, 0.4], 1e-4)
    assert not other["agree"] and other["first_difference"] == {"step": 2, "trl": 0.6, "lorat": 0.601}
    assert not throughput.compare([0.7], [float("nan")], 1e-4)["agree"]
    assert not throughput.compare([0.7, 0.6], [0.7], 1e-4)["agree"]


def test_tokens_counted_by_hand():
    batch = [
        {"prompt_ids": [2] * 10, "chosen_ids": [3] * 2, "rejected_ids": [4] * 5},
        {"prompt_ids": [2] * 4, "chosen_ids": [3] * 3, "rejected_ids": [4] * 1},
    ]
    assert workloads.count(batch, "dpo") == {"completion": 11, "unique": 25, "rows": 39, "padded": 4 * 15}
    kto = workloads.for_method(batch, "kto")  # 10 + 2, 4 + 1; mismatched 10 + 1, 4 + 2
    assert [row["label"] for row in kto] == [True, False]
    assert workloads.count(kto, "kto") == {"completion": 6, "unique": 20, "rows": 34, "padded": 2 * 12 + 2 * 11}
    assert workloads.count(kto[:1], "kto") == {"completion": 2, "unique": 12, "rows": 12, "padded": 12}  # no z0


@pytest.mark.parametrize(
    ("name", "prompt", "completion"), [("tldr", 300, 35), ("hh", 90, 36), ("ultrafeedback", 170, 300)]
)
def test_lengths_are_as_documented(name, prompt, completion):
    pairs = workloads.synthetic(name, 2000, 0, 100, 1024)
    assert pairs[:5] == workloads.synthetic(name, 5, 0, 100, 1024) != workloads.synthetic(name, 5, 1, 100, 1024)
    found = [[len(pair[k]) for pair in pairs] for k in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert statistics.mean(found[0]) == pytest.approx(prompt, rel=0.1)
    assert statistics.mean(found[1] + found[2]) == pytest.approx(completion, rel=0.1)
    assert max(p + max(c, r) for p, c, r in zip(*found)) <= 1024


def test_real_pairs_keep_their_lengths(real_hh, real_pythia_tokenizer):
    drawn, source = workloads.draw("hh", 4, 0, 128, 1024, 1, real_hh.parents[1])
    assert source == "real" and all(len(pair) == 3 and all(pair.values()) for pair in drawn)
    assert max(t for pair in drawn for ids in pair.values() for t in ids) < 128
    assert workloads.draw("hh", 4, 0, 128, 1024, 1, real_hh)[1] == "synthetic"  # no such folders there


BILLIONS = {"pythia-1.4b": 1.4146, "pythia-2.8b": 2.7752, "pythia-6.9b": 6.8573} | {
    "llama-3-8b": 8.0303,
    "qwen2.5-7b": 7.6156,
}


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_shapes_have_the_parameters_of_the_real_models(name, billions):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(models.configuration(models.SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-4)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_model_from_a_shape_is_whole_and_the_same_each_time(load_in_4bit):
    made = [models.build(SMALL, torch.device("cpu"), torch.float32, load_in_4bit) for _ in range(2)]
    ids = torch.arange(8)[None]
    one, two = (model(input_ids=ids).logits for model in made)
    assert torch.isfinite(one).all() and one.std() > 0.05 and torch.equal(one, two)
    kinds = {type(m).__name__ for m in made[0].gpt_neox.layers.modules()}
    assert ("Linear4bit" in kinds) == load_in_4bit and type(made[0].get_output_embeddings()).__name__ == "Linear"
    assert not any(p.requires_grad or p.is_meta for p in made[0].parameters())


def test_amounts_of_memory():
    assert throughput.bytes_of("24GiB") == 24 * 2**30 and throughput.bytes_of("8 GB") == 8e9
    with pytest.raises(Exception, match="no amount of memory"):
        throughput.bytes_of("much")
