"""Two models side by side, as a judge sees them: both orders, ties, and what it cost.

Answers that are equal are a tie without asking. A prompt counts only if the judge's verdicts in both orders could be
read; the others are counted and reported. What this measures is one judge's taste: see docs/judging.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import DataError
from .answers import Pair
from .client import Asked, Cache, Endpoint, ask
from .prompts import fill, parse_verdict
from .verdicts import Rate, length_controlled, preference, win_rate


def compare(
    pairs: Sequence[Pair],
    template: str,
    endpoint: Endpoint,
    cache: Cache,
    *,
    prices: tuple[float, float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Judge `pairs`; returns a JSON-ready summary with a row for each. `prices`: per million tokens in and out.

    Raises `JudgeError` if the judge cannot be asked, `DataError` if not one pair of verdicts could be read.
    """
    differ = [pair for pair in pairs if pair.a != pair.b]
    texts = [fill(template, p.prompt, *order) for p in differ for order in ((p.a, p.b), (p.b, p.a))]
    keys, asked = ask(endpoint, texts, cache, progress)
    verdicts = [parse_verdict(asked.replies[k].text) if k in asked.replies else None for k in keys]
    both = iter(zip(verdicts[0::2], verdicts[1::2], strict=True))
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        equal = pair.a == pair.b
        straight, swapped = ("tie", "tie") if equal else next(both)
        row = {
            "prompt": pair.prompt,
            "a": pair.a,
            "b": pair.b,
            "equal": equal,
            "straight": straight,
            "swapped": swapped,
        }
        rows.append({**row, "number": pair.number, "preference": preference(straight, swapped)})
    read = [row for row in rows if row["preference"] is not None]
    if not read:
        raise DataError(_nothing(asked, keys))
    y, groups = [row["preference"] for row in read], [row["number"] for row in read]
    difference = [len(row["a"]) - len(row["b"]) for row in read]
    controlled = length_controlled(y, difference, groups, seed=seed)
    real = [row for row in read if not row["equal"]]
    decided = [v for row in real for v in (row["straight"], row["swapped"]) if v != "tie"]
    agree = [row for row in real if row["preference"] in (0, 1) or row["straight"] == row["swapped"] == "tie"]
    return {
        "pairs": len(rows),
        "judged": len(read),
        "left_out": len(rows) - len(read),
        "equal_answers": len(pairs) - len(differ),
        "wins": sum(v > 0.5 for v in y),
        "ties": sum(v == 0.5 for v in y),
        "losses": sum(v < 0.5 for v in y),
        "win_rate": _plain(win_rate(y, groups, seed=seed)),
        "length_controlled_win_rate": _plain(controlled),
        "mean_length": {k: sum(len(row[k]) for row in read) / len(read) for k in ("a", "b")},
        "orders_agree": len(agree) / len(real) if real else None,
        "first_shown_wins": sum(v == "A" for v in decided) / len(decided) if decided else None,
        "unreadable": sum(v is None for v, k in zip(verdicts, keys, strict=True) if k in asked.replies),
        "cut_off": sum(k in asked.replies and asked.replies[k].cut for k in keys),
        "refused": len(asked.refused),
        "refused_because": sorted(set(asked.refused.values()))[:5],
        "cost": cost(asked, set(keys), prices),
        "judge": {
            "model": endpoint.model,
            "base_url": endpoint.shown,
            "request": endpoint.request,
            "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "seed": seed,
        "rows": rows,
    }


def cost(asked: Asked, keys: set[str], prices: tuple[float, float] | None = None) -> dict[str, Any]:
    """Tokens in and out of this run's questions and of all, and money for them at `prices` per million tokens."""
    out: dict[str, Any] = {}
    for name, chosen in (("this_run", keys & asked.new), ("all", keys & asked.replies.keys())):
        replies = [asked.replies[k] for k in chosen]
        tokens = [sum(r.tokens_in or 0 for r in replies), sum(r.tokens_out or 0 for r in replies)]
        out[name] = {"questions": len(replies), "tokens_in": tokens[0], "tokens_out": tokens[1]}
        out[name]["not_counted"] = sum(r.tokens_in is None or r.tokens_out is None for r in replies)
        if prices is not None:
            out[name]["money"] = (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6
    return out


def _plain(rate: Rate | None) -> dict[str, Any] | None:
    return None if rate is None else asdict(rate)


def _nothing(asked: Asked, keys: list[str]) -> str:
    if asked.refused:
        why = next(iter(asked.refused.values()))
        return f"the judge did not answer {len(asked.refused)} requests, and no pair is left to count: {why}."
    example = next(asked.replies[k] for k in keys)
    advice = "it was cut off: raise --max-tokens" if example.cut else "have it end with a line such as Verdict: A"
    return (
        f"not one prompt has two verdicts that can be read. The first answer ends {example.text[-80:]!r}; {advice}, or "
        "set another --model or --prompt."
    )
