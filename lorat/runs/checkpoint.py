"""Checkpoints, written atomically: aside, sealed with a manifest, then renamed.

A checkpoint is written to `.saving/`, its files' sizes and SHA-256 go into `manifest.json`, and one rename
makes it visible. A process killed at any moment leaves the earlier checkpoints as they were; what is torn
all the same (a disk that lied) is found by its manifest and the one before it is used. Reading and hashing
cost a pass over the files, about a second per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import put

MANIFEST = "manifest.json"
STATE = "lorat_state.json"
RUN = "lorat_run.json"
START = "start"
SAVING = ".saving"
_NAME = re.compile(r"(?:\.old-)?checkpoint-(\d+)")


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write `folder`'s manifest: size and SHA-256 of every file in it."""
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _digest(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    put(folder / MANIFEST, json.dumps(files, indent=1))
    for path in (*(folder / name for name in files), folder / MANIFEST, folder):  # on the disk before older ones go
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"{name} is damaged (SHA-256 differs)"
    return None


def publish(staged: Path, final: Path) -> None:
    """Seal `staged` and make it `final` by a rename; an older `final` is replaced, or comes back if we die here."""
    seal(staged)
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            staged.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        staged.rename(final)


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders in `output_dir`, the newest first, whole or not.

    One whose replacement was killed between the two renames of `publish` is found under the name it has then.
    """
    found = [(int(m[1]), p) for p in output_dir.glob("*checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    there = {p.name for _, p in found}
    kept = [(n, p) for n, p in found if not p.name.startswith(".old-") or f"checkpoint-{n}" not in there]
    return [p for _, p in sorted(kept, reverse=True)]


def repair(output_dir: Path) -> None:
    """Finish what `publish` was killed in between its two renames."""
    for old in output_dir.glob(".old-checkpoint-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        shutil.rmtree(old) if final.exists() else old.rename(final)


def last_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and a sentence about each newer one that is torn."""
    torn: list[str] = []
    for folder in checkpoints(output_dir):
        problem = flaw(folder)
        if problem is None:
            return folder, torn
        torn.append(f"{folder.name} is torn: {problem}.")
    return None, torn


def resolve_resume(given: str | bool | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Which checkpoint `resume_from_checkpoint` means, and notes for the user.

    None/"false": none. "true"/"last": the newest whole one, an error if there is none. "auto": the same, or a
    fresh start. A path: that one, which must be whole. Raises `CheckpointError`.
    """
    word = str(given).lower()
    if given in (None, "") or word in ("false", "none", "no"):
        return None, []
    if word in ("true", "last", "auto"):
        folder, torn = last_whole(output_dir)
        notes = [f"{t} Using {folder.name if folder else 'none'} instead." for t in torn]
        if folder is None and word != "auto":
            why = " ".join(torn) or "There is no checkpoint in it."
            raise CheckpointError(
                f"resume_from_checkpoint={given}, but {str(output_dir)!r} has no whole checkpoint. {why} Set output_dir "
                "to the interrupted run, or resume_from_checkpoint: auto to start afresh where there is none."
            )
        return folder, notes
    folder = Path(str(given))
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint={given!r} is not a folder; name a checkpoint-N folder, or auto.")
    problem = flaw(folder)
    if problem is not None:
        other, _ = last_whole(folder.parent)
        advice = f"Resume from {str(other)!r} instead." if other else "No whole checkpoint lies beside it."
        raise CheckpointError(f"{str(folder)!r} is torn or was not written by lorat: {problem}. {advice}")
    return folder, []


def set_aside_newer(output_dir: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step` to `set-aside-checkpoint-N`: torn ones, and those of a course not taken.

    Otherwise the run that goes on from `step` would find them later, as its own newest ones. Returns their names.
    """
    moved = []
    for folder in checkpoints(output_dir):
        if int(folder.name.rpartition("-")[2]) > step:
            aside = folder.with_name(f"set-aside-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            moved.append(folder.name)
    return moved


def guard_output_dir(output_dir: Path, resuming: bool, overwrite: bool, inputs: Sequence[str | None] = ()) -> None:
    """Refuse an output folder that holds another run; with `overwrite` delete what lorat wrote there, nothing else.

    `inputs`: folders that the new run reads, which must not be deleted for it. Raises `CheckpointError`.
    """
    names = [RUN, SAVING, "adapter_model.safetensors", "adapter_config.json"]
    found = [output_dir / n for n in names if (output_dir / n).exists()]
    found += [p for p in (output_dir / START, output_dir / "ref") if (p / "adapter_config.json").exists()]
    found += [p for p in output_dir.glob("set-aside-checkpoint-*") if p.is_dir()] + checkpoints(output_dir)
    if resuming or not found:
        return
    where = f"output_dir={str(output_dir)!r} holds another run ({', '.join(sorted(p.name for p in found)[:4])})."
    if not overwrite:
        raise CheckpointError(
            f"{where} Set resume_from_checkpoint: true to continue it, another output_dir to keep it, or "
            "overwrite_output_dir: true to delete it."
        )
    if not (output_dir / RUN).is_file():
        raise CheckpointError(
            f"{where} It was not written by lorat, which deletes only its own; set another output_dir."
        )
    for given in (Path(i).resolve() for i in inputs if i):
        if any(given == p.resolve() or p.resolve() in given.parents for p in found) or given == output_dir.resolve():
            raise CheckpointError(
                f"{where} overwrite_output_dir would delete {str(given)!r}, which this run starts from; set another "
                "output_dir."
            )
    logs = ("trainer_state.json", "eval_results.json", "all_results.json", "reference.jsonl", "eval.json")
    for path in [*found, *(output_dir / name for name in logs)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); resume from another checkpoint.") from error
