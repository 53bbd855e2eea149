"""A run's output folder while the run writes it: claimed at the start, checkpoints staged and published in it.

It holds `lorat_run.json` (what makes the run that run), `start/` (the policy that it began from), `checkpoint-N/` and at
the end the policy itself. A checkpoint holds the policy at its root, the reference in `ref/`, `lorat_state.json` (rule,
averages, tokens), and what the Trainer keeps (optimiser, schedule, RNG, position). No pickle is written but torch's own
optimiser and RNG files, which are read with `weights_only=True`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError
from ..files import put_json
from ..reference import REFERENCE
from . import checkpoint as ck
from .identity import check_same_run
from .versions import versions

logger = logging.getLogger("lorat")


class RunFolder:
    """The folder at `path`; only the process that is its `owner` writes to it."""

    def __init__(self, path: Path, owner: bool) -> None:
        self.path, self.owner = path, owner
        self.staged: Path | None = None  # where a checkpoint is being written

    def repair(self) -> None:
        """Finish a replacement of a checkpoint in which an earlier process was killed."""
        if self.owner:
            ck.repair(self.path)

    def resume(self, given: str | bool | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means, or None; raises `CheckpointError`, see `resolve_resume`."""
        folder, notes = ck.resolve_resume(given, self.path)
        for note in notes:
            logger.warning(note)
        return folder

    def claim(
        self,
        identity: Mapping[str, Any],
        checkpoint: Path | None,
        overwrite: bool,
        inputs: Sequence[str | None],
        save_start: Callable[[str], Any],
    ) -> None:
        """Make the folder that of the run `identity`, new or going on from `checkpoint`.

        `inputs`: folders that the run reads; `save_start` writes the policy's start into a folder. Raises
        `CheckpointError` for a folder that holds another run, a checkpoint of other settings, or a disk that refuses.
        """
        if self.owner:
            ck.guard_output_dir(self.path, checkpoint is not None, overwrite, inputs)
        if checkpoint is not None:
            check_same_run(ck.read_json(checkpoint / ck.STATE)["run"], dict(identity), checkpoint)
            self._check_resumable(checkpoint)
        if not self.owner:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_beginnings(identity, checkpoint, save_start)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"output_dir={str(self.path)!r} cannot be written to: {error}. Free space there, or set another."
            ) from error

    def _write_beginnings(
        self, identity: Mapping[str, Any], checkpoint: Path | None, save_start: Callable[[str], Any]
    ) -> None:
        """What stands in the output folder from the first step on: the run's settings and what it started from."""
        here = checkpoint is not None and checkpoint.parent.resolve() == self.path.resolve()
        if checkpoint is None:
            save_start(str(self.path / ck.START))
        elif not here and (checkpoint.parent / ck.START).is_dir():
            shutil.copytree(checkpoint.parent / ck.START, self.path / ck.START, dirs_exist_ok=True)
        put_json(self.path / ck.RUN, {**identity, "versions": versions()})
        if checkpoint is not None and here:
            step = int(ck.read_json(checkpoint / "trainer_state.json")["global_step"])  # whatever it is called
            for name in ck.set_aside_newer(self.path, step):
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

    @contextmanager
    def staging(self, step: int) -> Iterator[Path]:
        """Inside, the checkpoint of `step` is written to the folder that is given, which nobody sees."""
        self.staged = self.path / ck.SAVING / f"checkpoint-{step}"
        if self.owner:
            shutil.rmtree(self.path / ck.SAVING, ignore_errors=True)
        try:
            yield self.staged
        finally:
            self.staged = None

    def publish(self, step: int) -> OSError | None:
        """Make the staged checkpoint of `step` visible in one rename; what hindered it, if anything did."""
        name = f"checkpoint-{step}"
        try:
            ck.publish(self.path / ck.SAVING / name, self.path / name)
        except OSError as error:
            return error
        return None

    def clear_staging(self) -> None:
        """Remove what was staged and not published."""
        shutil.rmtree(self.path / ck.SAVING, ignore_errors=True)

    def last_whole(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return ck.last_whole(self.path)[0]

    def failure_words(self, step: int, error: Exception | None) -> str:
        """What to say of a checkpoint that could not be written."""
        free, last = shutil.disk_usage(self.path).free / 2**20, self.last_whole()
        return (
            f"checkpoint-{step} could not be written to {str(self.path)!r} ({free:,.0f} MiB free): {error}. The run goes on "
            f"and tries again at the next log; the last good checkpoint is {last.name if last else 'none yet'}. Free "
            "space there, or stop with Ctrl-C and set save_total_limit or another output_dir."
        )
