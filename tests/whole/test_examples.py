"""The examples run at toy size, and use nothing of lorat but what is public."""

from __future__ import annotations

import ast
import json
import runpy
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lorat
from tests.helpers.worlds import ROOT, make_pairs, make_tokenizer

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_uses_public_names_alone(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    nodes = list(ast.walk(ast.parse(text)))
    taken = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "lorat"]
    assert taken and all(n.module == "lorat" and {a.name for a in n.names} <= set(lorat.__all__) for n in taken)
    assert not any(a.name.startswith("lorat") for n in nodes if isinstance(n, ast.Import) for a in n.names)


def test_tr_dpo_trains_moves_the_reference_and_saves_what_peft_loads(neox, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(p) + "\n" for p in make_pairs(40)))
    given = {"model": neox, "data": data, "out": out, "every": 4, "prompt": "the dog ?"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["tr_dpo.py", *words])
    runpy.run_path(str(ROOT / "examples" / "tr_dpo.py"), run_name="__main__")
    said = capsys.readouterr().out.strip().splitlines()[-1]
    moves = [json.loads(line)["step"] for line in (out / "reference.jsonl").read_text().splitlines()]
    assert moves == [4, 8, 12]  # of 15 steps: three epochs of 40 pairs, 8 a step
    # greedy decoding, a token at a time, without `generate`
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(neox), str(out)).eval()
    tokenizer = make_tokenizer()
    prompt = ids = tokenizer("the dog ?").input_ids
    with torch.no_grad():
        while len(ids) < len(prompt) + 32 and (ids is prompt or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
    assert said == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert weights and all(w.any() for w in weights)
