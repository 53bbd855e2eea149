"""What a computation would hold in memory, moment by moment, without computing it.

Under torch's `FakeTensorMode` every operation makes tensors with shapes and storages, and no values. A `Ledger` beneath
it writes down when each storage comes and goes, autograd's own saved tensors and gradients included; replayed, the list
gives the peak and what was alive in it. Storages are rounded up to 512 bytes, as CUDA's caching allocator does. What an
operation allocates inside itself and gives back is not seen: a stand-in for it allocates the same (`stand_ins.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values, where fake ones are made."""
    return torch.empty(shape, dtype=dtype, device="cpu")
