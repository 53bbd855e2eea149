"""`lorat train`: a run from its settings to the finished adapter, and how to go on where it was stopped."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from .terminal import out_of_memory, say_error


class _Settings(argparse.HelpFormatter):
    """The settings' own text, made where it is asked for."""

    def format_help(self) -> str:
        from ..settings.arguments import help_text

        return help_text().rstrip("\n") + "\n\n  -h, --help  show this text and end\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = _Settings
    parser.set_defaults(settings=[])


def run(options: argparse.Namespace) -> int:
    from ..settings.arguments import parse_config

    args = parse_config(options.settings)
    if args.log_level == "passive":
        args.log_level = args.log_level_replica = "error"

    import torch
    from rich.console import Console

    from ..data.mixture import read_evaluation, read_training
    from ..runs import checkpoint as ck
    from ..train.trainer import TrustRegionTrainer

    output_dir = Path(str(args.output_dir))
    folder, _ = ck.resolve_resume(args.resume_from_checkpoint, output_dir)
    if not args.overwrite_output_dir:  # before anything slow
        ck.guard_output_dir(output_dir, folder is not None, overwrite=False)
    first = args.process_index == 0
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not first)
    say = console.print
    with args.main_process_first(desc="reading data"):
        data, held_out = read_training(vars(args)), read_evaluation(vars(args))
    trainer: TrustRegionTrainer | None = None
    try:
        with Console(stderr=True, quiet=not first).status(
            f"Tokenising {len(data):,} rows and loading {args.model_name_or_path} …"
        ):
            trainer = TrustRegionTrainer(None, args, data, held_out)
        for report in trainer.reports:
            say(report.render())
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except torch.cuda.OutOfMemoryError as error:
        tokens = (args if trainer is None else trainer.args).max_tokens_per_pack
        say_error(
            f"{out_of_memory(error)} at max_tokens_per_pack={tokens}. Set max_tokens_per_pack to half "
            "of it (the mathematics stays the same), or shorten max_length."
        )
        return 1
    number = trainer.signals.received
    if number is not None and trainer.state.global_step < trainer.state.max_steps:
        if trainer.unsaved:
            last = ck.last_whole(output_dir)[0]
            say_error(
                f"stopped by a signal at step {trainer.state.global_step}, and the checkpoint could not be written; the last "
                f"good one is {last or 'none'}."
            )
            return 128 + number
        again = shlex.join([*options.settings, "--resume_from_checkpoint", "true"])
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
