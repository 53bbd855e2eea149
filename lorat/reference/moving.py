"""The moving reference in a run: a rule bound to two adapters, what is said of it before, and a journal of its moves.

`reference.jsonl` in the output folder has one line for each step at which the reference moved, and for each at which an
adaptive rule looked and let it be. A resumed run goes on with the lines up to its checkpoint. Used by lorat's trainer and
by `ReferenceSyncCallback`; torch alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import append_lines, write_whole
from .blending import distance
from .pairing import POLICY, REFERENCE
from .rules import UpdateRule

JOURNAL = "reference.jsonl"


class MovingReference:
    """Moves adapter `target` of `model` toward adapter `source` as `rule` says. `journal`: its file, if one is kept."""

    def __init__(
        self,
        model: nn.Module,
        rule: UpdateRule,
        source: str = POLICY,
        target: str = REFERENCE,
        journal: Path | None = None,
    ) -> None:
        self.model, self.rule, self.source, self.target, self.journal = model, rule, source, target, journal
        self._lines: list[tuple[dict[str, Any], Tensor | None]] = []

    def after_step(self, step: int, drift: Callable[[], float] | None = None) -> bool:
        """Call once after each optimiser step, counted from 1; says whether the reference moved.

        `drift`: asked for the step's drift, nats a token, where the rule wants it.
        """
        rule = self.rule
        due = rule.is_due(step)
        far = drift() if due and rule.needs_drift and drift is not None else None
        moved = rule.after_step_(self.model, step, far, source=self.source, target=self.target)
        if due and self.journal is not None:
            decision = {k: v for k, v in (rule.decision or {}).items() if k != "step"} if rule.adaptive else {}
            self._lines.append(({"step": step, "moved": moved, **decision}, rule.error if moved else None))
        return moved

    def logs(self) -> dict[str, float]:
        """`reference/updates`, `reference/lag` (its age in steps), `reference/distance` and, of the last blend,
        `reference/error` (relative, where it was measured)."""
        found: dict[str, float] = {
            "reference/updates": self.rule.updates,
            "reference/lag": self.rule.age,
            "reference/distance": distance(self.model, self.source, self.target),
        }
        if self.rule.error is not None:
            found["reference/error"] = self.rule.error.item()
        return found

    def rewind(self, step: int) -> None:
        """Keep the journal's lines up to `step`, those of the run that goes on from there; none at step 0."""
        self._lines.clear()
        if self.journal is None or not self.journal.exists():
            return
        kept = [line for line in _read(self.journal) if 0 < line["step"] <= step]
        if kept:
            write_whole(self.journal, "".join(json.dumps(line) + "\n" for line in kept))
        else:
            self.journal.unlink()

    def flush(self) -> None:
        """Write the journal's new lines. Errors of blends are read here, so that no step waits for the device."""
        if self._lines and self.journal is not None:
            rows = [{**line, **({"error": error.item()} if error is not None else {})} for line, error in self._lines]
            append_lines(self.journal, rows)
        self._lines.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, of JSON's own types: the rule's state and the last blend's error, for the log."""
        state: dict[str, Any] = {"rule": self.rule.state_dict()}
        if self.rule.error is not None:
            state["error"] = self.rule.error.item()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        if "error" in state:
            self.rule.error = torch.tensor(state["error"], dtype=torch.float64)

    def opening_lines(self, beta: float, steps: int) -> list[str]:
        """What the user should know of the reference before a run of `steps` optimiser steps, in words."""
        return opening_lines(self.rule, beta, steps)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a torn last one is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def opening_lines(rule: UpdateRule, beta: float, steps: int) -> list[str]:
    """What the user should know of the reference before the run: how it moves, its lag, and whether it binds.

    Thresholds come from exact toy experiments in which results collapse onto beta*lag, best between about 30 and 100 in
    a run of a thousand steps, and lower in shorter ones (docs/method.md).
    """
    if not rule.moves:
        return ["Reference: frozen at the start; it never moves."]
    how = "a copy of the policy" if rule.alpha == 1 else f"{rule.alpha:g} of the policy blended in"
    if rule.adaptive:
        return _adaptive_lines(rule, how, steps)
    times = rule.planned_updates(steps) or 0
    lines = [
        f"Reference: {how} every {rule.every} optimiser steps; lag {rule.lag:.1f} steps, beta*lag {beta * rule.lag:.2f}; "
        f"{times} update{'' if times == 1 else 's'} in {steps} steps."
    ]
    if times == 0:
        lines.append(
            f"It will never move: sync_every={rule.every} is longer than this run of {steps} steps. "
            f"Set sync_every to {max(1, steps // 8)} or less, or sync: frozen."
        )
    elif beta * rule.lag < 1:
        enough = math.ceil(50 / beta / (rule.lag + 0.5) * rule.every)  # lag grows in proportion to `every`
        advice = f"Set sync_every to {enough} for beta*lag near 50"
        if enough > steps // 2:
            advice = (
                f"A run of {steps} steps is too short for beta*lag near 50 at beta {beta:g}: raise beta or sync_every"
            )
        lines.append(
            "It does not bind: the reference follows the policy so closely that beta has next to no effect. "
            f"{advice}, or set sync: frozen."
        )
    return lines


def _adaptive_lines(rule: UpdateRule, how: str, steps: int) -> list[str]:
    limits = []
    if rule.drift_limit is not None:
        limits.append(f"drifted more than {rule.drift_limit:g} nats a token from it")
    if rule.distance_limit is not None:
        limits.append(f"moved more than {rule.distance_limit:g} of its own weight change away from it")
    lines = [
        f"Reference: {how} when the policy has {' or '.join(limits)}, {rule.every} optimiser steps after the last time at "
        "the earliest. Its lag is known only as it goes: reference/lag in the log."
    ]
    if rule.every > steps:
        lines.append(
            f"It will never move: sync_every={rule.every} is longer than this run of {steps} steps. "
            f"Set sync_every to {max(1, steps // 8)} or less, or sync: frozen."
        )
    return lines
