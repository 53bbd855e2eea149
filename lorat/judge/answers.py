"""Files of answers: what a model said to each prompt, as samplers and AlpacaEval write them, and two such files joined.

JSON Lines or a JSON list of rows with a prompt (`prompt` or `instruction`) and an answer (`output`, `completion` or
`response`). Either may be text or chat messages, which are written out as `role: text`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

PROMPTS = ("prompt", "instruction")
OUTPUTS = ("output", "completion", "response")


@dataclass(frozen=True)
class Answer:
    """What one model said to one prompt."""

    prompt: str
    output: str


@dataclass(frozen=True)
class Pair:
    """Two models' answers to one prompt; `number`: the prompt's, the same for several samples of one prompt."""

    number: int
    prompt: str
    a: str
    b: str


def read_answers(given: str | Path) -> list[Answer]:
    """The answers of one model: of `FILE`, or of `FILE:MODEL` where rows name theirs. In the file's order.

    Raises `DataError` naming the first row that cannot be read, or the models if there are several.
    """
    path, model = split(given)
    models = read_models(path)
    if model is None and len(models) == 1:
        return next(iter(models.values()))
    if model not in models:
        wrong = f"has no answers of {model!r}" if model is not None else f"holds answers of {len(models)} models"
        raise DataError(
            f"{str(path)!r} {wrong}; name one of its models: " + ", ".join(f"{path}:{m}" for m in models) + "."
        )
    return models[model]


def split(given: str | Path) -> tuple[Path, str | None]:
    """`FILE:MODEL` apart; a file of that whole name comes first."""
    file, colon, model = str(given).rpartition(":")
    return (Path(file), model) if colon and not Path(given).exists() and Path(file).is_file() else (Path(given), None)


def read_models(path: Path) -> dict[str, list[Answer]]:
    """All answers of a file by `model` (or `generator`), which is "" where a row names none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}. Name a JSON or JSON Lines file of answers.") from error
    models: dict[str, list[Answer]] = {}
    for where, row in _rows(path, text):
        answer = _answer(row, f"{path.name}, {where}")
        models.setdefault(str(row.get("model") or row.get("generator") or ""), []).append(answer)
    if not models:
        raise DataError(f"{str(path)!r} holds no rows; it needs one for each prompt.")
    return models


def _rows(path: Path, text: str) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            return [(f"row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise DataError(f"{str(path)!r} is no JSON list: {error}.") from error
    rows = []
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if line.strip():
            try:
                rows.append((f"line {i}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(f"{str(path)!r}, line {i}: no JSON ({error}). Each line must be one object.") from error
    return rows


def _answer(row: Any, where: str) -> Answer:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} instead of an object with a prompt and an answer.")
    values = []
    for kind, names in (("prompt", PROMPTS), ("answer", OUTPUTS)):
        name = next((n for n in names if row.get(n) is not None), None)
        if name is None:
            raise DataError(
                f"{where} has no {kind}: its keys are {', '.join(map(str, row)) or 'none'}. Name it {' or '.join(names)}."
            )
        values.append(_text(row[name], f"{where}, {name}"))
    return Answer(values[0].strip(), values[1].strip())


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # half a surrogate pair is JSON, but no text
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
    ):
        if len(value) == 1:
            return _text(value[0]["content"], where)
        return "\n\n".join(f"{m.get('role', 'user')}: {_text(m['content'], where)}" for m in value)
    raise DataError(
        f"{where} is neither text nor chat messages with a role and text content; it is {str(value)[:60]!r}."
    )


def join(a: list[Answer], b: list[Answer], names: tuple[str, str]) -> list[Pair]:
    """The answers of two models prompt by prompt, in the first one's order; n-th sample of a prompt with n-th sample.

    Raises `DataError` listing prompts that do not match.
    """
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = (defaultdict(list), defaultdict(list))
    for rows, by_prompt in zip((a, b), found, strict=True):
        for answer in rows:
            by_prompt[answer.prompt].append(answer.output)
    problems = []
    for (mine, theirs), (name, other) in zip((found, found[::-1]), (names, names[::-1]), strict=True):
        alone = [p for p in mine if p not in theirs]
        if alone:
            shown = "".join(f"\n    {p[:100]!r}" for p in alone[:5]) + ("\n    …" if len(alone) > 5 else "")
            problems.append(f"  - {len(alone)} of {len(mine)} prompts of {name} are not in {other}:{shown}")
    uneven = [p for p in found[0] if p in found[1] and len(found[0][p]) != len(found[1][p])]
    if uneven:
        p = uneven[0]
        problems.append(
            f"  - {len(uneven)} prompts have unequal numbers of answers, as {p[:100]!r}: {len(found[0][p])} in {names[0]}, "
            f"{len(found[1][p])} in {names[1]}"
        )
    if problems:
        raise DataError(
            "the two files do not answer the same prompts, so they cannot be compared:\n"
            + "\n".join(problems)
            + "\nSample both models on the same prompts, or take the rows above out."
        )
    return [
        Pair(number, prompt, one, other)
        for number, prompt in enumerate(found[0])
        for one, other in zip(found[0][prompt], found[1][prompt], strict=True)
    ]
