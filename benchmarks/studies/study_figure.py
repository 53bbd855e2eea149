"""Pictures of the two studies, from their JSON documents: `python -m benchmarks.studies.study_figure RESULTS.json`.

Of the exact one two: NAME.png, three panels of DPO on fresh pairs; NAME-all.png, every method and regime against λ. Of the
language model's one: a row of three panels a method and regime. White ground, the eight colours of Okabe and Ito, and a
marker a kind, so that neither print nor colour blindness loses anything.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLORS = {"frozen": "black", "soft": "#0072B2", "hard": "#D55E00", "adaptive": "#009E73", "barely": "#CC79A7"}
MARKERS = {"frozen": "s", "soft": "o", "hard": "^", "adaptive": "D", "barely": "X"}
BARELY = "soft α=0.6"  # every step: the reference is two thirds of a step old
STRENGTH = "λ = β / (1 + Σα), falling"
STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "legend.fontsize": 7.5,
    "legend.framealpha": 1.0,
    "legend.edgecolor": "0.85",
}

Run = dict[str, Any]


def end(run: Run) -> float:
    return sum(run["final gold"]) / len(run["final gold"])


def kind(run: Run) -> str:
    return "barely" if run["reference"] == BARELY else run["kind"]


def named(run: Run) -> str:
    who = "frozen" if run["kind"] == "frozen" else run["reference"]
    return f"{who}, β = {run['beta']:g}" + (" (every step)" if kind(run) == "barely" else "")


def shown(runs: list[Run]) -> list[Run]:
    """The best of each kind, the frozen reference at a β too small and one too large, and the one that barely lags."""
    kinds = [k for k in ("frozen", "soft", "hard", "adaptive", "barely") if any(kind(r) == k for r in runs)]
    best = [max((r for r in runs if kind(r) == k), key=end) for k in kinds]
    betas = sorted(r["beta"] for r in runs if r["kind"] == "frozen")
    at = betas.index(best[0]["beta"])
    near = {betas[max(at - 3, 0)], betas[min(at + 3, len(betas) - 1)]} - {best[0]["beta"]}
    return best + [r for r in runs if r["kind"] == "frozen" and r["beta"] in near]


def trajectories(axes: Axes, runs: list[Run], what: str) -> None:
    best_frozen = max((r for r in runs if r["kind"] == "frozen"), key=end)
    for run in runs:
        faint = run["kind"] == "frozen" and run is not best_frozen
        color = "0.6" if faint else COLORS[kind(run)]
        label = named(run) + (", best" if run is best_frozen else "")
        axes.plot(run["kl"], run[what], color=color, lw=1.0 if faint else 1.6, label=label, zorder=2 if faint else 3)
        axes.plot(run["kl"][-1], run[what][-1], MARKERS[kind(run)], color=color, ms=6, mec="white", zorder=4)
    axes.set_xlabel("KL(policy ‖ SFT), nats")


def against(axes: Axes, runs: list[Run], what: str) -> None:
    for k in ("soft", "hard", "adaptive", "barely"):
        chosen = [r for r in runs if kind(r) == k and r["moves"] > 0]
        if not chosen:
            continue
        label = "soft, α = 0.6 every step" if k == "barely" else k
        xs, ys = [r[what] for r in chosen], [end(r) for r in chosen]
        axes.plot(xs, ys, MARKERS[k], color=COLORS[k], ms=5, mec="white", mew=0.5, label=label)
    axes.set_xscale("log")


def three_panels(document: dict[str, Any], path: Path) -> None:
    runs = [r for r in document["runs"] if (r["regime"], r["method"]) == ("fresh", "dpo")]
    found, drawn = document["results"], shown(runs)
    best = max(end(r) for r in runs if r["kind"] == "frozen")
    figure, (gold, ood, lag) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    bound = found["frontier"]
    gold.plot(bound["kl"], bound["gold"], "--", color="0.3", lw=1.2, label="optimum, SFT·exp(r/λ)")
    trajectories(gold, drawn, "gold")
    gold.set_ylabel("expected gold reward")
    gold.set_title("Reward bought with KL", loc="left", fontsize=10)
    gold.legend(loc="lower right")
    ood.plot(bound["kl"], bound["ood"], "--", color="0.3", lw=1.2)
    trajectories(ood, drawn, "ood")
    ood.set_yscale("log")
    ood.set_ylim(1e-3, 0.3)
    ood.set_ylabel("mass on illegal trajectories")
    ood.set_title("Out of distribution", loc="left", fontsize=10)
    for axes in (gold, ood):
        axes.set_xlim(0, 4.2)
    lag.axhline(best, color="black", lw=1.2, label="frozen, best β")
    against(lag, runs, "beta lag")
    lag.set_xlabel("β·lag, optimiser steps")
    lag.set_ylabel("gold reward at the end")
    lag.set_title("The end depends on β·lag", loc="left", fontsize=10)
    lag.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
    figure.savefig(path, dpi=160)
    plt.close(figure)


def titled(method: str, regime: str, settings: dict[str, Any]) -> str:
    told = {"fresh": "fresh pairs, one epoch", "few": f"{settings['few']} pairs, many epochs"}
    return f"{method.upper()}, {told[regime]}"


def all_panels(document: dict[str, Any], path: Path) -> None:
    settings = document["settings"]
    methods, regimes = settings["methods"], settings["regimes"]
    size = (4 * len(methods), 0.9 + 2.9 * len(regimes))
    figure, grid = plt.subplots(len(regimes), len(methods), figsize=size, layout="constrained", squeeze=False)
    for row, regime in zip(grid, regimes, strict=True):
        for axes, method in zip(row, methods, strict=True):
            runs = [r for r in document["runs"] if (r["regime"], r["method"]) == (regime, method)]
            of_strength(axes, runs)
            axes.set_title(titled(method, regime, settings), loc="left", fontsize=10)
            axes.set_ylim(0, 2)
        row[0].set_ylabel("gold reward at the end")
    for axes in grid[-1]:
        axes.set_xlabel(STRENGTH)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def of_strength(axes: Axes, runs: list[Run]) -> None:
    """Reward at the end against λ: the frozen reference's line, and a point for each other setting."""
    frozen = sorted((r for r in runs if r["kind"] == "frozen"), key=lambda r: r["beta"])
    axes.plot(
        [r["strength"] for r in frozen], [end(r) for r in frozen], "s-", color="black", ms=4, lw=1.2, label="frozen"
    )
    against(axes, runs, "strength")
    axes.invert_xaxis()


