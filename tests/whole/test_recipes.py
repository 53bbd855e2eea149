"""Every recipe parses, and is what its header, its name and the README of its folder say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.step import models
from lorat.plan.memory import STEP, Planner
from lorat.settings.arguments import parse_config
from lorat.settings.sources import read_yaml

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def parse(path: Path, *more: str):
    assert read_yaml(str(path))["bf16"].value == "true"
    notes: list[str] = []
    config = parse_config(["--config", str(path), "--use_cpu", "--bf16", "false", *more], notes.append)
    return config, notes


def test_four_runs():
    readme = (FOLDER / "README.md").read_text()
    assert len(RECIPES) == 4 and all(f"`{p.stem}`" in readme for p in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path):
    config, notes = parse(path)
    text = path.read_text()
    assert notes == []  # lorat's own names, nothing left out
    assert "Status: not yet run" in text and "24, 16, 12 or 8 GB" in text and "not been held" in text
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert (config.lora_r, config.lora_alpha, config.max_length) == (16, 32, 1024)
    assert config.load_in_4bit and config.save_total_limit == 2 and config.checkpointing
    assert (config.gpu_memory, config.optim, config.quantize_embeddings) == ("auto", "paged_adamw_8bit", "8bit")
    assert (config.method, config.beta, config.num_train_epochs, config.max_grad_norm) == ("dpo", 0.05, 1, 2)
    assert config.output_dir == f"runs/{path.stem}"


SHAPES = {"pythia": "pythia-6.9b", "llama": "llama-3-8b", "qwen2.5": "qwen2.5-7b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_packs_of_the_readme_fit_by_the_plan_and_larger_ones_do_not(path):
    """The smallest card, where it is tightest: the README's number of tokens fits 7.5 GiB, one step more does not."""
    config, _ = parse(path)
    config.bf16 = True
    shape = SHAPES[path.stem.partition("-")[0]]
    name = {"pythia": "Pythia 6.9B", "llama": "Llama 3 8B", "qwen2.5": "Qwen2.5 7B"}[path.stem.partition("-")[0]]
    row = re.search(rf"\| {name} \| ([\d,]+) \|", (FOLDER / "README.md").read_text())
    tokens = int(row[1].replace(",", ""))
    planner = Planner(config.workload(), models.configuration(models.SHAPES[shape]), capability=(8, 9))
    available = int(7.5 * 2**30)
    assert tokens >= 2 * config.max_length - 1  # room for one pair
    assert planner.at(tokens, available=available).fits
    assert not planner.at(tokens + STEP, available=available).fits


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_reference_binds_and_moves_as_the_header_says(path):
    config, _ = parse(path)
    rule, text = config.update_rule(), path.read_text()
    assert config.sync == "soft" and 50 <= config.beta * rule.lag <= 300
    said = re.search(r"about ([\d,]+) pairs / 64 = ([\d,]+) optimiser steps, in which the reference moves (\d+)", text)
    pairs, steps, moves = (int(x.replace(",", "")) for x in said.groups())
    assert steps == -(-pairs // 64) and moves == rule.planned_updates(steps) >= 10
    lag, product = re.search(r"beta \* lag = (\d+) \(lag ([\d,]+) ", text).group(2, 1)
    assert int(product) == int(config.beta * rule.lag) and int(lag.replace(",", "")) == int(rule.lag)


def test_ends_of_runs_are_as_the_readme_says():
    """Age of the reference and weight of the start at the end of one epoch, by stepping through it."""
    for steps, age, start in ((1451, 870, 0.32), (2513, 1070, 0.14), (956, 680, 0.49)):
        reached, weight = 0.0, 1.0
        for step in range(1, steps + 1):
            reached += 1
            if step % 64 == 0:
                reached, weight = 0.95 * reached, 0.95 * weight
        assert reached == pytest.approx(age, abs=5) and weight == pytest.approx(start, abs=0.005)


def test_static_baseline_takes_one_flag():
    config, notes = parse(RECIPES[0], "--sync", "frozen", "--output_dir", "runs/baseline")
    assert not config.update_rule().moves and config.output_dir == "runs/baseline"
    assert len(notes) == 2 and "sync_alpha: 0.05" in notes[0] and "sync_every: 64" in notes[1]
