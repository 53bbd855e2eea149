"""The base model and its tokenizer: loaded once, frozen, in 4-bit unless asked otherwise.

safetensors only; Python code that comes with a model runs only where the user asks for it. Memory: the 4-bit
weights (0.52 byte a parameter with double quantisation), and embeddings and head in the computing type.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, modeling_utils

from ..errors import ConfigError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("bfloat16", "float16", "float32")
QUANT_TYPES = ("nf4", "fp4")
EMBEDDINGS = (None, "8bit", "4bit")
# Settings under the names that a run records -> fields of `Base`.
_RECORDED = {
    "load_in_4bit": "four_bit",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "quantize_embeddings": "quantize_embeddings",
    "model_revision": "revision",
}


@dataclass(frozen=True)
class Base:
    """What to load, and how: all that decides what a base computes.

    `dtype`: what stays unquantised is held in it, and 4-bit weights are dequantised to it; a `torch.dtype` or its word.
    `device`: None is the GPU where there is one. Raises `ConfigError` for words that are not known.
    """

    name: str | None
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    dtype: torch.dtype = torch.float32
    four_bit: bool = True
    quant_type: str = "nf4"
    double_quant: bool = True
    quantize_embeddings: str | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("quant_type", QUANT_TYPES), ("quantize_embeddings", EMBEDDINGS)):
            if getattr(self, name) not in allowed:
                words = ", ".join(word for word in allowed if word)
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known; set one of: {words}.")
        if not isinstance(self.dtype, torch.dtype):
            if self.dtype not in DTYPES:
                raise ConfigError(f"dtype={self.dtype!r} is not known; set one of: {', '.join(DTYPES)}.")
            object.__setattr__(self, "dtype", getattr(torch, self.dtype))
        if self.device is None:
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], name: str | None, **changes: Any) -> Base:
        """As a run loaded its base, from the settings it recorded; lorat's defaults for what they leave out.

        `name`: where the base lies now. `changes`: fields of `Base` that are to differ.
        """
        how = {field: settings[key] for key, field in _RECORDED.items() if key in settings}
        dtype = settings.get("dtype", "auto")
        if dtype == "auto":
            dtype = "bfloat16" if settings.get("bf16") else "float16" if settings.get("fp16") else "float32"
        return cls(name, **{"dtype": dtype, **how, **changes})

    def settings(self) -> dict[str, Any]:
        """What decides the values of the loaded base, as JSON, under the names that a run records."""
        how = {key: getattr(self, field) for key, field in _RECORDED.items()}
        return {"model_name_or_path": self.name, "dtype": str(self.dtype).removeprefix("torch."), **how}


@dataclass(frozen=True)
class Facts:
    """What a loaded base is, read off it: a model handed over may be anything, whatever the settings say.

    `dtype`: what its products are computed in: of the 4-bit layers where it has them, else of the head's weight.
    """

    four_bit: bool
    quant_type: str | None
    double_quant: bool | None
    dtype: torch.dtype
    attention: str | None
    quantize_embeddings: str | None

    @classmethod
    def of(cls, base: Any) -> Facts:
        """The facts of a base (of a `PeftModel`: `get_base_model()`)."""
        four_bit = bool(getattr(base, "is_loaded_in_4bit", False))
        how: Any = getattr(base.config, "quantization_config", None)
        table = type(base.get_input_embeddings()).__name__
        return cls(
            four_bit,
            how.bnb_4bit_quant_type if four_bit else None,
            bool(how.bnb_4bit_use_double_quant) if four_bit else None,
            how.bnb_4bit_compute_dtype if four_bit else base.get_output_embeddings().weight.dtype,
            getattr(base.config, "_attn_implementation", None),
            {"Embedding8bit": "8bit", "EmbeddingNF4": "4bit"}.get(table),
        )

    def settings(self) -> dict[str, Any]:
        """The settings that say so, under the names that a run records; of 4-bit only what there is."""
        how = {"bnb_4bit_quant_type": self.quant_type, "bnb_4bit_use_double_quant": self.double_quant}
        return {
            "load_in_4bit": self.four_bit,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantize_embeddings": self.quantize_embeddings,
            **(how if self.four_bit else {}),
        }


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The tokenizer of a base; raises `ModelError` if there is none at the given place."""
    name = base.tokenizer or base.name
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=base.revision or "main", trust_remote_code=base.trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"no tokenizer could be loaded from {name!r} ({first_line(error)}). Set tokenizer_name_or_path to a folder "
            "or hub id that holds tokenizer.json, or put the tokenizer's files beside the model."
        ) from error


