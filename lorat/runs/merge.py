"""Fold a trained adapter into its base, so that the result needs neither PEFT nor bitsandbytes.

The adapter was trained on the base as 4-bit rounds it. Merged into the *original* 16-bit weights it meets
weights it never saw, and the rounding error comes back with the opposite sign; merged into the *dequantised*
ones it computes what was trained, up to the rounding of the output type. Both are measured against the
trained model on a few built-in sentences and the difference is reported. Runs on the CPU, since no small GPU
holds it: 4 bytes of host memory a parameter (28 GB for 6.9B).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import CheckpointError, ConfigError, ModelError
from ..model.adapters import adapter_folder
from ..model.base import Base, load_base, plain_embeddings_
from . import checkpoint as ck

SENTENCES = (
    "The river runs past the old mill and turns south below the bridge.",
    "Human: What should I pack for a week in the mountains?\n\nAssistant: Warm layers, a good map, and water.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: log-prob differences to the trained model, in nats a token, over `tokens` tokens."""

    out: Path
    base: str
    mean: float
    largest: float
    tokens: int

    def render(self) -> str:
        words = {"dequantized": "the base as 4-bit rounded it", "original": "the original weights"}
        what = words.get(self.base, "the base, which was not quantised in training")
        lines = [
            f"Merged into {what}: {self.out}",
            f"Against the trained model, log-probs of {self.tokens} tokens of sample text differ by {self.mean:.2g} nats "
            f"on average, {self.largest:.2g} at most.",
        ]
        if self.base == "original":
            lines.append(
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
    `dtype`: type to save in; "auto" is what the run computed in. Raises a `LoratError` where a part is missing.
    """
    if base not in ("original", "dequantized"):
        raise ConfigError(f"base={base!r} is not known; set original or dequantized.")
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{out!r} is not empty; name a new folder, so that nothing in it is overwritten.")
    folder = adapter_folder(run)
    name = base_model or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise ModelError(f"{run!r} does not say what its base is; give it with --base-model.")
    trained = Base.from_settings(_recorded(folder), name, trust_remote_code=trust_remote_code, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(folder if (folder / "tokenizer_config.json").exists() else name))
    rows = [tokenizer(s, return_tensors="pt")["input_ids"] for s in SENTENCES]

    model = load_base(trained)
    with_adapter = PeftModel.from_pretrained(model, str(folder))
    before = _token_logprobs(with_adapter, rows)
    if base == "dequantized" and trained.four_bit:
        model = with_adapter.unload().dequantize()
        plain_embeddings_(model)
    else:
        del with_adapter, model
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=trained.dtype,
            use_safetensors=True,
            revision=trained.revision or "main",
            trust_remote_code=trust_remote_code,
        )
    model = model.float()  # add in float32, round once
    merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    merged = merged.to(trained.dtype if dtype == "auto" else getattr(torch, dtype))
    after = _token_logprobs(merged, rows)
    merged.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    gap = (after - before).abs()
    return MergeReport(target, base if trained.four_bit else "plain", gap.mean().item(), gap.max().item(), gap.numel())


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings that the run wrote down; none for an adapter of other origin."""
    if (folder / ck.STATE).is_file():
        return ck.read_json(folder / ck.STATE)["run"]
    return ck.read_json(folder / ck.RUN) if (folder / ck.RUN).is_file() else {}


@torch.no_grad()
def _token_logprobs(model: torch.nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """Log-probs of every next token of `rows`, (K,) float32 on the host."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for ids in rows:
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        parts.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu())
    return torch.cat(parts)
