"""A forward and backward pass of a pack without values, and the memory that it would take on a GPU.

`Models` on the model that `blueprint.draw` made, with autograd, activation checkpointing, fused LoRA layers
and whatever the architecture's code does, under torch's `FakeTensorMode`, in which every operation makes tensors with
shapes and storages, and no values. A `Ledger` beneath it writes down when each storage comes and goes: what is kept,
recomputed and let go is read off, not modelled. Storages are rounded up to 512 bytes, as CUDA's caching allocator does.
Of layers that are alike two are run and the rest counted.

What an operation allocates inside itself and gives back is not seen, and what differs on a GPU is not what runs here:
stand-ins allocate the same. They are FlashAttention 2 (a backend of packed attention), the kernel of `linear_logprob`
(by its own table and budget), and what CUDA's autocast widens to float32; sizes follow the sources of those operations.

Left out: what cuBLAS and Triton hold for themselves, the loss (a few numbers a pair), several GPUs. One noun, hence one
file of more than 400 lines: neither the ledger nor the stand-ins mean anything without the pass.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lorat_kernels.launch import chunk_rows_of
from lorat_kernels.linear_logprob import BUDGET
from lorat_kernels.plans import Plan as KernelPlan
from lorat_kernels.torch_path import CHUNK_ROWS, VOCAB_BLOCK
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..model.fused import fuse_, native
from ..model.models import Models, backbone
from ..packs import attention
from ..packs.attention import hindrance, install
from ..packs.packing import Group, Layout, Pack, pad_rows, share_prompts
from .blueprint import empty, imagine_, imagined, tensors
from .workload import Workload

if TYPE_CHECKING:
    from peft import PeftModel

HALVES = (torch.bfloat16, torch.float16)
GRAIN = 512  # bytes: what CUDA's caching allocator rounds to
OPERATIONS = {  # what an operation's results are for, whoever calls it
    "bitsandbytes::dequantize_4bit": "dequantised",
    "bitsandbytes::dequantize_blockwise": "dequantised",
}


class Event(NamedTuple):
    """A storage that comes (`size` > 0) or goes."""

    key: int
    size: int
    what: str


class Ledger(TorchDispatchMode):
    """Records storages made inside `with`: `events`, and `marks`, which name places in that list."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.marks: list[tuple[str, int]] = []
        self._alive: dict[int, weakref.ref] = {}
        self._what = ["work"]
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        what = OPERATIONS.get(func.name().partition(".")[0], self._what[-1])
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t, what)
        return out

    def own(self, tensors: Any) -> None:
        """Leave out storages that were there before: they are counted elsewhere."""
        for t in tensors:
            storage = t.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Inside, new storages are for `what`."""
        self._what.append(what)
        try:
            yield
        finally:
            self._what.pop()

    def mark(self, name: str) -> None:
        self.marks.append((name, len(self.events)))

    def _note(self, t: Tensor, what: str) -> None:
        storage = t.untyped_storage()
        cdata = storage._cdata
        if (known := self._alive.get(cdata)) is not None and known() is not None:
            return
        size, key = -(-storage.nbytes() // GRAIN) * GRAIN, self._next
        self._next += 1
        self.events.append(Event(key, size, what))

        def gone(_: Any) -> None:
            self.events.append(Event(key, -size, what))
            self._alive.pop(cdata, None)

        self._alive[cdata] = weakref.ref(storage, gone)

    def alive(self, at: int) -> dict[int, Event]:
        """The storages that are there after the first `at` events."""
        there: dict[int, Event] = {}
        for event in self.events[:at]:
            if event.size >= 0:
                there[event.key] = event
            else:
                there.pop(event.key, None)
        return there

    def peak(self, start: int = 0, end: int | None = None) -> tuple[int, int]:
        """`(bytes, number of events until then)` at the fullest moment of `events[start:end]`."""
        total = sum(e.size for e in self.events[:start])
        most, at = total, start
        for i, event in enumerate(self.events[start:end], start):
            total += event.size
            if total > most:
                most, at = total, i + 1
        return most, at


@dataclass
class Moment:
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


class DryPass:
    """A model to run packs through, as often as wanted. `model`: drawn on the meta device; it is used up.

    `kernel`: the card's entry of the kernel's table, None where torch computes log-probs. `flash`: whether it has
    FlashAttention. Raises whatever the architecture's own code raises where it cannot run without values.
    """

    def __init__(self, workload: Workload, model: PeftModel, kernel: KernelPlan | None, flash: bool = True) -> None:
        self.model, self.kernel, self.flash = model, kernel, flash
        half = workload.half
        fused = fuse_(model)
        self.autocast = half is not None and not (half == torch.bfloat16 and fused and native(model, half))
        self._half = half
        self.offload = False
        if workload.checkpointing:
            how = workload.checkpointing_kwargs
            self.offload = bool(how.get("offload"))
            every = {"every_n_layers": how["every_n_layers"]} if "every_n_layers" in how else {}
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if self.autocast:  # modes are off in a backward pass, and with it where layers are recomputed
                options["context_fn"] = lambda: (nullcontext(), LikeCuda())
            model.gradient_checkpointing_enable(options, **every)
            model.enable_input_require_grads()
        self.layers, self.times = _shorten_(model, first=not workload.checkpointing)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            imagine_(model)
        base: Any = model.get_base_model()
        may = workload.prefix_sharing is not False and not hindrance(workload.base.attention)
        self.shared = may and install(base)
        model.train()

    def moment(self, groups: Sequence[tuple[int, Sequence[int]]]) -> Moment:
        """The fullest moment of one pack of `groups`, each a prompt's tokens and those of its completions."""
        try:
            return self._moment(groups)
        except NotImplementedError:  # this attention cannot share prompts
            if not self.shared:
                raise
            self.shared = False
            return self._moment(groups)

    def _moment(self, groups: Sequence[tuple[int, Sequence[int]]]) -> Moment:
        ids: list[Group] = [([0] * p, [[0] * c for c in cs]) for p, cs in groups]
        ledger = Ledger()
        pack = (share_prompts(ids) if self.shared else pad_rows(ids, 0)).through(_attention(ledger, self.flash))
        autocast = functools.partial(torch.autocast, "cpu", self._half, enabled=self.autocast)
        models = DryModels(self.model, autocast, ledger, self.kernel)
        entered: list[int] = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_: entered.append(len(ledger.events))) for layer in self.layers
        ]
        hooks.append(backbone(self.model).register_forward_hook(lambda *_: ledger.mark("top")))
        try:
            with self.mode, ledger, LikeCuda() if self.autocast else nullcontext():
                ledger.own(tensors(self.model))
                moved = imagined(pack)
                out = models(moved)
                ledger.mark("forward")
                out.logratios.sum().backward()
                del out, moved
                for p in self.model.parameters():
                    p.grad = None
        finally:
            for hook in hooks:
                hook.remove()
        return self._read(ledger, entered[len(self.layers) : 2 * len(self.layers)])

    def _read(self, ledger: Ledger, entered: list[int]) -> Moment:
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
        moment = Moment(by_layer=by_layer, forward=sum(e.size for e in kept.values()) + more)
        for key, event in ledger.alive(at).items():
            what = event.what if event.what == "logprobs" or key not in kept else "kept"
            setattr(moment, what, getattr(moment, what) + event.size)
        moment.kept += extra
        return moment

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


