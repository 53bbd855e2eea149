"""`lorat merge`: the dequantised form reproduces the trained model; the original form says what it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lorat.cli.main import main
from lorat.errors import LoratError, ModelError
from lorat.runs.merge import merge
from lorat.train.trainer import TrustRegionTrainer
from tests.helpers.architectures import SHARED, make
from tests.helpers.saved import exact, largest_gap, text_logprobs
from tests.helpers.worlds import make_pairs, make_tokenizer, run_config, trainer_for

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


# ---- every form that a base, an adapter and a file can have

FOUR_BIT = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
VARIANTS = {
    "plain float32": ("Llama", {}, dict(load_in_4bit=False)),
    "plain, GPT-2": ("GPT2", {}, dict(load_in_4bit=False)),
    "FP4, quantised once": ("Llama", {}, dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)),
    "8-bit embeddings": ("Llama", {}, dict(quantize_embeddings="8bit")),
    "8-bit embeddings, GPT-NeoX": ("GPTNeoX", {}, dict(quantize_embeddings="8bit")),
    "4-bit embeddings": ("Llama", {}, dict(quantize_embeddings="4bit")),
    "DoRA": ("Llama", {}, dict(use_dora=True)),
    "DoRA, GPT-2": ("GPT2", {}, dict(use_dora=True)),
    "rsLoRA": ("Llama", {}, dict(use_rslora=True)),
    "tied": ("Llama", dict(tie_word_embeddings=True), {}),
    "untied GPT-2": ("GPT2", dict(tie_word_embeddings=False), {}),
    "dropout in the base": ("GPT2", dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1), {}),
}


def save_base(folder, arch="Llama", changes=None, dtype=torch.float32):
    make(arch, SHARED[arch], **(changes or {})).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def train(base, run, **settings):
    trainer = trainer_for(base, run, make_pairs(8), max_steps=2, **settings)
    trainer.train()
    trainer.save_model()
    return trainer


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_of_base_and_adapter(name, tmp_path):
    arch, changes, settings = VARIANTS[name]
    base = save_base(tmp_path / "base", arch, changes)
    trainer = train(base, tmp_path / "run", **settings)
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    tokenizer = make_tokenizer()
    got = text_logprobs(exact(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), tokenizer)
    assert largest_gap(got, text_logprobs(exact(trainer.model), tokenizer)) < 1e-4
    assert config_of(base) == config_of(tmp_path / "merged")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_base_s_own_type_is_kept(stored, tmp_path):
    """Trained in float32 on the CPU: the file is as large as the base's, and each weight is W + sBA rounded to the type."""
    base = save_base(tmp_path / "base", dtype=stored)
    trainer = train(base, tmp_path / "run")
    report = merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert report.dtype == str(stored).removeprefix("torch.") and 0 < report.rounding.largest < 0.1
    assert report.saved.largest <= report.rounding.largest + 1e-4
    sizes = [(Path(f) / "model.safetensors").stat().st_size for f in (base, tmp_path / "merged")]
    assert abs(sizes[0] - sizes[1]) < 1000
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    seen = 0
    for name, layer in trainer.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            weight = layer.base_layer.weight
            held = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
            expected = (held + layer.scaling["default"] * b @ a).detach()
            gap = (saved[f"{name}.weight"].double() - expected).abs()
            assert (gap <= torch.finfo(stored).eps / 2 * expected.abs() * 1.001 + 1e-6).all()
            seen += 1
    assert seen == 14
    merge(str(tmp_path / "run"), str(tmp_path / "wide"), dtype="float32")
    tokenizer = make_tokenizer()
    wide = text_logprobs(exact(AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)), tokenizer)
    assert largest_gap(wide, text_logprobs(exact(trainer.model), tokenizer)) < 1e-4


@pytest.mark.parametrize("arch", ["Llama", "GPT2", "Gemma", "Qwen3Moe"])
def test_a_base_that_is_stored_in_four_bits(arch, tmp_path):
    how = BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "plain", arch), quantization_config=how)
    packed.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = train(str(tmp_path / "base"), tmp_path / "run")
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    tokenizer = make_tokenizer()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    gap = largest_gap(text_logprobs(exact(plain), tokenizer), text_logprobs(exact(trainer.model), tokenizer))
    assert gap < 1e-4 and "quantization_config" not in config_of(tmp_path / "merged")
    with pytest.raises(ModelError, match="no original weights in it"):
        merge(str(tmp_path / "run"), str(tmp_path / "other"), "original")
    if arch == "Llama":  # named, the 16-bit model can be merged into
        report = merge(str(tmp_path / "run"), str(tmp_path / "other"), "original", str(tmp_path / "plain"))
        assert report.changed.largest > 0.05 and report.folded.largest < 1e-4


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FOREIGN = {
    "embeddings that a head shares": (
        "Llama",
        dict(tie_word_embeddings=True),
        dict(target_modules=["q_proj", "embed_tokens"]),
    ),
    "scaled embeddings": ("Gemma", {}, dict(target_modules=["q_proj", "embed_tokens"])),
    "whole modules": (
        "Llama",
        {},
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
    ),
    "tokens": ("Llama", {}, dict(target_modules=["q_proj"], trainable_token_indices=[3, 4, 5])),
    "tokens that a head shares": (
        *("Llama", dict(tie_word_embeddings=True)),
        dict(target_modules=["q_proj"], trainable_token_indices=[3, 4, 5]),
    ),
    "a head": ("Llama", {}, dict(target_modules=["q_proj", "lm_head"])),
    "biases": ("Qwen2", {}, dict(target_modules=["q_proj"], lora_bias=True)),
    "fused experts": ("Qwen3Moe", {}, dict(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "experts of Mixtral": ("Mixtral", {}, dict(target_modules=["q_proj"], target_parameters=EXPERTS)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_of_other_origin(name, tmp_path):
    """Whatever PEFT can put on a model: what it computes by PEFT alone, on transformers' 4-bit base."""
    arch, changes, adapter = FOREIGN[name]
    base = save_base(tmp_path / "base", arch, changes)
    how = BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_compute_dtype=torch.float32)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, quantization_config=how), LoraConfig(r=4, **adapter)
    )
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=draw)
    model.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    got = text_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), make_tokenizer())
    assert largest_gap(got, text_logprobs(exact(model), make_tokenizer())) < 1e-4


