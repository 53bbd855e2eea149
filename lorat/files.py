"""Finished pieces of a long computation, one JSON line each, so that a killed process goes on where it stopped.

The first line says what the pieces belong to; pieces of anything else are refused, never mixed. A line is the unit: one
that was torn when the process died is cut off, and its piece is computed again. Costs a flush to the disk a piece.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError


class Pieces:
    """`pieces[key]`: a JSON value computed before; `pieces[key] = value` writes it through to the disk.

    `belongs`: every setting that decides the values, as JSON has them. Raises `CheckpointError` where the file belongs
    to other settings, naming them, or cannot be written.
    """

    def __init__(self, path: Path, belongs: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        belongs = json.loads(json.dumps(belongs))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [] if overwrite and self._differs(belongs) else self._whole_lines()
            if lines:
                if changed := self._differs(belongs):
                    raise CheckpointError(
                        f"{str(path)!r} holds unfinished work with other settings ({'; '.join(changed[:6])}), and the two "
                        "cannot be mixed. Set them back to go on with it, or give --overwrite to drop it."
                    )
                self.done = {k: v for line in lines[1:] for k, v in json.loads(line).items()}
            self._file = path.open("a" if lines else "w")
            if not lines:
                self._write(belongs)
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} cannot be written ({error}); set --out to another place.") from error

    def _whole_lines(self) -> list[str]:
        """The lines that were written whole; what follows them is cut off."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        return data[:whole].decode().splitlines()

    def _differs(self, belongs: dict[str, Any]) -> list[str]:
        lines = self._whole_lines()
        if not lines:
            return []
        try:
            before = dict(json.loads(lines[0]))
        except (ValueError, TypeError):
            return ["its first line is not lorat's"]
        names = [k for k in {**before, **belongs} if before.get(k) != belongs.get(k)]
        return [f"{k}: {before.get(k)!r} then, {belongs.get(k)!r} now" for k in names]

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __getitem__(self, key: str) -> Any:
        return self.done[key]

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            self._write({key: value})
        except OSError as error:
            raise CheckpointError(
                f"{str(self.path)!r} cannot be written ({error}); free space there, then run the same command to go on."
            ) from error
        self.done[key] = value

    def remove(self) -> None:
        """Forget the pieces: the result that they led to is written."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a result file in one step: it is there whole, or what was there before is. Raises `CheckpointError`."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be written ({error}); set --out to another place.") from error


def pack_floats(x: Tensor) -> str:
    """(n,) float32 as text, to the bit."""
    return base64.b64encode(x.detach().float().cpu().contiguous().numpy().tobytes()).decode()


def unpack_floats(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) if text else torch.zeros(0)
