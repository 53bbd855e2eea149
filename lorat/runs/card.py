"""The README.md of a trained adapter and of a merged model: what it is, how it was made, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..data.mixture import parts_of
from ..files import put
from ..methods import METHODS
from .versions import versions

BODY = """\
# {title}

A LoRA adapter for `{base}`, aligned with [lorat](https://arxiv.org/abs/2404.09656): {method} with {sync}
reference.

| | |
|---|---|
| base | `{base}`{quantised} |
| started from | {start} |
| data | {data} |
| method | {method}, beta {beta:g} |
| reference | {reference} |
| steps | {steps} optimiser steps, {examples} examples each |
| learning rate | {learning_rate:g} |
| adapter | rank {rank}, alpha {alpha:g} |
| versions | {versions} |

## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


def write_model_card(folder: Path, trainer: Any) -> None:
    """Write `folder`/README.md from what the trainer ran with."""
    args, rule, facts = trainer.args, trainer.rule, trainer.facts
    peft_config = trainer.model.peft_config["default"]
    base = args.model_name_or_path or trainer.model.get_base_model().config._name_or_path or "the base model"
    moved = f"{rule.updates} update{'' if rule.updates == 1 else 's'}"
    reference = f"{args.sync}, alpha {rule.alpha:g} every {rule.every} steps, lag {rule.lag:.1f} steps, {moved}"
    if rule.adaptive:
        limits = ", ".join(f"{k} {v:g}" for k in ("sync_limit", "sync_distance") if (v := getattr(args, k)) is not None)
        reference = f"adaptive, alpha {rule.alpha:g}, {limits}, at least {rule.every} steps apart, {moved}"
    method = METHODS[args.method].title
    start = f"adapter `{args.policy_adapter}`" if args.policy_adapter else "the base itself"
    start += f", reference from adapter `{args.ref_adapter}`" if args.ref_adapter else ""
    names = [f"`{part.name}`, split `{part.split}`" for part in parts_of(vars(args))]
    data = "; ".join(names) or "given in Python"
    quantised = ", in 4-bit " + facts.quant_type.upper() if facts.four_bit else ""
    text = BODY.format(
        title=f"{Path(base).name} aligned by {'TR-' if rule.moves else ''}{method}",
        base=base,
        folder=folder,
        quantised=quantised,
        start=start,
        method=("TR-" if rule.moves else "") + method,
        sync={"frozen": "a frozen", "soft": "a softly moving", "hard": "a hard-updated", "adaptive": "an adaptive"}[
            args.sync
        ],
        data=data,
        beta=args.beta,
        reference=reference if rule.moves else "frozen at the start",
        steps=trainer.state.global_step,
        examples=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        rank=getattr(peft_config, "r", 0),
        alpha=getattr(peft_config, "lora_alpha", 0),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
    )
    tags = ["lorat", "peft", "lora", method.lower()] + (["tr-" + method.lower()] if rule.moves else [])
    hub_base = base if base.count("/") == 1 and not Path(base).exists() else None
    card = ModelCardData(library_name="peft", base_model=hub_base, tags=tags)
    whole = str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=True))
    put(folder / "README.md", whole)


MERGED = """\
# {title}

An adapter trained with [lorat](https://arxiv.org/abs/2404.09656), merged into `{base}` ({where}) and saved in
{dtype}. An ordinary model: neither PEFT nor bitsandbytes is needed.

| | |
|---|---|
| base | `{base}` |
| merged into | {where} |
| type | {dtype} |
| merged in float32, against {against} | {folded} |
| this folder, against that | {saved} |
| what rounding to {dtype} alone gives | {rounding} |
{changed}| measured on | {tokens} tokens of text |
| versions | {versions} |

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
{made}"""


def write_merged_card(folder: Path, adapter: Path, report: Any) -> None:
    """Write `folder`/README.md from a `MergeReport`; how the adapter was made is taken from the card in `adapter`."""
    local = Path(report.name).exists()
    base, made = Path(report.name).name if local else report.name, ""  # no path of this machine
    if (adapter / "README.md").is_file():
        body = ModelCard((adapter / "README.md").read_text(), ignore_metadata_errors=True).text
        table = [line for line in body.splitlines() if line.startswith("|")]
        if table:
            made = "\n## The adapter\n\n" + "\n".join(table).replace(report.name, base) + "\n"
    original = report.base == "original"
    text = MERGED.format(
        title=report.out.name,
        where=report.where,
        base=base,
        dtype=report.dtype,
        against="the adapter on the original weights" if original else "the trained model",
        folded=report.folded,
        saved=report.saved,
        rounding=report.rounding,
        changed=f"| this folder, against the model as it was trained | {report.changed} |\n" if report.changed else "",
        tokens=report.tokens,
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        folder=report.out.name,
        made=made,
    )
    hub_base = base if base.count("/") == 1 and not local else None
    card = ModelCardData(
        library_name="transformers", base_model=hub_base, tags=["lorat"], pipeline_tag="text-generation"
    )
    whole = str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=True))
    put(folder / "README.md", whole)
