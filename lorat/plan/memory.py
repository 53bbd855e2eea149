"""Will it fit: the peak of GPU memory of a run, item by item, before anything is downloaded or loaded.

What stays (weights, adapters, gradients, optimiser) is counted on `blueprint.draw`'s model, exactly. What a pack takes is
read off a forward and backward pass without values (`simulation.py`). Two things are assumed, and said so in the plan:
what the CUDA driver takes for itself (`CONTEXT`), and what the allocator loses between blocks (`FRAGMENTATION`).

Left out: several GPUs (each needs the same), loading (its peak is lower than training's: one layer in 16 bits at a time),
evaluation (no gradient: less than training), desktops and other programs on the same card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lorat_kernels.plans import Plan as KernelPlan
from lorat_kernels.plans import plan_for

from ..errors import ModelError, first_line
from ..reference import POLICY, adapter_parameters
from ..reference.lowrank import WORKSPACE
from .blueprint import draw, stored
from .optimiser_memory import optimiser_memory
from .simulation import Simulation, Step

if TYPE_CHECKING:
    from ..settings.config import TrustRegionConfig

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
    """Predicts the peak of one configuration for packs of any size. Raises `ModelError` for a model without layers."""

    def __init__(
        self, config: TrustRegionConfig, model_config: Any, context: int = CONTEXT, capability: Any = None
    ) -> None:
        config = config.resolved()
        self.config, self.context = config, context
        if capability is None:
            capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else KERNEL
        kernel: KernelPlan | None = plan_for(capability)
        self.cublas = CUBLAS if capability < (9, 0) else 2 * 32 * 2**20
        model = draw(config, model_config)
        bytes_of: Counter[str] = Counter()
        for what, t in stored(model):
            bytes_of[what] += t.untyped_storage().nbytes()
        policy = list(adapter_parameters(model, POLICY).values())
        self.optimiser = optimiser_memory(config, policy)
        gradients = sum(p.numel() * p.element_size() for p in policy)
        rank = config.ref_rank or config.lora_r
        self.static = [
            Item("4-bit weights", bytes_of["weights"], "model"),
            Item("quantisation state", bytes_of["state"], "model"),
            Item("embeddings", bytes_of["embeddings"], "model", "the head's too" if not bytes_of["head"] else ""),
            Item("head", bytes_of["head"], "model"),
            Item("norms, biases, unquantised layers", bytes_of["other"], "model"),
            Item("policy adapter", bytes_of["policy"], "training", f"float32, rank {config.lora_r}"),
            Item("reference adapter", bytes_of["reference"], "training", f"float32, rank {rank}"),
            Item("gradients", gradients, "training", "float32, of the policy"),
            Item("optimiser state", self.optimiser.gpu, "training", self.optimiser.note),
        ]
        text = model_config.get_text_config()
        self._flash = bool(config.bf16 or config.fp16) and not getattr(text, "attn_logit_softcapping", None)
        self._steps: dict[Any, Step] = {}
        try:
            self.simulation = Simulation(config, model, kernel)
        except NotImplementedError as error:
            raise ModelError(
                f"{model_config.model_type}: {first_line(error)}; its memory cannot be predicted."
            ) from error

    def step(self, groups: Groups) -> Step:
        """A pack's own memory; `ModelError` where the model's code cannot run without values."""
        key = tuple((p, tuple(cs)) for p, cs in groups)
        if key not in self._steps:
            try:
                self._steps[key] = self.simulation.step(groups)
            except Exception as error:
                name = type(self.simulation.model.get_base_model()).__name__
                raise ModelError(
                    f"{name} cannot be run without values ({type(error).__name__}: {first_line(error)}), so its memory "
                    "cannot be predicted. Try a small max_tokens_per_pack; the run rehearses its fullest pack first."
                ) from error
        return self._steps[key]

    @property
    def longest(self) -> int | None:
        """Tokens of the longest example that `max_length` allows: a pair shares at least one prompt token."""
        length = self.config.max_length
        if length is None:
            return None
        if self.config.method == "kto":
            return length
        return 2 * length - 1 if self.simulation.shared else 2 * length

    def packs(self, tokens: int) -> list[Groups]:
        """Packs of `tokens` tokens that take the most: all completions or nearly all prompt, many pairs or few."""
        length = self.config.max_length or tokens
        most = max(1, min(self.config.per_device_train_batch_size, tokens // 3))
        least = min(most, max(1, -(-tokens // (2 * length - 1))))
        long_prompts = [_pair(size, min(size - 2, length - 1)) for size in _even(tokens, most)]
        counts = {most} if self._flash else {most, least}  # FlashAttention's buffers grow with the number of pairs
        out: list[Groups] = [[_pair(size, 1) for size in _even(tokens, n)] for n in sorted(counts)]
        return [*out, long_prompts]

    def at(self, tokens: int, groups: Groups | None = None, available: int | None = None) -> Plan:
        """The plan for packs of `tokens` tokens: of the worst make-up of a pack, or of `groups` as they are."""
        steps = [self.step(g) for g in ([groups] if groups is not None else self.packs(tokens))]
        return self.plan_of(tokens, max(steps, key=lambda s: s.total), available)

    def plan_of(self, tokens: int, step: Step, available: int | None) -> Plan:
        """The plan where a pack takes what `step` says."""
        kept = "inputs of the layers" if self.config.checkpointing else "all layers' activations"
        kept += ", in host memory" if self.simulation.offload else ""
        moment = [
            Item(f"activations kept ({kept})", step.kept, "pack"),
            Item("one layer at work", step.work, "pack", "recomputed activations and gradients"),
            Item("attention", step.attention, "pack", "gathered keys and values, FlashAttention's buffers"),
            Item("dequantised weight", step.dequantised, "pack", "the largest product's, in 16 bits"),
            Item("log-probs", step.logprobs, "pack", "chunks of the head, and their gradient"),
        ]
        blend = self.config.sync in ("soft", "adaptive") and self.config.sync_space == "product"
        factors = 2 * sum(i.bytes for i in self.static if i.name.endswith("adapter"))  # in float64
        blended = 3 * min(WORKSPACE, factors) if blend else 0  # factors, their products, and the result
        for name, size in (("optimiser's step", self.optimiser.step), ("reference update", blended)):
            if size > sum(i.bytes for i in moment):
                moment = [Item(name, size, "pack", "temporaries, larger than a pack's")]
        lost = int(FRAGMENTATION * sum(i.bytes for i in moment))
        outside = [
            Item("fragmentation", lost, "outside", f"assumed: {FRAGMENTATION:.0%} of a pack's memory"),
            Item("CUDA context and kernels", self.context, "outside", "assumed"),
        ]
        items = [*self.static, *moment, Item("cuBLAS workspaces", self.cublas, "pack"), *outside]
        notes = []
        if not self.simulation.shared and self.config.prefix_sharing is not False:
            notes.append("this model cannot share prompts: each completion is a padded row of its own")
        if self.simulation.autocast:
            notes.append("this model computes under autocast, whose float32 copies are predicted less exactly")
        return Plan(
            tokens,
            [i for i in items if i.bytes],
            available,
            self.optimiser.host,
            self.longest,
            self.simulation.shared,
            notes,
        )

    def most(self) -> int:
        """Tokens beyond which packs do not grow: a pack lies within one device batch."""
        length = self.config.max_length or 2048
        return self.config.per_device_train_batch_size * (2 * length - self.simulation.shared)


def _even(tokens: int, n: int) -> list[int]:
    return [tokens // n + (i < tokens % n) for i in range(n)]


def _pair(tokens: int, prompt: int) -> tuple[int, list[int]]:
    """A prompt and two completions of `tokens` in all."""
    prompt = max(1, prompt)
    rest = max(2, tokens - prompt)
    return prompt, [rest - rest // 2, rest // 2]
