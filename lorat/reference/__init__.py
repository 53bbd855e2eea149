"""The moving reference: move one adapter of a PEFT model toward another, in place.

This is what lorat is about, and it needs torch alone: any PEFT model with two adapters on the same targets will do.
Here is the public door. `blending` copies, blends, averages and compares adapters over all their layers at once; `rules`
says when the reference moves; `pairing` finds an adapter's tensors; `lowrank` does the algebra.

    from lorat.reference import Soft
    rule = Soft(alpha=0.6, every=64)
    ...                                # an optimiser step on adapter "default"
    rule.after_step_(model, step)      # moves adapter "ref"

Left out: when a step ends (the caller knows) and any collective (equal inputs give equal results on every rank).
The mathematics, the cost and the choice of space are in docs/reference.md (Gorbatovski et al., arXiv 2404.09656).
"""

from __future__ import annotations

from .blending import SPACES, Space, blend_, copy_, distance, extrapolate_, interpolate_, relative_distance, soup_
from .pairing import POLICY, REFERENCE, adapter_parameters, paired, snapshot
from .rules import PRESETS, Adaptive, Frozen, Hard, Soft, UpdateRule, preset

__all__ = [
    "POLICY",
    "PRESETS",
    "REFERENCE",
    "SPACES",
    "Adaptive",
    "Frozen",
    "Hard",
    "Soft",
    "Space",
    "UpdateRule",
    "adapter_parameters",
    "blend_",
    "copy_",
    "distance",
    "extrapolate_",
    "interpolate_",
    "paired",
    "preset",
    "relative_distance",
    "snapshot",
    "soup_",
]
