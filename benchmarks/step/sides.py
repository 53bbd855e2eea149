"""One side of `benchmarks.step.throughput`, TRL or lorat, in a process of its own: build, train, measure, write a result.

`python -m benchmarks.step.sides RESULT`, with the case as JSON on standard input; `benchmarks.step.throughput` starts it. Both
sides get the same random base, the same policy values (away from the reference, so that a wrong sign or beta shows at
step 1), the same token ids in the same order and the same settings of the same `transformers.Trainer`. What is changed
of TRL is in `TRL_CHANGES`.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.step import models, workloads

Case = dict[str, Any]
APART = 0.01  # standard deviation of the policy's B at the start; the reference's is 0
TRL_CHANGES = [
    "CPU: trl.trainer.utils._use_triton answers yes, so that the head gets completion positions alone, as on CUDA "
    "(by itself TRL sends every position of every row to the head on a CPU); its arithmetic stays plain torch",
    "_prepare_dataset returns its argument: the data is tokenised already",
    "KTO: KL_completion_ids is the completion of the next example of the batch, as in lorat, not of the one before",
    "training_step also keeps the loss it returns (on both sides)",
]


LIBRARIES = {"trl": ["trl.trainer.dpo_trainer", "trl.trainer.kto_trainer"], "lorat": ["lorat.train.trainer"]}


class Recorded:
    """A mixin for a Trainer: keeps the loss of every step on the device."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of a device batch, a scalar (), as the Trainer computes it."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("recorded", []).append(loss.detach())
        return loss


