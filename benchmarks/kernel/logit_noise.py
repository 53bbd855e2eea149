"""What float32 logits buy: the noise that bf16-rounded logits put on log-ratios. `python -m benchmarks.kernel.logit_noise`.

A small Llama from a configuration with two LoRA adapters, policy and reference, a little apart; its head scaled so that
logits have a standard deviation of 4, and targets drawn from the policy's own distribution: log-probs near −3 and
target logits from 5 to 20, as a trained model has them. Hidden states are rounded as the variant says; everything after
them is compared with float64 of the same model. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from lorat_kernels import linear_logprob
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record as report
from lorat.packs.logprobs import logprobs_of


def model_with_adapters(vocab: int, dim: int, layers: int, apart: float):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, adapters)
    model.add_adapter("ref", adapters)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, policy in parameters.items():
            if ".default." in name:
                move = apart * policy.std() * torch.randn_like(policy)
                parameters[name.replace(".default.", ".ref.")].copy_(policy + move)
    return base, model


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, way: str) -> Tensor:
    """`(N, D)`, `(V, D)`, `(N,)` -> `(N,)` float64 nats; `way`: rounded (bf16 logits), exact (float64), else ours."""
    if way == "rounded":  # bf16 logits, softmax in float32
        logits = (hidden.float() @ weight.float().T).bfloat16().float()
        return logprobs_of(logits, targets).double()
    if way == "exact":
        logits = hidden.double() @ weight.double().T
        return logprobs_of(logits, targets)
    return linear_logprob(hidden, weight, targets).double()


@torch.no_grad()
def measure(sequences: int, length: int, vocab: int, dim: int, layers: int, apart: float) -> dict[str, Any]:
    base, model = model_with_adapters(vocab, dim, layers, apart)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (sequences, length), generator=generator)
    hidden = {}
    for adapter in ("default", "ref"):
        model.set_adapter(adapter)
        hidden[adapter] = base.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    weight = base.get_output_embeddings().weight
    scale = 4 / (hidden["default"][:64] @ weight.T).std()
    weight = (weight * scale).bfloat16()

    ways: dict[str, tuple[torch.dtype, str, torch.dtype]] = {
        # name: (hidden states given, how, hidden states of the truth)
        "float32 logits (ours), bf16 hidden": (torch.bfloat16, "ours", torch.bfloat16),
        "bf16-rounded logits, bf16 hidden": (torch.bfloat16, "rounded", torch.bfloat16),
        "float32 logits (ours), float32 hidden": (torch.float32, "ours", torch.float32),
        "float32 logits (ours), float32 hidden rounded to bf16": (torch.bfloat16, "ours", torch.float32),
    }
    error: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    signal, target_logits, logps = [], [], []
    for i in range(0, sequences * length, 256):
        rows = slice(i, i + 256)
        h = {a: x[rows] for a, x in hidden.items()}
        logits = h["default"].bfloat16().float() @ weight.float().T
        uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-20)
        targets = (logits - (-uniform.log()).log()).argmax(1)
        target_logits.append(logits.gather(1, targets[:, None])[:, 0])
        truths = {}
        for given in (torch.bfloat16, torch.float32):
            policy, reference = (logprobs(h[a].to(given), weight, targets, "exact") for a in ("default", "ref"))
            truths[given] = policy - reference
        logps.append(policy)
        signal.append(truths[torch.bfloat16])
        for name, (given, way, truth) in ways.items():
            policy, reference = (logprobs(h[a].to(given), weight, targets, way) for a in ("default", "ref"))
            error[name].append(policy - reference - truths[truth])

    def rms(x: Tensor) -> float:
        """Root mean square of a tensor of any shape."""
        return x.square().mean().sqrt().item()

    found = {name: torch.cat(e) for name, e in error.items()}
    logit = torch.cat(target_logits)
    return {
        "log_ratio_rms_per_token": rms(torch.cat(signal)),
        "mean_logprob": torch.cat(logps).mean().item(),
        "target_logit_p05_p50_p95": [torch.quantile(logit, q).item() for q in (0.05, 0.5, 0.95)],
        "noise": {
            name: {
                "per_token_rms_nats": rms(e),
                "per_sequence_rms_nats": rms(e.view(sequences, length).sum(1)),
                "per_sequence_rms_if_independent_nats": rms(e) * math.sqrt(length),
                "worst_token_nats": e.abs().max().item(),
            }
            for name, e in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel.logit_noise", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--apart", type=float, default=0.05, help="distance of the adapters, of their own size")
    chosen = vars(parser.parse_args())
    result = measure(**chosen)
    for name, noise in result["noise"].items():
        print(
            f"{name:<56} {noise['per_token_rms_nats']:.2e} nats a token, {noise['per_sequence_rms_nats']:.2e} "
            f"nats a sequence of {chosen['length']}, worst token {noise['worst_token_nats']:.2e}"
        )
    print(report.document("benchmarks.kernel.logit_noise", torch.device("cpu"), settings=chosen, **result))


if __name__ == "__main__":
    main()
