"""The language study at toy size: its runs are lorat's own training runs, and what it says of them is by hand."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.studies import language
from benchmarks.studies.language_runs import Job, Recipe, config_of, make_world, measure, run
from benchmarks.studies.study import FROZEN, adaptive, hard, soft
from lorat.demo import toy
from lorat.errors import CheckpointError
from lorat.model.base import load_base
from lorat.reference import Soft

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(steps=8, batch=4, few=8, lr=0.01, sft_steps=5, samples=72, checkpoints=(4, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("world")
    make_world(RECIPE, place, 3)
    return place


@pytest.mark.parametrize(
    ("reference", "rule"),
    [
        (FROZEN, (0.0, None, None)),
        (soft(0.3, 5), (0.3, 5, None)),
        (hard(7), (1.0, 7, None)),
        (adaptive(0.2), (1.0, 1, 0.2)),
    ],
)
def test_a_job_is_a_configuration_of_lorat(tmp_path, reference, rule):
    for method, batch in (("dpo", 4), ("kto", 8)):  # pairs; completions
        config = config_of(RECIPE, tmp_path, Job(5, "few", method, 0.7, reference))
        made = config.update_rule()
        assert (made.alpha, made.every if made.moves else None, made.drift_limit) == rule
        assert (config.method, config.beta, config.seed, config.max_steps) == (method, 0.7, 5, 8)
        assert config.per_device_train_batch_size == batch and config.load_in_4bit and config.learning_rate == 0.01


def test_a_world_is_made_once_and_measured_by_its_own_reward(folder):
    found = json.loads((folder / "world.json").read_text())
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 8 * 4
    wrong = [toy.gold_reward(p["prompt"], p["chosen"]) < toy.gold_reward(p["prompt"], p["rejected"]) for p in pairs]
    assert found["labels against gold"] == sum(wrong) / 32
    base, tokenizer = load_base(config_of(RECIPE, folder).base()), toy.make_tokenizer()
    said = toy.sample(base, tokenizer, list(toy.PROMPTS), seed=3 + 3)
    assert found["gold"] == pytest.approx(sum(map(toy.gold_reward, toy.PROMPTS, said)) / 72)
    assert found["ood"] == sum(not toy.grammatical(text) for text in said) / 72
    itself = measure(base, contextlib.nullcontext, tokenizer, 72, 3)
    assert itself == {**{k: found[k] for k in ("gold", "ood")}, "kl": 0.0}
    stamp = (folder / "pairs.jsonl").stat().st_mtime_ns
    assert make_world(RECIPE, folder, 3) == found and (folder / "pairs.jsonl").stat().st_mtime_ns == stamp


def test_a_run_is_the_same_again_and_its_reference_has_the_age_of_its_rule(folder):
    job = Job(3, "fresh", "dpo", 0.5, hard(4))
    first, again = run(RECIPE, folder, job), run(RECIPE, folder, job)
    assert first == again
    assert first["lag"] == (1 + 2 + 3 + 0) / 4 and first["moves"] == 2
    assert [len(first[k]) for k in ("gold", "kl", "ood")] == [3, 3, 3]  # the start and two checkpoints
    assert first["kl"][0] == 0 < first["kl"][2]
    still = run(RECIPE, folder, Job(3, "fresh", "dpo", 0.5, FROZEN))
    assert (still["lag"], still["moves"]) == (4.5, 0)
    assert still["kl"][1] == first["kl"][1] and still["kl"][2] != first["kl"][2]  # the same until the reference moves
    age, ages = 0.0, []
    for _ in range(8):
        age = (age + 1) * 0.4
        ages.append(age)
    softly = run(RECIPE, folder, Job(3, "few", "kto", 0.5, soft(0.6)))
    assert softly["lag"] == pytest.approx(sum(ages) / 8) and softly["moves"] == pytest.approx(8 * 0.6)
    assert ages[-1] == pytest.approx(Soft(0.6).lag, rel=0.01)


def test_the_command_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "benchmarks.studies.language", "--toy", "--regimes", "few", "--workers", "1"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    kept, found = tmp_path / "work" / "runs.jsonl", []
    for trained in ("[8/8]", "[3/3]"):  # two worlds, four settings
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        assert trained in done.stdout and done.stdout.count("few dpo β=") == int(trained[1])
        whole = json.loads((tmp_path / "out.json").read_text())
        assert json.loads(done.stdout.splitlines()[-1])["results"] == whole["results"]
        found.append((whole["results"], whole["runs"]))
        lines = kept.read_text().splitlines()
        assert len(lines) == 1 + 8  # the recipe, and the runs
        kept.write_text("\n".join(lines[:6]) + "\n" + lines[6][:40])  # as if it had been killed there
    assert found[0] == found[1]
    assert set(found[0][0]) == {"sft", "few dpo"} and len(found[0][1]) == 4
    assert (tmp_path / "out.png").stat().st_size > 10_000
    other = language.Study(**language.TOY | {"recipe": replace(RECIPE, lr=0.02)})
    with pytest.raises(CheckpointError, match="lr: 0.01 then, 0.02 now"):
        language.train_all(other, tmp_path / "work", 1)
