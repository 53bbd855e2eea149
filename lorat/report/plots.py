"""A run's curves as SVG that lies inside an HTML page and takes its colours from there.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables: the same file reads well on
white, on black and on paper. Runs differ in colour and in the marker of their evaluations. No text of a run gets into a
drawing. A curve has at most 600 points: beyond that, means over equal spans of steps.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..runs.log import RunLog

INK, LINE = "#010203", "#040506"  # stand-ins: text and axes; grid
SERIES = tuple(f"#0a0b{i:02x}" for i in range(7))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SYMBOLS = ("●", "■", "▲", "◆", "▼", "✚", "✖")  # the same in a legend
POINTS, MARKS, FULL_HEIGHT = 600, 400, 16
SOLID, DOTTED = "-", (0, (1.2, 1.6))


@dataclass(frozen=True)
class Curve:
    """A logged number and how it is drawn. `measured`: at evaluations, with a marker at each."""

    name: str
    style: Any = SOLID
    measured: bool = False


@dataclass(frozen=True)
class Panel:
    """A drawing: its heading, the unit of its axis, a sentence below, its curves; `level`: a value worth a line."""

    title: str
    unit: str
    caption: str
    curves: tuple[Curve, ...]
    level: float | None = None
    marks: bool = True  # the reference's moves


def both(name: str, style: Any = SOLID) -> tuple[Curve, Curve]:
    """A number in training and at evaluations."""
    return Curve(name, style), Curve(f"eval_{name}", style, measured=True)


def start(name: str, style: Any = SOLID) -> tuple[Curve, Curve]:
    """The same against the policy that the run began from."""
    return both(f"start/{name}", style)


TRAINING_PANELS = (
    Panel("Loss", "loss", "Mean over examples.", both("loss")),
    Panel(
        "Accuracy against the moving reference",
        "share of pairs",
        "Pairs whose chosen reward is the higher one. Right after a copy all rewards are 0, and no pair counts as right.",
        both("rewards/accuracies"),
        0.5,
    ),
    Panel(
        "Accuracy against the start",
        "share of pairs",
        "The same against the policy this run began from, which does not move.",
        start("rewards/accuracies"),
        0.5,
    ),
    Panel(
        "Margin against the moving reference", "reward", "Chosen less rejected reward.", both("rewards/margins"), 0.0
    ),
    Panel(
        "Margin against the start",
        "reward",
        "The same against the policy this run began from.",
        start("rewards/margins"),
        0.0,
    ),
    Panel(
        "Rewards against the moving reference",
        "reward",
        "Solid: chosen. Dotted: rejected.",
        both("rewards/chosen") + both("rewards/rejected", DOTTED),
        0.0,
    ),
    Panel(
        "Rewards against the start",
        "reward",
        "Solid: chosen. Dotted: rejected.",
        start("rewards/chosen") + start("rewards/rejected", DOTTED),
        0.0,
    ),
    Panel(
        "Log-probabilities",
        "nats",
        "Solid: chosen. Dotted: rejected.",
        both("logps/chosen") + both("logps/rejected", DOTTED),
    ),
    Panel("z₀", "nats", "KTO's baseline.", both("kl")),
)
REFERENCE_PANELS = (
    Panel(
        "Drift from the reference",
        "nats a token",
        "Mean |log-ratio| of policy and reference, by tokens.",
        both("reference/drift"),
    ),
    Panel("Drift from the start", "nats a token", "The same against the policy this run began from.", start("drift")),
    Panel(
        "How much the reference binds",
        "β·|margin|",
        "Near 0 the reference is a copy of the policy, and β has no effect.",
        both("reference/bind"),
    ),
    Panel("Lag", "optimiser steps", "Mean age of what the reference holds.", (Curve("reference/lag"),)),
    Panel(
        "Distance of the weights",
        "Frobenius norm of ΔW",
        "Solid: policy from reference. Dotted: policy from start.",
        (Curve("reference/distance"), Curve("start/distance", DOTTED)),
    ),
    Panel(
        "Error of the last blend", "relative", "What the reference's rank could not hold.", (Curve("reference/error"),)
    ),
)
MACHINE_PANELS = (
    Panel("Gradient norm", "norm", "Before clipping.", (Curve("grad_norm"),)),
    Panel("Learning rate", "rate", "", (Curve("learning_rate"),), marks=False),
    Panel("Throughput", "tokens/s", "Tokens trained on, padding left out.", (Curve("tokens_per_second"),), marks=False),
)


def memory_panels(runs: Sequence[RunLog]) -> tuple[Panel, ...]:
    """A panel for each logged number that speaks of memory."""
    names = sorted({n for run in runs for n in run.names() if "memory" in n.lower() and not n.startswith("eval_")})
    return tuple(Panel(name, "as logged", "", (Curve(name),), marks=False) for name in names)


def draw(panel: Panel, runs: Sequence[RunLog]) -> str | None:
    """The panel as an `<svg>` element; None if no run logged any of it. Raises `ConfigError` without matplotlib."""
    if not any(run.series(curve.name)[0] for run in runs for curve in panel.curves):
        return None
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError('lorat report draws with matplotlib: pip install "lorat[report]".') from error

    look: Any = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    look |= {"svg.fonttype": "none", "svg.hashsalt": ascii(panel.title), "font.size": 10.5}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(panel.unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if panel.level is not None:
            axes.axhline(panel.level, color=INK, linewidth=0.7, alpha=0.6)
        for i, run in enumerate(runs):
            for curve in panel.curves:
                steps, values = thinned(*run.series(curve.name))
                if not len(steps):
                    continue
                trained = curve.measured and run.series(curve.name.removeprefix("eval_"))[0]  # then symbols alone
                style: Any = dict(
                    linestyle="none" if trained else curve.style, linewidth=1.0 if curve.measured else 1.5
                )
                if curve.measured or len(steps) == 1:
                    style |= dict(marker=MARKERS[i], markersize=4, markeredgewidth=0)
                axes.plot(steps, values, color=SERIES[i], **style)
        if panel.marks:
            _mark(axes, runs)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _for_page(out.getvalue())


def thinned(steps: Sequence[int], values: Sequence[float], most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values `(n,)` -> `(m,)` each, m ≤ `most`: means over equal spans of steps where there are more."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= most:
        return x, y
    span = np.minimum(((x - x[0]) / (x[-1] - x[0]) * most).astype(int), most - 1)
    n = np.bincount(span, minlength=most)
    held = n > 0
    return np.bincount(span, x, most)[held] / n[held], np.bincount(span, y, most)[held] / n[held]


def _mark(axes: Any, runs: Sequence[RunLog]) -> None:
    """The reference's moves: ticks in a strip at the foot in the run's colour, and full lines where a run has few."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    moving = [i for i, run in enumerate(runs) if run.updates()]
    if not moving:
        return
    strip = 0.045 * len(moving)
    axes.set_ylim(low - (high - low) * strip / (1 - strip), high)
    for row, i in enumerate(moving):
        at = np.asarray(runs[i].updates(), float)
        lines = dict(transform=axes.get_xaxis_transform(), color=SERIES[i])
        if len(at) <= FULL_HEIGHT:
            axes.vlines(at, strip, 1, linewidth=0.7, alpha=0.4, **lines)
        at = left + np.unique(np.round((at - left) / (right - left) * MARKS)) / MARKS * (right - left)
        axes.vlines(at, 0.045 * row + 0.005, 0.045 * row + 0.04, linewidth=1.0, gid="updates", **lines)
    axes.set_xlim(left, right)


def _for_page(svg: str) -> str:
    """matplotlib's file as an element: no prologue, no ids that would meet their like, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?!updates)[^"]*"', "<g", svg)
    svg = svg.replace('id="updates"', 'class="updates"')
    for stand_in, variable in ((INK, "ink"), (LINE, "line"), *((c, f"c{i}") for i, c in enumerate(SERIES))):
        svg = svg.replace(stand_in, f"var(--{variable})")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(
        r"font-family: [^;\"]*", "font-family: inherit", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    ).strip()
