"""The trainer works on a copy: a configuration can be used again, and says what its user set."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorat.model.base import Facts
from lorat.train.trainer import TrustRegionTrainer
from tests.helpers.worlds import make_pairs, run_config


def as_set(config) -> dict:
    return {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(config)} | {
        "mixed_precision": config.mixed_precision
    }


def trained(model, config, **kwargs):
    trainer = TrustRegionTrainer(model, config, Dataset.from_list(make_pairs(4)), **kwargs)
    trainer.train()
    trainer.save_model()
    return trainer


def test_one_config_twice_first_with_a_float_model_then_by_name(neox, tmp_path):
    """The first model's types, its name and its packs do not follow the configuration to the second."""
    config = run_config(
        None, tmp_path, sync="lag-100", max_steps=1, overwrite_output_dir=True, gpu_memory="2GiB", max_length=32
    )
    config.disable_tqdm = True
    before = as_set(config)
    plain = AutoModelForCausalLM.from_pretrained(neox, dtype=torch.bfloat16)
    first = trained(plain, config, processing_class=AutoTokenizer.from_pretrained(neox))
    assert not first.facts.four_bit and first.identity["load_in_4bit"] is False
    assert first.identity["dtype"] == "bfloat16"
    assert as_set(config) == before
    second = trained(neox, config)
    assert second.facts == Facts(True, "nf4", True, torch.float32, second.facts.attention, None)
    assert second.model.get_base_model().is_loaded_in_4bit and second.identity["load_in_4bit"] is True
    assert second.identity["dtype"] == "float32" and second.identity["model_name_or_path"] == neox
    assert as_set(config) == before and config.sync == "lag-100" and config.model_name_or_path is None
    assert second.args is not config and second.args.max_tokens_per_pack != config.max_tokens_per_pack


@pytest.mark.parametrize("changes", [{}, {"accelerator_config": {"even_batches": False}, "report_to": "none"}], ids=str)
def test_what_transformers_writes_goes_to_the_copy(neox, tmp_path, changes):
    config = run_config(neox, tmp_path, gradient_accumulation_steps=2, **changes)
    before = as_set(config)
    trainer = trained(None, config)
    trainer.args.gradient_accumulation_steps = 7
    trainer.args.accelerator_config.even_batches = None
    assert as_set(config) == before
