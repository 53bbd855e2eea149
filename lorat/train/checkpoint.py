"""The trainer's saving, loading and resuming: both adapters, the rule's state, and a run's identity.

A checkpoint holds the policy at its root, the reference in `ref/`, `lorat_state.json` (update rule, running
averages, token count), and what the Trainer keeps (optimiser, schedule, RNG, position). The Trainer writes
its part into a staging folder; `checkpoint.publish` makes it whole. No pickle is written but torch's own
optimiser and RNG files, which are read with `weights_only=True`.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..errors import CheckpointError
from ..model.adapters import load_adapter_, train_policy_only_
from ..model.base import Facts
from ..reference import POLICY, REFERENCE, UpdateRule, snapshot
from ..runs import checkpoint as ck
from ..runs.card import write_model_card
from ..runs.identity import check_same_run, run_identity
from ..runs.versions import versions
from ..settings.config import TrustRegionConfig
from .callbacks import ProgressCallback, SignalCallback, Throughput
from .engine import Engine
from .metrics import Averages

logger = logging.getLogger("lorat")


class CheckpointMixin(Trainer):
    """Saving and loading of `TrustRegionTrainer`; not a trainer on its own."""

    model: Any  # a PeftModel
    train_dataset: Any  # tokenised, or None
    args: TrustRegionConfig
    engine: Engine
    rule: UpdateRule
    averages: Averages
    tokens: Throughput
    signals: SignalCallback
    progress: ProgressCallback
    start: dict[str, Tensor]
    _start_cache: dict[bytes, list[Tensor]]
    identity: dict[str, Any]
    facts: Facts
    _staging = False
    unsaved = False

    @property
    def run_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train, or go on from a checkpoint: None, True (the last whole one), "auto", or a folder.

        Raises `CheckpointError` for an output folder that holds another run and for a checkpoint that is torn
        or belongs to other settings.
        """
        output_dir = self.run_dir
        folder, notes = ck.resolve_resume(resume_from_checkpoint, output_dir)
        for note in notes:
            logger.warning(note)
        identity = self.identity = run_identity(self.args.identity() | self.facts.settings(), self.train_dataset)
        if self.args.should_save:
            inputs = (self.args.policy_adapter, self.args.ref_adapter)
            ck.guard_output_dir(output_dir, folder is not None, self.args.overwrite_output_dir, inputs)
            output_dir.mkdir(parents=True, exist_ok=True)
        if folder is not None:
            check_same_run(ck.read_json(folder / ck.STATE)["run"], identity, folder)
            self._check_resumable(folder)
        if self.args.should_save:
            try:
                self._write_beginnings(output_dir, folder, identity)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"output_dir={str(output_dir)!r} cannot be written to: {error}. Free space there, or set another."
                ) from error
        self.accelerator.wait_for_everyone()
        try:
            return super().train(str(folder) if folder else None, *args, **kwargs)
        finally:
            self.signals.restore()
            self.progress.stop()

    def _write_beginnings(self, output_dir: Path, folder: Path | None, identity: dict[str, Any]) -> None:
        """What stands in the output folder from the first step on: the run's settings and what it started from."""
        here = folder is not None and folder.parent.resolve() == output_dir.resolve()
        if folder is None:
            start = str(output_dir / ck.START)
            self.model.save_pretrained(start, selected_adapters=[POLICY], save_embedding_layers=False)
        elif not here and (folder.parent / ck.START).is_dir():
            shutil.copytree(folder.parent / ck.START, output_dir / ck.START, dirs_exist_ok=True)
        ck.write_json(output_dir / ck.RUN, {**identity, "versions": versions()})
        if folder is not None and here:
            step = int(ck.read_json(folder / "trainer_state.json")["global_step"])  # whatever the folder is called
            for name in ck.set_aside_newer(output_dir, step):
                logger.warning(
                    f"{name} lies beyond the point that this run goes on from; set aside as set-aside-{name}."
                )

    @staticmethod
    def _check_resumable(folder: Path) -> None:
        missing = [n for n in ("optimizer.pt", "scheduler.pt", "trainer_state.json") if not (folder / n).is_file()]
        missing += [] if list(folder.glob("rng_state*.pth")) else ["rng_state.pth"]
        if missing:
            raise CheckpointError(
                f"{str(folder)!r} has no {', '.join(missing)} (it was saved with save_only_model), so a resumed run would "
                "not be the same run. Start a new one in another output_dir, with policy_adapter: "
                f"{folder} and ref_adapter: {folder / REFERENCE}."
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none at all where the checkpoint was already the run's last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- writing ----

    def _get_output_dir(self, trial=None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / ck.SAVING) if self._staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside and publish it; a failure (a full disk) leaves the earlier ones and the run alone."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run_dir / ck.SAVING / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / ck.SAVING, ignore_errors=True)
        before = self.state.best_model_checkpoint, self.state.best_global_step
        averages = {k: list(v) for k, v in self.averages.reduced(self.engine.summed).items()}
        pending = self.tokens.pending(self.engine.summed)
        self.accelerator.wait_for_everyone()
        failure: Exception | None = None
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                state: dict[str, Any] = {
                    "rule": self.rule.state_dict(),
                    "averages": averages,
                    "tokens": [self.tokens.total, pending],
                }
                if self.rule.error is not None:  # of the last blend, for the log
                    state["error"] = self.rule.error.item()
                ck.write_json(staged / ck.STATE, {**state, "run": self.identity})
                if self.state.best_model_checkpoint:
                    best = Path(self.state.best_model_checkpoint).name
                    self.state.best_model_checkpoint = str(run_dir / best)
                    self.state.save_to_json(str(staged / "trainer_state.json"))
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = error
        finally:
            self._staging = False
        failed = self.engine.summed(self._flag(failure is not None)).item() > 0
        if self.args.should_save:
            if not failed:
                try:
                    ck.publish(staged, final)
                except OSError as error:
                    failure, failed = error, True
            shutil.rmtree(run_dir / ck.SAVING, ignore_errors=True)
            if failed:
                logger.warning(self._failure_words(final, failure))
            else:
                best = self.state.best_model_checkpoint  # type: ignore[assignment]  # None: there is none yet
                rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=False)
        if failed:  # the best one is the best of those that are there
            self.state.best_model_checkpoint = before[0]
            self.state.best_global_step = int(before[0].rpartition("-")[2]) if before[0] else None
        self.unsaved = self.engine.summed(self._flag(failed)).item() > 0
        self.accelerator.wait_for_everyone()

    def _flag(self, value: bool) -> Tensor:
        return torch.tensor(float(value), device=self.args.device)

    def _failure_words(self, final: Path, error: Exception | None) -> str:
        free = shutil.disk_usage(final.parent).free / 2**20
        last, _ = ck.last_whole(final.parent)
        return (
            f"{final.name} could not be written to {str(final.parent)!r} ({free:,.0f} MiB free): {error}. The run goes on "
            f"and tries again at the next log; the last good checkpoint is {last.name if last else 'none yet'}. Free "
            "space there, or stop with Ctrl-C and set save_total_limit or another output_dir."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.unsaved and "loss" in logs:
            self.control.should_save = True

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy at the root; the reference in `ref/` of a checkpoint, or where `save_reference` asks for it."""
        folder = Path(output_dir) if output_dir else self.run_dir
        adapters = [POLICY, REFERENCE] if self._staging or self.args.save_reference else [POLICY]
        self.model.save_pretrained(str(folder), selected_adapters=adapters, save_embedding_layers=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        if not self._staging:
            write_model_card(folder, self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain PEFT adapter with a model card; raises `CheckpointError` if the disk refuses."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        try:
            super().save_model(output_dir, _internal_call)
        except (OSError, SafetensorError) as error:
            folder = output_dir or str(self.run_dir)
            last, _ = ck.last_whole(self.run_dir)
            raise CheckpointError(
                f"the adapter could not be written to {folder!r}: {error}. Free space there or set another output_dir; "
                f"the last good checkpoint is {str(last) if last else 'none'}, resume from it with "
                "resume_from_checkpoint: true."
            ) from error

    # ---- reading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Policy, reference, start, rule and averages of a checkpoint, each tensor verified."""
        folder = Path(resume_from_checkpoint)
        saved = ck.read_json(folder / ck.STATE)
        target = self.model
        if (folder.parent / ck.START).is_dir():
            load_adapter_(target, folder.parent / ck.START, POLICY)
            self.start = snapshot(target, POLICY)
            self._start_cache.clear()
        load_adapter_(target, folder, POLICY)
        load_adapter_(target, folder / REFERENCE, REFERENCE)
        train_policy_only_(target)
        self.rule.load_state_dict(saved["rule"])
        if "error" in saved:
            self.rule.error = torch.tensor(saved["error"], dtype=torch.float64)
        first = self.args.process_index == 0  # sums over ranks go on from rank 0
        averages = {k: v if first else [0.0, 0.0] for k, v in saved["averages"].items()}
        self.averages.load_state_dict(averages, self.args.device)
        self.tokens.total, pending = saved["tokens"]
        self.tokens.local = pending if first else 0

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        load_adapter_(self.model, best, POLICY)
        load_adapter_(self.model, best / REFERENCE, REFERENCE)
        train_policy_only_(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._without_pickles(super()._load_optimizer_and_scheduler, checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._without_pickles(super()._load_rng_state, checkpoint)

    def _without_pickles(self, load: Any, checkpoint: str | None) -> None:
        try:
            load(checkpoint)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{checkpoint!r} holds a file that would run code when it is read, so it was not read "
                f"({str(error).splitlines()[0]}). It was not written by lorat; resume from one that was."
            ) from error
