"""The demo at a smaller size: what it puts where, and that its table says what its models do."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lorat.cli.main import main
from lorat.demo import demo, toy
from lorat.errors import CheckpointError


def test_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SAMPLED", 96)
    teach = toy.make_sft_model
    monkeypatch.setattr(toy, "make_sft_model", lambda tokenizer, seed: teach(tokenizer, seed, steps=120))
    out = tmp_path / "demo"
    rows = demo.run(out, seed=1, pairs=256)
    said = capsys.readouterr().out
    for words in ("gold reward", "KL to SFT", "SFT", "TR-DPO", str(out / "tr-dpo"), "lorat merge", "NF4"):
        assert words in said
    assert list(rows) == ["SFT", "DPO", "TR-DPO"] and rows["SFT"].kl == 0 and rows["SFT"].accuracy is None
    # the table's KL again, from the files that were written, by transformers and PEFT alone
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    prompts = demo.random.Random(1).choices(toy.PROMPTS, k=96)
    for name in ("DPO", "TR-DPO"):
        base = AutoModelForCausalLM.from_pretrained(out / "sft", quantization_config=nf4, device_map={"": "cpu"})
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        sft = toy.sequence_logps(base, tokenizer, prompts, rows[name].samples)
        policy = PeftModel.from_pretrained(base, str(out / name.lower()))
        ratio = toy.sequence_logps(policy, tokenizer, prompts, rows[name].samples) - sft
        assert rows[name].kl == pytest.approx(ratio.mean().item(), abs=1e-4)
        assert rows[name].kl_error == pytest.approx((ratio.std() / 96**0.5).item(), abs=1e-4)
        gold = torch.tensor([toy.gold_reward(p, s) for p, s in zip(prompts, rows[name].samples)])
        assert rows[name].gold == pytest.approx(gold.mean().item())
        assert 0 < rows[name].accuracy <= 1
    assert json.loads((out / "demo.json").read_text())["rows"].keys() == rows.keys()
    card = (out / "tr-dpo" / "README.md").read_text()
    assert "alpha 0.1 every 4 steps" in card


def test_the_demo_keeps_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and holds no earlier demo"):
        demo.run(tmp_path)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").read_text() == "mine"
