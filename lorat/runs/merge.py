"""Fold a trained adapter into its base, so that the result needs neither PEFT nor bitsandbytes.

The adapter was trained on the base as 4-bit rounds it. Merged into the *original* 16-bit weights it meets
weights it never saw, and the rounding error comes back with the opposite sign; merged into the *dequantised*
ones it computes what was trained, up to the rounding of the output type.

What counts is the folder that a person gets. It is written aside, read back by plain transformers and measured on text:
(a) the merged weights in float32 against the trained model, (b) the folder against (a). It appears under its name
only when both hold; otherwise nothing is left behind. Runs on the CPU, a layer at a time (`model/folding.py`): host memory
is the model in the type it is saved in, the embeddings and a layer in float32, and a shard (18 GB for 6.9B in 16 bits).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers.utils import cached_file

from ..errors import CheckpointError, ConfigError, ModelError, first_line
from ..model import folding
from ..model.adapters import adapter_folder
from ..model.base import Base, load_base, load_tokenizer, read_model_config
from . import checkpoint as ck
from .card import write_merged_card
from .merged import SENTENCES, publish, read_back, save, staging, unsaved_buffers

EXACT = 1e-4  # nats a token: what float32 arithmetic in another order may change
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Gap:
    """Differences of log-probs, in nats a token: their mean and the largest."""

    mean: float
    largest: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Gap:
        gap = (a.double() - b.double()).abs()
        return cls(gap.mean().item(), gap.max().item())

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a token on average, {self.largest:.2g} at most"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, measured over `tokens` tokens.

    `folded`: the merged weights in float32 against the trained model (on the original weights where `base` says so);
    `saved`: the folder against them; `rounding`: what rounding to `dtype` alone gives; `changed`: the folder against the
    trained model, where that is another one.
    """

    out: Path
    base: str
    name: str
    dtype: str
    tokens: int
    folded: Gap
    saved: Gap
    rounding: Gap
    changed: Gap | None = None

    @property
    def where(self) -> str:
        words = {"dequantized": "the base as 4-bit rounded it", "original": "the original weights"}
        return words.get(self.base, "the base, which was not quantised in training")

    def render(self) -> str:
        lines = [
            f"Merged into {self.where}, saved in {self.dtype}: {self.out}",
            f"Read back and measured on {self.tokens} tokens of text. Merged in float32, against "
            f"{'the adapter on the original weights' if self.base == 'original' else 'the trained model'}: {self.folded}.",
            f"The folder against that: {self.saved} (rounding to {self.dtype} alone: {self.rounding.largest:.2g} at most).",
        ]
        if self.changed:
            lines.append(
                f"Against the model as it was trained: {self.changed}. "
                "The adapter was trained on the 4-bit weights and has not seen these: rounding errors it had learnt to "
                "live with are gone, and others come in their place. --base dequantized keeps what was trained."
            )
        return "\n".join(lines)


