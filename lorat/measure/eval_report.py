"""What `lorat eval` found, as tables for a terminal. Every number comes from the result; nothing is computed here."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show(console: Console, result: dict[str, Any]) -> None:
    """Print preferences, calibration, samples and notes of an `eval.json`, in 80 columns."""
    preferences = result["preferences"]
    if preferences["against"]:
        _rewards(console, preferences)
        _reliability(console, preferences)
    _models(console, preferences)
    if "generation" in result:
        _samples(console, result["generation"])
    if result["notes"]:
        console.print("\n[bold]Notes")
    for note in result["notes"]:
        console.print(f"• {note}", soft_wrap=True, markup=False)


def _table(console: Console, title: str, *columns: str) -> Table:
    console.print(f"\n[bold]{title}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _explain(console: Console, text: str) -> None:
    console.print(text, style="dim", soft_wrap=True)


def _rewards(console: Console, preferences: dict[str, Any]) -> None:
    title = f"Rewards on {preferences['pairs']} pairs, {preferences['prompts']} prompts (± standard error)"
    table = _table(console, title, "log-ratios, nats", "accuracy", "margin", "chosen", "rejected")
    for name, m in preferences["against"].items():
        ratios = (_plus(m[k], "+.2f") for k in ("margin", "logratio_chosen", "logratio_rejected"))
        table.add_row(_versus(name), _share(m["accuracy"]), *ratios)
    console.print(table)
    _explain(console, f"Margin: chosen less rejected; the reward margin is beta = {preferences['beta']:g} times it.")
    ties = {_versus(n): m["ties"] for n, m in preferences["against"].items() if m["ties"]}
    if ties:
        said = ", ".join(f"{n} of {preferences['pairs']} in {name}" for name, n in ties.items())
        _explain(console, f"Margins of exactly 0 count as wrong: {said}.")


def _reliability(console: Console, preferences: dict[str, Any]) -> None:
    what = "beta * margin per token" if preferences["length_normalize"] else "beta * margin"
    title = f"Calibration of sigmoid({what}) as the chance that chosen is preferred"
    table = _table(console, title, "", "ECE", "Brier (coin 0.25)", "log loss (coin 0.693)")
    for name, m in preferences["against"].items():
        table.add_row(_versus(name), f"{m['ece']:.3f}", f"{m['brier']:.3f}", f"{m['log_loss']:.3f}")
    console.print(table)
    name, first = next(iter(preferences["against"].items()))
    table = _table(console, f"Reliability of {_versus(name)}", "predicted", "pairs", "mean prediction", "right")
    for b in first["reliability"]:
        span = f"{b['low']:.0%} to {b['high']:.0%}"
        table.add_row(span, str(b["pairs"]), f"{b['confidence']:.1%}", f"{b['accuracy']:.1%}")
    console.print(table)


def _models(console: Console, preferences: dict[str, Any]) -> None:
    table = _table(console, "Log-probs", "nats", "chosen", "rejected", "a token of each", "likelier")
    for name, m in preferences["models"].items():
        table.add_row(
            name,
            _plus(m["logp_chosen"], ".2f"),
            _plus(m["logp_rejected"], ".2f"),
            f"{m['logp_chosen_per_token']:.3f}, {m['logp_rejected_per_token']:.3f}",
            _number(m["prefers_chosen"][0], ".1%"),
        )
    console.print(table)
    _explain(console, "Likelier: pairs whose chosen completion is more probable than the rejected one.")


def _samples(console: Console, generation: dict[str, Any]) -> None:
    of = f"{generation['samples']} samples a model, {generation['prompts']} prompts, at most"
    of += f" {generation['max_new_tokens']} tokens, temperature {generation['temperature']:g}"
    models = generation["models"]
    kls = [(f"{name} from {o}", m) for name, ms in models.items() for o, m in ms.get("against", {}).items()]
    if kls:
        table = _table(console, f"KL divergence ({of})", "nats", "KL", "by log-ratio", "KL/token")
        for name, m in kls:
            table.add_row(name, _plus(m["kl"], ".3f"), _plus(m["kl_sampled"], ".3f"), f"{m['kl_per_token']:.4f}")
        console.print(table)
        _explain(
            console, "KL: exact divergence of each next token, summed over a sample. By log-ratio: the same, noisier."
        )
    table = _table(console, "Samples", "", "tokens", "end of text", "distinct-1, -2, -3", "self-BLEU")
    for name, m in models.items():
        variety = " ".join(_number(m[f"distinct_{n}"], ".3f") for n in (1, 2, 3))
        table.add_row(name, _plus(m["length"], ".1f"), _share(m["ended"]), variety, _number(m["self_bleu"], ".1f"))
    console.print(table)
    _explain(
        console, "distinct-n: different n-grams by all of them, high is diverse. self-BLEU: 0 to 100, low is diverse."
    )
    said = Table(show_lines=True)
    for column, width in (("prompt", 2), *((name, 3) for name in models)):
        said.add_column(column, ratio=width)
    shown: dict[str, list[str]] = {}
    for rows in zip(*(m["texts"] for m in models.values()), strict=True):
        if rows[0]["prompt"] not in shown:
            shown[rows[0]["prompt"]] = [_short(rows[0]["prompt"], True), *(_short(r["output"]) for r in rows)]
        if len(shown) == 3:
            break
    for cells in shown.values():
        said.add_row(*cells)
    console.print("\n[bold]What they say")
    console.print(said)


def _versus(name: str) -> str:
    return " vs ".join(name.split("/"))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plus(both: list[float | None], form: str) -> str:
    """A mean ± its standard error; large ones with one decimal."""
    form = form[:-2] + "1f" if both[0] is not None and abs(both[0]) >= 10 else form
    return _number(both[0], form) + ("" if both[1] is None else f" ± {format(both[1], form.replace('+', ''))}")


def _share(both: list[float | None]) -> str:
    return _number(both[0], ".1%") + ("" if both[1] is None else f" ± {both[1]:.1%}")


def _short(text: str, keep_end: bool = False, limit: int = 240) -> str:
    if len(text) > limit:
        text = f"… {text[-limit:]}" if keep_end else f"{text[:limit]} …"
    return escape(text)
