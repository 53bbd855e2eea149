"""Raw preference data from a file, several files, a folder or the hub, with every cell as it was written.

`datasets` finds the files of a folder or a hub repository, its splits and configurations, and reads Parquet and Arrow,
which carry their types. JSON and CSV, which do not, are read by lorat (`shapes.py` says why). A failure is diagnosed to
the line. Streaming datasets and remote code are deliberately left out.
"""

from __future__ import annotations

import difflib
import glob
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..errors import DataError, first_line
from . import cache
from .archives import READABLE, SUFFIXES, open_bytes, packing_of, suffix
from .csv_rows import read_csv
from .json_rows import read_json
from .shapes import Row, as_dataset

WILD = re.compile(r"[*?\[]")
SEPARATORS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class File:
    """A file of data: where it lies, its name for people, and how it is read (a value of `SUFFIXES`)."""

    path: Path
    shown: str
    kind: str


def load_preference_data(name: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """Read raw preference data from local files, a local folder or the hub.

    Files: those of `READABLE`; `name` may be a pattern (data/*.jsonl, data/**/*.parquet), whose files make one dataset;
    folders: `save_to_disk` or data files. A file is the split "train"; slices such as "train[:100]" work. Changed files
    are read again. Remote code never runs. Raises `DataError` that names the broken line, the nearest file names or the
    splits there are.
    """
    path = Path(name).expanduser()
    if "://" in name:
        raise DataError(
            f"{name} is an address; download the file and give its path, or give the hub id alone (org/name)."
        )
    if WILD.search(name) and not path.exists():
        return _split({"train": partial(_read, _matching(path))}, split, name)
    local = path.exists() or suffix(path) in SUFFIXES or name.startswith((".", "/", "~"))
    if local and not path.exists():
        raise DataError(f"there is no file or folder {path}{_nearby(path)}; give a path that exists, or a hub id.")
    if path.is_file():
        if config_name:
            raise DataError(
                f"{path} is a file and has no configurations; remove {config_name!r} (dataset_config_name)."
            )
        return _split({"train": partial(_read, [_file(path)])}, split, name)
    with quiet():
        try:
            if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(str(path))
                parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
                return _split({key: partial(_as_it_is, part) for key, part in parts.items()}, split, name)
            return _repository(str(path) if local else name, config_name, split, local)
        except DataError:
            raise
        except Exception as error:
            raise DataError(_diagnose(name, path, split, config_name, local, error)) from error


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


def _file(path: Path, shown: str | None = None) -> File:
    named = shown or str(path)
    if suffix(Path(named)) not in SUFFIXES:
        raise DataError(f"{named} is of no type that can be read; give {READABLE}.")
    return File(path, named, SUFFIXES[suffix(Path(named))])


def _matching(pattern: Path) -> list[File]:
    found = [Path(p) for p in sorted(glob.glob(str(pattern), recursive=True)) if Path(p).is_file()]
    files = [_file(path) for path in found if suffix(path) in SUFFIXES]
    if not files:
        others = f" (it fits {', '.join(p.name for p in found[:5])})" if found else ""
        raise DataError(f"no file of data fits {pattern}{others}; give a pattern that fits {READABLE}.")
    return files


def _as_it_is(dataset: Dataset) -> Dataset:
    return dataset


def _read(files: list[File]) -> Dataset:
    """Files of one kind as one dataset. Raises `DataError`."""
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        names = ", ".join(f.shown for f in {f.kind: f for f in files}.values())
        raise DataError(f"files of different kinds ({names}) make no one dataset; name one kind, data/*.jsonl, say.")
    kind = kinds.pop()
    if kind == "parquet":
        return _parquet(files)

    def rows() -> Iterator[tuple[int, Row]]:
        for file in files:
            yield from _rows(file)

    def store(write: Callable[[Path], None]) -> Path:
        return cache.keep(name, lambda folder: write(folder / "rows.arrow")) / "rows.arrow"

    for file in files:
        open_bytes(file.path, file.shown).close()  # what is no file of data is said before it is hashed
    name = cache.key("read", [(kind, cache.file_state(file.path)) for file in files])
    if found := cache.find(name):
        return Dataset.from_file(str(found / "rows.arrow"))
    return as_dataset(rows, store, files[0].shown if len(files) == 1 else f"{files[0].shown} …")


def _rows(file: File) -> Iterator[tuple[int, Row]]:
    """The rows of a JSON or CSV file with their sizes. Raises `DataError`; of a packed file, about its packing first."""
    try:
        if file.kind == "json":
            yield from read_json(file.path, file.shown)
        else:
            yield from read_csv(file.path, file.shown, SEPARATORS[file.kind])
    except DataError as error:
        packed = packing_of(file.path)
        if not packed or "correct or delete" not in str(error):
            raise
        with open_bytes(file.path, file.shown) as stream:  # what is damaged may fail as text before it fails as archive
            while stream.read(1 << 20):
                pass
        raise DataError(f"{error} (Or the {packed} archive is damaged: make it again.)") from None


def _parquet(files: list[File]) -> Dataset:
    """Parquet files through `datasets`; packed ones are unpacked for it, since they are read from their end."""
    with quiet(), tempfile.TemporaryDirectory(prefix="lorat-") as folder:
        paths, options = [], {}
        for number, file in enumerate(files):
            with open_bytes(file.path, file.shown) as source:
                paths.append(str(file.path))
                if packing_of(file.path):
                    paths[-1] = str(Path(folder) / f"{number}.parquet")
                    options = {"cache_dir": folder, "keep_in_memory": True}
                    with open(paths[-1], "wb") as target:
                        shutil.copyfileobj(source, target)
                elif source.read(4) != b"PAR1":
                    raise DataError(f"{file.shown} is no Parquet file (it does not begin with PAR1); make it again.")
        try:
            result = datasets.load_dataset("parquet", data_files={"train": paths}, split="train", **options)
            result.data.validate(full=True)  # else text that is not UTF-8 only fails when its row is met
            return result
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            names = files[0].shown if len(files) == 1 else f"{files[0].shown} … {files[-1].shown}"
            raise DataError(
                f"{names} cannot be read as Parquet ({reason}): cut short, damaged, or of different columns. Make it "
                "again, or give the files one by one."
            ) from error


def _split(parts: Mapping[str, Callable[[], Dataset]], split: str, name: str) -> Dataset:
    """The rows that `split` asks for; a part is read only where it takes part."""
    read: dict[str, Dataset] = {}

    class Lengths(dict):
        def __getitem__(self, key: str) -> int:
            read.setdefault(key, parts[key]())
            return len(read[key])

    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(Lengths.fromkeys(parts))
    except DataError:
        raise
    except (ValueError, AssertionError) as error:
        raise DataError(_no_split(name, split, list(parts), error)) from error
    pieces = []
    for span in spans:
        part = read[span.splitname]
        whole = (span.from_, span.to) == (0, len(part))
        pieces.append(part if whole else part.select(range(len(part))[span.from_ : span.to]))
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _no_split(name: str, split: str, known: list[str], error: Exception) -> str:
    if "Unknown split" in str(error):
        return f"{name} has no split {split!r}; its splits are {known}: set the split to one of them."
    return f"the split {split!r} cannot be read; write it as in train, train[:1000] or train[90%:]."


def _repository(name: str, config_name: str | None, split: str, local: bool) -> Dataset:
    """A folder or a hub repository, whose files `datasets` finds; those of the hub once more without a network."""
    known = cache.key("hub", name, config_name)
    try:
        builder = datasets.load_dataset_builder(name, config_name)
    except Exception as error:
        if local or not (found := _remembered(known)):
            raise
        log = logging.getLogger(__name__)
        log.warning("%s: the hub was not reached (%s); taken as it was when it was", name, first_line(error))
        return _split({key: partial(_read, files) for key, files in found.items()}, split, name)
    if (parts := _own(builder)) is None:
        result = datasets.load_dataset(name, config_name, split=split)
        if local:
            result.data.validate(full=True)
        return result
    if local:
        read = {file.path.resolve() for files in parts.values() for file in files}
        unread = [p for p in _data_files(Path(name)) if p.resolve() not in read]
        if unread and not config_name:
            names = ", ".join(str(p.relative_to(name)) for p in unread[:5])
            logging.getLogger(__name__).warning("%s: not read: %s%s", name, names, " …" * (len(unread) > 5))
    else:
        _remember(known, parts)
    return _split({key: partial(_read, files) for key, files in parts.items()}, split, name)


def _remember(known: str, parts: Mapping[str, list[File]]) -> None:
    """Keep where the files of a hub repository were put on this machine."""
    text = json.dumps({key: [(str(f.path), f.shown, f.kind) for f in files] for key, files in parts.items()})
    found = cache.find(known)
    if found and (found / "files.json").read_text() != text:
        shutil.rmtree(found)
        found = None
    if not found:
        cache.keep(known, lambda folder: (folder / "files.json").write_text(text))


def _remembered(known: str) -> dict[str, list[File]] | None:
    """The files that were kept, where all of them are still there."""
    if not (found := cache.find(known)):
        return None
    kept = json.loads((found / "files.json").read_text())
    parts = {key: [File(Path(path), shown, kind) for path, shown, kind in files] for key, files in kept.items()}
    return parts if all(file.path.is_file() for files in parts.values() for file in files) else None


def _own(builder: Any) -> dict[str, list[File]] | None:
    """The files of each split, where they are JSON or CSV with no options but the separator; else None."""
    if getattr(builder, "name", None) not in ("json", "csv") or not builder.config.data_files:
        return None
    plain = type(builder.config)()
    free = {"name", "version", "data_dir", "data_files", "description", "sep"}
    if any(getattr(builder.config, f.name) != getattr(plain, f.name) for f in fields(plain) if f.name not in free):
        return None
    sep = getattr(builder.config, "sep", ",")
    if sep not in SEPARATORS.values():
        return None
    parts: dict[str, list[File]] = {}
    for key, urls in builder.config.data_files.items():
        paths = datasets.DownloadManager(dataset_name=builder.name).download(list(urls))
        kind = "json" if builder.name == "json" else "tsv" if sep == "\t" else "csv"
        parts[str(key)] = [File(Path(path), str(url), kind) for path, url in zip(paths, urls)]
    return parts


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and suffix(p) in SUFFIXES)


