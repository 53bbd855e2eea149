"""Published layouts that are no prompt, chosen, rejected: a table of small functions.

Each reads one row and gives its pairs as parts (`prompt`, `chosen`, `rejected`, `messages`, `tools` …, text or messages
as they are written), or the reason why the row gives none. A new layout is a function under `@shape` and a row in
docs/data.md; recognising messages, splitting dialogues and tokenising are done elsewhere, once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .columns import RowSettings, cell
from .messages import kind, turn

Parts = dict[str, Any]
Read = Callable[[Mapping[str, Any], RowSettings], list[Parts] | str]
TIE = "a tie, so neither answer is the better one"


@dataclass(frozen=True)
class Shape:
    """A published layout: the columns it `needs`, those it reads where they are there, and how a row is read.

    `roles`: parts of it that `columns` may place in another column, with the column they are in by default.
    """

    name: str
    needs: tuple[str, ...]
    read: Read
    reads_too: tuple[str, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()

    def columns(self, settings: RowSettings) -> list[str]:
        """The columns that a row is read from, as the mapping has them."""
        moved = {default: settings.column(role, default) for role, default in self.roles}
        return [moved.get(name, name) for name in self.needs]


SHAPES: list[Shape] = []


def shape(
    name: str, needs: str, reads_too: str = "", roles: tuple[tuple[str, str], ...] = ()
) -> Callable[[Read], Read]:
    """Puts a function into the table."""

    def put(read: Read) -> Read:
        SHAPES.append(Shape(name, tuple(needs.split()), read, tuple(reads_too.split()), roles))
        return read

    return put


def find_shape(columns: list[str], settings: RowSettings) -> Shape | None:
    """The first layout of the table whose columns are all there."""
    return next((s for s in SHAPES if set(s.columns(settings)) <= set(columns)), None)


@shape("TL;DR comparisons (info, summaries, choice)", "info summaries choice", roles=(("choice", "choice"),))
def tldr(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """The comparisons of openai/summarize_from_feedback, written as their SFT models saw them."""
    info, summaries, choice = row["info"], row["summaries"], row[settings.column("choice", "choice")]
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
    texts = [text.strip() for text in texts]
    if texts[0] == texts[1]:
        return "chosen equals rejected"
    prompt = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:".format(*parts)
    return [{"prompt": prompt, "chosen": f" {texts[choice]}", "rejected": f" {texts[1 - choice]}"}]


@shape("preferences of OpenAI's fine-tuning API", "input preferred_output non_preferred_output")
def openai(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """OpenAI and Azure: `input.messages`, `input.tools`, and two lists of messages."""
    given = row["input"]
    if not isinstance(given, Mapping) or kind(given.get("messages")) != "messages":
        return "input holds no messages"
    answers = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return [{"messages": given["messages"], "tools": given.get("tools"), **answers}]


def either(row: Mapping[str, Any], first: str, second: str, better: int | None, prompt: Any) -> list[Parts] | str:
    """The pair of two answers of which `better` (0 or 1) is chosen; None is a tie."""
    if better is None:
        return TIE
    answers = (row[first], row[second])
    return [{"prompt": prompt, "chosen": answers[better], "rejected": answers[1 - better]}]


@shape(
    "PKU-SafeRLHF comparisons",
    "prompt response_0 response_1 better_response_id",
    roles=(("choice", "better_response_id"),),
)
def pku(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """`better_response_id` is 0 or 1; `columns: {choice: safer_response_id}` takes the safer one."""
    column = settings.column("choice", "better_response_id")
    choice = row[column]
    if isinstance(choice, bool) or choice not in (0, 1):
        return f"{column} is neither 0 nor 1"
    return either(row, "response_0", "response_1", int(choice), row["prompt"])


@shape("SHP comparisons", "history human_ref_A human_ref_B labels", roles=(("choice", "labels"),))
def shp(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """Stanford Human Preferences: `labels` is 1 where A is preferred, 0 where B is."""
    choice = row[settings.column("choice", "labels")]
    if isinstance(choice, bool) or choice not in (0, 1):
        return "labels is neither 0 nor 1"
    return either(row, "human_ref_A", "human_ref_B", 1 - int(choice), row["history"])


def _by_sign(strength: Any) -> int | str | None:
    """HelpSteer: below 0 the first answer is better, above 0 the second, 0 is a tie."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or math.isnan(strength):
        return "the preference is no number"
    return None if strength == 0 else int(strength > 0)


_EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@shape("HelpSteer2 preferences", "prompt response_1 response_2 preference_strength")
def helpsteer2(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """Strengths of -3 to 3; a prompt of several turns has `<extra_id_1>` between them."""
    better = _by_sign(row["preference_strength"])
    if isinstance(better, str):
        return better
    prompt = row["prompt"]
    if isinstance(prompt, str) and _EXTRA_ID.search(prompt):
        first, *rest = _EXTRA_ID.split(prompt)
        prompt = [turn("user", first), *(turn(w.lower(), said) for w, said in zip(rest[::2], rest[1::2]))]
    return either(row, "response_1", "response_2", better, prompt)


@shape("HelpSteer3 preferences", "context response1 response2 overall_preference")
def helpsteer3(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """Preferences of -3 to 3; `context` is the conversation so far."""
    better = _by_sign(row["overall_preference"])
    return better if isinstance(better, str) else either(row, "response1", "response2", better, row["context"])


@shape("Arena battles", "conversation_a conversation_b winner")
def arena(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
    """Two whole conversations and a winner: model_a, model_b, or a tie of some kind."""
    winner = str(row["winner"]).strip().lower()
    if winner not in ("model_a", "model_b"):
        return TIE if "tie" in winner or "both" in winner else "winner is neither model_a nor model_b nor a tie"
    a, b = row["conversation_a"], row["conversation_b"]
    return [{"chosen": a, "rejected": b} if winner == "model_a" else {"chosen": b, "rejected": a}]


_ANSWERS = ("answers", "responses", "completions", "generations", "candidates", "outputs")
_SCORES = ("scores", "ratings", "rewards", "overall_scores")
_RANKS = ("ranks", "rankings", "ranking", "rank")
_TEXT = ("answer", "response", "text", "content", "output", "completion", "generation")
_SCORE = ("score", "overall_score", "rating", "reward")


def rankings(columns: list[str], settings: RowSettings) -> Shape | None:
    """The layout of rows with many answers, where `columns` has one: a list of answers, ranked or scored.

    Ranks count from the best; scores and ranks stand in the answers or in a list beside them.
    """
    answers = _first("answers", _ANSWERS, columns, settings)
    prompt = next(
        (settings.column("prompt", n) for n in ("prompt", "question", "instruction", "query") if n in columns), None
    )
    prompt = settings.column("prompt", prompt or "")
    if answers is None or not prompt:
        return None
    ranks, scores = _first("ranks", _RANKS, columns, settings), _first("scores", _SCORES, columns, settings)
    beside = [c for c in (ranks or scores,) if c]
    system = settings.column("system", "system")

    def read(row: Mapping[str, Any], settings: RowSettings) -> list[Parts] | str:
        listed, order = cell(row, answers), cell(row, beside[0]) if beside else []
        if not isinstance(listed, list):
            return f"{answers} is {kind(listed)}, not a list of answers"
        if beside and (not isinstance(order, list) or len(order) != len(listed)):
            return f"{beside[0]} has not one number for each of {answers}"
        judged = [_judged(a, order[i] if beside else None, bool(ranks)) for i, a in enumerate(listed)]
        known = sorted((j for j in judged if j is not None), key=lambda j: -j[0])
        if len(known) < 2:
            return f"{answers} has fewer than two answers with a rank or a score"
        if known[0][0] == known[-1][0]:
            return TIE
        pairs = [(known[0], known[-1])]
        if settings.rankings == "all_pairs":
            pairs = [(a, b) for i, a in enumerate(known) for b in known[i + 1 :] if a[0] > b[0]]
        start = {"prompt": cell(row, prompt)} | ({"system": row[system]} if system in row else {})
        return [{**start, "chosen": a[1], "rejected": b[1]} for a, b in pairs]

    names = [prompt, answers, *beside]
    return Shape(f"answers with {'ranks' if ranks else 'ranks or scores'}", tuple(names), read, (system,))


def _first(role: str, names: tuple[str, ...], columns: list[str], settings: RowSettings) -> str | None:
    given = (settings.columns or {}).get(role)
    return given or next((n for n in names if n in columns), None)


def _judged(answer: Any, beside: Any, is_rank: bool) -> tuple[float, Any] | None:
    """`(how good, the larger the better; the answer)`, or None where it has no number or no words."""
    value, text = beside, answer
    if isinstance(answer, Mapping) and "role" not in answer:
        text = next((answer[k] for k in _TEXT if answer.get(k) is not None), None)
        if value is None and answer.get("rank") is not None:
            value, is_rank = answer["rank"], True
        elif value is None:
            value = next((answer[k] for k in _SCORE if answer.get(k) is not None), None)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if isinstance(value, bool) or math.isnan(number) or kind(text) not in ("text", "messages"):
        return None
    return (-number if is_rank else number), text


def unread_fields(answers: Any, column: str) -> set[str]:
    """Fields of ranked answers that nobody reads, as "column[].field"."""
    known = {*_TEXT, *_SCORE, "rank", "role"}
    fields = [a for a in answers if isinstance(a, Mapping)] if isinstance(answers, list) else []
    return {f"{column}[].{k}" for a in fields for k, v in a.items() if k not in known and v not in (None, "", [])}
