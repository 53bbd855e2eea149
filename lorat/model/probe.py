"""Can this model compute packs exactly? Asked of the loaded model at start-up, in a few forward passes of 40 tokens.

A model that drops the layout, computes positions of its own or mixes tokens elsewhere than in attention would train on
wrong numbers silently. It is found here, by its own log-probs, and trained on one padded row a completion.

Checks: the configuration (a decoder whose layers attend fully or in a window); every attention layer was called with
the layout; changing one completion's tokens leaves its sibling's log-probs bit for bit as they are (to rounding, where
experts take rows in batches of their own); changing the order of completions, or giving each a row of its own, changes nothing beyond rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from ..packs.attention import attend, hindrance, installed
from ..packs.packing import Group, pad_rows, share_prompts
from .models import Head, Models

LAYERS = {"full_attention", "sliding_attention", "attention"}


def why_not(models: Models, device: torch.device, longest: int) -> str | None:
    """None if the model computes packs of rows of up to `longest` tokens exactly; else the reason, in words.

    Log-probs may differ from those of separate rows by rounding: 1e-4 nats, and two units in the last place of the
    computing type relative to them, root mean square. A question: the model is as it was afterwards, and
    `attention.install` is what has it heed layouts.
    """
    model = models.peft
    base: Any = model.get_base_model()
    if reason := _configuration(base.config.get_text_config(), longest):
        return reason
    if reason := hindrance(base.config._attn_implementation):
        return reason
    training = model.training
    model.eval()
    try:
        with installed(base) as told, torch.no_grad(), models.autocast():
            if not told:
                return "its attention does not go through transformers' AttentionInterface"
            return _behaviour(models, device, longest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that does not take the layout may fail in any way of its own
        return first_line(error)
    finally:
        model.train(training)


def _configuration(config: Any, longest: int) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    chunk = getattr(config, "attention_chunk_size", None)
    known = LAYERS | ({"chunked_attention"} if chunk and chunk >= longest else set())
    if strange := set(getattr(config, "layer_types", None) or ()) - known:
        return f"it has layers of type {', '.join(sorted(strange))}"
    if chunk and chunk < longest and not getattr(config, "layer_types", None):
        return f"it attends in chunks of {chunk} tokens, rows have up to {longest}"
    return None


def _behaviour(models: Models, device: torch.device, longest: int) -> str | None:
    base: Any = models.peft.get_base_model()
    config = base.config.get_text_config()
    head = models.head
    vocabulary = head.weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(0, vocabulary, (n,), generator=draw).tolist()  # noqa: E731
    prompt, first, second = ids(7), ids(9), ids(6)
    other: Group = (ids(5), [ids(8)])

    seen: list[tuple[int, int | None]] = []  # each call with the layout: whose, and its window

    def listening(module: Any, *args: Any) -> Tensor:
        seen.append((id(module), args[-1].window))
        return attend(module, *args)

    def shared(*groups: Group) -> list[Tensor]:
        pack = share_prompts(groups).to(device).through(listening)
        return list(models.tokens(pack).double().split(pack.lengths))

    a, b, c = shared((prompt, [first, second]), other)
    layers = len({module for module, _ in seen})
    if layers != config.num_hidden_layers:
        return f"{layers} of its {config.num_hidden_layers} layers were called with the layout"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and sliding and window < longest and all(w is None for _, w in seen):
        return f"its window of {window} tokens does not reach its attention"

    changed = lambda row: [(t + 1) % vocabulary for t in row]  # noqa: E731
    bound = 1e-4 + 2 * _precision(head, device) * torch.cat([a, b, c]).square().mean().sqrt().item()
    apart = lambda x, y: (torch.cat(x) - torch.cat(y)).square().mean().sqrt().item()  # noqa: E731
    untouched = [
        (b, shared((prompt, [changed(first), second]), other)[1]),
        (a, shared((prompt, [first, changed(second)]), other)[0]),
        (c, shared((changed(prompt), [first, second]), other)[2]),
    ]
    # An expert multiplies the rows that were routed to it, and a product may round a row by its place among them.
    equal = (lambda x, y: apart([x], [y]) < bound) if _has_experts(config) else torch.equal
    if not all(equal(before, after) for before, after in untouched):
        return "tokens of one completion reach another"
    swapped = shared((prompt, [second, first]), other)
    if not (gap := apart([a, b, c], [swapped[1], swapped[0], swapped[2]])) < bound:
        return f"log-probs depend on the order of completions (by {gap:.2g} nats a token)"
    rows = pad_rows([(prompt, [first, second]), other], pad_id=0).to(device)
    separate = list(models.tokens(rows).double().split(rows.lengths))
    if not (gap := apart([a, b, c], separate)) < bound:
        return f"log-probs differ from those of separate rows (by {gap:.2g} nats a token)"
    return None


def _has_experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) for name in names)


def _precision(head: Head, device: torch.device) -> float:
    """Unit in the last place of the type that the model computes in, relative."""
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.finfo(dtype).eps
