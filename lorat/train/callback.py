"""A moving reference for any Trainer of transformers or TRL whose model is a PEFT model.

TRL's `sync_ref_model` refuses PEFT (NotImplementedError, huggingface/trl#3108): with an adapter its reference is the
base with the adapter switched off, unless the model has an adapter `ref`, which its DPO and KTO trainers then use. This
callback adds that adapter as a copy of the policy, moves it by an update rule after each optimiser step, and carries
both through checkpoints: `checkpoint-N/ref/` (safetensors) and `checkpoint-N/reference_state.json`.

At a resume reference and policy are those that were saved or the run stops: the state holds digests of their tensors,
and it does not matter whether transformers, PEFT or this callback put them back. Left out: the loss, and drift, which a
callback cannot see (use `distance_limit`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import CheckpointError, ConfigError, ModelError
from ..files import put_json
from ..reference import POLICY, REFERENCE, UpdateRule, adapter_parameters, copy_, paired
from ..reference.moving import MovingReference

logger = logging.getLogger("lorat")

STATE = "reference_state.json"


class ReferenceSyncCallback(TrainerCallback, ExportableState):
    """Moves adapter `target` toward adapter `source` after each optimiser step, as `rule` says.

    Pass it to the trainer's constructor (`callbacks=[...]`) rather than to `add_callback`: the reference is then there
    before anything is computed or loaded. `rule`: an `UpdateRule`, or its settings as a mapping. Logs
    `reference/updates`, `reference/lag` (the reference's age in steps), `reference/distance` and `reference/error`. Raises `ConfigError`
    for what cannot work, `ModelError` for adapters that do not pair up, `CheckpointError` where the saved reference
    cannot be put back exactly.
    """

    def __init__(self, rule: UpdateRule | Mapping[str, Any], source: str = POLICY, target: str = REFERENCE) -> None:
        self.rule = rule if isinstance(rule, UpdateRule) else UpdateRule(**rule)
        self.source, self.target = source, target
        self.saved: dict[str, Any] | None = None
        self._model: PeftModel | None = None
        if target in (source, POLICY):
            raise ConfigError(
                f"target={target!r} cannot be the reference: it is the policy, or has PEFT's own name for it; leave 'ref'."
            )
        if self.rule.needs_drift:
            raise ConfigError(
                f"drift_limit={self.rule.drift_limit}: a callback sees no log-probs, so it knows no drift. Set "
                "distance_limit instead, or train with lorat's own trainer."
            )

    # ---- what transformers keeps in trainer_state.json ----

    def state(self) -> dict[str, Any]:
        """The rule's settings and state, and digests of both adapters, as of now."""
        settings = {f.name: value for f, value in zip(fields(self.rule), asdict(self.rule).values()) if f.init}
        arguments = {"rule": settings, "source": self.source, "target": self.target}
        saved = self.saved
        if self._model is not None:
            saved = {"rule": self.rule.state_dict(), "digest": digest(self._model, self.target)}
            saved["policy"] = digest(self._model, self.source)
        return {"args": arguments, "attributes": {"saved": saved}}

    # ---- events ----

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        self._attach(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if getattr(args, "precompute_ref_log_probs", False) and self.rule.moves:
            raise ConfigError(
                "precompute_ref_log_probs=True computes the reference's log-probs once, but this reference moves; set "
                "it to False."
            )
        peft = self._attach(model)
        if state.global_step > 0:
            self._restore(peft, args, state)
        else:  # steps count from 1 again
            self.rule.load_state_dict({"updates": 0, "last_step": 0, "age": self.rule.age})
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self._moving().after_step(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add to the log's history, and to `logs` for the callbacks that come after this one."""
        if self._model is None or logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        more = self._moving().logs()
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write the reference and the state into the checkpoint that has just been written."""
        if self._model is None or not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            logger.warning(f"{folder} is not there, so the reference was not saved with it; a resume may refuse.")
            return
        self._model.save_pretrained(str(folder), selected_adapters=[self.target], save_embedding_layers=False)
        content = {"step": state.global_step, **self.state()["attributes"]["saved"]}
        put_json(folder / STATE, content)

    def _moving(self) -> MovingReference:
        assert self._model is not None, "on_train_begin comes first"
        return MovingReference(self._model, self.rule, self.source, self.target)

    # ---- the adapter ----

    def _attach(self, model: Any) -> PeftModel:
        """The PEFT model with a reference that no optimiser trains; made as a copy of the policy where it is missing."""
        model = getattr(model, "module", model)  # as DDP wraps it
        if not isinstance(model, PeftModel) or self.source not in model.peft_config:
            held = sorted(model.peft_config) if isinstance(model, PeftModel) else type(model).__name__
            raise ModelError(
                f"a moving reference needs a PEFT model with an adapter {self.source!r}, this one is or has: {held}. "
                "Give the trainer a peft_config, or name the trained adapter as source."
            )
        if self.target not in model.peft_config:
            model.add_adapter(self.target, copy.deepcopy(model.peft_config[self.source]))
            for p in adapter_parameters(model, self.target).values():
                p.data = p.data.float()  # in 16 bits a slow blend is lost in rounding
            copy_(model, self.source, self.target)
        try:
            paired(model, self.source, self.target, any_rank=True)
        except ValueError as error:
            raise ModelError(f"adapter {self.target!r} cannot be the reference of this policy: {error}") from error
        for p in adapter_parameters(model, self.target).values():
            p.requires_grad_(False)
        self._model = model
        return model

    def _restore(self, model: PeftModel, args: Any, state: Any) -> None:
        """Rule and reference as they were at `state.global_step`, verified by the digest.

        transformers hands a callback no folder. It loads sub-folders with adapters itself, so the reference is mostly
        there already, from wherever the run was resumed; else the folders that can be known are tried.
        """
        named = getattr(args, "resume_from_checkpoint", None)
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        folders = [Path(named), *folders] if isinstance(named, str) else folders
        stored = state.stateful_callbacks.get(type(self).__name__) or {}
        saved = stored.get("attributes", {}).get("saved") if isinstance(stored, dict) else None
        if saved and stored["args"]["rule"] != self.state()["args"]["rule"]:
            logger.warning(f"resuming with the rule {self.rule}, saved was {stored['args']['rule']}: not the same run.")
        for folder in folders:
            if saved is None and (folder / STATE).is_file():
                saved = json.loads((folder / STATE).read_text())
        if saved is None:
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} was written without this callback: it holds no state of a "
                f"reference (looked in {', '.join(map(str, folders))}). Start a new run from its adapter instead."
            )
        self._put_back(model, self.target, saved["digest"], folders, state.global_step)
        # transformers before 5.23 loads the adapters that it finds in sub-folders, and then not the policy beside them
        if "policy" in saved:
            self._put_back(model, self.source, saved["policy"], folders, state.global_step)
        self.rule.load_state_dict(saved["rule"])

    def _put_back(self, model: PeftModel, adapter: str, wanted: str, folders: list[Path], step: int) -> None:
        """Load `adapter` from the first of `folders` that holds it with the digest `wanted`, unless it is there already."""
        if digest(model, adapter) == wanted:
            return
        inside = "adapter_model.safetensors" if adapter == "default" else f"{adapter}/adapter_model.safetensors"
        for folder in folders:
            there = (folder / inside).is_file() and self._load_(model, folder / inside, adapter)
            if there and digest(model, adapter) == wanted:
                return
        who = "reference" if adapter == self.target else "policy"
        raise CheckpointError(
            f"the {who} of step {step} could not be put back: no {inside} with the saved digest in "
            f"{', '.join(map(str, folders))}. Set resume_from_checkpoint in the training arguments to the checkpoint's "
            "folder, whole as it was saved."
        )

    @torch.no_grad()
    def _load_(self, model: PeftModel, weights: Path, adapter: str) -> bool:
        try:
            set_peft_model_state_dict(model, load_file(weights), adapter_name=adapter)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            logger.warning(f"{weights} could not be read: {error}")
            return False
        return True


def digest(model: PeftModel, adapter: str) -> str:
    """SHA-256 over names, dtypes, shapes and bits of an adapter's tensors."""
    found = hashlib.sha256()
    for name, p in sorted(adapter_parameters(model, adapter).items()):
        found.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
