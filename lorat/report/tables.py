"""What a report says in tables: settings and how they differ, results of any shape, samples side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoratError
from ..judge.answers import Answer, read_answers, read_models, split
from ..judge.verdicts import thin
from ..runs.log import RunLog, is_number

MOST_ROWS = 200


@dataclass
class Grid:
    """A table: its heading, its columns' and its rows; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


def shown(value: Any) -> str:
    """A value of JSON as a person reads it; `[mean, error]` as `mean ± error`."""
    if value is None:
        return "–"
    if isinstance(value, str):
        digest = re.fullmatch(r"[0-9a-f]{64}", value)
        return f"{value[:12]}…" if digest else value if len(value) <= 300 else f"{value[:300]} …"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if _with_error(value):
        return shown(value[0]) + ("" if value[1] is None else f" ± {shown(value[1])}")
    return (
        ", ".join(shown(v) for v in value)
        if isinstance(value, list)
        else "; ".join(f"{k}: {shown(v)}" for k, v in value.items())
    )


def settings_tables(runs: Sequence[RunLog]) -> tuple[Grid | None, Grid | None]:
    """`(settings in which the runs differ, all settings)`; None where there is nothing to tell."""
    held = [run for run in runs if run.settings]
    names = sorted({key for run in held for key in run.settings})
    rows = [[name, *(shown(run.settings.get(name, "not recorded")) for run in held)] for name in names]
    columns = ["setting", *(run.name for run in held)]
    differ = [
        row for row in rows if any(run.settings.get(row[0], ...) != held[0].settings.get(row[0], ...) for run in held)
    ]
    return (
        Grid("Settings that differ", columns, differ) if differ else None,
        Grid("All settings", columns, rows) if rows else None,
    )


def overview(runs: Sequence[RunLog]) -> Grid:
    """What each run is and where it stands."""
    grid = Grid(
        "",
        ["run", "state", "method", "reference", "moves", "loss", "accuracy against the start", "drift from the start"],
    )
    for run in runs:
        s = run.settings
        state = (
            "no log yet"
            if not run.source
            else f"{run.step:,} of {run.steps:,} steps"
            if run.steps
            else f"step {run.step:,}"
        )
        if run.source and not run.finished:
            state += f", as of {Path(run.source).parent.name or run.source}"
        how = str(s.get("sync", "–"))
        if how in ("soft", "hard", "adaptive"):
            how += f", alpha {shown(s.get('sync_alpha'))}" if how == "soft" else ""
            how += f", every {shown(s.get('sync_every'))}"
        method = f"{str(s.get('method', '–')).upper()}, β {shown(s.get('beta'))}"
        moves = len(run.updates()) if run.moves else run.last("reference/updates")
        ends = (run.last("loss"), run.last("eval_start/rewards/accuracies"), run.last("eval_start/drift"))
        grid.rows.append([run.name, state, method, how, "–" if moves is None else f"{moves:,.0f}", *map(shown, ends)])
    return grid


def logged(runs: Sequence[RunLog]) -> Grid | None:
    """The last value of everything that was logged."""
    names = sorted({name for run in runs for name in run.names()})
    rows = [[name, *(shown(run.last(name)) for run in runs)] for name in names]
    return Grid("Last value of all that was logged", ["name", *(run.name for run in runs)], rows) if rows else None


def journals(runs: Sequence[RunLog]) -> list[Grid]:
    """Every move of each reference, and every time an adaptive one was let be."""
    grids = []
    for run in runs:
        names = [
            n for n in ("step", "moved", "reason", "drift", "distance", "error") if any(n in line for line in run.moves)
        ]
        rows = [[shown(line.get(n)) for n in names] for line in run.moves]
        cut = f", the last {MOST_ROWS} of {len(rows):,}" if len(rows) > MOST_ROWS else ""
        if rows:
            grids.append(Grid(f"{run.name}: moves of the reference{cut}", names, rows[-MOST_ROWS:]))
    return grids


