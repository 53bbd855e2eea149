"""What a method asks of an example: its completions, its loss and its metrics.

DPO and IPO take pairs, KTO takes single completions; each is a pair of functions, and the trainer sees only
`Objective`. Log-ratios are policy minus reference. Metrics carry TRL's names, one value an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..packs.logprobs import LogProbs
from ..packs.packing import Group
from . import losses

Example = dict[str, Any]


class Outcome(NamedTuple):
    """Of n examples: losses (n,) with gradient; metrics `{name: (values (n,), weights (n,))}` without."""

    losses: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """`group`: an example's completions, in the order `outcome` expects them; `baseline`: whether z0 is needed."""

    group: Callable[[Example], Group]
    outcome: Callable[[Sequence[Example], LogProbs, Tensor, Any], Outcome]
    baseline: bool = False


def objective(method: str) -> Objective:
    if method == "kto":
        return Objective(kto_group, kto_outcome, baseline=True)
    return Objective(pair_group, pair_outcome)


def pair_group(e: Example) -> Group:
    return e["prompt_ids"], [e["chosen_ids"], e["rejected_ids"]]


def kto_group(e: Example) -> Group:
    return e["prompt_ids"], [e["completion_ids"]]


def movement(logratios: Tensor, lengths: Tensor, bind: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the policy is from its reference, for n examples of k completions each: `(n, k)`, `(n, k)`, `(n,)`.

    `reference/drift`: sum of |log-ratio| over completions by their tokens, in nats a token; `reference/bind`: as given.
    """
    tokens = lengths.sum(1).double()
    drift = logratios.detach().abs().sum(1) / tokens
    return {"reference/drift": (drift, tokens), "reference/bind": (bind.detach().abs(), torch.ones_like(bind))}


def pair_outcome(examples: Sequence[Example], lp: LogProbs, z0: Tensor, args: Any) -> Outcome:
    """DPO or IPO of n pairs from 2n completions, chosen and rejected alternating."""
    chosen, rejected = lp.logratios[0::2], lp.logratios[1::2]
    lengths = {"chosen_lengths": lp.lengths[0::2], "rejected_lengths": lp.lengths[1::2]}
    normalize = bool(args.length_normalize)
    if args.method == "ipo":
        out = losses.ipo_loss(chosen, rejected, beta=args.beta, length_normalize=normalize, **lengths)
    else:
        out = losses.dpo_loss(
            chosen,
            rejected,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            robust=args.robust,
            length_normalize=normalize,
            **lengths,
        )
    margins = out.chosen_rewards - out.rejected_rewards
    values = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/accuracies": (margins > 0).float(),
        "rewards/margins": margins,
        "logps/chosen": lp.logps[0::2],
        "logps/rejected": lp.logps[1::2],
    }
    one = torch.ones_like(margins)
    metrics = {name: (v.detach(), one) for name, v in values.items()}
    metrics |= movement(lp.logratios.view(-1, 2), lp.lengths.view(-1, 2), margins)
    return Outcome(out.losses, metrics)


def kto_outcome(examples: Sequence[Example], lp: LogProbs, z0: Tensor, args: Any) -> Outcome:
    """KTO of n completions; chosen and rejected metrics average over their own kind."""
    labels = torch.tensor([bool(e["label"]) for e in examples], device=lp.logps.device)
    out = losses.kto_loss(
        lp.logratios,
        labels,
        z0,
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
    )
    metrics = {"kl": (z0.detach().expand_as(out.losses), torch.ones_like(out.rewards))}
    for kind, chosen in (("chosen", labels), ("rejected", ~labels)):
        metrics[f"rewards/{kind}"] = (out.rewards, chosen.float())
        metrics[f"logps/{kind}"] = (lp.logps.detach(), chosen.float())
    metrics |= movement(lp.logratios[:, None], lp.lengths[:, None], out.rewards)
    return Outcome(out.losses, metrics)


def mismatched(per_rank: list[list[list[Group]]], rank: int) -> list[Group]:
    """KTO's mismatched completions (x_i, y_{i+1}) of this rank, over an optimiser step's whole batch.

    `per_rank[r][m]`: the examples of rank r's m-th device batch. They are taken in the order the sampler drew
    them (batch m of rank 0, of rank 1, …; then batch m+1), so the result does not depend on how the batch was
    divided. A step of one example has no mismatched completion: the list is empty and z0 is 0.
    """
    order = [
        (r, group)
        for m in range(max((len(batches) for batches in per_rank), default=0))
        for r, batches in enumerate(per_rank)
        if m < len(batches)
        for group in batches[m]
    ]
    if len(order) < 2:
        return []
    following = order[1:] + order[:1]
    pairs = zip(order, following, strict=True)
    return [(prompt, completions) for (r, (prompt, _)), (_, (_, completions)) in pairs if r == rank]
