"""lorat's own forward and backward pass of a pack, run without values, and the memory that it would take.

`policy_and_reference` on the model that `blueprint.draw` made, with autograd, activation checkpointing, fused LoRA layers
and whatever the architecture's code does: what is kept, recomputed and let go is read off, not modelled. Of layers that
are alike two are run and the rest counted. `stand_ins.py` allocates what an operation takes inside itself on a GPU.

Left out: what cuBLAS and Triton hold for themselves, the loss (a few numbers a pair), several GPUs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lorat_kernels.plans import Plan as KernelPlan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model.fused import fuse_, native
from ..model.models import Head, Models, backbone
from ..packs import attention
from ..packs.packing import Group, Pack, pad_rows, share_prompts
from ..settings.config import CHECKPOINTING
from .blueprint import quantisation_state
from .ledger import Ledger, empty
from .stand_ins import LikeCuda, PlannedHead, attention_of

if TYPE_CHECKING:
    from peft import PeftModel

    from ..settings.config import TrustRegionConfig


@dataclass
class Step:
    """Bytes of the fullest moment of a pack's forward and backward pass, by what they are for."""

    kept: int = 0  # activations that the backward waits for (with checkpointing: the inputs of the layers)
    work: int = 0  # of the one layer at work: recomputed activations, gradients on their way
    attention: int = 0  # gathered keys and values, FlashAttention's own
    dequantised: int = 0  # a 4-bit weight, spread out for one product
    logprobs: int = 0  # the head's chunks, and the gradient that the kernel makes in the forward
    forward: int = 0  # kept when the forward pass ends, which may not be the fullest moment
    by_layer: list[int] = field(default_factory=list)  # kept by each layer that was run

    @property
    def total(self) -> int:
        return self.kept + self.work + self.attention + self.dequantised + self.logprobs


class Simulation:
    """A model to run packs through, as often as wanted. `model`: drawn on the meta device; it is used up.

    Raises whatever the architecture's own code raises where it cannot run without values.
    """

    def __init__(self, config: TrustRegionConfig, model: PeftModel, kernel: KernelPlan | None) -> None:
        self.config, self.model, self.kernel = config, model, kernel
        fused = fuse_(model)
        half = torch.bfloat16 if config.bf16 else torch.float16
        self.autocast = bool(config.bf16 or config.fp16) and not (config.bf16 and fused and native(model, half))
        self._half = half
        self.offload = False
        if config.checkpointing:
            how = dict(getattr(config, f"{CHECKPOINTING}_kwargs") or {})
            self.offload = bool(how.get("offload"))
            every = {"every_n_layers": how["every_n_layers"]} if "every_n_layers" in how else {}
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False}, **every)
            model.enable_input_require_grads()
        self.layers, self.times = _shorten_(model, first=not config.checkpointing)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            _imagine_(model)
        base: Any = model.get_base_model()
        self.shared = config.prefix_sharing is not False and attention.install(base)
        model.train()

    def step(self, groups: Sequence[tuple[int, Sequence[int]]]) -> Step:
        """Memory of one pack of `groups`, each a prompt's tokens and those of its completions."""
        try:
            return self._step(groups)
        except NotImplementedError:  # this attention cannot share prompts
            if not self.shared:
                raise
            self.shared = False
            return self._step(groups)

    def _step(self, groups: Sequence[tuple[int, Sequence[int]]]) -> Step:
        ids: list[Group] = [([0] * p, [[0] * c for c in cs]) for p, cs in groups]
        pack = share_prompts(ids) if self.shared else pad_rows(ids, 0)
        ledger = Ledger()
        head = PlannedHead.like(Head.of(self.model), ledger, self.kernel)
        entered: list[int] = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_: entered.append(len(ledger.events))) for layer in self.layers
        ]
        hooks.append(backbone(self.model).register_forward_hook(lambda *_: ledger.mark("top")))
        try:
            with self.mode, attention_of(ledger), ledger, self._types():
                ledger.own(_tensors(self.model))
                moved = _imagined(pack)
                out = Models(self.model, head)(moved)
                ledger.mark("forward")
                out.logratios.sum().backward()
                del out
                for p in self.model.parameters():
                    p.grad = None
        finally:
            for hook in hooks:
                hook.remove()
        return self._read(ledger, entered[len(self.layers) : 2 * len(self.layers)])

    @contextlib.contextmanager
    def _types(self) -> Iterator[None]:
        if not self.autocast:
            yield
            return
        with torch.autocast("cpu", self._half), LikeCuda():
            yield

    def _read(self, ledger: Ledger, entered: list[int]) -> Step:
        """The peak, once the layers that were not run are added to what is kept."""
        places = [place for name, place in ledger.marks if name == "top"]
        reference, top = places[0], places[1]
        forward = next(place for name, place in ledger.marks if name == "forward")
        kept = ledger.alive(forward)
        bounds = [*entered, top]
        held = [{k: e.size for k, e in ledger.alive(at).items() if k in kept} for at in bounds]
        by_layer = [sum(after.values()) - sum(before.values()) for before, after in itertools.pairwise(held)]
        more = sum(size * (times - 1) for size, times in zip(by_layer, self.times))
        if self.offload:  # what checkpointed layers keep is in host memory, but for the one at work
            hosted = [size * self._checkpointed(layer) for size, layer in zip(by_layer, self.layers)]
            more -= sum(size * times for size, times in zip(hosted, self.times)) - max(hosted)
        before, after = ledger.peak(0, reference), ledger.peak(reference)
        most, at = (after[0] + more, after[1]) if after[0] + more >= before[0] else before
        extra = more if most == after[0] + more else 0
        step = Step(by_layer=by_layer, forward=sum(e.size for e in kept.values()) + more)
        for key, event in ledger.alive(at).items():
            what = event.what if event.what == "logprobs" or key not in kept else "kept"
            setattr(step, what, getattr(step, what) + event.size)
        step.kept += extra
        return step

    @staticmethod
    def _checkpointed(layer: nn.Module) -> bool:
        return bool(getattr(layer, "gradient_checkpointing", False))


