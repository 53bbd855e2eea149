"""Data that was tokenised before: taken as it is, once one pass has found in it what lorat needs.

A prompt without a token would have its first answer predicted from the row before, a null or a negative id ends in the
middle of a forward pass; so all of it is looked at before anything is loaded. Lengths are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from . import labels
from .report import DataReport, row_list

IDS = List(Value("int32"))
PAIR = {"row": Value("int64"), "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
SINGLE = {"row": Value("int64"), "prompt_ids": IDS, "completion_ids": IDS, "label": Value("bool")}
BATCH = 10_000


def pass_through(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    name: str,
    weights: tuple[float, float] | None = (1.0, 1.0),
) -> tuple[Dataset, DataReport]:
    """Tokenised data in the columns of `PAIR` or `SINGLE`, and its report.

    Raises `DataError`, with the rows, where columns are missing, a list is null or empty, an id is null, negative, no
    whole number or not in the tokenizer, a label is no boolean, or there are no rows.
    """
    columns = SINGLE if method == "kto" else PAIR
    if missing := [c for c in columns if c != "row" and c not in dataset.column_names]:
        raise DataError(
            f"{name}: the dataset is tokenised (it has prompt_ids), but method={method} also needs {missing}, and its "
            f"columns are {dataset.column_names}; give the raw data, or data that was prepared for this method."
        )
    if not len(dataset):
        raise DataError(f"{name}: the tokenised dataset has 0 rows, so there is nothing to learn; give one with rows.")
    faults: dict[str, list[int]] = {}
    sizes: list[np.ndarray] = []
    said = [0, 0]
    needed = [c for c in columns if c != "row"]
    for start in range(0, len(dataset), BATCH):
        table = dataset.with_format("arrow")[start : start + BATCH]
        lengths = []
        for column in (c for c in needed if c.endswith("_ids")):
            cells = table[column].combine_chunks() if isinstance(table[column], pa.ChunkedArray) else table[column]
            lengths.append(_look(cells, column, start, len(tokenizer), faults))
        if "label" in columns:
            for row, cell in enumerate(table["label"].to_pylist(), start):
                label = labels.read(cell)
                if isinstance(label, str):
                    faults.setdefault(label, []).append(row)
                else:
                    said[not label] += 1
        sizes.append(np.stack(lengths, 1))
    if faults:
        told = "; ".join(f"{fault} ({row_list(rows)})" for fault, rows in faults.items())
        raise DataError(
            f"{name}: the dataset is tokenised, and cannot be trained on: {told}. Each row needs prompt_ids and completions "
            f"of one token or more, whole numbers from 0 to {len(tokenizer) - 1}; correct or delete these rows, or give "
            "the raw data."
        )
    if "row" not in dataset.column_names:
        dataset = dataset.add_column("row", list(range(len(dataset))))
    unread = tuple(c for c in dataset.column_names if c not in columns)
    dataset = dataset.select_columns(list(columns))
    if dataset.features != Features(columns):
        dataset = dataset.cast(Features(columns))
    report = DataReport(name, "tokenised examples", "completions" if method == "kto" else "pairs", len(dataset))
    report.measure([tuple(map(int, row)) for row in np.concatenate(sizes)])
    report.longest = report.lengths["total"][-1]
    report.read, report.unread = tuple(needed), unread
    if columns is SINGLE and weights is not None:
        check_classes(report, said, weights)
    return dataset, report


def _look(cells: pa.Array, column: str, start: int, vocabulary: int, faults: dict[str, list[int]]) -> np.ndarray:
    """Lengths of one column's lists, 0 where null; what is wrong joins `faults` with its row."""

    def note(fault: str, mask: np.ndarray) -> None:
        if mask.any():
            faults.setdefault(f"{column} {fault}", []).extend((start + np.flatnonzero(mask)).tolist())

    is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    if not is_list or not (pa.types.is_integer(cells.type.value_type) or pa.types.is_null(cells.type.value_type)):
        note("holds no lists of whole numbers", np.ones(len(cells), bool))
        return np.zeros(len(cells), np.int64)
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    nulls = cells.is_null().to_numpy(zero_copy_only=False)
    note("is null", nulls)
    note("is empty", (lengths == 0) & ~nulls)
    rows = pc.list_parent_indices(cells).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(cells)
    for fault, bad in (
        ("has a null", values.is_null()),
        ("has a negative id", pc.less(values, 0) if len(values) else values.is_null()),
        ("has an id beyond the tokenizer", pc.greater_equal(values, vocabulary) if len(values) else values.is_null()),
    ):
        mask = np.zeros(len(cells), bool)
        mask[rows[pc.fill_null(bad, False).to_numpy(zero_copy_only=False)]] = True
        note(fault, mask)
    return lengths


def check_classes(report: DataReport, said: Sequence[int], weights: tuple[float, float]) -> None:
    """Raises `DataError` where one class of (desirable, undesirable) is missing; a strong imbalance becomes a note."""
    desirable, undesirable = said
    if error := labels.missing_class(desirable, undesirable, report.name):
        raise error
    if line := labels.balance(desirable, undesirable, weights):
        report.notes.append(line)
