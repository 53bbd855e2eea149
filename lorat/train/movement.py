"""The moving reference in a run: when it moves, what is said of it before, and what is written down of it.

`reference.jsonl` in the output folder has one line for each step at which the reference moved, and for each at which an
adaptive rule looked and let it be. A resumed run goes on with the lines up to its checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from ..reference import UpdateRule

if TYPE_CHECKING:
    from .trainer import TrustRegionTrainer

JOURNAL = "reference.jsonl"


class ReferenceCallback(TrainerCallback):
    """Moves the reference after each optimiser step, as the trainer's update rule says, and keeps the journal."""

    def __init__(self, trainer: TrustRegionTrainer) -> None:
        self.trainer = trainer
        self._lines: list[tuple[dict[str, Any], Tensor | None]] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._lines.clear()
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / JOURNAL
        kept = [line for line in _read(path) if line["step"] <= state.global_step] if state.global_step else []
        path.unlink(missing_ok=True)
        if kept:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        rule, step = self.trainer.rule, state.global_step
        due = rule.is_due(step)
        moved = rule.after_step_(
            self.trainer.model, step, self.trainer.step_drift() if due and rule.needs_drift else None
        )
        if due:
            decision = rule.decision if rule.adaptive else None
            line = {"step": step, "moved": moved, **{k: v for k, v in (decision or {}).items() if k != "step"}}
            self._lines.append((line, rule.error if moved else None))
        if control.should_log or control.should_save or control.should_training_stop:
            self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        """Errors of blends are read here, so that no step waits for the device."""
        if self._lines and state.is_world_process_zero:
            with (Path(args.output_dir) / JOURNAL).open("a") as file:
                for line, error in self._lines:
                    file.write(json.dumps({**line, **({"error": error.item()} if error is not None else {})}) + "\n")
        self._lines.clear()


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
