"""Sampling from one of a run's models, a batch at a time: left padding, a KV cache, and a random stream a completion.

The distribution is the one whose log-probs are evaluated: float32 logits from the same head, nothing cut off unless
asked, and nothing taken from the model's `generation_config` but its end tokens. (`generate` of transformers fills
what a caller leaves open with the model's own top-k, top-p or penalties.) Every completion has uniform numbers of its
own, from seed, prompt and sample number, so that the batch it is in matters only through rounding. Finished pieces
survive a kill. Left out: beams, penalties, and models without a KV cache.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.tokenization import check_tokenizer
from ..errors import ConfigError, ModelError
from ..files import Pieces
from ..model.models import Head, backbone
from .lineup import Lineup

WIDTH = 8192  # rows of the head that are widened to float32 at a time


@dataclass(frozen=True)
class Sampling:
    """How to sample. Raises `ConfigError` for values that mean nothing."""

    temperature: float = 1.0
    top_p: float = 1.0  # 1: nothing is cut off
    greedy: bool = False
    max_new_tokens: int = 256
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        wrong = []
        if not self.temperature > 0:
            wrong.append(f"temperature={self.temperature} must be above 0; for the most likely token give --greedy")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p={self.top_p} must be above 0 and at most 1, which cuts nothing off")
        wrong += [
            f"{name}={value} must be at least 1"
            for name, value in (("max_new_tokens", self.max_new_tokens), ("batch_size", self.batch_size))
            if value < 1
        ]
        if wrong:
            raise ConfigError("; ".join(wrong) + ".")


class Request(NamedTuple):
    """A completion to be sampled: the number of its prompt, which sample of it, and the prompt's token ids."""

    prompt: int
    sample: int
    ids: list[int]


class Completion(NamedTuple):
    """Token ids, the end token last where there is one; `ended`: false where it was cut at `max_new_tokens`."""

    ids: list[int]
    ended: bool


def uniforms(seed: int, prompt: int, sample: int, n: int) -> Tensor:
    """`(n,)` float64 uniform numbers in [0, 1) that belong to one completion, on the host; the same on any device."""
    key = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def logits(head: Head, hidden: Tensor) -> Tensor:
    """(K, D) hidden states -> (K, V) float32 logits, the products of `linear_logprob` without rounding them to bf16."""
    with torch.autocast(hidden.device.type, enabled=False):
        h, w = hidden.float(), head.weight
        z = torch.cat([h @ part.float().T for part in w.split(WIDTH)], dim=1)
        z = z if head.bias is None else z + head.bias.float()
        z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
        return z / head.temperature


