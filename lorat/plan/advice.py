"""What to change where nothing fits: settings that take less memory, mildest first, with what each gives.

Everything here is decided by `memory.Planner`; nothing is loaded. Left out: finding settings that train better.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from .memory import STEP, Plan, Planner
from .workload import Workload


def fit(workload: Workload, model_config: Any, available: int, longest: int | None = None) -> Plan:
    """The plan with the largest `max_tokens_per_pack` whose predicted peak is at most `available` bytes.

    `longest`: tokens of the longest example in the data, by default what `max_length` allows. If not even that fits, the
    plan for it, with `advice`. Raises `ModelError` for a model whose memory cannot be predicted. Takes seconds.
    """
    planner = Planner(workload, model_config)
    plan = planner.largest(available, longest)
    return plan if plan.fits else advised(planner, plan, longest)


def advised(planner: Planner, plan: Plan, longest: int | None = None) -> Plan:
    """A `plan` of `planner`'s with what to change, mildest first and each on top of those before, until it fits or nothing is left."""
    assert plan.available is not None
    now, words = planner.workload, []
    before = plan.total
    for told, change in _changes(now):
        tried = change(now)
        try:
            other = planner.of(tried)
            need = other.longest if longest is None or tried.max_length != now.max_length else longest
            found = other.at(need or STEP, available=plan.available)
        except ModelError:
            continue  # the embeddings are the head's as well, say
        if found.total >= before - 2**20:
            continue
        words.append(f"{told} ({(found.total - before) / 2**30:+.2f} GiB)")
        now, before = tried, found.total
        if found.fits:
            words.append(f"it then needs {found.total / 2**30:.2f} GiB and fits, with packs of {found.tokens} tokens")
            break
    else:
        words.append(f"all of that still needs {before / 2**30:.2f} GiB: a smaller model, or a larger card")
    return replace(plan, advice=words)


def _changes(workload: Workload) -> Iterator[tuple[str, Callable[[Workload], Workload]]]:
    """Settings as a person would write them and what they make of a workload, from what costs nothing to what costs most."""
    of_base = lambda **how: lambda w: replace(w, base=replace(w.base, **how))  # noqa: E731
    of_all = lambda **how: lambda w: replace(w, **how)  # noqa: E731
    base, adapter, name = workload.base, workload.adapter, workload.checkpointing_setting
    if not base.four_bit:
        yield "load_in_4bit: true", of_base(four_bit=True)
    if not workload.checkpointing:
        yield f"{name}: true", of_all(checkpointing=True)
    if not base.double_quant:
        yield "bnb_4bit_use_double_quant: true", of_base(double_quant=True)
    if "8bit" not in workload.optimiser:
        yield "optim: paged_adamw_8bit", of_all(optimiser="paged_adamw_8bit")
    if workload.ref_rank and workload.ref_rank > adapter.r:
        yield "ref_rank: null", of_all(ref_rank=None)
    how = {k: v for k, v in workload.checkpointing_kwargs.items() if k != "use_reentrant"}
    if not how.get("offload"):
        how["offload"] = True
        yield f"{name}_kwargs: {how}".replace("True", "true"), of_all(checkpointing_kwargs=how)
    if base.quantize_embeddings != "4bit":
        kind = "8bit" if base.quantize_embeddings is None else "4bit"
        yield f"quantize_embeddings: {kind}", of_base(quantize_embeddings=kind)
    if adapter.r > 8:
        smaller = copy.copy(adapter)
        smaller.r, smaller.lora_alpha = 8, max(1, round(adapter.lora_alpha * 8 / adapter.r))
        yield f"lora_r: 8, lora_alpha: {smaller.lora_alpha}", of_all(adapter=smaller, ref_rank=None)
    length = workload.max_length
    while length and length > 256:
        length //= 2
        yield f"max_length: {length}", of_all(max_length=length)