def results(runs: Sequence[RunLog]) -> list[Grid]:
    """Tables for each result file: flat ones together, a row a run; others by the models they speak of."""
    grids: list[Grid] = []
    flat = [(run.name, run.results["eval_results.json"]) for run in runs if _flat(run.results.get("eval_results.json"))]
    if flat:
        names = sorted({key for _, values in flat for key in values})
        rows = [[name.removeprefix("eval_"), *(shown(values.get(name)) for _, values in flat)] for name in names]
        grids.append(Grid("Evaluation at the end", ["measure", *(name for name, _ in flat)], rows))
    judged = [row for run in runs for value in run.results.values() if (row := _judged(value))]
    if judged:
        columns = ["comparison", "judge", "win rate, 95 % interval", "at equal length", "wins / ties / losses"]
        grids.append(Grid("Compared by a judge", columns, judged))
    for run in runs:
        for file, value in run.results.items():
            if isinstance(value, dict) and not (file == "eval_results.json" and _flat(value)) and not _judged(value):
                parts = {k: value[k] for k in ("preferences", "generation") if k in value} or value  # of `lorat eval`
                grids += _grids(parts, f"{run.name}: {Path(file).stem}")
    return grids


def _judged(value: Any) -> list[str] | None:
    """A row about a result of `lorat judge`; None if it is none."""
    try:
        rates = [value["win_rate"], value["length_controlled_win_rate"]]
        few = thin(value["judged"], value["pairs"]) if "pairs" in value else ""
        shares = ["–" if r is None else f"{r['value']:.1%} ({r['low']:.1%} to {r['high']:.1%}){few}" for r in rates]
        counts = " / ".join(shown(value[k]) for k in ("wins", "ties", "losses"))
        return [f"{value['a']} against {value['b']}", shown(value["judge"]["model"]), *shares, counts]
    except (KeyError, TypeError, ValueError):
        return None


def _flat(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and not any(isinstance(v, dict | list) for v in value.values())


def _grids(value: dict[str, Any], title: str, depth: int = 0) -> Iterable[Grid]:
    """A nested mapping as tables: its own numbers, then mappings of equals as rows, then what lies deeper."""
    leaves = {k: v for k, v in value.items() if _leaf(v)}
    inner = {k: v for k, v in value.items() if isinstance(v, dict) and v}
    if leaves:
        yield Grid(title, ["measure", ""], [[_words(k), shown(v)] for k, v in leaves.items()])
    if inner and not leaves and all(any(_leaf(x) for x in v.values()) for v in inner.values()):
        names = list(dict.fromkeys(k for v in inner.values() for k, x in v.items() if _leaf(x)))
        yield Grid(title, ["measure", *inner], [[_words(n), *(shown(v.get(n)) for v in inner.values())] for n in names])
        inner = {k: {x: y for x, y in v.items() if isinstance(y, dict)} for k, v in inner.items()}
    if depth < 4:
        for name, below in inner.items():
            yield from _grids(below, f"{title}, {_words(name)}", depth + 1)


def _leaf(value: Any) -> bool:
    return not isinstance(value, dict | list) or _with_error(value)


def _with_error(value: Any) -> bool:
    """Whether it is `[mean, standard error]`, as `lorat eval` writes them; the error may be null."""
    pair = isinstance(value, list) and len(value) == 2 and is_number(value[0])
    return pair and (value[1] is None or is_number(value[1]))


def _words(name: str) -> str:
    return re.sub(r"_", " ", name)


def samples(runs: Sequence[RunLog], files: Sequence[str], most: int) -> tuple[Grid | None, list[str]]:
    """Answers side by side, a column a file or model, a row a prompt of those that most of them answer; and notes.

    Files named by the user must be readable (`DataError`); those found in a run are left out with a note where not.
    """
    columns: dict[str, list[Answer]] = {}
    notes: list[str] = []
    given = {split(file)[0].resolve() for file in files}
    for run, path in ((r, path) for r in runs for path in r.samples if path.resolve() not in given):
        try:
            columns |= {f"{run.name}: {model or path.stem}": answers for model, answers in read_models(path).items()}
        except LoratError as error:
            notes.append(f"{error}")
    for file in files:
        path, one = split(file)
        models = read_models(path) if one is None else {one: read_answers(file)}
        for model, answers in models.items():
            short = model or path.stem
            columns[short if short not in columns else f"{path.resolve().parent.name}/{short}"] = answers
    if not columns:
        return None, notes
    first = [{a.prompt: a.output for a in reversed(answers)} for answers in columns.values()]
    prompts = list(dict.fromkeys(a.prompt for answers in columns.values() for a in answers))
    held = {p: sum(p in outputs for outputs in first) for p in prompts}
    common = [p for p in prompts if held[p] == max(held.values())]
    rows = [[p, *(outputs.get(p, "–") for outputs in first)] for p in common[:most]]
    title = f"{len(rows)} of {len(common):,} prompts" if len(common) > len(rows) else ""
    return Grid(title, ["prompt", *columns], rows), notes
