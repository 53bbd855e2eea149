"""Every accepted layout of preference data, turned into canonical *text* examples.

Published preference data comes in dozens of layouts; the rest of lorat knows one. A layout is found from the column
names, the mapping and the first cells (`detect`), and applied row by row (`examples`). A row that does not fit gives a
reason instead of an example, so that the caller can drop it and say so. Which column plays which part is in
`columns.py`, layouts of their own are in `published.py`. Nothing is tokenised here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Value

from ..errors import DataError
from . import labels
from .canonical import canonical_text, examples
from .columns import (
    AS_WRITTEN,
    RowSettings,
    cell,
    find_roles,
    guess,
    has_words,
    others_with_words,
    shown,
    top,
    unread_question,
    usable,
)
from .dialogues import HH_MARKER, common_prefix, has_marker, split_text
from .layout import SIDES, Format
from .messages import is_dialogue, is_turn, kind, written_as_text
from .published import Shape, find_shape, rankings

__all__ = ["canonical_text", "common_prefix", "detect", "examples", "kind"]

LAYOUTS = """accepted layouts:
  prompt, chosen, rejected    texts, or lists of {"role", "content"} messages; also question or instruction (with input,
                              system, history), messages or conversations; chosen_response, rejected_response …
  chosen, rejected            whole dialogues; the prompt is what they have in common
  info, summaries, choice     the comparisons of openai/summarize_from_feedback, and others (docs/data.md)
  prompt, completion, label   method kto only; label is true/false or 1/0; also messages, label"""
KNOWN = ("prompt", "chosen", "rejected", "completion", "label", "info", "summaries", "choice")
ALIASES = {"answer": "completion", "accepted": "chosen", "preferred": "chosen", "positive": "chosen"} | {
    "dispreferred": "rejected", "negative": "rejected",
}  # fmt: skip
LOOK_AHEAD = 50  # rows looked at to tell apart layouts that share their column names


def detect(dataset: Dataset, method: str, settings: RowSettings = AS_WRITTEN) -> Format:
    """The layout of a raw dataset, for `method` "dpo", "ipo" or "kto".

    Raises `DataError` when the columns fit no accepted layout (with a mapping to start from), when a column holds
    nothing but another type, when a part of the question would not be read, and when KTO data is given to a method that
    needs pairs.
    """
    columns = dataset.column_names
    if not len(dataset):
        raise DataError("the dataset has 0 rows, so there is nothing to learn from; give a file or a split with rows.")
    roles = find_roles(columns, settings)
    rows: dict[str, list] = dataset[: min(LOOK_AHEAD, len(dataset))]
    _refuse_messages_as_text(rows)
    pairs = "rejected" in roles and ("chosen" in roles or "messages" in roles)
    kto = "label" in roles and ("messages" in roles or ("completion" in roles and "prompt" in roles))
    if method == "kto" and kto and not pairs:
        return _detect_labelled(dataset, rows, roles, settings)
    ranked = rankings(columns, settings)
    if pairs and not {"answers", "scores", "ranks"} & set(settings.columns or ()):
        return _detect_pairs(dataset, rows, roles, method == "kto", settings)
    if found := find_shape(columns, settings) or ranked:
        return _detect_shape(dataset, found, method == "kto", settings)
    if kto:
        raise DataError(
            f"the data is KTO data (prompt, completion, label), but method={method} compares a chosen with a rejected "
            "completion of the same prompt; set method=kto, or give data with the columns chosen and rejected."
        )
    raise DataError(f"{_columns_message(columns)}\n{_proposal(dataset, rows, method, settings)}\n{LAYOUTS}")


def _columns_message(columns: list[str]) -> str:
    """The columns found, and for each unknown one the known name it resembles."""
    hints = []
    for column in (c for c in columns if c not in KNOWN):
        near = difflib.get_close_matches(column.lower(), KNOWN, 1, 0.75)
        target = near[0] if near else ALIASES.get(column.lower())
        if target and target not in columns:
            hints.append((column, target))
    text = f"the columns {columns} fit no layout that lorat reads."
    for column, target in hints:
        text += f"\n'{column}' — did you mean '{target}'? Rename it: rename_column('{column}', '{target}')."
    return text if hints else text + " Rename the columns to those of one layout."


def _proposal(
    dataset: Dataset, rows: dict[str, list], method: str, settings: RowSettings, known: Mapping[str, str] | None = None
) -> str:
    """A mapping that reads this dataset, as the best guess; or, where none does, what is missing for one."""
    known = find_roles(dataset.column_names, settings) if known is None else known
    wanted = [("prompt", "chosen", "rejected")]
    if method == "kto":
        wanted.insert("chosen" not in known, ("prompt", "completion", "label"))
    for roles in wanted:
        mapping = guess(rows, roles, known)
        if set(roles) <= set(mapping):
            trial = RowSettings(mapping, settings.dialogues, settings.rankings, settings.user_endings)
            try:
                detect(dataset, method, trial)
            except DataError:
                continue
            return f"Or say which column is which: set {shown(mapping)}; this is a guess, correct it."
    have = [c for c in rows if any(map(usable, rows[c]))]
    return (
        f"A mapping says which column is which, as in {shown({'prompt': 'question', 'chosen': 'good', 'rejected': 'bad'})}; "
        f"of the columns here {', '.join(have) or 'none'} hold{'s' * (len(have) < 2)} text or messages."
    )


def _refuse_messages_as_text(rows: dict[str, list]) -> None:
    """Raise `DataError` where messages were written as text, as pandas writes them to CSV."""
    for column, cells in rows.items():
        texts = [c for c in cells if isinstance(c, str) and c.strip()]
        if not texts or not (how := written_as_text(texts[0])):
            continue
        if sum(written_as_text(t) is not None for t in texts) * 2 <= len(texts):
            continue
        back = {"json": "json.loads", "python": "ast.literal_eval"}.get(how)
        advice = (
            f"turn them back with df[{column!r}] = df[{column!r}].map({back}) and write JSON lines: "
            if back
            else "write the data again from where they are lists, as JSON lines: "
        )
        raise DataError(
            f"the cells of {column!r} look like messages written as text ({texts[0][:60]!r} …), and would be trained on "
            f"as characters, brackets and all; {advice}df.to_json('data.jsonl', orient='records', lines=True)."
        )


def _type(dataset: Dataset, column: str) -> str:
    feature = dataset.features.get(column, "?")
    return feature.dtype if isinstance(feature, Value) else str(feature)


def _column_kind(dataset: Dataset, column: str) -> str:
    """Kind of the first usable cell of a column (or path); `DataError` where no cell is text or messages."""
    head = top(column, dataset.column_names)
    if not isinstance(dataset.features[head], Value) or "string" in _type(dataset, head):
        for value in dataset[head]:
            if usable(found := value if head == column else cell({head: value}, column)):
                return kind(found)
    raise DataError(
        f"the column '{column}' (type {_type(dataset, head)}) has no text in any row, so there is nothing to train "
        f'on; lorat needs strings or lists of {{"role", "content"}} messages there: write the values as strings, or '
        f"give another column the name '{column}', or say which one to read: columns: "
        "{…} (docs/data.md)."
    )


def _any_words(dataset: Dataset, column: str) -> bool:
    """Whether any cell of a column holds something; stops at the first."""
    head = top(column, dataset.column_names)
    return any(has_words(v) or (isinstance(v, list | dict) and bool(v)) for v in dataset[head])


def _pieces(dataset: Dataset, roles: dict[str, str]) -> dict[str, str]:
    """The roles beside the main ones that hold something in some row: system, input, history, tools …"""
    extra = ("system", "input", "history", "tools", "chat_template_kwargs")
    return {r: roles[r] for r in extra if r in roles and _any_words(dataset, roles[r])}


def _format(
    dataset: Dataset,
    name: str,
    layout: str,
    kinds: dict[str, str],
    roles: Mapping[str, str],
    settings: RowSettings,
    **more: Any,
) -> Format:
    columns = dataset.column_names
    reads = tuple(dict.fromkeys(top(c, columns) for c in roles.values()))
    said = {"chat": "; as messages (dialogues: chat)", "text": "; as Human:/Assistant: text (dialogues: text)"}
    chat = more.pop("chat", False)
    turned = settings.dialogues == "text" or (settings.dialogues == "chat" and not chat)
    return Format(
        name + (said[settings.dialogues] if settings.dialogues and turned else ""),
        layout,
        kinds,
        settings.dialogues == "chat" or (chat and settings.dialogues is None),
        chat,
        roles=dict(roles),
        settings=settings,
        reads=reads,
        unread=tuple(c for c in columns if c not in reads),
        **more,
    )


def _with(extra: dict[str, str]) -> str:
    return f" with {', '.join(extra.values())}" if extra else ""


def _detect_labelled(dataset: Dataset, rows: dict[str, list], roles: dict[str, str], settings: RowSettings) -> Format:
    """KTO's layouts: prompt, completion, label; or messages whose last answer is the completion, and a label."""
    extra = _pieces(dataset, roles)
    main = [r for r in ("prompt", "messages", "completion") if r in roles]
    if "messages" in main and "prompt" in main:
        main.remove("prompt" if "completion" not in main else "messages")
    kinds = {roles[r]: _column_kind(dataset, roles[r]) for r in main}
    head = top(roles["label"], dataset.column_names)
    labels.check((cell({head: v}, roles["label"]) for v in dataset[head]), roles["label"], _type(dataset, head))
    used = {r: roles[r] for r in main} | extra | {"label": roles["label"]}
    chat = "messages" in kinds.values() or bool(set(extra) - {"input"})
    _refuse_unread(dataset, rows, used, "kto", settings)
    names = ", ".join(used[r] for r in (*main, "label"))
    name = f"{names} ({'messages' if chat else 'text'}){_with(extra)}"
    return _format(dataset, name, "kto", kinds, used, settings, chat=chat)


