"""What a study prints and writes: its tables as text, its runs as JSON."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.studies.study import Run


def single_runs(runs: list[Run]) -> list[dict[str, Any]]:
    """For the file: of each setting the ends in every world, and the trajectory of the means; four digits."""
    short = lambda values: [float(f"{v:.4g}") for v in values.tolist()]  # noqa: E731
    return [
        {
            **{
                "regime": r.regime,
                "kind": r.reference.kind,
                "method": r.method,
                "beta": r.beta,
                "reference": str(r.reference),
            },
            **{"lag": short(r.lag.mean(0, True))[0], "moves": short(r.moves.mean(0, True))[0]},
            **{"beta lag": None if math.isinf(r.beta_lag) else r.beta_lag, "strength": r.strength},
            **{f"final {name}": short(getattr(r, name)[:, -1]) for name in ("gold", "kl", "ood")},
            **{name: short(getattr(r, name).mean(0)) for name in ("gold", "kl", "ood")},
        }
        for r in runs
    ]


def plain(found: Any) -> Any:
    """The same with `None` for nan, which JSON does not have, and 8 digits: a least-squares fit has no more."""
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    if isinstance(found, list):
        return [plain(value) for value in found]
    if isinstance(found, float):
        return None if math.isnan(found) else float(f"{found:.8g}")
    return found


def print_tables(found: dict[str, Any]) -> None:
    for name, of in found.items():
        if "comparison" not in of:
            continue
        print(f"\n{name}: each family at its best, and minus frozen at its best (standard error over worlds)")
        for family, row in of["comparison"].items():
            for where, at in row.items():
                gold, gain, ood = at["gold"], at["gold minus frozen"], at["ood minus frozen"]
                numbers = f"{gold['mean']:6.3f}  {gain['mean']:+.3f} ({gain['se']:.3f})"
                print(f"  {family:<17}{where:<19}{numbers}  ood {ood['mean']:+.4f} ({ood['se']:.4f})  {at['setting']}")
        for row in of["robustness"]:
            ends = " ".join(f"{beta}: {end:.3f}" for beta, end in row["final gold"].items())
            print(
                f"  {row['reference']:<20}{ends}   good decades of β {row['good decades']:.2f}, fall {row['fall']:.3f}"
            )
