"""The settings of TRL's DPO and KTO trainers, said in lorat's words.

Only what means the same is translated, and every translation is noted; what lorat has no counterpart
for is refused with a reason, never dropped in silence. TRL itself is not imported.
"""

from __future__ import annotations

from typing import Any

from .inherited import CHECKPOINTING
from .sources import shown

_OTHER = "gradient_checkpointing" if CHECKPOINTING == "activation_checkpointing" else "activation_checkpointing"

# Other name -> lorat's name of the same setting.
ALIASES = {
    _OTHER: CHECKPOINTING,
    f"{_OTHER}_kwargs": f"{CHECKPOINTING}_kwargs",
    "dataset_config": "dataset_config_name",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "torch_dtype": "dtype",
    "ref_model_mixup_alpha": "sync_alpha",
    "ref_model_sync_steps": "sync_every",
}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"method": "dpo"},
    "sigmoid_norm": {"method": "dpo", "length_normalize": True},
    "robust": {"method": "dpo", "robust": True},
    "ipo": {"method": "ipo"},
    "kto": {"method": "kto"},
}
# TRL's names without a counterpart of the same type.
TRL_TYPES: dict[str, Any] = {
    "torch_dtype": str,
    "sync_ref_model": bool,
    "loss_type": str | list[str],
    "use_peft": bool,
    "disable_dropout": bool,
}
# Names that lorat does not have, and what to do about it.
ADVICE = {
    "lr": "set learning_rate",
    "epochs": "set num_train_epochs",
    "num_epochs": "set num_train_epochs",
    "batch_size": "set per_device_train_batch_size and gradient_accumulation_steps",
    "micro_batch_size": "set per_device_train_batch_size and gradient_accumulation_steps",
    "tau": "set sync_every",
    "alpha": "set sync_alpha (the reference) or lora_alpha (the adapters)",
    "model": "set model_name_or_path",
    "dataset": "set dataset_name",
    "evaluation_strategy": "set eval_strategy",
    "warmup_ratio": "set warmup_steps, which below 1 is a share of the run",
    "max_seq_length": "set max_length",
    "precompute_ref_log_probs": "the reference moves, so nothing can be computed ahead; remove it",
    "padding_free": "lorat forms its own packs; set max_tokens_per_pack",
    "load_in_8bit": "lorat loads 4-bit or unquantised weights; set load_in_4bit",
    "reference_free": "every method of lorat needs its reference; remove it",
}
Problems = list[tuple[str, str]]


def setting_of(key: str) -> str:
    """lorat's setting that `key`, TRL's name or lorat's, decides first of all."""
    return {"sync_ref_model": "sync", "loss_type": "method"}.get(key) or ALIASES.get(key, key)


def translate(given: dict[str, Any]) -> tuple[dict[str, Any], list[str], Problems]:
    """TRL's names in typed `given` -> lorat's; also notes, and (key, sentence) for what cannot be translated."""
    names = {*ALIASES, *TRL_TYPES}
    out = {key: value for key, value in given.items() if key not in names}
    trl = {key: value for key, value in given.items() if key in names and value is not None}
    notes: list[str] = []
    problems: Problems = []
    source: dict[str, str] = {}

    def put(old: str, new: str, value: Any) -> None:
        if out.get(new) is not None and out[new] != value:
            other = source.get(new, new)
            told = f"{old}: {shown(trl[old])} and {other}: {shown(trl.get(other, out[new]))}"
            problems.append((old, f"{told} say different things about one setting; keep one of the two."))
            return
        out[new], source[new] = value, source.get(new, old)
        notes.append(f"{old}: {shown(trl[old])} → {new}: {shown(value)}")

    _sync(trl, out, put, notes, problems)
    for old, new in ALIASES.items():
        if old in trl:
            put(old, new, trl[old].removeprefix("torch.") if old == "torch_dtype" else trl[old])
    if "loss_type" in trl:
        _loss(trl["loss_type"], out, put, notes, problems)
    if trl.get("use_peft") is False:
        problems.append(("use_peft", "use_peft: false asks for full training, but lorat trains adapters; remove it."))
    if trl.get("disable_dropout") is False:
        why = "policy and reference must agree, so the base runs without dropout; set lora_dropout or remove it."
        problems.append(("disable_dropout", f"disable_dropout: false cannot be had: {why}"))
    for key, why in (("use_peft", "always so"), ("disable_dropout", "the base always runs without dropout")):
        if trl.get(key):
            notes.append(f"{key}: true → left out ({why})")
    return out, notes, problems


def _sync(trl: dict, out: dict, put: Any, notes: list[str], problems: Problems) -> None:
    knobs = [key for key in ("ref_model_mixup_alpha", "ref_model_sync_steps") if key in trl]
    if trl.get("sync_ref_model"):
        put("sync_ref_model", "sync", "soft")
        for old, default in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
            new = ALIASES[old]
            if old not in trl and out.get(new) is None:
                out[new] = default
                notes.append(f"{old} (TRL's default) → {new}: {default}")
    elif "sync_ref_model" in trl:
        put("sync_ref_model", "sync", "frozen")
        for key in knobs:
            notes.append(f"{key}: {shown(trl.pop(key))} → left out (sync_ref_model is false)")
    elif knobs and out.get("sync") is None:
        for key in knobs:
            told = f"{key}: {shown(trl.pop(key))} without sync_ref_model does nothing in TRL"
            problems.append((key, f"{told}; set sync_ref_model: true to move the reference, or remove it."))


def _loss(value: str | list[str], out: dict, put: Any, notes: list[str], problems: Problems) -> None:
    kinds = [value] if isinstance(value, str) else list(value)
    if len(kinds) != 1 or kinds[0] not in LOSSES:
        why = "mixes losses" if len(kinds) > 1 else "is no loss of lorat"
        problems.append(("loss_type", f"loss_type: {shown(value)} {why}; set one of: {', '.join(LOSSES)}."))
        return
    for new, setting in LOSSES[kinds[0]].items():
        put("loss_type", new, setting)
    if kinds[0].startswith("sigmoid") and out.get("label_smoothing"):
        notes.append(f"label_smoothing: {out['label_smoothing']} smooths here (cDPO); TRL's sigmoid ignores it")
