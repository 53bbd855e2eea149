"""What a handful of numbers says about a distribution: means with errors, KL, calibration, diversity. Pure functions.

Formulae and their limits are in docs/evaluation.md. torch alone, and sacrebleu for `self_bleu`; each is tested against
enumeration or by hand. Log-probs and log-ratios are in nats.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError


class Estimate(NamedTuple):
    """A mean and its standard error (NaN where one value says nothing of the spread)."""

    mean: float
    error: float


class Bin(NamedTuple):
    """A line of a reliability table: `pairs` whose confidence is in `[low, high)`, its mean, and how many are right."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """How well `σ(margin)` predicts preferences; of a coin: Brier 0.25, log loss ln 2."""

    ece: float
    brier: float
    log_loss: float
    table: list[Bin]


def estimate(values: Tensor, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of `values` (n,) and its standard error, from G clusters whose members may resemble each other.

    `error² = G/(G−1) Σ_g (Σ_{i in g} (x_i − mean))² / n²`, the cluster-robust variance of a mean; clusters of one value
    each give `s²/n`. With a single cluster its members count as independent. Raises `ValueError` for no values.
    """
    x = values.detach().double().cpu()
    if not len(x):
        raise ValueError("no values, so there is no mean.")
    off = x - x.mean()
    if clusters is not None and len(set(clusters)) > 1:
        if len(clusters) != len(x):
            raise ValueError(f"{len(clusters)} clusters for {len(x)} values; give one a value.")
        places = {c: g for g, c in enumerate(dict.fromkeys(clusters))}
        index = torch.tensor([places[c] for c in clusters])
        off = torch.zeros(len(places), dtype=torch.float64).index_add_(0, index, off)
    if len(off) < 2:
        return Estimate(x.mean().item(), float("nan"))
    variance = len(off) / (len(off) - 1) * off.square().sum() / len(x) ** 2
    return Estimate(x.mean().item(), variance.sqrt().item())


def calibration(margins: Tensor, bins: int = 10) -> Calibration:
    """`σ(margin)` as the probability that the chosen completion is preferred; `margins` (n,): `β(Δ_w − Δ_l)`.

    Which completion stands first is arbitrary, so what is judged is the prediction: its confidence `σ(|margin|)`,
    in `bins` equal steps from ½ to 1, and whether it is right (a margin of 0 is half right). `ece = Σ_b n_b/n
    |accuracy_b − confidence_b|`; `brier = mean (1 − σ(margin))²`; `log_loss = mean −log σ(margin)`. Empty bins are left out.
    """
    if bins < 1 or not len(margins):
        raise ValueError(f"{len(margins)} margins in {bins} bins; give at least one of each.")
    m = margins.detach().double().cpu()
    confidence = m.abs().sigmoid()
    right = (m > 0).double() + 0.5 * (m == 0)
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table = []
    for b in range(bins):
        if n := int((mine := place == b).sum()):
            low, high = 0.5 + 0.5 * b / bins, 0.5 + 0.5 * (b + 1) / bins
            table.append(Bin(low, high, n, confidence[mine].mean().item(), right[mine].mean().item()))
    ece = sum(b.pairs * abs(b.accuracy - b.confidence) for b in table) / len(m)
    brier = (1 - m.sigmoid()).square().mean().item()
    return Calibration(ece, brier, -torch.nn.functional.logsigmoid(m).mean().item(), table)


def token_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Exact `KL(p‖q)` of each row of logits, (K, V) and (K, V) -> (K,) nats, float32 or float64 as given.

    Summed as `p log(p/q) − p + q`, whose terms are never negative, so that rounding does not cancel what is small.
    """
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    ratio = torch.where(p > -torch.inf, p - q, 0)
    return (p.exp() * ratio - p.exp() + q.exp()).sum(-1)


def distinct(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """distinct-n (Li et al., arXiv 1510.03055): different n-grams by all n-grams of all sequences; NaN without any.

    It falls as there is more text, so compare it between samples of like size only.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(texts: Sequence[str], limit: int = 100, seed: int = 0) -> float:
    """self-BLEU (Zhu et al., arXiv 1802.01886), 0 to 100: mean BLEU-4 of each text with all others as references.

    High means alike. By sacrebleu (13a tokens, exponential smoothing, effective order), over `limit` of the texts drawn
    by `seed`: the cost grows with the square. NaN for fewer than two texts. Raises `ConfigError` without sacrebleu.
    """
    if not has_sacrebleu():
        raise ConfigError('self-BLEU is computed by sacrebleu, which is not installed; pip install "lorat[eval]".')
    from sacrebleu.metrics import BLEU

    if len(texts) > limit:
        texts = random.Random(seed).sample(list(texts), limit)
    if len(texts) < 2:
        return float("nan")
    metric: Any = BLEU(effective_order=True)
    rest = lambda i: [t for j, t in enumerate(texts) if j != i]  # noqa: E731
    return sum(metric.sentence_score(t, rest(i)).score for i, t in enumerate(texts)) / len(texts)


def has_sacrebleu() -> bool:
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        return False
    return True
