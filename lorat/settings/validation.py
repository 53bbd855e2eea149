"""Which settings cannot be combined: every contradiction of a configuration, found at once.

A check is a condition and a sentence that says what was given, why it cannot work and what to set.
Only fields are looked at; whether files exist or a model fits its adapter is found where they are read.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..reference import PRESETS, preset
from .table import METHODS, NAMED_SYNC, OWN, SYNC

if TYPE_CHECKING:
    from .config import TrustRegionConfig


def check_config(config: TrustRegionConfig) -> None:
    """Raise one `ConfigError` that names every contradiction in `config`; return None if there is none."""
    problems = [*_choices(config), *_method(config), *_reference(config), *_adapter(config), *_data(config)]
    problems += [*_rows(config), *_datasets(config), *_run(config)]
    if problems:
        head = "This configuration cannot work:" if len(problems) > 1 else "This setting cannot work:"
        raise ConfigError("\n".join([head, *(f"  - {p}" for p in problems)]))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _choices(c: TrustRegionConfig):
    for name, setting in OWN.items():
        value = getattr(c, name)
        if setting.choices and value not in setting.choices and not (setting.null and value is None):
            yield f"{name}={value!r} is not known; set one of: {', '.join(setting.choices)}."


def _method(c: TrustRegionConfig):
    if not _number(c.beta) or c.beta <= 0:
        yield (
            f"beta={c.beta} would not tie the policy to the reference at all (or push it away); "
            "set beta above 0 (usual: 0.01 to 0.5)."
        )
    if not _number(c.label_smoothing) or not 0 <= c.label_smoothing < 0.5:
        yield (
            f"label_smoothing={c.label_smoothing} says that half of the labels or more are flipped; "
            "set 0 <= label_smoothing < 0.5."
        )
    if c.robust and c.method == "dpo" and not c.label_smoothing:
        yield "robust=True without label_smoothing is plain DPO; set label_smoothing (e.g. 0.1) or remove robust."
    for name in ("desirable_weight", "undesirable_weight"):
        if not _number(getattr(c, name)) or getattr(c, name) < 0:
            yield f"{name}={getattr(c, name)} would reward the opposite; set it to 0 or more."
    if not _number(c.sft_weight) or c.sft_weight < 0:
        yield f"sft_weight={c.sft_weight} would push the chosen completions away; set it to 0 or more."
    yield from _of_other_methods(c)


def _of_other_methods(c: TrustRegionConfig):
    """Settings that belong to methods of which none is chosen, as the table has it."""
    owners: dict[str, list[str]] = {}
    for method, (_, names) in METHODS.items():
        for name in names:
            owners.setdefault(name, []).append(method)
    for name, methods in owners.items():
        value = getattr(c, name)
        if c.method in methods or value == OWN[name].default or value is False:
            continue
        if (name, c.method) == ("length_normalize", "kto"):
            yield "length_normalize is not defined for KTO, whose baseline is a sum over tokens; remove it."
            continue
        *titles, last = (METHODS[m][0] for m in methods)
        known = f"{', '.join(titles)} and {last}" if titles else last
        yield f"{name}={value} belongs to {known}, method is {c.method}; remove it or set method: {methods[0]}."


def _reference(c: TrustRegionConfig):
    belong = SYNC.get(c.sync, NAMED_SYNC) if isinstance(c.sync, str) else NAMED_SYNC
    if c.sync_alpha is not None and (not _number(c.sync_alpha) or not 0 <= c.sync_alpha <= 1):
        yield (
            f"sync_alpha={c.sync_alpha} is outside [0, 1]: the reference would run past the policy or away from it; "
            "set a share between 0 (frozen) and 1 (copy)."
        )
    if c.sync_every is not None and (not _number(c.sync_every) or c.sync_every < 1 or c.sync_every % 1):
        yield (
            f"sync_every={c.sync_every} is not a number of optimiser steps; "
            "set a whole number of at least 1 (or sync: frozen, to never move the reference)."
        )
    named = c.sync not in tuple(SYNC)
    if named:
        try:
            preset(c.sync)
        except (ValueError, TypeError):
            known = [*SYNC, *(name for name in PRESETS if name not in SYNC)]
            near = difflib.get_close_matches(str(c.sync), known, 1)
            yield (
                f"sync={c.sync!r} is not known{f'; did you mean {near[0]}?' if near else ''}; "
                f"set one of: {', '.join(known)} (lag-100, say)."
            )
            named = False
    for name in ("sync_alpha", "sync_every"):
        if getattr(c, name) is None:
            continue
        if c.sync == "frozen":
            yield f"{name}={getattr(c, name)} moves a reference that sync=frozen holds still; remove one of them."
        if named:
            yield f"sync={c.sync} sets {name} itself, and {name}={getattr(c, name)} sets it again; remove one of them."
    if c.sync == "hard" and c.sync_alpha not in (None, 1, 1.0):
        yield f"sync=hard copies the policy, sync_alpha={c.sync_alpha} asks for a blend; set sync: soft or remove it."
    for name in ("sync_limit", "sync_distance"):
        value = getattr(c, name)
        if value is not None and (not _number(value) or value < 0):
            yield f"{name}={value} is no limit; set a number of at least 0 (usual: 0.01 to 0.1 nats a token)."
        if value is not None and name not in belong:
            yield f"{name}={value} belongs to sync: adaptive, sync is {c.sync}; remove one of them."
    if c.sync == "adaptive" and c.sync_limit is None and c.sync_distance is None:
        yield (
            "sync=adaptive has no limit, so the reference would never move; set sync_limit (nats a token, e.g. 0.03) or "
            "sync_distance (e.g. 0.5)."
        )
    if c.sync == "adaptive" and c.sync_alpha == 0:
        yield "sync=adaptive with sync_alpha=0 would never move the reference; set sync: frozen, or a share above 0."
    if c.sync_space is not None and "sync_space" not in belong:
        yield f"sync_space={c.sync_space} says how to blend, sync={c.sync} never does; remove one of them."
    if c.ref_rank is not None and (not _number(c.ref_rank) or c.ref_rank % 1 or c.ref_rank < (c.lora_r or 1)):
        yield f"ref_rank={c.ref_rank} cannot hold a policy of lora_r={c.lora_r}; set a whole number from there on."


def _adapter(c: TrustRegionConfig):
    for name in ("lora_r", "lora_alpha"):
        value = getattr(c, name)
        if not _number(value) or value < 1 or value % 1:
            yield f"{name}={value} is not a whole number of at least 1, as adapters need; set e.g. 16."
    if not _number(c.lora_dropout) or not 0 <= c.lora_dropout < 1:
        yield f"lora_dropout={c.lora_dropout} is not a probability below 1; set 0 <= lora_dropout < 1."
    if not c.lora_target_modules:
        yield "lora_target_modules is empty, so nothing would be trained; set all-linear or a list of module names."


def _data(c: TrustRegionConfig):
    if c.max_length is not None and (not _number(c.max_length) or c.max_length < 2):
        yield (
            f"max_length={c.max_length} has no room for a prompt token and a completion token; set 2 or more (or null)."
        )
    if c.max_prompt_length is not None and (not _number(c.max_prompt_length) or c.max_prompt_length < 1):
        yield f"max_prompt_length={c.max_prompt_length} leaves no prompt; set 1 or more, or remove it."
    longest, prompt = c.max_length, c.max_prompt_length
    if longest and prompt and _number(longest) and _number(prompt) and prompt >= longest > 1:
        yield (
            f"max_prompt_length={c.max_prompt_length} leaves no room for a completion in max_length={c.max_length}; "
            "set max_prompt_length below max_length."
        )


def _rows(c: TrustRegionConfig):
    for name, example in (("columns", "{prompt: question}"), ("chat_template_kwargs", "{enable_thinking: false}")):
        value = getattr(c, name)
        if value is not None and not isinstance(value, dict):
            yield f"{name}={value!r} is no mapping; write one, such as {name}: {example}."
    wrong = [
        f"{role}: {column}"
        for role, column in (c.columns.items() if isinstance(c.columns, dict) else ())
        if not _column(role, column)
    ]
    if wrong:
        yield f"columns has {', '.join(wrong)}, and maps a part of a row to a column's name; set e.g. prompt: question."


def _datasets(c: TrustRegionConfig):
    from ..data.mixture import Part

    for entry in c.datasets or ():
        try:
            Part.of(entry)
        except ConfigError as error:
            yield str(error)
    n = c.dataset_num_proc
    if n is not None and (not _number(n) or n < 1 or n % 1):
        yield f"dataset_num_proc={n} is no number of processes; set 1 or more, or remove it."


def _column(role: Any, column: Any) -> bool:
    return isinstance(role, str) and (column is None or isinstance(column, str))


def _run(c: TrustRegionConfig):
    if not _number(c.max_tokens_per_pack) or c.max_tokens_per_pack < 1:
        yield f"max_tokens_per_pack={c.max_tokens_per_pack} holds no token; set e.g. 8192."
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(c, name)
        if not _number(value) or value < 1:
            yield f"{name}={value} leaves an optimiser step without examples; set it to 1 or more."
    if not _number(c.learning_rate) or c.learning_rate <= 0:
        yield f"learning_rate={c.learning_rate} trains nothing; set it above 0 (LoRA: 5e-6 to 5e-5)."
    if c.max_steps <= 0 and c.num_train_epochs <= 0:
        yield f"num_train_epochs={c.num_train_epochs} and max_steps={c.max_steps} make no step; set one above 0."
    if c.remove_unused_columns:
        yield "remove_unused_columns=True would remove the columns that lorat trains on; remove it."
    if c.logging_nan_inf_filter:
        yield "logging_nan_inf_filter=True would hide a non-finite loss, at which lorat stops; remove it."
    if c.bf16 and c.fp16:
        yield "bf16 and fp16 are both on; keep bf16 (Ampere and newer) or fp16 (older cards)."
    if c.label_smoothing_factor:
        yield (
            f"label_smoothing_factor={c.label_smoothing_factor} smooths next-token labels, which preference losses do "
            "not have; set label_smoothing instead."
        )
    if c.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha adds noise to the policy that the reference does not see; remove it."
    if c.use_liger_kernel:
        yield "use_liger_kernel replaces the head that lorat computes log-probs with; remove it."
    if c.auto_find_batch_size:
        yield "auto_find_batch_size changes the mathematics to save memory; set max_tokens_per_pack instead."
    if c.enable_jit_checkpoint:
        yield "enable_jit_checkpoint is not needed: SIGTERM and Ctrl-C save a checkpoint as they are; remove it."
    if c.push_to_hub and str(getattr(c.hub_strategy, "value", c.hub_strategy)) != "end":
        yield f"hub_strategy={c.hub_strategy} uploads a checkpoint that is still being written; set hub_strategy: end."
    if c.deepspeed or c.fsdp:
        yield "deepspeed and fsdp shard a model that lorat keeps whole, in 4-bit, on each GPU; use torchrun alone."
    accelerator = c.accelerator_config
    split = (
        accelerator.get("split_batches") if isinstance(accelerator, dict) else getattr(accelerator, "split_batches", 0)
    )
    if split:
        yield "split_batches changes how many examples a rank holds; remove it from accelerator_config."
