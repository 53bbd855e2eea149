"""The model of a run without its values: every tensor that will lie on the GPU, on the `meta` device, byte for byte.

Made from a model's configuration alone by the code that loads and adapts the real one: transformers decides which layers
become 4-bit, PEFT which are adapted, `fuse_` how they compute. What bitsandbytes stores for a packed weight is laid out
here (`packed`), and the tests compare it with real models. Costs no memory and well under a second. Under torch's
`FakeTensorMode` it can be run, once fake tensors stand in the place of meta ones (`imagine_`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from ..errors import ConfigError, ModelError, first_line
from ..model.adapters import attach
from ..model.base import Base, quantization_config
from ..packs.attention import NAMES
from ..packs.packing import Pack
from ..reference import POLICY, REFERENCE, adapter_parameters

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

BLOCK, NESTED = 64, 256  # numbers that share a scale; scales that share one, with double quantisation


def read_model_config(base: Base) -> Any:
    """The model's configuration: of a hub id, of a folder, or a `config.json` alone; raises `ModelError` without one."""
    name = base.name
    if not name:
        raise ConfigError("model_name_or_path is not set; give a hub id, a local folder, or a config.json.")
    try:
        return AutoConfig.from_pretrained(
            name, revision=base.revision or "main", trust_remote_code=base.trust_remote_code
        )
    except Exception as error:
        missing = not Path(name).exists() and name.count("/") > 1
        raise ModelError(
            f"{name!r} has no readable model configuration ({first_line(error)})."
            + (" There is no such file." if missing else "")
            + " Set model_name_or_path to a hub id, to a folder that holds config.json, or to that file."
        ) from error


def draw(base: Base, adapter: LoraConfig, model_config: Any, ref_rank: int | None = None) -> PeftModel:
    """The base under both adapters, on the meta device; raises `ModelError` as loading would.

    `model_config`: transformers' configuration of the model. `ref_rank`: of the reference, by default the adapter's.
    """
    model_config, dtype = copy.deepcopy(model_config), base.dtype
    given = getattr(model_config, "quantization_config", None)
    four_bit = base.four_bit or given is not None
    if given is not None and "4bit" not in str(getattr(given, "quant_method", "")) + str(given):
        raise ModelError(f"the model is quantised already ({given}), and not in 4-bit: its memory cannot be predicted.")
    if given is not None:
        del model_config.quantization_config
    attention = {"attn_implementation": base.attention} if base.attention in NAMES else {}  # others want a GPU
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=base.trust_remote_code, **attention
            )
    except (ValueError, KeyError) as error:
        raise ModelError(f"no causal LM can be made of this configuration ({first_line(error)}).") from error
    _keep_wide_(model, dtype)
    if four_bit:
        how = AutoHfQuantizer.from_config(given or quantization_config(base), pre_quantized=False)
        how._process_model_before_weight_loading(model, device_map={"": "cpu"})
        model.config.quantization_config, model.is_loaded_in_4bit = how.quantization_config, True
        _pack_(model, dtype)
    if base.quantize_embeddings:
        _pack_embeddings_(model, base.quantize_embeddings, dtype)
    model.requires_grad_(False)
    with torch.device("meta"):
        return attach(model, adapter, ref_rank=ref_rank)


def _keep_wide_(model: Any, dtype: torch.dtype) -> None:
    """Float32 for what transformers holds in it whatever is asked for."""
    wide = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    wide += list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else []
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if any(part in name.split(".") for part in wide) and t.is_floating_point():
            t.data = t.data.float()


def _pack_(model: nn.Module, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            old: Any = module.weight
            weight, state = packed((module.out_features, module.in_features), dtype, old.compress_statistics)
            state.quant_type = old.quant_type
            module.weight = bnb.nn.Params4bit(
                weight,
                quant_state=state,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                bnb_quantized=True,
            )
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)  # as it is loaded


