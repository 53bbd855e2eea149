"""What each way of blending gets wrong, along a real training run. `python -m benchmarks.reference.blend_error`.

The toy's GPT-NeoX is aligned by DPO with a moving reference, in plain PyTorch. Beside the reference that the loss sees
(product space at rank 2r, float32) further adapters follow the same policy by the same rule in other ways; the truth is
the same rule on dense float64 weights. Compared are ΔW (relative Frobenius norm over all layers) and the log-probs of
held-out completions (rms error in nats a completion), the latter in float64 on merged weights, so that nothing but the
stored adapter differs. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import record as report
from lorat.demo import toy
from lorat.methods.losses import dpo_loss
from lorat.reference import adapter_parameters, blend_, copy_

# name: (alpha, every)
REGIMES = {
    "0.6 every step": (0.6, 1),
    "0.02 every step": (0.02, 1),
    "0.6 every 25": (0.6, 25),
    "0.6 every 100": (0.6, 100),
}
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
REF = "product_2r_float32"
WAYS = [f"{way}_{dtype}" for way in ("product_r", "product_2r", "factors") for dtype in ("float32", "bfloat16")]


def changes(model: Any, adapter: str) -> dict[str, Tensor]:
    """`scale * B @ A`, (out, in) float64, of every adapted layer, by the layer's name in the base model."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            b, a = layer.lora_B[adapter].weight.detach().double(), layer.lora_A[adapter].weight.detach().double()
            found[name] = layer.scaling[adapter] * b @ a
    return found


def norm(parts: dict[str, Tensor]) -> float:
    """Frobenius norm over all layers' matrices (out, in)."""
    return math.sqrt(sum(t.square().sum().item() for t in parts.values()))


@torch.no_grad()
def merged_logps(base: Any, delta: dict[str, Tensor], held_out: toy.Completions) -> Tensor:
    """Log-prob `(n,)` of each completion under the float64 base with `delta` added."""
    for name, change in delta.items():
        base.get_submodule(name).weight += change
    logps = held_out.logps(base, slice(None)).sum(1)
    for name, change in delta.items():
        base.get_submodule(name).weight -= change
    return logps


def run(base: Any, tokenizer: Any, pairs: list[dict[str, str]], alpha: float, every: int, o: argparse.Namespace) -> Any:
    """One training run; returns for each way the errors at every measured step, and how far policy and start came."""
    torch.manual_seed(0)
    policy = LoraConfig(r=o.rank, lora_alpha=2 * o.rank, target_modules=TARGETS)
    model: Any = get_peft_model(copy.deepcopy(base), policy)
    for way in WAYS:
        rank = 2 * o.rank if "2r" in way else o.rank
        model.add_adapter(way, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
        copy_(model, "default", way)
        for p in adapter_parameters(model, way).values():
            p.data = p.data.to(getattr(torch, way.rpartition("_")[2]))
    double = copy.deepcopy(base).double()
    sides = [[x[side] for x in pairs] for side in ("chosen", "rejected")]
    prompts = [x["prompt"] for x in pairs]
    chosen, rejected = (toy.Completions(tokenizer, prompts[: -o.held_out], s[: -o.held_out]) for s in sides)
    held_out = toy.Completions(tokenizer, prompts[-o.held_out :], sides[0][-o.held_out :])
    trained = list(adapter_parameters(model, "default").values())
    optimizer = torch.optim.AdamW(trained, lr=o.learning_rate, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    truth, rng = changes(model, "default"), random.Random(0)
    errors: dict[str, dict[str, list[float]]] = {w: {"weights": [], "reported": [], "nats": []} for w in WAYS}
    losses, rms_of_ratio = [], []
    for step in range(1, o.steps + 1):
        rows = torch.tensor(rng.sample(range(len(chosen.ids)), o.batch))
        with torch.no_grad():
            model.set_adapter(REF)
            theirs = [side.logps(model, rows) for side in (chosen, rejected)]
        model.set_adapter("default")
        ratios = [(side.logps(model, rows) - r).sum(1) for side, r in zip((chosen, rejected), theirs)]
        loss = dpo_loss(*ratios, beta=o.beta).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
        if step % every == 0:
            now = changes(model, "default")
            truth = {name: alpha * now[name] + (1 - alpha) * truth[name] for name in truth}
            for way in WAYS:
                made = blend_(model, alpha, "default", way, "factors" if "factors" in way else "product")
                errors[way]["reported"].append(made.item())
        if step % o.measure_every == 0 and step >= every:
            exact = merged_logps(double, truth, held_out)
            policy_logps = merged_logps(double, changes(model, "default"), held_out)
            rms_of_ratio.append((policy_logps - exact).square().mean().sqrt().item())
            for way in WAYS:
                delta = changes(model, way)
                errors[way]["weights"].append(norm({n: delta[n] - truth[n] for n in truth}) / norm(truth))
                nats = merged_logps(double, delta, held_out) - exact
                errors[way]["nats"].append(nats.square().mean().sqrt().item())
    return {
        "loss_first_last_20": [sum(losses[:20]) / 20, sum(losses[-20:]) / 20],
        "log_ratio_rms_nats": {"last": rms_of_ratio[-1], "greatest": max(rms_of_ratio)},
        "ways": {
            way: {k: {"last": v[-1], "greatest": max(v)} for k, v in found.items()} for way, found in errors.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference.blend_error", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=64, help="pairs kept for measuring")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--measure-every", type=int, default=25, help="optimiser steps between measurements")
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "blend-error-cpu.json")
    chosen = parser.parse_args()
    tokenizer = toy.make_tokenizer()
    base = toy.make_sft_model(tokenizer, steps=chosen.sft_steps).requires_grad_(False)
    pairs = toy.preference_pairs(base, tokenizer, chosen.pairs)
    console, found = Console(width=120), {}
    for name, (alpha, every) in REGIMES.items():
        if max(every, chosen.measure_every) > chosen.steps:
            print(f"alpha {name}: left out, the run of {chosen.steps} steps never moves its reference or measures it")
            continue
        found[name] = run(base, tokenizer, pairs, alpha, every, chosen)
        table = Table(title=f"alpha {name}: error of the reference, greatest along the run (at its end)")
        for column in ("way", "ΔW", "reported by the last blend", "log-probs, nats a completion"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for way, e in found[name]["ways"].items():
            table.add_row(
                way.replace("_", " "),
                f"{e['weights']['greatest']:.2%} ({e['weights']['last']:.2%})",
                f"{e['reported']['last']:.2%}",
                f"{e['nats']['greatest']:.4f} ({e['nats']['last']:.4f})",
            )
        console.print(table)
        ratio = found[name]["log_ratio_rms_nats"]
        print(f"policy against the exact reference: {ratio['greatest']:.2f} ({ratio['last']:.2f}) nats rms\n")
    settings = {k: v for k, v in vars(chosen).items() if k != "out"}
    document = report.document(
        "benchmarks.reference.blend_error", torch.device("cpu"), settings=settings, regimes=found
    )
    chosen.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