# What CUDA's autocast computes in float32 whatever comes in, by name; the CPU's leaves it in 16 bits (torch 2.13's
# lists, of which these occur in models). Of the second list the result alone is widened.
WIDENED = frozenset(
    "layer_norm rms_norm group_norm norm pow __pow__ __rpow__ rsqrt reciprocal exp log softplus logsumexp".split()
)
SUMMED = frozenset("softmax log_softmax sum cumsum prod".split())


class LikeCuda(TorchFunctionMode):
    """Where autocast is on, what CUDA's widens to float32 is widened."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in WIDENED:
                args, kwargs = tree_map(_widened, (args, kwargs))
            elif name in SUMMED and args and _widened(args[0]) is not args[0] and kwargs.get("dtype") is None:
                kwargs = kwargs | {"dtype": torch.float32}
        return func(*args, **kwargs)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALVES else x


def _attention(ledger: Ledger, flash: bool) -> Callable[..., Tensor]:
    """A backend of packed attention: FlashAttention's stand-in wherever a GPU that has it (`flash`) would run it."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
        if q.shape[1] != k.shape[1] and "enable_gqa" not in (attention._varlen_parameters() or {"enable_gqa"}):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return _Attention.apply(q, k, v, len(layout.queries), ledger)

    def choose(q: Tensor, v: Tensor, window: int | None) -> Callable[..., Tensor] | None:
        """As `attention.varlen_backend`."""
        if not flash or q.dtype not in HALVES or q.shape[-1] != v.shape[-1]:
            return None
        return varlen if q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 else None

    attend = functools.partial(attention.attend, varlen=choose)

    def backend(*args: Any) -> Tensor:
        with ledger.naming("attention"):
            return attend(*args)

    return backend


