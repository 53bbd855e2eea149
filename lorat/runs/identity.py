"""What makes a run that run: every setting and datum that decides its trajectory, so that a resume can be checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.prepare import digest
from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..settings.config import TrustRegionConfig

# Settings that do not bend a run's trajectory beyond rounding, so that a resumed run may change them.
FREE = {
    "save_reference",
    "max_tokens_per_pack",
    "gpu_memory",
    "overwrite_output_dir",
    "eval_dataset_name",
    "eval_dataset_split",
    "check_adapter_base",
    "tokenizer_name_or_path",  # the data is known by its tokens
    "trust_remote_code",
}
TRAINER_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "world_size",
    "dataloader_drop_last",
    "lr_scheduler_kwargs",
    "optim_args",
    "ignore_data_skip",
)


def run_identity(args: TrustRegionConfig, train_dataset: Any) -> dict[str, Any]:
    """Every setting that decides a run's trajectory, and its tokenised data's size and SHA-256, as JSON has them."""
    own = {k: v for k, v in args.own_fields().items() if k not in FREE}
    theirs = {k: getattr(args, k) for k in TRAINER_FIELDS if hasattr(args, k)}
    plain = {k: str(getattr(v, "value", v)) if k in ("optim", "lr_scheduler_type") else v for k, v in theirs.items()}
    data = {}
    if train_dataset is not None:
        data = {"train_examples": len(train_dataset), "train_sha256": digest(train_dataset)}
    return json.loads(json.dumps({**own, **plain, **data}, default=str))


def check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` listing every setting that would bend a resumed run's trajectory."""
    changed = [f"{k}: {saved[k]!r} then, {now[k]!r} now" for k in now if k in saved and saved[k] != now[k]]
    if changed:
        lines = "\n".join(f"  - {line}" for line in changed)
        raise CheckpointError(
            f"{str(folder)!r} belongs to a run with other settings, so resuming would be neither that run nor a new "
            f"one:\n{lines}\nSet them back, or start a new run in another output_dir, with policy_adapter: {folder} and "
            f"ref_adapter: {folder / 'ref'}."
        )
