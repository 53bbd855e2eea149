"""Every recipe parses, and is what its header, its name and the README of its folder say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorat.arguments import parse_config
from lorat.sources import read_yaml

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
RANK = {"24": 32, "16": 16, "12": 16, "8": 8}
SAME_ON_EVERY_CARD = ["model_name_or_path", "dataset_name", "dataset_split", "eval_dataset_split", "beta", "method"]
SAME_ON_EVERY_CARD += ["learning_rate", "sync", "sync_alpha", "sync_every", "num_train_epochs", "warmup_steps"]


def parse(path: Path, *more: str):
    assert read_yaml(str(path))["bf16"].value == "true"
    notes: list[str] = []
    config = parse_config(["--config", str(path), "--use_cpu", "--bf16", "false", *more], notes.append)
    return config, notes


def test_four_runs_for_four_cards():
    names = {p.stem.rpartition("-")[0] for p in RECIPES}
    assert len(names) == 4
    assert {p.stem for p in RECIPES} == {f"{n}-{gb}gb" for n in names for gb in (24, 16, 12, 8)}
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{n}-24gb`" in readme for n in names)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path):
    config, notes = parse(path)
    text = path.read_text()
    card = path.stem.rpartition("-")[2].removesuffix("gb")
    assert notes == []  # lorat's own names, nothing left out
    assert "Status: not yet run" in text and f"card of {card} GB" in text and "not measured" in text
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert config.lora_r == RANK[card] and config.lora_alpha == 2 * config.lora_r
    assert config.max_tokens_per_pack >= 2 * config.max_length  # room for one pair
    assert config.load_in_4bit and config.save_total_limit == 2 and config.checkpointing
    assert (config.method, config.beta, config.num_train_epochs, config.max_grad_norm) == ("dpo", 0.05, 1, 2)
    assert config.output_dir == f"runs/{path.stem}"


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


def test_only_what_should_differ_by_card_does():
    for name in {p.stem.rpartition("-")[0] for p in RECIPES}:
        configs = [parse(p)[0] for p in RECIPES if p.stem.rpartition("-")[0] == name]
        for key in SAME_ON_EVERY_CARD:
            assert len({str(getattr(c, key)) for c in configs}) == 1, key


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
