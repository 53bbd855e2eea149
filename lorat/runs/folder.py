"""Where the models of a run lie: its policy, reference and start, read from a folder for what it has.

A run's folder, one of its checkpoints, or any PEFT LoRA adapter, which is then a policy without a past. Adapters are
compared tensor by tensor, since one that computes what another does need not be computed again: a reference that never
moved, or a start with B = 0, which is the base. Costs reading the adapters; no model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ModelError, first_line
from ..model.adapters import ADAPTER_WEIGHTS, adapter_folder
from ..reference import REFERENCE
from . import checkpoint as ck

MODELS = ("policy", "reference", "start", "base")
_SCALE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass
class Found:
    """Where a run's models lie: `folders[model]`; `same_as`: models that compute what another does; notes for people.

    The base has no folder, nor has a start that is the base.
    """

    folders: dict[str, Path]
    settings: dict[str, Any]
    same_as: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The models that are computed, each different from the others."""
        return [m for m in MODELS if m not in self.same_as and (m in self.folders or m in ("start", "base"))]

    def which(self, model: str) -> str:
        """The model that is computed for `model`; raises `ModelError`, saying what to give, if there is none."""
        model = self.same_as.get(model, model)
        if model not in self.names:
            raise ModelError(f"{self.folders['policy']} has no {model}. {' '.join(self.notes)}")
        return model


def models_of(run: str, reference: str | None = None, start: str | None = None) -> Found:
    """Policy, reference and start of a run, a checkpoint or any PEFT LoRA adapter (folder or hub id).

    `reference`, `start`: adapters to take instead. Raises `ModelError` where there is no adapter.
    """
    if Path(run).is_dir() and not (Path(run) / ADAPTER_WEIGHTS).is_file() and (found := ck.checkpoints(Path(run))):
        raise ModelError(
            f"the run in {run!r} has not ended, so it has no adapter yet; give its checkpoint, {found[0]}."
        )
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
        out.same_as["base"] = "start"
        out.notes.append("No start/ is recorded: the policy's start is taken to be the base; --start names an adapter.")
    there = adapter_folder(reference) if reference else _reference(policy, settings, out.folders.get("start"))
    if there:
        out.folders["reference"] = there
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
    """Take out adapters that compute what another does, and say so."""
    if "start" in out.folders and _null(out.folders["start"]):
        out.same_as["base"] = "start"
        del out.folders["start"]
        out.notes.append("The policy started from the base itself (its first adapter is zero): start is the base.")
    if "reference" not in out.folders:
        return
    mine = out.folders["reference"]
    equals: list[str] = [m for m in ("start", "policy") if m in out.folders and _same(mine, out.folders[m])]
    if _null(mine):
        equals.append(out.same_as.get("base", "base"))
    if equals:
        out.same_as["reference"] = equals[0]
        del out.folders["reference"]
        out.notes.append(f"The reference computes what the {equals[0]} does: they are shown once, as {equals[0]}.")


def _weights(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by name, as they lie on disk; raises `ModelError` for a file that cannot be read."""
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
    weights = _weights(folder)
    b = {k: t for k, t in weights.items() if ".lora_B" in k or ".lora_embedding_B" in k}
    plain = all(k in b or ".lora_A" in k or ".lora_embedding_A" in k for k in weights)
    return bool(b) and plain and not any(t.any() for t in b.values())
