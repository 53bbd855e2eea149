"""Every accepted layout of preference data, turned into one canonical *text* example.

Published preference data comes in half a dozen layouts; the rest of lorat knows one. A layout is found from the
column names and the first usable cells (`detect`), and applied row by row (`canonical_text`). A row that does not
fit gives a reason instead of an example, so that the caller can drop it and say so. Nothing is tokenised here, and
tools, images and reasoning fields of messages are left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value

from ..errors import DataError

HH_MARKER = "\n\nAssistant:"
LAYOUTS = """accepted layouts:
  prompt, chosen, rejected    texts, or lists of {"role", "content"} messages
  chosen, rejected            whole dialogues; the prompt is what they have in common
  info, summaries, choice     the comparisons of openai/summarize_from_feedback
  prompt, completion, label   method kto only; label is true/false or 1/0"""
KNOWN = ("prompt", "chosen", "rejected", "completion", "label", "info", "summaries", "choice")
ALIASES = {"question": "prompt", "instruction": "prompt", "input": "prompt", "query": "prompt"} | {
    "response": "completion", "output": "completion", "answer": "completion", "accepted": "chosen",
    "preferred": "chosen", "positive": "chosen", "dispreferred": "rejected", "negative": "rejected",
}  # fmt: skip
LOOK_AHEAD = 50  # rows looked at to tell apart layouts that share their column names


@dataclass(frozen=True)
class Format:
    """A detected layout. `name` is for people; `kinds` maps each raw column that is read to what its cells hold.

    `layout` is "explicit", "implicit" or "tldr" (pairs), or "kto"; `chat` says that examples are messages; `unpair`
    that method kto splits each pair into a desirable and an undesirable completion.
    """

    name: str
    layout: str
    kinds: dict[str, str]
    chat: bool = False
    unpair: bool = False


def common_prefix(first: Sequence, *others: Sequence) -> int:
    """Length of the longest common prefix of strings or lists, by bisection (slices compare at the speed of C)."""
    low, high = 0, min(len(first), *map(len, others))
    while low < high:
        middle = (low + high + 1) // 2
        if all(other[low:middle] == first[low:middle] for other in others):
            low = middle
        else:
            high = middle - 1
    return low


def kind(cell: Any) -> str:
    """What a cell holds, in words: "text" and "messages" are usable, everything else is not."""
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, list):
        return "messages" if all(isinstance(m, Mapping) and "role" in m for m in cell) else "a list of something else"
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(cell), f"a {type(cell).__name__}")


def detect(dataset: Dataset, method: str) -> Format:
    """The layout of a raw dataset, for `method` "dpo", "ipo" or "kto".

    Raises `DataError` when the columns fit no accepted layout (with the nearest misspelling), when a column holds
    nothing but another type, and when KTO data is given to a method that needs pairs.
    """
    found = set(dataset.column_names)
    if not len(dataset):
        raise DataError("the dataset has 0 rows, so there is nothing to learn from; give a file or a split with rows.")
    kto = {"prompt", "completion", "label"} <= found
    if method == "kto" and kto:
        kinds = {c: _column_kind(dataset, c) for c in ("prompt", "completion")}
        if not any(_label(cell) is not None for cell in dataset["label"]):
            raise DataError(
                f"the column 'label' holds {_type(dataset, 'label')} and no row is true/false or 1/0, so nothing says "
                "which completions are desirable; write true for desirable and false for undesirable."
            )
        chat = "messages" in kinds.values()
        return Format(f"prompt, completion, label ({'messages' if chat else 'text'})", "kto", kinds, chat)
    if {"chosen", "rejected"} <= found:
        return _detect_pairs(dataset, method == "kto")
    if {"info", "summaries", "choice"} <= found:
        kinds = dict.fromkeys(("info", "summaries", "choice"), "any")
        return Format("TL;DR comparisons (info, summaries, choice)", "tldr", kinds, False, method == "kto")
    if kto:
        raise DataError(
            f"the data is KTO data (prompt, completion, label), but method={method} compares a chosen with a rejected "
            "completion of the same prompt; set method=kto, or give data with the columns chosen and rejected."
        )
    raise DataError(f"{_columns_message(dataset)}\n{LAYOUTS}")


def _columns_message(dataset: Dataset) -> str:
    """The columns found, and for each unknown one the known name it resembles."""
    columns = dataset.column_names
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


def _type(dataset: Dataset, column: str) -> str:
    feature = dataset.features[column]
    return feature.dtype if isinstance(feature, Value) else str(feature)


def _column_kind(dataset: Dataset, column: str) -> str:
    """Kind of the first usable cell of a column; `DataError` where no cell is text or messages."""
    if not isinstance(dataset.features[column], Value) or "string" in _type(dataset, column):
        for cell in dataset[column]:
            if (k := kind(cell)) in ("text", "messages"):
                return k
    raise DataError(
        f"the column '{column}' (type {_type(dataset, column)}) has no text in any row, so there is nothing to train "
        f'on; lorat needs strings or lists of {{"role", "content"}} messages there: write the values as strings, or '
        f"give another column the name '{column}'."
    )


def _detect_pairs(dataset: Dataset, unpair: bool) -> Format:
    kinds = {c: _column_kind(dataset, c) for c in ("prompt", "chosen", "rejected") if c in dataset.column_names}
    rows = dataset.select(range(min(LOOK_AHEAD, len(dataset))))
    if "messages" in kinds.values():
        if "prompt" in kinds and not any(map(_is_dialogue, rows["chosen"])):
            return Format("prompt, chosen, rejected (messages)", "explicit", kinds, True, unpair)
        if kinds.get("prompt") == "text":  # UltraFeedback: repeats what the dialogues hold
            del kinds["prompt"]
        return Format("dialogues as messages (prompt = common prefix)", "implicit", kinds, True, unpair)
    if "prompt" in kinds:
        return Format("prompt, chosen, rejected (text)", "explicit", kinds, False, unpair)
    texts = ((c, r) for c, r in zip(rows["chosen"], rows["rejected"]) if isinstance(c, str) and isinstance(r, str))
    if any(HH_MARKER in c[: common_prefix(c, r)] for c, r in texts):
        return Format("Anthropic-HH dialogues (prompt = common prefix)", "implicit", kinds, False, unpair)
    if "did you mean 'prompt'" in (message := _columns_message(dataset)):
        raise DataError(f"{message}\n{LAYOUTS}")
    return Format("chosen and rejected texts (prompt = common prefix)", "implicit", kinds, False, unpair)


def canonical_text(row: Mapping[str, Any], form: Format) -> dict[str, Any] | str:
    """One raw row as {"prompt", "chosen", "rejected"} or {"prompt", "completion", "label": bool}.

    Prompt and completions are all `str`, or all lists of messages where `form.chat`. Returns a reason (`str`) when
    the row cannot be used: a cell that is no text or messages, a label that is no boolean, chosen equal to rejected.
    """
    if form.layout == "tldr":
        return _tldr(row)
    cells: dict[str, Any] = {}
    for column, expected in form.kinds.items():
        cell = row[column]
        if kind(cell) != expected:
            return f"{column} is {kind(cell)}, not {expected}"
        if expected == "messages":
            if not all(isinstance(m["role"], str) and isinstance(m.get("content"), str) for m in cell):
                return f"{column} has a message whose content is not text"
            cell = [{"role": m["role"], "content": m["content"]} for m in cell]
        elif form.chat:  # bare text among messages is one turn
            cell = [{"role": "user" if column == "prompt" else "assistant", "content": cell}]
        cells[column] = cell
    if form.layout == "kto":
        if (label := _label(row["label"])) is None:
            return "label is neither true/false nor 1/0"
        return cells | {"label": label}
    if cells["chosen"] == cells["rejected"]:
        return "chosen equals rejected"
    if form.chat and (form.layout == "implicit" or _is_dialogue(cells["chosen"])):
        return _split_messages(
            cells["chosen"], cells["rejected"], cells["prompt"] if form.kinds.get("prompt") == "messages" else []
        )
    return cells if form.layout == "explicit" else _split_text(**cells)


def _label(cell: Any) -> bool | None:
    return bool(cell) if isinstance(cell, (bool, int, float)) and cell in (0, 1) else None


def _is_dialogue(cell: Any) -> bool:
    """Whether messages open with somebody else's turn, so that they hold the prompt too."""
    return kind(cell) == "messages" and bool(cell) and cell[0]["role"] != "assistant"


