"""What a model computes on text, in float64 and dequantised, by bitsandbytes' own function and torch alone. Not a test."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from torch import nn

TEXT = (
    "the big dog runs in a park . a small bird sings quickly on the tree or the house ? the cat sleeps and a bird runs"
)


@torch.no_grad()
def exact(model: nn.Module) -> nn.Module:
    """A float64 copy of `model` whose 4-bit layers and quantised embeddings are plain ones of the values they stand for."""
    made = copy.deepcopy(model).eval()
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            weight = child._parameters.get("weight")
            if isinstance(child, nn.Embedding) and type(child).__module__.startswith("bitsandbytes"):
                setattr(parent, name, nn.Embedding.from_pretrained(child(torch.arange(child.num_embeddings))))
            elif isinstance(weight, bnb.nn.Params4bit):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                if child.bias is not None:
                    plain.bias.data = child.bias.data
                setattr(parent, name, plain)
    (made.get_base_model() if hasattr(made, "get_base_model") else made).set_experts_implementation("eager")
    return made.double()  # the grouped product of experts knows no float64


@torch.no_grad()
def text_logprobs(model: nn.Module, tokenizer, text: str = TEXT) -> torch.Tensor:
    """Log-probs of every next token of `text`, (t - 1,) float64, nats."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    logp = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[:, 0]


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
