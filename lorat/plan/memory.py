"""Will it fit: the peak of GPU memory of a run, item by item, before anything is downloaded or loaded.

What stays (weights, adapters, gradients, optimiser) is counted on `blueprint.draw`'s model, exactly. What a pack takes is
read off a forward and backward pass without values (`dry_pass.py`). Two things are assumed, and said so in the plan:
what the CUDA driver takes for itself (`CONTEXT`), and what the allocator loses between blocks (`FRAGMENTATION`). The peak
grows with a pack's tokens along nearly straight lines: a few predictions find the largest packs that fit.

Left out: several GPUs (each needs the same), loading (its peak is lower than training's: one layer in 16 bits at a time),
evaluation (no gradient: less than training), desktops and other programs on the same card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lorat_kernels.plans import Plan as KernelPlan
from lorat_kernels.plans import plan_for

from ..errors import ModelError, first_line
from ..reference import POLICY, adapter_parameters
from ..reference.lowrank import WORKSPACE
from .blueprint import draw, stored
from .dry_pass import DryPass, Moment
from .optimiser import optimiser_memory
from .workload import Workload

CONTEXT = (
    500 * 2**20
)  # bytes of the CUDA context, cuBLAS, bitsandbytes and Triton kernels: assumed, not allocated by torch
FRAGMENTATION = 0.1  # of a pack's memory, lost between the allocator's blocks: assumed
CUBLAS = 2 * 8320 * 1024  # torch's cuBLAS workspaces, of the forward and of the backward thread (sm_90: 2 x 32 MiB)
STEP = 64  # packs are planned in multiples of this many tokens
KERNEL = (8, 9)  # compute capability that is assumed where there is no GPU

Groups = Sequence[tuple[int, Sequence[int]]]  # a pack: each prompt's tokens, and those of its completions


@dataclass(frozen=True)
class Item:
    """A part of the peak: `kind` is "model", "training", "pack" or "outside" (of torch's allocator)."""

    name: str
    bytes: int
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The predicted peak of a run with packs of `tokens` tokens; `available`: what it has to fit into, or None."""

    tokens: int
    items: list[Item]
    available: int | None = None
    host: int = 0  # bytes of optimiser state in managed memory, on the GPU only while there is room
    needed: int | None = None  # tokens of the longest example that the settings allow
    shared: bool = True
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` is predicted to say."""
        return sum(i.bytes for i in self.items if i.kind != "outside")

    @property
    def total(self) -> int:
        """What the process is predicted to take of the GPU."""
        return sum(i.bytes for i in self.items)

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def as_dict(self) -> dict[str, Any]:
        return {
            "max_tokens_per_pack": self.tokens,
            "fits": self.fits,
            "available": self.available,
            "allocated": self.allocated,
            "total": self.total,
            "host": self.host,
            "longest_example": self.needed,
            "prefix_sharing": self.shared,
            "items": [vars(i) for i in self.items],
            "notes": self.notes,
            "advice": self.advice,
        }


class Planner:
    """Predicts the peak of one workload for packs of any size. Raises `ModelError` for a model without layers.

    `model_config`: transformers' configuration of the model. `context`: bytes that CUDA takes for itself. `capability`:
    of the card, by default of the one that is here. `flash`: whether packs get FlashAttention, by default as that has it.
    """

    def __init__(
        self,
        workload: Workload,
        model_config: Any,
        context: int = CONTEXT,
        capability: tuple[int, int] | None = None,
        flash: bool | None = None,
    ) -> None:
        if capability is None:
            capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else KERNEL
        self.workload, self.model_config, self.context = workload, model_config, context
        self.capability, self.flash = capability, capability >= (8, 0) if flash is None else flash
        kernel: KernelPlan | None = plan_for(capability)
        self.cublas = CUBLAS if capability < (9, 0) else 2 * 32 * 2**20
        model = draw(workload.base, workload.adapter, model_config, workload.ref_rank)
        bytes_of: Counter[str] = Counter()
        for what, t in stored(model):
            bytes_of[what] += t.untyped_storage().nbytes()
        policy = list(adapter_parameters(model, POLICY).values())
        self.optimiser = optimiser_memory(workload.optimiser, policy, workload.optimiser_args)
        gradients = sum(p.numel() * p.element_size() for p in policy)
        self.static = [
            Item("4-bit weights", bytes_of["weights"], "model"),
            Item("quantisation state", bytes_of["state"], "model"),
            Item("embeddings", bytes_of["embeddings"], "model", "the head's too" if not bytes_of["head"] else ""),
            Item("head", bytes_of["head"], "model"),
            Item("norms, biases, unquantised layers", bytes_of["other"], "model"),
            Item("policy adapter", bytes_of["policy"], "training", f"float32, rank {workload.adapter.r}"),
            Item("reference adapter", bytes_of["reference"], "training", f"float32, rank {workload.reference_rank}"),
            Item("gradients", gradients, "training", "float32, of the policy"),
            Item("optimiser state", self.optimiser.gpu, "training", self.optimiser.note),
        ]
        text = model_config.get_text_config()
        soft = getattr(text, "attn_logit_softcapping", None)
        self._by_flash = self.flash and workload.half is not None and not soft
        self._moments: dict[Any, Moment] = {}
        try:
            self.dry = DryPass(workload, model, kernel, self.flash)
        except NotImplementedError as error:
            raise ModelError(
                f"{model_config.model_type}: {first_line(error)}; its memory cannot be predicted."
            ) from error

    def of(self, workload: Workload) -> Planner:
        """Another workload on the same card, of the same model."""
        return Planner(workload, self.model_config, self.context, self.capability, self.flash)

    def moment(self, groups: Groups) -> Moment:
        """A pack's own memory; `ModelError` where the model's code cannot run without values."""
        key = tuple((p, tuple(cs)) for p, cs in groups)
        if key not in self._moments:
            try:
                self._moments[key] = self.dry.moment(groups)
            except Exception as error:
                name = type(self.dry.model.get_base_model()).__name__
                raise ModelError(
                    f"{name} cannot be run without values ({type(error).__name__}: {first_line(error)}), so its memory "
                    "cannot be predicted. Try a small max_tokens_per_pack; the run rehearses its fullest pack first."
                ) from error
        return self._moments[key]

    @property
    def longest(self) -> int | None:
        """Tokens of the longest example that `max_length` allows: a pair shares at least one prompt token."""
        length, rows = self.workload.max_length, self.workload.rows
        if length is None:
            return None
        return rows * length - (rows - 1) * self.dry.shared

    def packs(self, tokens: int) -> list[Groups]:
        """Packs of `tokens` tokens that take the most: all completions or nearly all prompt, many pairs or few."""
        length = self.workload.max_length or tokens
        most = max(1, min(self.workload.examples, tokens // 3))
        least = min(most, max(1, -(-tokens // (2 * length - 1))))
        long_prompts = [_pair(size, min(size - 2, length - 1)) for size in _even(tokens, most)]
        counts = {most} if self._by_flash else {most, least}  # FlashAttention's buffers grow with the number of pairs
        out: list[Groups] = [[_pair(size, 1) for size in _even(tokens, n)] for n in sorted(counts)]
        return [*out, long_prompts]

    def at(self, tokens: int, groups: Groups | None = None, available: int | None = None) -> Plan:
        """The plan for packs of `tokens` tokens: of the worst make-up of a pack, or of `groups` as they are."""
        moments = [self.moment(g) for g in ([groups] if groups is not None else self.packs(tokens))]
        return self.plan_of(tokens, max(moments, key=lambda m: m.total), available)

    def plan_of(self, tokens: int, moment: Moment, available: int | None) -> Plan:
        """The plan where a pack takes what `moment` says."""
        kept = "inputs of the layers" if self.workload.checkpointing else "all layers' activations"
        kept += ", in host memory" if self.dry.offload else ""
        pack = [
            Item(f"activations kept ({kept})", moment.kept, "pack"),
            Item("one layer at work", moment.work, "pack", "recomputed activations and gradients"),
            Item("attention", moment.attention, "pack", "gathered keys and values, FlashAttention's buffers"),
            Item("dequantised weight", moment.dequantised, "pack", "the largest product's, in 16 bits"),
            Item("log-probs", moment.logprobs, "pack", "chunks of the head, and their gradient"),
        ]
        factors = 2 * sum(i.bytes for i in self.static if i.name.endswith("adapter"))  # in float64
        # factors, their products, and the result
        blended = 3 * min(WORKSPACE, factors) if self.workload.product_blends else 0
        for name, size in (("optimiser's step", self.optimiser.step), ("reference update", blended)):
            if size > sum(i.bytes for i in pack):
                pack = [Item(name, size, "pack", "temporaries, larger than a pack's")]
        lost = int(FRAGMENTATION * sum(i.bytes for i in pack))
        outside = [
            Item("fragmentation", lost, "outside", f"assumed: {FRAGMENTATION:.0%} of a pack's memory"),
            Item("CUDA context and kernels", self.context, "outside", "assumed"),
        ]
        items = [*self.static, *pack, Item("cuBLAS workspaces", self.cublas, "pack"), *outside]
        notes = []
        if not self.dry.shared and self.workload.prefix_sharing is not False:
            notes.append("this model cannot share prompts: each completion is a padded row of its own")
        if self.dry.autocast:
            notes.append("this model computes under autocast, whose float32 copies are predicted less exactly")
        return Plan(
            tokens,
            [i for i in items if i.bytes],
            available,
            self.optimiser.host,
            self.longest,
            self.dry.shared,
            notes,
        )

    def most(self) -> int:
        """Tokens beyond which packs do not grow: a pack lies within one device batch."""
        length = self.workload.max_length or 2048
        return self.workload.examples * (2 * length - self.dry.shared)

    def largest(self, available: int, longest: int | None = None) -> Plan:
        """The plan with the largest packs that fit `available` bytes; that of the smallest useful packs if none fit.

        `longest`: tokens of the data's longest example; by default what `max_length` allows.
        """
        need = longest or self.longest or STEP
        low, high = -(-need // STEP) * STEP, max(need, self.most())
        plan = self.at(need, available=available)
        if not plan.fits or high <= low:
            return plan
        top = self.at(high, available=available)
        if top.fits:
            return top
        worst = max(self.packs(need), key=lambda g: self.moment(g).total)
        index = self.packs(need).index(worst)
        below, above = (need, plan.total), (high, top.total)
        while above[0] - below[0] > STEP:
            guess = below[0] + (available - below[1]) * (above[0] - below[0]) / (above[1] - below[1])
            tokens = int(min(max(guess // STEP * STEP, below[0] // STEP * STEP + STEP), above[0] - 1))
            made = self.packs(tokens)
            one = self.plan_of(tokens, self.moment(made[min(index, len(made) - 1)]), available)
            if one.fits:
                below = (tokens, one.total)
                if above[0] - tokens > STEP:  # a straight line is nearly right: look just above it
                    probe = tokens + STEP
                    again = self.packs(probe)
                    two = self.plan_of(probe, self.moment(again[min(index, len(again) - 1)]), available)
                    below, above = ((probe, two.total), above) if two.fits else (below, (probe, two.total))
            else:
                above = (tokens, one.total)
        tokens = below[0]
        while not (plan := self.at(tokens, available=available)).fits and tokens - STEP >= need:
            tokens -= STEP
        return plan


def _even(tokens: int, n: int) -> list[int]:
    return [tokens // n + (i < tokens % n) for i in range(n)]


def _pair(tokens: int, prompt: int) -> tuple[int, list[int]]:
    """A prompt and two completions of `tokens` in all."""
    prompt = max(1, prompt)
    rest = max(2, tokens - prompt)
    return prompt, [rest - rest // 2, rest // 2]
