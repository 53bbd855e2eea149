"""What lorat writes: whole files in one step, and lines that are only ever appended.

A file written here is there whole, or what was there before is, whenever the process dies. Of a file of lines the line is
the unit: one that was torn is cut off when it is opened again, and what it held is computed again.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError


def put(path: Path, data: str | bytes) -> None:
    """Write a file in one step, text as UTF-8; it is on the disk when this returns. Raises `OSError`.

    A link is followed, permissions stay, and what is no file (a pipe, /dev/stdout) is written to as it is.
    """
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(raw)
        return
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".writing-{os.getpid()}-{zlib.crc32(path.name.encode()):x}")  # a name as long as fits
    try:
        with aside.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():
            shutil.copymode(path, aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def put_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, in one step; what JSON does not know becomes text. Raises `OSError`."""
    put(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a result file in one step, its folder made where it is missing. Raises `CheckpointError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, text)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be written ({error}); set --out to another place.") from error


class Lines:
    """A file of JSON objects, a line each, that is only appended to. `rows`: what it holds.

    A torn last line is cut off; `skipped` counts other lines that are no object, which stay. Each line is on the disk
    before `append` returns. Raises `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.skipped = path, 0
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        *lines, torn = data.split(b"\n")
        for line in filter(None, lines):
            self._read(line)
        if torn:
            skipped = self.skipped
            self._read(torn)
            if self.skipped > skipped:
                os.truncate(path, len(data) - len(torn))
                self.skipped, torn = skipped, b""
        self._file = path.open("ab")
        if torn:  # whole, but for its end
            self._write("\n")

    def _read(self, line: bytes) -> None:
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            self.rows.append(row)
        else:
            self.skipped += 1

    def _write(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def append(self, *rows: dict[str, Any]) -> None:
        self._write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows.extend(rows)

    def close(self) -> None:
        self._file.close()


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON objects to a file of lines. Raises `OSError`."""
    lines = Lines(path)
    try:
        lines.append(*rows)
    finally:
        lines.close()


class Pieces:
    """Finished pieces of a long computation, so that a killed process goes on where it stopped; `Lines` underneath.

    `pieces[key]`: a JSON value computed before; `pieces[key] = value` writes it through to the disk. The first line says
    what the pieces belong to, `belongs`: every setting that decides the values. Raises `CheckpointError` where the file
    belongs to other settings, naming them, or cannot be written.
    """

    def __init__(self, path: Path, belongs: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        belongs = json.loads(json.dumps(belongs))
        try:
            self._lines = Lines(path)
            changed = _differs(self._lines, belongs)
            if changed and not overwrite:
                self._lines.close()
                raise CheckpointError(
                    f"{str(path)!r} holds unfinished work with other settings ({'; '.join(changed[:6])}), and the two "
                    "cannot be mixed. Set them back to go on with it, or give --overwrite to drop it."
                )
            if changed:
                self._lines.close()
                path.unlink()
                self._lines = Lines(path)
            if not self._lines.rows:
                self._lines.append(belongs)
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} cannot be written ({error}); set --out to another place.") from error
        for row in self._lines.rows[1:]:
            self.done.update(row)

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __getitem__(self, key: str) -> Any:
        return self.done[key]

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            self._lines.append({key: value})
        except OSError as error:
            raise CheckpointError(
                f"{str(self.path)!r} cannot be written ({error}); free space there, then run the same command to go on."
            ) from error
        self.done[key] = value

    def remove(self) -> None:
        """Forget the pieces: the result that they led to is written."""
        self._lines.close()
        self.path.unlink(missing_ok=True)


def _differs(lines: Lines, belongs: dict[str, Any]) -> list[str]:
    """In words, what the pieces in a file belong to that `belongs` does not say; nothing for an empty file."""
    if not lines.rows and not lines.skipped:
        return []
    if not lines.rows:
        return ["its first line is not lorat's"]
    before = lines.rows[0]
    names = [k for k in {**before, **belongs} if before.get(k) != belongs.get(k)]
    return [f"{k}: {before.get(k)!r} then, {belongs.get(k)!r} now" for k in names]


def pack_floats(x: Tensor) -> str:
    """(n,) float32 as text, to the bit."""
    return base64.b64encode(x.detach().float().cpu().contiguous().numpy().tobytes()).decode()


def unpack_floats(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) if text else torch.zeros(0)