def _detect_pairs(
    dataset: Dataset, rows: dict[str, list], roles: dict[str, str], unpair: bool, settings: RowSettings
) -> Format:
    """The layouts with a chosen and a rejected column, and whatever holds their question."""
    main: list[str] = [r for r in ("prompt", "messages", "chosen", "rejected") if r in roles]
    kinds: dict[str, str] = {
        r: _column_kind(dataset, roles[r])
        for r in main
        if r != "messages" or "chosen" not in roles or _mapped(r, settings)
    }
    extra = _pieces(dataset, roles)
    method = "kto" if unpair else "dpo"
    answers = [kinds[r] for r in ("chosen", "rejected") if r in kinds]
    whole = "messages" in answers and "chosen" in kinds and any(map(is_dialogue, _cells(rows, roles["chosen"])))

    def found(name: str, layout: str, parts: list[str], chat: bool) -> Format:
        used = {r: roles[r] for r in parts} | extra
        of = {roles[r]: kinds[r] for r in parts}
        return _format(dataset, name + _with(extra), layout, of, used, settings, chat=chat, unpair=unpair)

    if whole:  # UltraFeedback: a prompt that is text repeats what the dialogues hold, and so do messages
        parts = [r for r in ("prompt", "chosen", "rejected") if kinds.get(r) == "messages" or r != "prompt"]
        extra.pop("input", None)
        return found("dialogues as messages (prompt = common prefix)", "implicit", parts, True)
    if "chosen" not in kinds:  # ms-swift: the chosen answer ends the messages
        parts = ["messages", "rejected"]
        _refuse_unread(dataset, rows, {r: roles[r] for r in parts} | extra, method, settings)
        return found(", ".join(roles[r] for r in parts) + " (messages)", "explicit", parts, True)
    parts = [r for r in ("prompt", "messages") if r in kinds]
    if not parts and "messages" in roles:
        kinds["messages"] = _column_kind(dataset, roles["messages"])
        parts = ["messages"]
    if parts or set(extra) & {"history", "input"}:
        parts += ["chosen", "rejected"]
        _refuse_unread(dataset, rows, {r: roles[r] for r in parts} | extra, method, settings)
        chat = "messages" in [kinds[r] for r in parts] or bool(set(extra) - {"input"})
        name = f"{', '.join(roles[r] for r in parts)} ({'messages' if chat else 'text'})"
        return found(name, "explicit", parts, chat)
    if "messages" in kinds.values():
        _refuse_hidden_prompt(dataset, rows, roles, method, settings, share=False)
        return found("dialogues as messages (prompt = common prefix)", "implicit", ["chosen", "rejected"], True)
    cells = zip(_cells(rows, roles["chosen"]), _cells(rows, roles["rejected"]))
    texts = [(c, r) for c, r in cells if isinstance(c, str) and isinstance(r, str) and c != r]
    hh = any(HH_MARKER in c[: common_prefix(c, r)] for c, r in texts)
    if not hh and not any(has_marker(c, r) for c, r in texts):
        if "did you mean 'prompt'" in (message := _columns_message(dataset.column_names)):
            raise DataError(f"{message}\n{_proposal(dataset, rows, method, settings)}\n{LAYOUTS}")
        _refuse_hidden_prompt(dataset, rows, roles, method, settings)
        if texts and sum(not split_text(c, r)["prompt"].strip() for c, r in texts) * 2 > len(texts):
            raise DataError(
                f"'{roles['chosen']}' and '{roles['rejected']}' have no beginning in common in most rows, so the prompt is "
                f"not in them, and no other column holds it; give the question in a column named prompt. "
                f"{_proposal(dataset, rows, method, settings)}\n{LAYOUTS}"
            )
    name = "Anthropic-HH dialogues" if hh else f"{roles['chosen']} and {roles['rejected']} texts"
    return found(f"{name} (prompt = common prefix)", "implicit", ["chosen", "rejected"], bool(extra))


