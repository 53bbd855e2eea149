"""What a run wrote down, read back for a report: its log, the reference's moves, settings, results and samples.

JSON alone is read: no weights, no pickles, so a folder from a stranger can be looked at. A run in progress is read from
its newest checkpoint. What is missing is left out; what cannot be read as JSON is an error or, in a file that another
program may be writing at this moment, left out with a note.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .checkpoint import RUN, checkpoints

TRAINER_STATE = "trainer_state.json"
JOURNAL = "reference.jsonl"
RESULTS = ("eval.json", "eval_results.json", "judge*.json")
SAMPLES = ("*samples*.jsonl", "*samples*.json")


@dataclass
class RunLog:
    """A run as it stands. `source`: the file that the log is from, "" if none was written yet; `step` of `steps`."""

    name: str
    folder: Path
    source: str = ""
    step: int = 0
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.step >= self.steps

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """`(steps, values)` of a logged number, in order; the last of a step counts, what is not finite is left out."""
        found = {row["step"]: row[name] for row in self.history if is_number(row.get(name))}
        return sorted(found), [float(found[step]) for step in sorted(found)]

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return values[-1] if values else None

    def names(self) -> list[str]:
        """Every number that was logged."""
        return sorted({k for row in self.history for k, v in row.items() if is_number(v)} - {"step", "epoch"})

    def updates(self) -> list[int]:
        """The steps at which the reference moved."""
        return [line["step"] for line in self.moves if line.get("moved", True)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(folders: list[str]) -> list[RunLog]:
    """One `RunLog` a folder, with names that differ. Raises `DataError` for what is no run."""
    paths = [Path(f).resolve() for f in folders]
    if len(set(paths)) < len(paths):
        twice = next(p for p in paths if paths.count(p) > 1)
        raise DataError(f"{str(twice)!r} is given twice; name each run once.")
    return [read_run(path, _name(path, paths)) for path in paths]


def _name(path: Path, all_: list[Path]) -> str:
    """The shortest end of the path that no other run has."""
    for n in range(1, len(path.parts)):
        if sum(other.parts[-n:] == path.parts[-n:] for other in all_) == 1:
            return "/".join(path.parts[-n:])
    return str(path)


def read_run(folder: Path, name: str) -> RunLog:
    """Read a run's folder, or one checkpoint of it. Raises `DataError` if it holds neither a log nor settings."""
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not a folder; name the output_dir of a run.")
    run = RunLog(name, folder)
    run_dir = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) and not (folder / RUN).exists() else folder
    for path in [folder / TRAINER_STATE, *(c / TRAINER_STATE for c in checkpoints(folder))]:
        state = _optional(path, run, quiet=path.parent != folder)
        if state is not None and _whole_state(state) and int(state["global_step"]) > (run.step if run.source else -1):
            run.source = str(path.relative_to(folder))
            run.step, run.steps = int(state["global_step"]), int(state.get("max_steps") or 0)
            run.history = [r for r in state["log_history"] if isinstance(r, dict) and isinstance(r.get("step"), int)]
    run.settings = _mapping(_optional(run_dir / RUN, run))
    run.versions = _mapping(run.settings.pop("versions", None))
    if not run.source and not run.settings:
        raise DataError(
            f"{str(folder)!r} is no run: it has no {TRAINER_STATE}, no checkpoint with one and no {RUN}. Name the output_dir of a "
            "run; one in progress can be looked at from its first checkpoint on (save_steps)."
        )
    if not run.source:
        run.notes.append(
            f"no {TRAINER_STATE} yet: a log is written with the first checkpoint (save_steps) and at the end."
        )
    run.moves = _journal(run_dir / JOURNAL)
    if folder != run_dir:  # the run went on from this checkpoint
        run.moves = [line for line in run.moves if line["step"] <= run.step]
    for pattern in RESULTS:
        for path in sorted(folder.glob(pattern)):
            if (result := _optional(path, run)) is not None:
                run.results[path.name] = result
    if not run.versions:
        run.versions = _mapping(_mapping(run.results.get("eval.json")).get("versions"))
    run.samples = sorted({path for pattern in SAMPLES for path in folder.glob(pattern)})
    return run


def _whole_state(state: Any) -> bool:
    return (
        isinstance(state, dict) and isinstance(state.get("log_history"), list) and is_number(state.get("global_step"))
    )


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _optional(path: Path, run: RunLog, quiet: bool = False) -> Any:
    """A file's JSON; None if it is not there, or not JSON (noted, unless `quiet`: a checkpoint may go at any moment)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if not quiet:
            run.notes.append(f"{path.name} cannot be read ({error}) and is left out.")
        return None


def _journal(path: Path) -> list[dict[str, Any]]:
    """The lines of `reference.jsonl`; from the first one that is torn on, none."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
