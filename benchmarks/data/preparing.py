"""What a run's data costs before the first step: time and peak memory of preparing it, at the first start and the second.

Dialogues of random words in Anthropic-HH's form, as long as the real ones (`benchmarks.step.workloads`, "hh"), in one JSONL
file. Each side runs in a process of its own: lorat reads the file and prepares it (`load_preference_data`, `prepare`); TRL
reads it with `datasets.load_dataset` and runs `DPOTrainer._prepare_dataset`, nothing of it changed. The second start is
a new process with the same cache folder. Imports and the tokenizer's loading are not counted; what lorat does beyond
TRL is (cutting to a length, accounting for every row). The tokenizer is that of `--tokenizer`.

`python -m benchmarks.data.preparing --out benchmarks/results/preparing-cpu.json`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one "
    "you were all her she there would their we him been has when who will no more if out so up said what its about than "
    "into them can only other time new some could these two may first then do any like my now over such our man me even "
    "most made after also well way many must before back through years where much your down should because long each"
).split()
SIDES = ("lorat", "trl")


def write_dialogues(path: Path, rows: int, seed: int) -> None:
    """`rows` pairs of dialogues; a word is about a token. Lengths: see `benchmarks.step.workloads`."""
    from benchmarks.step.workloads import SHAPES, Lengths

    shape, rng = SHAPES["hh"], random.Random(seed)

    def words(of: Lengths, z: float) -> str:
        n = max(of.least, min(of.most, round(of.median * math.exp(of.sigma * z))))
        return " ".join(rng.choices(WORDS, k=n))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            z = rng.gauss(0, 1)
            common = f"\n\nHuman: {words(shape.prompt, rng.gauss(0, 1))}\n\nAssistant: "
            rejected = shape.correlation * z + math.sqrt(1 - shape.correlation**2) * rng.gauss(0, 1)
            pair = {"chosen": common + words(shape.chosen, z), "rejected": common + words(shape.rejected, rejected)}
            file.write(json.dumps(pair) + "\n")


def run_side(side: str, data: str, tokenizer: str, processes: int | None) -> dict[str, Any]:
    """One start of one side, in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the `lorat` command sets it
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tok = AutoTokenizer.from_pretrained(tokenizer)
    if side == "lorat":
        from lorat.data.prepare import prepare
        from lorat.data.reading import load_preference_data
    else:
        from trl import DPOConfig, DPOTrainer
    before, begun, cpu = peak_mb(), time.perf_counter(), cpu_seconds()
    if side == "lorat":
        rows, _ = prepare(load_preference_data(data), tok, method="dpo", max_length=1024, num_proc=processes)
    else:
        raw = datasets.load_dataset("json", data_files=data, split="train")
        args = DPOConfig(
            output_dir=tempfile.mkdtemp(), dataset_num_proc=processes, use_cpu=True, bf16=False, report_to=[]
        )
        rows = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tok), raw, tok, args, "train")  # type: ignore[arg-type]
    took, used = time.perf_counter() - begun, cpu_seconds() - cpu
    return {
        "seconds": round(took, 2),
        "cpu_seconds": round(used, 2),
        "peak_mb": round(peak_mb()),
        "before_mb": round(before),
        "rows": len(rows),
    }


def peak_mb() -> float:
    """The largest resident memory of this process or of one that it started, in MB; mapped files count while they are in use."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def cpu_seconds() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def measure(side: str, folder: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both starts of one side, each in a process of its own, with one cache folder."""
    # TRL's functions are known to its cache by their pickles; a fixed hash seed keeps those the same in two processes.
    env = os.environ | {"HF_DATASETS_CACHE": str(folder / side), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "benchmarks.data.preparing", "--side", side, "--data", str(data)]
    command += ["--tokenizer", options.tokenizer]
    command += ["--processes", str(options.processes)] if options.processes else []
    starts = {}
    for start in ("first", "second"):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            starts[start] = {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
            break
        starts[start] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{side}, {start} start: {starts[start]}", file=sys.stderr, flush=True)
    return starts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.preparing", description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("LORAT_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    parser.add_argument("--tokenizer", default=str(shared / "pythia-tokenizer"), help="folder of a tokenizer")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, help="dataset_num_proc of both sides")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.data, options.tokenizer, options.processes)))
        return 0
    import torch

    from benchmarks import record

    with tempfile.TemporaryDirectory(prefix="preparing-") as name:
        data = Path(name) / "pairs.jsonl"
        write_dialogues(data, options.rows, options.seed)
        size = data.stat().st_size
        results = {side: measure(side, Path(name), data, options) for side in options.sides}
    text = record.document(
        "benchmarks.data.preparing",
        torch.device("cpu"),
        rows=options.rows,
        file_mb=round(size / 1e6, 1),
        results=results,
    )
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
