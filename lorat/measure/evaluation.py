"""What a run has come to: rewards, calibration and log-ratios on preferences, KL and diversity of its own samples.

Every model's log-prob of every completion token is computed in one pass and kept, so each ratio between two models is a
subtraction, per token and then summed. A KL is estimated twice from the same samples: by the log-ratio of what was
sampled, and with the exact divergence of each next-token distribution, which has the same mean and less noise.
docs/evaluation.md derives both. Left out: judges and benchmarks; `lorat generate` writes what they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.tokenization import check_tokenizer
from ..files import Pieces, pack_floats, unpack_floats
from ..model.base import check_fit
from ..model.models import Head
from ..model.probe import why_not
from ..packs.attention import install
from ..packs.logprobs import logprobs_of, per_completion
from ..packs.packing import Group, Packer
from .estimators import calibration, distinct, estimate, has_sacrebleu, self_bleu, token_kl
from .generation import Completion, Request, Sampling, end_ids, logits, sample, texts, within_positions
from .lineup import Lineup

# What is measured against what; each is left out where both compute the same.
AGAINST = (("policy", "reference"), ("policy", "start"), ("policy", "base"), ("reference", "start"), ("start", "base"))
ROWS = 128  # token positions whose full distributions are held at a time
Progress = Callable[[str, int], Callable[[int], None]]  # (what, how many in all) -> called with what is done


@dataclass(frozen=True)
class Scope:
    """What to measure. `samples`: completions of each model in `sample_from`; `beta`: of the rewards."""

    beta: float
    length_normalize: bool
    bins: int
    samples: int
    sample_from: tuple[str, ...]
    sampling: Sampling
    max_tokens_per_pack: int


def evaluate(lineup: Lineup, rows: Sequence[dict[str, Any]], scope: Scope, pieces: Pieces, progress: Progress) -> dict:
    """Measures of tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) and of samples of their prompts.

    Plain JSON. What is finished lies in `pieces` until the caller has written the result, so that a killed evaluation goes on.
    """
    groups: list[Group] = [(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]]) for r in rows]
    longest = max(len(p) + max(map(len, cs)) for p, cs in groups)
    greatest = max(max(ids) for p, cs in groups for ids in (p, *cs))
    check_fit(lineup.model.get_base_model(), greatest, longest)
    packs = packer(lineup, scope.max_tokens_per_pack, check_tokenizer(lineup.tokenizer), longest)
    tokens = token_passes(lineup, groups, packs, pieces, progress("log-probs", len(groups) * len(lineup.names)))
    prompts = [tuple(p) for p, _ in groups]
    preferences = {
        "pairs": len(groups),
        "prompts": len(set(prompts)),
        "beta": scope.beta,
        "length_normalize": scope.length_normalize,
        "models": {name: model_measures(t, prompts) for name, t in tokens.items()},
        "against": {
            f"{a}/{b}": preference_measures(
                Ratios.of(tokens[a], tokens[b]), prompts, scope.beta, scope.length_normalize, scope.bins
            )
            for a, b in against(lineup)
        },
    }
    result: dict[str, Any] = {"preferences": preferences, "notes": [*lineup.found.notes]}
    if scope.samples:
        result["generation"], notes = _generate(lineup, list(dict.fromkeys(prompts)), scope, pieces, progress)
        result["notes"] += notes
    return finite(result)


def _generate(
    lineup: Lineup, prompts: list[tuple[int, ...]], scope: Scope, pieces: Pieces, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Samples of each model of `scope.sample_from`, their KL from the models they are measured against, diversity."""
    ids, sampling, notes = within_positions(lineup, [list(p) for p in prompts], scope.sampling)
    requests = [Request(p, s, ids[p]) for p, s in in_turn(ids, scope.samples, sampling.seed)]
    clusters = [r.prompt for r in requests]
    packs = packer(
        lineup,
        scope.max_tokens_per_pack,
        check_tokenizer(lineup.tokenizer),
        max(len(r.ids) for r in requests) + sampling.max_new_tokens,
    )
    names = list(dict.fromkeys(lineup.found.which(n) for n in scope.sample_from))
    done: dict[str, list[Completion]] = {}
    for name in names:
        tick = progress(f"sampling from the {name}", len(requests))
        done[name] = sample(lineup, name, requests, sampling, pieces, tick)
    models = {}
    for name in names:
        said = list(texts(lineup, done[name]))
        others = [b for a, b in against(lineup) if a == name]
        groups: list[Group] = [(r.ids, [c.ids]) for r, c in zip(requests, done[name], strict=True)]
        measures = sample_measures(done[name], said, clusters, sampling.seed)
        if others:
            tick = progress(f"KL of the {name}", len(groups))
            lengths = torch.tensor([len(c.ids) for c in done[name]])
            sums = kl_passes(lineup, name, others, groups, packs, pieces, tick)
            measures["against"] = {o: kl_measures(both, lengths, clusters) for o, both in sums.items()}
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
            f"{cut} of {len(names) * len(requests)} samples were cut at {sampling.max_new_tokens} tokens: their lengths are lower "
            f"bounds, and each KL is that of the first {sampling.max_new_tokens} tokens, at most that of whole completions."
        )
    settings = {"samples": len(requests), "prompts": len(set(clusters)), "end_ids": end_ids(lineup), **asdict(sampling)}
    return {**settings, "models": models}, notes


