"""Rows of Python values as a `datasets.Dataset`, each cell as it was written.

`datasets` infers a column's type block by block, so that one odd cell rewrites the others, or a block that differs from
the first one is refused. Here the whole file is looked at first: a column gets an Arrow type where every cell has that
type to the letter (texts; whole numbers; objects with the same keys in the same order), and else keeps each cell as JSON
text (`Written`), which gives the same Python value back. Costs a second pass over a file that is too large to hold.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.features.features import register_feature

from ..errors import DataError

HELD = 8 << 20  # bytes of text up to which rows are held in memory
CHUNK = 1000  # rows in one Arrow record batch

Row = dict[str, Any]
Shape = Any  # "null", "bool", "int", "float", "text", "any", ("list", Shape) or ("object", keys, Shapes)


@dataclass
class Written:
    """A feature whose cells are any JSON value, stored as JSON text. (`datasets.Json` decodes with `ujson`, which rounds
    numbers, and takes a text that is valid JSON for its value.)"""

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="Written", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that registering is experimental
    register_feature(Written, "Written")


def shape(value: Any) -> Shape:
    """What a JSON value is, down to its leaves."""
    if isinstance(value, str):
        return "text"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "any"
    if isinstance(value, float):
        return "float"
    if isinstance(value, dict):
        return ("object", tuple(value), tuple(map(shape, value.values()))) if value else "any"
    inner: Shape = "null"
    for item in value:
        inner = merged(inner, shape(item))
        if inner == "any":
            return "any"
    return ("list", inner)


def merged(a: Shape, b: Shape) -> Shape:
    """The shape that holds both to the letter; "any" where there is none."""
    if a == b or b == "null":
        return a
    if a == "null":
        return b
    if "any" in (a, b) or isinstance(a, str) or isinstance(b, str) or a[0] != b[0]:
        return "any"
    if a[0] == "list":
        inner = merged(a[1], b[1])
        return "any" if inner == "any" else ("list", inner)
    if a[1] != b[1]:
        return "any"
    parts = tuple(map(merged, a[2], b[2]))
    return "any" if "any" in parts else ("object", a[1], parts)


def feature(of: Shape) -> Any:
    """A shape as `datasets` has it."""
    simple = {"null": "null", "bool": "bool", "int": "int64", "float": "float64", "text": "string"}
    if of == "any":
        return Written()
    if isinstance(of, str):
        return Value(simple[of])
    if of[0] == "list":
        return List(feature(of[1]))
    return dict(zip(of[1], map(feature, of[2])))


Write = Callable[[Path], None]


def as_dataset(rows: Callable[[], Iterable[tuple[int, Row]]], store: Callable[[Write], Path], name: str) -> Dataset:
    """The rows that `rows()` yields, each with its size in bytes, as one dataset; a cell that a row lacks is null.

    `rows` is called again where they do not fit `HELD`, and `store` has them written to a file,
    in Arrow, and gives its path. `name`: for messages. Raises `DataError` for no rows.
    """
    shapes: dict[str, Shape] = {}
    held: list[Row] | None = []
    number = total = 0
    for number, (size, row) in enumerate(rows(), 1):  # noqa: B007
        for column, value in row.items():
            known = shapes.setdefault(column, "null")
            if known != "any":
                found = shape(value)
                if found != known:
                    shapes[column] = merged(known, found)
        total += size
        if held is not None:
            held.append(row)
            held = held if total <= HELD else None
    if not number:
        raise DataError(f"{name} cannot be read: it is empty; give a file with rows.")
    features = Features({column: feature(of) for column, of in shapes.items()})
    if held is not None:
        return Dataset(pa.Table.from_batches(_batches(held, features), features.arrow_schema))

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
            for batch in _batches((row for _, row in rows()), features):
                writer.write_batch(batch)

    return Dataset.from_file(str(store(write)))


def _batches(rows: Iterable[Row], features: Features) -> Iterator[pa.RecordBatch]:
    rows, schema = iter(rows), features.arrow_schema
    while chunk := list(islice(rows, CHUNK)):
        columns = []
        for column, of in features.items():
            cells = [row.get(column) for row in chunk]
            cells = list(map(of.encode_example, cells)) if isinstance(of, Written) else cells
            columns.append(pa.array(cells, schema.field(column).type))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
