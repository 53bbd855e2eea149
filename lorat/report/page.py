"""`lorat report`: runs as one HTML file that opens from disk, reads in light, in dark and on paper, and asks for nothing.

Everything that comes from a run is hostile until escaped: the template escapes by itself, drawings hold no text of a
run, and the page forbids scripts and the network to itself. The same runs give the same file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import put
from ..runs.log import RunLog, read_runs
from ..runs.versions import versions
from . import plots, tables

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(
    runs: Sequence[str], out: str | Path, samples: Sequence[str] = (), rows: int = 12, title: str | None = None
) -> Path:
    """Write the page about `runs` (folders) to `out`, atomically; returns its path. Raises a `LoratError`."""
    out = Path(out)
    page = render(read_runs(list(runs)), samples, rows, title)
    try:
        put(out, page)
    except OSError as error:
        raise ConfigError(
            f"--out {str(out)!r} cannot be written: {error}. Name a file in a folder that is there."
        ) from error
    return out


def render(runs: Sequence[RunLog], samples: Sequence[str] = (), rows: int = 12, title: str | None = None) -> str:
    """The page's HTML. Raises `ConfigError` for more runs than there are colours."""
    if len(runs) > len(plots.SERIES):
        raise ConfigError(
            f"{len(runs)} runs are more than the {len(plots.SERIES)} colours that colour-blind readers can tell apart; name "
            f"at most {len(plots.SERIES)}."
        )
    from jinja2 import Environment, StrictUndefined

    machine = plots.MACHINE_PANELS + plots.memory_panels(runs)
    groups = (("Training", plots.TRAINING_PANELS), ("Reference", plots.REFERENCE_PANELS), ("Machine", machine))
    sections = [
        (name, [(panel, svg) for panel in panels if (svg := plots.draw(panel, runs))]) for name, panels in groups
    ]
    differing, settings = tables.settings_tables(runs)
    side_by_side, notes = tables.samples(runs, samples, rows)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes] + notes
    if any(run.source for run in runs) and not any(name.startswith("eval_") for run in runs for name in run.names()):
        notes.append(
            "No evaluation was logged (eval_strategy); accuracy and margin against the start are measured there."
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = printable
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title or " · ".join(run.name for run in runs),
        runs=runs,
        symbols=plots.SYMBOLS,
        overview=tables.overview(runs),
        sections=[section for section in sections if section[1]],
        moved=any(run.updates() for run in runs),
        results=tables.results(runs),
        samples=side_by_side,
        differing=differing,
        settings=settings,
        logged=tables.logged(runs),
        journals=tables.journals(runs),
        notes=notes,
        version=versions()["lorat"],
    )


def printable(text: Any) -> str:
    """Text without what a page cannot show: control characters become a visible stand-in."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(text).replace("\r\n", "\n"))
