"""`lorat eval` from rows to result: one pass of each model over the pairs, samples, and what both say.

The result is plain JSON; printing it is in `eval_report.py`. Work that is finished lies in a file beside the result
until that is written, so that a killed evaluation goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.tokenization import check_tokenizer
from ..files import Pieces
from ..model.base import check_fit
from ..packs.packing import Group
from . import evaluation as ev
from .estimators import has_sacrebleu
from .generation import Completion, Request, Sampling, end_ids, fit, sample, texts
from .lineup import Lineup

Progress = Callable[[str, int], Callable[[int], None]]  # (what, how many in all) -> called with what is done


@dataclass(frozen=True)
class Plan:
    """What to measure. `samples`: completions of each model in `sample_from`; `beta`: of the rewards."""

    beta: float
    length_normalize: bool
    bins: int
    samples: int
    sample_from: tuple[str, ...]
    sampling: Sampling
    max_tokens_per_pack: int


def evaluate(lineup: Lineup, rows: Sequence[dict[str, Any]], plan: Plan, pieces: Pieces, progress: Progress) -> dict:
    """Measures of tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) and of samples of their prompts."""
    groups: list[Group] = [(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]]) for r in rows]
    longest = max(len(p) + max(map(len, cs)) for p, cs in groups)
    greatest = max(max(ids) for p, cs in groups for ids in (p, *cs))
    check_fit(lineup.model.get_base_model(), greatest, longest)
    packs = ev.packer(lineup, plan.max_tokens_per_pack, check_tokenizer(lineup.tokenizer), longest)
    tokens = ev.token_passes(lineup, groups, packs, pieces, progress("log-probs", len(groups) * len(lineup.names)))
    prompts = [tuple(p) for p, _ in groups]
    preferences = {
        "pairs": len(groups),
        "prompts": len(set(prompts)),
        "beta": plan.beta,
        "length_normalize": plan.length_normalize,
        "models": {name: ev.model_measures(t, prompts) for name, t in tokens.items()},
        "against": {
            f"{a}/{b}": ev.preference_measures(
                ev.Ratios.of(tokens[a], tokens[b]), prompts, plan.beta, plan.length_normalize, plan.bins
            )
            for a, b in ev.against(lineup)
        },
    }
    result: dict[str, Any] = {"preferences": preferences, "notes": [*lineup.found.notes]}
    if plan.samples:
        result["generation"], notes = _generate(lineup, list(dict.fromkeys(prompts)), plan, pieces, progress)
        result["notes"] += notes
    return ev.finite(result)


def _generate(
    lineup: Lineup, prompts: list[tuple[int, ...]], plan: Plan, pieces: Pieces, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Samples of each model of `plan.sample_from`, their KL from the models they are measured against, diversity."""
    ids, how, notes = fit(lineup, [list(p) for p in prompts], plan.sampling)
    requests = [Request(p, s, ids[p]) for p, s in ev.in_turn(ids, plan.samples, how.seed)]
    clusters = [r.prompt for r in requests]
    packs = ev.packer(
        lineup,
        plan.max_tokens_per_pack,
        check_tokenizer(lineup.tokenizer),
        max(len(r.ids) for r in requests) + how.max_new_tokens,
    )
    names = list(dict.fromkeys(lineup.found.which(n) for n in plan.sample_from))
    done: dict[str, list[Completion]] = {}
    for name in names:
        tick = progress(f"sampling from the {name}", len(requests))
        done[name] = sample(lineup, name, requests, how, pieces, tick)
    models = {}
    for name in names:
        said = list(texts(lineup, done[name]))
        others = [b for a, b in ev.against(lineup) if a == name]
        groups: list[Group] = [(r.ids, [c.ids]) for r, c in zip(requests, done[name], strict=True)]
        measures = ev.sample_measures(done[name], said, clusters, how.seed)
        if others:
            tick = progress(f"KL of the {name}", len(groups))
            lengths = torch.tensor([len(c.ids) for c in done[name]])
            sums = ev.kl_passes(lineup, name, others, groups, packs, pieces, tick)
            measures["against"] = {o: ev.kl_measures(both, lengths, clusters) for o, both in sums.items()}
        measures["texts"] = [
            {"prompt": lineup.tokenizer.decode(r.ids), "sample": r.sample, "output": text, "ended": c.ended}
            for r, c, text in zip(requests, done[name], said, strict=True)
        ]
        models[name] = measures
    if not has_sacrebleu():
        notes.append('Self-BLEU needs sacrebleu: pip install "lorat[eval]".')
    cut = sum(not c.ended for cs in done.values() for c in cs)
    if cut:
        notes.append(
            f"{cut} of {len(names) * len(requests)} samples were cut at {how.max_new_tokens} tokens: their lengths are lower "
            f"bounds, and each KL is that of the first {how.max_new_tokens} tokens, at most that of whole completions."
        )
    settings = {"samples": len(requests), "prompts": len(set(clusters)), "end_ids": end_ids(lineup), **asdict(how)}
    return {**settings, "models": models}, notes
