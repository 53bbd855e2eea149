"""Raw preference data -> tokenised examples, with an account of every row.

A row that cannot teach anything is dropped and reported with its number. Everything is read once, in one process,
and what was tokenised before passes through untouched. Reading files is in `reading.py`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .canonical import examples
from .columns import AS_WRITTEN, RowSettings, shown
from .formats import detect
from .notes import Notes
from .reading import quiet
from .report import DataReport, row_list
from .templates import Template, no_template
from .tokenised import PAIR, SINGLE, check_classes, pass_through
from .tokenization import Tokens, as_row, check_tokenizer, encode, truncate, unfit

__all__ = ["PAIR", "SINGLE", "DataReport", "check_budget", "digest", "extent", "pack_sizes", "prepare"]


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    max_length: int | None,
    max_prompt_length: int | None = None,
    overlong: str = "truncate",
    name: str = "train",
    rows: RowSettings = AS_WRITTEN,
    weights: tuple[float, float] = (1.0, 1.0),
) -> tuple[Dataset, DataReport]:
    """Raw preference data of any accepted layout -> tokenised examples (columns `PAIR` or `SINGLE`) and a report.

    Rows that teach nothing are dropped and reported. `overlong="truncate"` cuts to `max_length` (prompt + longest
    completion) and `max_prompt_length`; "drop" cuts nothing and drops what exceeds either. Method kto splits pairs:
    all chosen first, then all rejected. `rows` says how rows are read; `weights` (desirable, undesirable) are KTO's, for
    the report alone. Data with a `prompt_ids` column passes through, whatever its lengths.
    Raises `DataError` when the layout is unknown, no row is left, every completion lost its EOS, tokenised data is
    broken, or one of KTO's classes has no completion.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: got a {type(dataset).__name__}, which is not one split in memory; give a Dataset.")
    check_tokenizer(tokenizer)
    dataset = dataset.with_format(None)
    if "prompt_ids" in dataset.column_names:
        return pass_through(dataset, tokenizer, method, name, weights)
    form = detect(dataset, method, rows)
    if form.chat and not tokenizer.chat_template:
        raise no_template(f"the data is conversational ({', '.join(form.reads)} give messages)")
    columns = SINGLE if form.unpair or form.layout == "kto" else PAIR
    unit = "completions" if form.layout == "kto" else "rows" if form.shape else "pairs"
    report = DataReport(name, form.name + form.unpair * ", split into single completions", unit, len(dataset))
    account: set[str] = set()
    notes, template = Notes(tokenizer, form), Template(tokenizer, rows.chat_template_kwargs)
    uncut: list[int] = []  # totals before cutting, of every example that could be tokenised
    sizes: list[tuple[int, ...]] = []
    labels = [0, 0]

    def tokenize(batch: dict[str, list], numbers: list[int], side: str | None = None) -> dict[str, list]:
        usable = []
        for row, cells in zip(numbers, zip(*batch.values())):
            for example in examples(dict(zip(batch, cells)), form, account):
                if isinstance(example, str):
                    report.drop(example, row)
                    continue
                if side != "rejected":
                    notes.see(example, row)
                if side:
                    rest = {key: example[key] for key in example if key not in ("chosen", "rejected")}
                    example = rest | {"completion": example[side], "label": side == "chosen"}
                usable.append((row, example))
        kept: list[dict] = []
        for (row, example), tokens in zip(usable, encode([example for _, example in usable], tokenizer, template)):
            if isinstance(tokens, Tokens):
                uncut.append(tokens.total)
                if overlong == "truncate":
                    tokens = truncate(tokens, max_length, max_prompt_length, tokenizer.bos_token_id)
                tokens = unfit(tokens, max_length, max_prompt_length) or tokens
            if isinstance(tokens, str):
                report.drop(tokens, row)
                continue
            report.prompts_cut += tokens.cut_prompt
            report.completions_cut += sum(tokens.cut)
            sizes.append((len(tokens.prompt), *map(len, tokens.completions)))
            kept.append(as_row(row, tokens, example.get("label")))
            if "label" in example:
                labels[not example["label"]] += 1
        return {column: [example[column] for example in kept] for column in columns}

    raw = dataset.select_columns(list(form.reads))
    options: dict[str, Any] = {"batched": True, "with_indices": True, "load_from_cache_file": False}
    options |= {"features": Features(columns), "remove_columns": raw.column_names}
    sides = [{"side": side} for side in ("chosen", "rejected")] if form.unpair else [{}]
    with quiet():
        result = datasets.concatenate_datasets([raw.map(tokenize, fn_kwargs=side, **options) for side in sides])
    report.measure(sizes)
    report.longest = max(uncut, default=0)
    report.read, report.roles = form.reads, tuple(sorted(a for a in account if "→" in a))
    report.unread = (*form.unread, *sorted(a for a in account if "→" not in a))
    report.notes += notes.lines() + template.lines()
    if report.completions_cut == sum(len(size) - 1 for size in sizes):  # nothing kept, or nothing kept whole
        raise DataError(_nothing_left(report, sorted(uncut)))
    if columns is SINGLE:
        check_classes(report, labels, weights)
    return result, report


def _nothing_left(report: DataReport, uncut: list[int]) -> str:
    """Why no example is left, or none with its EOS, and what to set; `uncut` holds sorted totals."""
    if report.rows_kept:
        text = f"{report.name}: every completion was cut, so none ends in EOS and nothing says where an answer ends."
    else:
        text = f"{report.name}: none of {report.rows_read} {report.unit}, read as {report.format}, is left: "
        text += "; ".join(f"{len(rows)} × {reason} ({row_list(rows)})" for reason, rows in report.dropped.items()) + "."
        if not any("longer than" in reason or "truncation" in reason for reason in report.dropped):
            return (
                f"{text} Correct these cells, or rename the columns so that the right ones are read"
                f"{report.columns()}; or map them, as in {shown({'prompt': 'question', 'chosen': 'good'})}."
            )
    median = uncut[(len(uncut) - 1) // 2]
    text += f" Prompt + longest completion take {uncut[0]} (shortest), {median} (median), {uncut[-1]} (longest) tokens:"
    text += f" set max_length={uncut[-1]} to keep every row whole, or max_length={median} for half of them"
    limit = " and raise max_prompt_length" if any("max_prompt_length" in reason for reason in report.dropped) else ""
    return f"{text}{limit}."


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
            f"forward pass ({row_list(rows)}), the longest {longest}. Set max_tokens_per_pack={longest}, or lower max_length."
        )


def digest(dataset: Dataset) -> str:
    """SHA-256 of a tokenised dataset's token ids and where each row's begin, to tell data apart from other data."""
    total = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(10_000):
        for name in sorted(n for n in batch.column_names if n.endswith("_ids")):
            for values in (pc.list_value_length(batch[name]), pc.list_flatten(batch[name])):
                total.update(values.to_numpy().astype("int64").tobytes())
    return total.hexdigest()