def merge(
    run: str,
    out: str,
    base: str = "dequantized",
    base_model: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge the adapter in `run` into its base and save the model to `out` as safetensors, tokenizer included.

    `base`: "dequantized" or "original". `base_model`: where the base lies now, if not where it lay in training.
    `dtype`: type to save in; "auto" is the type that the base is stored in. Raises a `LoratError`, and leaves nothing
    behind, where a part is missing, where the disk is full, or where the folder does not compute what was trained.
    """
    if base not in ("original", "dequantized"):
        raise ConfigError(f"base={base!r} is not known; set original or dequantized.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; set one of: {', '.join(DTYPES)}.")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{out!r} is not empty; name a new folder, so that nothing in it is overwritten.")
    folder = adapter_folder(run)
    name = base_model or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ModelError(f"{run!r} does not say what its base is; give it with --base-model.")
    trained = Base.from_settings(ck.recorded_settings(folder), name, trust_remote_code=trust_remote_code, device="cpu")
    known = _check_stored(trained, base)
    kind = known if dtype == "auto" else getattr(torch, dtype)
    with_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(replace(trained, tokenizer=str(folder) if with_tokenizer else None))
    with staging(target) as staged:
        report = _merge(folder, staged, target, trained, base, tokenizer, known, kind)
        write_merged_card(staged, folder, report)
        publish(staged, target)
    return report


def _merge(
    folder: Path,
    staged: Path,
    target: Path,
    trained: Base,
    base: str,
    tokenizer: Any,
    known: torch.dtype,
    kind: torch.dtype,
) -> MergeReport:
    """Write the merged model to `staged`, read it back, and raise `ModelError` unless it computes what it should."""
    model = _with_adapter(trained, folder)
    ids = _sample(tokenizer, model)
    quantised = any(folding.is_packed(m) for m in model.modules())
    as_trained = None
    if base == "original" and (quantised or trained.dtype != known):
        as_trained = _measured(model, ids, dtype=torch.float64)
        del model
        gc.collect()
        model = _with_adapter(replace(trained, four_bit=False, quantize_embeddings=None, dtype=known), folder)
    expected = _measured(model, ids, dtype=torch.float64)
    folded = _measured(model, ids, fold=True, dtype=torch.float64)
    plain = _rounded_(model, kind)
    del model
    rounded = _measured(plain, ids)
    save(plain, staged, trained, tokenizer, kind)
    buffers = {n: b.clone() for n, b in unsaved_buffers(plain)}
    del plain
    gc.collect()
    got = _measured(read_back(staged, trained, tokenizer, kind, buffers), ids)
    report = MergeReport(
        out=target,
        base=base if quantised or as_trained is not None else "plain",
        name=str(trained.name),
        dtype=str(kind).removeprefix("torch."),
        tokens=expected.numel(),
        folded=Gap.of(folded, expected),
        saved=Gap.of(got, folded),
        rounding=Gap.of(rounded, folded),
        changed=None if as_trained is None else Gap.of(got, as_trained),
    )
    advice = (
        "Nothing was kept. This is a fault of lorat, or of a library, with this architecture or adapter; until it is mended "
        "load the adapter with PEFT on its base, as README.md in the run's folder says."
    )
    if not report.folded.largest <= EXACT:
        raise ModelError(
            f"the merged weights do not compute what was trained: in float32 their log-probs differ by {report.folded}, "
            f"and {EXACT:g} is allowed. {advice}"
        )
    if not report.saved.largest <= report.rounding.largest + EXACT:
        raise ModelError(
            f"the saved folder does not compute what was merged: read back, its log-probs differ by {report.saved}, and "
            f"rounding to {report.dtype} gives {report.rounding.largest:.2g} at most. {advice}"
        )
    return report


def _check_stored(trained: Base, base: str) -> torch.dtype:
    """The type that the base is stored in; raises `ModelError` for one that cannot be merged into."""
    config = read_model_config(trained, "Name the folder or hub id of the base with --base-model.")
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        word = str(getattr(method, "value", method))
        if not word.startswith("bitsandbytes"):
            raise ModelError(
                f"{trained.name!r} is stored quantised by {word}, and merge unpacks bitsandbytes only. Name the same model in "
                "16 bits with --base-model, or serve the adapter on its base."
            )
        if base == "original":
            raise ModelError(
                f"{trained.name!r} is stored in 4 or 8 bits: there are no original weights in it to merge into. Name the same "
                "model in 16 bits with --base-model, or leave --base at dequantized."
            )
    for known in (getattr(config, "dtype", None), getattr(config.get_text_config(), "dtype", None)):
        if known is not None:
            return getattr(torch, str(known).removeprefix("torch."))
    return _type_in_file(trained)


def _beside(trained: Base, name: str) -> str | None:
    """Where a file of the base's folder or repository lies here; None where it has no such file."""
    kwargs: dict[str, Any] = dict(_raise_exceptions_for_missing_entries=False, revision=trained.revision or "main")
    return cached_file(str(trained.name), name, **kwargs)


def _type_in_file(trained: Base) -> torch.dtype:
    """The type of the first floating tensor in the base's file; float32 where there is none."""
    from safetensors import safe_open

    path = _beside(trained, "model.safetensors")
    if path:
        words = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (word := file.get_slice(key).get_dtype()) in words:
                    return words[word]
    return torch.float32


def _with_adapter(base: Base, folder: Path) -> PeftModel:
    model = load_base(base)
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ModelError(
            f"the adapter in {str(folder)!r} does not fit {base.name!r} ({first_line(error)}). Name the base it was trained "
            "on with --base-model."
        ) from error


def _sample(tokenizer: Any, model: Any) -> Tensor:
    """What is measured on, (1, t) or (2, t): the sentences as the model's own tokenizer reads them.

    Where it knows few of their words, a row of random tokens is measured beside them.
    """
    table = model.get_base_model().get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    longest = min(128, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 128)
    text = [token for sentence in SENTENCES for token in tokenizer(sentence)["input_ids"]][:longest]
    if text and max(text) >= rows:
        raise ModelError(
            f"the tokenizer gives token {max(text)}, and the base has rows for {rows}: they do not belong together. Name the "
            "base that was trained on with --base-model."
        )
    if len({*text}) >= 16:
        return torch.tensor([text])
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(min(rows, max(len(tokenizer), 2)), (2, max(len(text), min(32, longest))), generator=draw)
    if text:
        noise[0, : len(text)] = torch.tensor(text)
    return noise


def _measured(model: Any, ids: Tensor, fold: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-probs of `ids` computed in `dtype`, (n, t - 1) float64; what is outside the layers is left in it, folded if asked.

    The adapter is added in float32 whatever `dtype` is. In float64 the two sides of (a) differ by that rounding alone; in
    float32 their own noise, on text that a large model finds unlikely, comes near what is allowed.
    """
    layers = folding.decoder_layers(model)
    folding.dequantise_(m for _, m in folding.outside(model, layers.values()))
    rest = [m for _, m in folding.outside(model, layers.values())]  # with the plain ones that stand there now
    if fold:
        folding.untie_if_adapted_(model)
        folding.fold_(rest)
    folding.widen_(rest, dtype)

    def prepare(layer: torch.nn.Module) -> None:
        folding.dequantise_(layer.modules())
        if fold:
            folding.fold_(layer.modules())
        folding.widen_(layer.modules(), dtype)

    with folding.each_layer(layers.values(), prepare):
        return folding.token_logprobs(model, ids)


def _rounded_(model: PeftModel, kind: torch.dtype) -> Any:
    """The plain model in `kind`: its layers folded in float32 and rounded one after the other.

    What is outside the layers has been folded by `_measured`.
    """
    kept = folding.stays_float32(model.get_base_model())
    layers = folding.decoder_layers(model)
    folding.round_(folding.outside(model, layers.values()), kind, kept)  # folded already, and wide
    for name, layer in layers.items():
        folding.dequantise_(layer.modules())
        folding.fold_(layer.modules())
        folding.round_(((f"{name}.{part}", m) for part, m in layer.named_modules()), kind, kept)
    plain = folding.plain_(model)
    folding.round_(plain.named_modules(), kind, kept)
    return plain
