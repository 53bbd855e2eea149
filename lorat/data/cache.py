"""What was read and prepared before, kept on disk by what it was made from.

An entry is a folder under `root()` whose name is a hash of everything that decides what is in it; it is written aside,
sealed with the size and SHA-256 of its files, and renamed into place, so that a torn one is never used: what does not
agree with its seal is thrown away and made again. Arrow and JSON only; nothing in it is ever executed. Entries that
nobody used for `KEPT_DAYS` go when another is written. Where the folder cannot be written, work goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

KEPT_DAYS = 30
SEAL = "sealed.json"
_temporary: list[tempfile.TemporaryDirectory] = []  # until the process ends, where the cache cannot be written


def root() -> Path:
    """The folder of all entries: beside what `datasets` keeps (HF_DATASETS_CACHE, or under HF_HOME)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lorat"


def key(kind: str, *parts: Any) -> str:
    """The name of an entry that is decided by `parts` (JSON values) and by the code and libraries that make it."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    libraries = [version(name) for name in ("datasets", "transformers", "tokenizers", "pyarrow")]
    whole = json.dumps([kind, code.hexdigest(), libraries, parts], sort_keys=True)
    return f"{kind}-{hashlib.sha256(whole.encode()).hexdigest()[:40]}"


def find(name: str) -> Path | None:
    """The folder of a whole entry, or None. One that is not what was sealed is deleted."""
    folder = root() / name
    try:
        seal = json.loads((folder / SEAL).read_text())
        if all([file_state(folder / file) == state for file, state in seal.items()]):
            os.utime(folder)
            return folder
    except (OSError, ValueError, AttributeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def keep(name: str, write: Callable[[Path], Any]) -> Path:
    """Let `write(folder)` make the files of an entry; returns the folder that they are in then."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        _forget_old()
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=root()))
    except OSError as error:
        logging.getLogger(__name__).warning("prepared data is not kept: %s cannot be written (%s)", root(), error)
        _temporary.append(tempfile.TemporaryDirectory(prefix="lorat-"))
        write(Path(_temporary[-1].name))
        return Path(_temporary[-1].name)
    try:
        write(aside)
        seal = {file.name: file_state(file) for file in sorted(aside.iterdir())}
        (aside / SEAL).write_text(json.dumps(seal))
        try:
            aside.replace(root() / name)
        except OSError:  # another process was faster
            if found := find(name):
                return found
            aside.replace(root() / name)
        return root() / name
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def file_state(path: Path) -> list[Any]:
    """[size, SHA-256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _forget_old() -> None:
    before = time.time() - KEPT_DAYS * 86400
    for folder in root().iterdir():
        if folder.stat().st_mtime < before:
            shutil.rmtree(folder, ignore_errors=True)


def content(dataset: Dataset) -> str:
    """SHA-256 of a dataset's columns and cells, however they are laid out in memory or in files."""
    total = hashlib.sha256(repr(sorted(dataset.features.items())).encode())

    class Sink:
        closed = False

        def write(self, data: Any) -> int:
            total.update(data)
            return len(data)

        def flush(self) -> None:
            pass

    for table in dataset.with_format("arrow").iter(10_000):
        table = table.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(pa.PythonFile(Sink(), mode="w"), table.schema) as writer:
            writer.write_table(table)
    return total.hexdigest()


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of what a tokenizer saves, its chat template too; None where it cannot be saved."""
    total = hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.chat_template!r}".encode())
    with tempfile.TemporaryDirectory(prefix="lorat-") as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception:  # a tokenizer of its own making may fail in any way, and can do without a cache
            return None
        for file in _files(Path(folder)):
            data = file.read_bytes()
            if file.name == "tokenizer_config.json":  # where it was loaded from does not matter
                data = json.dumps({k: v for k, v in json.loads(data).items() if k != "name_or_path"}).encode()
            total.update(f"{file.name} {len(data)} ".encode() + data)
    return total.hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
