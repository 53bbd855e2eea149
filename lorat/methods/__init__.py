"""What DPO, IPO, KTO and others ask of an example, each a value."""

from __future__ import annotations

from .kto import KTO
from .method import Method, Outcome
from .pairs import DPO, IPO, APOZero, HyPO

METHODS: dict[str, type[Method]] = {m.name: m for m in (DPO, IPO, KTO, APOZero, HyPO)}

__all__ = ["DPO", "IPO", "KTO", "METHODS", "APOZero", "HyPO", "Method", "Outcome"]
