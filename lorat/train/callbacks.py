"""What happens around the Trainer's steps: signals are heeded, progress is shown, tokens are counted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import TrustRegionTrainer


class SignalCallback(TrainerCallback):
    """SIGTERM and Ctrl-C end the run after the step in progress, with a checkpoint; a second Ctrl-C at once.

    transformers' own JIT checkpoint knows SIGTERM only, waits three seconds and may save between two
    micro-batches. On several ranks the signal that one of them received stops all of them at the same step.
    """

    def __init__(self, trainer: TrustRegionTrainer) -> None:
        self.trainer = trainer
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
            flag = torch.tensor(self.received or 0, device=args.device)
            self.received = int(self.trainer.accelerator.gather(flag).max().item()) or None
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
    """A bar with loss, accuracy, margin, tokens/s and the reference's last move; plain lines where no terminal is."""

    def __init__(self, trainer: TrustRegionTrainer, label: str = "") -> None:
        self.trainer = trainer
        self.console = Console(stderr=True)
        self.label = label or f"{trainer.args.method.upper()} {trainer.args.sync}"
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.line = Text("", style="cyan", overflow="ellipsis", no_wrap=True)
        self.words = ""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.tokens.restart()
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        lines = self.trainer.opening_lines(state.max_steps)
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
        rule = self.trainer.rule
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


class Throughput:
    """Tokens that were trained on: `local` on this rank since the last log, `total` on all ranks before it."""

    def __init__(self) -> None:
        self.local = self.total = 0
        self._at = time.perf_counter()

    def restart(self) -> None:
        """Begin the clock anew, without what came before."""
        self._at = time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Leave out time in which nothing was trained on."""
        self._at += seconds

    def lap(self, summed: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, float]:
        """`(total, tokens per second since the last call)`; `summed` adds a tensor over ranks."""
        new, now = self.pending(summed), time.perf_counter()
        rate = new / max(now - self._at, 1e-9)
        self.local, self.total, self._at = 0, self.total + new, now
        return self.total, rate

    def pending(self, summed: Callable[[torch.Tensor], torch.Tensor]) -> int:
        """Tokens of all ranks since the last log."""
        return int(summed(torch.tensor([self.local])).item())
