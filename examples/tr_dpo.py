"""TR-DPO from preference pairs to a plain PEFT adapter, through lorat's public names alone.

    python examples/tr_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/ultrafeedback_binarized --out runs/tr-dpo

The base is loaded in 4-bit, once, with two adapters on it: the policy, and the reference that follows it. What is saved
is the policy, which PEFT loads without lorat.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorat import TrustRegionConfig, TrustRegionTrainer


def align(model: str, pairs: Dataset, out: str, every: int) -> None:
    """Train on rows of prompt, chosen and rejected; every so many steps 0.6 of the policy goes into the reference."""
    settings = TrustRegionConfig(
        output_dir=out,
        method="dpo",
        beta=0.1,
        sync="soft",
        sync_alpha=0.6,
        sync_every=every,
        learning_rate=1e-5,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = TrustRegionTrainer(model, settings, train_dataset=pairs)
    trainer.train()
    trainer.save_model()


def answer(model: str, adapter: str, prompt: str) -> str:
    """The likeliest answer of the trained policy, by transformers and PEFT."""
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = policy.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--every", type=int, default=512)
    parser.add_argument("--prompt", default="What is a good name for a cat?")
    given = parser.parse_args()
    files = Path(given.data).is_file()
    rows = (
        load_dataset("json", data_files=given.data, split="train") if files else load_dataset(given.data, split="train")
    )
    align(given.model, rows, given.out, given.every)
    print(answer(given.model, given.out, given.prompt))