def against(lineup: Lineup) -> list[tuple[str, str]]:
    """The pairs of `AGAINST` that this run has, under the names of the models that are computed; each once."""
    same, names = lineup.found.same_as, lineup.names
    pairs = [(same.get(a, a), same.get(b, b)) for a, b in AGAINST]
    return [(a, b) for a, b in dict.fromkeys(pairs) if a != b and a in names and b in names]


def packer(lineup: Lineup, budget: int, pad_id: int, longest: int) -> Packer:
    """Packs of `budget` tokens that share prompts where the model computes them exactly, else a row a completion."""
    base: Any = lineup.model.get_base_model()
    with lineup.using("policy"):
        shared = why_not(lineup.models, lineup.device, longest) is None and install(base)
    return Packer(shared, budget, pad_id)


def token_passes(
    lineup: Lineup, groups: Sequence[Group], packs: Packer, pieces: Pieces, done: Callable[[int], None]
) -> dict[str, list[Tensor]]:
    """`{model: log-probs of each completion's tokens}`: a list of `(tokens,)` float32 nats, in the completions' order.

    Every model in one pass over `groups`. A pack that `pieces` holds is not computed again. `done` is called with the
    groups of each pack.
    """
    out: dict[str, list[Tensor]] = {}
    for name in lineup.names:
        rows: dict[int, Tensor] = {}
        for k, (indices, places) in enumerate(packs.places(groups)):
            key = f"logps/{name}/{k}"
            lengths = [len(c) for i in indices for c in groups[i][1]]
            if key not in pieces:
                pack = packs.pack([groups[i] for i in indices]).to(lineup.device)
                with lineup.using(name):
                    pieces[key] = pack_floats(lineup.models.tokens(pack))
            rows.update(zip(places, unpack_floats(pieces[key]).split(lengths), strict=True))
            done(len(indices))
        out[name] = [rows[i] for i in range(len(rows))]
    return out


@dataclass(frozen=True)
class Ratios:
    """Log-ratios of n pairs between two models: `chosen`, `rejected` (n,) nats a completion; `lengths` (n, 2)."""

    chosen: Tensor
    rejected: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, a: Sequence[Tensor], b: Sequence[Tensor]) -> Ratios:
        """From per-token log-probs of 2n completions, `(tokens,)` nats each, chosen and rejected alternating."""
        lengths = [len(t) for t in a]
        sums = per_completion(torch.cat(list(a)).double() - torch.cat(list(b)).double(), lengths)
        return cls(sums[0::2], sums[1::2], torch.tensor(lengths).view(-1, 2))


def preference_measures(
    ratios: Ratios, prompts: Sequence[Hashable], beta: float, length_normalize: bool = False, bins: int = 10
) -> dict[str, Any]:
    """Accuracy, margins, log-ratios and calibration of n pairs; `prompts[i]` tells which pairs share a prompt.

    Rewards are `β·Δ` of the sums, as in training logs; `length_normalize` makes the predicted preference that of
    per-token means, `σ(β(Δ_w/|y_w| − Δ_l/|y_l|))`, for runs that train those. Each mean is `[mean, standard error]`.
    """
    chosen, rejected = ratios.chosen.double(), ratios.rejected.double()
    scale = ratios.lengths.double() if length_normalize else torch.ones_like(ratios.lengths, dtype=torch.float64)
    margins = chosen - rejected
    moved = (ratios.chosen.abs() + ratios.rejected.abs()).double().sum() / ratios.lengths.sum()
    fitted = calibration(beta * (chosen / scale[:, 0] - rejected / scale[:, 1]), bins)
    mean = lambda x: list(estimate(x, prompts))  # noqa: E731
    return {
        "accuracy": mean((margins > 0).double()),
        "ties": int((margins == 0).sum()),
        "margin": mean(margins),
        "reward_margin": mean(beta * margins),
        "reward_chosen": mean(beta * chosen),
        "reward_rejected": mean(beta * rejected),
        "logratio_chosen": mean(chosen),
        "logratio_rejected": mean(rejected),
        "drift_per_token": moved.item(),
        "ece": fitted.ece,
        "brier": fitted.brier,
        "log_loss": fitted.log_loss,
        "reliability": [b._asdict() for b in fitted.table],
    }


