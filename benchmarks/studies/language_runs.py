"""One run of the language study: lorat's own trainer on the toy world of `lorat.toy`, base in 4-bit, gold by sampling.

A world is a seed: an SFT model (2 layers of 128, trained on sloppy demonstrations, saved and loaded back in NF4), the
preference pairs drawn from it, and the random numbers of every sample. What is recorded: mean gold reward, KL(policy ‖
SFT) in nats a completion, and the share of ungrammatical answers, from the same prompts and seeds in every run.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import logging as datasets_logging
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks.studies.study import Reference
from lorat.demo import toy
from lorat.files import write_whole
from lorat.model.base import load_base
from lorat.settings.config import CHECKPOINTING, TrustRegionConfig
from lorat.train.trainer import TrustRegionTrainer


@dataclass(frozen=True)
class Recipe:
    """What all runs of a study have in common. `batch` pairs a step; `few` pairs in the regime of many epochs."""

    steps: int = 256
    batch: int = 16
    few: int = 256
    lr: float = 5e-4
    lora_r: int = 8
    noise: float = 1.0  # temperature of the Bradley-Terry labels
    sft_steps: int = 300
    samples: int = 1008  # at each checkpoint, the 72 prompts in turn
    checkpoints: tuple[int, ...] = (32, 64, 128, 256)


@dataclass(frozen=True)
class Job:
    """One run: the `world`'s seed, `regime` fresh or few, and the reference."""

    world: int
    regime: str
    method: str
    beta: float
    reference: Reference

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def quiet() -> None:
    """Neither bars nor advice from the libraries: there are hundreds of runs."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def config_of(recipe: Recipe, folder: Path, job: Job | None = None, out: Path | None = None) -> TrustRegionConfig:
    """Settings of `job`'s run, or of nothing but loading the world's model."""
    own: dict[str, Any] = {"sync": "frozen"}
    if job is not None:
        rule = job.reference
        own = {"method": job.method, "beta": job.beta, "seed": job.world, "sync": rule.kind}
        own |= {
            "max_steps": recipe.steps,
            "per_device_train_batch_size": recipe.batch * (2 if job.method == "kto" else 1),
        }
        if rule.kind != "frozen":
            own["sync_every"] = rule.every
        if rule.kind == "soft":
            own |= {"sync_alpha": rule.alpha, "sync_space": "product"}
        if rule.kind == "adaptive":
            own["sync_limit"] = rule.limit
    common: dict[str, Any] = dict(
        model_name_or_path=str(folder / "sft"),
        output_dir=str(out or folder / "unused"),
        learning_rate=recipe.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        lora_r=recipe.lora_r,
        lora_alpha=2 * recipe.lora_r,
        max_length=64,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    common[CHECKPOINTING] = False
    return TrustRegionConfig(**common, **own)


def make_world(recipe: Recipe, folder: Path, seed: int) -> dict[str, float]:
    """Train, save and load the SFT model of a seed, draw its pairs; returns its own gold and ungrammatical share.

    What is in the folder already is taken, so that an interrupted study goes on.
    """
    tokenizer = toy.make_tokenizer()
    if (folder / "world.json").exists():
        return dict(json.loads((folder / "world.json").read_text()))
    toy.make_sft_model(tokenizer, seed, steps=recipe.sft_steps).save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    base = load_base(config_of(recipe, folder).base())
    pairs = toy.preference_pairs(base, tokenizer, recipe.steps * recipe.batch, seed=seed + 1, temperature=recipe.noise)
    write_whole(folder / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    found = measure(base, None, tokenizer, recipe.samples, seed)
    wrong = sum(toy.gold_reward(p["prompt"], p["chosen"]) < toy.gold_reward(p["prompt"], p["rejected"]) for p in pairs)
    found["labels against gold"] = wrong / len(pairs)
    write_whole(folder / "world.json", json.dumps(found))
    return found


def measure(model: Any, without: Any, tokenizer: Any, samples: int, seed: int) -> dict[str, float]:
    """Gold, KL to the model inside `without()` and ungrammatical share, from `samples` completions at temperature 1."""
    prompts = [toy.PROMPTS[i % len(toy.PROMPTS)] for i in range(samples)]
    said = toy.sample(model, tokenizer, prompts, seed=seed + 3)
    out = {
        "gold": sum(map(toy.gold_reward, prompts, said)) / samples,
        "kl": 0.0,
        "ood": sum(not toy.grammatical(text) for text in said) / samples,
    }
    if without is not None:
        policy = toy.sequence_logps(model, tokenizer, prompts, said)
        with without():
            start = toy.sequence_logps(model, tokenizer, prompts, said)
        out["kl"] = (policy - start).double().mean().item()
    return out


class _Watch(TrainerCallback):
    """What is measured at the checkpoints, and the reference's age after each step; comes after lorat's callbacks."""

    def __init__(self, trainer: TrustRegionTrainer, recipe: Recipe, seed: int) -> None:
        self.trainer, self.recipe, self.seed = trainer, recipe, seed
        self.found: dict[int, dict[str, float]] = {}
        self.ages: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ages.append(self.trainer.rule.age)
        if state.global_step in self.recipe.checkpoints:
            model: Any = self.trainer.model
            found = measure(model, model.disable_adapter, self.trainer.processing_class, self.recipe.samples, self.seed)
            self.found[state.global_step] = found


def run(recipe: Recipe, folder: Path, job: Job) -> dict[str, Any]:
    """Train `job` on the world in `folder`: `gold`, `kl`, `ood` after 0 and each checkpoint's steps, `lag`, `moves`."""
    start = make_world(recipe, folder, job.world)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    if job.regime == "few":
        pairs = pairs[: recipe.few]
    with tempfile.TemporaryDirectory() as out:  # nothing is saved, but what was run is written there
        config = config_of(recipe, folder, job, Path(out))
        trainer = TrustRegionTrainer(None, config, Dataset.from_list(pairs), None, toy.make_tokenizer())
        watch = _Watch(trainer, recipe, job.world)
        trainer.add_callback(watch)
        trainer.train()
    curves = {k: [start[k], *(watch.found[s][k] for s in recipe.checkpoints)] for k in ("gold", "kl", "ood")}
    rule = trainer.rule
    return {**curves, "lag": sum(watch.ages) / len(watch.ages), "moves": rule.alpha * rule.updates}
