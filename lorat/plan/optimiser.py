"""What an optimiser will hold beside the policy's tensors: states that stay, and what its step takes for a moment.

torch's optimisers are run for one step without values and read off; bitsandbytes' 8-bit and paged states are laid out as
its `init_state` makes them. Any other is taken for Adam's two float32 states, and the answer says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from .blueprint import empty
from .dry_pass import Ledger

BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit states
PAGED = 100_000  # numbers from which a paged optimiser puts a tensor's state into managed memory
QMAP = 256 * 4  # bytes of a table of 8-bit values, one for each state
# What transformers reads beside the name; no number of these changes a byte.
NUMBERS = dict(learning_rate=1e-5, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)


@dataclass(frozen=True)
class OptimiserMemory:
    gpu: int  # bytes that stay on the GPU
    host: int = 0  # in managed memory: moved to the host when the GPU is full
    step: int = 0  # on the GPU during the step alone
    note: str = ""


def optimiser_memory(name: str, policy: Sequence[Tensor], args: str | None = None) -> OptimiserMemory:
    """Of transformers' optimiser `name` over the policy's tensors, of which shapes and types alone are read.

    `args`: transformers' `optim_args`.
    """
    try:
        settings: Any = SimpleNamespace(optim=name, optim_args=args, optim_target_modules=None, **NUMBERS)
        cls, options = Trainer.get_optimizer_cls_and_kwargs(settings)
        if cls.__module__.startswith("torch.optim"):
            return _run(cls, options, policy, name)
        if cls.__module__.startswith("bitsandbytes"):
            return _bitsandbytes(cls, options, policy, name)
    except (ImportError, ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError):
        pass
    return OptimiserMemory(8 * sum(p.numel() for p in policy), note=f"{name}: taken for two float32 states")


def _run(cls: Any, options: dict[str, Any], policy: Sequence[Tensor], name: str) -> OptimiserMemory:
    accepted = inspect.signature(cls).parameters
    if "foreach" in accepted and not options.get("fused") and "foreach" not in options:
        options = options | {"foreach": True}  # as torch chooses on a GPU
    ledger = Ledger()
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(empty(*p.shape, dtype=p.dtype)) for p in policy]
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimiser = cls(parameters, **options)
        with ledger:
            ledger.own([*parameters, *(p.grad for p in parameters if p.grad is not None)])
            optimiser.step()
        on_host = not options.get("fused")  # 0-dim step counts
        states = [t for s in optimiser.state.values() for t in s.values() if isinstance(t, Tensor)]
        held = sum(t.untyped_storage().nbytes() for t in states if t.dim() or not on_host)
    kept = ledger.peak()[0] - sum(e.size for e in ledger.alive(len(ledger.events)).values())
    return OptimiserMemory(held, step=max(0, kept), note=name)


def _bitsandbytes(cls: Any, options: dict[str, Any], policy: Sequence[Tensor], name: str) -> OptimiserMemory:
    optimiser = cls([torch.nn.Parameter(torch.empty(1))], **options)
    states = {"Optimizer2State": 2, "Optimizer1State": 1}
    number = next(n for c in cls.__mro__ for base, n in states.items() if c.__name__ == base)
    eight, paged, least = optimiser.args.optim_bits == 8, optimiser.is_paged, optimiser.args.min_8bit_size
    gpu = host = 0
    for p in policy:
        n = p.numel()
        small = not eight or n < least
        size = number * n * (4 if small else 1)
        if paged and n >= PAGED:
            host += size
        else:
            gpu += size
        gpu += 0 if small else number * 4 * -(-n // BLOCK)
    gpu += number * QMAP if eight and any(p.numel() >= least for p in policy) else 0
    return OptimiserMemory(gpu, host, note=name)
