"""What the runs on the token MDP say: paired differences between references, with standard errors over the worlds.

Every setting sees the same worlds, SFT policies and pairs, so differences are taken world by world. "Best" is chosen by
the mean over one half of the worlds and read on the other, both ways round, for the frozen reference and for every family
alike: the greatest of many noisy means would flatter the family with the larger grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.studies.study import Run


def at_kl(kl: Tensor, values: Tensor, level: float) -> Tensor:
    """`values` where a path first crosses a KL, linear in √KL between its points; both `(S, n)`; `(S,)`, nan if never."""
    root = kl.clamp(min=0).sqrt()
    crossed = root >= math.sqrt(level)
    after = crossed.int().argmax(1, keepdim=True).clamp(min=1)
    low, high = root.gather(1, after - 1), root.gather(1, after)
    share = (math.sqrt(level) - low) / (high - low)
    read = torch.lerp(values.gather(1, after - 1), values.gather(1, after), share)[:, 0]
    return torch.where(crossed.any(1), read, math.nan)


def ends(runs: list[Run]) -> dict[str, Tensor]:
    """Of one reference: the path of its ends from SFT along falling β; `gold`, `kl`, `ood`, each `(S, 1 + runs)`."""
    falling = sorted(runs, key=lambda r: -r.beta)
    first = falling[0]
    return {
        name: torch.stack([getattr(first, name)[:, 0], *(getattr(r, name)[:, -1] for r in falling)], 1)
        for name in ("gold", "kl", "ood")
    }


def picked_elsewhere(score: Tensor, *others: Tensor) -> list[Tensor]:
    """`score: (settings, S)`: for every second world the best setting of the other half's mean, and the other way round.

    Returns `(S,)` of each tensor, read at that setting. A setting with a nan in any world is out.
    """
    even = torch.arange(score.shape[1]) % 2 == 0
    chosen = torch.empty(score.shape[1], dtype=torch.long)
    broken = score.isnan().any(1, keepdim=True)
    for here in (even, ~even):
        means = score.masked_fill(broken, -math.inf)[:, ~here].mean(1)
        chosen[here] = means.argmax()
    return [values.gather(0, chosen[None])[0] for values in (score, *others)]


def paired(differences: Tensor) -> dict[str, float]:
    """Mean of `(S,)` differences over worlds and its standard error; nan if a world is missing."""
    n = len(differences)
    error = differences.std().item() / math.sqrt(n) if n > 1 else math.nan
    return {"mean": differences.mean().item(), "se": error}


def families(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of one regime and method by family: the kinds, and all that move together."""
    kinds = {kind: [r for r in runs if r.reference.kind == kind] for kind in ("frozen", "soft", "hard", "adaptive")}
    barely = [r for r in runs if r.reference.lag < 1]
    kinds |= {"α=0.6 every step": barely, "any moving": [r for r in runs if r.reference.kind != "frozen"]}
    return {name: members for name, members in kinds.items() if members}


def readings(members: list[Run], kls: Sequence[float]) -> dict[str, tuple[list[str], Tensor, Tensor]]:
    """What to choose from, by where it is read: names, gold and illegal mass `(choices, S)`.

    `end`: every setting at the end. `end, KL k`: a reference, its β chosen so that it ends at k nats, interpolated
    between the values of the grid. `on the way, KL k`: every setting, stopped at k nats.
    """
    by_reference = {str(r.reference): ends([m for m in members if m.reference == r.reference]) for r in members}
    names = [r.name for r in members]

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        """Tensors `(S,)` of the choices -> `(choices, S)`."""
        return torch.stack(list(tensors))

    out = {"end": (names, stacked(r.gold[:, -1] for r in members), stacked(r.ood[:, -1] for r in members))}
    for k in kls:
        gold, ood = (stacked(at_kl(p["kl"], p[x], k) for p in by_reference.values()) for x in ("gold", "ood"))
        out[f"end, KL {k:g}"] = (list(by_reference), gold, ood)
    for k in kls:
        gold, ood = (stacked(at_kl(r.kl, getattr(r, x), k) for r in members) for x in ("gold", "ood"))
        out[f"on the way, KL {k:g}"] = (names, gold, ood)
    return out


def _best(score: Tensor) -> int:
    """The choice of the best mean over worlds: `(choices, S)` -> its place."""
    return int(score.mean(1).nan_to_num(nan=-math.inf).argmax())


