"""One base with policy and reference on it, and the log-probs of a pack's completions under each, without full logits.

The backbone gives hidden states, those that predict completion tokens go to `linear_logprob`. The head is
read once from the model (weight, bias, softcap, scale) and checked against the model's own logits at
start-up, since a head that is not what it seems silently makes every number wrong.

Policy minus reference is taken per token and then summed: the sums are hundreds of nats, their difference
a fraction of one, and float32 keeps 7 digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lorat_kernels import linear_logprob
from torch import Tensor, nn

from ..errors import ModelError
from ..packs.attention import KEYWORD, NAMES
from ..packs.logprobs import LogProbs, per_completion
from ..packs.packing import Pack, pad_rows
from ..reference import POLICY, REFERENCE, adapter_parameters, snapshot

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


class Models(nn.Module):
    """Policy and reference, two adapters of one PEFT model; called with a pack, it gives log-probs under both.

    A module of its own, so that DDP's hooks run around a pass that needs no logits. `head`: what is read from the model
    unless given. `autocast`: the types that passes compute in.
    """

    def __init__(
        self,
        model: PeftModel,
        head: Head | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.peft = model
        self.head = Head.of(model) if head is None else head
        self.autocast = autocast

    def hidden(self, pack: Pack) -> Tensor:
        """Hidden states that predict the pack's completion tokens, under the active adapter: (K, D)."""
        how: dict[str, Any] = {"attention_mask": pack.attention_mask}
        if pack.layout is not None:
            base: Any = self.peft.get_base_model()
            if base.config._attn_implementation not in NAMES.values():  # it would be dropped silently
                raise ModelError(
                    "this model has not been told of layouts; call lorat.packs.attention.install on it first."
                )
            # a 4-D mask is handed through as it is, so that no T x T one is made
            nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pack.input_ids.device)
            how = {"attention_mask": nothing, "position_ids": pack.position_ids, KEYWORD: pack.layout}
        out = backbone(self.peft)(input_ids=pack.input_ids, use_cache=False, **how)
        return out.last_hidden_state.flatten(0, 1).index_select(0, pack.predict)

    def tokens(self, pack: Pack) -> Tensor:
        """Log-probs of the pack's completion tokens under the active adapter: (K,) float32 nats."""
        return self.head.logprobs(self.hidden(pack), pack.targets)

    def forward(self, pack: Pack) -> LogProbs:
        """Log-probs of the policy and its log-ratios to the reference; gradients flow through the policy alone."""
        with self.autocast():
            with torch.no_grad(), self.reference():
                reference = self.tokens(pack)
            policy = self.tokens(pack)
        lengths = torch.tensor(pack.lengths, device=policy.device)
        logps, ratios = per_completion(policy, pack.lengths), per_completion(policy - reference, pack.lengths)
        return LogProbs(logps, ratios, lengths, policy)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, passes go through the reference, without dropout; afterwards the policy is as it was."""
        training = self.peft.training
        self.peft.set_adapter(REFERENCE, inference_mode=True)
        self.peft.eval()
        try:
            yield
        finally:
            self.peft.set_adapter(POLICY)
            self.peft.train(training)

    @contextmanager
    def policy_as(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the policy holds `values` (a `snapshot`, the start's say); afterwards what it held, bit for bit."""
        held = snapshot(self.peft, POLICY)
        try:
            self._fill_(values)
            yield
        finally:
            self._fill_(held)

    def _fill_(self, values: Mapping[str, Tensor]) -> None:
        for name, p in adapter_parameters(self.peft, POLICY).items():
            p.data.copy_(values[name])


@torch.no_grad()
def check_head(models: Models, device: torch.device) -> None:
    """Raise `ModelError` if our log-probs are not those of the model's own logits, on a row of 8 tokens.

    The model rounds its logits to the head's type: the bound is 0.02 nats plus 8 half-units in the last place of the
    greatest logit, which is above that loss and below what another head or scale would give.
    """
    model, head = models.peft, models.head
    vocabulary = head.weight.shape[0]
    ids = torch.randint(0, vocabulary, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    pack = pad_rows([(ids[:1], [ids[1:]])], pad_id=0).to(device)
    training = model.training
    model.eval()
    ours = models.tokens(pack)
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