def pick(z: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverting the distribution function: logits (B, V), uniforms (B,) -> (B,) int64."""
    if sampling.greedy:
        return z.argmax(-1)
    p = (z.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p  # the fewest tokens that hold top_p, the first one always
        p = torch.zeros_like(p).scatter(-1, index, ordered * kept)
    cumulative = p.cumsum(-1)
    at = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
    return at.clamp(max=z.shape[1] - 1)


def end_ids(lineup: Lineup) -> list[int]:
    """Tokens that end a completion: the tokenizer's EOS, and those of a `generation_config` that has it among its own.

    One that does not have it belongs to another tokenizer, as a default does.
    """
    theirs = getattr(getattr(lineup.model.get_base_model(), "generation_config", None), "eos_token_id", None)
    listed = theirs if isinstance(theirs, list) else []
    eos = int(lineup.tokenizer.eos_token_id)
    return [eos, *(t for t in listed if t != eos)] if eos in listed else [eos]


def complete(lineup: Lineup, prompts: Sequence[Sequence[int]], draws: Tensor, sampling: Sampling) -> list[Completion]:
    """Sample a completion of each prompt under the active model; `draws`: (B, max_new_tokens) uniforms.

    A row that has ended goes on until all have, and is cut afterwards.
    """
    inner, device = backbone(lineup.model), lineup.device
    ends = torch.tensor(end_ids(lineup), device=device)
    longest, pad = max(map(len, prompts)), check_tokenizer(lineup.tokenizer)
    tokens = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    cache, new, draws = None, list[Tensor](), draws.to(device)
    while len(new) < sampling.max_new_tokens and not ended.all():
        kwargs: dict[str, Any] = {}
        if takes_positions:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = inner(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise ModelError(
                f"{type(lineup.model.get_base_model()).__name__} keeps no KV cache, so lorat cannot sample from it; give "
                "--samples 0 to evaluate log-probs alone."
            )
        tokens = pick(logits(lineup.head, out.last_hidden_state[:, -1]), draws[:, len(new)], sampling)[:, None]
        new.append(tokens)
        ended |= torch.isin(tokens[:, 0], ends)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return [_cut(row, ends.tolist()) for row in torch.cat(new, dim=1).tolist()]


def _cut(row: list[int], ends: list[int]) -> Completion:
    at = next((i for i, token in enumerate(row) if token in ends), None)
    return Completion(row, False) if at is None else Completion(row[: at + 1], True)


def batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Indices of requests that are sampled together, the longest prompts first, so that little is padded."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].ids), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def sample(
    lineup: Lineup,
    name: str,
    requests: Sequence[Request],
    sampling: Sampling,
    pieces: Pieces,
    progress: Callable[[int], None] = lambda completions: None,
) -> list[Completion]:
    """A completion for each request from the model `name`; a batch that `pieces` holds is not sampled again.

    Batches are decided before the first one, so a run that was killed goes on with the same ones and ends as if it had
    not been. `progress` is called with the completions of each batch.
    """
    out: dict[int, Completion] = {}
    for b, indices in enumerate(batches(requests, sampling.batch_size)):
        key = f"samples/{lineup.found.which(name)}/{b}"
        if key not in pieces:
            chosen = [requests[i] for i in indices]
            draws = torch.stack([uniforms(sampling.seed, r.prompt, r.sample, sampling.max_new_tokens) for r in chosen])
            with lineup.using(name):
                done = complete(lineup, [r.ids for r in chosen], draws, sampling)
            pieces[key] = [[c.ids, c.ended] for c in done]
        found = [Completion(*c) for c in pieces[key]]
        out.update(zip(indices, found, strict=True))
        progress(len(found))
    return [out[i] for i in range(len(requests))]


def within_positions(
    lineup: Lineup, prompts: list[list[int]], sampling: Sampling
) -> tuple[list[list[int]], Sampling, list[str]]:
    """Prompts and lengths within the model's positions: `(prompts, sampling, notes)`.

    New tokens take at most half of them, and a prompt keeps its end (and a BOS in front) in the rest.
    """
    base: Any = lineup.model.get_base_model()
    known = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    notes: list[str] = []
    if not known:
        return prompts, sampling, notes
    if sampling.max_new_tokens > known // 2:
        notes.append(f"The model has {known} positions, so completions are cut at {known // 2} tokens.")
        sampling = Sampling(**{**asdict(sampling), "max_new_tokens": known // 2})
    room, bos = known - sampling.max_new_tokens, lineup.tokenizer.bos_token_id
    if long := sum(len(p) > room for p in prompts):
        notes.append(f"{long} of {len(prompts)} prompts were longer than {room} tokens and kept their ends.")
    return [_end_of(p, room, bos) for p in prompts], sampling, notes


def _end_of(ids: list[int], room: int, bos: int | None) -> list[int]:
    if len(ids) <= room:
        return ids
    return [bos, *ids[len(ids) - room + 1 :]] if bos is not None and ids[0] == bos else ids[-room:]


def texts(lineup: Lineup, completions: Sequence[Completion]) -> Iterator[str]:
    """What was said, without the end token."""
    for c in completions:
        ids = c.ids[:-1] if c.ended else c.ids
        yield str(lineup.tokenizer.decode(ids, skip_special_tokens=True))
