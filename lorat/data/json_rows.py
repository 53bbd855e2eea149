"""Rows from JSON: one object a line, objects one after another however they are laid out, or one list of objects.

A file is a stream, read once a pass, and never whole. What is no table of rows (one object around the list, columns in
place of rows) is refused with the command that turns it into one: which of its keys are data is not for lorat to guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from ..errors import DataError
from .archives import packing_of
from .encodings import encoding_fault, lines, open_text
from .shapes import Row

BLOCK = 1 << 20  # characters read at a time
SPACE = re.compile(r"[ \t\r\n]*")
OPENERS = {None: "open", "gzip": "gzip.open", "bzip2": "bz2.open", "xz": "lzma.open", "lzma": "lzma.open"}
TURNS = {"role", "from"}  # keys of a message


def read_json(path: Path, shown: str) -> Iterator[tuple[int, Row]]:
    """Every row with its size in bytes of text. Raises `DataError` that names the line or the row."""
    first = last = None
    for number, (place, size, row) in enumerate(_objects(path, shown)):
        last = row
        if number == 0:
            first = (place, size, row)
            continue
        if first is not None:
            yield _row(*first, shown)
            first = None
        yield _row(place, size, row, shown)
    if first is not None:
        if isinstance(last, dict) and (fault := _no_rows(last, path, shown)):
            raise DataError(fault)
        yield _row(*first, shown)


def _row(place: str, size: int, value: Any, shown: str) -> tuple[int, Row]:
    if isinstance(value, dict):
        return size, value
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", type(None): "null"}
    raise DataError(f"{shown}: {place} is {names[type(value)]}, not an object with columns; correct or delete it.")


def _objects(path: Path, shown: str) -> Iterator[tuple[str, int, Any]]:
    """`(place, size, value)` of each value of a file, with the place in words."""
    with open_text(path, shown) as text:
        head = _first(text, path, shown)
    if head == "[":
        yield from _listed(path, shown)
        return
    seen = False
    for number, line in lines(path, shown):
        if line.isspace() or not line:
            continue
        try:
            value = _load(line.rstrip("\r\n"), f"{shown}: line {number}")
        except json.JSONDecodeError as error:
            if not seen and head == "{" and error.pos >= len(line.rstrip()):  # an object over several lines
                yield from _spread(path, shown)
                return
            raise DataError(_fault(shown, number, error)) from None
        seen = True
        yield f"line {number}", len(line), value
    if not seen:
        raise DataError(f"{shown} cannot be read: it is empty; give a file with rows.")


def _first(text: Any, path: Path, shown: str) -> str:
    """The first character that is not white space; "" for none."""
    try:
        while (char := text.read(1)) and char.isspace():
            pass
    except UnicodeDecodeError:
        raise DataError(encoding_fault(path, shown)) from None
    return char


def _once(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _load(text: str, place: str) -> Any:
    """`json.loads` that refuses what cannot be kept: a key given twice, half a character, nesting without end."""
    value, end = _decoded(text, SPACE.match(text).end(), place)  # type: ignore[union-attr]
    if rest := text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, text.index(rest[0], end))
    return value


def _decoded(text: str, start: int, place: str) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, start)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value, end
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(f"{place} holds {half}, half of a character, which is no text; correct or delete it.") from None
    except RecursionError:
        raise DataError(
            f"{place} is nested too deep to be read (over a thousand levels); correct or delete it."
        ) from None
    except ValueError as error:
        raise DataError(f"{place} is not usable: {error}; correct or delete it.") from None


def _fault(shown: str, first: int, error: json.JSONDecodeError) -> str:
    """`first`: the line of the file that the error's text begins in."""
    line = (error.doc.split("\n")[error.lineno - 1 :] or [""])[0]
    excerpt = line[max(0, error.colno - 50) :][:80]
    where = f"line {first + error.lineno - 1} is not valid JSON ({error.msg} at column {error.colno})"
    return f"{shown}: {where}: {excerpt!r}; correct or delete that line."