def _split_messages(chosen: list, rejected: list, prompt: list) -> dict[str, Any]:
    """Dialogues -> prompt (their common messages, ending before an answer) and the two continuations."""
    if chosen[: len(prompt)] != prompt:  # e.g. a system message kept in a column of its own
        chosen, rejected = prompt + chosen, prompt + rejected
    shorter = min(len(chosen), len(rejected))
    n = common_prefix(chosen, rejected)
    while 0 < n < shorter and not chosen[n]["role"] == rejected[n]["role"] == "assistant":
        n -= 1
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _split_text(chosen: str, rejected: str) -> dict[str, Any]:
    """Texts -> prompt and continuations: at the last HH marker in the common prefix, else at a word boundary.

    A space at the boundary belongs to the continuations, as byte-level BPE has it.
    """
    common = chosen[: common_prefix(chosen, rejected)]
    n = common.rfind(HH_MARKER)
    if n >= 0:
        n += len(HH_MARKER)
    else:
        n = len(common)
        if n and _in_word(common[-1]) and (_in_word(chosen[n : n + 1]) or _in_word(rejected[n : n + 1])):
            while n and not common[n - 1].isspace():
                n -= 1
        n -= common[:n].endswith(" ")
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _in_word(char: str) -> bool:
    """Letters and digits of scripts that put spaces between words (CJK, from U+2E80 on, may be cut anywhere)."""
    return char.isalnum() and char < "\u2e80"


def _tldr(row: Mapping[str, Any]) -> dict[str, Any] | str:
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if isinstance(summaries, Mapping):  # a struct of lists, as older files have it
        summaries = [{"text": text} for text in summaries.get("text") or []]
    texts = [str(s["text"]) for s in summaries or [] if isinstance(s, Mapping) and isinstance(s.get("text"), str)]
    if len(texts) != 2:
        return "summaries are not two texts"
    if isinstance(choice, bool) or choice not in (0, 1):
        return "choice is neither 0 nor 1"
    parts = [info.get(key) if isinstance(info, Mapping) else None for key in ("subreddit", "title", "post")]
    if not all(isinstance(part, str) for part in parts):
        return "info lacks the subreddit, title or post"
    if texts[0].strip() == texts[1].strip():
        return "chosen equals rejected"
    prompt = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:".format(*parts)
    return {"prompt": prompt, "chosen": " " + texts[choice].strip(), "rejected": " " + texts[1 - choice].strip()}
