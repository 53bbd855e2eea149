"""Raw preference data -> tokenised examples, with an account of every row.

A row that cannot teach anything is dropped and reported with its number. What was tokenised before passes through
untouched. Rows are tokenised in as many processes as asked, so that each gives its part of the account as columns
beside its ids. What took long is kept (`cache.py`) by the cells, the tokenizer and the settings that it came from.
Reading files is in `reading.py`, what rows mean in `formats.py` and `canonical.py`.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from . import cache, notes
from .canonical import examples
from .columns import AS_WRITTEN, RowSettings, shown
from .formats import detect
from .layout import Format
from .reading import quiet
from .report import ACCOUNT, DataReport, row_list
from .templates import Template, no_template
from .tokenised import PAIR, SINGLE, check_classes, pass_through
from .tokenization import Tokens, as_row, check_tokenizer, encode, truncate, unfit

MAKER = "lorat tokenizer"
LEAST = 2000  # rows from which on what was prepared is kept

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
    weights: tuple[float, float] | None = (1.0, 1.0),
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Raw preference data of any accepted layout -> tokenised examples (columns `PAIR` or `SINGLE`) and a report.

    Rows that teach nothing are dropped and reported. `overlong="truncate"` cuts to `max_length` (prompt + longest
    completion) and `max_prompt_length`; "drop" cuts nothing and drops what exceeds either. Method kto splits pairs:
    all chosen first, then all rejected. `rows` says how rows are read; `weights` (desirable, undesirable) are KTO's, for
    the report alone; without them its classes are not looked at. Data with a `prompt_ids` column passes through, whatever its lengths.
    `num_proc`: processes that tokenise; the result does not depend on it.
    Raises `DataError` when the layout is unknown, no row is left, every completion lost its EOS, tokenised data is
    broken, or one of KTO's classes has no completion.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: got a {type(dataset).__name__}, which is not one split in memory; give a Dataset.")
    check_tokenizer(tokenizer)
    dataset = dataset.with_format(None)
    if "prompt_ids" in dataset.column_names:
        _check_maker(dataset, tokenizer, name)
        return pass_through(dataset, tokenizer, method, name, weights)
    settings: dict[str, Any] = {"method": method, "max_length": max_length, "max_prompt_length": max_prompt_length}
    settings |= {"overlong": overlong, "rows": rows, "weights": weights}
    known = cache.tokenizer_content(tokenizer) if len(dataset) >= LEAST else None
    if known is None:
        return _named(dataset, tokenizer, name=name, num_proc=num_proc, **settings)
    plain = settings | {"rows": asdict(rows)}
    entry = cache.key("prepared", cache.content(dataset), known, plain)
    if not (folder := cache.find(entry)):
        result, report = _named(dataset, tokenizer, name=name, num_proc=num_proc, **settings)
        folder = cache.keep(entry, lambda folder: _write(folder, result, report))
    report = DataReport.from_json((folder / "report.json").read_text())
    report.name = name
    return Dataset.from_file(str(folder / "rows.arrow")), report


def made_with(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A tokenised dataset that keeps, with what is saved of it, which tokenizer its ids are of."""
    dataset = dataset.select_columns(dataset.column_names)  # a copy: its notes are its own
    dataset.info.description = json.dumps({MAKER: cache.tokenizer_content(tokenizer)})
    return dataset


