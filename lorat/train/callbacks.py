"""What happens around the Trainer's steps: the reference moves, signals are heeded, progress is shown."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from ..ranks import Ranks
from ..reference.moving import MovingReference
from .meters import Meters


class ReferenceCallback(TrainerCallback):
    """Moves the reference after each optimiser step. `drift`: of the step just taken, nats a token."""

    def __init__(self, reference: MovingReference, drift: Callable[[], float]) -> None:
        self.reference, self.drift = reference, drift

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.reference.rewind(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.reference.after_step(state.global_step, self.drift)

    def on_log(self, args, state, control, **kwargs) -> None:
        self.reference.flush()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.reference.flush()


class SignalCallback(TrainerCallback):
    """SIGTERM and Ctrl-C end the run after the step in progress, with a checkpoint; a second Ctrl-C at once.

    transformers' own JIT checkpoint knows SIGTERM only, waits three seconds and may save between two
    micro-batches. On several ranks the signal that one of them received stops all of them at the same step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heed)

    def _heed(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.world_size > 1:
            self.received = self.ranks.max(self.received or 0) or None
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the checkpoint first: whoever sent the signal may not wait

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if control.should_training_stop and self.received is not None:  # saved already
            control.should_save = control.should_evaluate = False

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        while self._before:
            signal.signal(*self._before.popitem())


class ProgressCallback(TrainerCallback):
    """A bar with loss, accuracy, margin, tokens/s and the reference's last move; plain lines where no terminal is.

    `opening_lines`: what is said before a run of so many steps.
    """

    def __init__(
        self, label: str, opening_lines: Callable[[int], list[str]], reference: MovingReference, meters: Meters
    ) -> None:
        self.label, self.opening_lines, self.reference, self.meters = label, opening_lines, reference, meters
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.line = Text("", style="cyan", overflow="ellipsis", no_wrap=True)
        self.words = ""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.meters.restart()
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        lines = self.opening_lines(state.max_steps)
        if self.console.is_terminal:
            self.console.print(Panel("\n".join(lines), title=f"[bold]{self.label}", title_align="left", expand=False))
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                expand=True,
            )
            self.task = self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step)
            self.live = Live(Group(self.bar, self.line), console=self.console, refresh_per_second=4)
            self.live.start()
        else:
            for line in lines:
                self.console.print(line, soft_wrap=True, highlight=False)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)
            self.line.plain = f"{self.words}{self._moved()}"

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        words = describe_metrics(logs)
        if not words:  # the summary at the end
            return
        self.words = words
        if self.bar:
            self.line.plain = f"{self.words}{self._moved()}"
        elif not args.disable_tqdm:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {self.words}{self._moved()}", soft_wrap=True
            )

    def _moved(self) -> str:
        rule = self.reference.rule
        return f"  ref moved at {rule.last_step}" if rule.updates else ""

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = self.bar = None


def describe_metrics(logs: dict[str, float]) -> str:
    """One line of a log: the numbers a person watches, those that are there."""
    prefix = "eval_" if any(k.startswith("eval_") for k in logs) else ""
    names = [
        ("loss", "loss", "{:.4f}"),
        ("rewards/accuracies", "acc", "{:.1%}"),
        ("rewards/margins", "margin", "{:+.3f}"),
    ]
    names += [("start/rewards/accuracies", "acc from start", "{:.1%}")] if prefix else []
    names += [("kl", "z0", "{:.3f}"), ("tokens_per_second", "tok/s", "{:,.0f}")]
    parts = [f"{word} {form.format(logs[prefix + key])}" for key, word, form in names if prefix + key in logs]
    return ("eval: " if prefix and parts else "") + "  ".join(parts)
