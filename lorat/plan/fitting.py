"""The largest packs that fit a card, and what to change where none do.

The peak grows with a pack's tokens along nearly straight lines: a few predictions find where it passes the limit.
Everything here is decided by `memory.Planner`; nothing is loaded. Left out: finding settings that train better.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, ModelError
from .memory import CONTEXT, STEP, Plan, Planner

if TYPE_CHECKING:
    from ..settings.config import TrustRegionConfig

UNITS = {"": 2**30, "G": 2**30, "GIB": 2**30, "GB": 10**9, "M": 2**20, "MIB": 2**20, "MB": 10**6}


def bytes_of(text: str) -> int:
    """`12GiB`, `12` (GiB), `12GB`, `11264MiB`, or `auto` (what the card has free) -> bytes; raises `ConfigError`."""
    if text.strip().lower() == "auto":
        if not torch.cuda.is_available():
            raise ConfigError("gpu_memory=auto asks the GPU, and none is here; set an amount, such as 12GiB.")
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() + CONTEXT  # a plan counts the context, which is there already
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]?(?:iB|B)?)\s*", text, re.IGNORECASE)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise ConfigError(f"gpu_memory={text} is no amount of memory; set 12GiB, say, or auto.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def largest(planner: Planner, available: int, longest: int | None = None) -> Plan:
    """The plan with the largest packs that fit `available` bytes; that of the smallest useful packs if none fit.

    `longest`: tokens of the data's longest example; by default what `max_length` allows.
    """
    need = longest or planner.longest or STEP
    low, high = -(-need // STEP) * STEP, max(need, planner.most())
    plan = planner.at(need, available=available)
    if not plan.fits or high <= low:
        return plan
    top = planner.at(high, available=available)
    if top.fits:
        return top
    worst = max(planner.packs(need), key=lambda g: planner.step(g).total)
    index = planner.packs(need).index(worst)
    below, above = (need, plan.total), (high, top.total)
    while above[0] - below[0] > STEP:
        guess = below[0] + (available - below[1]) * (above[0] - below[0]) / (above[1] - below[1])
        tokens = int(min(max(guess // STEP * STEP, below[0] // STEP * STEP + STEP), above[0] - 1))
        made = planner.packs(tokens)
        one = planner.plan_of(tokens, planner.step(made[min(index, len(made) - 1)]), available)
        if one.fits:
            below = (tokens, one.total)
            if above[0] - tokens > STEP:  # a straight line is nearly right: look just above it
                probe = tokens + STEP
                again = planner.packs(probe)
                two = planner.plan_of(probe, planner.step(again[min(index, len(again) - 1)]), available)
                below, above = ((probe, two.total), above) if two.fits else (below, (probe, two.total))
        else:
            above = (tokens, one.total)
    tokens = below[0]
    while not (plan := planner.at(tokens, available=available)).fits and tokens - STEP >= need:
        tokens -= STEP
    return plan


def fit(config: TrustRegionConfig, model_config: Any, available: int, longest: int | None = None) -> Plan:
    """The plan with the largest `max_tokens_per_pack` whose predicted peak is at most `available` bytes.

    `longest`: tokens of the longest example in the data, by default what `max_length` allows. If not even that fits, the
    plan for it, with `advice`. Raises `ModelError` for a model whose memory cannot be predicted. Takes seconds.
    """
    plan = largest(Planner(config, model_config), available, longest)
    return plan if plan.fits else advised(config, model_config, plan, longest)


def advised(config: TrustRegionConfig, model_config: Any, plan: Plan, longest: int | None = None) -> Plan:
    """`plan` with what to change, mildest first and each on top of those before, until it fits or nothing is left."""
    assert plan.available is not None
    now, words = copy.copy(config), []
    before = plan.total
    for change in _changes(config):
        tried = copy.copy(now)
        for name, value in change.items():
            setattr(tried, name, value)
        try:
            planner = Planner(tried, model_config)
            need = planner.longest if longest is None or "max_length" in change else longest
            found = planner.at(need or STEP, available=plan.available)
        except ModelError:
            continue  # the embeddings are the head's as well, say
        if found.total >= before - 2**20:
            continue
        told = ", ".join(f"{k}: {v}".replace("True", "true") for k, v in change.items() if v is not None)
        words.append(f"{told or 'ref_rank: null'} ({(found.total - before) / 2**30:+.2f} GiB)")
        now, before = tried, found.total
        if found.fits:
            words.append(f"it then needs {found.total / 2**30:.2f} GiB and fits, with packs of {found.tokens} tokens")
            break
    else:
        words.append(f"all of that still needs {before / 2**30:.2f} GiB: a smaller model, or a larger card")
    return Plan(**{**vars(plan), "advice": words})


def _changes(config: TrustRegionConfig) -> Iterator[dict[str, Any]]:
    """Settings to change, from what costs nothing to what changes the result."""
    from ..settings.config import CHECKPOINTING

    if not config.load_in_4bit:
        yield {"load_in_4bit": True}
    if not config.checkpointing:
        yield {CHECKPOINTING: True}
    if not config.bnb_4bit_use_double_quant:
        yield {"bnb_4bit_use_double_quant": True}
    if "8bit" not in str(config.optim):
        yield {"optim": "paged_adamw_8bit"}
    if config.ref_rank and config.ref_rank > config.lora_r:
        yield {"ref_rank": None}
    how = {k: v for k, v in (getattr(config, f"{CHECKPOINTING}_kwargs") or {}).items() if k != "use_reentrant"}
    if not how.get("offload"):
        yield {f"{CHECKPOINTING}_kwargs": {**how, "offload": True}}
    if config.quantize_embeddings != "4bit":
        yield {"quantize_embeddings": "8bit"} if config.quantize_embeddings is None else {"quantize_embeddings": "4bit"}
    if config.lora_r > 8:
        yield {"lora_r": 8, "lora_alpha": max(1, round(config.lora_alpha * 8 / config.lora_r)), "ref_rank": None}
    length = config.max_length
    while length and length > 256:
        length //= 2
        yield {"max_length": length}
