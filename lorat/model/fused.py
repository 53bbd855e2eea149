"""PEFT's LoRA layers, computed as one operation each, so that no float32 copy of a hidden state is made or kept.

Under autocast a norm widens to float32, bitsandbytes answers in the type it was asked in, and PEFT adds to that: the
hidden states of a bf16 model end up in float32. With the fused layer the model computes in the type it was loaded
in, as it does when it generates, and autocast is not needed; adapters stay float32 and are cast layer by layer.

A layer keeps PEFT's own forward for what the operation leaves out (dropout, DoRA, merged or mixed adapters, a trained
bias); `fuse_` says whether any did. Replaced on the layers of one model, by attribute; PEFT's code is untouched.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lorat_kernels.lora_linear import lora_linear
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

try:
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
except ImportError:  # bitsandbytes is not there
    LoraLinear4bit = None  # type: ignore[assignment, misc]


def fuse_(model: nn.Module) -> bool:
    """Fuse every LoRA layer of `model` that can be; True if none is left that needs autocast for its types."""
    whole = True
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save, trainable tokens: float32 beside bf16
            whole = False
        if not isinstance(module, LoraLayer):
            continue
        if "forward" in module.__dict__:
            continue
        if fits(module):
            module.forward = types.MethodType(_forward(module.forward), module)
        else:
            whole = False
    return whole


def fits(layer: Any) -> bool:
    """Whether a LoRA layer and every adapter on it are plain, on a plain or 4-bit linear layer."""
    if type(layer) not in (LoraLinear, LoraLinear4bit) or getattr(layer, "fan_in_fan_out", False):
        return False
    base = layer.base_layer
    packed = getattr(base.weight, "quant_state", None) is not None
    if type(base) is not nn.Linear and not (packed and type(base).__name__ == "Linear4bit"):
        return False
    trained = any(p.requires_grad for p in base.parameters())
    return not trained and all(plain(layer, name) for name in layer.lora_A)


def plain(layer: Any, name: str) -> bool:
    """Whether one adapter of a layer is `B A` and nothing else; cheap, since every forward pass asks."""
    dropout = layer.lora_dropout[name]
    return (
        name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and not (isinstance(dropout, nn.Dropout) and dropout.p > 0)
    )


def computing(
    model: nn.Module, bf16: bool, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    """What to compute in: `autocast`, or nothing where a bf16 model, fused here, does it by itself."""
    by_itself = fuse_(model) and bf16 and native(model, torch.bfloat16)
    return nullcontext if by_itself else autocast


def _forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The `forward` of a fused layer; it calls `original` for what the operation leaves out."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x`: (…, in) -> (…, out) in the computing type."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base, one = self.base_layer, not self.disable_adapters and len(names) == 1 and plain(self, names[0])
        if not one or self.merged or args or kwargs or base.weight.requires_grad:
            return original(x, *args, **kwargs)
        (name,) = names
        state = getattr(base.weight, "quant_state", None)
        return lora_linear(
            x,
            base.weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            scale=self.scaling[name],
            bias=base.bias,
            state=state,
            dtype=compute_type(base, x),
        )

    return forward


def native(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a fused `model` computes in `dtype` by itself: all that is frozen and not packed is held in it."""
    frozen = (p for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    adapters = {
        id(p) for m in model.modules() if isinstance(m, LoraLayer) for n, p in m.named_parameters() if "lora_" in n
    }
    return all(p.dtype == dtype for p in frozen if id(p) not in adapters)


def compute_type(base: Any, x: Tensor) -> torch.dtype:
    """What a layer computes `x` (…, in) in: autocast's type where it is on, else its own (4-bit: as it dequantises)."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if getattr(base.weight, "quant_state", None) is not None:
        return base.compute_dtype or x.dtype
    return base.weight.dtype