def _cells(rows: dict[str, list], column: str) -> list[Any]:
    """A column's (or path's) cells among the rows looked at."""
    head = top(column, rows)
    return [cell({head: v}, column) for v in rows[head]]


def _mapped(role: str, settings: RowSettings) -> bool:
    return bool((settings.columns or {}).get(role))


def _refuse_unread(
    dataset: Dataset, rows: dict[str, list], used: Mapping[str, str], method: str, settings: RowSettings
) -> None:
    """Raise `DataError` where a column named like a part of the question would not be read, unless a mapping says so."""
    if _mapped("prompt", settings) or _mapped("messages", settings):
        return
    read = [top(c, rows) for c in used.values()]
    if not (left := unread_question(rows, read)):
        return
    keep = {r: c for r, c in used.items() if r in ("prompt", "messages", *SIDES, "label")}
    turns = any(is_turn(v) or (isinstance(v, list) and v and is_turn(v[0])) for v in rows[left[0]])
    free = next((r for r in ("input", "system") if r not in used), None)
    advice = f"Set {shown(keep)} to leave it out"
    if turns:
        with_it = {("messages" if r == "prompt" else r): (left[0] if r == "prompt" else c) for r, c in keep.items()}
        advice += f", or {shown(with_it)} to read it instead of {used.get('prompt', 'what is read')}"
    elif free:
        advice += f", or {shown({**keep, free: left[0]})} to read it too"
    many = len(left) > 1
    raise DataError(
        f"the column{'s' * many} {', '.join(left)} would not be read, and {'look' if many else 'looks'} like part of the "
        f"question: its words are not in {', '.join(read)}. {advice}."
    )


