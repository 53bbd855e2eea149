"""Raw preference data -> tokenised examples, with an account of every row.

A row that cannot teach anything is dropped and reported with its number. What was tokenised before passes through
untouched. Rows are tokenised in as many processes as asked, so that each gives its part of the account as columns
beside its ids. Reading files is in `reading.py`.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .formats import Format, canonical_text, detect
from .reading import quiet
from .tokenization import Tokens, as_row, check_tokenizer, encode, truncate, unfit

IDS = List(Value("int32"))
PAIR = {"row": Value("int64"), "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
SINGLE = {"row": Value("int64"), "prompt_ids": IDS, "completion_ids": IDS, "label": Value("bool")}
# What each raw row says for the report: why it was dropped, its uncut length, and what was cut.
ACCOUNT = {"dropped": Value("string"), "uncut": Value("int64"), "prompt_cut": Value("bool"), "cut": Value("int8")}


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    max_length: int | None,
    max_prompt_length: int | None = None,
    overlong: str = "truncate",
    name: str = "train",
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Raw preference data of any accepted layout -> tokenised examples (columns `PAIR` or `SINGLE`) and a report.

    Rows that teach nothing are dropped and reported. `overlong="truncate"` cuts to `max_length` (prompt + longest
    completion) and `max_prompt_length`; "drop" cuts nothing and drops what exceeds either. Method kto splits pairs:
    all chosen first, then all rejected. Data with a `prompt_ids` column passes through, whatever its lengths.
    `num_proc`: processes that tokenise; the result does not depend on it.
    Raises `DataError` when the layout is unknown, no row is left, or every completion lost its EOS.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: got a {type(dataset).__name__}, which is not one split in memory; give a Dataset.")
    check_tokenizer(tokenizer)
    dataset = dataset.with_format(None)
    if "prompt_ids" in dataset.column_names:
        return _pass_through(dataset, method, name)
    form = detect(dataset, method)
    columns = SINGLE if form.unpair or form.layout == "kto" else PAIR
    unit = "completions" if form.layout == "kto" else "pairs"
    report = DataReport(name, form.name + form.unpair * ", split into single completions", unit, len(dataset))
    raw = dataset.select_columns([*form.kinds, *(["label"] if form.layout == "kto" else [])])
    how = {"form": form, "tokenizer": tokenizer, "columns": tuple(columns), "overlong": overlong}
    how |= {"max_length": max_length, "max_prompt_length": max_prompt_length}
    options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": raw.column_names}
    options |= {"features": Features(columns | ACCOUNT), "load_from_cache_file": False}
    if num_proc and num_proc > 1 and len(raw) > 1:
        options["num_proc"] = min(num_proc, len(raw))
    sides = ["chosen", "rejected"] if form.unpair else [None]
    with quiet():
        parts = [
            raw.map(tokenise, fn_kwargs={**how, "side": side}, new_fingerprint=uuid.uuid4().hex, **options)
            for side in sides  # with a name given, `datasets` need not pickle the tokenizer to make one
        ]
        rows = datasets.concatenate_datasets(parts).with_format("arrow")
        options = {"batched": True, "batch_size": 10_000, "load_from_cache_file": False}
        options |= {"features": Features(columns), "remove_columns": list(ACCOUNT)}
        result = rows.map(_kept, **options).with_format(None)
    uncut = report.enter(rows)
    if report.completions_cut == report.rows_kept * (len(columns) - 2 - ("label" in columns)):  # or nothing is kept
        raise DataError(_nothing_left(report, uncut))
    return result, report


def tokenise(
    batch: dict[str, list],
    rows: list[int],
    *,
    form: Format,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    max_length: int | None,
    max_prompt_length: int | None,
    overlong: str,
    side: str | None,
) -> dict[str, list]:
    """Raw rows, column by column, -> as many tokenised rows with their `ACCOUNT`; a dropped row's ids are null.

    `rows`: their numbers. `side`: the side of each pair to take as a single completion (method kto).
    """
    account: list[dict[str, Any]] = [{} for _ in rows]
    usable = []
    for place, cells in enumerate(zip(*batch.values())):
        example = canonical_text(dict(zip(batch, cells)), form)
        if isinstance(example, str):
            account[place]["dropped"] = example
            continue
        if side:
            example = {"prompt": example["prompt"], "completion": example[side], "label": side == "chosen"}
        usable.append((place, example))
    for (place, example), tokens in zip(usable, encode([example for _, example in usable], tokenizer)):
        entry = account[place]
        if isinstance(tokens, Tokens):
            entry["uncut"] = tokens.total
            if overlong == "truncate":
                tokens = truncate(tokens, max_length, max_prompt_length, tokenizer.bos_token_id)
            tokens = unfit(tokens, max_length, max_prompt_length) or tokens
        if isinstance(tokens, str):
            entry["dropped"] = tokens
            continue
        entry |= {"prompt_cut": tokens.cut_prompt, "cut": sum(tokens.cut)}
        entry |= as_row(rows[place], tokens, example.get("label"))
    for number, entry in zip(rows, account):
        entry.setdefault("row", number)
    return {c: [entry.get(c) for entry in account] for c in (*columns, *ACCOUNT)}


def _kept(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table["dropped"])).drop_columns(list(ACCOUNT))


def _nothing_left(report: DataReport, uncut: list[int]) -> str:
    """Why no example is left, or none with its EOS, and what to set; `uncut` holds sorted totals."""
    if report.rows_kept:
        text = f"{report.name}: every completion was cut, so none ends in EOS and nothing says where an answer ends."
    else:
        text = f"{report.name}: none of {report.rows_read} {report.unit}, read as {report.format}, is left: "
        text += "; ".join(f"{len(rows)} × {reason} ({_rows(rows)})" for reason, rows in report.dropped.items()) + "."
        if not any("longer than" in reason or "truncation" in reason for reason in report.dropped):
            return f"{text} Correct these cells, or rename the columns so that the right ones are read."
    median = uncut[(len(uncut) - 1) // 2]
    text += f" Prompt + longest completion take {uncut[0]} (shortest), {median} (median), {uncut[-1]} (longest) tokens:"
    text += f" set max_length={uncut[-1]} to keep every row whole, or max_length={median} for half of them"
    limit = " and raise max_prompt_length" if any("max_prompt_length" in reason for reason in report.dropped) else ""
    return f"{text}{limit}."


def _pass_through(dataset: Dataset, method: str, name: str) -> tuple[Dataset, DataReport]:
    columns = SINGLE if method == "kto" else PAIR
    if missing := [c for c in columns if c != "row" and c not in dataset.column_names]:
        raise DataError(
            f"{name}: the dataset is tokenised (it has prompt_ids), but method={method} also needs {missing}, and its "
            f"columns are {dataset.column_names}; give the raw data, or data that was prepared for this method."
        )
    if "row" not in dataset.column_names:
        dataset = dataset.add_column("row", list(range(len(dataset))))
    dataset = dataset.select_columns(list(columns))
    report = DataReport(name, "tokenised examples", "completions" if method == "kto" else "pairs", len(dataset))
    report.measure([tuple(len(row[c]) for c in columns if c.endswith("_ids")) for row in dataset])
    report.longest = report.lengths["total"][-1] if len(dataset) else 0
    if not len(dataset):
        raise DataError(f"{name}: the tokenised dataset has 0 rows, so there is nothing to learn; give one with rows.")
    return dataset, report


@dataclass
class DataReport:
    """What became of a dataset. Row numbers count raw rows from 0; lengths are in tokens.

    `dropped`: reason -> rows. `lengths`: "prompt", "completion", "total" (prompt + longest completion) -> (median,
    95th percentile, longest) of what was kept, after cutting. `longest`: the longest total before cutting.
    """

    name: str
    format: str
    unit: str
    rows_read: int
    rows_kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    prompts_cut: int = 0
    completions_cut: int = 0
    lengths: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    longest: int = 0

    def drop(self, reason: str, row: int) -> None:
        """Notes a dropped row, once per reason (the rows of a pair split for KTO are met twice)."""
        rows = self.dropped.setdefault(reason, [])
        place = bisect.bisect_left(rows, row)
        if rows[place : place + 1] != [row]:
            rows.insert(place, row)

    def enter(self, rows: Dataset) -> list[int]:
        """Fills everything in from tokenised rows with their `ACCOUNT` (arrow format); returns all uncut totals, sorted."""
        uncut: list[int] = []
        sizes: list[tuple[int, ...]] = []
        for table in rows.iter(10_000):
            for row, reason in zip(table["row"].to_pylist(), table["dropped"].to_pylist()):
                if reason is not None:
                    self.drop(reason, row)
            uncut += table["uncut"].drop_null().to_pylist()
            table = table.filter(pc.is_null(table["dropped"]))
            self.prompts_cut += pc.sum(table["prompt_cut"]).as_py() or 0
            self.completions_cut += pc.sum(table["cut"]).as_py() or 0
            lists = [table[c] for c in table.column_names if c.endswith("_ids")]
            sizes += zip(*(pc.list_value_length(ids).to_pylist() for ids in lists))
        self.measure(sizes)
        self.longest = max(uncut, default=0)
        return sorted(uncut)

    def measure(self, sizes: list[tuple[int, ...]]) -> None:
        """Fills in `rows_kept` and `lengths` from (prompt, completion, ...) lengths, one tuple per example."""
        self.rows_kept = len(sizes)
        if sizes:
            self.lengths = {
                "prompt": _quantiles([prompt for prompt, *_ in sizes]),
                "completion": _quantiles([n for _, *completions in sizes for n in completions]),
                "total": _quantiles([prompt + max(completions) for prompt, *completions in sizes]),
            }

    def render(self) -> str:
        """A few lines for people; lists of rows are abbreviated after ten."""
        lines = [f"{self.name}: {self.rows_read} {self.unit} read as {self.format}; {self.rows_kept} kept"]
        if self.dropped:
            lines[0] += f"; dropped {sum(map(len, self.dropped.values()))}: {self.reasons()}"
        if self.lengths:
            parts = [f"{key} {' / '.join(map(str, values))}" for key, values in self.lengths.items()]
            lines.append(f"  tokens (median / 95% / longest): {', '.join(parts)}")
        if self.prompts_cut or self.completions_cut:
            lines.append(
                f"  cut to fit: {self.prompts_cut} prompts at their start, {self.completions_cut} completions at "
                f"their end (these have no EOS); uncut, the longest row has {self.longest} tokens"
            )
        return "\n".join(lines)

    def reasons(self) -> str:
        """The reasons with their rows, e.g. "empty completion (rows 3, 8)"."""
        return "; ".join(f"{reason} ({_rows(rows)})" for reason, rows in self.dropped.items())


def _rows(rows: list[int]) -> str:
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:10]))}{more}"


def _quantiles(values: list[int]) -> tuple[int, int, int]:
    """(median, 95th percentile, maximum), by nearest rank."""
    ordered = sorted(values)
    median, high = (ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.95))
    return median, high, ordered[-1]


def extent(datasets: list[Dataset]) -> tuple[int, int]:
    """`(greatest token id, tokens of the longest row)` over tokenised datasets; (0, 0) for none."""
    greatest = longest = 0
    for batch in (b for d in datasets for b in d.with_format("arrow").iter(10_000)):
        lists = [batch[name] for name in batch.column_names if name.endswith("_ids")]
        greatest = max([greatest, *(pc.max(pc.list_flatten(c)).as_py() or 0 for c in lists)])
        sizes = {n: pc.list_value_length(batch[n]) for n in batch.column_names if n.endswith("_ids")}
        for name in sizes.keys() - {"prompt_ids"}:
            longest = max(longest, pc.max(pc.add(sizes["prompt_ids"], sizes[name])).as_py() or 0)
    return greatest, longest


def pack_sizes(dataset: Dataset, shared: bool) -> np.ndarray:
    """(n,) tokens of each example alone in a pack: its prompt once and each completion (`shared`), or padded rows."""
    needs = [np.zeros(0, dtype=np.int64)]
    for batch in dataset.with_format("arrow").iter(10_000):
        sizes = {n: pc.list_value_length(batch[n]).to_numpy() for n in batch.column_names if n.endswith("_ids")}
        prompt = sizes.pop("prompt_ids")
        needs.append(
            prompt + sum(sizes.values()) if shared else len(sizes) * (prompt + np.stack([*sizes.values()]).max(0))
        )
    return np.concatenate(needs)


def check_budget(dataset: Dataset, budget: int, shared: bool, name: str) -> None:
    """Raise `DataError` with the rows that no pack of `budget` tokens can hold."""
    needs = pack_sizes(dataset, shared)
    rows, longest = np.asarray(dataset["row"])[needs > budget].tolist(), int(needs.max(initial=0))
    if rows:
        raise DataError(
            f"{name}: {len(rows)} of {len(dataset)} examples need more than max_tokens_per_pack={budget} tokens in one "
            f"forward pass ({_rows(rows)}), the longest {longest}. Set max_tokens_per_pack={longest}, or lower max_length."
        )


def digest(dataset: Dataset) -> str:
    """SHA-256 of a tokenised dataset's token ids and where each row's begin, to tell data apart from other data."""
    total = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(10_000):
        for name in sorted(n for n in batch.column_names if n.endswith("_ids")):
            for values in (pc.list_value_length(batch[name]), pc.list_flatten(batch[name])):
                total.update(values.to_numpy().astype("int64").tobytes())
    return total.hexdigest()