def comparison(runs: list[Run], kls: Sequence[float]) -> dict[str, dict[str, dict[str, object]]]:
    """Of one regime and method: each family at its best against the frozen reference at its best, world by world, and at equal
    KL of `kls` nats."""
    read = {family: readings(members, kls) for family, members in families(runs).items()}
    picked = {
        family: {where: picked_elsewhere(gold, ood) for where, (_, gold, ood) in of.items()}
        for family, of in read.items()
    }
    out: dict[str, dict[str, dict[str, object]]] = {family: {} for family in read}
    for family, of in read.items():
        for where, (names, every, _) in of.items():
            (gold, ood), (frozen_gold, frozen_ood) = picked[family][where], picked["frozen"][where]
            out[family][where] = {
                "setting": names[_best(every)],
                "gold": paired(gold),
                "gold minus frozen": paired(gold - frozen_gold),
                "ood": paired(ood),
                "ood minus frozen": paired(ood - frozen_ood),
            }
        (_, every, _), (_, frozen, _) = of["end"], read["frozen"]["end"]
        out[family]["end"]["gold minus frozen, chosen on all worlds"] = paired(
            every[_best(every)] - frozen[_best(frozen)]
        )
    return out


def good_decades(gold: dict[float, float], enough: float) -> float:
    """Over how many decades of β (float) final gold (float) is `enough`, linear in log β between the grid's values."""
    betas = sorted(gold)
    width = 0.0
    for low, high in itertools.pairwise(betas):
        first, last = gold[low] - enough, gold[high] - enough
        share = max(first, last, 0.0) / abs(first - last) if (first >= 0) != (last >= 0) else float(first >= 0)
        width += share * math.log10(high / low)
    return width


def robustness(runs: list[Run], sft_gold: float, share: float = 0.9) -> list[dict[str, object]]:
    """Of one regime and method, a row a reference: final gold at each β, and what a badly chosen β costs.

    `good decades`: of β, where the run ends with `share` of the best frozen reference's gain over SFT. `fall`: from the
    highest mean gold of a trajectory to its end, at the worst β. Means over worlds.
    """
    frozen = max(r.gold[:, -1].mean().item() for r in runs if r.reference.kind == "frozen")
    enough = sft_gold + share * (frozen - sft_gold)
    rows: list[dict[str, object]] = []
    for reference in dict.fromkeys(r.reference for r in runs):
        of = {r.beta: r.gold.mean(0) for r in runs if r.reference == reference}
        last = {beta: gold[-1].item() for beta, gold in sorted(of.items())}
        rows.append(
            {
                "reference": str(reference),
                "lag": None if math.isnan(reference.lag) or math.isinf(reference.lag) else reference.lag,
                "final gold": {f"{beta:g}": end for beta, end in last.items()},
                "good decades": good_decades(last, enough),
                "fall": max((gold.max() - gold[-1]).item() for gold in of.values()),
            }
        )
    return rows


def scatter(runs: list[Run], against: str) -> float:
    """Of moving references: standard deviation of final gold about a cubic in the log of `beta_lag` or `strength`."""
    moving = [r for r in runs if r.reference.kind != "frozen" and r.moves.mean() > 0]
    if len(moving) < 6:
        return math.nan
    x = torch.tensor([getattr(r, against) for r in moving], dtype=torch.float64).log()
    y = torch.stack([r.gold[:, -1].mean() for r in moving])
    basis = torch.stack([((x - x.mean()) / x.std()) ** power for power in range(4)], 1)
    return (y - basis @ torch.linalg.lstsq(basis, y[:, None]).solution[:, 0]).square().mean().sqrt().item()


def summaries(runs: list[Run], kls: Sequence[float], sft_gold: float) -> dict[str, dict[str, object]]:
    """What is said of each regime and method, in the order of `runs`."""
    out: dict[str, dict[str, object]] = {}
    for regime, method in dict.fromkeys((r.regime, r.method) for r in runs):
        mine = [r for r in runs if (r.regime, r.method) == (regime, method)]
        out[f"{regime} {method}"] = {
            "comparison": comparison(mine, kls),
            "robustness": robustness(mine, sft_gold),
            "scatter about a cubic": {x: scatter(mine, x) for x in ("beta_lag", "strength")},
        }
    return out