def test_the_folder_brings_what_lies_beside_the_weights(tmp_path):
    base = Path(save_base(tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    generation = {"temperature": 0.7, "do_sample": False, "eos_token_id": [1, 2]}  # transformers would not write this
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "preprocessor_config.json").write_text('{"size": 28}')
    train(str(base), tmp_path / "run")
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out" / "merged")]) == 0
    merged = tmp_path / "out" / "merged"
    assert json.loads((merged / "generation_config.json").read_text()) == generation
    assert json.loads((merged / "preprocessor_config.json").read_text()) == {"size": 28}
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == (base / "chat_template.jinja").read_text()
    card = ModelCard.load(merged / "README.md")
    assert card.data.library_name == "transformers" and "lorat" in card.data.tags
    for words in (
        "the base as 4-bit rounded it",
        "float32, against the trained model | ",
        "nats a token",
        "## Load it",
    ):
        assert words in card.text
    assert "## The adapter" in card.text and str(tmp_path) not in card.text
    assert (merged.stat().st_mode & 0o777) == (base.stat().st_mode & 0o777)


# ---- what is wrong is found, and nothing is left


def spoil(what, monkeypatch):
    """Let one stage of a merge go wrong; returns a word of what is said."""
    from lorat.model import folding
    from lorat.runs import merge as module
    from lorat.runs import merged

    def disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def edit(change):
        before = PreTrainedModel.save_pretrained

        def save(self, folder, **kwargs):
            before(self, folder, **kwargs)
            file = Path(folder) / "model.safetensors"
            save_file(change(load_file(file)), file, metadata={"format": "pt"})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)

    if what == "the base is gone":
        monkeypatch.setattr(module, "load_base", lambda base: (_ for _ in ()).throw(ModelError("gone")))
        return "gone"
    if what == "dequantised wrong":
        right = bnb.functional.dequantize_4bit
        monkeypatch.setattr(folding.bnb.functional, "dequantize_4bit", lambda *a: right(*a).flip(0))
        return "another product"
    if what == "folded wrong":
        right = folding.LoraLinear.merge

        def twice(layer, safe_merge):
            layer.scaling = {k: 2 * v for k, v in layer.scaling.items()}
            right(layer, safe_merge=safe_merge)

        monkeypatch.setattr(folding.LoraLinear, "merge", twice)
        return "do not compute what was trained"
    if what == "no space":
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", disk)
        return "No space left"
    if what == "no space, seen before":
        monkeypatch.setattr(merged.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        return "free some space"
    if what == "a weight is missing":
        edit(lambda held: {k: v for k, v in held.items() if k != "gpt_neox.layers.1.attention.dense.weight"})
        return "is not whole"
    if what == "a weight is another":
        edit(lambda held: held | {"embed_out.weight": held["embed_out.weight"] * 1.01})
        return "does not compute what was merged"
    if what == "the tokenizer is another":
        right = merged.AutoTokenizer.from_pretrained

        def other(name, **kwargs):
            tokenizer = right(name, **kwargs)
            tokenizer.add_tokens(["river"])
            return tokenizer

        monkeypatch.setattr(merged, "AutoTokenizer", SimpleNamespace(from_pretrained=other))
        return "gives other tokens"
    if what == "no rename":
        monkeypatch.setattr(merged.os, "replace", disk)
        return "cannot be written"
    raise AssertionError(what)


STAGES = (
    *(
        "the base is gone",
        "dequantised wrong",
        "folded wrong",
        "no space",
        "no space, seen before",
        "a weight is missing",
    ),
    *("a weight is another", "the tokenizer is another", "no rename"),
)


@pytest.mark.parametrize("what", STAGES)
def test_a_merge_that_fails_leaves_nothing(what, trained, tmp_path, monkeypatch):
    run, _ = trained
    word = spoil(what, monkeypatch)
    with pytest.raises(LoratError, match=word):
        merge(str(run), str(tmp_path / "new" / "merged"))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert merge(str(run), str(tmp_path / "new" / "merged")).saved.largest < 1e-4


def test_an_interrupted_merge_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge(str(trained[0]), str(tmp_path / "merged"))
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_nan_is_refused(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    held = load_file(file)
    held[next(k for k in held if "lora_B" in k)][0, 0] = torch.nan
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_base_quantised_by_others_is_refused(trained, neox, tmp_path):
    shutil.copytree(neox, tmp_path / "base")
    config = config_of(neox) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored quantised by gptq.*--base-model"):
        merge(str(trained[0]), str(tmp_path / "merged"), base_model=str(tmp_path / "base"))
