"""The settings of a run: `transformers.TrainingArguments` and what lorat adds to them.

Only fields and how they resolve live here; what may not be combined is in `validation.py`, names of
other tools are translated in `arguments.py`. A field earns its place with a test in which two values
give different results. Costs nothing: no model, tokenizer or dataset is touched.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from ..reference import Adaptive, Frozen, Hard, Soft, UpdateRule, preset
from .table import FREE, TRAINER_FIELDS
from .validation import SYNC, check_config

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..model.base import Base

# transformers renamed gradient_checkpointing to activation_checkpointing; older versions lack the new name.
_NAMES = {f.name for f in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"

GROUPS = ("Model", "Data", "Method", "Reference", "Adapter", "Run")


def _f(group: str, default: Any, help: str) -> Any:
    metadata = {"group": group, "help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrustRegionConfig(TrainingArguments):
    """Settings of `TrustRegionTrainer` and of `lorat train`.

    Raises `ConfigError` that lists every contradiction at once, before anything is loaded.
    Defaults that differ from `TrainingArguments`: learning rate 1e-5, `logging_steps` 10, activation
    checkpointing on, bf16 where the GPU has it.
    """

    model_name_or_path: str | None = _f("Model", None, "Base model: a hub id or a local folder.")
    model_revision: str | None = _f("Model", None, "Branch, tag or commit of a hub model.")
    tokenizer_name_or_path: str | None = _f("Model", None, "Tokenizer, where it is not in the model's folder.")
    trust_remote_code: bool = _f("Model", False, "Run Python code that comes with the model. Off unless you ask.")
    attn_implementation: str | None = _f("Model", None, "Attention of transformers: sdpa, eager, flash_attention_2 …")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _f(
        "Model", "auto", "Type of what stays unquantised; auto follows bf16/fp16."
    )
    load_in_4bit: bool = _f("Model", True, "Load the base in 4-bit with bitsandbytes.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _f("Model", "nf4", "4-bit data type.")
    bnb_4bit_use_double_quant: bool = _f("Model", True, "Quantise the quantisation constants too (saves 0.37 bit).")
    quantize_embeddings: Literal["8bit", "4bit"] | None = _f(
        "Model", None, "Hold the input embeddings in 8 or 4 bits, where they are not the head's as well."
    )

    dataset_name: str | None = _f(
        "Data", None, "A hub id, a folder, or a JSON, JSONL, CSV, TSV or Parquet file (.gz too)."
    )
    dataset_config_name: str | None = _f("Data", None, "Configuration (subset) of a hub dataset.")
    dataset_split: str = _f("Data", "train", "Split to train on; slices such as train[:1000] work.")
    eval_dataset_name: str | None = _f("Data", None, "Dataset to evaluate on; dataset_name if only its split is given.")
    eval_dataset_split: str | None = _f("Data", None, "Split to evaluate on, e.g. test or train[90%:].")
    max_length: int | None = _f("Data", 1024, "Longest prompt + completion in tokens (usual: 512 to 2048).")
    max_prompt_length: int | None = _f(
        "Data", None, "Longest prompt in tokens; its end is kept. Unset: shortened only where max_length asks for it."
    )
    overlong: Literal["truncate", "drop"] = _f("Data", "truncate", "What to do with a row beyond max_length.")
    columns: dict[str, str | None] | None = _f(  # noqa: RUF009
        "Data", None, "Which column is which: prompt=question,chosen=good,rejected=bad,system=sys … (docs/data.md)."
    )
    dialogues: Literal["chat", "text"] | None = _f(
        "Data",
        None,
        "chat: texts, Human:/Assistant: dialogues too, become messages; text: messages become such a dialogue. Unset: as "
        "written.",
    )
    rankings: Literal["best_worst", "all_pairs"] = _f(
        "Data", "best_worst", "Pairs from a row with many ranked or scored answers: best against worst, or all."
    )
    user_endings: Literal["keep", "cut", "drop"] = _f(
        "Data", "keep", "The user's words at the end of an answer: train on them, cut them, or drop the row."
    )
    chat_template_kwargs: dict[str, Any] | None = _f(  # noqa: RUF009
        "Data", None, "Given to the chat template for every row, e.g. {enable_thinking: false}; a row's own win."
    )

    method: Literal["dpo", "ipo", "kto", "apo_zero", "hypo"] = _f(
        "Method", "dpo", "Loss: DPO, IPO, KTO, APO-zero, or HyPO (DPO that ignores a pessimistic reference)."
    )
    beta: float = _f("Method", 0.1, "Strength of the tie to the reference (usual: 0.01 to 0.5; the TR paper: 0.05).")
    label_smoothing: float = _f("Method", 0.0, "DPO: share of labels assumed flipped (0 to 0.5): conservative DPO.")
    robust: bool = _f("Method", False, "DPO: the unbiased form of label smoothing (rDPO).")
    length_normalize: bool | None = _f(
        "Method", None, "Per-token means of log-ratios instead of sums. Unset: on for IPO, off for DPO."
    )
    desirable_weight: float = _f("Method", 1.0, "KTO: weight of desirable completions.")
    undesirable_weight: float = _f("Method", 1.0, "KTO: weight of undesirable completions.")
    sft_weight: float = _f(
        "Method", 0.0, "Pairs: weight of the chosen completion's mean negative log-likelihood (RPO; usual: 0.1 to 1)."
    )

    sync: str = _f(
        "Reference",
        "soft",
        "How the reference moves: frozen, soft (blend), hard (copy), adaptive (when the policy has gone far), or by name: "
        "paper-soft, paper-hard, trl, lag-100 (any lag).",
    )
    sync_alpha: float | None = _f(
        "Reference",
        None,
        "Share of the policy in each blend, ref = a*policy + (1-a)*ref. Unset: 0.6 (soft), 1 (adaptive: a copy).",
    )
    sync_every: int | None = _f(
        "Reference", None, "Optimiser steps between updates (adaptive: at least so many). Unset: 512, adaptive 32."
    )
    sync_limit: float | None = _f(
        "Reference", None, "adaptive: move when reference/drift, nats a token, exceeds this (usual: 0.01 to 0.1)."
    )
    sync_distance: float | None = _f(
        "Reference",
        None,
        "adaptive: move when the weights are further apart than this share of the policy's own change.",
    )
    sync_space: Literal["product", "factors"] | None = _f(
        "Reference", None, "Blend what the adapters do (product), or their factors. Unset: product."
    )
    ref_rank: int | None = _f(
        "Reference", None, "Rank of the reference; 2 * lora_r keeps blends closer to exact. Unset: lora_r."
    )
    ref_adapter: str | None = _f("Reference", None, "Start the reference from this adapter, not from the policy.")
    save_reference: bool = _f("Reference", False, "Keep the final reference beside the policy, in ref/.")

    policy_adapter: str | None = _f("Adapter", None, "Go on training this LoRA adapter (an SFT adapter, say).")
    check_adapter_base: bool = _f("Adapter", True, "Refuse an adapter whose recorded base is another model.")
    lora_r: int = _f("Adapter", 16, "Rank of the adapters (usual: 8 to 64).")
    lora_alpha: int = _f("Adapter", 32, "LoRA scale: alpha/r, or alpha/sqrt(r) with use_rslora.")
    lora_dropout: float = _f("Adapter", 0.0, "Dropout on the adapter's input.")
    lora_target_modules: list[str] = _f(  # noqa: RUF009
        "Adapter", ["all-linear"], "Modules to adapt: all-linear (never the head), or names."
    )
    use_rslora: bool = _f("Adapter", False, "Rank-stabilised scale alpha/sqrt(r).")
    use_dora: bool = _f("Adapter", False, "Weight-decomposed LoRA (DoRA).")

    max_tokens_per_pack: int = _f(
        "Run", 8192, "Tokens in one forward pass, padding included: decides memory, never the mathematics."
    )
    gpu_memory: str | None = _f(
        "Run", None, "Set max_tokens_per_pack to the most that fits: 12GiB, say, or auto for what the GPU has free."
    )
    prefix_sharing: bool | None = _f(
        "Run", None, "Compute each prompt once and pad nothing. Unset: wherever a check at the start finds it exact."
    )
    overwrite_output_dir: bool = _f("Run", False, "Delete an earlier run of lorat found in output_dir.")

    # Defaults that differ from TrainingArguments.
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate (LoRA: 5e-6 to 5e-5)."})
    logging_steps: float = field(default=10, metadata={"help": "Optimiser steps between logs."})
    bf16: bool | None = field(  # type: ignore[assignment]  # None until it is resolved
        default=None, metadata={"help": "bf16 autocast. Unset: where the GPU has it."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of activation_checkpointing. Unset: on."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays off: lorat needs its columns."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Stays off: a non-finite loss stops a run."})

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        check_config(self)
        if self.disable_tqdm is None:  # else it follows transformers' log level
            self.disable_tqdm = False
        if self.bf16 is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
            self.bf16 = bool(on_gpu and not self.fp16)
        if self.length_normalize is None:
            self.length_normalize = self.method == "ipo"
        self._resolve_sync()
        if getattr(self, CHECKPOINTING) is None and self.gradient_checkpointing is None:
            setattr(self, CHECKPOINTING, True)
        name = f"{CHECKPOINTING}_kwargs"
        if getattr(self, name) is None and self.gradient_checkpointing_kwargs is not None:
            name = "gradient_checkpointing_kwargs"
        setattr(self, name, {"use_reentrant": False, **(getattr(self, name) or {})})
        super().__post_init__()

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the unquantised weights are loaded in, and 4-bit weights are dequantised to."""
        if self.dtype == "auto":
            return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32
        return getattr(torch, self.dtype)

    @property
    def device(self) -> torch.device:
        """This process's device; older transformers number the CPU of each rank, which `torch.load` does not take."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return bool(getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing)

    def base(self) -> Base:
        """What to load as the base."""
        from ..model.base import Base

        return Base(
            name=self.model_name_or_path,
            revision=self.model_revision,
            tokenizer=self.tokenizer_name_or_path,
            trust_remote_code=self.trust_remote_code,
            attention=self.attn_implementation,
            dtype=self.torch_dtype,
            four_bit=self.load_in_4bit,
            quant_type=self.bnb_4bit_quant_type,
            double_quant=self.bnb_4bit_use_double_quant,
            quantize_embeddings=self.quantize_embeddings,
            device=torch.device("cpu") if self.use_cpu else self.device,
        )

    def adapter(self) -> LoraConfig:
        """The adapter that the `lora_*` fields describe, as PEFT takes it."""
        from peft import LoraConfig

        targets = list(self.lora_target_modules)
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def update_rule(self) -> UpdateRule:
        """A fresh update rule of the reference, as the fields describe it."""
        if self.sync == "frozen":
            return Frozen()
        assert self.sync_every is not None
        if self.sync == "hard":
            return Hard(every=int(self.sync_every))
        assert self.sync_alpha is not None and self.sync_space is not None
        alpha, every = float(self.sync_alpha), int(self.sync_every)
        if self.sync == "adaptive":
            return Adaptive(self.sync_limit, self.sync_distance, every=every, alpha=alpha, space=self.sync_space)
        return Soft(alpha=alpha, every=every, space=self.sync_space)

    def _resolve_sync(self) -> None:
        """A name of known settings becomes those settings; what is unset takes its default."""
        if self.sync not in SYNC:
            rule = preset(self.sync)
            self.sync, self.sync_every = "hard" if rule.alpha == 1 else "soft", rule.every
            self.sync_alpha = rule.alpha if self.sync == "soft" else None
        if self.sync in ("soft", "adaptive"):
            if self.sync_alpha is None:
                self.sync_alpha = 0.6 if self.sync == "soft" else 1.0
            self.sync_space = self.sync_space or "product"
        if self.sync != "frozen" and self.sync_every is None:
            self.sync_every = 32 if self.sync == "adaptive" else 512

    def own_fields(self) -> dict[str, Any]:
        """lorat's own settings as plain values, in declaration order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if "group" in f.metadata}

    def identity(self) -> dict[str, Any]:
        """Every setting that decides a run's trajectory: what a resumed run has to have in common with it."""
        own = {k: v for k, v in self.own_fields().items() if k not in FREE}
        theirs = {k: getattr(self, k) for k in TRAINER_FIELDS if hasattr(self, k)}
        words = {k: str(getattr(v, "value", v)) for k, v in theirs.items() if k in ("optim", "lr_scheduler_type")}
        return own | theirs | words


def field_default(f: Any) -> Any:
    """The default of a dataclass field, factory or not; None where there is none."""
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else None
