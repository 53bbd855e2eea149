"""Lines of text from bytes that should be UTF-8, and in words what they are where they are not.

Nothing is guessed: text in another encoding is refused with the command that converts it, since a wrong guess would
train on wrong letters.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import DataError
from .archives import looks_like_text, open_bytes, packing_of

WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def open_text(path: Path, shown: str) -> IO[str]:
    """The file as UTF-8 text, a byte order mark left off, line ends as they are. Raises `DataError`, here or later."""
    stream = open_bytes(path, shown)
    head = stream.read(4096)
    if fault := _wide(head, path, shown):
        raise DataError(fault)
    stream.close()
    return io.TextIOWrapper(open_bytes(path, shown), encoding="utf-8-sig", newline="")


def lines(path: Path, shown: str) -> Iterator[tuple[int, str]]:
    """`(number from 1, line)` of a text file; only a line feed ends a line. Raises `DataError`."""
    open_text(path, shown).close()
    with open_bytes(path, shown) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(encoding_fault(path, shown)) from None


def encoding_fault(path: Path, shown: str) -> str:
    """What is wrong with a file that is not UTF-8: which line, and how to convert it."""
    others = other_lines = number = 0
    windows, bad = True, (0, b"")
    with open_bytes(path, shown) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                others += not raw.decode("utf-8").isascii()
                continue
            except UnicodeDecodeError as error:
                byte = raw[error.start : error.start + 1]
            if not looks_like_text(raw):
                return (
                    f"{shown}: line {number} holds bytes that are no text; the file is damaged, or is not text at all."
                )
            bad = bad if bad[0] else (number, byte)
            other_lines += 1
            try:
                raw.decode("cp1252")
            except UnicodeDecodeError:
                windows = False
    place = f"{shown}: line {bad[0]} is not UTF-8 text (it holds the byte 0x{bad[1].hex().upper()})"
    if others:
        many = f"{others} other line{'s are' if others > 1 else ' is'}"
        return f"{place}, while {many} UTF-8 beyond ASCII: correct or delete what is broken ({other_lines} in all)."
    encoding = "WINDOWS-1252" if windows else "ISO-8859-1"
    letter = bad[1].decode(encoding)
    return f"{place}; in {encoding} (Latin-1) that is {letter!r}. If so, save it as UTF-8: {_iconv(path, encoding)}"


def _wide(head: bytes, path: Path, shown: str) -> str | None:
    """Why text in two or four bytes a character is refused; `None` for other bytes."""
    name = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    if name is None and len(head) > 3 and (half := len(head) // 2):
        even, odd = head[0::2].count(0), head[1::2].count(0)
        if max(even, odd) > half // 2 and min(even, odd) < half // 8:  # ASCII in two bytes a letter, without a mark
            name = "UTF-16BE" if even > odd else "UTF-16LE"
    if name is None:
        return None
    return (
        f"{shown} is {name} text, as Excel and Windows write it, and not UTF-8; save it as UTF-8: {_iconv(path, name)}"
    )


def _iconv(path: Path, encoding: str) -> str:
    from shlex import quote

    if packing_of(path):
        return f"unpack it, then iconv -f {encoding} -t UTF-8 FILE > NEW."
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {quote(str(path))} > {quote(str(new))}"
