"""`lorat merge`: the dequantised form reproduces the trained model; the original form says what it changes."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from lorat.cli.main import main
from lorat.train.trainer import TrustRegionTrainer
from tests.helpers.worlds import make_pairs, run_config

IDS = torch.arange(3, 25)[None]


@pytest.fixture(scope="module")
def trained(neox, tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "run"
    args = run_config(neox, out, save_strategy="steps", save_steps=2)
    trainer = TrustRegionTrainer(None, args, Dataset.from_list(make_pairs(16)))
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    with torch.no_grad():
        return out, trainer.model(input_ids=IDS).logits.log_softmax(-1)


def logprobs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not getattr(model.config, "quantization_config", None)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        return model(input_ids=IDS).logits.log_softmax(-1)


def test_both_forms(trained, neox, tmp_path, capsys):
    run, expected = trained
    assert main(["merge", str(run), "--out", str(tmp_path / "dequantized")]) == 0
    said = capsys.readouterr().out
    torch.testing.assert_close(logprobs(tmp_path / "dequantized"), expected, rtol=0, atol=2e-5)
    assert "as 4-bit rounded it" in said

    assert main(["merge", str(run), "--out", str(tmp_path / "original"), "--base", "original"]) == 0
    said = capsys.readouterr().out
    gap = (logprobs(tmp_path / "original") - expected).abs().max().item()
    assert gap > 0.05  # 4-bit rounding of this model is no small thing
    assert "has not seen these" in said and "--base dequantized" in said
    # the original form is the original base plus the adapter, by PEFT alone
    from peft import PeftModel

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(neox), str(run))
    with torch.no_grad():
        torch.testing.assert_close(
            logprobs(tmp_path / "original"), plain(input_ids=IDS).logits.log_softmax(-1), rtol=0, atol=2e-5
        )


def test_a_checkpoint_merges_too(trained, tmp_path):
    run, expected = trained
    assert main(["merge", str(run / "checkpoint-4"), "--out", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logprobs(tmp_path / "merged"), expected, rtol=0, atol=2e-5)


def test_what_cannot_be_merged(trained, neox, tmp_path, capsys):
    run, _ = trained
    assert main(["merge", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2
    assert "has no adapter_model.safetensors" in capsys.readouterr().err
    assert main(["merge", str(run), "--out", neox]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", str(run), "--out", str(tmp_path / "y"), "--base-model", str(tmp_path)]) == 2
    assert "no readable model configuration" in capsys.readouterr().err
