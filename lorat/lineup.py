"""The models of a run beside each other on one base: policy, reference, start, and the base without adapter.

A run's folder or checkpoint is read for what it has; any other PEFT LoRA adapter is a policy on its base. The base is
loaded once, as it was in training; an adapter that computes the same as another (a reference that never moved, a start
with B = 0, which is the base) is named so and computed once. Costs the base and three small adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import checkpoint as ck
from .adapters import ADAPTER_WEIGHTS, adapter_folder, attach, load_adapter_
from .base import load_base, load_tokenizer
from .config import TrustRegionConfig
from .errors import ModelError, first_line
from .logprobs import Head, check_head
from .reference import POLICY, REFERENCE
from .tokenization import check_tokenizer

MODELS = ("policy", "reference", "start", "base")
_ADAPTERS = {"policy": POLICY, "reference": REFERENCE, "start": "start"}  # as PEFT calls them
_LIKE_TRAINING = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "dtype", "model_revision")
_SCALE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass
class Found:
    """Where a run's models lie: `folders[model]`; `same_as`: models that compute what another does; notes for people."""

    folders: dict[str, Path]
    settings: dict[str, Any]
    same_as: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def which(self, model: str) -> str:
        """The model that is computed for `model`; raises `ModelError`, saying what to give, if there is none."""
        model = self.same_as.get(model, model)
        if model != "base" and model not in self.folders:
            raise ModelError(f"{self.folders['policy']} has no {model}. {' '.join(self.notes)}")
        return model


def find(run: str, reference: str | None = None, start: str | None = None) -> Found:
    """Policy, reference and start of a run, a checkpoint or any PEFT LoRA adapter (folder or hub id).

    `reference`, `start`: adapters to take instead. Raises `ModelError` where there is no adapter.
    """
    if Path(run).is_dir() and not (Path(run) / ADAPTER_WEIGHTS).is_file() and (found := ck.checkpoints(Path(run))):
        raise ModelError(f"the run in {run!r} has not ended, so it has no adapter yet; give its checkpoint, {found[0]}.")
    policy = adapter_folder(run)
    settings: dict[str, Any] = {}
    if (policy / ck.STATE).is_file():
        settings, root = ck.read_json(policy / ck.STATE)["run"], policy.parent
    else:
        root = policy
        if (policy / ck.RUN).is_file():
            settings = ck.read_json(policy / ck.RUN)
    out = Found({"policy": policy}, settings)
    if start or (root / ck.START / ADAPTER_WEIGHTS).is_file():
        out.folders["start"] = adapter_folder(start) if start else root / ck.START
    else:
        out.same_as["start"] = "base"
        out.notes.append("No start/ is recorded, so the base stands for the policy's start; --start names another adapter.")
    if reference or (there := _reference(policy, settings, out.folders.get("start"))):
        out.folders["reference"] = adapter_folder(reference) if reference else there
    else:
        how = "save_reference: true keeps it in a run's folder" if settings else "it is no run of lorat"
        out.notes.append(f"The reference was not saved with this adapter ({how}); --reference names one.")
    _find_equals(out)
    return out


def _reference(policy: Path, settings: dict[str, Any], start: Path | None) -> Path | None:
    """The reference that belongs to a policy: beside it, or in the checkpoint that holds the same policy."""
    if (policy / REFERENCE / ADAPTER_WEIGHTS).is_file():
        return policy / REFERENCE
    for folder in ck.checkpoints(policy):
        if (folder / REFERENCE / ADAPTER_WEIGHTS).is_file() and _same(folder, policy):
            return folder / REFERENCE
    if settings.get("sync") == "frozen":
        given = settings.get("ref_adapter")
        return start if not given else Path(given) if (Path(given) / ADAPTER_WEIGHTS).is_file() else None
    return None


def _find_equals(out: Found) -> None:
    if "start" in out.folders and _null(out.folders["start"]):
        out.same_as["start"] = "base"
        del out.folders["start"]
    if "reference" in out.folders:
        mine = out.folders["reference"]
        twin = next((m for m in ("start", "policy") if m in out.folders and _same(mine, out.folders[m])), None)
        twin = twin or ("base" if _null(mine) else None)
        if twin:
            out.same_as["reference"] = twin
            del out.folders["reference"]
    for model, twin in out.same_as.items():
        if not any(f"the {twin} stands for" in note for note in out.notes):
            out.notes.append(f"The {model} computes what the {twin} does{_why(model, twin)}; shown once, as {twin}.")


def _why(model: str, twin: str) -> str:
    return " (its adapter is zero)" if twin == "base" else " (their adapters are equal)"


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(folder / ADAPTER_WEIGHTS)!r} cannot be read ({first_line(error)}).") from error


