"""Methods that learn from pairs, chosen against rejected: DPO, IPO, APO-zero and HyPO.

They differ in one pure function of `losses.py`. Each may add the SFT term of RPO (arXiv 2404.19733): `sft_weight` times
the mean negative log-likelihood of the chosen completion, nats a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..packs.logprobs import LogProbs
from ..packs.packing import Group
from . import losses
from .method import Example, Method, Outcome, drift


@dataclass(frozen=True)
class Pairs(Method):
    """What the paired losses share; a method of its own gives `loss`."""

    sft_weight: float = 0.0

    unit = "pair"

    def group(self, example: Example) -> Group:
        return example["prompt_ids"], [example["chosen_ids"], example["rejected_ids"]]

    def loss(self, chosen: Tensor, rejected: Tensor, lp: LogProbs) -> losses.PairLoss:
        """Of n pairs from their log-ratios (n,), nats; `lp`: all 2n completions, chosen and rejected alternating."""
        raise NotImplementedError

    def score(self, examples: Sequence[Example], lp: LogProbs, baseline: Tensor) -> Outcome:
        out = self.loss(lp.logratios[0::2], lp.logratios[1::2], lp)
        margins = out.chosen_rewards - out.rejected_rewards
        values = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": (margins > 0).float(),
            "rewards/margins": margins,
            "logps/chosen": lp.logps[0::2],
            "logps/rejected": lp.logps[1::2],
        }
        total = out.losses
        if self.sft_weight:
            nll = -lp.logps[0::2] / lp.lengths[0::2]
            total = total + self.sft_weight * nll
            values["nll_loss"] = nll
        one = torch.ones_like(margins)
        metrics = {name: (v.detach(), one) for name, v in values.items()}
        far, tokens, more = drift(lp.logratios.view(-1, 2), lp.lengths.view(-1, 2), margins)
        return Outcome(total, far, tokens, metrics | more)


@dataclass(frozen=True)
class DPO(Pairs):
    """DPO (arXiv 2305.18290), conservative or robust with `label_smoothing`; see `losses.dpo_loss`."""

    label_smoothing: float = 0.0
    robust: bool = False
    length_normalize: bool = False

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"

    def loss(self, chosen: Tensor, rejected: Tensor, lp: LogProbs) -> losses.PairLoss:
        return losses.dpo_loss(
            chosen,
            rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            robust=self.robust,
            chosen_lengths=lp.lengths[0::2],
            rejected_lengths=lp.lengths[1::2],
            length_normalize=self.length_normalize,
        )


@dataclass(frozen=True)
class IPO(Pairs):
    """IPO (arXiv 2310.12036), on per-token means unless `length_normalize` is off; see `losses.ipo_loss`."""

    length_normalize: bool = True

    name: ClassVar[str] = "ipo"
    title: ClassVar[str] = "IPO"

    def loss(self, chosen: Tensor, rejected: Tensor, lp: LogProbs) -> losses.PairLoss:
        return losses.ipo_loss(
            chosen,
            rejected,
            beta=self.beta,
            chosen_lengths=lp.lengths[0::2],
            rejected_lengths=lp.lengths[1::2],
            length_normalize=self.length_normalize,
        )


@dataclass(frozen=True)
class APOZero(Pairs):
    """APO-zero (arXiv 2408.06266): chosen up, rejected down, each against the reference; see `losses.apo_zero_loss`."""

    name: ClassVar[str] = "apo_zero"
    title: ClassVar[str] = "APO-zero"

    def loss(self, chosen: Tensor, rejected: Tensor, lp: LogProbs) -> losses.PairLoss:
        return losses.apo_zero_loss(chosen, rejected, beta=self.beta)


@dataclass(frozen=True)
class HyPO(Pairs):
    """HyPO (arXiv 2602.11902): a reference that prefers the rejected completion is ignored; see `losses.hypo_loss`."""

    name: ClassVar[str] = "hypo"
    title: ClassVar[str] = "HyPO"

    def loss(self, chosen: Tensor, rejected: Tensor, lp: LogProbs) -> losses.PairLoss:
        reference = (lp.logps - lp.logratios).detach()
        return losses.hypo_loss(chosen, rejected, reference[0::2] - reference[1::2], beta=self.beta)
