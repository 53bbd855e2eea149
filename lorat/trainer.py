"""The trainer: the one place where model, losses and configuration meet.

transformers' `Trainer` runs the loop, the optimiser, the schedule, logging and several GPUs. lorat adds what
a moving reference needs: a device batch is the statistical unit and is split into packs by a token budget;
the loss of an optimiser step is the mean over its examples, whatever the packs, the accumulation or the
ranks; the reference moves after the step. Checkpoints are in `trainer_checkpoint.py`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as PlainProgressCallback

from .adapters import attach, lora_config, record_base_, train_policy_only_
from .base import check_fit, load_base, load_tokenizer
from .callbacks import ProgressCallback, ReferenceCallback, SignalCallback, Throughput, opening_lines
from .checkpoint import last_whole
from .config import TrustRegionConfig
from .data import DataReport, check_budget, extent, prepare
from .engine import Baseline, Engine
from .errors import ConfigError, NonFiniteError
from .logprobs import Head, check_head
from .metrics import Averages
from .objectives import Outcome, objective
from .packing import Batch, Packer, collate
from .probe import why_not
from .reference import POLICY, adapter_parameters, distance, snapshot
from .tokenization import check_tokenizer
from .trainer_checkpoint import CheckpointMixin
from .trainer_evaluation import EvaluationMixin


@dataclass
class Step:
    """An optimiser step in progress: its batches on this rank, and the number of its examples on all ranks."""

    batches: list[Batch]
    count: float
    baseline: Baseline | None = None


class TrustRegionTrainer(CheckpointMixin, EvaluationMixin, Trainer):
    """Trains a LoRA policy on preference data against a reference that moves: TR-DPO, TR-IPO, TR-KTO.

    `model`: a name, a base model, or a `PeftModel` whose adapter `default` is the policy. `args`: a
    `TrustRegionConfig`. Datasets: any format `lorat.data` reads, or already tokenised. `processing_class`: the
    tokenizer. `peft_config`: the adapter, instead of the `lora_*` fields. Raises a `LoratError` before training
    for whatever cannot work.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: TrustRegionConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else TrustRegionConfig()
        if isinstance(model, str):
            args.model_name_or_path = model
        if args.eval_strategy != "no" and eval_dataset is None:
            when = getattr(args.eval_strategy, "value", args.eval_strategy)
            raise ConfigError(f"eval_strategy={when} needs data; give eval_dataset, or set it to no.")
        tokenizer = processing_class if processing_class is not None else load_tokenizer(args)
        check_tokenizer(tokenizer)
        self.reports: list[DataReport] = []
        train_dataset = self._prepared(train_dataset, tokenizer, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._prepared(d, tokenizer, args, f"eval_{k}") for k, d in eval_dataset.items()}
        else:
            eval_dataset = self._prepared(eval_dataset, tokenizer, args, "eval")
        base = load_base(args) if model is None or isinstance(model, str) else model
        torch.manual_seed(args.seed)  # the adapter's first values do not depend on what was drawn before
        model = attach(
            base,
            peft_config if peft_config is not None else lora_config(args),
            policy_adapter=args.policy_adapter,
            ref_adapter=args.ref_adapter,
            check_base=args.check_adapter_base,
        )
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        data = {f"eval_{k}" if k else "eval": d for k, d in held_out.items()} | {"train": train_dataset}
        data = {name: d for name, d in data.items() if d is not None}
        greatest, longest = extent(list(data.values()))
        check_fit(model.get_base_model(), greatest, longest)
        record_base_(args, model)
        if args.checkpointing:
            model.enable_input_require_grads()  # else a frozen embedding leaves lora_B at zero under checkpointing
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process, one GPU; several GPUs are for torchrun
        self.rule = args.update_rule()
        self.averages, self.eval_averages = Averages(), Averages()
        self.tokens = Throughput()
        self.separate: str | None = None  # why prompts are not shared
        self._step: Step | None = None
        self._suspects: list[tuple[list[int], Tensor]] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        head = Head.of(self.model)
        check_head(self.model, head, args.device)
        shared = self._can_share(head, longest)
        for name, dataset in data.items():
            check_budget(dataset, args.max_tokens_per_pack, shared, name)
        packer = Packer(shared, args.max_tokens_per_pack, check_tokenizer(tokenizer))
        self.engine = Engine(self.model, head, objective(args.method), packer, args, self.accelerator)
        self.start = snapshot(self.model, POLICY)
        for plain in (PlainProgressCallback, PrinterCallback):
            self.remove_callback(plain)
        self.signals, self.progress = SignalCallback(self), ProgressCallback(self)
        for callback in (ReferenceCallback(self), self.signals, self.progress):
            self.add_callback(callback)

    def _prepared(self, dataset: Dataset | None, tokenizer: Any, args: TrustRegionConfig, name: str) -> Dataset | None:
        if dataset is None:
            return None
        dataset, report = prepare(
            dataset,
            tokenizer,
            method=args.method,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            overlong=args.overlong,
            name=name,
        )
        self.reports.append(report)
        return dataset

    def _can_share(self, head: Head, longest: int) -> bool:
        """Whether packs share prompts: as `prefix_sharing` says, or as the probe finds."""
        if self.args.prefix_sharing is False:
            return False
        self.separate = why_not(self.model, head, self.args.device, longest, self.accelerator.autocast)
        if self.separate and self.args.prefix_sharing:
            name = type(self.model.get_base_model()).__name__
            raise ConfigError(
                f"prefix_sharing=True cannot work with {name}: {self.separate}. Remove it: each completion then has a "
                "row of its own, which is exact for every model."
            )
        return not self.separate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser over the policy's tensors, chosen by name; raises `ConfigError` if it got any other."""
        train_policy_only_(self.model)
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if given != {id(p) for p in adapter_parameters(self.model, POLICY).values()}:
            raise ConfigError(
                "the optimiser does not hold the policy's tensors and nothing else; pass none of your own."
            )
        return optimizer

    def opening_lines(self, steps: int) -> list[str]:
        """How the reference will move in a run of `steps` optimiser steps, in words."""
        lines = opening_lines(self.rule, self.args.beta, steps)
        if self.separate:
            lines.append(f"Packs: one padded row a completion, since this model cannot share prompts: {self.separate}.")
        return lines

    # ---- an optimiser step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [s["batch"] for s in samples]
        self._leave_out_filler(batches)
        count = torch.tensor(float(sum(sum(b.weights) for b in batches)), device=self.args.device)
        self._step = Step(batches, self.engine.summed(count).item())
        return samples, None

    def _leave_out_filler(self, batches: list[Batch]) -> None:
        """Weight 0 for the examples that accelerate repeats to give every rank a full last batch."""
        at_end = self.accelerator.gradient_state.end_of_dataloader
        if self.args.world_size == 1 or not batches or not at_end or self.args.dataloader_drop_last:
            return
        # accelerate's own `remainder` is missing in the epoch that a resumed run goes on with
        remainder = len(self.train_dataset) % (self.args.per_device_train_batch_size * self.args.world_size)
        if not remainder:
            return
        last = batches[-1]
        real = min(max(remainder - self.args.process_index * len(last), 0), len(last))
        last.weights = [1.0] * real + [0.0] * (len(last) - real)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Backpropagate a device batch, pack by pack; returns its share of the step's mean loss."""
        model.train()
        if callable(into_train_mode := getattr(self.optimizer, "train", None)):
            into_train_mode()  # schedule-free optimisers
        step, batch = self._step, inputs["batch"]
        assert step is not None, "get_batch_samples comes first"
        if step.baseline is None:
            step.baseline = self.engine.baseline(step.batches)
            self.tokens.local += step.baseline.tokens
            self._suspects.clear()
        self.tokens.local += self.engine.packer.tokens(self.engine.groups(batch))
        packs = self.engine.packs(batch)
        total = torch.zeros((), device=self.args.device)
        for i, indices in enumerate(packs):
            sync = contextlib.nullcontext() if i == len(packs) - 1 else self.accelerator.no_sync(model)
            with sync:
                out, weights = self.engine.outcome(model, batch, indices, step.baseline)
                # DDP averages gradients over ranks, the Trainer averages losses: both want the sum.
                loss = (out.losses * weights).sum() * (self.args.world_size / step.count)
                self.accelerator.backward(loss)
            total += loss.detach()
            self._suspects.append(([batch.examples[j]["row"] for j in indices], out.losses.detach()))
            self._record(self.averages, out, weights)
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """The gradient norm, and the gate before the optimiser: nothing non-finite passes."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rows = [row for rows, _ in self._suspects for row in rows]
        finite = torch.cat([values for _, values in self._suspects]).isfinite().tolist()  # one wait for the device
        bad = [row for row, ok in zip(rows, finite, strict=True) if not ok]
        lost = self.engine.summed(torch.tensor(float(len(bad)))).item() > 0
        if lost or not (self.args.fp16 or torch.isfinite(torch.as_tensor(grad_norm)).item()):
            rows = bad if lost else rows
            rows = gather_object(rows) if self.args.world_size > 1 else rows
            what = "loss" if lost else f"gradient (norm {float(grad_norm)})"
            last, _ = last_whole(self.run_dir)
            advice = "Start again"
            if last is not None:
                advice = f"Start a new run from {last.name} (policy_adapter: {last}, ref_adapter: {last / 'ref'})"
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the {what} is not finite, for dataset rows {rows[:16]}"
                f"{' …' if len(rows) > 16 else ''}. The run stopped before the policy, the reference or a checkpoint "
                f"could take it in. {advice} in another output_dir, without those rows, with a lower learning_rate or a "
                "lower max_grad_norm."
            )
        return grad_norm

    def _record(self, averages: Averages, out: Outcome, weights: Tensor) -> None:
        averages.add("loss", out.losses, weights)
        for name, (values, own) in out.metrics.items():
            averages.add(name, values, own * weights)

    # ---- logs and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add lorat's metrics to a training log, averaged over the examples since the last one."""
        if "loss" in logs:
            logs.update(self.averages.means(self.engine.summed))
            self.averages.reset()
            logs["reference/updates"] = self.rule.updates
            logs["reference/lag"] = self.rule.age
            logs["reference/distance"] = distance(self.model)
            logs["start/distance"] = distance(self.model, POLICY, self.start)
            logs["num_tokens"], logs["tokens_per_second"] = self.tokens.lap(self.engine.summed)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate needs input_ids in the batch; `num_tokens` says what was done
