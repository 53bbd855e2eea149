"""The settings of a run: `transformers.TrainingArguments` and what lorat adds to them.

Types stand here, all else that is known of a setting in `table.py`; what may not be combined is in `validation.py`.
A field earns its place with a test in which two values give different results. What is left unset stays so, and has its
value in a copy (`resolved`). Costs nothing: no model, tokenizer or dataset is touched.
"""

from __future__ import annotations

import copy
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..methods import METHODS, Method
from ..reference import Adaptive, Frozen, Hard, Soft, Space, UpdateRule, preset
from .inherited import CHECKPOINTING
from .table import DEFAULTS, OWN, RECORDED, SYNC
from .validation import check_config

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..model.base import Base
    from ..plan.workload import Workload

_CHECKPOINTING = tuple(dict.fromkeys((CHECKPOINTING, "gradient_checkpointing")))  # names of one and the same
_SEEN = {"bf16", *_CHECKPOINTING}


def _own(name: str) -> Any:
    """A field as the table has it; what is inherited has no group."""
    setting = OWN.get(name) or DEFAULTS[name]
    metadata = {"help": setting.help} | ({"group": setting.group} if setting.group else {})
    if isinstance(setting.default, list):
        return field(default_factory=lambda: list(setting.default), metadata=metadata)
    return field(default=setting.default, metadata=metadata)


