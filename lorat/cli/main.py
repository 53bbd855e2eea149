"""The `lorat` command: train, demo, merge, eval, generate.

Every error that a person can cause is printed as a few plain lines, without a traceback, and exits with 2.
A run stopped by a signal saves a checkpoint and exits with 128 + the signal's number, as shells expect.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

from ..errors import LoratError

USAGE = """\
usage: lorat <command> [options]

  train     fine-tune on preference data         lorat train --config run.yaml [--key value …]
  plan      will it fit, and with what settings  lorat plan --config run.yaml [--gpu-memory 12GiB]
  demo      a small run, to look at              lorat demo [--out DIR]
  merge     fold an adapter into its base        lorat merge RUN --out DIR [--base original|dequantized]
  eval      rewards, calibration, KL, diversity  lorat eval RUN --data PAIRS [--samples N] [--out FILE]
  generate  answer a file of prompts             lorat generate RUN --prompts FILE --out FILE [--adapter policy|…]
  judge     compare two sets of answers          lorat judge A.jsonl B.jsonl --model NAME [--base-url URL]
  report    one HTML file about runs             lorat report RUN [RUN …] --out report.html

`lorat <command> --help` says more. `lorat --version` prints the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": train, "demo": demo, "merge": merge, "judge": judge, "report": report}
    commands |= {"eval": evaluate, "generate": generate, "plan": plan}
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        print(f"lorat {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"lorat: {argv[0]!r} is not a command.\n\n{USAGE}", file=sys.stderr, end="")
        return 2
    _quieten()
    try:
        return commands[argv[0]](argv[1:])
    except LoratError as error:
        _say_error(str(error))
        return 2
    except KeyboardInterrupt:
        _say_error("interrupted; checkpoints that were saved before are whole.")
        return 130
    except BrokenPipeError:  # `lorat train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def train(argv: list[str]) -> int:
    from ..settings.arguments import help_text, parse_config

    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    args = parse_config(argv)
    if args.log_level == "passive":
        args.log_level = args.log_level_replica = "error"

    import torch
    from rich.console import Console

    from ..data.reading import load_preference_data
    from ..runs import checkpoint as ck
    from ..train.trainer import TrustRegionTrainer

    output_dir, dataset = Path(str(args.output_dir)), str(args.dataset_name)
    folder, _ = ck.resolve_resume(args.resume_from_checkpoint, output_dir)
    if not args.overwrite_output_dir:  # before anything slow
        ck.guard_output_dir(output_dir, folder is not None, overwrite=False)
    say = _printer(args.process_index == 0)
    with args.main_process_first(desc="reading data"):
        data = load_preference_data(dataset, args.dataset_split, args.dataset_config_name)
        held_out = None
        if args.eval_dataset_name or args.eval_dataset_split:
            held_out = load_preference_data(
                args.eval_dataset_name or dataset,
                args.eval_dataset_split or "train",
                None if args.eval_dataset_name else args.dataset_config_name,
            )
    trainer: TrustRegionTrainer | None = None
    try:
        with Console(stderr=True, quiet=args.process_index != 0).status(
            f"Tokenising {len(data):,} rows and loading {args.model_name_or_path} …"
        ):
            trainer = TrustRegionTrainer(None, args, data, held_out)
        for report in trainer.reports:
            say(report.render())
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except torch.cuda.OutOfMemoryError as error:
        tokens = (args if trainer is None else trainer.args).max_tokens_per_pack
        _say_error(
            f"out of GPU memory at max_tokens_per_pack={tokens} ({str(error).splitlines()[0]}). Set "
            "max_tokens_per_pack to half of it (the mathematics stays the same), or shorten max_length."
        )
        return 1
    number = trainer.signals.received
    if number is not None and trainer.state.global_step < trainer.state.max_steps:
        if trainer.unsaved:
            last = ck.last_whole(output_dir)[0]
            _say_error(
                f"stopped by a signal at step {trainer.state.global_step}, and the checkpoint could not be written; the last "
                f"good one is {last or 'none'}."
            )
            return 128 + number
        again = shlex.join([*argv, "--resume_from_checkpoint", "true"])
        say(
            f"Stopped by a signal at step {trainer.state.global_step}, checkpoint saved. Go on with:\n  lorat train {again}"
        )
        return 128 + number
    trainer.save_model()
    if held_out is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        say("Evaluation: " + "  ".join(f"{k.removeprefix('eval_')} {v:.4g}" for k, v in metrics.items() if "/" in k))
    trainer.save_state()
    say(f"The adapter is in {output_dir} (a plain PEFT adapter; README.md there says how to load it).")
    return 0


def plan(argv: list[str]) -> int:
    from .plan import plan as run

    return run(argv)


def demo(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lorat demo", description="A small run from scratch, to look at.")
    parser.add_argument("--out", default="demo-output", help="where models and adapters go (default: demo-output)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    from ..demo.demo import run

    run(Path(options.out), seed=options.seed)
    return 0


def merge(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lorat merge", description="Fold a trained adapter into its base.")
    parser.add_argument("run", help="output folder or checkpoint of a run, or any PEFT LoRA adapter")
    parser.add_argument("--out", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="dequantized",
        help="dequantized: what was trained, to the digit (default); original: the 16-bit weights",
    )
    parser.add_argument("--base-model", help="where the base lies now, if not where it lay in training")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="type to save in"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    options = parser.parse_args(argv)
    from ..runs.merge import merge as fold

    report = fold(options.run, options.out, options.base, options.base_model, options.dtype, options.trust_remote_code)
    print(report.render())
    return 0


def judge(argv: list[str]) -> int:
    from .judge import judge as run

    return run(argv)


def report(argv: list[str]) -> int:
    from .judge import report as run

    return run(argv)


def evaluate(argv: list[str]) -> int:
    from . import eval as commands_eval

    return commands_eval.evaluate(argv)


def generate(argv: list[str]) -> int:
    from . import generate as commands_generate

    return commands_generate.generate(argv)


def _printer(main: bool):
    from rich.console import Console

    console = Console(stderr=False, highlight=False, soft_wrap=True, markup=False)
    return (lambda text: console.print(text)) if main else (lambda text: None)


def _say_error(text: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}lorat: error:{plain} {text}", file=sys.stderr)


def _quieten() -> None:
    """Keep the libraries' own bars and notices out of the way; what lorat has to say goes to stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="lorat: %(message)s", stream=sys.stderr)
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for lorat's developers, who run the tests
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    import datasets
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
