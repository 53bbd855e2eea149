"""A card: how much memory it has, named as a person does."""

from __future__ import annotations

import re

import torch

from ..errors import ConfigError
from .memory import CONTEXT

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