def _same(a: Path, b: Path) -> bool:
    first, second = _weights(a), _weights(b)
    if first.keys() != second.keys() or not all(torch.equal(first[k], second[k]) for k in first):
        return False
    configs = [PeftConfig.from_pretrained(str(f)) for f in (a, b)]
    return all(getattr(configs[0], k, None) == getattr(configs[1], k, None) for k in _SCALE)


def _null(folder: Path) -> bool:
    """Whether an adapter changes nothing: LoRA factors alone, and every B zero."""
    b = {k: t for k, t in (w := _weights(folder)).items() if ".lora_B" in k or ".lora_embedding_B" in k}
    plain = all(k in b or ".lora_A" in k or ".lora_embedding_A" in k for k in w)
    return bool(b) and plain and not any(t.any() for t in b.values())


@dataclass
class Lineup:
    """The loaded models; `using(name)` makes forward passes go through one of them."""

    model: PeftModel
    head: Head
    tokenizer: PreTrainedTokenizerBase
    found: Found
    config: TrustRegionConfig
    autocast: Callable[[], AbstractContextManager[Any]]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def names(self) -> list[str]:
        """The models that are computed, each different from the others."""
        return [m for m in MODELS if m == "base" or m in self.found.folders]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Inside, forward passes compute `name`'s, in eval mode, without gradients and in the type of training."""
        name = self.found.which(name)
        self.model.eval()
        with torch.no_grad(), self.autocast():
            if name == "base":
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(_ADAPTERS[name], inference_mode=True)
                yield

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of these models, as JSON: base, types, and each adapter's SHA-256."""
        digests = {m: hashlib.sha256((f / ADAPTER_WEIGHTS).read_bytes()).hexdigest() for m, f in self.found.folders.items()}
        keys = ("model_name_or_path", "model_revision", "load_in_4bit", "bnb_4bit_quant_type", "dtype")
        return {k: getattr(self.config, k) for k in keys} | {
            "compute": "bf16" if self.config.bf16 else "fp16" if self.config.fp16 else str(self.head.weight.dtype)[6:],
            "adapters": digests,
            "same_as": self.found.same_as,
        }


def load(
    found: Found,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    in_4bit: bool | None = None,
    cpu: bool = False,
    trust_remote_code: bool = False,
) -> Lineup:
    """Load the base once, as the run did, and put the run's adapters on it.

    `base_model`: where the base lies now. `dtype`: computing type instead of the run's. Raises a `LoratError` where a part
    is missing or does not fit.
    """
    policy = found.folders["policy"]
    recorded = PeftConfig.from_pretrained(str(policy)).base_model_name_or_path
    if not (name := base_model or recorded):
        raise ModelError(f"{str(policy)!r} does not say what its base is; give it with --base-model.")
    saved, on_gpu = found.settings, torch.cuda.is_available() and not cpu
    how: dict[str, Any] = {k: saved[k] for k in _LIKE_TRAINING if k in saved}
    if saved:
        how |= {"bf16": bool(saved.get("bf16")) and on_gpu, "fp16": bool(saved.get("fp16")) and on_gpu}
    if dtype:
        how |= {"dtype": dtype, "bf16": on_gpu and dtype == "bfloat16", "fp16": on_gpu and dtype == "float16"}
    if in_4bit is not None:
        how["load_in_4bit"] = in_4bit
    here = (policy / "tokenizer_config.json").is_file()
    how["tokenizer_name_or_path"] = str(policy) if here else saved.get("tokenizer_name_or_path")
    config = TrustRegionConfig(
        model_name_or_path=name,
        output_dir=str(policy),
        use_cpu=not on_gpu,
        trust_remote_code=trust_remote_code,
        report_to="none",
        **how,
    )
    tokenizer = load_tokenizer(config)
    check_tokenizer(tokenizer)
    reference = found.folders.get("reference")
    model = attach(
        load_base(config),
        policy_adapter=str(policy),
        ref_adapter=str(reference) if reference else None,
        check_base=base_model is None,
    )
    if start := found.folders.get("start"):
        settings = PeftConfig.from_pretrained(str(start))
        if not isinstance(settings, LoraConfig):
            raise ModelError(f"{str(start)!r} holds a {settings.peft_type} adapter; a start is a LoRA adapter.")
        model.add_adapter(_ADAPTERS["start"], settings)
        load_adapter_(model, start, _ADAPTERS["start"])
    half = torch.bfloat16 if config.bf16 else torch.float16
    device = torch.device("cuda" if on_gpu else "cpu")
    head = Head.of(model)
    check_head(model, head, head.weight.device)
    return Lineup(
        model,
        head,
        tokenizer,
        found,
        config,
        lambda: torch.autocast(device.type, half, enabled=bool(config.bf16 or config.fp16)),
    )