def language_panels(document: dict[str, Any], path: Path) -> None:
    settings = document["settings"]
    cases = [(method, regime) for method in settings["methods"] for regime in settings["regimes"]]
    size = (12, 0.4 + 3.6 * len(cases))
    figure, grid = plt.subplots(len(cases), 3, figsize=size, layout="constrained", squeeze=False)
    for (gold, ood, strength), (method, regime) in zip(grid, cases, strict=True):
        runs = [r for r in document["runs"] if (r["regime"], r["method"]) == (regime, method)]
        for axes, what, label in ((gold, "gold", "gold reward"), (ood, "ood", "ungrammatical answers")):
            trajectories(axes, shown(runs), what)
            axes.set_xscale("symlog", linthresh=0.1)
            axes.set_xlim(0)
            axes.set_ylabel(label)
        gold.set_title(titled(method, regime, settings), loc="left", fontsize=10)
        ood.legend(loc="upper left")
        of_strength(strength, runs)
        strength.set_xlabel(STRENGTH)
        strength.set_ylabel("gold reward at the end")
        strength.legend(loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write `path`, and of the exact study (the former only with DPO on fresh pairs) the same with `-all`."""
    with plt.rc_context(STYLE):
        if "frontier" not in document["results"]:
            return language_panels(document, path)
        if "fresh dpo" in document["results"]:
            three_panels(document, path)
        all_panels(document, path.with_stem(path.stem + "-all"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.study_figure", description=__doc__.splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="what a study wrote with --out")
    given = parser.parse_args().results
    draw(json.loads(given.read_text()), given.with_suffix(".png"))
