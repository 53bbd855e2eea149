"""`lorat eval` as a person types it: options, refusals before anything slow, tables, and a JSON file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from ..runs.versions import versions
from .options import add_row_options, add_run, lineup_of, result_path, row_settings
from .terminal import going_on, progress_bars, terminal

if TYPE_CHECKING:
    from rich.console import Console

EVAL = "eval.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure policy, reference, start and base on preference pairs, and the policy's own samples: rewards, "
        "calibration, KL, length, diversity. A killed evaluation goes on when the same command is run again."
    )
    add_run(parser)
    parser.add_argument("--data", required=True, help="preference pairs: a file, a folder or a hub id")
    parser.add_argument(
        "--split", default="train", help="split of them; slices such as test[:500] work (default: train)"
    )
    parser.add_argument("--subset", help="configuration of a hub dataset")
    add_row_options(parser)
    parser.add_argument(
        "--samples", type=int, default=256, help="completions to sample of each model; 0: none (default: 256)"
    )
    parser.add_argument(
        "--sample-from",
        nargs="+",
        choices=("policy", "reference", "start", "base"),
        default=["policy", "start"],
        metavar="MODEL",
        help="models to sample from: policy, reference, start, base (default: policy start)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest sample (default: 256)")
    parser.add_argument("--beta", type=float, help="of the rewards, if not the run's")
    parser.add_argument("--max-length", type=int, help="longest prompt + completion, if not the run's (else 1024)")
    parser.add_argument("--bins", type=int, default=10, help="of the reliability table (default: 10)")
    parser.add_argument("--max-tokens-per-pack", type=int, default=8192, help="in one forward pass: decides memory")
    parser.add_argument("--out", help=f"result file (default: {EVAL} in RUN)")


def run(o: argparse.Namespace) -> int:
    if o.samples < 0 or o.bins < 1 or (o.beta is not None and not o.beta > 0):
        raise ConfigError("--samples must be at least 0, --bins at least 1, and --beta above 0.")

    from ..measure.generation import Sampling
    from ..runs.folder import models_of

    sampling = Sampling(max_new_tokens=o.max_new_tokens, seed=o.seed, batch_size=o.batch_size)
    found = models_of(o.run, o.reference, o.start)
    for name in o.sample_from if o.samples else ():
        found.which(name)
    out = result_path(o.out, Path(o.run) / EVAL if Path(o.run).is_dir() else None, o.overwrite)
    console = terminal()

    from ..data.prepare import digest, prepare
    from ..data.reading import load_preference_data
    from ..files import Pieces, write_whole
    from ..measure.evaluation import Scope, evaluate

    raw = load_preference_data(o.data, o.split, o.subset)
    lineup = lineup_of(found, o)
    settings = found.settings
    max_length = o.max_length or settings.get("max_length", 1024)
    rows, report = prepare(
        raw,
        lineup.tokenizer,
        method="dpo",
        max_length=max_length,
        max_prompt_length=settings.get("max_prompt_length"),
        overlong=settings.get("overlong", "truncate"),
        name="eval",
        rows=row_settings(o, settings),
    )
    console.print(report.render(), soft_wrap=True, markup=False)
    scope = Scope(
        beta=o.beta or float(settings.get("beta", 0.1)),
        length_normalize=bool(settings.get("length_normalize", False)),
        bins=o.bins,
        samples=o.samples,
        sample_from=tuple(o.sample_from),
        sampling=sampling,
        max_tokens_per_pack=o.max_tokens_per_pack,
    )
    who = lineup.identity()
    belongs = {**who, "data": digest(rows), "samples": o.samples, **vars(sampling), "pack": o.max_tokens_per_pack}
    pieces = Pieces(out.with_name(f"{out.name}.part"), belongs, o.overwrite)
    with going_on(), progress_bars() as progress:
        numbers = evaluate(lineup, list(rows), scope, pieces, progress)
    numbers = {
        "run": str(o.run),
        "data": {
            "name": o.data,
            "split": o.split,
            "subset": o.subset,
            "max_length": max_length,
            "sha256": belongs["data"],
        },
        "models": {m: str(f) for m, f in found.folders.items()} | {"base": lineup.base.name},
        **who,
        "versions": versions(),
        **numbers,
    }
    console.print()
    show(console, numbers)
    lines = [
        json.dumps({"model": name, **text}, ensure_ascii=False)
        for name, m in numbers.get("generation", {}).get("models", {}).items()
        for text in m.pop("texts")
    ]
    if lines:
        write_whole(out.with_suffix(".samples.jsonl"), "\n".join(lines) + "\n")
    write_whole(out, json.dumps(numbers, indent=1) + "\n")
    pieces.remove()
    console.print(f"\nAll numbers: {out}", soft_wrap=True, markup=False)
    if lines:
        console.print(f"Samples: {out.with_suffix('.samples.jsonl')}", soft_wrap=True, markup=False)
    return 0


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