@dataclass
class TrustRegionConfig(TrainingArguments):
    """Settings of `TrustRegionTrainer` and of `lorat train`.

    Raises `ConfigError` that lists every contradiction at once, before anything is loaded.
    What is left unset stays so here, and has its value in `resolved()`; nothing else ever writes to it.
    Defaults that differ from `TrainingArguments`: learning rate 1e-5, `logging_steps` 10, activation
    checkpointing on, bf16 where the GPU has it.
    """

    model_name_or_path: str | None = _own("model_name_or_path")
    model_revision: str | None = _own("model_revision")
    tokenizer_name_or_path: str | None = _own("tokenizer_name_or_path")
    trust_remote_code: bool = _own("trust_remote_code")
    attn_implementation: str | None = _own("attn_implementation")
    dtype: str = _own("dtype")
    load_in_4bit: bool = _own("load_in_4bit")
    bnb_4bit_quant_type: str = _own("bnb_4bit_quant_type")
    bnb_4bit_use_double_quant: bool = _own("bnb_4bit_use_double_quant")
    quantize_embeddings: str | None = _own("quantize_embeddings")

    dataset_name: str | None = _own("dataset_name")
    dataset_config_name: str | None = _own("dataset_config_name")
    dataset_split: str = _own("dataset_split")
    eval_dataset_name: str | None = _own("eval_dataset_name")
    eval_dataset_split: str | None = _own("eval_dataset_split")
    datasets: list[str | dict[str, Any]] | None = _own("datasets")  # noqa: RUF009
    dataset_num_proc: int | None = _own("dataset_num_proc")
    max_length: int | None = _own("max_length")
    max_prompt_length: int | None = _own("max_prompt_length")
    overlong: str = _own("overlong")
    columns: dict[str, str | None] | None = _own("columns")  # noqa: RUF009
    dialogues: str | None = _own("dialogues")
    rankings: str = _own("rankings")
    user_endings: str = _own("user_endings")
    chat_template_kwargs: dict[str, Any] | None = _own("chat_template_kwargs")  # noqa: RUF009

    method: str = _own("method")
    beta: float = _own("beta")
    label_smoothing: float = _own("label_smoothing")
    robust: bool = _own("robust")
    length_normalize: bool | None = _own("length_normalize")
    desirable_weight: float = _own("desirable_weight")
    undesirable_weight: float = _own("undesirable_weight")
    sft_weight: float = _own("sft_weight")

    sync: str = _own("sync")
    sync_alpha: float | None = _own("sync_alpha")
    sync_every: int | None = _own("sync_every")
    sync_limit: float | None = _own("sync_limit")
    sync_distance: float | None = _own("sync_distance")
    sync_space: Space | None = _own("sync_space")  # noqa: RUF009
    ref_rank: int | None = _own("ref_rank")
    ref_adapter: str | None = _own("ref_adapter")
    save_reference: bool = _own("save_reference")

    policy_adapter: str | None = _own("policy_adapter")
    check_adapter_base: bool = _own("check_adapter_base")
    lora_r: int = _own("lora_r")
    lora_alpha: int = _own("lora_alpha")
    lora_dropout: float = _own("lora_dropout")
    lora_target_modules: list[str] = _own("lora_target_modules")  # noqa: RUF009
    use_rslora: bool = _own("use_rslora")
    use_dora: bool = _own("use_dora")

    max_tokens_per_pack: int = _own("max_tokens_per_pack")
    gpu_memory: str | None = _own("gpu_memory")
    prefix_sharing: bool | None = _own("prefix_sharing")
    overwrite_output_dir: bool = _own("overwrite_output_dir")

    # Inherited, with defaults that differ.
    learning_rate: float = _own("learning_rate")
    logging_steps: float = _own("logging_steps")
    bf16: bool | None = _own("bf16")  # type: ignore[assignment]  # None until it is resolved
    gradient_checkpointing: bool | None = _own("gradient_checkpointing")
    remove_unused_columns: bool = _own("remove_unused_columns")
    logging_nan_inf_filter: bool = _own("logging_nan_inf_filter")

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        check_config(self)
        if self.disable_tqdm is None:  # else it follows transformers' log level
            self.disable_tqdm = False
        unset = self._unset()
        before = {name: getattr(self, name) for name in _SEEN & unset.keys()}
        for name in before:  # transformers checks these, and derives others from them
            setattr(self, name, unset[name])
        super().__post_init__()
        for name, value in before.items():
            setattr(self, name, value)

    def resolved(self) -> TrustRegionConfig:
        """A copy in which everything that was left unset has its value: what lorat and transformers work on.

        Shares nothing that can be written to; this object stays as it was set.
        """
        out = copy.copy(self)
        for f in fields(self):
            if isinstance(value := getattr(self, f.name, None), list | dict | AcceleratorConfig):
                setattr(out, f.name, copy.deepcopy(value))
        for name, value in self._unset().items():
            setattr(out, name, value)
        return out

    def _unset(self) -> dict[str, Any]:
        """The values of the settings that were left unset, or that a name stands for."""
        out: dict[str, Any] = {}
        if self.bf16 is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
            out["bf16"] = bool(on_gpu and not self.fp16)
        if self.length_normalize is None:
            out["length_normalize"] = self.method == "ipo"
        if getattr(self, CHECKPOINTING) is None and self.gradient_checkpointing is None:
            out |= {name: True for name in _CHECKPOINTING}
        given = next((v for n in _CHECKPOINTING if isinstance(v := getattr(self, f"{n}_kwargs"), dict)), {})
        out |= {f"{name}_kwargs": {"use_reentrant": False, **given} for name in _CHECKPOINTING}
        return out | self._unset_sync()

    def _unset_sync(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        sync, alpha, every = self.sync, self.sync_alpha, self.sync_every
        if sync not in SYNC:
            rule = preset(sync)
            sync, every = "hard" if rule.alpha == 1 else "soft", rule.every
            alpha = rule.alpha if sync == "soft" else None
            out |= {"sync": sync, "sync_alpha": alpha, "sync_every": every}
        if sync in ("soft", "adaptive"):
            if alpha is None:
                out["sync_alpha"] = 0.6 if sync == "soft" else 1.0
            if self.sync_space is None:
                out["sync_space"] = "product"
        if sync != "frozen" and every is None:
            out["sync_every"] = 32 if sync == "adaptive" else 512
        return out

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the unquantised weights are loaded in, and 4-bit weights are dequantised to."""
        if self.dtype == "auto":
            bf16 = self._unset().get("bf16", self.bf16)
            return torch.bfloat16 if bf16 else torch.float16 if self.fp16 else torch.float32
        return getattr(torch, self.dtype)

    @property
    def device(self) -> torch.device:
        """This process's device; older transformers number the CPU of each rank, which `torch.load` does not take."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return bool(self._unset().get(CHECKPOINTING, getattr(self, CHECKPOINTING)))

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

    def loss(self) -> Method:
        """The method with its settings, those fields that it has."""
        kind, c = METHODS[self.method], self.resolved()
        return kind(**{f.name: getattr(c, f.name) for f in fields(kind)})

    def workload(self) -> Workload:
        """What a training step takes memory for."""
        from ..plan.workload import Workload

        c = self.resolved()
        return Workload(
            base=c.base(),
            adapter=c.adapter(),
            ref_rank=c.ref_rank,
            half=torch.bfloat16 if c.bf16 else torch.float16 if c.fp16 else None,
            checkpointing=c.checkpointing,
            checkpointing_kwargs=getattr(c, f"{CHECKPOINTING}_kwargs"),
            checkpointing_setting=CHECKPOINTING,
            optimiser=str(getattr(c.optim, "value", c.optim)),
            optimiser_args=c.optim_args,
            unit=METHODS[c.method].unit,
            examples=c.per_device_train_batch_size,
            max_length=c.max_length,
            prefix_sharing=c.prefix_sharing,
            product_blends=c.sync in ("soft", "adaptive") and c.sync_space == "product",
        )

    def update_rule(self) -> UpdateRule:
        """A fresh update rule of the reference, as the fields describe it."""
        c = self.resolved()
        if c.sync == "frozen":
            return Frozen()
        assert c.sync_every is not None
        if c.sync == "hard":
            return Hard(every=int(c.sync_every))
        assert c.sync_alpha is not None and c.sync_space is not None
        alpha, every = float(c.sync_alpha), int(c.sync_every)
        if c.sync == "adaptive":
            return Adaptive(c.sync_limit, c.sync_distance, every=every, alpha=alpha, space=c.sync_space)
        return Soft(alpha=alpha, every=every, space=c.sync_space)

    def own_fields(self) -> dict[str, Any]:
        """lorat's own settings as plain values, those left unset as they resolve, in declaration order."""
        c = self.resolved()
        return {f.name: getattr(c, f.name) for f in fields(c) if "group" in f.metadata}

    def identity(self) -> dict[str, Any]:
        """Every setting that decides a run's trajectory: what a resumed run has to have in common with it."""
        c = self.resolved()
        own = {k: v for k, v in c.own_fields().items() if not OWN[k].harmless}
        theirs = {k: getattr(c, k) for k in RECORDED if hasattr(c, k)}
        words = {k: str(getattr(v, "value", v)) for k, v in theirs.items() if k in ("optim", "lr_scheduler_type")}
        return own | theirs | words


def field_default(f: Any) -> Any:
    """The default of a dataclass field, factory or not; None where there is none."""
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else None
