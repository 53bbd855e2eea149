"""The trainer: the one place where model, data, method and configuration meet.

transformers' `Trainer` runs the loop, the optimiser, the schedule, logging and several GPUs. lorat adds what a moving
reference needs, each in an object of its own; the class below only says when they are asked.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as PlainProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..data.columns import RowSettings
from ..data.mixture import Mixture, prepare_all
from ..data.prepare import DataReport, check_budget, extent, pack_sizes
from ..data.tokenization import check_tokenizer
from ..errors import CheckpointError, ConfigError
from ..files import put_json
from ..model.adapters import attach, load_adapter_, train_policy_only_
from ..model.base import Facts, check_fit, load_base, load_tokenizer
from ..model.fused import computing
from ..model.models import Models, check_head
from ..model.probe import why_not
from ..packs.attention import install
from ..packs.packing import Packer, collate
from ..ranks import Ranks
from ..reference import POLICY, REFERENCE, UpdateRule, adapter_parameters, distance, snapshot
from ..reference.moving import JOURNAL, MovingReference
from ..runs import checkpoint as ck
from ..runs.card import write_model_card
from ..runs.identity import run_identity
from ..runs.output import RunFolder
from ..settings.config import TrustRegionConfig
from .callbacks import ProgressCallback, ReferenceCallback, SignalCallback
from .evaluator import Evaluator
from .meters import Meters
from .rehearsal import RehearsalCallback
from .scorer import Scorer
from .stepper import Stepper

logger = logging.getLogger("lorat")


class TrustRegionTrainer(Trainer):
    """Trains a LoRA policy on preference data against a reference that moves: TR-DPO, TR-IPO, TR-KTO.

        for each optimiser step (transformers' loop)
            its device batches become packs, within max_tokens_per_pack   Stepper.begin
            z0 over the whole step (KTO)                                  Method.partners, Scorer.baseline
            for each pack (spread over the calls of training_step)        Stepper.backward
                reference, without gradient; policy, with                 Models.forward
                losses and metrics                                        Method.score
                backward
            the gradient is finite, or the run stops                      Stepper.verify
            optimiser
            the reference moves if it is due                              MovingReference.after_step
            log / evaluate / checkpoint                                   Meters, Evaluator, RunFolder.staging

    The device batch is the statistical unit; the loss of an optimiser step is the mean over its examples, whatever the
    packs, the accumulation or the ranks. `model`: a name, a base model, or a `PeftModel` whose adapter `default` is the
    policy. `args`: a `TrustRegionConfig`. Datasets: any format `lorat.data` reads, or already tokenised.
    `processing_class`: the tokenizer. `peft_config`: the adapter, instead of the `lora_*` fields. Raises a `LoratError`
    before training for whatever cannot work.
    """

    model: Any  # a PeftModel
    args: TrustRegionConfig
    train_dataset: Any  # tokenised, or None
    identity: dict[str, Any]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: TrustRegionConfig | None = None,
        train_dataset: Dataset | Mixture | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = (args if args is not None else TrustRegionConfig()).resolved()  # the caller's is never written to
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
        self.separate: str | None = None  # why prompts are not shared
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
        self.ranks = Ranks(self.accelerator, args.device)
        self.folder = RunFolder(Path(str(args.output_dir)), args.should_save)
        self.models = Models(self.model, autocast=computing(self.model, bool(args.bf16), self.accelerator.autocast))
        check_head(self.models, args.device)
        shared = self._can_share(longest)
        for name, dataset in data.items():
            check_budget(dataset, args.max_tokens_per_pack, shared, name)
        packer = Packer(shared, args.max_tokens_per_pack, check_tokenizer(tokenizer))
        self.scorer = Scorer(self.models, args.loss(), packer, self.ranks)
        self.meters = Meters(self.ranks)
        self.stepper = Stepper(self.scorer, self.meters, self.accelerator, self._remainder())
        self.evaluator = Evaluator(self.scorer)
        journal = self.folder.path / JOURNAL if args.process_index == 0 else None
        self.reference = MovingReference(self.model, args.update_rule(), journal=journal)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        """lorat's own; the reference moves before any other callback sees the step."""
        for plain in (PlainProgressCallback, PrinterCallback):
            self.remove_callback(plain)
        size = self.args.per_device_train_batch_size
        label = f"{self.args.method.upper()} {self.args.sync}"
        self.signals = SignalCallback(self.ranks)
        self.progress = ProgressCallback(label, self.opening_lines, self.reference, self.meters)
        self.add_callback(RehearsalCallback(self.scorer, self.train_dataset, size))
        self.add_callback(ReferenceCallback(self.reference, self.stepper.drift))
        handlers = self.callback_handler.callbacks
        handlers.insert(0, handlers.pop())
        self.add_callback(self.signals)
        self.add_callback(self.progress)

    @property
    def rule(self) -> UpdateRule:
        """When and how far the reference moves, and how often it did."""
        return self.reference.rule

    def _remainder(self) -> int:
        """Real examples, on all ranks, of a last round of device batches that accelerate fills up; 0 if it does not."""
        if self.args.world_size == 1 or self.args.dataloader_drop_last or self.train_dataset is None:
            return 0
        # accelerate's own `remainder` is missing in the epoch that a resumed run goes on with
        return len(self.train_dataset) % (self.args.per_device_train_batch_size * self.args.world_size)

    def _prepared(
        self, dataset: Dataset | Mixture | None, tokenizer: Any, args: TrustRegionConfig, name: str
    ) -> Dataset | None:
        if dataset is None:
            return None
        with args.main_process_first(desc="preparing data"):  # the others find it in the cache
            dataset, reports = prepare_all(
                dataset,
                tokenizer,
                seed=args.seed,
                num_proc=args.dataset_num_proc,
                method=args.method,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                overlong=args.overlong,
                name=name,
                rows=RowSettings.of(vars(args)),
                weights=(args.desirable_weight, args.undesirable_weight),
            )
        self.reports += reports
        return dataset

    def _can_share(self, longest: int) -> bool:
        """Whether packs share prompts: as `prefix_sharing` says, or as the probe finds."""
        if self.args.prefix_sharing is False:
            return False
        self.separate = why_not(self.models, self.args.device, longest)
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
        from ..model.base import read_model_config
        from ..plan.advice import fit
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
        lines = self.reference.opening_lines(self.args.beta, steps)
        if self.separate:
            lines.append(f"Packs: one padded row a completion, since this model cannot share prompts: {self.separate}.")
        return lines

    # ---- a step ----

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """`Models` in place of the PEFT model, to train on several ranks inside DDP, whose hooks then run."""
        wrapped = super()._wrap_model(model, training, *args, **kwargs)
        if wrapped is not self.model:  # wrapped before
            return wrapped
        alone = not training or self.ranks.count == 1
        return self.models if alone else self.accelerator.prepare_model(self.models, device_placement=False)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.stepper.begin([s["batch"] for s in samples])
        return samples, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Backpropagate a device batch, pack by pack; returns its share of the step's mean loss."""
        model.train()
        if callable(into_train_mode := getattr(self.optimizer, "train", None)):
            into_train_mode()  # schedule-free optimisers
        return self.stepper.backward(model, inputs["batch"])

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """The gradient norm, and the gate before the optimiser: nothing non-finite passes."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.stepper.verify(grad_norm, self.state.global_step + 1, bool(self.args.fp16), self.folder.last_whole)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add lorat's metrics to a training log, averaged over the examples since the last one."""
        if "loss" in logs:
            logs.update(self.meters.logs())
            logs.update(self.reference.logs())
            logs["start/distance"] = distance(self.model, POLICY, self.evaluator.start)
        super().log(logs, start_time)
        if self.unsaved and "loss" in logs:
            self.control.should_save = True

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate needs input_ids in the batch; `num_tokens` says what was done

    # ---- evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses and metrics of one evaluation batch, nothing else; returns `(mean loss, None, None)`."""
        return self.evaluator.measure(inputs["batch"]).mean(), None, None

    def evaluation_loop(  # the signature is the Trainer's
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self.evaluator.averages.reset()
        begun = time.perf_counter()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.meters.skip(time.perf_counter() - begun)
        means = {f"{metric_key_prefix}_{k}": v for k, v in self.evaluator.averages.means().items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    # ---- a run, and its checkpoints ----

    unsaved = False  # whether the last checkpoint could not be written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train, or go on from a checkpoint: None, True (the last whole one), "auto", or a folder.

        Raises `CheckpointError` for an output folder that holds another run and for a checkpoint that is torn
        or belongs to other settings.
        """
        if resume_from_checkpoint:
            self.folder.repair()
            self.ranks.wait()
        checkpoint = self.folder.resume(resume_from_checkpoint)
        self.identity = run_identity(self.args.identity() | self.facts.settings(), self.train_dataset)
        inputs = (self.args.policy_adapter, self.args.ref_adapter)
        self.folder.claim(self.identity, checkpoint, self.args.overwrite_output_dir, inputs, self._save_policy)
        self.ranks.wait()
        try:
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            self.signals.restore()
            self.progress.stop()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none at all where the checkpoint was already the run's last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial=None) -> str:
        return str(self.folder.staged.parent) if self.folder.staged else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside and publish it; a failure (a full disk) leaves the earlier ones and the run alone."""
        step, folder, owner = self.state.global_step, self.folder, self.args.should_save
        before = self.state.best_model_checkpoint, self.state.best_global_step
        self.reference.flush()
        state = {**self.meters.state_dict(), **self.reference.state_dict(), "run": self.identity}
        failure: Exception | None = None
        with folder.staging(step) as staged:
            self.ranks.wait()
            try:
                super()._save_checkpoint(model, trial)
                if owner:
                    put_json(staged / ck.STATE, state)
                    if self.state.best_model_checkpoint:
                        best = Path(self.state.best_model_checkpoint).name
                        self.state.best_model_checkpoint = str(folder.path / best)
                        self.state.save_to_json(str(staged / "trainer_state.json"))
            except (OSError, RuntimeError, SafetensorError) as error:
                failure = error
        failed = self.ranks.any(failure is not None)
        if owner:
            if not failed and (failure := folder.publish(step)) is not None:
                failed = True
            folder.clear_staging()
            if failed:
                logger.warning(folder.failure_words(step, failure))
            else:
                best = self.state.best_model_checkpoint  # type: ignore[assignment]  # None: there is none yet
                rotate_checkpoints(str(folder.path), self.args.save_total_limit, best, use_mtime=False)
        if failed:  # the best one is the best of those that are there
            self.state.best_model_checkpoint = before[0]
            self.state.best_global_step = int(before[0].rpartition("-")[2]) if before[0] else None
        self.unsaved = self.ranks.any(failed)
        self.ranks.wait()

    def _save_policy(self, folder: str, *more: str) -> None:
        """The policy, and adapters `more`, as PEFT saves them."""
        self.model.save_pretrained(folder, selected_adapters=[POLICY, *more], save_embedding_layers=False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy at the root; the reference in `ref/` of a checkpoint, or where `save_reference` asks for it."""
        folder = Path(output_dir) if output_dir else self.folder.path
        staging = self.folder.staged is not None
        self._save_policy(str(folder), *([REFERENCE] if staging or self.args.save_reference else []))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        if not staging:
            write_model_card(folder, self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain PEFT adapter with a model card; raises `CheckpointError` if the disk refuses."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        try:
            super().save_model(output_dir, _internal_call)
        except (OSError, SafetensorError) as error:
            last = self.folder.last_whole()
            raise CheckpointError(
                f"the adapter could not be written to {output_dir or str(self.folder.path)!r}: {error}. Free space there "
                f"or set another output_dir; the last good checkpoint is {str(last) if last else 'none'}, resume from it "
                "with resume_from_checkpoint: true."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Policy, reference, start, rule and averages of a checkpoint, each tensor verified."""
        folder = Path(resume_from_checkpoint)
        state = ck.read_json(folder / ck.STATE)
        if (folder.parent / ck.START).is_dir():
            load_adapter_(self.model, folder.parent / ck.START, POLICY)
            self.evaluator.start_from(snapshot(self.model, POLICY))
        self._load_adapters(folder)
        for part in (self.reference, self.meters):
            part.load_state_dict(state)

    def _load_best_model(self) -> None:
        self._load_adapters(Path(str(self.state.best_model_checkpoint)))

    def _load_adapters(self, folder: Path) -> None:
        load_adapter_(self.model, folder, POLICY)
        load_adapter_(self.model, folder / REFERENCE, REFERENCE)
        train_policy_only_(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        _without_pickles(super()._load_optimizer_and_scheduler, checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        _without_pickles(super()._load_rng_state, checkpoint)


def _without_pickles(load: Callable[[str | None], Any], checkpoint: str | None) -> None:
    try:
        load(checkpoint)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{checkpoint!r} holds a file that would run code when it is read, so it was not read "
            f"({str(error).splitlines()[0]}). It was not written by lorat; resume from one that was."
        ) from error
