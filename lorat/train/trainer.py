"""The trainer: the one place where model, losses and configuration meet.

transformers' `Trainer` runs the loop, the optimiser, the schedule, logging and several GPUs. lorat adds what
a moving reference needs: a device batch is the statistical unit and is split into packs by a token budget;
the loss of an optimiser step is the mean over its examples, whatever the packs, the accumulation or the
ranks; the reference moves after the step. The step, evaluation and checkpoints are in `trainer_*.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as PlainProgressCallback

from ..data.prepare import DataReport, check_budget, extent, pack_sizes, prepare
from ..data.tokenization import check_tokenizer
from ..errors import ConfigError
from ..methods.objectives import objective
from ..model.adapters import attach, train_policy_only_
from ..model.base import Facts, check_fit, load_base, load_tokenizer
from ..model.fused import computing
from ..model.logprobs import Head, check_head
from ..model.probe import why_not
from ..packs.attention import install
from ..packs.packing import Packer, collate
from ..reference import POLICY, adapter_parameters, distance, snapshot
from ..settings.config import TrustRegionConfig
from .callbacks import ProgressCallback, SignalCallback, Throughput
from .checkpoint import CheckpointMixin
from .engine import Engine
from .evaluation import EvaluationMixin
from .metrics import Averages
from .movement import ReferenceCallback, opening_lines
from .rehearsal import RehearsalCallback
from .step import Step, StepMixin


class TrustRegionTrainer(StepMixin, CheckpointMixin, EvaluationMixin, Trainer):
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
        tokenizer = processing_class if processing_class is not None else load_tokenizer(args.base())
        check_tokenizer(tokenizer)
        self.reports: list[DataReport] = []
        train_dataset = self._prepared(train_dataset, tokenizer, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._prepared(d, tokenizer, args, f"eval_{k}") for k, d in eval_dataset.items()}
        else:
            eval_dataset = self._prepared(eval_dataset, tokenizer, args, "eval")
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        if args.gpu_memory:
            self._fit(args, model, [d for d in (train_dataset, *held_out.values()) if d is not None])
        base = load_base(args.base()) if model is None or isinstance(model, str) else model
        torch.manual_seed(args.seed)  # the adapter's first values do not depend on what was drawn before
        model = attach(
            base,
            peft_config if peft_config is not None else args.adapter(),
            policy_adapter=args.policy_adapter,
            ref_adapter=args.ref_adapter,
            ref_rank=args.ref_rank,
            check_base=args.check_adapter_base,
        )
        data = {f"eval_{k}" if k else "eval": d for k, d in held_out.items()} | {"train": train_dataset}
        data = {name: d for name, d in data.items() if d is not None}
        greatest, longest = extent(list(data.values()))
        check_fit(model.get_base_model(), greatest, longest)
        self.facts = Facts.of(model.get_base_model())
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
        self._start_cache: dict[bytes, list[Tensor]] = {}
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
        self._autocast = computing(self.model, bool(args.bf16), self.accelerator.autocast)
        head = Head.of(self.model)
        check_head(self.model, head, args.device)
        shared = self._can_share(head, longest)
        for name, dataset in data.items():
            check_budget(dataset, args.max_tokens_per_pack, shared, name)
        packer = Packer(shared, args.max_tokens_per_pack, check_tokenizer(tokenizer))
        self.engine = Engine(self.model, head, objective(args.method), packer, args, self.accelerator, self._autocast)
        self.start = snapshot(self.model, POLICY)
        for plain in (PlainProgressCallback, PrinterCallback):
            self.remove_callback(plain)
        self.signals, self.progress = SignalCallback(self), ProgressCallback(self)
        for callback in (RehearsalCallback(self), ReferenceCallback(self), self.signals, self.progress):
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
        self.separate = why_not(self.model, head, self.args.device, longest, self._autocast)
        if self.separate and self.args.prefix_sharing:
            name = type(self.model.get_base_model()).__name__
            raise ConfigError(
                f"prefix_sharing=True cannot work with {name}: {self.separate}. Remove it: each completion then has a "
                "row of its own, which is exact for every model."
            )
        return not self.separate and install(self.model.get_base_model())

    @staticmethod
    def _fit(args: TrustRegionConfig, model: Any, datasets: list[Dataset]) -> None:
        """Set `max_tokens_per_pack` to what the plan finds for `gpu_memory`; raises `ConfigError` if nothing fits."""
        from ..plan.advice import fit
        from ..plan.blueprint import read_model_config
        from ..plan.card import bytes_of

        longest = max(
            (int(pack_sizes(d, args.prefix_sharing is not False).max(initial=0)) for d in datasets), default=None
        )
        workload = args.workload()
        config = read_model_config(workload.base) if model is None or isinstance(model, str) else model.config
        available = min(gather_object([bytes_of(str(args.gpu_memory))]))  # of all ranks: they plan alike, or stop alike
        plan = fit(workload, config, available, longest)
        if not plan.fits:
            raise ConfigError(
                f"gpu_memory={args.gpu_memory}: packs of {plan.tokens} tokens, the least this data needs, take "
                f"{plan.total / 2**30:.2f} GiB. {' '.join(plan.advice)}"
            )
        args.max_tokens_per_pack = plan.tokens

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add lorat's metrics to a training log, averaged over the examples since the last one."""
        if "loss" in logs:
            logs.update(self.averages.means(self.engine.summed))
            self.averages.reset()
            logs["reference/updates"] = self.rule.updates
            logs["reference/lag"] = self.rule.age
            logs["reference/distance"] = distance(self.model)
            if self.rule.error is not None:
                logs["reference/error"] = self.rule.error.item()
            logs["start/distance"] = distance(self.model, POLICY, self.start)
            logs["num_tokens"], logs["tokens_per_second"] = self.tokens.lap(self.engine.summed)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate needs input_ids in the batch; `num_tokens` says what was done
