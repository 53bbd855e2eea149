"""Every setting once, as data: what help, typos, contradictions, overrides and a resume's identity read.

Imports nothing, so that asking about settings costs nothing. lorat's own settings are `OWN`; of transformers' fields the
names are here, and what they mean to a resumed run. A new method is one line in `METHODS`.
"""

GROUPS = ("Model", "Data", "Method", "Reference", "Adapter", "Run")


class Setting:
    """One setting. `kind`: the type of its values; `choices`: all that it takes; None is taken where it is the default.

    `null`: whether None is taken besides. `harmless`: it does not bend a run's trajectory beyond rounding, so that a
    resumed run may change it.
    """

    def __init__(self, default, kind, help, choices=(), null=False, harmless=False) -> None:
        self.default, self.kind, self.help, self.choices = default, kind, help, choices
        self.null, self.harmless, self.group = null or default is None, harmless, ""


# Method -> how it is written, and the settings that belong to it beside beta.
METHODS = {
    "dpo": ("DPO", ("label_smoothing", "robust", "length_normalize", "sft_weight")),
    "ipo": ("IPO", ("length_normalize", "sft_weight")),
    "kto": ("KTO", ("desirable_weight", "undesirable_weight")),
    "apo_zero": ("APO-zero", ("sft_weight",)),
    "hypo": ("HyPO", ("sft_weight",)),
}

# How the reference moves -> the settings that belong to it. Names of whole settings (trl, lag-100) leave `sync_space` open.
SYNC = {
    "frozen": (),
    "soft": ("sync_alpha", "sync_every", "sync_space"),
    "hard": ("sync_every",),
    "adaptive": ("sync_alpha", "sync_every", "sync_limit", "sync_distance", "sync_space"),
}
NAMED_SYNC = ("sync_space",)

