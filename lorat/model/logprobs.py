"""A pack and the active adapter -> log-probs of its completions, without materialising logits.

The backbone gives hidden states, those that predict completion tokens go to `linear_logprob`. The head is
read once from the model (weight, bias, softcap, scale) and checked against the model's own logits at
start-up, since a head that is not what it seems makes every number wrong without a sign.

Policy minus reference is taken per token and then summed: the sums are hundreds of nats, their difference
a fraction of one, and float32 keeps 7 digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lorat_kernels import linear_logprob
from torch import Tensor, nn

from ..errors import ModelError
from ..packs.attention import KEYWORD, NAMES
from ..packs.logprobs import LogProbs, per_completion
from ..packs.packing import Pack, pad_rows
from .adapters import using_reference

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `softcap(h @ weight.T + bias) / temperature`."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, model: PeftModel) -> Head:
        causal: Any = model.get_base_model()
        config = causal.config.get_text_config()
        linear = causal.get_output_embeddings()
        temperature = 1.0
        if getattr(config, "logits_scaling", None):  # Granite divides
            temperature = float(config.logits_scaling)
        elif getattr(config, "logit_scale", None):  # Cohere multiplies
            temperature = 1.0 / float(config.logit_scale)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(linear.weight, linear.bias, float(softcap) if softcap else None, temperature)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`hidden`: (K, D), `targets`: (K,) -> (K,) float32 nats; hidden states are taken in the type they come in."""
        return linear_logprob(
            hidden, self.weight, targets, self.bias, temperature=self.temperature, softcap=self.softcap
        )


def backbone(model: PeftModel) -> nn.Module:
    """The decoder below the head, adapters and all."""
    causal: Any = model.get_base_model()
    inner = causal.base_model
    return inner if inner is not causal else causal.get_decoder()


def token_logprobs(model: PeftModel, head: Head, pack: Pack) -> Tensor:
    """Log-probs of the pack's completion tokens under the active adapter: (K,) float32."""
    how: dict[str, Any] = {"attention_mask": pack.attention_mask}
    if pack.layout is not None:
        base: Any = model.get_base_model()
        if base.config._attn_implementation not in NAMES.values():  # it would be dropped without a sign
            raise ModelError("this model has not been told of layouts; call lorat.packs.attention.install on it first.")
        # a 4-D mask is handed through as it is, so that no T x T one is made
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pack.input_ids.device)
        how = {"attention_mask": nothing, "position_ids": pack.position_ids, KEYWORD: pack.layout}
    out = backbone(model)(input_ids=pack.input_ids, use_cache=False, **how)
    hidden = out.last_hidden_state.flatten(0, 1).index_select(0, pack.predict)
    return head.logprobs(hidden, pack.targets)


def policy_and_reference(model: PeftModel, head: Head, pack: Pack) -> LogProbs:
    """Log-probs of the policy and its log-ratios to the reference; gradients flow through the policy alone."""
    with torch.no_grad(), using_reference(model):
        reference = token_logprobs(model, head, pack)
    policy = token_logprobs(model, head, pack)
    lengths = torch.tensor(pack.lengths, device=policy.device)
    ratios = per_completion(policy - reference, pack.lengths)
    return LogProbs(per_completion(policy, pack.lengths), ratios, lengths, policy)


@torch.no_grad()
def check_head(model: PeftModel, head: Head, device: torch.device) -> None:
    """Raise `ModelError` if our log-probs are not those of the model's own logits, on a row of 8 tokens.

    The model rounds its logits to the head's type: the bound is 0.02 nats plus 8 half-units in the last place of the
    greatest logit, which is above that loss and below what another head or scale would give.
    """
    vocabulary = head.weight.shape[0]
    ids = torch.randint(0, vocabulary, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    pack = pad_rows([(ids[:1], [ids[1:]])], pad_id=0).to(device)
    training = model.training
    model.eval()
    ours = token_logprobs(model, head, pack)
    logits = model.get_base_model()(input_ids=pack.input_ids, use_cache=False).logits[0, :-1].float()
    model.train(training)
    bound = 0.02 + 4 * torch.finfo(head.weight.dtype).eps * logits.abs().max().item()
    theirs = logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]
    gap = (ours - theirs).abs().max().item()
    if not gap < bound:
        raise ModelError(
            f"{type(model.get_base_model()).__name__} turns hidden states into logits in a way that lorat does not "
            f"know: log-probs differ by up to {gap:.3g} nats from its own. Training it would be silently wrong; "
            "choose another model, or report its name so that its head can be supported."
        )
