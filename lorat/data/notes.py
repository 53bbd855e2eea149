"""What is not wrong but rarely meant, said in one line with the setting that changes it.

Each canonical example gets marks (`seen`), a word each; their counts over the dataset come to lines (`lines`). So rows
may be looked at in any order and in several processes. Marks with "→" and "[]." are from `messages.normal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .dialogues import HH_MARKER, without_last_user
from .layout import SIDES, Format
from .templates import HISTORY


def seen(example: Mapping[str, Any], special: Iterable[str]) -> set[str]:
    """The marks of one example; `special`: the tokenizer's special tokens as text."""
    sides = [example[side] for side in SIDES if side in example]
    prompt, out = example["prompt"], set()
    if any(without_last_user(side)[1] for side in sides):
        out.add("user last")
    if not isinstance(prompt, str):
        return out
    start = prompt.strip()
    if HH_MARKER in prompt:
        out.add("hh")
    if any(token in prompt for token in special):
        out.add("marked")
    if start and all(side.lstrip().startswith(start) for side in sides):
        out.add("repeats")
    elif prompt and not prompt[-1].isspace() and all(side[:1].isalnum() for side in sides):
        out.add("glued")
    return out


def joined(marks: Iterable[str]) -> str:
    """Marks as one text, the same for the same marks."""
    return "\n".join(sorted(m for m in marks if m))


def roles(said: Mapping[str, int]) -> tuple[str, ...]:
    """The roles that were translated, e.g. "human→user"."""
    return tuple(sorted(m for m in said if "→" in m))


def fields(said: Mapping[str, int]) -> tuple[str, ...]:
    """The fields of messages and answers that were not read, e.g. "chosen[].weight"."""
    return tuple(sorted(m for m in said if "[]." in m))


def lines(said: Mapping[str, int], form: Format, instruct: bool) -> list[str]:
    """What the marks' counts come to, a line each. `instruct`: the tokenizer has a chat template."""
    out, n = [], said.get("", 0)

    def many(mark: str) -> bool:
        return said.get(mark, 0) > n / 2

    if many("repeats") and form.layout == "explicit":
        mapping = ", ".join(f"{side}: {form.roles.get(side, side)}" for side in ("chosen", "rejected"))
        out.append(
            f"the answers of {said['repeats']} of {n} rows begin with the prompt, which the model then reads twice; set "
            f"columns: {{prompt: null, {mapping}}} to take the prompt from what the answers have in common."
        )
    elif many("glued"):
        chat = ", or dialogues: chat to write them through the chat template" if instruct else ""
        out.append(
            f"the answers of {said['glued']} of {n} rows follow their prompt without a space or a line between; set "
            f"dialogues: text to write both as Human:/Assistant: turns{chat}."
        )
    if instruct and not form.chat and n and not many("marked") and form.settings.dialogues is None:
        what = "Human:/Assistant: dialogues" if many("hh") else "plain texts"
        out.append(
            f"the tokenizer has a chat template, and these {what} are trained as they are written, without it; set "
            "dialogues: chat to write them as its messages."
        )
    if count := said.get("user last"):
        out.append(
            f"{count} row{'s end' if count > 1 else ' ends'} with the user's words, which are trained as part of the "
            "answer; set user_endings: cut to leave them out, or drop to leave out the rows."
        )
    if count := said.get(HISTORY):
        out.append(f"in {count} row{'s' * (count > 1)} {HISTORY}.")
    return out