_MODEL = {
    "model_name_or_path": Setting(None, str, "Base model: a hub id or a local folder."),
    "model_revision": Setting(None, str, "Branch, tag or commit of a hub model."),
    "tokenizer_name_or_path": Setting(  # harmless: the data is known by its tokens
        None, str, "Tokenizer, where it is not in the model's folder.", harmless=True
    ),
    "trust_remote_code": Setting(
        False, bool, "Run Python code that comes with the model. Off unless you ask.", harmless=True
    ),
    "attn_implementation": Setting(None, str, "Attention of transformers: sdpa, eager, flash_attention_2 …"),
    "dtype": Setting(
        "auto",
        str,
        "Type of what stays unquantised; auto follows bf16/fp16.",
        choices=("auto", "bfloat16", "float16", "float32"),
    ),
    "load_in_4bit": Setting(True, bool, "Load the base in 4-bit with bitsandbytes."),
    "bnb_4bit_quant_type": Setting("nf4", str, "4-bit data type.", choices=("nf4", "fp4")),
    "bnb_4bit_use_double_quant": Setting(True, bool, "Quantise the quantisation constants too (saves 0.37 bit)."),
    "quantize_embeddings": Setting(
        None,
        str,
        "Hold the input embeddings in 8 or 4 bits, where they are not the head's as well.",
        choices=("8bit", "4bit"),
    ),
}
_DATA = {
    "dataset_name": Setting(
        None, str, "A hub id, a folder, a JSON, JSONL, CSV, TSV or Parquet file (.gz … too), or a pattern of files."
    ),
    "dataset_config_name": Setting(None, str, "Configuration (subset) of a hub dataset."),
    "dataset_split": Setting("train", str, "Split to train on; slices such as train[:1000] work."),
    "eval_dataset_name": Setting(
        None, str, "Dataset to evaluate on; dataset_name if only its split is given.", harmless=True
    ),
    "eval_dataset_split": Setting(None, str, "Split to evaluate on, e.g. test or train[90%:].", harmless=True),
    "datasets": Setting(
        None,
        list[str | dict],
        "More datasets: names, or mappings of name, split, config, weight, max_rows, columns (docs/data_files.md).",
    ),
    "dataset_num_proc": Setting(None, int, "Processes that tokenise the data. Unset: one.", harmless=True),
    "max_length": Setting(1024, int, "Longest prompt + completion in tokens (usual: 512 to 2048).", null=True),
    "max_prompt_length": Setting(
        None, int, "Longest prompt in tokens; its end is kept. Unset: shortened only where max_length asks for it."
    ),
    "overlong": Setting("truncate", str, "What to do with a row beyond max_length.", choices=("truncate", "drop")),
    "columns": Setting(
        None,
        dict[str, str | None],
        "Which column is which: prompt=question,chosen=good,rejected=bad,system=sys … (docs/data.md).",
    ),
    "dialogues": Setting(
        None,
        str,
        "chat: texts, Human:/Assistant: dialogues too, become messages; text: messages become such a dialogue. Unset: as "
        "written.",
        choices=("chat", "text"),
    ),
    "rankings": Setting(
        "best_worst",
        str,
        "Pairs from a row with many ranked or scored answers: best against worst, or all.",
        choices=("best_worst", "all_pairs"),
    ),
    "user_endings": Setting(
        "keep",
        str,
        "The user's words at the end of an answer: train on them, cut them, or drop the row.",
        choices=("keep", "cut", "drop"),
    ),
    "chat_template_kwargs": Setting(
        None,
        dict,
        "Given to the chat template for every row, e.g. {enable_thinking: false}; a row's own win.",
    ),
}
_METHOD = {
    "method": Setting(
        "dpo",
        str,
        "Loss: DPO, IPO, KTO, APO-zero, or HyPO (DPO that ignores a pessimistic reference).",
        choices=tuple(METHODS),
    ),
    "beta": Setting(0.1, float, "Strength of the tie to the reference (usual: 0.01 to 0.5; the TR paper: 0.05)."),
    "label_smoothing": Setting(0.0, float, "DPO: share of labels assumed flipped (0 to 0.5): conservative DPO."),
    "robust": Setting(False, bool, "DPO: the unbiased form of label smoothing (rDPO)."),
    "length_normalize": Setting(
        None, bool, "Per-token means of log-ratios instead of sums. Unset: on for IPO, off for DPO."
    ),
    "desirable_weight": Setting(1.0, float, "KTO: weight of desirable completions."),
    "undesirable_weight": Setting(1.0, float, "KTO: weight of undesirable completions."),
    "sft_weight": Setting(
        0.0, float, "Pairs: weight of the chosen completion's mean negative log-likelihood (RPO; usual: 0.1 to 1)."
    ),
}
_REFERENCE = {
    "sync": Setting(
        "soft",
        str,
        "How the reference moves: frozen, soft (blend), hard (copy), adaptive (when the policy has gone far), or by name: "
        "paper-soft, paper-hard, trl, lag-100 (any lag).",
    ),
    "sync_alpha": Setting(
        None,
        float,
        "Share of the policy in each blend, ref = a*policy + (1-a)*ref. Unset: 0.6 (soft), 1 (adaptive: a copy).",
    ),
    "sync_every": Setting(
        None, int, "Optimiser steps between updates (adaptive: at least so many). Unset: 512, adaptive 32."
    ),
    "sync_limit": Setting(
        None, float, "adaptive: move when reference/drift, nats a token, exceeds this (usual: 0.01 to 0.1)."
    ),
    "sync_distance": Setting(
        None, float, "adaptive: move when the weights are further apart than this share of the policy's own change."
    ),
    "sync_space": Setting(
        None,
        str,
        "Blend what the adapters do (product), or their factors. Unset: product.",
        choices=("product", "factors"),
    ),
    "ref_rank": Setting(None, int, "Rank of the reference; 2 * lora_r keeps blends closer to exact. Unset: lora_r."),
    "ref_adapter": Setting(None, str, "Start the reference from this adapter, not from the policy."),
    "save_reference": Setting(False, bool, "Keep the final reference beside the policy, in ref/.", harmless=True),
}
_ADAPTER = {
    "policy_adapter": Setting(None, str, "Go on training this LoRA adapter (an SFT adapter, say)."),
    "check_adapter_base": Setting(True, bool, "Refuse an adapter whose recorded base is another model.", harmless=True),
    "lora_r": Setting(16, int, "Rank of the adapters (usual: 8 to 64)."),
    "lora_alpha": Setting(32, int, "LoRA scale: alpha/r, or alpha/sqrt(r) with use_rslora."),
    "lora_dropout": Setting(0.0, float, "Dropout on the adapter's input."),
    "lora_target_modules": Setting(["all-linear"], list, "Modules to adapt: all-linear (never the head), or names."),
    "use_rslora": Setting(False, bool, "Rank-stabilised scale alpha/sqrt(r)."),
    "use_dora": Setting(False, bool, "Weight-decomposed LoRA (DoRA)."),
}
_RUN = {
    "max_tokens_per_pack": Setting(
        8192,
        int,
        "Tokens in one forward pass, padding included: decides memory, never the mathematics.",
        harmless=True,
    ),
    "gpu_memory": Setting(
        None,
        str,
        "Set max_tokens_per_pack to the most that fits: 12GiB, say, or auto for what the GPU has free.",
        harmless=True,
    ),
    "prefix_sharing": Setting(
        None, bool, "Compute each prompt once and pad nothing. Unset: wherever a check at the start finds it exact."
    ),
    "overwrite_output_dir": Setting(False, bool, "Delete an earlier run of lorat found in output_dir.", harmless=True),
}
OWN = _MODEL | _DATA | _METHOD | _REFERENCE | _ADAPTER | _RUN
for _group, _settings in zip(GROUPS, (_MODEL, _DATA, _METHOD, _REFERENCE, _ADAPTER, _RUN), strict=True):
    for _setting in _settings.values():
        _setting.group = _group