def model_measures(tokens: Sequence[Tensor], prompts: Sequence[Hashable]) -> dict[str, Any]:
    """Of one model: log-probs of chosen and rejected, a completion and a token, and how often chosen is likelier.

    `tokens`: 2n completions' log-probs, `(tokens,)` nats each, chosen and rejected alternating; `prompts`: n.
    """
    lengths = [len(t) for t in tokens]
    sums = per_completion(torch.cat(list(tokens)), lengths).double()
    chosen, rejected, n = sums[0::2], sums[1::2], torch.tensor(lengths).view(-1, 2)
    return {
        "logp_chosen": list(estimate(chosen, prompts)),
        "logp_rejected": list(estimate(rejected, prompts)),
        "logp_chosen_per_token": (chosen.sum() / n[:, 0].sum()).item(),
        "logp_rejected_per_token": (rejected.sum() / n[:, 1].sum()).item(),
        "prefers_chosen": list(estimate((chosen > rejected).double(), prompts)),
    }


def kl_passes(
    lineup: Lineup,
    name: str,
    others: Sequence[str],
    groups: Sequence[Group],
    packs: Packer,
    pieces: Pieces,
    done: Callable[[int], None] = lambda groups: None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """For samples of `name`, one a group: `{other: (log-ratios, exact divergences)}`, each (n,) nats a completion.

    Both are summed over a completion's tokens; the mean of either estimates the KL of `name` from `other`.
    """
    rows: dict[str, dict[int, tuple[float, float]]] = {other: {} for other in others}
    for k, indices in enumerate(packs.split(groups)):
        key = f"kl/{name}/{k}"
        if key not in pieces:
            pack = packs.pack([groups[i] for i in indices]).to(lineup.device)
            hidden = {m: _hidden(lineup, m, pack) for m in (name, *others)}
            values = {other: _two_sums(lineup.head, hidden[name], hidden[other], pack) for other in others}
            pieces[key] = {other: [v.tolist() for v in both] for other, both in values.items()}
        for other in others:
            rows[other].update(zip(indices, zip(*pieces[key][other], strict=True), strict=True))
        done(len(indices))
    table = {other: torch.tensor([r[i] for i in range(len(r))], dtype=torch.float64) for other, r in rows.items()}
    return {other: (t[:, 0], t[:, 1]) for other, t in table.items()}


def _hidden(lineup: Lineup, name: str, pack: Any) -> Tensor:
    """Hidden states `(K, D)` of `name` that predict the pack's K completion tokens."""
    with lineup.using(name):
        return lineup.models.hidden(pack)


@torch.no_grad()
def _two_sums(head: Head, p: Tensor, q: Tensor, pack: Any) -> tuple[Tensor, Tensor]:
    """Per completion of `pack`: the sums of sampled log-ratios and of exact divergences; `p`, `q`: (K, D)."""
    ratios, exact = [], []
    for a, b, target in zip(p.split(ROWS), q.split(ROWS), pack.targets.split(ROWS), strict=True):
        za, zb = logits(head, a), logits(head, b)
        ratios.append(logprobs_of(za, target) - logprobs_of(zb, target))
        exact.append(token_kl(za, zb))
    return per_completion(torch.cat(ratios), pack.lengths), per_completion(torch.cat(exact), pack.lengths)


def sample_measures(
    completions: Sequence[Completion], texts: Sequence[str], clusters: Sequence[Hashable], seed: int = 0
) -> dict[str, Any]:
    """Of sampled completions: length in tokens without the end token, how many ended, distinct-n, self-BLEU."""
    said = [c.ids[:-1] if c.ended else c.ids for c in completions]
    lengths = torch.tensor([float(len(s)) for s in said])
    return {
        "length": list(estimate(lengths, clusters)),
        "length_median": lengths.quantile(0.5).item(),
        "ended": list(estimate(torch.tensor([float(c.ended) for c in completions]), clusters)),
        "empty": sum(not t.strip() for t in texts),
        **{f"distinct_{n}": distinct(said, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(texts, seed=seed) if has_sacrebleu() else None,
    }


def kl_measures(both: tuple[Tensor, Tensor], lengths: Tensor, clusters: Sequence[Hashable]) -> dict[str, Any]:
    """`kl` from exact divergences, `kl_sampled` from log-ratios, `kl_per_token`; lengths (n,) count end tokens."""
    sampled, exact = both
    return {
        "kl": list(estimate(exact, clusters)),
        "kl_sampled": list(estimate(sampled, clusters)),
        "kl_per_token": (exact.sum() / lengths.sum()).item(),
    }


def finite(value: Any) -> Any:
    """The same with NaN and infinity as None, for JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_turn(prompts: Sequence[Any], samples: int, seed: int) -> Iterator[tuple[int, int]]:
    """`samples` of (prompt, sample number): every prompt once in an order that `seed` shuffles, then again."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    for i in range(samples):
        yield order[i % len(prompts)], i // len(prompts)
