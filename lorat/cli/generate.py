"""`lorat generate` as a person types it: prompts in, answers out, in the format that a benchmark reads."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

from ..errors import ConfigError
from .options import add_run, lineup_of, result_path
from .terminal import going_on, progress_bars, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data.prompts import CHAT, KINDS
    from ..measure.samples import FORMATS

    parser.description = (
        "SampledAnswer prompts with the policy, or with another model of a run. A killed run goes on when the same command is "
        "run again."
    )
    parser.epilog, parser.formatter_class = KINDS, argparse.RawDescriptionHelpFormatter
    add_run(parser)
    add = parser.add_argument
    add("--prompts", required=True, help="file, folder or hub id (see below)")
    add("--split", default="train", help="split of a dataset; slices work (default: train)")
    add("--subset", help="configuration of a hub dataset")
    add(
        "--adapter",
        choices=("policy", "reference", "start", "base"),
        default="policy",
        help="who answers (default: policy)",
    )
    add("--out", required=True, help="file to write")
    add("--format", choices=FORMATS, default="jsonl", help="of the file (default: jsonl)")
    add("--name", help="the model's name in the file (default: the run's folder, and the adapter if not the policy)")
    add("--temperature", type=float, default=1.0, help="(default: 1)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens that hold this share (default: 1, all)",
    )
    add("--greedy", action="store_true", help="take the likeliest token each time")
    add("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add("--samples", type=int, default=1, help="answers a prompt (default: 1)")
    add(
        "--chat",
        choices=CHAT,
        default="auto",
        help="use of the chat template (default: auto: messages and users' turns)",
    )
    add("--template", help=r"text around a prompt without chat template, e.g. 'Human: {prompt}\n\nAssistant:'")


def run(o: argparse.Namespace) -> int:
    if o.samples < 1 or (o.greedy and o.samples > 1):
        raise ConfigError(
            f"--samples {o.samples} cannot be: at least 1, and with --greedy only 1, as all would be equal."
        )

    from ..data.prompts import encode_prompts, read_prompts
    from ..files import Pieces, write_whole
    from ..measure.generation import Request, Sampling, sample, texts, within_positions
    from ..measure.samples import SampledAnswer, check_format, render
    from ..model.base import check_fit
    from ..runs.folder import models_of

    sampling = Sampling(o.temperature, o.top_p, o.greedy, o.max_new_tokens, o.seed, o.batch_size)
    found = models_of(o.run, o.reference, o.start)
    out = result_path(o.out, None, o.overwrite)
    who = found.which(o.adapter)
    prompts = read_prompts(o.prompts, o.split, o.subset)
    check_format(o.format, prompts, o.samples)

    lineup = lineup_of(found, o)
    template = o.template.replace("\\n", "\n") if o.template else None
    ids, sampling, notes = within_positions(
        lineup, encode_prompts(prompts, lineup.tokenizer, o.chat, template), sampling
    )
    check_fit(lineup.model.get_base_model(), max(map(max, ids)), max(map(len, ids)))
    requests = [Request(p, s, ids[p]) for p in range(len(ids)) for s in range(o.samples)]
    identity = lineup.identity()
    identity["adapters"] = {m: sha for m, sha in identity["adapters"].items() if m == who}
    told = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    belongs = {**identity, "model": who, "prompts": told, "samples": o.samples, **vars(sampling)}
    pieces = Pieces(out.with_name(f"{out.name}.part"), belongs, o.overwrite)
    with going_on(), progress_bars() as progress:
        tick = progress(f"sampling from the {who}", len(requests))
        done = sample(lineup, who, requests, sampling, pieces, tick)
    answers = [
        SampledAnswer(r.prompt, prompts[r.prompt], r.sample, text, len(c.ids) - c.ended, c.ended)
        for r, c, text in zip(requests, done, texts(lineup, done), strict=True)
    ]
    folder = Path(o.run).resolve().name
    name = o.name or (folder if o.adapter == "policy" else f"{folder}-{o.adapter}")
    write_whole(out, render(o.format, answers, name, time.time()))
    pieces.remove()
    console = terminal()
    if cut := sum(not a.ended for a in answers):
        notes.append(f"{cut} of {len(answers)} answers were cut at {sampling.max_new_tokens} tokens.")
    for note in notes:
        console.print(f"• {note}", soft_wrap=True, markup=False)
    console.print(f"{len(answers)} answers of the {who} to {len(prompts)} prompts: {out}", soft_wrap=True, markup=False)
    return 0
