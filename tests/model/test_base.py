"""What to load is a value of its own, and what was loaded is read off the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorat.errors import ConfigError
from lorat.model.base import Base, Facts, load_base, load_tokenizer, quantization_config


def test_a_base_is_loaded_from_its_name_alone(neox):
    base = Base(neox, device="cpu")
    model = load_base(base)
    assert model.is_loaded_in_4bit and load_tokenizer(base)("the dog")["input_ids"] == [3, 8]
    assert Facts.of(model) == Facts(True, "nf4", True, torch.float32, "sdpa", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4", "double_quant": False},
        {"dtype": "bfloat16"},
        {"four_bit": False, "dtype": "float16", "attention": "eager"},
        {"quantize_embeddings": "8bit"},
        {"quantize_embeddings": "4bit", "four_bit": False},
    ],
    ids=str,
)
def test_the_facts_of_a_base_are_what_it_was_asked_to_be(neox, changes):
    asked = Base(neox, device="cpu", **changes)
    facts = Facts.of(load_base(asked))
    found = asked.settings() | facts.settings()
    assert found == asked.settings()
    assert facts.attention == (asked.attention or "sdpa")
    again = Base.from_settings(found, neox, attention=asked.attention, device="cpu")
    assert again == asked


def test_the_facts_of_a_plain_model_say_nothing_of_4bit(neox):
    facts = Facts.of(AutoModelForCausalLM.from_pretrained(neox, dtype=torch.bfloat16))
    assert facts.settings() == {"load_in_4bit": False, "dtype": "bfloat16", "quantize_embeddings": None}


@pytest.mark.parametrize(
    ("recorded", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "auto", "bf16": True}, torch.bfloat16),
        ({"fp16": True}, torch.float16),
        ({"dtype": "float32", "bf16": True}, torch.float32),
    ],
)
def test_the_type_of_a_recorded_base(recorded, dtype):
    """`auto` was recorded as it is by runs whose base nobody looked at; then the type follows autocast."""
    assert Base.from_settings(recorded, "x").dtype is dtype
    assert quantization_config(Base.from_settings(recorded, "x")).bnb_4bit_compute_dtype is dtype


@pytest.mark.parametrize(
    "changes", [{"dtype": "int8"}, {"quant_type": "nf3"}, {"quantize_embeddings": "2bit"}], ids=str
)
def test_words_that_are_not_known(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=f"{name}='{value}' is not known; set one of: "):
        Base("x", **changes)


def test_every_recorded_setting_of_a_base_reaches_it():
    changed = {
        "load_in_4bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "quantize_embeddings": "4bit",
        "model_revision": "v2",
        "dtype": "float16",
    }
    plain = Base("x", device="cpu")
    for key, value in changed.items():
        other = Base.from_settings({key: value}, "x", device="cpu")
        assert sum(getattr(other, f.name) != getattr(plain, f.name) for f in dataclasses.fields(Base)) == 1
        assert other.settings()[key] == value