# transformers' fields with a default of lorat's own.
DEFAULTS = {
    "learning_rate": Setting(1e-5, float, "Peak learning rate (LoRA: 5e-6 to 5e-5)."),
    "logging_steps": Setting(10, float, "Optimiser steps between logs."),
    "bf16": Setting(None, bool, "bf16 autocast. Unset: where the GPU has it."),
    "gradient_checkpointing": Setting(None, bool, "Older name of activation_checkpointing. Unset: on."),
    "remove_unused_columns": Setting(False, bool, "Stays off: lorat needs its columns."),
    "logging_nan_inf_filter": Setting(False, bool, "Stays off: a non-finite loss stops a run."),
}
# Those used most, as help shows them; their defaults are transformers'. `kind`: a word where it is an enumeration of names.
TRAINER = {
    "output_dir": Setting(None, str, "Folder for checkpoints and the finished adapter."),
    "learning_rate": DEFAULTS["learning_rate"],
    "num_train_epochs": Setting(3.0, float, "Passes over the training data."),
    "max_steps": Setting(-1, int, "Optimiser steps of the run, instead of num_train_epochs."),
    "per_device_train_batch_size": Setting(8, int, "Pairs (KTO: completions) per device and accumulation step."),
    "gradient_accumulation_steps": Setting(1, int, "Such batches in one optimiser step."),
    "warmup_steps": Setting(0, float, "Steps until the peak learning rate; below 1: share of the run."),
    "lr_scheduler_type": Setting("linear", "name", "linear, cosine, constant, constant_with_warmup …"),
    "max_grad_norm": Setting(1.0, float, "Clip the gradient's norm here; 0: never."),
    "optim": Setting("adamw_torch_fused", "name", "adamw_torch_fused, paged_adamw_8bit …"),
    "activation_checkpointing": Setting(None, bool, "Recompute activations in the backward pass. Unset: on."),
    "bf16": DEFAULTS["bf16"],
    "seed": Setting(42, int, "Seed of the adapter's first values and of the order of the data."),
    "logging_steps": DEFAULTS["logging_steps"],
    "report_to": Setting("none", "name or list", "none, tensorboard, wandb …, or a list of them."),
    "eval_strategy": Setting(
        "no",
        str,
        "When to evaluate during the run; at its end always, if there is data for it.",
        choices=("no", "steps", "epoch"),
    ),
    "eval_steps": Setting(None, float, "Optimiser steps between evaluations. Unset: logging_steps."),
    "save_steps": Setting(500, float, "Optimiser steps between checkpoints."),
    "save_total_limit": Setting(None, int, "Newest checkpoints to keep. Unset: all."),
    "resume_from_checkpoint": Setting(
        None, "folder, true or auto", "true: the newest whole one; auto: the same or a fresh start; or a folder."
    ),
}
# Refused, each with a reason.
REFUSED = (
    *("auto_find_batch_size", "deepspeed", "fsdp", "label_smoothing_factor"),
    *("neftune_noise_alpha", "use_liger_kernel"),
)
# Nothing that a person would set: parts of what is refused, and switches without effect here.
IDLE = (
    *("fsdp_config", "liger_kernel_config", "local_rank", "do_train", "do_eval", "do_predict"),
    *("remove_unused_columns", "logging_nan_inf_filter"),
)
NOT_SETTABLE = ("parallelism_config",)  # takes an object that no file can hold

