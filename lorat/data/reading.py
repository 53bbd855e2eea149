"""Raw preference data from a file, a folder or the hub, as `datasets` reads it; a failure is diagnosed to the line.

Streaming datasets and remote code are deliberately left out.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..errors import DataError
from .formats import kind

SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion")


def load_preference_data(name: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """Read raw preference data from a local file, a local folder or the hub, as `datasets` reads it.

    Files: .json, .jsonl, .csv, .tsv, .parquet, each also with .gz; folders: `save_to_disk` or data files. A file is
    the split "train"; slices such as "train[:100]" work. Changed files are read again. Remote code never runs.
    Raises `DataError` that names the broken line, the nearest file names or the splits there are.
    """
    path = Path(name).expanduser()
    local = path.exists() or _suffix(path) in SUFFIXES or name.startswith((".", "/", "~"))
    if local and not path.exists():
        raise DataError(f"there is no file or folder {path}{_nearby(path)}; give a path that exists, or a hub id.")
    if path.is_file() and _suffix(path) not in SUFFIXES:
        raise DataError(f"{path} is of no type that can be read; give {', '.join(SUFFIXES)}, each also with .gz.")
    with quiet():
        try:
            if path.is_file():
                result = _read_file(path, split)
            elif any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
                result = _read_saved(path, split)
            else:
                result = datasets.load_dataset(str(path) if local else name, config_name, split=split)
            if local:
                result.data.validate(full=True)  # else text that is not UTF-8 only fails when its row is met
            return result
        except Exception as error:
            raise DataError(_diagnose(name, path, split, local, error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets`; what was set before is set again."""
    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path, split: str) -> Dataset:
    loader, options = SUFFIXES[_suffix(path)], {}
    if loader == "csv":  # text stays text: "007" is no number and "None" no missing value
        options = {"converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False}
        options["sep"] = "\t" if _suffix(path) == ".tsv" else ","
    if loader == "parquet" and path.suffix.lower() == ".gz":  # the one loader that does not unzip
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "data.parquet"
            with gzip.open(path) as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target)
            options = {"cache_dir": folder, "keep_in_memory": True}
            return datasets.load_dataset(loader, data_files={"train": str(plain)}, split=split, **options)
    return datasets.load_dataset(loader, data_files={"train": str(path)}, split=split, **options)


def _read_saved(path: Path, split: str) -> Dataset:
    saved = datasets.load_from_disk(str(path))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    spans = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(part) for key, part in parts.items()})
    pieces = [parts[s.splitname].select(range(len(parts[s.splitname]))[s.from_ : s.to]) for s in spans]
    return datasets.concatenate_datasets(pieces)


def _nearby(path: Path) -> str:
    """What lies in the nearest existing folder above a path, the most similar names first."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or _suffix(entry) in SUFFIXES)
    near = difflib.get_close_matches(path.name, names, 5, 0.4) or names[:10]
    return f" ({folder} holds {', '.join(near)})" if near else f" ({folder} holds no data files)"


def _diagnose(name: str, path: Path, split: str, local: bool, error: Exception) -> str:
    """Why reading failed, in words, down to the line where that can be found."""
    if known := re.search(r"Unknown split .*? one of (\[.*?\])", str(error)):
        return f"{name} has no split {split!r}; its splits are {known[1]}: set the split to one of them."
    if "Unrecognized instruction format" in str(error):
        return f"the split {split!r} cannot be read; write it as in train, train[:1000] or train[90%:]."
    files = [path] if path.is_file() else sorted(path.rglob("*")) if local else []
    for file in (f for f in files if _suffix(f) in SUFFIXES):
        if fault := _fault(file):
            return f"{file} cannot be read: {fault}"
    reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
    if local:
        return f"{name} cannot be read ({reason}); correct the file, or give it as JSONL, one object a line."
    return (
        f"{name} is no local file or folder{_nearby(path)}, and cannot be read from the hub ({reason}); check the "
        "name, the configuration and the network, or give a local file."
    )


def _fault(path: Path) -> str | None:
    """What is wrong with a file: empty, not UTF-8, or for JSON the first bad line or cell. `None`: nothing found."""
    data = (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb").read()
    if not data.strip():
        return "it is empty; give a file with rows."
    if SUFFIXES[_suffix(path)] != "json":
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"line {data[: error.start].count(10) + 1} is not UTF-8 text; save the file as UTF-8."
    rows: list[tuple[str, Any]] = []
    first = 1
    try:
        if text.lstrip().startswith("["):
            rows = [(f"row {i}", row) for i, row in enumerate(json.loads(text))]
        else:
            for first, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((f"line {first}", json.loads(line)))
    except json.JSONDecodeError as error:
        excerpt = error.doc.split("\n")[error.lineno - 1][max(0, error.colno - 50) :][:80]
        place = f"line {first + error.lineno - 1} is not valid JSON ({error.msg} at column {error.colno})"
        return f"{place}: {excerpt!r}; correct or delete that line."
    seen: dict[str, tuple[str, str]] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            return f"{place} is {kind(row)}, not an object with columns; correct or delete it."
        for column, cell in row.items():
            was, where = seen.setdefault(column, (kind(cell), place)) if cell is not None else (kind(cell), place)
            if kind(cell) != was:
                return f"{place}: '{column}' is {kind(cell)}, but {was} in {where}; use one type in a column."
    return None
