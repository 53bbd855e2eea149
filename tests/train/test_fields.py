"""Each setting does what it says: its effect is read off the model, the adapter or the step."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorat.model import base as base_module
from lorat.model.base import load_base
from lorat.reference import adapter_parameters
from lorat.train.trainer import TrustRegionTrainer
from tests.helpers.worlds import make_pairs, run_config


def trainer(neox, tmp_path, **changes):
    return TrustRegionTrainer(None, run_config(neox, tmp_path / "out", **changes), Dataset.from_list(make_pairs(8)))


def lora_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)}


def a_linear(model):
    return next(m for n, m in model.named_modules() if n.endswith("layers.0.attention.query_key_value"))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_quantisation(neox, tmp_path, kind, double):
    config = run_config(neox, tmp_path, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    state = a_linear(load_base(config.base())).weight.quant_state
    assert (state.quant_type, state.nested) == (kind, double)


def test_no_quantisation_is_the_model_as_it_is(neox, tmp_path):
    model = load_base(run_config(neox, tmp_path, load_in_4bit=False).base())
    plain = AutoModelForCausalLM.from_pretrained(neox)
    assert torch.equal(a_linear(model).weight, a_linear(plain).weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(neox, tmp_path, dtype):
    model = load_base(run_config(neox, tmp_path, dtype=dtype).base())
    assert model.get_output_embeddings().weight.dtype == getattr(torch, dtype)
    assert a_linear(model).compute_dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention(neox, tmp_path, name):
    assert load_base(run_config(neox, tmp_path, attn_implementation=name).base()).config._attn_implementation == name


def test_revision_and_remote_code_reach_transformers_and_only_when_asked(neox, tmp_path, monkeypatch):
    seen = []
    load = base_module.AutoConfig.from_pretrained
    monkeypatch.setattr(base_module.AutoConfig, "from_pretrained", lambda n, **k: seen.append(k) or load(n, **k))
    load_base(run_config(neox, tmp_path).base())
    load_base(run_config(neox, tmp_path, model_revision="v2", trust_remote_code=True).base())
    assert seen == [
        {"revision": "main", "trust_remote_code": False},
        {"revision": "v2", "trust_remote_code": True},
    ]


def test_a_tokenizer_of_its_own(neox, tmp_path):
    bare, words = tmp_path / "bare", tmp_path / "words"
    shutil.copytree(neox, bare)
    words.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(bare / name, words / name)
    made = trainer(str(bare), tmp_path, tokenizer_name_or_path=str(words))
    assert made.processing_class("the dog")["input_ids"] == [3, 8]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 9), (True, 6 / 3)])
def test_rank_and_scale(neox, tmp_path, rslora, scale):
    model = trainer(neox, tmp_path, lora_r=9, lora_alpha=6, use_rslora=rslora).model
    for layer in lora_layers(model).values():
        assert layer.scaling == {"default": pytest.approx(scale), "ref": pytest.approx(scale)}
        assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["ref"].weight.shape[1] == 9


@pytest.mark.parametrize("dora", [False, True])
def test_dora(neox, tmp_path, dora):
    made = trainer(neox, tmp_path, use_dora=dora, sync="hard", sync_every=1, max_steps=2)
    magnitudes = {n: p for n, p in adapter_parameters(made.model, "ref").items() if "magnitude" in n}
    assert len(magnitudes) == (8 if dora else 0)
    before = {n: p.detach().clone() for n, p in magnitudes.items()}
    made.train()
    policy = adapter_parameters(made.model, "default")
    for name, p in magnitudes.items():  # a hard update copies the magnitudes too
        assert torch.equal(p, policy[name]) and not torch.equal(p, before[name])
    assert [h["loss"] for h in made.state.log_history if "loss" in h] == [pytest.approx(math.log(2), rel=1e-6)] * 2


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (["query_key_value"], {"query_key_value"}),
    ],
)
def test_targets(neox, tmp_path, targets, names):
    layers = lora_layers(trainer(neox, tmp_path, lora_target_modules=targets).model)
    assert {n.rpartition(".")[2] for n in layers} == names


def test_starting_adapters(neox, tmp_path):
    first = trainer(neox, tmp_path / "first", learning_rate=1e-2)
    first.train()
    first.save_model()
    folder = str(tmp_path / "first" / "out")
    saved = load_file(f"{folder}/adapter_model.safetensors")
    assert any(v.abs().max() > 0 for k, v in saved.items() if "lora_B" in k)
    go_on = trainer(neox, tmp_path / "second", policy_adapter=folder)
    against = trainer(neox, tmp_path / "third", ref_adapter=folder)
    for name, value in saved.items():
        assert torch.equal(adapter_parameters(go_on.model, "default")[name], value)
        assert torch.equal(adapter_parameters(go_on.model, "ref")[name], value)
        assert torch.equal(adapter_parameters(against.model, "ref")[name], value)
        if "lora_B" in name:
            assert not adapter_parameters(against.model, "default")[name].any()
    go_on.save_model(str(tmp_path / "card"))
    assert f"adapter `{folder}`" in (tmp_path / "card" / "README.md").read_text()
    go_on.args.max_steps = 1
    go_on.train()  # start/distance is measured from the adapter it began with, not from the plain base
    against_base = sum(v.square().sum().item() for k, v in saved.items() if "lora_B" in k) ** 0.5
    assert 0 < go_on.state.log_history[0]["start/distance"] < against_base


def test_lengths_reach_the_data(neox, tmp_path):
    cut = trainer(neox, tmp_path, max_length=8, max_prompt_length=3).train_dataset
    assert max(len(r["prompt_ids"]) for r in cut) == 3
    assert max(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in cut) == 8
    kept = trainer(neox, tmp_path, max_length=14, overlong="drop").train_dataset
    # by hand: tokens of prompt + longest completion, each completion with its end
    sizes = [
        len(p["prompt"].split()) + 1 + max(len(p["chosen"].split()), len(p["rejected"].split())) for p in make_pairs(8)
    ]
    assert [r["row"] for r in kept] == [i for i, n in enumerate(sizes) if n <= 14] != list(range(8))


def test_the_settings_of_a_run_are_written_down(neox, tmp_path):
    made = trainer(neox, tmp_path, beta=0.3, sync="hard", sync_every=5, max_steps=1)
    made.train()
    saved = json.loads((tmp_path / "out" / "lorat_run.json").read_text())
    assert (saved["beta"], saved["sync"], saved["sync_every"], saved["train_examples"]) == (0.3, "hard", 5, 8)
    assert saved["per_device_train_batch_size"] == 4 and saved["optim"] == "adamw_torch_fused"


@pytest.mark.parametrize("logger", ["tensorboard"])
def test_the_loggers_of_the_trainer_get_our_metrics(neox, tmp_path, logger, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    made = trainer(neox, tmp_path, report_to=[logger], sync="hard", sync_every=1, max_steps=2)
    made.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    for name in ("rewards/margins", "logps/chosen", "reference/updates", "reference/distance", "start/distance"):
        values = [e.value for e in events.Scalars(f"train/{name}")]
        expected = [h[name] for h in made.state.log_history if name in h]
        assert values == pytest.approx(expected, rel=1e-6), name
