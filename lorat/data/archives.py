"""The bytes of a data file, whatever it is packed in, and in words what stands in the way of them.

What a file is packed in is told by its first bytes and not by its name, so that a wrong name does no harm. Reading is a
stream: no file is unpacked to disk or held in memory whole. Left out: archives of several files of data, and .tar.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ..errors import DataError, first_line

SUFFIXES = {
    **{".json": "json", ".jsonl": "json", ".ndjson": "json"},
    **{".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"},
}
PACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".zip")
READABLE = f"{', '.join(SUFFIXES)}, each also packed ({', '.join(PACKED)})"
# How a packed file begins -> what it is.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
BROKEN = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError)


def suffix(path: Path) -> str:
    """The ending that says what is inside: ".jsonl" of x.jsonl.gz."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def packing(head: bytes) -> str | None:
    """What a file that begins so is packed in; `None`: in nothing."""
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def packing_of(path: Path) -> str | None:
    """What an existing file is packed in."""
    with path.open("rb") as file:
        return packing(file.read(16))


def open_bytes(path: Path, shown: str | None = None) -> IO[bytes]:
    """A stream of what the file holds, unpacked. Raises `DataError`, here or while it is read.

    `shown`: the file's name for people, where it lies under another.
    """
    shown = shown or str(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{shown} cannot be read ({first_line(error)}); check its permissions.") from error
    if fault := _no_data(head, shown):
        raise DataError(fault)
    kind = packing(head)
    openers: dict[str, Callable[[], Any]] = {
        "gzip": partial(gzip.open, path),
        "bzip2": partial(bz2.open, path),
        "xz": partial(lzma.open, path),
        "lzma": partial(lzma.open, path),
        "zstd": partial(pa.input_stream, str(path), compression="zstd"),
        "zip": partial(_member, path, shown),
    }
    if kind is None:
        named = next((p for p in PACKED if path.name.lower().endswith(p)), None)
        if named and not looks_like_text(head):
            raise DataError(
                f"{shown} is named {named}, but what is in it is not packed so (it begins with {head[:6]!r}), nor is it "
                "text: the file is damaged. Download or make it again."
            )
        return path.open("rb")
    with _said(shown, kind):
        return io.BufferedReader(_Guarded(openers[kind](), shown, kind), 1 << 16)


def looks_like_text(head: bytes) -> bool:
    """Whether the first bytes of a file can be text: no control bytes beyond white space."""
    return not any(byte < 32 and byte not in (9, 10, 12, 13) for byte in head)


def _no_data(head: bytes, shown: str) -> str | None:
    """What a file is that holds no data at all, by its first bytes."""
    if not head:
        return f"{shown} cannot be read: it is empty; give a file with rows."
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = next(
            (line[5:].decode("ascii", "replace") for line in head.splitlines() if line.startswith(b"size ")), ""
        )
        size = f" of {int(size):,} bytes" if size.isdigit() else ""
        return (
            f"{shown} is a Git LFS pointer, not the data{size} that it stands for: the repository was cloned without "
            "Git LFS. Run `git lfs pull` in it (once before: `git lfs install`), or give the hub id of the dataset."
        )
    if b"/annex/objects/" in head[:200]:
        return f"{shown} is a git-annex pointer, not the data that it stands for. Run `git annex get` on it."
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return (
            f"{shown} is a web page, not data: a page about the file, or a login page, was saved in its place. "
            "Download the file itself (on the hub: `hf download`, or the address with /resolve/ in place of /blob/)."
        )
    return None


def _member(path: Path, shown: str) -> IO[bytes]:
    """The one file of data in a .zip."""
    archive = zipfile.ZipFile(path)
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
    data = [n for n in names if suffix(Path(n)) in SUFFIXES] or names
    if len(data) != 1:
        what = f"{len(data)} files ({', '.join(data[:5])}{' …' * (len(data) > 5)})" if data else "no file"
        advice = "Unpack it and give one of them, or the folder." if data else "Make it again, with the data in it."
        raise DataError(f"{shown} is a .zip that holds {what}, and one file of data is read from it. {advice}")
    if archive.getinfo(data[0]).flag_bits & 1:
        raise DataError(
            f"{shown} is a .zip with a password, which lorat cannot ask for; unpack it and give what is in it."
        )
    return archive.open(data[0])


class _said:
    """Inside, a broken archive is said in words (`DataError`)."""

    def __init__(self, shown: str, kind: str) -> None:
        self.shown, self.kind = shown, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BROKEN) and not isinstance(error, DataError):
            why = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(
                f"{self.shown} is a broken {self.kind} archive: it is cut short or damaged ({why}). Download or make it "
                "again; nothing was read from it."
            ) from error


class _Guarded(io.RawIOBase):
    """A stream whose failures are said in words."""

    def __init__(self, inner: Any, shown: str, kind: str) -> None:
        super().__init__()
        self.inner, self.shown, self.kind = inner, shown, kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _said(self.shown, self.kind):
            data = self.inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        with suppress(*BROKEN):
            self.inner.close()
        super().close()
