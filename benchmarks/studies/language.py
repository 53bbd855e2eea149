"""The second study: a tiny language model, LoRA on a 4-bit base, lorat's own trainer: `python -m benchmarks.studies.language`.

Where `overoptimization` enumerates, this samples: `lorat.toy`'s English of animals, whose gold reward is a program. DPO (and
KTO) against frozen, soft and hard references over a grid of β, in several worlds, one epoch of fresh pairs and many epochs
of few. Every finished run is kept in `--work`, so an interrupted study goes on where it was. About 25 s a run and core; the
last line is one JSON document without the single runs, `--out` has them too, and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import record as report
from benchmarks.studies.language_runs import Job, Recipe, make_world, quiet, run
from benchmarks.studies.study import FROZEN, Reference, Run, hard, soft
from benchmarks.studies.study_output import plain, print_tables, single_runs
from benchmarks.studies.study_tables import summaries
from lorat.errors import CheckpointError
from lorat.files import Pieces

METHODS, REGIMES = ("dpo", "kto"), ("fresh", "few")
KLS = (0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Study:
    """One grid: each reference with its values of β, the frozen one first."""

    grid: tuple[tuple[Reference, tuple[float, ...]], ...] = (
        (FROZEN, (0.1, 0.3, 0.56, 1.0, 1.8, 3.0, 5.6)),
        (soft(0.6), (3.0, 30.0, 100.0)),
        (soft(0.02), (1.0, 3.0, 10.0, 30.0)),
        (hard(64), (1.0, 3.0, 10.0, 30.0)),
    )
    methods: tuple[str, ...] = ("dpo",)
    regimes: tuple[str, ...] = REGIMES
    worlds: int = 6
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def seeds(self) -> list[int]:
        return [1000 * self.seed + i for i in range(self.worlds)]

    def settings(self) -> list[tuple[str, str, float, Reference]]:
        chosen = [(reference, beta) for reference, betas in self.grid for beta in betas]
        return [(g, m, beta, ref) for g in self.regimes for m in self.methods for ref, beta in chosen]


TOY: dict[str, Any] = {
    "grid": ((FROZEN, (0.3, 1.0)), (soft(0.6), (1.0,)), (hard(4), (1.0,))),
    "worlds": 2,
    "recipe": Recipe(steps=8, batch=4, few=8, lr=0.01, sft_steps=5, samples=72, checkpoints=(4, 8)),
}


def _world(given: tuple[Recipe, Path, int]) -> dict[str, float]:
    quiet()
    return make_world(*given)


def _run(given: tuple[Recipe, Path, Job]) -> tuple[Job, dict[str, Any]]:
    quiet()
    return given[2], run(*given)


def train_all(study: Study, work: Path, workers: int) -> tuple[list[dict[str, float]], list[Run]]:
    """What each world starts from, and each setting's run over all worlds; what `work` holds is not run again.

    Raises `CheckpointError` where `work` holds runs of another recipe.
    """
    found = Pieces(work / "runs.jsonl", asdict(study.recipe))
    folders = {seed: work / f"world-{seed}" for seed in study.seeds}
    jobs = [Job(seed, g, m, beta, ref) for seed in study.seeds for g, m, beta, ref in study.settings()]
    todo = [job for job in jobs if job.key not in found]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        starts = pool.map(_world, [(study.recipe, folder, seed) for seed, folder in folders.items()], 1)
        given = [(study.recipe, folders[job.world], job) for job in todo]
        for i, (job, values) in enumerate(pool.imap_unordered(_run, given), 1):
            found[job.key] = values
            told = f"world {job.world} {job.regime} {job.method} β={job.beta:g} {job.reference}"
            print(f"[{i}/{len(todo)}] {told}: gold {values['gold'][-1]:.3f}, KL {values['kl'][-1]:.2f}", flush=True)
    runs = []
    for g, m, beta, ref in study.settings():
        of = [found[Job(seed, g, m, beta, ref).key] for seed in study.seeds]
        stacked = {k: torch.tensor([o[k] for o in of], dtype=torch.float64) for k in of[0]}
        runs.append(Run(g, m, beta, ref, **stacked))
    return starts, runs


def summary(starts: list[dict[str, float]], runs: list[Run]) -> dict[str, Any]:
    sft = {k: sum(s[k] for s in starts) / len(starts) for k in starts[0]}
    return {"sft": sft, **summaries(runs, KLS, sft["gold"])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.language", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a minute, for the test: the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="other worlds for every value (default 0)")
    parser.add_argument("--worlds", type=int, help="how many (default 6)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: dpo")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, help="default: both")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (default: cores)")
    parser.add_argument("--work", type=Path, help="keep worlds and finished runs here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the JSON document here, and the picture beside it")
    chosen = parser.parse_args()
    began = time.monotonic()
    fields: dict[str, Any] = {**(TOY if chosen.toy else {}), "seed": chosen.seed}
    fields |= {k: getattr(chosen, k) for k in ("worlds", "methods", "regimes") if getattr(chosen, k) is not None}
    study = Study(**fields)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            starts, runs = train_all(study, chosen.work or Path(scratch), chosen.workers)
        except CheckpointError as error:
            parser.error(f"{error} Or give another --work.")
    found = summary(starts, runs)
    print_tables(found)
    settings = {**asdict(study), "grid": {str(r): betas for r, betas in study.grid}, "few": study.recipe.few}
    about = {"settings": settings, "workers": chosen.workers, "seconds": round(time.monotonic() - began, 1)}
    text = report.document("benchmarks.studies.language", torch.device("cpu"), **about, results=plain(found))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        whole = json.loads(text) | {"runs": plain(single_runs(runs))}
        chosen.out.write_text(json.dumps(whole, ensure_ascii=False) + "\n")
        from benchmarks.studies.study_figure import draw  # matplotlib is only needed here

        draw(whole, chosen.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
