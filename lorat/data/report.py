"""The account of a dataset: what was read of it, what was not, which rows were dropped and which cut."""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from dataclasses import dataclass, field

import pyarrow.compute as pc
from datasets import Dataset, Value

# What each example says for the report: why it was dropped, its uncut length, what was cut, and marks of `notes.py`, a
# line each (null where there is no example, or where the other side of its pair says them).
ACCOUNT = {"dropped": Value("string"), "uncut": Value("int64"), "prompt_cut": Value("bool"), "cut": Value("int8")}
ACCOUNT |= {"said": Value("string")}


@dataclass
class DataReport:
    """What became of a dataset. Row numbers count raw rows from 0; lengths are in tokens.

    `dropped`: reason -> rows. `lengths`: "prompt", "completion", "total" (prompt + longest completion) -> (median,
    95th percentile, longest) of what was kept, after cutting. `longest`: the longest total before cutting. `read` and
    `unread`: columns, and fields of messages as "column[].field". `roles`: "human→user" for roles that were translated.
    `notes`: what a person would want to know, a line each, with the setting that changes it.
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
    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """The report that `json.dumps(asdict(report))` wrote down."""
        report = cls(**json.loads(text))
        report.lengths = {key: (a, b, c) for key, (a, b, c) in report.lengths.items()}
        report.read, report.unread, report.roles = tuple(report.read), tuple(report.unread), tuple(report.roles)
        return report

    def drop(self, reason: str, row: int) -> None:
        """Notes a dropped row, once per reason (the rows of a pair split for KTO are met twice)."""
        rows = self.dropped.setdefault(reason, [])
        place = bisect.bisect_left(rows, row)
        if rows[place : place + 1] != [row]:
            rows.insert(place, row)

    def enter(self, rows: Dataset) -> tuple[list[int], Counter[str]]:
        """Fills everything in from tokenised examples with their `ACCOUNT` (arrow format).

        Returns all uncut totals, sorted, and how often each mark was said ("" counts the examples).
        """
        uncut: list[int] = []
        sizes: list[tuple[int, ...]] = []
        said: Counter[str] = Counter()
        for table in rows.iter(10_000):
            for row, reason in zip(table["row"].to_pylist(), table["dropped"].to_pylist()):
                if reason is not None:
                    self.drop(reason, row)
            for marks, count in Counter(table["said"].drop_null().to_pylist()).items():
                said.update(dict.fromkeys({"", *marks.split("\n")}, count))
            uncut += table["uncut"].drop_null().to_pylist()
            table = table.filter(pc.is_null(table["dropped"]))
            self.prompts_cut += pc.sum(table["prompt_cut"]).as_py() or 0
            self.completions_cut += pc.sum(table["cut"]).as_py() or 0
            lists = [table[c] for c in table.column_names if c.endswith("_ids")]
            sizes += zip(*(pc.list_value_length(ids).to_pylist() for ids in lists))
        self.measure(sizes)
        self.longest = max(uncut, default=0)
        return sorted(uncut), said

    def measure(self, sizes: list[tuple[int, ...]]) -> None:
        """Fills in `rows_kept` and `lengths` from (prompt, completion, ...) lengths, one tuple per example."""
        self.rows_kept = len(sizes)
        if sizes:
            self.lengths = {
                "prompt": quantiles([prompt for prompt, *_ in sizes]),
                "completion": quantiles([n for _, *completions in sizes for n in completions]),
                "total": quantiles([prompt + max(completions) for prompt, *completions in sizes]),
            }

    def render(self) -> str:
        """A few lines for people; lists of rows are abbreviated after ten."""
        lines = [f"{self.name}: {self.rows_read} {self.unit} read as {self.format}; {self.rows_kept} kept"]
        if self.dropped:
            lines[0] += f"; dropped {sum(map(len, self.dropped.values()))}: {self.reasons()}"
        lines[0] += self.columns()
        if self.lengths:
            parts = [f"{key} {' / '.join(map(str, values))}" for key, values in self.lengths.items()]
            lines.append(f"  tokens (median / 95% / longest): {', '.join(parts)}")
        if self.prompts_cut or self.completions_cut:
            lines.append(
                f"  cut to fit: {self.prompts_cut} prompts at their start, {self.completions_cut} completions at "
                f"their end (these have no EOS); uncut, the longest row has {self.longest} tokens"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def columns(self) -> str:
        """The columns that were read and those that were not, e.g. "; columns read: prompt; not read: id"."""
        if not self.read:
            return ""
        roles = f" ({', '.join(self.roles)})" if self.roles else ""
        return f"; columns read: {', '.join(self.read)}{roles}; not read: {', '.join(self.unread) or 'none'}"

    def reasons(self) -> str:
        """The reasons with their rows, e.g. "empty completion (rows 3, 8)"."""
        return "; ".join(f"{reason} ({row_list(rows)})" for reason, rows in self.dropped.items())


def row_list(rows: list[int]) -> str:
    """Row numbers as a person reads them: "rows 3, 8", or the first ten and how many more."""
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:10]))}{more}"


def quantiles(values: list[int]) -> tuple[int, int, int]:
    """(median, 95th percentile, maximum), by nearest rank."""
    ordered = sorted(values)
    median, high = (ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.95))
    return median, high, ordered[-1]
