"""The base model and its tokenizer: loaded once, frozen, in 4-bit unless asked otherwise.

safetensors only; Python code that comes with a model runs only where the user asks for it. Memory: the 4-bit
weights (0.52 byte a parameter with double quantisation), and embeddings and head in the computing type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, modeling_utils

from ..errors import ConfigError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..settings.config import TrustRegionConfig

# The settings that decide what a loaded base computes: whoever loads a run's base again takes them from the run.
AS_LOADED = (
    *("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("quantize_embeddings", "dtype", "model_revision"),
)


def load_tokenizer(config: TrustRegionConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; raises `ModelError` if there is none at the given place."""
    name = config.tokenizer_name_or_path or config.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=config.model_revision or "main", trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"no tokenizer could be loaded from {name!r} ({first_line(error)}). Set tokenizer_name_or_path to a folder "
            "or hub id that holds tokenizer.json, or put the tokenizer's files beside the model."
        ) from error


def load_base(config: TrustRegionConfig) -> PreTrainedModel:
    """The base model, once, frozen, in 4-bit if `load_in_4bit`; one copy on this process's device.

    Raises `ModelError` where the folder has no safetensors weights or the hub no such model.
    """
    name = config.model_name_or_path
    if not name:
        raise ConfigError("model_name_or_path is not set; give a hub id (EleutherAI/pythia-6.9b) or a local folder.")
    common = dict(revision=config.model_revision or "main", trust_remote_code=config.trust_remote_code)
    try:
        model_config = AutoConfig.from_pretrained(name, **common)
    except Exception as error:
        raise ModelError(
            f"{name!r} has no readable model configuration ({first_line(error)}). Set model_name_or_path to a hub id "
            "or to a folder that holds config.json and safetensors weights."
        ) from error
    for key, value in model_config.get_text_config().to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(model_config.get_text_config(), key, 0.0)  # noise on a frozen base is noise in every log-ratio
    device = torch.device("cpu") if config.use_cpu else config.device
    kwargs: dict[str, Any] = dict(
        common, config=model_config, dtype=config.torch_dtype, use_safetensors=True, device_map={"": device}
    )
    if config.attn_implementation:
        kwargs["attn_implementation"] = config.attn_implementation
    elif getattr(model_config.get_text_config(), "attn_logit_softcapping", None):
        kwargs["attn_implementation"] = "eager"  # sdpa leaves the cap out; older transformers take it all the same
    if config.load_in_4bit and getattr(model_config, "quantization_config", None) is None:
        kwargs["quantization_config"] = quantization_config(config)
    try:
        with reading_in_turn():
            model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the weights of {name!r} could not be loaded ({first_line(error)}). lorat reads safetensors only: the "
            "folder or hub repository must hold model.safetensors (or its shards). Convert a pickled "
            "pytorch_model.bin once with model.save_pretrained(...), or choose another model."
        ) from error
    if config.quantize_embeddings:
        quantize_embeddings_(model, config.quantize_embeddings)
    model.requires_grad_(False)
    keep_trainable_on_cpu_(model)
    return model


@contextmanager
def reading_in_turn() -> Iterator[None]:
    """Inside, transformers reads each tensor of a safetensors file when it is its turn, as it does on Windows.

    Elsewhere it maps the files, and what was read stays resident until the last tensor is loaded: for a base that ends in
    4-bit, more than three times its size.
    """
    library: Any = modeling_utils
    known = library.safe_open
    library.safe_open = lambda *args, **how: known(*args, **{**how, "backend": "pread"})
    try:
        yield
    finally:
        library.safe_open = known


def quantize_embeddings_(model: Any, kind: str) -> None:
    """Hold the input embeddings in "8bit" (a row's own scale) or "4bit" (NF4); `ModelError` where that saves nothing."""
    import bitsandbytes as bnb

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(table) is not nn.Embedding:
        raise ModelError(
            f"quantize_embeddings={kind}: the embeddings are a {type(table).__name__}, which may do more than look up "
            "rows; leave it out."
        )
    if head is not None and head.weight is table.weight:
        raise ModelError(
            f"quantize_embeddings={kind}: embeddings and head are one matrix here, and the head stays as it is, so "
            "nothing would be saved; leave it out."
        )
    n, width, dtype, device = *table.weight.shape, table.weight.dtype, table.weight.device
    made: Any
    made = bnb.nn.Embedding8bit(n, width, dtype=dtype) if kind == "8bit" else bnb.nn.EmbeddingNF4(n, width, dtype=dtype)
    made.load_state_dict({"weight": table.weight.detach().cpu()})
    made = made.to(device)
    made._save_to_state_dict = lambda *_: None  # bitsandbytes refuses; adapters are saved, the frozen table is not
    model.set_input_embeddings(made)


@torch.no_grad()
def plain_embeddings_(model: Any) -> None:
    """Undo `quantize_embeddings_`, up to the rounding: an ordinary table of the rows as they are looked up."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding and hasattr(table, "num_embeddings"):
        rows = table(torch.arange(table.num_embeddings, device=table.weight.device))
        model.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=True))


def keep_trainable_on_cpu_(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU at the first forward in eval mode.

    On CPUs with AVX512-BF16 it does so for faster inference, in place and for good: the repacked product has
    no gradient and rounds to bf16. Raises `ModelError` if that has happened already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ModelError(
                    "this 4-bit model has run inference on the CPU, where bitsandbytes repacks its weights into a form "
                    "without gradients. Load it anew and hand it over before its first forward pass."
                )


def quantization_config(config: TrustRegionConfig) -> BitsAndBytesConfig:
    """How bitsandbytes stores the base: 4-bit, dequantised to `config.torch_dtype` for each product."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=config.torch_dtype,
    )


def check_fit(base: Any, greatest: int, longest: int) -> None:
    """Refuse data whose token ids or row lengths go past the model's tables, before they index past their ends.

    `greatest`: the greatest token id; `longest`: tokens of the longest row. Rotary positions have no table.
    """
    known = base.get_input_embeddings().num_embeddings  # its weight may be packed
    if greatest >= known:
        raise ModelError(
            f"the data holds token {greatest}, the model knows {known} tokens: this tokenizer is not the model's. "
            "Set tokenizer_name_or_path to the tokenizer the model was trained with."
        )
    for name, table in base.named_modules():
        learned = name.rpartition(".")[2] in ("wpe", "embed_positions") and isinstance(table, nn.Embedding)
        room = base.config.get_text_config().max_position_embeddings if learned else longest
        if longest > room:
            raise ModelError(
                f"the longest row has {longest} tokens, {type(base).__name__} has learned {room} positions; "
                f"set max_length to {room} or less."
            )
