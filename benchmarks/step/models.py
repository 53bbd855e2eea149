"""Models of real sizes with random weights, from a configuration: no download, and speed does not depend on values.

Parameters start on the meta device and are filled one by one, each 4-bit weight quantised as soon as it exists, so a
model is never held in 16 bits as a whole. A shape is what `config.json` of that model says, as far as shape goes.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "pythia-1.4b": {"type": "gpt_neox", "layers": 24, "hidden": 2048, "heads": 16, "vocab": 50304},
    "pythia-2.8b": {"type": "gpt_neox", "layers": 32, "hidden": 2560, "heads": 32, "vocab": 50304},
    "pythia-6.9b": {"type": "gpt_neox", "layers": 32, "hidden": 4096, "heads": 32, "vocab": 50432},
    "llama-3-8b": {
        "type": "llama",
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "vocab": 128256,
        "intermediate": 14336,
        "kv_heads": 8,
    },
    "qwen2.5-7b": {
        "type": "qwen2",
        "layers": 28,
        "hidden": 3584,
        "heads": 28,
        "vocab": 152064,
        "intermediate": 18944,
        "kv_heads": 4,
    },
}


def configuration(shape: dict[str, Any]) -> Any:
    """A transformers configuration of `shape`; feed-forward 4 × and key-value heads as heads where it names none."""
    values = dict(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        vocab_size=shape["vocab"],
        intermediate_size=shape.get("intermediate", 4 * shape["hidden"]),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
    )
    if shape["type"] != "gpt_neox":
        values["num_key_value_heads"] = shape.get("kv_heads", shape["heads"])
        values["head_dim"] = shape["hidden"] // shape["heads"]
    return AutoConfig.for_model(shape["type"], **values)


def build(shape: dict[str, Any], device: torch.device, dtype: torch.dtype, load_in_4bit: bool) -> PreTrainedModel:
    """A frozen model of `shape` on `device`: `dtype`, or NF4 with double quantisation; the same values each time."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(configuration(shape), dtype=dtype)
    if load_in_4bit:
        quantise_(model, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            module._parameters[name] = filled(empty, name, device, dtype, generator)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.requires_grad_(False)


def quantise_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers, still without values, in the place of every linear layer but the head."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[head],
    )
    replace_with_bnb_linear(model, modules_to_not_convert=[head], quantization_config=how)
    model.config.quantization_config = how
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT, TRL and lorat ask for this


def filled(empty: Any, name: str, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> nn.Parameter:
    """Biases 0, norms 1, matrices normal with standard deviation 0.02, as the models themselves begin."""
    value = torch.empty(empty.shape, device=device, dtype=dtype)
    if empty.dim() < 2:
        return nn.Parameter(value.fill_(0.0 if name == "bias" else 1.0))
    value.normal_(std=0.02, generator=generator)
    if not hasattr(empty, "quant_type"):
        return nn.Parameter(value)
    return type(empty)(
        value, requires_grad=False, compress_statistics=empty.compress_statistics, quant_type=empty.quant_type
    ).to(device)
