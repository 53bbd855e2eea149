"""Which settings a resumed run may change, and which of transformers' fields decide a run. Imports nothing."""

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
