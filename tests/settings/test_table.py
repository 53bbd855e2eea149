"""The table says the same as the classes that it describes, and asking it costs nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import types as kinds
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from transformers import TrainingArguments

from lorat.methods import METHODS
from lorat.model.base import DTYPES, EMBEDDINGS, QUANT_TYPES
from lorat.reference import SPACES
from lorat.settings import inherited, table
from lorat.settings.arguments import flags, names, type_of, types
from lorat.settings.config import CHECKPOINTING, TrustRegionConfig
from tests.helpers.worlds import ROOT, run_config

HINTS = get_type_hints(TrustRegionConfig)
THEIRS = {f.name: f for f in fields(TrainingArguments)}


def members(hint) -> set:
    """The plain types of a union; the type of its values for an enumeration."""
    parts = get_args(hint) if get_origin(hint) in (Union, kinds.UnionType) else (hint,)
    return {str if get_origin(p) is Literal else get_origin(p) or p for p in parts}


def test_the_table_imports_nothing():
    tree = ast.parse(Path(table.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_own_settings_are_the_fields_with_a_group_and_their_types():
    own = {f.name: f for f in fields(TrustRegionConfig) if "group" in f.metadata}
    assert list(own) == list(table.OWN)
    for name, setting in table.OWN.items():
        assert members(HINTS[name]) == {get_origin(setting.kind) or setting.kind} | (
            {type(None)} if setting.null else set()
        ), name
    assert {f.name for f in fields(TrustRegionConfig)} - own.keys() == THEIRS.keys()


def test_what_differs_from_transformers_is_in_defaults():
    changed = {
        f.name
        for f in fields(TrustRegionConfig)
        if f.name in THEIRS
        and (f.default, f.default_factory) != (THEIRS[f.name].default, THEIRS[f.name].default_factory)
    }
    assert changed <= table.DEFAULTS.keys()
    assert table.DEFAULTS.keys() - changed <= {"gradient_checkpointing", "remove_unused_columns"} | {
        name for name in table.DEFAULTS if THEIRS[name].default == table.DEFAULTS[name].default
    }


def test_types_that_are_read_off_the_source_are_those_of_the_class():
    assert inherited.installed().keys() == THEIRS.keys()
    for name in THEIRS.keys() - {*table.NOT_SETTABLE, *table.DEFAULTS, "resume_from_checkpoint"}:
        if name == "eval_strategy":
            assert get_args(type_of(name)) == tuple(e.value for e in get_args(HINTS[name])[0])
        else:
            assert members(type_of(name)) == members(HINTS[name]), name
    assert {k for k, hint in types().items() if hint in (bool, bool | None)} == flags()
    assert types().keys() == names()


def test_without_the_source_the_names_stand_in(monkeypatch):
    monkeypatch.setattr(inherited, "_FIELD", inherited.re.compile("nothing like it"))
    inherited.installed.cache_clear(), inherited.simple_types.cache_clear()
    try:
        assert inherited.installed().keys() == set(table.INHERITED) and "seed" not in inherited.simple_types()
        assert type_of("weight_decay") is float  # asked of transformers
    finally:
        monkeypatch.undo()
        inherited.installed.cache_clear(), inherited.simple_types.cache_clear()


def test_the_defaults_that_help_shows_are_those_that_hold():
    shown = {CHECKPOINTING if name == "activation_checkpointing" else name: s for name, s in table.TRAINER.items()}
    config = TrustRegionConfig(output_dir="out", use_cpu=True, report_to="none")
    for name, setting in shown.items():
        field = next(f for f in fields(TrustRegionConfig) if f.name == name)
        default = field.default if field.default is not MISSING else field.default_factory()
        if name not in (CHECKPOINTING, "optim"):  # lorat's own, and one that depends on the version of torch
            assert getattr(default, "value", default) == setting.default, name
        if isinstance(setting.kind, type):
            assert setting.kind in members(HINTS[name]), name
    assert config.optim == table.TRAINER["optim"].default


def test_every_field_of_transformers_is_listed_once():
    listed = Counter(table.INHERITED)
    assert set(listed.values()) == {1}
    assert THEIRS.keys() <= listed.keys()
    assert {*table.REFUSED, *table.IDLE, *table.NOT_SETTABLE, *table.TRAINER} <= listed.keys()


def test_methods_and_references_are_as_they_are_built():
    assert table.METHODS.keys() == METHODS.keys()
    for name, (title, settings) in table.METHODS.items():
        assert title == METHODS[name].title
        assert {"beta", *settings} == {f.name for f in fields(METHODS[name])}
    assert {n for names in table.SYNC.values() for n in names} == {n for n in table.OWN if n.startswith("sync_")}
    choices = {name: s.choices for name, s in table.OWN.items() if s.choices}
    assert choices["dtype"] == ("auto", *DTYPES) and choices["bnb_4bit_quant_type"] == QUANT_TYPES
    assert (None, *choices["quantize_embeddings"]) == EMBEDDINGS and choices["sync_space"] == SPACES


# As checkpoints that were written before have it.
IDENTITY = """adam_beta1 adam_beta2 adam_epsilon attn_implementation beta bf16 bnb_4bit_quant_type bnb_4bit_use_double_quant
data_seed dataloader_drop_last dataset_config_name dataset_name dataset_split desirable_weight dtype fp16
gradient_accumulation_steps ignore_data_skip label_smoothing learning_rate length_normalize load_in_4bit lora_alpha
lora_dropout lora_r lora_target_modules lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length max_prompt_length
max_steps method model_name_or_path model_revision num_train_epochs optim optim_args overlong
per_device_train_batch_size policy_adapter prefix_sharing quantize_embeddings ref_adapter ref_rank robust seed sync
sync_alpha sync_distance sync_every sync_limit sync_space undesirable_weight use_dora use_rslora warmup_steps
weight_decay world_size""".split()


# What runs did not record before: an older checkpoint says nothing of it.
LATER = {"datasets", "sft_weight", "columns", "dialogues", "rankings", "user_endings", "chat_template_kwargs"}


def test_a_run_records_what_runs_recorded_before(tmp_path):
    found = run_config("m", tmp_path, sync="lag-100", method="ipo", optim="adamw_torch").identity()
    assert found.keys() >= set(IDENTITY) and found.keys() - set(IDENTITY) == LATER
    assert (found["sync"], found["sync_alpha"], found["sync_every"], found["sync_space"]) == (
        "soft",
        0.6,
        86,
        "product",
    )
    assert (found["length_normalize"], found["bf16"]) == (True, False)
    assert (found["optim"], found["lr_scheduler_type"], found["world_size"]) == ("adamw_torch", "constant", 1)


@pytest.mark.parametrize("name", [name for name, s in table.OWN.items() if s.harmless])
def test_what_is_harmless_is_not_recorded(tmp_path, name):
    assert name not in run_config("m", tmp_path).identity()


LIGHT = """
import json, sys
from lorat.errors import ConfigError
from lorat.settings.arguments import help_text, parse_config
assert "Rank of the adapters" in help_text(100)
try:
    parse_config({argv})
except ConfigError as error:
    print(json.dumps([str(error), [m for m in ("torch", "transformers", "peft", "datasets") if m in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1e-5", "--beta", "0.1", "--bf16", "--sync", "soft"], ["did you mean learning_rate?"]),
        (["--method", "dop", "--seed", "x", "--eval_strategy", "no"], ["did you mean dpo?", "seed: x is not a whole"]),
        (["--no_tf32", "--no_robust", "--betta", "1"], ["did you mean beta?"]),
        (["--lr", "1"], ["set learning_rate"]),
    ],
    ids=str,
)
def test_help_and_a_typo_import_neither_torch_nor_transformers(argv, words):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(argv=argv)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    message, imported = json.loads(done.stdout)
    assert all(word in message for word in words) and imported == []
