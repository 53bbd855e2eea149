"""Dialogues that hold their prompt: where it ends, and `Human:`/`Assistant:` text as messages and back.

Two whole dialogues share a beginning, and the prompt is what they share up to an answer. Nothing is tokenised here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .messages import turn

HH_MARKER = "\n\nAssistant:"
MARKERS = (
    HH_MARKER,
    "<|im_start|>assistant\n",
    "<|assistant|>\n",
    "### Response:\n",
    "[/INST]",
    "<start_of_turn>model\n",
)
_TURNS = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_NAMES = {"user": "Human", "assistant": "Assistant"}


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


def has_marker(chosen: str, rejected: str) -> bool:
    """Whether what two texts share holds a marker after which an answer begins."""
    common = chosen[: common_prefix(chosen, rejected)]
    return any(marker in common for marker in MARKERS)


def split_text(chosen: str, rejected: str) -> dict[str, Any]:
    """Texts -> prompt and continuations: at the last marker in the common prefix, else at a word boundary.

    A space at the boundary belongs to the continuations, as byte-level BPE has it.
    """
    common = chosen[: common_prefix(chosen, rejected)]
    n = max(common.rfind(marker) + len(marker) if marker in common else 0 for marker in MARKERS)
    if not n:
        n = len(common)
        if n and _in_word(common[-1]) and (_in_word(chosen[n : n + 1]) or _in_word(rejected[n : n + 1])):
            while n and not common[n - 1].isspace():
                n -= 1
        n -= common[:n].endswith(" ")
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _in_word(char: str) -> bool:
    """Letters and digits of scripts that put spaces between words (CJK, from U+2E80 on, may be cut anywhere)."""
    return char.isalnum() and char < "\u2e80"


def split_messages(chosen: list, rejected: list, prompt: list) -> dict[str, Any]:
    """Dialogues -> prompt (their common messages, ending before an answer) and the two continuations."""
    if chosen[: len(prompt)] != prompt:  # e.g. a system message kept in a column of its own
        chosen, rejected = prompt + chosen, prompt + rejected
    shorter = min(len(chosen), len(rejected))
    n = common_prefix(chosen, rejected)
    while 0 < n < shorter and not chosen[n]["role"] == rejected[n]["role"] == "assistant":
        n -= 1
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def is_hh(text: str) -> bool:
    """Whether text is a `Human:`/`Assistant:` dialogue, or the prompt of one."""
    return text.lstrip().startswith("Human:") or HH_MARKER in text


def to_messages(text: str, role: str) -> list[dict[str, Any]] | str:
    """A prompt (`role` "user") or an answer ("assistant") that is text, as messages; a reason (`str`) where it cannot be.

    A `Human:`/`Assistant:` dialogue becomes its turns; the empty turn in which it waits for an answer goes.
    """
    if not is_hh(text) and not (role == "assistant" and "\n\nHuman:" in text):
        return [turn(role, text.strip())] if text.strip() else []
    pieces = _TURNS.split(text.strip() if role == "user" else text)
    lead, turns = pieces[0].strip(), list(zip(pieces[1::2], pieces[2::2]))
    out = []
    if lead:
        out.append(turn("assistant" if role == "assistant" else "system", lead))
    out += [turn("user" if name == "Human" else "assistant", said.strip()) for name, said in turns]
    while out and role == "user" and not out[-1]["content"] and out[-1]["role"] == "assistant":
        out.pop()
    return out if all(message["content"] for message in out) else "an empty turn within a dialogue"


def to_text(messages: list[dict[str, Any]], answer: bool) -> str | None:
    """Messages as `Human:`/`Assistant:` text; an `answer` goes on after "Assistant:". None where they hold tool calls."""
    out = []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"].strip()
        if message.get("tool_calls") or role in ("tool", "function", "ipython"):
            return None
        if role in ("system", "developer"):
            out.append(content if not i else f"\n\n{content}")
        elif answer and not i and role == "assistant":
            out.append(f" {content}")
        else:
            out.append(f"\n\n{_NAMES[role]}: {content}")
    return "".join(out) + ("" if answer else HH_MARKER)


def without_last_user(part: str | list[dict[str, Any]]) -> tuple[str | list[dict[str, Any]], bool]:
    """A completion without the user's words at its end, and whether there were any."""
    if isinstance(part, str):
        turns = list(_TURNS.finditer(part))
        ends = bool(turns) and turns[-1][1] == "Human"
        return (part[: turns[-1].start()], True) if ends else (part, False)
    n = len(part)
    while n and part[n - 1]["role"] == "user":
        n -= 1
    return part[:n], n < len(part)
