"""`lorat eval` as a person types it: options, refusals before anything slow, tables, and a JSON file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import ConfigError
from ..runs.versions import versions
from .options import add_row_options, common, going_on, loaded, progress_bars, result_path, row_settings, terminal

EVAL = "eval.json"


def evaluate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lorat eval",
        description="Measure policy, reference, start and base on preference pairs, and the policy's own samples: rewards, "
        "calibration, KL, length, diversity. A killed evaluation goes on when the same command is run again.",
    )
    common(parser)
    parser.add_argument("--data", required=True, help="preference pairs: a file, a folder or a hub id")
    parser.add_argument(
        "--split", default="train", help="split of them; slices such as test[:500] work (default: train)"
    )
    parser.add_argument("--subset", help="configuration of a hub dataset")
    add_row_options(parser)
    parser.add_argument(
        "--samples", type=int, default=256, help="completions to sample of each model; 0: none (default: 256)"
    )
    parser.add_argument(
        "--sample-from",
        nargs="+",
        choices=("policy", "reference", "start", "base"),
        default=["policy", "start"],
        metavar="MODEL",
        help="models to sample from: policy, reference, start, base (default: policy start)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest sample (default: 256)")
    parser.add_argument("--beta", type=float, help="of the rewards, if not the run's")
    parser.add_argument("--max-length", type=int, help="longest prompt + completion, if not the run's (else 1024)")
    parser.add_argument("--bins", type=int, default=10, help="of the reliability table (default: 10)")
    parser.add_argument("--max-tokens-per-pack", type=int, default=8192, help="in one forward pass: decides memory")
    parser.add_argument("--out", help=f"result file (default: {EVAL} in RUN)")
    o = parser.parse_args(argv)
    if o.samples < 0 or o.bins < 1 or (o.beta is not None and not o.beta > 0):
        raise ConfigError("--samples must be at least 0, --bins at least 1, and --beta above 0.")

    from ..measure.generation import Sampling
    from ..runs.folder import find

    sampling = Sampling(max_new_tokens=o.max_new_tokens, seed=o.seed, batch_size=o.batch_size)
    found = find(o.run, o.reference, o.start)
    for name in o.sample_from if o.samples else ():
        found.which(name)
    out = result_path(o.out, Path(o.run) / EVAL if Path(o.run).is_dir() else None, o.overwrite)
    console = terminal()

    from ..data.prepare import digest, prepare
    from ..data.reading import load_preference_data
    from ..files import Pieces, write_whole
    from ..measure.eval_report import show
    from ..measure.eval_run import Plan
    from ..measure.eval_run import evaluate as measure

    raw = load_preference_data(o.data, o.split, o.subset)
    lineup = loaded(found, o)
    settings = found.settings
    max_length = o.max_length or settings.get("max_length", 1024)
    rows, report = prepare(
        raw,
        lineup.tokenizer,
        method="dpo",
        max_length=max_length,
        max_prompt_length=settings.get("max_prompt_length"),
        overlong=settings.get("overlong", "truncate"),
        name="eval",
        rows=row_settings(o, settings),
    )
    console.print(report.render(), soft_wrap=True)
    plan = Plan(
        beta=o.beta or float(settings.get("beta", 0.1)),
        length_normalize=bool(settings.get("length_normalize", False)),
        bins=o.bins,
        samples=o.samples,
        sample_from=tuple(o.sample_from),
        sampling=sampling,
        max_tokens_per_pack=o.max_tokens_per_pack,
    )
    who = lineup.identity()
    belongs = {**who, "data": digest(rows), "samples": o.samples, **vars(sampling), "pack": o.max_tokens_per_pack}
    pieces = Pieces(out.with_name(f"{out.name}.part"), belongs, o.overwrite)
    with going_on(), progress_bars() as progress:
        numbers = measure(lineup, list(rows), plan, pieces, progress)
    numbers = {
        "run": str(o.run),
        "data": {
            "name": o.data,
            "split": o.split,
            "subset": o.subset,
            "max_length": max_length,
            "sha256": belongs["data"],
        },
        "models": {m: str(f) for m, f in found.folders.items()} | {"base": lineup.base.name},
        **who,
        "versions": versions(),
        **numbers,
    }
    console.print()
    show(console, numbers)
    lines = [
        json.dumps({"model": name, **text}, ensure_ascii=False)
        for name, m in numbers.get("generation", {}).get("models", {}).items()
        for text in m.pop("texts")
    ]
    if lines:
        write_whole(out.with_suffix(".samples.jsonl"), "\n".join(lines) + "\n")
    write_whole(out, json.dumps(numbers, indent=1) + "\n")
    pieces.remove()
    console.print(f"\nAll numbers: {out}", soft_wrap=True)
    if lines:
        console.print(f"Samples: {out.with_suffix('.samples.jsonl')}", soft_wrap=True)
    return 0