def _refuse_hidden_prompt(
    dataset: Dataset,
    rows: dict[str, list],
    roles: dict[str, str],
    method: str,
    settings: RowSettings,
    share: bool = True,
) -> None:
    """Raise `DataError` where the answers alone are read and another column may hold their prompt.

    A mapping of both answers says that the prompt is their common beginning.
    """
    if _mapped("chosen", settings) and _mapped("rejected", settings):
        return
    answers = {r: roles[r] for r in ("chosen", "rejected")}
    if others := others_with_words(rows, answers.values()):
        way_out = f" If the prompt is what the two answers begin with, set {shown(answers)}." if share else ""
        raise DataError(
            f"'{answers['chosen']}' and '{answers['rejected']}' have no dialogue marker and no column named prompt beside "
            f"them, and {', '.join(others)} hold{'s' * (len(others) < 2)} text that would not be read: the prompt may be "
            f"there. {_proposal(dataset, rows, method, settings, answers)}{way_out}\n{LAYOUTS}"
        )


def _detect_shape(dataset: Dataset, found: Shape, unpair: bool, settings: RowSettings) -> Format:
    """A layout of `published.py`; its rows are messages where any row holds some."""
    columns = dataset.column_names
    reads = [c for c in (*found.columns(settings), *found.reads_too) if c in columns]
    read = (found.read(row, settings) for row in dataset.select_columns(reads))
    chat = any(_needs_turns(p) for parts in read if not isinstance(parts, str) for p in parts)
    roles = {c: c for c in reads}
    name = found.name + (", every pair" if settings.rankings == "all_pairs" and "answers" in found.name else "")
    return _format(dataset, name, "shape", {}, roles, settings, chat=chat, unpair=unpair, shape=found)


def _needs_turns(parts: Mapping[str, Any]) -> bool:
    texts = [parts.get(k) for k in ("prompt", "messages", *SIDES)]
    return any(isinstance(t, list | dict) for t in texts) or any(parts.get(k) for k in ("system", "history", "tools"))