def _nearby(path: Path) -> str:
    """What lies in the nearest existing folder above a path, the most similar names first."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or suffix(entry) in SUFFIXES)
    near = difflib.get_close_matches(path.name, names, 5, 0.4) or names[:10]
    return f" ({folder} holds {', '.join(near)})" if near else f" ({folder} holds no data files)"


def _diagnose(name: str, path: Path, split: str, config_name: str | None, local: bool, error: Exception) -> str:
    """Why a folder or a hub repository was not read, in words."""
    text = str(error)
    if known := re.search(r"Unknown split .*? one of (\[.*?\])", text):
        return f"{name} has no split {split!r}; its splits are {known[1]}: set the split to one of them."
    if "Unrecognized instruction format" in text:
        return f"the split {split!r} cannot be read; write it as in train, train[:1000] or train[90%:]."
    if known := re.search(r"Config name is missing.*?(\[.*?\])", text, re.DOTALL):
        return f"{name} has several configurations, {known[1]}: set dataset_config_name (--subset of lorat eval) to one of them."
    if known := re.search(r"BuilderConfig .*? not found. Available: (\[.*?\])", text, re.DOTALL):
        return (
            f"{name} has no configuration {config_name!r}; it has {known[1]}: set dataset_config_name to one of them."
        )
    if isinstance(error, datasets.exceptions.DataFilesNotFoundError | datasets.data_files.EmptyDatasetError):
        where = f"{name} holds no files of data" + ("" if local else " that can be read")
        return f"{where}; give {READABLE}, or a folder that holds them."
    for file in _data_files(path) if local else []:
        try:
            for _ in _rows(_file(file)) if SUFFIXES[suffix(file)] != "parquet" else ():
                pass
            open_bytes(file).close()
        except DataError as fault:
            return str(fault)
    reason = f"{type(error.__cause__ or error).__name__}: {first_line(error.__cause__ or error)}"
    if local:
        return f"{name} cannot be read ({reason}); correct the file, or give it as JSONL, one object a line."
    return (
        f"{name} is no local file or folder{_nearby(path)}, and cannot be read from the hub ({reason}); check the "
        "name, the configuration and the network, or give a local file."
    )