class _Attention(torch.autograd.Function):
    """FlashAttention 2 over S sequences: keeps q, k, v, the output (T, H, d) and a float32 number a query and head.

    Its backward sums dq in float32 over T + 128 S rows, and dk and dv for each query head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: int, ledger: Ledger) -> Tensor:
        out, lse = torch.empty(q.shape, dtype=q.dtype), empty(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sequences, ctx.ledger = sequences, ledger
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with ctx.ledger.naming("attention"):
            q, k, v, _, _ = ctx.saved_tensors
            rows = q.shape[0] + 128 * ctx.sequences
            held = [empty(rows, q.shape[1], q.shape[2]), empty(q.shape[1], rows)]
            if q.shape[1] != k.shape[1]:
                held += [empty(x.shape[0], q.shape[1], x.shape[2], dtype=x.dtype) for x in (k, v)]
            found = [empty(*x.shape, dtype=x.dtype) for x in (q, k, v)]
            del held
        return *found, None, None


class DryModels(Models):
    """`Models` whose log-probs come from the kernel's stand-in."""

    def __init__(self, model: PeftModel, autocast: Any, ledger: Ledger, kernel: KernelPlan | None) -> None:
        super().__init__(model, autocast=autocast)
        self.ledger, self.kernel = ledger, kernel

    def tokens(self, pack: Pack) -> Tensor:
        hidden = self.hidden(pack)
        with self.ledger.naming("logprobs"):
            return _LogProb.apply(hidden, self.head.weight, self.kernel, torch.is_grad_enabled(), self.ledger)


class _LogProb(torch.autograd.Function):
    """`linear_logprob` on a GPU: log-probs, with gradient (N, D) float32, and what its chunks take."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, kernel: Any, with_grad: bool, ledger: Ledger) -> Tensor:
        (rows, dim), ctx.dtype, ctx.ledger = hidden.shape, hidden.dtype, ledger
        out = empty(rows)
        ctx.save_for_backward(empty(rows if with_grad else 0, dim))
        empty(workspace(rows, dim, weight.shape[0], hidden.dtype, weight.dtype, with_grad, kernel), dtype=torch.uint8)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with ctx.ledger.naming("logprobs"):
            (grad,) = ctx.saved_tensors
            return empty(*grad.shape, dtype=ctx.dtype), None, None, None, None


def workspace(
    rows: int,
    dim: int,
    vocab: int,
    hidden: torch.dtype,
    weight: torch.dtype,
    with_grad: bool,
    kernel: KernelPlan | None,
) -> int:
    """Bytes that `linear_logprob` allocates for one chunk, beside its result and the gradient that it keeps.

    `kernel`: the card's entry of the kernel's table; None where torch computes (cards before sm_80).
    """
    if kernel is None:
        pieces = 0 if weight == torch.float32 else 4 * VOCAB_BLOCK * dim
        return 3 * 4 * min(rows, CHUNK_ROWS) * vocab + pieces
    padded = -(-vocab // 64) * 64
    split = 12 * dim if hidden == torch.float32 and weight != torch.float32 else 0
    if kernel.candidate == "cublas" and hidden == weight != torch.float32:
        return CHUNK_ROWS * (4 * padded + split)
    same = weight != torch.float32
    tile = (kernel.half if same else kernel.full).n
    step = chunk_rows_of(rows, dim, vocab, weight.itemsize, tile, with_grad, BUDGET)
    return step * (8 * -(-vocab // tile) + (weight.itemsize * padded if with_grad else 0) + split)
