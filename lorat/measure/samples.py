"""Sampled answers in the formats that others read: JSON lines, AlpacaEval, Arena-Hard.

Field names were read off those projects' own code (docs/evaluation.md says which). Nothing in a file depends on how the
sampling was divided or interrupted, but Arena-Hard's time stamp.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.prompts import Prompt
from ..errors import ConfigError, DataError

FORMATS = ("jsonl", "alpaca-eval", "arena-hard", "arena-hard-0.1")


@dataclass(frozen=True)
class SampledAnswer:
    """The `sample`-th answer to prompt number `number`; `tokens`: those of `text`; `ended`: false if it was cut."""

    number: int
    prompt: Prompt
    sample: int
    text: str
    tokens: int
    ended: bool


def check_format(form: str, prompts: Sequence[Prompt], samples: int) -> None:
    """Refuse, before anything is sampled, what a format cannot hold."""
    if form in ("alpaca-eval", "arena-hard") and samples != 1:
        raise ConfigError(f"{form} holds one answer a prompt, --samples is {samples}; set it to 1, or --format jsonl.")
    if form.startswith("arena-hard"):
        if nameless := [i for i, p in enumerate(prompts) if p.id is None]:
            field = "uid" if form == "arena-hard" else "question_id"
            raise DataError(
                f"{form} finds answers by their question's {field}, and {len(nameless)} of {len(prompts)} prompts have none "
                f"(row {nameless[0]}); give Arena-Hard's question.jsonl, or --format jsonl."
            )
        if len({p.id for p in prompts}) < len(prompts):
            raise DataError(
                f"{form} finds answers by their question's id, and some prompts share one; make them unique."
            )


def render(form: str, answers: Sequence[SampledAnswer], generator: str, now: float) -> str:
    """The whole file's text; `now`: seconds since 1970, for Arena-Hard."""
    if form == "alpaca-eval":
        rows = [
            {"instruction": a.prompt.instruction, "output": a.text, "generator": generator, "dataset": a.prompt.dataset}
            for a in answers
        ]
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    if form == "arena-hard":
        lines: list[dict[str, Any]] = [_arena(a, generator, now) for a in answers]
    elif form == "arena-hard-0.1":
        asked: dict[int, list[SampledAnswer]] = {}
        for a in answers:
            asked.setdefault(a.number, []).append(a)
        lines = [_arena_0_1(several, generator, now) for several in asked.values()]
    else:
        lines = [_line(a, generator) for a in answers]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _line(a: SampledAnswer, generator: str) -> dict[str, Any]:
    name = {} if a.prompt.id is None else {"id": a.prompt.id}
    return {
        "index": a.number,
        **name,
        "sample": a.sample,
        "prompt": a.prompt.content,
        "output": a.text,
        "tokens": a.tokens,
        "ended": a.ended,
        "generator": generator,
    }


def _arena(a: SampledAnswer, generator: str, now: float) -> dict[str, Any]:
    return {
        "uid": a.prompt.id,
        "ans_id": _answer_id(a, generator),
        "model": generator,
        "messages": [*a.prompt.messages, {"role": "assistant", "content": {"answer": a.text}}],
        "tstamp": now,
        "metadata": {"token_len": a.tokens, **markdown(a.text)},
    }


def _arena_0_1(several: Sequence[SampledAnswer], generator: str, now: float) -> dict[str, Any]:
    first = several[0]
    choices = [{"index": i, "turns": [{"content": a.text}]} for i, a in enumerate(several)]
    line = {"question_id": first.prompt.id, "answer_id": _answer_id(first, generator), "model_id": generator}
    more = {"conv_metadata": {"token_len": first.tokens, **markdown(first.text)}} if len(several) == 1 else {}
    return {**line, "choices": choices, "tstamp": now, **more}


def _answer_id(a: SampledAnswer, generator: str) -> str:
    return hashlib.blake2b(json.dumps([a.prompt.id, generator, a.text]).encode(), digest_size=11).hexdigest()


def markdown(text: str) -> dict[str, dict[str, int]]:
    """What Arena-Hard's style control counts: headers by level, list items, bold spans, outside of code blocks."""
    plain = re.sub(r"```[^`]*```", "", text)
    count = lambda pattern: len(re.findall(pattern, plain, re.MULTILINE))  # noqa: E731
    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