def packed(shape: tuple[int, ...], dtype: torch.dtype, double: bool, device: str = "meta") -> tuple[Tensor, Any]:
    """A 4-bit weight as bitsandbytes stores it: `(⌈n/2⌉, 1)` uint8, and its quantisation state.

    The state: 16 float32 of the 4-bit type's values, and a scale for each 64 numbers: float32, or with double
    quantisation uint8 with 256 float32 values of that type, a float32 scale for each 256 of them and a float32 mean.
    """
    from bitsandbytes.functional import QuantState

    numbers = 1
    for size in shape:
        numbers *= size
    blocks = -(-numbers // BLOCK)
    new = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=device)  # noqa: E731
    weight = new(-(-numbers // 2), 1, dtype=torch.uint8)
    common: dict[str, Any] = {"shape": torch.Size(shape), "dtype": dtype, "blocksize": BLOCK, "code": new(16)}
    if not double:
        return weight, QuantState(absmax=new(blocks), quant_type="nf4", **common)
    nested = QuantState(absmax=new(-(-blocks // NESTED)), code=new(256), blocksize=NESTED, dtype=torch.float32)
    absmax = new(blocks, dtype=torch.uint8)
    return weight, QuantState(absmax=absmax, quant_type="nf4", offset=new(), state2=nested, **common)


def _pack_embeddings_(model: Any, kind: str, dtype: torch.dtype) -> None:
    """As `base.quantize_embeddings_`: 8-bit rows with a float32 scale each, or NF4 without double quantisation."""
    import bitsandbytes as bnb

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(table) is not nn.Embedding or (head is not None and head.weight is table.weight):
        why = "are the head's as well" if type(table) is nn.Embedding else f"are a {type(table).__name__}"
        raise ModelError(f"quantize_embeddings={kind}: the embeddings {why}; leave it out.")
    n, width = table.weight.shape
    if kind == "8bit":
        made: Any = bnb.nn.Embedding8bit(n, width, dtype=dtype, device="meta")
        rows = torch.empty(n, width, dtype=torch.int8, device="meta")
        made.weight = nn.Parameter(rows, requires_grad=False)
        made.weight.SCB = torch.empty(n, dtype=torch.float32, device="meta")
    else:
        made = bnb.nn.EmbeddingNF4(n, width, dtype=dtype, device="meta")
        weight, state = packed((n, width), dtype, double=False)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight.quant_state = state
    model.set_input_embeddings(made)


def quantisation_state(p: Any) -> list[Tensor]:
    """The tensors that stand beside a packed weight; none for any other."""
    out: list[Tensor] = []
    state = getattr(p, "quant_state", None)
    if state is not None:
        nested = state.state2
        out += [state.absmax, state.code]
        out += [state.offset, nested.absmax, nested.code] if nested is not None else []
    if getattr(p, "SCB", None) is not None:
        out.append(p.SCB)
    return [t for t in out if isinstance(t, Tensor)]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values, where fake ones are made."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def stored(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the model with what it belongs to, shared ones once: bytes are `t.untyped_storage().nbytes()`.

    `"weights"` 4-bit weights, `"state"` quantisation state, `"embeddings"`, `"head"`, `"policy"`, `"reference"`, and
    `"other"`: norms, biases, buffers, and linear layers or experts that stay in 16 bits.
    """
    base: Any = model.get_base_model()
    of = {id(p): "policy" for p in adapter_parameters(model, POLICY).values()}
    of |= {id(p): "reference" for p in adapter_parameters(model, REFERENCE).values()}
    head, table = base.get_output_embeddings(), base.get_input_embeddings()
    of |= {id(p): "head" for p in head.parameters()}
    of |= {id(p): "embeddings" for p in table.parameters()}  # tied: there, not at the head
    seen: set[int] = set()
    for module in model.modules():
        for p in (*module._parameters.values(), *module._buffers.values()):
            if p is None or p.untyped_storage()._cdata in seen:
                continue
            seen.add(p.untyped_storage()._cdata)
            beside = quantisation_state(p)
            yield of.get(id(p), "weights" if beside else "other"), p
            for t in beside:
                yield "state", t


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """All that a model holds, quantisation state included."""
    for t in (*model.parameters(), *model.buffers()):
        yield t
        yield from quantisation_state(t)


class Params4bit(FakeTensor):
    """A packed weight without values: PEFT knows those by the name of their class."""


def imagine_(model: nn.Module) -> None:
    """Put a fake tensor in the place of each meta tensor; shared ones stay shared."""
    import bitsandbytes as bnb

    made: dict[int, nn.Parameter] = {}
    like: Any = lambda t: None if t is None else empty(*t.shape, dtype=t.dtype)  # noqa: E731
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                new: Any = nn.Parameter(like(p), requires_grad=p.requires_grad)
                if isinstance(p, bnb.nn.Params4bit):
                    new.__class__ = Params4bit
                state, scales = getattr(p, "quant_state", None), getattr(p, "SCB", None)
                if state is not None:
                    for part in (state, state.state2):
                        if part is not None:
                            part.absmax, part.code = like(part.absmax), like(part.code)
                    state.offset = like(state.offset)
                    new.quant_state, new.blocksize, new.compress_statistics = state, state.blocksize, state.nested
                    new.quant_type, new.bnb_quantized = state.quant_type, True
                if scales is not None:
                    new.SCB = like(scales)
                made[id(p)] = new
            module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = like(buffer)


def imagined(pack: Pack) -> Pack:
    """A pack whose tensors have no values."""

    def like(t: Any) -> Any:
        return empty(*t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t

    moved = {k: like(v) for k, v in vars(pack).items()}
    if pack.layout is not None:
        parts = {k: like(v) for k, v in vars(pack.layout).items() if k != "again"}
        again = [(like(rows), like(places)) for rows, places in pack.layout.again]
        moved["layout"] = type(pack.layout)(**parts, again=again)
    return Pack(**moved)
