"""Does a moving reference help? Exact runs on a token MDP: `python -m benchmarks.studies.overoptimization`.

DPO, IPO and KTO (lorat's own losses) with frozen, soft, hard and adaptive references over a grid of β, α, τ and limits,
32 worlds each (`mdp.py`), twice: one epoch of fresh pairs, and many epochs of few. Gold reward, KL to SFT and the mass on
illegal trajectories are enumerated, never sampled. `--quick` (16 worlds) takes four minutes on two cores, all about ten.
Writes a picture beside `--out`; the last line is one JSON document without the single runs, `--out` has them too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record as report
from benchmarks.studies.mdp import Worlds, draw_pairs, expectations, frontier, make_worlds
from benchmarks.studies.mdp_training import Job, train
from benchmarks.studies.study import FROZEN, Reference, Run, adaptive, hard, soft
from benchmarks.studies.study_output import plain, print_tables, single_runs
from benchmarks.studies.study_tables import summaries

KLS = (1.0, 2.0, 2.5)  # nats at which policies are compared
METHODS, REGIMES = ("dpo", "ipo", "kto"), ("fresh", "few")
BETAS = (0.01, 0.018, 0.032, 0.056, 0.1, 0.18, 0.32, 0.56, 1.0, 1.8, 3.2)  # the frozen reference gets all of them
INVERSE_LAMBDAS = torch.cat([torch.zeros(1), torch.logspace(-1.5, 2, 60)]).double()


@dataclass(frozen=True)
class Study:
    """One grid. Lags of the references that follow a rule, in steps: 0.67 to 332."""

    references: tuple[Reference, ...] = (
        *(FROZEN, soft(0.6), soft(0.1), soft(0.03), soft(0.01), soft(0.003), soft(0.6, 64)),
        *(hard(32), hard(128), hard(512), adaptive(0.1), adaptive(0.3), adaptive(0.6)),
    )
    betas: tuple[float, ...] = (0.032, 0.1, 0.32, 0.56, 1.0, 1.8, 3.2)  # of the references that move
    methods: tuple[str, ...] = METHODS
    regimes: tuple[str, ...] = REGIMES
    worlds: int = 32
    steps: int = 1024
    batch: int = 16  # pairs of a step
    few: int = 256  # pairs in all, in the regime of many epochs
    lr: float = 0.003
    seed: int = 0
    frozen_betas: tuple[float, ...] = field(default=BETAS)


QUICK: dict[str, Any] = {"betas": (0.032, 0.1, 0.32, 1.0, 3.2), "worlds": 16}
TOY: dict[str, Any] = {
    "references": (FROZEN, soft(0.6), soft(0.1), hard(8), hard(16), adaptive(0.1)),
    "betas": (0.1, 1.0),
    "frozen_betas": (0.1, 0.32, 1.0),
    "worlds": 2,
    "steps": 32,
    "few": 64,
}


def checkpoints(steps: int) -> tuple[int, ...]:
    """After 0, 4, …, 32, 40, …, 64, 96, …, 256, 320, … steps, and at the end: dense where trajectories are fast."""
    wanted = [*range(0, 32, 4), *range(32, 64, 8), *range(64, 256, 32), *range(256, steps, 64), steps]
    return tuple(step for step in wanted if step <= steps)


def batches_of(study: Study, worlds: Worlds, seeds: list[int]) -> dict[str, Tensor]:
    """`(T, S, B, 2)` trajectory indices a regime: fresh pairs each step, or `few` of them in a new order each epoch."""
    need = study.steps * study.batch
    pairs = draw_pairs(worlds, seeds, max(need, study.few))
    orders = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(7919 * seed + 3)
        epochs = [torch.randperm(study.few, generator=generator) for _ in range(-(-need // study.few))]
        orders.append(torch.cat(epochs)[:need])
    rows = torch.arange(len(seeds))[:, None]
    found = {"fresh": pairs[:, :need], "few": pairs[rows, torch.stack(orders)]}
    return {name: p.view(len(seeds), study.steps, study.batch, 2).transpose(0, 1) for name, p in found.items()}


def jobs_of(study: Study) -> list[Job]:
    """One job a regime, method and β, the longest first."""
    jobs = []
    for regime in study.regimes:
        for method in study.methods:
            for beta in sorted({*study.betas, *study.frozen_betas}):
                references = study.references if beta in study.betas else (FROZEN,)
                jobs.append(Job(regime, method, beta, references, study.lr, checkpoints(study.steps)))
    return sorted(jobs, key=lambda job: -len(job.references))


_given: dict[str, Any] = {}


def _worker(worlds: Worlds, batches: dict[str, Tensor]) -> None:
    """What a process computes with: the worlds, and by regime the batches, `(T, S, B, 2)` trajectory indices."""
    torch.set_num_threads(1)
    _given.update(worlds=worlds, batches=batches)


def _run(job: Job) -> tuple[Job, dict[str, Any]]:
    found = train(job, _given["worlds"], _given["batches"][job.regime])
    return job, {name: values.numpy() for name, values in found.items()}


def train_all(study: Study, worlds: Worlds, seeds: list[int], workers: int) -> list[Run]:
    """Every setting's run; each job computes on one thread, so the numbers do not depend on `workers`."""
    jobs, batches = jobs_of(study), batches_of(study, worlds, seeds)
    done: dict[Job, dict[str, Any]] = {}
    pool = multiprocessing.get_context("spawn").Pool(workers, _worker, (worlds, batches)) if workers > 1 else None
    if pool is None:
        _worker(worlds, batches)
    for job, found in pool.imap_unordered(_run, jobs) if pool else map(_run, jobs):
        done[job] = found
        print(f"[{len(done)}/{len(jobs)}] {job.regime} {job.method} β={job.beta:g}", flush=True)
    if pool:
        pool.close()
    runs = []
    for job in jobs:
        for i, reference in enumerate(job.references):
            values = {name: torch.from_numpy(v[i]) for name, v in done[job].items()}
            runs.append(Run(job.regime, job.method, job.beta, reference, **values))
    return runs


