"""The models of a run beside each other on one base: policy, reference, start, and the base without adapter.

The base is loaded once, as it was in training, with up to three small adapters on it; switching costs nothing. A
forward pass through any of them computes in the type that training computed in.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from ..data.tokenization import check_tokenizer
from ..errors import ModelError
from ..model.adapters import ADAPTER_WEIGHTS, attach, load_adapter_
from ..model.base import Base, Facts, load_base, load_tokenizer
from ..model.fused import computing
from ..model.models import Head, Models, check_head
from ..reference import POLICY, REFERENCE
from ..runs.folder import Found

_ADAPTERS = {"policy": POLICY, "reference": REFERENCE, "start": "start"}  # as PEFT calls them


@dataclass
class Lineup:
    """The loaded models; `using(name)` makes forward passes go through one of them."""

    models: Models
    tokenizer: PreTrainedTokenizerBase
    found: Found
    base: Base
    half: torch.dtype | None  # what autocast computes in, if it is on

    @property
    def model(self) -> PeftModel:
        return self.models.peft

    @property
    def head(self) -> Head:
        return self.models.head

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def names(self) -> list[str]:
        """The models that are computed, each different from the others."""
        return self.found.names

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Inside, forward passes compute `name`'s, in eval mode, without gradients and in the type of training."""
        name = self.found.which(name)
        self.model.eval()
        with torch.no_grad(), self.models.autocast():
            if name not in self.found.folders:  # the base, or a start that is the base
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(_ADAPTERS[name], inference_mode=True)
                yield

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of these models, as JSON: base, types, and each adapter's SHA-256."""
        digests = {
            m: hashlib.sha256((f / ADAPTER_WEIGHTS).read_bytes()).hexdigest() for m, f in self.found.folders.items()
        }
        words = {torch.bfloat16: "bf16", torch.float16: "fp16", None: str(self.head.weight.dtype)[6:]}
        return {
            **self.base.settings(),
            **Facts.of(self.model.get_base_model()).settings(),
            "compute": words[self.half],
            "device": self.device.type,
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

    `base_model`: where the base lies now. `dtype`: computing type instead of the run's. Raises a `LoratError` where a
    part is missing or does not fit.
    """
    policy = found.folders["policy"]
    recorded = PeftConfig.from_pretrained(str(policy)).base_model_name_or_path
    if not (name := base_model or recorded):
        raise ModelError(f"{str(policy)!r} does not say what its base is; give it with --base-model.")
    saved, on_gpu = found.settings, torch.cuda.is_available() and not cpu
    autocast = {k: on_gpu and bool(saved.get(k)) for k in ("bf16", "fp16")}
    if not saved:
        autocast["bf16"] = on_gpu and torch.cuda.is_bf16_supported(False)
    if dtype:
        autocast = {"bf16": on_gpu and dtype == "bfloat16", "fp16": on_gpu and dtype == "float16"}
    half = torch.bfloat16 if autocast["bf16"] else torch.float16 if autocast["fp16"] else None
    here = (policy / "tokenizer_config.json").is_file()
    base = Base.from_settings(
        {**saved, **autocast, **({"dtype": dtype} if dtype else {})},
        name,
        tokenizer=str(policy) if here else saved.get("tokenizer_name_or_path"),
        trust_remote_code=trust_remote_code,
        device="cuda" if on_gpu else "cpu",
        **({} if in_4bit is None else {"four_bit": in_4bit}),
    )
    tokenizer = load_tokenizer(base)
    check_tokenizer(tokenizer)
    reference = found.folders.get("reference")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*was renamed.*")  # as --base-model asks
        model = attach(
            load_base(base),
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
    under = lambda: torch.autocast(  # noqa: E731
        "cuda" if on_gpu else "cpu", half or torch.float16, enabled=half is not None
    )
    models = Models(model, autocast=computing(model, half == torch.bfloat16, under))
    check_head(models, models.head.weight.device)
    return Lineup(models, tokenizer, found, base, half)
