"""Preference data of realistic lengths, tokenised, for measuring speed: what counts is how long, not what it says.

Lengths are log-normal, clipped, in tokens; chosen and rejected of a pair are correlated. They are assumptions of shape:

- `tldr`: Reddit TL;DR. Posts up to 512 tokens (the data's own limit), near 300 on average; summaries of 24 to 48
  tokens in the main (the annotated ones were asked to be), near 35.
- `hh`: Anthropic-HH. The real pairs and the real Pythia tokenizer where their folder is given (read and cut by
  `lorat.data.prepare`); else log-normals with that data's medians and spreads: prompt 61 (e^0.9), completions 24 and 27.
- `ultrafeedback`: instructions near 170 on average, median 115 (long tail); answers near 295, median 240 (long tail).

No prompt + completion exceeds `max_length`, so neither side cuts anything; every completion counts as ending in EOS.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

Example = dict[str, Any]


class Lengths(NamedTuple):
    """Median, standard deviation of the logarithm, and bounds, in tokens."""

    median: float
    sigma: float
    least: int
    most: int


class Shape(NamedTuple):
    prompt: Lengths
    chosen: Lengths
    rejected: Lengths
    correlation: float  # of the logarithms of chosen and rejected


SHAPES = {
    "tldr": Shape(Lengths(285, 0.35, 60, 512), Lengths(34, 0.3, 10, 64), Lengths(34, 0.3, 10, 64), 0.3),
    "hh": Shape(Lengths(61, 0.9, 14, 566), Lengths(24, 0.82, 3, 260), Lengths(27, 0.87, 3, 260), 0.3),
    "ultrafeedback": Shape(Lengths(115, 0.9, 15, 900), Lengths(245, 0.7, 5, 900), Lengths(235, 0.7, 5, 900), 0.4),
}


def synthetic(name: str, pairs: int, seed: int, vocab: int, max_length: int, shrink: int = 1) -> list[Example]:
    """`pairs` pairs of random token ids from 2 up (0 pads, 1 ends); all lengths divided by `shrink`."""
    shape, rng = SHAPES[name], random.Random(f"{name} {seed}")

    def length(of: Lengths, z: float, room: int) -> int:
        n = round(of.median * math.exp(of.sigma * z))
        return max(1, min(room, max(of.least, min(of.most, n)) // shrink))

    found = []
    for _ in range(pairs):
        a, b, c = (rng.gauss(0, 1) for _ in range(3))
        rejected = shape.correlation * b + math.sqrt(1 - shape.correlation**2) * c
        prompt = length(shape.prompt, a, max_length - max_length // 8)
        sizes = {"prompt_ids": prompt, "chosen_ids": length(shape.chosen, b, max_length - prompt)}
        sizes["rejected_ids"] = length(shape.rejected, rejected, max_length - prompt)
        found.append({k: [rng.randrange(2, vocab) for _ in range(n)] for k, n in sizes.items()})
    for example in found:
        example["chosen_ids"][-1] = example["rejected_ids"][-1] = 1
    return found


def real_hh(folder: Path, pairs: int, seed: int, vocab: int, max_length: int) -> list[Example]:
    """`pairs` of the real pairs, drawn by `seed`, as lorat reads them; token ids beyond `vocab` are folded into it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from lorat.data.prepare import prepare

    lines = (folder / "hh-harmless-base" / "test-mild.jsonl").read_text().splitlines()
    raw = Dataset.from_list([json.loads(line) for line in lines])
    tokenizer = AutoTokenizer.from_pretrained(folder / "pythia-tokenizer")
    kept, _ = prepare(raw, tokenizer, method="dpo", max_length=max_length)
    order = list(range(len(kept)))
    random.Random(seed).shuffle(order)
    rows = [kept[order[i % len(order)]] for i in range(pairs)]
    return [{k: [t % vocab for t in row[k]] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]


def draw(
    name: str, pairs: int, seed: int, vocab: int, max_length: int, shrink: int, data: Path
) -> tuple[list[Example], str]:
    """The pairs of workload `name` and where they come from: "real" or "synthetic"."""
    if name == "hh" and (data / "hh-harmless-base").is_dir() and (data / "pythia-tokenizer").is_dir() and shrink == 1:
        return real_hh(data, pairs, seed, vocab, max_length), "real"
    return synthetic(name, pairs, seed, vocab, max_length, shrink), "synthetic"


def for_method(pairs: list[Example], method: str) -> list[Example]:
    """`row` and the columns of lorat's tokenised data. KTO: one completion of each pair, chosen and rejected in turn."""
    if method != "kto":
        return [{"row": i, **pair} for i, pair in enumerate(pairs)]
    return [
        {
            "row": i,
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": pair["rejected_ids" if i % 2 else "chosen_ids"],
            "label": i % 2 == 0,
        }
        for i, pair in enumerate(pairs)
    ]


def mismatched(batch: list[Example]) -> list[list[int]]:
    """KTO's other completion of each prompt: the next example's, within the batch of an optimiser step."""
    return [e["completion_ids"] for e in batch[1:] + batch[:1]]


def count(batch: list[Example], method: str) -> dict[str, int]:
    """Tokens of one pass of one model over `batch`, by arithmetic alone.

    `completion`: what a loss or z0 needs a log-prob of; `unique`: each prompt once, and its completions; `rows`: each
    completion with its prompt; `padded`: the same in rectangles, one for DPO and IPO, two for KTO (loss rows, z0 rows;
    a batch of one has no z0).
    """
    prompts = [len(e["prompt_ids"]) for e in batch]
    if method == "kto":
        others = mismatched(batch) if len(batch) > 1 else []
        sides = [[len(e["completion_ids"]) for e in batch], [len(y) for y in others]]
        rectangles = [[p + y for p, y in zip(prompts, side)] for side in sides]
    else:
        sides = [[len(e[k]) for e in batch] for k in ("chosen_ids", "rejected_ids")]
        rectangles = [[p + y for side in sides for p, y in zip(prompts, side)]]
    completion = sum(map(sum, sides))
    return {
        "completion": completion,
        "unique": sum(prompts) + completion,
        "rows": sum(map(sum, rectangles)),
        "padded": sum(len(r) * max(r, default=0) for r in rectangles),
    }