class Meter(TrainerCallback):
    """Seconds from the end of one step to the end of the next, tokens that entered the model, and peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []
        self.passes = [0, 0]  # tokens without and with gradient, in the step in progress
        self.tokens: list[list[int]] = []

    def watch(self, model: Any) -> None:
        """Count at the input embedding, which every pass of the model enters once, checkpointing or not."""

        def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            """`args[0]`: token ids (B, T)."""
            self.passes[torch.is_grad_enabled()] += args[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(count)

    def stamp(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        reset_peak(self.device)
        self.stamp()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # what came before is no step: on a GPU lorat rehearses its heaviest pack
            self.opening = peak(self.device, 0)["peak"]
            reset_peak(self.device)
            self.stamps.clear()
            self.passes = [0, 0]
            self.stamp()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stamp()
        self.tokens.append(self.passes)
        self.passes = [0, 0]


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def held(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 1e6 if device.type == "cuda" else resident("VmRSS")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now


def peak(device: torch.device, before: float) -> dict[str, float | None]:
    """MB: `base` after the model was built, `peak` of the steps, `above` their difference; `opening`: before them."""
    cuda = device.type == "cuda"
    most = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident("VmHWM")
    reserved = torch.cuda.max_memory_reserved() / 1e6 if cuda else None
    return {"base": before, "peak": most, "above": most - before, "reserved": reserved}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Never used to tokenise: it tells both sides that 0 pads, 1 ends, and how many tokens there are."""
    words = {"<pad>": 0, "<end>": 1} | {f"<{i}>": i for i in range(2, vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def common(case: Case, folder: str) -> dict[str, Any]:
    """Settings of `TrainingArguments` that both sides share."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=case["pairs"],
        num_train_epochs=1,
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        use_cpu=case["device"] == "cpu",
        bf16=case["dtype"] == "bfloat16",
        train_sampling_strategy="sequential",
        max_length=case["max_length"],
        beta=case["beta"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def policy_(model: Any) -> None:
    """Give the policy its start: A as PEFT draws it, B a little away from 0; exact in bf16, where TRL's QLoRA is kept."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".default." in name:
            scale = APART if "lora_B" in name else 1 / math.sqrt(3 * p.shape[1])
            p.data.copy_((scale * torch.randn(p.shape, generator=generator)).bfloat16())


def lorat_trainer(case: Case, model: Any, folder: str, meter: Meter) -> Any:
    from lorat.settings.config import CHECKPOINTING, TrustRegionConfig
    from lorat.train.trainer import TrustRegionTrainer

    settings = common(case, folder) | {
        "method": case["method"],
        "sync": "frozen",
        "load_in_4bit": case["load_in_4bit"],
        "lora_r": case["lora_r"],
        "lora_alpha": 2 * case["lora_r"],
        "prefix_sharing": True,  # raises, and says why, where a fallback would be measured
        CHECKPOINTING: case["checkpointing"],
    }
    if case["max_tokens_per_pack"]:
        settings["max_tokens_per_pack"] = case["max_tokens_per_pack"]
    side = type("LoratSide", (Recorded, TrustRegionTrainer), {})
    data = Dataset.from_list(case["examples"])
    return side(
        model,
        TrustRegionConfig(**settings),
        data,
        processing_class=tokenizer(model.config.vocab_size),
        callbacks=[meter],
    )


def trl_trainer(case: Case, model: Any, folder: str, meter: Meter) -> Any:
    import trl
    from trl.trainer import utils

    if case["device"] == "cpu":
        assert "_use_triton" in vars(utils), "this TRL chooses the head's positions in another way: look again"
        utils._use_triton = lambda device: True  # this module asks it for nothing else
    kto = case["method"] == "kto"
    config: Any
    trainer: Any
    settings = common(case, folder) | {"gradient_checkpointing": case["checkpointing"]}
    if kto:
        config, trainer = trl.KTOConfig(**settings), trl.KTOTrainer
    else:
        loss = [{"dpo": "sigmoid", "ipo": "ipo"}[case["method"]]]
        config, trainer = trl.DPOConfig(loss_type=loss, **settings), trl.DPOTrainer
    lora = LoraConfig(
        r=case["lora_r"], lora_alpha=2 * case["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrap = case["trl_reference"] == "adapter"  # TRL copies a given adapter into `ref`; else it turns its own off
    side = type("TrlSide", (Recorded, trainer), {"_prepare_dataset": lambda self, dataset, *_: dataset})
    examples = [dict(e) for e in case["examples"]]
    if kto:
        for i in range(0, len(examples), case["pairs"]):
            batch = examples[i : i + case["pairs"]]
            for example, other in zip(batch, workloads.mismatched(batch)):
                example["KL_completion_ids"] = other
    return side(
        get_peft_model(model, lora) if wrap else model,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer(model.config.vocab_size),
        callbacks=[meter],
        peft_config=None if wrap else lora,
    )


def measure(case: Case, folder: str) -> dict[str, Any]:
    """Losses of all steps; seconds and tokens of each step; memory. Or `refused`, or `out_of_memory`, and why."""
    from lorat.model.base import keep_trainable_on_cpu_

    for name in LIBRARIES[case["side"]]:
        importlib.import_module(name)  # before memory is read for the first time
    device = torch.device(case["device"])
    if case["memory_cap"] and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case["memory_cap"] / whole))
    try:
        model = models.build(case["shape"], device, getattr(torch, case["dtype"]), case["load_in_4bit"])
        keep_trainable_on_cpu_(model)  # without it a 4-bit layer on a CPU may lose its gradient
        gc.collect()
        before = held(device)
        meter = Meter(device)
        make = {"trl": trl_trainer, "lorat": lorat_trainer}[case["side"]]
        try:
            trainer = make(case, model, folder, meter)
        except ValueError as error:
            if "batch size must be > 1" in str(error):  # TRL's KTO
                return {"refused": str(error)}
            raise
        policy_(trainer.model)
        meter.watch(trainer.model.get_base_model())
        trainer.train()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    return {
        "losses": [loss.item() for loss in trainer.recorded],
        "seconds": [b - a for a, b in zip(meter.stamps, meter.stamps[1:])],
        "tokens": [{"no_gradient": n, "gradient": g} for n, g in meter.tokens],
        "memory_mb": peak(device, before) | {"opening": meter.opening},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        Path(sys.argv[1]).write_text(json.dumps(measure(json.load(sys.stdin), scratch)))
