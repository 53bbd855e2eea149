"""The environment of every test, and the models that many of them share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a bug
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: threads only wait for each other on a busy machine

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.worlds import SHARED, make_tokenizer, save_neox


@pytest.fixture(scope="session")
def neox(tmp_path_factory) -> str:
    """A folder with a two-layer GPT-NeoX of 64 dimensions and a word-level tokenizer."""
    return save_neox(tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """The same for Llama: another architecture, another head name, grouped queries."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def real_hh() -> Path:
    """The real Anthropic-HH pairs, where they lie beside the project."""
    path = SHARED / "data" / "hh-harmless-base" / "test-mild.jsonl"
    if not path.exists():
        pytest.skip("the real Anthropic-HH pairs are not on this machine")
    return path


@pytest.fixture
def real_pythia_tokenizer() -> Path:
    path = SHARED / "data" / "pythia-tokenizer"
    if not path.exists():
        pytest.skip("the real Pythia tokenizer is not on this machine")
    return path
