"""Two processes (torchrun, gloo) are one process at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import two_ranks
from tests.helpers.worlds import ROOT

NUMBERS = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl")
REFERENCE = (
    "reference/updates",
    "reference/lag",
    "reference/distance",
    "reference/drift",
    "reference/bind",
    "start/distance",
    "num_tokens",
    "learning_rate",
)


def torchrun(what: str, model: str, out: Path, changes: dict) -> list[dict]:
    """What each of two ranks ended with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += ["-m", "tests.helpers.two_ranks", what, model, str(out), "2", json.dumps(changes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(out / f"rank-{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_two_ranks_take_the_steps_of_one(neox, tmp_path, method):
    """19 examples do not divide by 2 ranks: what accelerate repeats to fill the last batch must count for nothing."""
    changes = {"method": method, "learning_rate": 1e-3, "max_tokens_per_pack": 60}  # several packs a batch
    ranks = torchrun("run", neox, tmp_path / "two", changes)
    for kind in ("policy", "reference"):
        for name, tensor in ranks[0][kind].items():
            assert torch.equal(tensor, ranks[1][kind][name]), (kind, name)
    assert ranks[0]["rule"] == ranks[1]["rule"]

    one = two_ranks.results(*two_ranks.run(neox, str(tmp_path / "one"), 4, **changes))
    assert len(one["history"]) == len(ranks[0]["history"]) == 6
    for mine, theirs in zip(one["history"], ranks[0]["history"]):
        for name in (*NUMBERS, *REFERENCE):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=2e-4, abs=2e-5), (name, mine["step"])
    assert any(abs(h["rewards/margins"]) > 0.01 for h in one["history"])
    for name, tensor in one["policy"].items():
        # Adam divides by |g|, so an element whose gradient is next to nothing turns rounding into a share of a step
        apart = ranks[0]["policy"][name] - tensor
        assert apart.norm() < 1e-4 * tensor.norm() and apart.abs().max() < 0.1 * 1e-3, name
    for name in one["reference"]:
        if "lora_A" in name:  # what the reference does; its factors are those of a decomposition
            mine, theirs = (
                r["reference"][name.replace("lora_A", "lora_B")] @ r["reference"][name] for r in (one, ranks[0])
            )
            assert (mine - theirs).norm() < 1e-4 * mine.norm(), name
    for name, value in one["metrics"].items():
        if name == "eval_loss" or "/" in name:
            if method == "kto" and name != "eval_logps/chosen":
                continue  # KTO's z0 at evaluation is that of a batch, and two ranks make another batch
            assert ranks[0]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert Path(tmp_path / "two" / "lorat_run.json").is_file()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_two_ranks_decide_as_one_when_to_move(neox, tmp_path, method):
    """The drift is that of all ranks: the same adaptive decisions on both, and in one process."""
    changes = {"method": method, "learning_rate": 3e-3, "sync": "adaptive", "sync_limit": 0.02, "sync_every": 1}
    changes |= {"sync_alpha": 0.7, "logging_steps": 1}
    ranks = torchrun("run", neox, tmp_path / "two", changes)
    assert ranks[0]["rule"] == ranks[1]["rule"]
    for name, tensor in ranks[0]["reference"].items():
        assert torch.equal(tensor, ranks[1]["reference"][name]), name
    one = two_ranks.results(*two_ranks.run(neox, str(tmp_path / "one"), 4, **changes))
    journals = [(tmp_path / run / "reference.jsonl").read_text().splitlines() for run in ("one", "two")]
    mine, theirs = ([json.loads(line) for line in lines] for lines in journals)
    decided = lambda lines: [(x["step"], x["moved"], x["reason"]) for x in lines]  # noqa: E731
    assert decided(mine) == decided(theirs) and {x["moved"] for x in mine} == {True, False}
    assert [x["drift"] for x in theirs] == pytest.approx([x["drift"] for x in mine], rel=1e-3)
    assert one["rule"]["updates"] == ranks[0]["rule"]["updates"] > 0


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_two_ranks_resume_exactly_in_mid_epoch(neox, tmp_path, method):
    for rank in torchrun("resumed", neox, tmp_path / "run", {"method": method}):
        whole, part = rank["whole"], rank["part"]
        assert part["history"] == whole["history"] and len(whole["history"]) == 2
        assert part["rule"] == whole["rule"]
        for kind in ("policy", "reference"):
            for name, tensor in whole[kind].items():
                assert torch.equal(part[kind][name], tensor), (kind, name)


def test_a_signal_to_one_rank_stops_both_after_the_same_step(neox, tmp_path):
    ranks = torchrun("signalled", neox, tmp_path / "run", {"method": "dpo"})
    assert [r["step"] for r in ranks] == [2, 2]
    assert [r["received"] for r in ranks] == [15, 15]
    assert (tmp_path / "run" / "checkpoint-2" / "manifest.json").is_file()
    assert (tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth").is_file()
