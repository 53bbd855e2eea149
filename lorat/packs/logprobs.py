"""What a pack gives: log-probs of its completions, per completion and per token. Sums are taken in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class LogProbs(NamedTuple):
    """Per completion, float32 nats."""

    logps: Tensor  # (n,) log pi(y|x)
    logratios: Tensor  # (n,) log pi(y|x) - log ref(y|x), summed token by token
    lengths: Tensor  # (n,) completion tokens
    tokens: Tensor  # (K,) log pi of every completion token, in the order of the completions


def per_completion(tokens: Tensor, lengths: list[int]) -> Tensor:
    """Sums of a pack's per-token values over each completion, (K,) -> (n,) float32, added in float64."""
    sizes = np.asarray(lengths)
    places = (sizes.cumsum() - sizes)[:, None] + np.arange(sizes.max(initial=0))
    places = np.where(np.arange(places.shape[1]) < sizes[:, None], places, sizes.sum())  # beyond the end: a zero
    wide = torch.cat([tokens.double(), tokens.new_zeros(1, dtype=torch.float64)])
    at = torch.from_numpy(places).to(tokens.device, non_blocking=True)
    return wide.index_select(0, at.flatten()).view(places.shape).sum(1).float()


def logprobs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of `targets` (...) under `logits` (..., V), in nats and in the logits' type; for models whose logits exist.

    Everything is materialised, so it is for checks, small models and benchmarks; packs go through `linear_logprob`.
    """
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
