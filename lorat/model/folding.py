"""A quantised model under an adapter made a plain one, a layer at a time.

The base is held in 4-bit and stays there: a decoder layer becomes wide only for as long as it computes, in a copy that
is dropped again, or for good when it is rounded to the type it is saved in. So the log-probs of the trained model, of the
merged one and of the rounded one cost one wide layer beside the weights. What is outside the layers
(embeddings, last norm, head) is wide throughout. The products are PEFT's own `merge`, on the layers that bitsandbytes
dequantises; each of those is compared with bitsandbytes' own product when it is made.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, first_line
from ..packs.logprobs import logprobs_of

PACKED = (bnb.nn.Params4bit, bnb.nn.Int8Params)
PRODUCT = 2e-2  # relative: bitsandbytes may multiply in bf16


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost `ModuleList`s by name, each once: what is made plain one after the other."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # names each module once
        parent, _, _ = name.rpartition(".")
        inside = any(name.startswith(f"{layer}.") for layer in found)
        if not inside and parent and isinstance(model.get_submodule(parent), nn.ModuleList):
            found[name] = module
    return found


def outside(model: nn.Module, layers: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Modules of `model` that are in none of `layers`, with their names."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    return [(name, m) for name, m in model.named_modules() if id(m) not in inside]


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this module's own weight, in 4 or 8 bits; PEFT's layers show that of the one under them."""
    return isinstance(module._parameters.get("weight"), PACKED)


