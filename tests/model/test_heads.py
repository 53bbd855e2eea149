"""Log-probs of heads with a bias, a softcap or a scale equal those of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

from lorat.model.adapters import attach
from lorat.model.models import Head, Models, check_head
from lorat.packs.logprobs import per_completion
from lorat.packs.packing import pad_rows

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(**SMALL),
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        CohereConfig(**SMALL, logit_scale=0.25),
    ],
    ids=["bias", "softcap", "scaling", "scale"],
)
def test_heads(config):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    if base.get_output_embeddings().bias is not None:
        base.get_output_embeddings().bias.data.normal_()
    base.requires_grad_(False)
    model = attach(base, LoraConfig(target_modules=["q_proj"]))
    head = Head.of(model)
    check_head(Models(model, head), torch.device("cpu"))
    pack = pad_rows([([5, 6], [[7, 8, 9]]), ([10], [[11]])], pad_id=0)
    with torch.no_grad():
        ours = Models(model.eval(), head).tokens(pack)
        expected = []
        for prompt, completion in (([5, 6], [7, 8, 9]), ([10], [11])):
            logits = base(input_ids=torch.tensor([prompt + completion])).logits[0, :-1].double().log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
            expected += [logits[i, token].item() for i, token in zip(at, completion)]
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_sums_over_a_completion_keep_their_digits():
    assert per_completion(torch.tensor([2.0**24, 1.0, 1.0]), [3]).item() == 2**24 + 2
