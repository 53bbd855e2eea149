"""What a training step takes memory for: all that a plan needs of a run's settings.

A plan asks nothing of how long a run is, what it reads or where it writes, so that it can be made of a few values, and
changed by one (`dataclasses.replace`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig

from ..model.base import Base


@dataclass(frozen=True)
class Workload:
    """One device's share of a training step.

    `half`: what is computed in, bfloat16 or float16; None is float32. `unit`: what an example holds, a pair of
    completions or a single one. `checkpointing_kwargs`: as transformers takes them (`offload`, `every_n_layers`).
    """

    base: Base
    adapter: LoraConfig
    ref_rank: int | None = None  # None: the policy's
    half: torch.dtype | None = torch.bfloat16
    checkpointing: bool = True
    checkpointing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpointing_setting: str = "activation_checkpointing"  # what this version of transformers calls it
    optimiser: str = "adamw_torch_fused"  # transformers' name of it
    optimiser_args: str | None = None  # key=value,…
    unit: Literal["pair", "single"] = "pair"
    examples: int = 8  # in a device batch: a pack holds no more
    max_length: int | None = 1024  # tokens of a prompt and a completion
    prefix_sharing: bool | None = None  # None: wherever the model can
    product_blends: bool = False  # whether updates of the reference mix what the adapters do

    @property
    def reference_rank(self) -> int:
        return self.ref_rank or self.adapter.r

    @property
    def rows(self) -> int:
        """Completions of an example."""
        return 2 if self.unit == "pair" else 1
