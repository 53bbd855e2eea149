"""Which column plays which part: by the names people use, or by the mapping that the user gives.

A part is a role (`prompt`, `chosen`, …), a column is what a file calls it; `columns: {prompt: question}` says it where
names do not. Nothing that looks like a piece of the question is left unread without a word: either it is read, or it is
said with what is read already, or the data is refused with a mapping to start from.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import DataError
from .messages import is_turn, kind

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "messages": ("messages", "conversations", "conversation"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "completion": ("completion", "response", "output"),
    "label": ("label", "kto_tag"),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
SPECIAL = ("choice", "answers", "scores", "ranks")  # parts of published shapes that a mapping may name
ROLES = (*NAMES, *SPECIAL)
CONTEXT = ("context", "passage", "document", "article", "background", "dialogue", "dialog", "instructions")
QUESTION = (*(n for r in ("prompt", "input", "system", "history", "messages") for n in NAMES[r]), *CONTEXT)
_HINTS = {
    "chosen": ("chos", "accept", "prefer", "good", "better", "best", "win", "pos", "right"),
    "rejected": ("reject", "dispref", "bad", "worse", "worst", "lose", "losing", "neg", "wrong"),
    "system": ("sys",),
    "label": ("label", "tag", "rating", "thumb", "feedback", "desirable"),
    "completion": ("compl", "respon", "answer", "output", "reply"),
    "prompt": ("prompt", "quest", "instr", "query", "input", "conv", "mess", "context", "post", "text", "source"),
}
_IDS = ("id", "uid", "uuid", "idx", "index", "hash", "split", "dataset", "lang", "language", "url", "date", "timestamp")


@dataclass(frozen=True)
class RowSettings:
    """How rows are read, as the user sets it.

    `columns`: role -> column (`a.b` is field b of column a; None: not read). `dialogues`: "chat" turns text into
    messages, "text" messages into `Human:`/`Assistant:` text, None leaves both. `rankings`: a row with many answers
    gives the best against the worst, or every pair. `user_endings`: the user's words at the end of an answer are kept,
    cut, or drop the row. `chat_template_kwargs`: what the chat template is given for every row (a row's own win).
    """

    columns: Mapping[str, str | None] | None = None
    dialogues: Literal["chat", "text"] | None = None
    rankings: Literal["best_worst", "all_pairs"] = "best_worst"
    user_endings: Literal["keep", "cut", "drop"] = "keep"
    chat_template_kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RowSettings:
        """Those among the settings of a run that say how rows are read."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if settings.get(f.name) is not None})

    def column(self, role: str, default: str) -> str:
        """The column of a role that a mapping may have renamed."""
        return (self.columns or {}).get(role) or default


AS_WRITTEN = RowSettings()


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The cell of a column, or of a field within one, as in `input.messages`."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def top(column: str, columns: Iterable[str]) -> str:
    """The column that a path begins in."""
    return column if column in columns else column.split(".")[0]


def find_roles(columns: Sequence[str], settings: RowSettings) -> dict[str, str]:
    """role -> column: the mapping first, then names that are known. Raises `DataError` for a mapping that cannot be."""
    given = dict(settings.columns or {})
    if unknown := [role for role in given if role not in ROLES]:
        near = difflib.get_close_matches(str(unknown[0]), ROLES, 1, 0.6)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(
            f"columns maps {unknown[0]!r}{meant}, which is no part of a row; the parts are {', '.join(ROLES)}."
        )
    for role, column in given.items():
        if column and top(column, columns) not in columns:
            near = difflib.get_close_matches(column, columns, 1, 0.5)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(
                f"columns says that {role} is in the column {column!r}{meant}, and the columns are {list(columns)}; "
                "write role: column, as in columns: {prompt: question}."
            )
    roles = {role: column for role, column in given.items() if column}
    taken = {top(column, columns) for column in roles.values()}
    for role, names in NAMES.items():
        if role not in given and (found := [n for n in names if n in columns and n not in taken]):
            roles[role] = found[0]
    if "input" in roles and "prompt" not in roles and "messages" not in roles and "input" not in given:
        roles["prompt"] = roles.pop("input")
    if "messages" in given and given["messages"] and "prompt" not in given:
        roles.pop("prompt", None)  # the conversation that the user names is the prompt
    return roles


def has_words(value: Any) -> bool:
    """Whether a cell holds text or turns."""
    if isinstance(value, list):
        return any(map(has_words, value))
    return bool(value.strip()) if isinstance(value, str) else is_turn(value)


def strings(value: Any) -> list[str]:
    """Every text in a cell: itself, its messages' contents, its items."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    if is_turn(value):
        return strings(value.get("content") if value.get("content") is not None else value.get("value"))
    return []


def others_with_words(rows: Mapping[str, list], taken: Iterable[str]) -> list[str]:
    """Columns beside those `taken` that hold text or turns in some of `rows` (columns of cells), identifiers left out."""
    names = [
        c for c in rows if c not in set(taken) and c.lower() not in _IDS and not c.lower().endswith(("_id", "_model"))
    ]
    return [c for c in names if any(map(has_words, rows[c]))]


def unread_question(rows: Mapping[str, list], read: Sequence[str]) -> list[str]:
    """Columns named like a part of a question whose words are in none of the columns `read`, in some of `rows`."""
    out = []
    for column in (c for c in rows if c.lower() in QUESTION and c not in read):
        for i, value in enumerate(rows[column]):
            known = " ".join(s for c in read if c in rows for s in strings(rows[c][i]))
            if has_words(value) and any(s not in known for s in strings(value)):
                out.append(column)
                break
    return out


def guess(rows: Mapping[str, list], wanted: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """A mapping to start from: for each wanted role the column whose name or place makes it most likely.

    Columns with text or turns only (for `label` any); roles that are found keep their column.
    """
    found = {role: known[role] for role in wanted if role in known}
    free = [c for c in rows if c not in found.values()]
    words = [c for c in free if any(map(has_words, rows[c]))]

    def take(role: str, test: Callable[[str], Any], pool: list[str]) -> None:
        if role not in found and (hit := next((c for c in pool if c not in found.values() and test(c)), None)):
            found[role] = hit

    for role in wanted:
        pool = free if role == "label" else words
        near = difflib.get_close_matches(role, [c.lower() for c in pool], 1, 0.75)
        take(role, lambda c: near and c.lower() == near[0], pool)  # noqa: B023
    for role in (r for r in _HINTS if r in wanted):  # dispreferred is no preferred: the longer hints of rejected first
        bad = _HINTS["rejected"] if role == "chosen" else ()
        take(
            role,
            lambda c: any(h in c.lower() for h in _HINTS[role]) and not any(b in c.lower() for b in bad),  # noqa: B023
            free if role == "label" else words,
        )
    plain = [c for c in words if c.lower() not in _IDS and not c.lower().endswith("_id")]
    for role in (r for r in wanted if r != "system"):
        take(role, lambda _: True, free if role == "label" else plain)
    if "system" not in wanted:
        take("system", lambda c: "sys" in c.lower() and c not in NAMES["system"], words)
    return found


def shown(mapping: Mapping[str, str | None]) -> str:
    """A mapping as a person writes it: in YAML, and on the command line."""
    yaml = ", ".join(f"{role}: {column if column else 'null'}" for role, column in mapping.items())
    line = ",".join(f"{role}={column or ''}" for role, column in mapping.items())
    quoted = f"'{line}'" if any(c.isspace() or c in "'\"$&;()" for c in line) else line
    return f"columns: {{{yaml}}} (on the command line --columns {quoted})"


def usable(value: Any) -> bool:
    """Whether a cell is text or messages."""
    return kind(value) in ("text", "messages")
