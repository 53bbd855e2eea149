"""The one kind of error a user meets: what was given, why it cannot work, what to set instead.

Every error that a person can cause is a `LoratError`; the command prints its text without a
traceback and exits with status 2. Anything else that escapes is a bug in lorat.
"""

from __future__ import annotations


class LoratError(Exception):
    """An input or a state that cannot work. The text says what was given, why, and what to set instead."""


class ConfigError(LoratError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(LoratError, ValueError):
    """A dataset that cannot be read or holds nothing to learn from."""


class ModelError(LoratError, ValueError):
    """A model, tokenizer or adapter that cannot be used as asked."""


class CheckpointError(LoratError, RuntimeError):
    """A checkpoint that cannot be written, is torn, or does not belong to this run."""


class NonFiniteError(LoratError, RuntimeError):
    """A loss or gradient that is not a finite number; the run stopped before anything was poisoned."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
