"""A run killed at any moment and resumed is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorat.errors import CheckpointError
from lorat.reference import adapter_parameters
from lorat.runs import checkpoint as ck
from tests.helpers import driver
from tests.helpers.worlds import ROOT, bits_on_cpu, make_pairs

TIMING = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def history(trainer):
    kept = [{k: v for k, v in h.items() if k not in TIMING} for h in trainer.state.log_history]
    return [h for h in kept if "loss" in h]


def assert_same(left, right) -> None:
    assert history(left) == history(right)
    assert len(history(left)) == 3  # steps 3, 6 and 9 of 10
    for adapter in ("default", "ref"):
        theirs = adapter_parameters(right.model, adapter)
        for name, p in adapter_parameters(left.model, adapter).items():
            assert torch.equal(p, theirs[name]), (adapter, name)
    assert left.rule.state_dict() == right.rule.state_dict()
    assert {k: v.tolist() for k, v in left.evaluator.start.items()} == {
        k: v.tolist() for k, v in right.evaluator.start.items()
    }


def resumed_and_whole(neox, tmp_path, **changes):
    """A run of ten steps, and the same resumed after the sixth."""
    whole = driver.make(neox, str(tmp_path / "whole"), **changes)
    whole.train()
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for name in ("checkpoint-8", "checkpoint-10"):
        shutil.rmtree(part / name)
    resumed = driver.make(neox, str(part), **changes)
    resumed.train(resume_from_checkpoint="auto")
    return resumed, whole


@pytest.fixture(scope="module")
def uninterrupted(neox, tmp_path_factory):
    trainer = driver.make(neox, str(tmp_path_factory.mktemp("whole") / "run"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("moment", "resumed_from"), [("step:5", 4), ("saving:4", 2), ("published:6", 4)], ids=["between", "during", "torn"]
)
def test_killed_and_resumed_is_never_interrupted(neox, tmp_path, uninterrupted, moment, resumed_from, caplog):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tests.helpers.driver", neox, str(out), moment, "no"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    died = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    folder, torn = ck.last_whole(out)
    assert folder.name == f"checkpoint-{resumed_from}"
    assert bool(torn) == moment.startswith("published")
    trainer = driver.make(neox, str(out))
    trainer.train(resume_from_checkpoint=True)
    if torn:
        assert "checkpoint-6 is torn: optimizer.pt has" in caplog.text and "Using checkpoint-4" in caplog.text
    assert_same(trainer, uninterrupted)
    assert ck.flaw(out / "checkpoint-10") is None
    assert not (out / ck.SAVING).exists()


@pytest.mark.parametrize("method", ["ipo", "kto"])
@pytest.mark.parametrize("sync", ["frozen", "hard"])
def test_every_method_and_rule_resumes_exactly(neox, tmp_path, method, sync):
    changes = dict(method=method, sync=sync, sync_alpha=None, sync_every=None if sync == "frozen" else 3)
    assert_same(*resumed_and_whole(neox, tmp_path, **changes))


def test_paged_8bit_adamw_resumes_exactly(neox, tmp_path):
    bits_on_cpu()
    # from 4,096 numbers on a tensor's state is held in 8 bits
    resumed, whole = resumed_and_whole(neox, tmp_path, optim="paged_adamw_8bit", lora_r=64)
    states = [s["state1"].dtype for s in whole.optimizer.optimizer.state.values() if "state1" in s]
    assert torch.uint8 in states
    assert_same(resumed, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_exactly(neox, tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    trainer = driver.make(neox, str(tmp_path / "run"))
    heed = trainer.progress.on_step_end

    def interrupt(args, state, control, **kwargs):
        if state.global_step == 5 and trainer.signals.received is None:
            os.kill(os.getpid(), number)
        heed(args, state, control, **kwargs)

    # on_step_begin would fire within the step; the last callback of step 5 makes step 6 the one in progress
    trainer.progress.on_step_end = interrupt
    trainer.train()
    assert trainer.signals.received == number
    assert trainer.state.global_step == 6
    assert ck.flaw(tmp_path / "run" / "checkpoint-6") is None
    assert signal.getsignal(number) == before
    resumed = driver.make(neox, str(tmp_path / "run"))
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, uninterrupted)


@pytest.fixture
def stopped(neox, tmp_path, uninterrupted):
    """A copy of the finished run's folder, and a fresh trainer for it."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted.args.output_dir, out)
    return out, driver.make(neox, str(out))


def test_an_output_folder_with_another_run_is_refused_and_kept(stopped, neox):
    out, trainer = stopped
    files = sorted(p.name for p in out.iterdir())
    with pytest.raises(CheckpointError, match="holds another run") as error:
        trainer.train()
    for word in (str(out), "resume_from_checkpoint", "overwrite_output_dir", "checkpoint-10"):
        assert word in str(error.value)
    assert sorted(p.name for p in out.iterdir()) == files
    (out / "notes.txt").write_text("mine")
    again = driver.make(neox, str(out), overwrite_output_dir=True, max_steps=1, save_strategy="no")
    again.train()
    assert not list(out.glob("checkpoint-*"))
    assert (out / "notes.txt").read_text() == "mine"


def test_other_settings_are_not_resumed(stopped, neox):
    out, _ = stopped
    other = driver.make(neox, str(out), beta=0.3, sync_every=4)
    with pytest.raises(CheckpointError, match="other settings") as error:
        other.train(resume_from_checkpoint=True)
    assert "beta: 0.1 then, 0.3 now" in str(error.value) and "sync_every: 3 then, 4 now" in str(error.value)