# What a run records of transformers' settings, to compare when it is resumed. `world_size` is no field but decides as much.
RECORDED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "seed", "data_seed", "bf16", "fp16", "world_size", "dataloader_drop_last"),
    *("lr_scheduler_kwargs", "optim_args", "ignore_data_skip"),
)
# What bends no trajectory: where results go, what is watched and saved, how fast it goes. What is in neither may
# decide a run, if not by itself (reduce_on_plateau reads metric_for_best_model), and is not compared yet.
HARMLESS = (
    # where and under which name
    *(
        "output_dir",
        "run_name",
        "project",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
    ),
    *("hub_always_push", "hub_revision", "trackio_space_id", "trackio_static_space_id", "trackio_bucket_id"),
    # what is logged and measured
    *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step"),
    *("logging_steps", "logging_nan_inf_filter", "report_to", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("do_eval", "do_predict", "do_train", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("batch_eval_metrics", "prediction_loss_only", "include_for_metrics", "bf16_full_eval", "fp16_full_eval", "debug"),
    # what is saved, and resuming itself
    *(
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_each_node",
        "save_only_model",
        "enable_jit_checkpoint",
    ),
    *("load_best_model_at_end", "resume_from_checkpoint"),
    *("restore_callback_states_from_checkpoint",),
    # speed and memory
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_multiprocessing_context", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cache"),
    *("torch_empty_cache_steps", "ddp_backend", "ddp_bucket_cap_mb", "ddp_timeout", "ddp_static_graph", "local_rank"),
    *("ddp_find_unused_parameters", "ddp_broadcast_buffers", "remove_unused_columns"),
)
# The rest of them; a field of a newer transformers that is in no list may decide a run.
OTHER = (
    *("accelerator_config", "auto_find_batch_size", "average_tokens_across_devices", "dataloader_in_order"),
    *("deepspeed", "fsdp", "fsdp_config", "full_determinism", "greater_is_better", "label_names"),
    *("label_smoothing_factor", "length_column_name", "liger_kernel_config", "metric_for_best_model"),
    *("neftune_noise_alpha", "optim_target_modules", "parallelism_config", "tf32", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "train_sampling_strategy", "use_cpu", "use_liger_kernel"),
)
INHERITED = tuple(name for name in (*RECORDED, *HARMLESS, *OTHER) if name != "world_size")