def _check_maker(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `DataError` where `made_with` kept another tokenizer."""
    try:
        maker = json.loads(dataset.info.description)[MAKER]
    except (ValueError, TypeError, KeyError):
        return
    if maker and maker != cache.tokenizer_content(tokenizer):
        raise DataError(
            f"{name}: the dataset was prepared with another tokenizer or chat template than this model's, so its ids mean "
            "something else; prepare it again (lorat data --out), or train the model that it was prepared for."
        )


def _named(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, **settings: Any) -> tuple[Dataset, Any]:
    """`_prepared`, whose refusals say which dataset they are about."""
    try:
        return _prepared(dataset, tokenizer, name=name, **settings)
    except DataError as error:
        if str(error).startswith(f"{name}:"):
            raise
        raise DataError(f"{name}: {error}") from error


def _write(folder: Path, result: Dataset, report: DataReport) -> None:
    schema = result.features.arrow_schema
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in result.with_format("arrow").iter(10_000):
            writer.write_table(table.cast(schema))
    (folder / "report.json").write_text(json.dumps(asdict(report)))


def _prepared(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    max_length: int | None,
    max_prompt_length: int | None,
    overlong: str,
    name: str,
    rows: RowSettings,
    weights: tuple[float, float] | None,
    num_proc: int | None,
) -> tuple[Dataset, DataReport]:
    """`prepare` without the cache, for data that is not tokenised."""
    form = detect(dataset, method, rows)
    if form.chat and not tokenizer.chat_template:
        raise no_template(f"the data is conversational ({', '.join(form.reads)} give messages)")
    columns = SINGLE if form.unpair or form.layout == "kto" else PAIR
    unit = "completions" if form.layout == "kto" else "rows" if form.shape else "pairs"
    report = DataReport(name, form.name + form.unpair * ", split into single completions", unit, len(dataset))
    raw = dataset.select_columns(list(form.reads))
    how = {"form": form, "template": Template(tokenizer, rows.chat_template_kwargs), "columns": tuple(columns)}
    how |= {"overlong": overlong, "max_length": max_length, "max_prompt_length": max_prompt_length}
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
        entries = datasets.concatenate_datasets(parts).with_format("arrow")
        options = {"batched": True, "batch_size": 10_000, "load_from_cache_file": False}
        options |= {"features": Features(columns), "remove_columns": list(ACCOUNT)}
        result = entries.map(_kept, **options).with_format(None)
    uncut, said = report.enter(entries)
    report.read, report.roles = form.reads, notes.roles(said)
    report.unread = (*form.unread, *notes.fields(said))
    report.notes += notes.lines(said, form, bool(tokenizer.chat_template))
    if report.completions_cut == report.rows_kept * (len(columns) - 2 - ("label" in columns)):  # or nothing is kept
        raise DataError(_nothing_left(report, uncut))
    if columns is SINGLE and weights is not None:
        desirable = int(pc.sum(result.with_format("arrow")[:]["label"]).as_py() or 0)
        check_classes(report, (desirable, len(result) - desirable), weights)
    return result, report


def tokenise(
    batch: dict[str, list],
    numbers: list[int],
    *,
    form: Format,
    template: Template,
    columns: Sequence[str],
    max_length: int | None,
    max_prompt_length: int | None,
    overlong: str,
    side: str | None,
) -> dict[str, list]:
    """Raw rows, column by column, -> their tokenised examples with their `ACCOUNT`; ids of a dropped one are null.

    `numbers`: the rows' numbers. `side`: the side of each pair to take as a single completion (method kto).
    """
    tokenizer = template.tokenizer
    entries: list[dict[str, Any]] = []
    usable: list[tuple[dict[str, Any], dict[str, Any]]] = []
    special = [token for token in tokenizer.all_special_tokens if token]
    for row, cells in zip(numbers, zip(*batch.values())):
        account: set[str] = set()
        for example in examples(dict(zip(batch, cells)), form, account):
            entry: dict[str, Any] = {"row": row}
            entries.append(entry)
            if isinstance(example, str):
                entry["dropped"] = example
                continue
            if side != "rejected":
                entry["said"] = notes.joined(account | notes.seen(example, special))
            if side:
                rest = {key: example[key] for key in example if key not in ("chosen", "rejected")}
                example = rest | {"completion": example[side], "label": side == "chosen"}
            usable.append((entry, example))
    for (entry, example), tokens in zip(usable, encode([example for _, example in usable], tokenizer, template)):
        if isinstance(tokens, Tokens):
            entry["uncut"] = tokens.total
            if tokens.note and side != "rejected":
                entry["said"] = notes.joined({*entry["said"].split("\n"), tokens.note})
            if overlong == "truncate":
                tokens = truncate(tokens, max_length, max_prompt_length, tokenizer.bos_token_id)
            tokens = unfit(tokens, max_length, max_prompt_length) or tokens
        if isinstance(tokens, str):
            entry["dropped"] = tokens
            continue
        entry |= {"prompt_cut": tokens.cut_prompt, "cut": sum(tokens.cut)}
        entry |= as_row(entry["row"], tokens, example.get("label"))
    return {c: [entry.get(c) for entry in entries] for c in (*columns, *ACCOUNT)}


def _kept(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table["dropped"])).drop_columns(list(ACCOUNT))


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


def totals(dataset: Dataset) -> np.ndarray:
    """(n,) tokens of each example's prompt and longest completion."""
    return pack_sizes(dataset, shared=False) // (len([c for c in dataset.column_names if c.endswith("_ids")]) - 1)


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