def test_a_torn_checkpoint_given_by_name_points_to_a_whole_one(stopped):
    out, trainer = stopped
    (out / "checkpoint-8" / "ref" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ref/adapter_model.safetensors is missing.*checkpoint-10"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-8"))


def test_resuming_where_nothing_is(neox, tmp_path):
    trainer = driver.make(neox, str(tmp_path / "new"), max_steps=1, save_strategy="no")
    with pytest.raises(CheckpointError, match="There is no checkpoint in it"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    trainer.train(resume_from_checkpoint="auto")  # a fresh start
    assert trainer.state.global_step == 1


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["LORAT_BOMB"]),))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_hostile_checkpoint_executes_nothing(stopped, name, tmp_path, monkeypatch):
    out, trainer = stopped
    mark = tmp_path / "exploded"
    monkeypatch.setenv("LORAT_BOMB", str(mark))
    folder = out / "checkpoint-8"
    torch.save(Bomb(), folder / name)
    ck.seal(folder)  # a forger would seal it too
    if name == "training_args.bin":
        trainer.train(resume_from_checkpoint=str(folder))  # no such file is ever looked at
    else:
        with pytest.raises(CheckpointError, match="run code when it is read"):
            trainer.train(resume_from_checkpoint=str(folder))
    assert not mark.exists()
    with (folder / name).open("rb") as f, pytest.raises((pickle.UnpicklingError, RuntimeError, ValueError)):
        torch.load(f, weights_only=True)


def test_a_full_disk_loses_neither_the_run_nor_the_last_checkpoint(neox, tmp_path, monkeypatch, caplog, uninterrupted):
    """The disk is full while checkpoint-4 is written, and has room again at the log after step 6."""
    import errno

    trainer = driver.make(neox, str(tmp_path / "run"))
    seal = ck.seal

    def full(folder):
        if folder.name == "checkpoint-4":
            (folder / "half").write_bytes(b"x" * 10)
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder)

    monkeypatch.setattr(ck, "seal", full)
    trainer.train()
    for words in ("checkpoint-4 could not be written", "No space left", "last good checkpoint is checkpoint-2", "Free"):
        assert words in caplog.text
    found = [p.name for p in ck.checkpoints(tmp_path / "run")]
    assert found == ["checkpoint-10", "checkpoint-8", "checkpoint-6", "checkpoint-2"]
    assert not (tmp_path / "run" / ck.SAVING).exists()
    assert_same(trainer, uninterrupted)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-10"):
        trainer.save_model()


def test_only_as_many_checkpoints_as_asked_for_are_kept(neox, tmp_path):
    trainer = driver.make(neox, str(tmp_path / "run"), save_total_limit=2)
    trainer.train()
    assert [p.name for p in ck.checkpoints(tmp_path / "run")] == ["checkpoint-10", "checkpoint-8"]


def test_the_best_model_is_loaded_back_with_its_reference(neox, tmp_path):
    trainer = driver.make(
        neox,
        str(tmp_path / "run"),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_pairs=make_pairs(6, seed=4),
    )
    trainer.train()
    evals = {h["step"]: h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h}
    best = tmp_path / "run" / f"checkpoint-{min(evals, key=evals.get)}"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    from safetensors.torch import load_file

    for adapter, folder in (("default", best), ("ref", best / "ref")):
        saved = load_file(folder / "adapter_model.safetensors")
        for name, p in adapter_parameters(trainer.model, adapter).items():
            assert torch.equal(p, saved[name])


def test_a_checkpoint_is_not_lost_between_the_renames_that_replace_it(neox, tmp_path, uninterrupted, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted.args.output_dir, out)
    staged = out / ck.SAVING / "checkpoint-10"
    shutil.copytree(out / "checkpoint-10", staged)
    rename = Path.rename

    def die(self, target):
        if self == staged:
            raise SystemExit("killed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(SystemExit):
        ck.publish(staged, out / "checkpoint-10")
    monkeypatch.undo()
    assert not (out / "checkpoint-10").exists()
    assert ck.last_whole(out) == (out / ".old-checkpoint-10", [])  # a question renames nothing
    assert not (out / "checkpoint-10").exists()
    ck.repair(out)
    assert ck.last_whole(out) == (out / "checkpoint-10", [])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with 600 KiB; skipped where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(neox, small_disk, caplog, uninterrupted):
    trainer = driver.make(neox, str(small_disk / "run"))
    trainer.train()
    assert_same(trainer, uninterrupted)  # the run went on in memory
    whole = ck.checkpoints(small_disk / "run")
    assert whole and all(ck.flaw(p) is None for p in whole) and whole[0].name != "checkpoint-10"
    assert "could not be written" in caplog.text and "MiB free" in caplog.text
    with pytest.raises(CheckpointError, match=f"No space left.*{whole[0].name}"):
        trainer.save_model()
    assert not (small_disk / "run" / "adapter_model.safetensors").exists()
    (small_disk / "fill").write_bytes(b"x" * 1024)
    shutil.rmtree(small_disk / "run")
    (small_disk / "fill").write_bytes(b"x" * 590 * 1024)
    with pytest.raises(CheckpointError, match="cannot be written to.*No space left"):
        driver.make(neox, str(small_disk / "run")).train()