@torch.no_grad()
def dequantised(module: Any) -> nn.Module:
    """A float32 `Linear` or `Embedding` that computes what bitsandbytes' `module` does, at the precision of its weights.

    4-bit weights are first rounded to the type that they were quantised from, as they are in training. Raises
    `ModelError` where the product differs from bitsandbytes' own by more than `PRODUCT`.
    """
    if isinstance(module, nn.Embedding):
        rows = [module(ids) for ids in torch.arange(module.num_embeddings, device=module.weight.device).split(8192)]
        return nn.Embedding.from_pretrained(torch.cat([r.float() for r in rows]), freeze=True)
    if isinstance(module.weight, bnb.nn.Params4bit):
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(module)
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, scale)
    bias = module.bias
    with torch.device("meta"):
        plain = nn.Linear(module.in_features, module.out_features, bias is not None)
    made: Any = plain
    made.weight = nn.Parameter(weight.float(), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
    made.source_cls = getattr(module, "source_cls", nn.Linear)
    x = torch.randn(1, 4, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device)
    theirs, ours = module(x).float(), plain(x)
    if not (theirs - ours).norm() <= PRODUCT * ours.norm() + 1e-30:
        raise ModelError(
            f"a {type(module).__name__} of {module.in_features} by {module.out_features} dequantises to another product than "
            f"bitsandbytes computes with it (relative difference {float((theirs - ours).norm() / ours.norm()):.2g}). This is "
            "a fault of the installed versions; load the adapter with PEFT on the quantised base instead of merging it."
        )
    return plain


def dequantise_(modules: Iterable[nn.Module]) -> None:
    """Replace every child that bitsandbytes holds by a plain float32 one, and make everything else float32."""
    for parent in list(modules):
        for name, child in list(parent.named_children()):
            if is_packed(child):
                setattr(parent, name, dequantised(child))
        for tensor in (*parent.parameters(recurse=False), *parent.buffers(recurse=False)):
            if tensor.is_floating_point() and not isinstance(tensor, PACKED):
                tensor.data = tensor.data.float()


def widen_(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Hold what is plain and floating in a wider type, to compute in it."""
    for module in list(modules):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and not isinstance(tensor, PACKED):
                tensor.data = tensor.data.to(dtype)


def fold_(modules: Iterable[nn.Module]) -> None:
    """Add the active adapter to the layers under it, by PEFT's arithmetic; they must be plain by now."""
    for module in list(modules):
        if isinstance(module, BaseTunerLayer) and not module.merged:
            # the classes for 4 and 8 bits would quantise the sum again
            packs = type(module).__module__ == "peft.tuners.lora.bnb"
            try:
                merge: Any = LoraLinear.merge if packs else type(module).merge
                merge(module, safe_merge=True)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ModelError(
                    f"PEFT cannot fold this adapter into a {type(module).__name__} layer ({first_line(error)}); load it with "
                    "PeftModel.from_pretrained, without merging."
                ) from error


def round_(modules: Iterable[tuple[str, nn.Module]], dtype: torch.dtype, kept: Callable[[str], bool]) -> None:
    """Round to `dtype` what a file of the model holds; `kept(name)`: tensors that stay in float32."""
    for prefix, module in list(modules):
        tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        tensors |= {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if kept(f"{prefix}.{name}") else dtype)


@contextmanager
def each_layer(layers: Iterable[nn.Module], prepare: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside, a layer computes as a copy of it does that `prepare` has changed; the copy lives for that call only."""
    held: dict[int, Any] = {}
    parts = ("_modules", "_parameters", "_buffers")

    def enter(layer: nn.Module, *_: Any) -> None:
        made = copy.deepcopy(layer)
        prepare(made)
        held[id(layer)] = {part: getattr(layer, part) for part in parts}
        for part in parts:
            setattr(layer, part, getattr(made, part))

    def leave(layer: nn.Module, *_: Any) -> None:
        for part, value in held.pop(id(layer), {}).items():
            setattr(layer, part, value)

    layers = list(layers)
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def untie_if_adapted_(model: PeftModel) -> None:
    """Give the head a matrix of its own where an adapter changes the input embeddings that it shares: it was not under it."""
    base: Any = model.get_base_model()
    table: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    if head is None or not isinstance(table, BaseTunerLayer) or not hasattr(table.get_base_layer(), "weight"):
        return
    if head.weight is table.get_base_layer().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        whole: Any = base.config
        for config in (whole, whole.get_text_config()):
            config.tie_word_embeddings = False


def plain_(model: PeftModel) -> Any:
    """The base of a `model` whose layers are folded, without PEFT and bitsandbytes; raises `ModelError` where PEFT refuses."""
    try:
        with warnings.catch_warnings():  # that the layers are folded already, and that head and embeddings differ now
            warnings.simplefilter("ignore")
            base: Any = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ModelError(f"PEFT cannot merge this adapter ({first_line(error)}); serve it as an adapter.") from error
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if issubclass(getattr(child, "source_cls", nn.Linear), Conv1D):  # bitsandbytes holds it transposed
                made: Any = Conv1D(0, 0)
                made.nf, made.nx = child.out_features, child.in_features
                made.weight = nn.Parameter(child.weight.detach().t().contiguous(), requires_grad=False)
                made.bias = child.bias
                setattr(parent, name, made)
    conversions = getattr(base, "_weight_conversions", None)
    if conversions:  # how the names on disk come about stays; unpacking what bitsandbytes had packed does not
        base._weight_conversions = [c for c in conversions if not _unpacks(c)]
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(base, flag):
            setattr(base, flag, False)
    return base


def _unpacks(conversion: Any) -> bool:
    return any("bitsandbytes" in type(op).__module__ for op in getattr(conversion, "operations", None) or ())


def stays_float32(model: nn.Module) -> Callable[[str], bool]:
    """Names whose tensors transformers holds in float32 whatever the model's type is, by a part of the name."""
    words = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    words |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    return lambda name: any(
        re.fullmatch(re.escape(w).replace(r"\*", ".*"), part) for w in words for part in name.split(".")
    )


@torch.no_grad()
def token_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs of every next token of `ids` (n, t), (n, t - 1) float64; `ModelError` where the model cannot be computed so."""
    model.eval()
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # the grouped product of experts knows no float64
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be computed with one layer after the other made plain ({first_line(error)}), so "
            "nothing was written; load the adapter with PEFT on its base instead of merging it."
        ) from error
    return logprobs_of(logits, ids[:, 1:])