def read_model_config(base: Base, advice: str = "") -> Any:
    """The model's configuration: of a hub id, of a folder, or a `config.json` alone. Raises a `LoratError` without one.

    `advice`: what to set instead, if not the model's name.
    """
    name = base.name
    if not name:
        raise ConfigError("model_name_or_path is not set; give a hub id (EleutherAI/pythia-6.9b) or a local folder.")
    try:
        return AutoConfig.from_pretrained(
            name, revision=base.revision or "main", trust_remote_code=base.trust_remote_code
        )
    except Exception as error:
        advice = advice or (
            "Set model_name_or_path to a hub id or to a folder that holds config.json and safetensors weights; to plan, the "
            "config.json alone will do."
        )
        missing = " There is no such file." if not Path(name).exists() and name.count("/") > 1 else ""
        raise ModelError(
            f"{name!r} has no readable model configuration ({first_line(error)}).{missing} {advice}"
        ) from error


def load_base(base: Base) -> PreTrainedModel:
    """The base model, once, frozen, in 4-bit if `base.four_bit`; one copy on `base.device`.

    Raises `ModelError` where the folder has no safetensors weights or the hub no such model.
    """
    model_config, name = read_model_config(base), str(base.name)
    common = dict(revision=base.revision or "main", trust_remote_code=base.trust_remote_code)
    for key, value in model_config.get_text_config().to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(model_config.get_text_config(), key, 0.0)  # noise on a frozen base is noise in every log-ratio
    kwargs: dict[str, Any] = dict(
        common, config=model_config, dtype=base.dtype, use_safetensors=True, device_map={"": base.device}
    )
    if base.attention:
        kwargs["attn_implementation"] = base.attention
    elif getattr(model_config.get_text_config(), "attn_logit_softcapping", None):
        kwargs["attn_implementation"] = "eager"  # sdpa leaves the cap out; older transformers take it all the same
    if base.four_bit and getattr(model_config, "quantization_config", None) is None:
        kwargs["quantization_config"] = quantization_config(base)
    try:
        with reading_in_turn():
            model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the weights of {name!r} could not be loaded ({first_line(error)}). lorat reads safetensors only: the "
            "folder or hub repository must hold model.safetensors (or its shards). Convert a pickled "
            "pytorch_model.bin once with model.save_pretrained(...), or choose another model."
        ) from error
    if base.quantize_embeddings:
        quantize_embeddings_(model, base.quantize_embeddings)
    model.requires_grad_(False)
    keep_trainable_on_cpu_(model)
    return model


_TURN = threading.Lock()


@contextmanager
def reading_in_turn() -> Iterator[None]:
    """Inside, transformers reads each tensor of a safetensors file when it is its turn, as it does on Windows.

    Elsewhere it maps the files, and what was read stays resident until the last tensor is loaded: for a base that ends in
    4-bit, more than three times its size. It has no option for that (5.17 to 5.23): `disable_mmap` reads whole files at
    once, the checkpoint in 16 bits; tensors of one's own (`state_dict`) are refused beside a name. So the function that
    opens a file is another one meanwhile, for this thread alone, and one load at a time.
    """
    library: Any = modeling_utils
    here = threading.get_ident()
    with _TURN:
        known = library.safe_open

        def opened(*args: Any, **how: Any) -> Any:
            return known(*args, **(how | {"backend": "pread"} if threading.get_ident() == here else how))

        library.safe_open = opened
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


def quantization_config(base: Base) -> BitsAndBytesConfig:
    """How bitsandbytes stores the base: 4-bit, dequantised to `base.dtype` for each product."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quant_type,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=base.dtype,
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
