"""A card: how much memory it has and what it can compute, named as a person does.

Memory is what `nvidia-smi` says of a card, compute capability what NVIDIA's list says
(https://developer.nvidia.com/cuda-gpus). A process sees somewhat less than that (T4: 15,110 of 15,360 MiB): `VISIBLE` of
it is planned for. What a desktop takes is not known here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .memory import CONTEXT

VISIBLE = 0.98  # of what nvidia-smi says, for a process to use


@dataclass(frozen=True)
class Card:
    mib: int  # in all, as nvidia-smi says
    capability: tuple[int, int]

    @property
    def memory(self) -> int:
        """Bytes that a process may use where nothing else runs."""
        return int(VISIBLE * self.mib * 2**20)

    @property
    def bf16(self) -> bool:
        return self.capability >= (8, 0)


CARDS = {
    "T4": Card(15360, (7, 5)),
    "3060": Card(12288, (8, 6)),
    "3090": Card(24576, (8, 6)),
    "4060": Card(8188, (8, 9)),
    "4070": Card(12282, (8, 9)),
    "4080": Card(16376, (8, 9)),
    "4090": Card(24564, (8, 9)),
    "5090": Card(32607, (12, 0)),
    "A10": Card(23028, (8, 6)),
    "L4": Card(23034, (8, 9)),
    "A100": Card(81920, (8, 0)),
    "A100-40": Card(40960, (8, 0)),
    "H100": Card(81559, (9, 0)),
}


def card_of(name: str) -> Card:
    """`4090`, `RTX 4090`, `a100-40` -> the card; raises `ConfigError` that lists the known ones."""
    key = re.sub(r"nvidia|geforce|tesla|rtx|\s", "", name, flags=re.IGNORECASE).upper()
    if key not in CARDS:
        raise ConfigError(
            f"--gpu {name} is no card that lorat knows: {', '.join(CARDS)}. Name one of those, or give --gpu-memory."
        )
    return CARDS[key]


UNITS = {"": 2**30, "G": 2**30, "GIB": 2**30, "GB": 10**9, "M": 2**20, "MIB": 2**20, "MB": 10**6}


def bytes_of(text: str) -> int:
    """`12GiB`, `12` (GiB), `12GB`, `11264MiB`, or `auto` (what the card has free) -> bytes; raises `ConfigError`."""
    if text.strip().lower() == "auto":
        if not torch.cuda.is_available():
            raise ConfigError("gpu_memory=auto asks the GPU, and none is here; set an amount, such as 12GiB.")
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() + CONTEXT  # a plan counts the context, which is there already
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]?(?:iB|B)?)\s*", text, re.IGNORECASE)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise ConfigError(f"gpu_memory={text} is no amount of memory; set 12GiB, say, or auto.")
    return int(float(found[1]) * UNITS[found[2].upper()])
