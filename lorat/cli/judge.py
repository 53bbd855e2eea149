"""`lorat judge`: a win rate from two files of answers and a judge, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..files import write_whole
from .options import positive

CACHE = "judge-cache.jsonl"
DEFAULT_URL = "https://api.openai.com/v1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..judge.prompts import tasks

    parser.description = "Let a language model compare two files of answers."
    add = parser.add_argument
    add(
        "a",
        metavar="A",
        help="FILE, or FILE:MODEL where rows name models; prompt and output in JSON Lines or a JSON list",
    )
    add("b", metavar="B", help="the same prompts, answered by the model to compare with")
    add("--model", required=True, help="the judge, as its server calls it")
    add("--base-url", help=f"an OpenAI-compatible server (default: OPENAI_BASE_URL, else {DEFAULT_URL})")
    add("--task", choices=tasks(), default="dialogue", help="which prompt (default: dialogue)")
    add("--prompt", metavar="FILE", help="a prompt of your own with {prompt}, {a} and {b}, instead of --task")
    add("--out", metavar="FILE", help="write the numbers and every verdict as JSON")
    add("--cache", metavar="FILE", help=f"answers so far (default: {CACHE} beside --out, else in this folder)")
    add("--limit", type=positive, metavar="N", help="the first N prompts alone")
    add("--concurrency", type=positive, default=8, help="questions under way at a time (default: 8)")
    add("--retries", type=int, default=5, help="of one question, with growing pauses (default: 5)")
    add("--timeout", type=float, default=120, help="seconds for one answer (default: 120)")
    add("--max-tokens", type=positive, default=512, help="length of a judge's answer (default: 512)")
    add("--temperature", type=float, default=0.0, help="of the judge (default: 0)")
    add("--request", metavar="JSON", default="{}", help="more fields of the request; null leaves one of ours out")
    add("--price-in", type=float, metavar="X", help="price of a million tokens that the judge reads")
    add("--price-out", type=float, metavar="X", help="and of a million that it writes")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Compare two files of answers; prints a table, writes JSON with --out."""
    from rich.console import Console
    from rich.progress import Progress

    from ..judge.answers import join, read_answers
    from ..judge.client import Cache, Endpoint
    from ..judge.judge import compare
    from ..judge.prompts import load_prompt

    template = load_prompt(options.task, options.prompt)
    names = _names(options.a, options.b)
    pairs = join(read_answers(options.a), read_answers(options.b), names)
    kept = {p.number for p in pairs} if options.limit is None else set(range(options.limit))
    pairs = [p for p in pairs if p.number in kept]
    request = {"temperature": options.temperature, "max_tokens": options.max_tokens, **_request(options.request)}
    url = options.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
    endpoint = Endpoint(options.model, url, request, options.concurrency, options.retries, options.timeout)
    given = (options.price_in, options.price_out)
    prices = None if given == (None, None) else (given[0] or 0.0, given[1] or 0.0)
    out, stderr = options.out and Path(options.out), Console(stderr=True, highlight=False, soft_wrap=True)
    if out and not out.parent.is_dir():  # before anything is paid for
        raise ConfigError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}; make it, or name another.")
    cache = Cache(Path(options.cache) if options.cache else (out.parent if out else Path()) / CACHE)
    if cache.skipped:
        stderr.print(f"{cache.path}: {cache.skipped} lines could not be read and count as not asked.", markup=False)
    try:
        with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
            task = bar.add_task("asking", total=None)
            result = compare(
                pairs,
                template,
                endpoint,
                cache,
                prices=prices,
                seed=options.seed,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        print(
            f"lorat: interrupted; {len(cache.replies)} answers are in {cache.path}. The same command goes on.",
            file=sys.stderr,
        )
        return 130
    finally:
        cache.close()
    result = {"a": names[0], "b": names[1], **result}
    _show(result)
    if out:
        write_whole(out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"Every verdict is in {out}.")
    return 0


def _request(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--request {text!r} is no JSON ({error}); write it like '{{\"top_p\": 0.9}}'.") from error
    if not isinstance(value, dict) or value.keys() & {"model", "messages", "stream"}:
        raise ConfigError(f"--request {text!r} must be an object without model, messages and stream.")
    return value


def _names(a: str, b: str) -> tuple[str, str]:
    """The models' or files' names, with their folders' where those alone say little."""
    from ..judge.answers import split

    (path_a, model_a), (path_b, model_b) = split(a), split(b)
    if (path_a.resolve(), model_a) == (path_b.resolve(), model_b):
        raise DataError(f"{a!r} is given twice; a model always ties with itself. Name two.")
    short = [model or path.stem for path, model in ((path_a, model_a), (path_b, model_b))]
    long = [f"{p.resolve().parent.name}/{s}" for p, s in zip((path_a, path_b), short, strict=True)]
    one, other = (n if "samples" in s and short[0] != short[1] else s for s, n in zip(short, long, strict=True))
    return (one, other) if one != other else (long[0], long[1]) if long[0] != long[1] else (a, b)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..judge.verdicts import thin

    def percent(rate: dict[str, Any] | None) -> str:
        if rate is None:
            return "not known: every answer is longer by the same"
        return (
            f"{rate['value']:.1%}  ({rate['low']:.1%} to {rate['high']:.1%}){thin(result['judged'], result['pairs'])}"
        )

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)  # a row stays in its line
    title = f"{result['a']} against {result['b']}, judged by {result['judge']['model']}"
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_row("win rate, 95 % interval", percent(result["win_rate"]))
    table.add_row("at equal length", percent(result["length_controlled_win_rate"]))
    table.add_row("wins / ties / losses", f"{result['wins']} / {result['ties']} / {result['losses']}")
    lengths = result["mean_length"]
    table.add_row("mean length, characters", f"{lengths['a']:.0f} against {lengths['b']:.0f}")
    if result["orders_agree"] is not None:
        table.add_row("both orders agree", f"{result['orders_agree']:.1%}")
    if result["first_shown_wins"] is not None:
        table.add_row("wins of the answer shown first", f"{result['first_shown_wins']:.1%}")
    table.add_row(
        "unreadable verdicts",
        f"{result['unreadable']}, of which {result['cut_off']} answers cut off" if result["unreadable"] else "0",
    )
    table.add_row(
        "pairs left out", f"{result['left_out']} of {result['pairs']} ({result['refused']} requests not answered)"
    )
    console.print(table)
    console.print(escape(cost_line(result["cost"])), soft_wrap=True)


def cost_line(cost: dict[str, Any]) -> str:
    """What was asked now and what all of it comes to, in one line."""
    now, all_ = cost["this_run"], cost["all"]
    text = f"Cost: {now['questions']} questions asked, {now['tokens_in']:,} tokens in, {now['tokens_out']:,} out"
    text += f", {now['money']:.4g} at the given prices" if "money" in now else ""
    if all_["questions"] > now["questions"]:
        text += f"; {all_['questions'] - now['questions']} more from the cache"
        text += f", {all_['money']:.4g} with them" if "money" in all_ else ""
    if now["not_counted"]:
        text += f"; the server counted no tokens for {now['not_counted']}"
    return text + "."