class _Text:
    """A window that moves over a text file: `at` is the place in `held`, `line` the line that `held` begins in."""

    def __init__(self, path: Path, shown: str) -> None:
        self.path, self.shown = path, shown
        self.file = open_text(path, shown)
        self.held, self.at, self.line, self.ended = "", 0, 1, False

    def more(self, size: int = 0) -> bool:
        """Reads on; whether there was more."""
        try:
            block = self.file.read(max(size, BLOCK))
        except UnicodeDecodeError:
            raise DataError(encoding_fault(self.path, self.shown)) from None
        self.line += self.held.count("\n", 0, self.at)
        self.held, self.at, self.ended = self.held[self.at :] + block, 0, not block
        return bool(block)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = SPACE.match(self.held, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ""

    def value(self, place: str) -> tuple[int, Any]:
        """The next value and its size."""
        while True:
            try:
                value, end = _decoded(self.held, self.at, f"{self.shown}: {place}")
            except json.JSONDecodeError as error:
                inside = error.pos + 64 < len(self.held) and not error.msg.startswith("Unterminated")
                if inside or self.ended or not self.more(len(self.held)):
                    self.fail(error)
                continue
            size, self.at = end - self.at, end
            return size, value

    def fail(self, error: json.JSONDecodeError) -> None:
        raise DataError(_fault(self.shown, self.line, error))

    def expected(self, what: str) -> None:
        self.fail(json.JSONDecodeError(f"Expecting {what}", self.held, self.at))


def _listed(path: Path, shown: str) -> Iterator[tuple[str, int, Any]]:
    """The items of one list."""
    text = _Text(path, shown)
    text.peek()
    text.at += 1
    number = 0
    if text.peek() == "]":
        raise DataError(f"{shown} cannot be read: its list is empty; give a file with rows.")
    while True:
        if not text.peek():
            text.expected("value")
        size, value = text.value(f"row {number}")
        yield f"row {number}", size, value
        number += 1
        if (char := text.peek()) not in (",", "]"):
            text.expected("',' delimiter")
        text.at += 1
        if char == "]":
            break
    if text.peek():
        text.expected("the end of the file after the list")


def _spread(path: Path, shown: str) -> Iterator[tuple[str, int, Any]]:
    """Values one after another, each over as many lines as it likes."""
    text, number = _Text(path, shown), 0
    while text.peek():
        size, value = text.value(f"row {number}")
        yield f"row {number}", size, value
        number += 1


def _are_turns(rows: Any) -> bool:
    """Whether a list of objects is a conversation, which one row may hold."""
    return all(isinstance(turn, dict) and {"content", "value"} & set(turn) for turn in rows)


def _no_rows(only: Row, path: Path, shown: str) -> str | None:
    """Why a file of one object is no table of rows, and what makes it one; `None` where it is one row."""
    kinds = {key: _kind(value) for key, value in only.items()}
    tables = [key for key, kind in kinds.items() if kind == "rows" and not _are_turns(only[key])]
    columns, sizes = set(kinds.values()), {len(v) for v in only.values() if isinstance(v, list | dict)}
    what = take = ""
    if {"columns", "data"} <= set(only) and isinstance(only["data"], list):
        what = f"columns and data apart ({len(only['data'])} rows)"
        take = "[dict(zip(d['columns'], r)) for r in d['data']]"
    elif len(tables) == 1 and not {"chosen", "rejected", "completion"} & set(only):
        what, take = f"one object whose key {tables[0]!r} holds the {len(only[tables[0]])} rows", f"d[{tables[0]!r}]"
    elif len(only) > 1 and columns == {"cells"} and len(sizes) == 1:
        what = f"columns of {sizes.pop()} cells in place of rows ({', '.join(list(only)[:6])})"
        take = "[dict(zip(d, r)) for r in zip(*d.values())]"
    elif columns == {"keyed cells"} and len({tuple(v) for v in only.values()}) == 1 and len(only) > 1:
        keys = list(next(iter(only.values())))
        if all(key.isdigit() for key in keys):
            what = f"columns of {len(keys)} cells in place of rows ({', '.join(list(only)[:6])})"
            take = "[dict(zip(d, r)) for r in zip(*(c.values() for c in d.values()))]"
    if not take and only and all(key.isdigit() for key in only) and all(isinstance(v, dict) for v in only.values()):
        what, take = f"one object with a key for each of {len(only)} rows", "list(d.values())"
    if not take:
        return None
    packed = packing_of(path)
    new = path.with_name(f"{path.name.split('.')[0]}-rows.json")
    if packed not in OPENERS:
        return f"{shown} holds {what}, and rows are needed: unpack it, and write its rows as JSONL, one object a line."
    opener = OPENERS[packed]
    code = f"import json{', ' + opener.split('.')[0] if packed else ''}; "
    code += f"d = json.load({opener}({str(path)!r}, 'rt', encoding='utf-8-sig')); "
    code += f"json.dump({take}, open({str(new)!r}, 'w'))"
    return (
        f"{shown} holds {what}, and rows are needed: a list of objects, or one object a line. Write them, and give "
        f"{new}:\n  python -c {quote(code)}"
    )


def _kind(value: Any) -> str:
    """What a value of a lone object can be: "rows", "cells" or "keyed cells"; messages are none of them."""
    if isinstance(value, list) and value:
        if all(isinstance(item, dict) for item in value):
            return "other" if any(TURNS & set(item) for item in value) else "rows"
        return "other" if any(isinstance(item, dict) for item in value) else "cells"
    if isinstance(value, dict) and value:
        return "keyed cells"
    return "other"
