"""What is saved is what was trained, for every architecture: by plain PEFT, and merged by plain transformers.

Each station is compared on text, in float64 and dequantised, with the model that was trained. A dozen architectures go with
every commit; the others are marked `whole` (`make test-whole`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Gemma3Config

from lorat.errors import ModelError
from lorat.runs.merge import merge
from tests.helpers.architectures import SEPARATE, SHARED, make
from tests.helpers.saved import TEXT, exact, largest_gap, text_logprobs
from tests.helpers.worlds import SHARED as BESIDE
from tests.helpers.worlds import make_pairs, make_tokenizer, trainer_for

NATS = 1e-4
EACH_TIME = (
    "GPTNeoX Llama Qwen2 Gemma2 Gemma3Text Phi3 Mixtral Qwen3Moe GPT2 OPT DeepseekV3 Bloom Falcon Gemma3".split()
)
NAMES = [*SHARED, *SEPARATE, "Gemma3"]
# PEFT adapts no out_proj and no conv1d of a model with Mamba layers
SOME = {name: ["q_proj", "v_proj"] for name in ("Jamba", "FalconH1", "Lfm2")}
SOME["Gemma3"] = ["o_proj", "gate_proj", "up_proj", "down_proj"]  # names that its vision tower does not have


def gemma3() -> torch.nn.Module:
    """Gemma 3 as it is published: a vision tower beside the text model, which `AutoModelForCausalLM` loads whole."""
    text = dict(
        **dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        **dict(vocab_size=97, intermediate_size=96, max_position_embeddings=128, sliding_window=6),
        **dict(layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16, initializer_range=0.15),
        **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2),
    )
    vision = dict(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=28, patch_size=14
    )
    special = dict(image_token_index=96, boi_token_index=95, eoi_token_index=94, mm_tokens_per_image=4)
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, **special)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_base(name: str, folder: Path) -> str:
    settings = SHARED.get(name, {}) if name in SHARED else SEPARATE.get(name, ({},))[0]
    (gemma3() if name == "Gemma3" else make(name, settings)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def four_bit() -> BitsAndBytesConfig:
    how = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    return BitsAndBytesConfig(load_in_4bit=True, **how)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EACH_TIME else pytest.mark.whole, id=n) for n in NAMES]
)
def test_train_save_reload_merge_reload(name, tmp_path):
    base, run, merged = save_base(name, tmp_path / "base"), tmp_path / "run", tmp_path / "merged"
    settings = {"lora_target_modules": SOME[name]} if name in SOME else {}
    trainer = trainer_for(base, run, make_pairs(8), max_steps=2, sync="soft", sync_alpha=0.5, sync_every=1, **settings)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 2
    tokenizer = make_tokenizer()  # some architectures' own classes read its vocabulary in their own way
    trained = text_logprobs(exact(trainer.model), tokenizer)
    live = text_logprobs(trainer.model, tokenizer)  # bitsandbytes' own products
    assert largest_gap(live, trained) < NATS
    adapted = {n for n, _ in trainer.model.named_parameters() if "lora_B" in n}
    assert adapted and not any("vision" in n for n in adapted)

    again = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit(), dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(again, run)
    assert largest_gap(text_logprobs(exact(reloaded), tokenizer), trained) < NATS
    with reloaded.disable_adapter():  # the steps did something
        assert largest_gap(text_logprobs(exact(reloaded), tokenizer), trained) > 100 * NATS

    merge(str(run), str(merged))
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert largest_gap(text_logprobs(exact(plain), tokenizer), trained) < NATS
    assert AutoTokenizer.from_pretrained(merged)(TEXT) == AutoTokenizer.from_pretrained(base)(TEXT)
    assert not any(type(m).__module__.startswith(("bitsandbytes", "peft")) for m in plain.modules())
    before, after = (json.loads((Path(f) / "config.json").read_text()) for f in (base, merged))
    assert before == after


@pytest.mark.whole
@pytest.mark.parametrize("form", [dict(load_in_4bit=False), dict(quantize_embeddings="8bit")], ids=["plain", "8bit"])
@pytest.mark.parametrize("name", NAMES)
def test_other_forms_of_the_base(name, form, tmp_path):
    """Unquantised, and with the embeddings in 8 bits; where these save nothing or do more, they are refused in words."""
    base = save_base(name, tmp_path / "base")
    settings = form | ({"lora_target_modules": SOME[name]} if name in SOME else {})
    try:
        trainer = trainer_for(base, tmp_path / "run", make_pairs(4), max_steps=1, **settings)
    except ModelError as error:
        assert "quantize_embeddings=8bit: " in str(error) and "leave it out" in str(error)
        return
    trainer.train()
    trainer.save_model()
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    got = text_logprobs(exact(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), make_tokenizer())
    assert largest_gap(got, text_logprobs(exact(trainer.model), make_tokenizer())) < NATS


# ---- a real model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A run of a few steps on real pairs from the real SmolLM2-135M-Instruct, in 4-bit; `(base, run)`."""
    base = os.environ.get("LORAT_SMOLLM2")
    data = BESIDE / "data" / "hh-harmless-base" / "test-mild.jsonl"
    if not base:
        pytest.skip("LORAT_SMOLLM2 names no folder with the real SmolLM2-135M-Instruct")
    if not data.exists():
        pytest.skip("the real Anthropic-HH pairs are not on this machine")
    from lorat.data.reading import load_preference_data

    rows = load_preference_data(str(data), "train").select(range(12))
    run = tmp_path_factory.mktemp("smollm2") / "run"
    settings = dict(max_length=256, learning_rate=1e-3, per_device_train_batch_size=4, sync="soft", sync_alpha=0.5)
    trainer = trainer_for(base, run, list(rows), sync_every=1, **settings)
    trainer.train()
    trainer.save_model()
    return base, run


@pytest.mark.whole
@pytest.mark.parametrize("form", ["dequantized", "original"])
def test_a_real_model_is_served_as_it_was_trained(smollm2, form, tmp_path):
    """Greedy text of the merged folder by plain transformers, token for token that of `lorat generate`."""
    from lorat.cli.main import main

    base, run = smollm2
    merged, prompts, answers = tmp_path / "merged", tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked = ["What is the capital of France?", "Name three animals.", "How do I make tea?", "Tell me about the sea."]
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    report = merge(str(run), str(merged), form, dtype="float32")
    assert report.folded.largest < NATS and report.saved.largest < NATS
    how = ["--greedy", "--chat", "always", "--max-new-tokens", "24", "--out", str(answers)]
    if form == "original":  # what it is to equal: the adapter on the original weights, by PEFT alone
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run)
    else:
        assert main(["generate", str(run), "--prompts", str(prompts), *how]) == 0
    served = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    said = [json.loads(line) for line in answers.read_text().splitlines()] if form == "dequantized" else [None] * 4
    for prompt, answer in zip(asked, said, strict=True):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = served.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
            if answer is None:
                theirs = plain.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
                assert out.tolist() == theirs.tolist()
            else:
                assert tokenizer.decode(out, skip_special_tokens=True) == answer["output"]
                assert len(out) == answer["tokens"] > 5
