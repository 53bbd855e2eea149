"""Rows from CSV and TSV: every cell is text, as it stands in the file.

A column becomes one of numbers or of booleans only where its whole file says so: every cell that is not empty is written
as Python writes such a value, so that nothing but quotes is lost ("007" stays text), and the column's name is not one of
a text. Rows of another length than the header, and quotes that do not close, are refused with their line.
"""

from __future__ import annotations

import ast
import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from ..errors import DataError
from .encodings import encoding_fault, open_text
from .shapes import Row

TEXT_COLUMNS = {
    *("prompt", "chosen", "rejected", "completion", "question", "instruction", "input", "query", "system", "context"),
    *("response", "output", "answer", "accepted", "preferred", "dispreferred", "positive", "negative", "history"),
    *("chosen_response", "rejected_response", "response_0", "response_1", "text", "content"),
}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
BOOLEANS = {"true": True, "false": False, "True": True, "False": False, "TRUE": True, "FALSE": False}
MESSAGE_COLUMNS = {"prompt", "chosen", "rejected", "completion", "messages", "conversation", "conversations", "history"}
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
Cell = Callable[[str], Any]


def read_csv(path: Path, shown: str, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Every row with its size in bytes of text. Raises `DataError` that names the line."""
    how = _columns(path, shown, delimiter)
    for size, cells in _cells(path, shown, delimiter):
        yield size, {column: of(cell) for (column, of), cell in zip(how.items(), cells)}


def _columns(path: Path, shown: str, delimiter: str) -> dict[str, Cell]:
    """How each column's cells are taken, from a pass over all of them."""
    rows = _cells(path, shown, delimiter, header=True)
    header = next(rows)[1]
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # as pandas has it
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{shown}: the columns {twice} stand twice in its header; give each a name of its own.")
    if len(names) == 1 and (fault := _other_delimiter(path, shown, names[0], delimiter)):
        raise DataError(fault)
    fits: dict[str, set[str]] = {
        name: set() if name.lower() in TEXT_COLUMNS else {"bool", "int", "float"} for name in names
    }
    filled: set[str] = set()
    for _, cells in rows:
        for name, cell in zip(names, cells):
            if not cell:
                continue
            if name not in filled and name in MESSAGE_COLUMNS and MESSAGES.match(cell):
                raise DataError(_messages(path, shown, name, cell))
            filled.add(name)
            if fits[name]:
                fits[name] = {kind for kind in fits[name] if _is(kind, cell)}
    takes: dict[str, Cell] = {"bool": lambda c: BOOLEANS[c], "int": int, "float": float}
    found: dict[str, Cell] = {}
    for name in names:
        kind = next((k for k in ("bool", "int", "float") if k in fits[name] and name in filled), None)
        found[name] = _or_null(takes[kind]) if kind else str
    return found


def _or_null(of: Cell) -> Cell:
    return lambda cell: of(cell) if cell else None


def _is(kind: str, cell: str) -> bool:
    """Whether a cell is written as Python writes a value of that kind."""
    try:
        return cell in BOOLEANS if kind == "bool" else str({"int": int, "float": float}[kind](cell)) == cell
    except (ValueError, OverflowError):
        return False


def _cells(path: Path, shown: str, delimiter: str, header: bool = False) -> Iterator[tuple[int, list[str]]]:
    """`(size, cells)` of each row, of the header too if asked."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(path, shown) as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        begun, names = 1, None
        try:
            for cells in reader:
                first, begun = begun, reader.line_num + 1
                if not cells:
                    continue  # an empty line
                if names is None:
                    names = cells
                    if header:
                        yield 0, cells
                    continue
                if len(cells) != len(names):
                    if len(names) == 1 and (fault := _other_delimiter(path, shown, names[0], delimiter)):
                        raise DataError(fault)
                    raise DataError(
                        f"{shown}: line {first} has {len(cells)} cells, but the header has {len(names)} columns; correct "
                        "or delete it (a cell that holds the separator or a line break must stand in double quotes)."
                    )
                yield sum(map(len, cells)), cells
        except UnicodeDecodeError:
            raise DataError(encoding_fault(path, shown)) from None
        except csv.Error as error:
            raise DataError(
                f"{shown}: the row that begins in line {begun} cannot be read ({error}): a cell in double quotes must end "
                "in one, and a double quote inside it is written twice; correct or delete it."
            ) from None
        if names is None:
            raise DataError(f"{shown} cannot be read: it is empty; give a file with rows.")


def _other_delimiter(path: Path, shown: str, header: str, delimiter: str) -> str | None:
    """What a table of a single column is separated by instead; `None`: by nothing."""
    if header.lower().startswith("sep=") and len(header) == 5:  # a line that Excel understands
        other = header[4]
    else:
        other = max((d for d in DELIMITERS if d != delimiter), key=header.count)
        if not header.count(other):
            return None
    new = path.with_name(f"{path.name.split('.')[0]}-commas.csv")
    told = f"{shown} is separated by {DELIMITERS.get(other, repr(other))}, not by {DELIMITERS[delimiter]}"
    if other in (",", "\t") and not header.lower().startswith("sep="):
        ending = ".csv" if other == "," else ".tsv"
        base, _, packed = path.name.partition(".tsv" if other == "," else ".csv")
        return f"{told}: rename it to {base}{ending}{packed}."
    skip = "next(f); " if header.lower().startswith("sep=") else ""
    code = f"import csv; f = open({str(path)!r}, encoding='utf-8-sig', newline=''); {skip}"
    code += f"csv.writer(open({str(new)!r}, 'w', encoding='utf-8', newline='')).writerows(csv.reader(f, delimiter={other!r}))"
    unpacked = "" if path.name.lower().endswith((".csv", ".tsv")) else "unpack it first, then "
    return f"{told} (as Excel writes in many countries): {unpacked}write it with commas, and give {new}:\n  python -c {quote(code)}"


def _messages(path: Path, shown: str, column: str, cell: str) -> str:
    """What to do about messages that were written as text: the command that reads them back, where Python can."""
    told = (
        f"{shown}: the cells of {column!r} look like messages written as text ({cell[:40]!r} …), as pandas does when it "
        "writes a CSV, and would be trained as characters. Write the table as JSONL where it was made "
        "(df.to_json('x.jsonl', orient='records', lines=True))"
    )
    try:
        ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return f"{told}."
    new = path.with_name(f"{path.name.split('.')[0]}.jsonl")
    if cell[:2] != "[{" or not path.name.lower().endswith(".csv") or new.exists():
        return f"{told}."
    code = f"import ast, csv, json; rows = csv.DictReader(open({str(path)!r}, encoding='utf-8-sig', newline='')); "
    code += f"open({str(new)!r}, 'w').writelines(json.dumps({{k: ast.literal_eval(c) if c[:2] == '[{{' else c "
    code += "for k, c in r.items()}) + '\\n' for r in rows)"
    return f"{told}, or turn it back, and give {new}:\n  python -c {quote(code)}"
