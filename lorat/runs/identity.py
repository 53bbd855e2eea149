"""What makes a run that run: every setting and datum that decides its trajectory, so that a resume can be checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.prepare import digest
from ..errors import CheckpointError


def run_identity(settings: Mapping[str, Any], train_dataset: Any) -> dict[str, Any]:
    """`settings`, which decide a run's trajectory, and its tokenised data's size and SHA-256, as JSON has them."""
    data = {}
    if train_dataset is not None:
        data = {"train_examples": len(train_dataset), "train_sha256": digest(train_dataset)}
    return json.loads(json.dumps({**settings, **data}, default=str))


def check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` listing every setting that would bend a resumed run's trajectory."""
    changed = [f"{k}: {saved[k]!r} then, {now[k]!r} now" for k in now if k in saved and saved[k] != now[k]]
    if changed:
        lines = "\n".join(f"  - {line}" for line in changed)
        raise CheckpointError(
            f"{str(folder)!r} belongs to a run with other settings, so resuming would be neither that run nor a new "
            f"one:\n{lines}\nSet them back, or start a new run in another output_dir, with policy_adapter: {folder} and "
            f"ref_adapter: {folder / 'ref'}."
        )