def summary(runs: list[Run], worlds: Worlds) -> dict[str, Any]:
    sft = {name: v.mean().item() for name, v in expectations(worlds.sft_logp, worlds).items()}
    bound = {name: v.mean(1).tolist() for name, v in frontier(worlds, INVERSE_LAMBDAS).items()}
    out: dict[str, Any] = {"sft": sft, "frontier": {"inverse_lambda": INVERSE_LAMBDAS.tolist(), **bound}}
    return out | summaries(runs, KLS, sft["gold"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.overoptimization", description=__doc__.splitlines()[0]
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="16 worlds and 5 values of β: under 5 minutes on two cores")
    size.add_argument("--toy", action="store_true", help="seconds, for the test: the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="other worlds for every value (default 0)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default 1024)")
    parser.add_argument("--lr", type=float, help="learning rate of Adam (default 0.003)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (default: cores)")
    parser.add_argument("--out", type=Path, help="write the JSON document here, and the pictures beside it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    fields = {**(QUICK if chosen.quick else TOY if chosen.toy else {}), "seed": chosen.seed}
    fields |= {"methods": tuple(chosen.methods), "regimes": tuple(chosen.regimes)}
    fields |= {name: value for name in ("steps", "lr") if (value := getattr(chosen, name)) is not None}
    study = Study(**fields)
    seeds = [1000 * study.seed + i for i in range(study.worlds)]
    worlds = make_worlds(seeds)
    runs = train_all(study, worlds, seeds, chosen.workers)
    found = summary(runs, worlds)
    print_tables(found)
    settings = {**asdict(study), "references": [str(r) for r in study.references]}
    about = {"settings": settings, "workers": chosen.workers, "seconds": round(time.monotonic() - began, 1)}
    text = report.document("benchmarks.studies.overoptimization", torch.device("cpu"), **about, results=plain(found))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        whole = json.loads(text)
        whole["runs"] = single_runs(runs)
        chosen.out.write_text(json.dumps(whole, ensure_ascii=False) + "\n")
        if not chosen.toy:
            from benchmarks.studies.study_figure import draw  # matplotlib is only needed here

            draw(whole, chosen.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
