"""Several datasets as one: each read and prepared by itself, then put together with its weight.

A weight says how often an example of a dataset comes in an epoch: 2 is twice, 0.5 is a half of them, drawn by the run's
seed. Each dataset has a report of its own; the examples' row numbers run on from one dataset to the next, and the report
says from where.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from . import labels
from .columns import AS_WRITTEN, RowSettings
from .prepare import prepare
from .reading import load_preference_data
from .report import DataReport

Entry = str | Mapping[str, Any]  # of the setting `datasets`


@dataclass(frozen=True)
class Part:
    """One dataset as the settings name it; `columns` go over those of the run."""

    name: str
    split: str = "train"
    config: str | None = None
    weight: float = 1.0
    max_rows: int | None = None
    columns: Mapping[str, str | None] | None = None

    @classmethod
    def of(cls, entry: Entry) -> Part:
        """An entry of `datasets`: a name, or a mapping of these fields (TRL's `path` and `name` too).

        Raises `ConfigError` for what is no such thing.
        """
        if isinstance(entry, str):
            return cls(entry)
        if not isinstance(entry, Mapping):
            raise ConfigError(f"datasets holds {entry!r}; an entry is a name, or a mapping such as {{name: a.jsonl}}.")
        given = {str(key).replace("-", "_"): value for key, value in entry.items()}
        if "path" in given:  # TRL: path is the dataset, name its configuration
            given["config"] = given.pop("name", given.get("config"))
            given["name"] = given.pop("path")
        known = [f.name for f in fields(cls)]
        if wrong := [key for key in given if key not in known]:
            raise ConfigError(f"datasets: {dict(entry)} has {', '.join(wrong)}; an entry takes {', '.join(known)}.")
        given = {key: value for key, value in given.items() if value is not None}
        if not isinstance(given.get("name"), str):
            raise ConfigError(f"datasets: {dict(entry)} has no name; set name to a hub id, a folder or a file.")
        try:
            for key, kind in (("weight", float), ("max_rows", int)):
                if key in given:
                    given[key] = kind(str(given[key]))
        except ValueError:
            raise ConfigError(
                f"datasets: {key}={given[key]!r} of {given['name']} is no number; set e.g. {kind(2)}."
            ) from None
        part = cls(**given)
        if not (math.isfinite(part.weight) and part.weight > 0):
            raise ConfigError(f"datasets: weight={part.weight:g} of {part.name} leaves nothing of it; set it above 0.")
        if part.max_rows is not None and part.max_rows < 1:
            raise ConfigError(f"datasets: max_rows={part.max_rows} of {part.name} leaves nothing; set 1 or more.")
        if part.columns is not None and not isinstance(part.columns, Mapping):
            raise ConfigError(
                f"datasets: columns={part.columns!r} of {part.name} is no mapping; set {{prompt: question}}."
            )
        return part

    def read(self) -> Dataset:
        """The rows it names. Raises `DataError`."""
        data = load_preference_data(self.name, self.split, self.config)
        return data if self.max_rows is None else data.select(range(min(self.max_rows, len(data))))


@dataclass(frozen=True)
class Mixture:
    """Parts and their rows, in order."""

    parts: Sequence[tuple[Part, Dataset]]

    def __len__(self) -> int:
        return sum(len(data) for _, data in self.parts)


def parts_of(settings: Mapping[str, Any]) -> list[Part]:
    """What the settings of a run train on: `dataset_name`, then the entries of `datasets`."""
    first = []
    if settings.get("dataset_name"):
        split, config = settings.get("dataset_split") or "train", settings.get("dataset_config_name")
        first = [Part(str(settings["dataset_name"]), split, config)]
    return [*first, *map(Part.of, settings.get("datasets") or ())]


def read_training(settings: Mapping[str, Any]) -> Dataset | Mixture:
    """The rows to train on, as the settings of a run name them. Raises `DataError` that names the dataset."""
    parts = parts_of(settings)
    if len(parts) == 1 and replace(parts[0], split="train", config=None) == Part(parts[0].name):
        return parts[0].read()
    return Mixture([(part, part.read()) for part in parts])


def read_evaluation(settings: Mapping[str, Any]) -> Dataset | None:
    """The rows to evaluate on; None where the settings name none. Raises `DataError` that names the setting."""
    name, split = settings.get("eval_dataset_name"), settings.get("eval_dataset_split")
    if not name and not split:
        return None
    if not name and not settings.get("dataset_name"):
        raise DataError(
            f"eval_dataset_split={split} is a split of dataset_name, which is not set; set eval_dataset_name."
        )
    try:
        config = None if name else settings.get("dataset_config_name")
        return load_preference_data(str(name or settings["dataset_name"]), split or "train", config)
    except DataError as error:
        setting = f"eval_dataset_name={name}" if name else f"eval_dataset_split={split}"
        raise DataError(f"{setting}: {error}") from error


def prepare_all(
    data: Dataset | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    name: str = "train",
    rows: RowSettings = AS_WRITTEN,
    weights: tuple[float, float] = (1.0, 1.0),
    **settings: Any,
) -> tuple[Dataset, list[DataReport]]:
    """`prepare` for one dataset or several, with a report for each.

    Raises `DataError` as `prepare` does; KTO's classes are asked of the whole.
    """
    if not isinstance(data, Mixture):
        result, report = prepare(data, tokenizer, name=name, rows=rows, weights=weights, **settings)
        return result, [report]
    pieces: list[Dataset] = []
    reports: list[DataReport] = []
    offset = 0
    for number, (part, raw) in enumerate(data.parts):
        mapped = rows if part.columns is None else RowSettings.of(asdict(rows) | {"columns": part.columns})
        label = f"{name}, {part.name}"
        result, report = prepare(raw, tokenizer, name=label, rows=mapped, weights=None, **settings)
        taken = weighted(result, part.weight, f"{seed} {number} {part.name}")
        told = f"{len(taken)} examples an epoch" + (f" (weight {part.weight:g})" if part.weight != 1 else "")
        if offset:
            told += f"; later messages count its rows from {offset}"
        report.notes.insert(0, told)
        pieces.append(numbered_from(taken, offset))
        reports.append(report)
        offset += len(raw)
    result = datasets.concatenate_datasets(pieces)
    for report, piece in zip(reports, pieces):
        report.notes[0] += f"; {len(piece) / len(result):.0%} of all"
    if "label" in result.column_names:
        desirable = sum(result["label"])
        counts = desirable, len(result) - desirable
        if error := labels.missing_class(*counts, name):
            raise error
        if line := labels.balance(*counts, weights):
            reports[-1].notes.append(f"all datasets: {line}")
    return result, reports


def weighted(data: Dataset, weight: float, seed: str) -> Dataset:
    """`data` as often as `weight` says; the rest below a whole time is drawn by `seed`, in order, at least one example."""
    whole, rest = int(weight), weight - int(weight)
    drawn = round(rest * len(data)) or int(not whole)
    some = sorted(random.Random(seed).sample(range(len(data)), drawn))
    if whole == 1 and not some:
        return data
    return data.select(
        np.concatenate([np.tile(np.arange(len(data)), whole), np.array(some, dtype=np.int64)]).astype(int)
    )


def numbered_from(data: Dataset, first: int) -> Dataset:
    """`data` with `first` added to its row numbers."""
    if not first:
        return data
    rows = pa.array(np.asarray(data["row"]) + first)
    return data.remove_columns("row").add_column("row", rows.to_numpy()).select_columns(data.column_names)