def _shorten_(model: PeftModel, first: bool) -> tuple[list[nn.Module], list[int]]:
    """Leave two layers of each kind; returns them, and for how many of the whole model each of them stands.

    `first`: the first layer is a kind of its own: its input needs no gradient, so that it keeps less than the others.
    """
    base: Any = model.get_base_model()
    n = base.config.get_text_config().num_hidden_layers
    lists = [m for m in backbone(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not lists:
        raise NotImplementedError(f"no list of {n} layers was found in {type(base).__name__}")
    layers = lists[0]
    kinds = [(_kind(layer), first and i == 0) for i, layer in enumerate(layers)]
    left, chosen = Counter[Any](), []
    for i in reversed(range(n)):
        if left[kinds[i]] < 2:
            left[kinds[i]] += 1
            chosen.append(i)
    chosen.sort()
    counts, seen = Counter(kinds), Counter[Any]()
    times = []
    for i in chosen:  # the last of a kind stands for itself, the one before for all others
        seen[kinds[i]] += 1
        times.append(counts[kinds[i]] - 1 if seen[kinds[i]] == 1 and left[kinds[i]] == 2 else 1)
    kept = [layers[i] for i in chosen]
    layers._modules = {str(i): layer for i, layer in enumerate(kept)}
    return kept, times


def _kind(layer: nn.Module) -> tuple:
    """What layers have in common that take the same memory: their modules, parameters and checkpointing."""
    modules = tuple(
        (name, type(m).__name__, getattr(m, "gradient_checkpointing", None)) for name, m in layer.named_modules()
    )
    return modules + tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for t in (*model.parameters(), *model.buffers()):
        yield t
        yield from quantisation_state(t)


def _imagine_(model: nn.Module) -> None:
    """Put a fake tensor in the place of each meta tensor; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    like: Any = lambda t: None if t is None else empty(*t.shape, dtype=t.dtype)  # noqa: E731
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                new: Any = nn.Parameter(like(p), requires_grad=p.requires_grad)
                state, scales = getattr(p, "quant_state", None), getattr(p, "SCB", None)
                if state is not None:
                    for part in (state, state.state2):
                        if part is not None:
                            part.absmax, part.code = like(part.absmax), like(part.code)
                    state.offset = like(state.offset)
                    new.quant_state, new.blocksize, new.compress_statistics = state, state.blocksize, state.nested
                    new.quant_type, new.bnb_quantized = state.quant_type, True
                if scales is not None:
                    new.SCB = like(scales)
                made[id(p)] = new
            module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = like(buffer)


def _imagined(pack: Pack) -> Pack:
    def like(t: Any) -> Any:
        return empty(*t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t

    moved = {k: like(v) for k, v in vars(pack).items()}
    if pack.layout is not None:
        parts = {k: like(v) for k, v in vars(pack.layout).items() if k != "again"}
        again = [(like(rows), like(places)) for rows, places in pack.layout.again]
        moved["layout"] = type(pack.layout)(**parts, again=again)
    return Pack(**moved)
