"""Defaults as they resolve, every contradiction by itself, and all of them in one message."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import MISSING, fields

import pytest
import torch

from lorat.errors import ConfigError, LoratError
from lorat.settings.aliases import CHECKPOINTING
from lorat.settings.config import TrustRegionConfig, field_default
from lorat.settings.table import GROUPS

BASE = {"output_dir": "out", "use_cpu": True}


def make(**values) -> TrustRegionConfig:
    return TrustRegionConfig(**(BASE | values))


# What cannot be set, and words that its message must hold: what was given, and what to set instead.
CONTRADICTIONS = [
    ({"method": "ppo"}, ["method='ppo'", "dpo, ipo, kto"]),
    ({"sync": "sfot"}, ["sync='sfot'", "did you mean soft?", "frozen, soft, hard, adaptive, paper-soft"]),
    ({"sync": "lag-0"}, ["sync='lag-0'", "lag-100"]),
    ({"sync": "trl", "sync_alpha": 0.5}, ["sync=trl sets sync_alpha itself", "sync_alpha=0.5", "remove one"]),
    ({"sync": "lag-100", "sync_every": 8}, ["sync=lag-100 sets sync_every itself", "remove one"]),
    ({"sync": "adaptive"}, ["sync=adaptive has no limit", "sync_limit", "sync_distance"]),
    ({"sync": "adaptive", "sync_limit": -0.1}, ["sync_limit=-0.1", "at least 0"]),
    ({"sync": "adaptive", "sync_distance": math.inf}, ["sync_distance=inf", "at least 0"]),
    ({"sync": "adaptive", "sync_limit": 0.1, "sync_alpha": 0}, ["sync_alpha=0", "sync: frozen"]),
    ({"sync": "soft", "sync_limit": 0.1}, ["sync_limit=0.1 belongs to sync: adaptive", "sync is soft"]),
    ({"sync": "hard", "sync_space": "factors"}, ["sync_space=factors", "sync=hard"]),
    ({"sync_space": "factor"}, ["sync_space='factor'", "product, factors"]),
    ({"ref_rank": 8}, ["ref_rank=8", "lora_r=16"]),
    ({"ref_rank": 17.5}, ["ref_rank=17.5", "whole number"]),
    ({"overlong": "cut"}, ["overlong='cut'", "truncate, drop"]),
    ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
    ({"bnb_4bit_quant_type": "nf3"}, ["'nf3'", "nf4, fp4"]),
    ({"beta": 0}, ["beta=0 ", "above 0"]),
    ({"beta": -0.1}, ["beta=-0.1", "above 0"]),
    ({"beta": math.nan}, ["beta=nan", "above 0"]),
    ({"beta": math.inf}, ["beta=inf", "above 0"]),
    ({"beta": True}, ["beta=True", "above 0"]),
    ({"beta": "0.1"}, ["beta=0.1", "above 0"]),
    ({"label_smoothing": 0.5}, ["label_smoothing=0.5", "< 0.5"]),
    ({"label_smoothing": -0.1}, ["label_smoothing=-0.1", "< 0.5"]),
    ({"label_smoothing": 0.1, "method": "ipo"}, ["label_smoothing=0.1", "method is ipo", "method: dpo"]),
    ({"robust": True, "label_smoothing": 0.0}, ["robust=True", "set label_smoothing"]),
    ({"robust": True, "method": "kto"}, ["robust=True", "method is kto", "method: dpo"]),
    ({"length_normalize": True, "method": "kto"}, ["length_normalize", "KTO", "remove it"]),
    ({"desirable_weight": -1.0, "method": "kto"}, ["desirable_weight=-1.0", "0 or more"]),
    ({"undesirable_weight": math.nan, "method": "kto"}, ["undesirable_weight=nan", "0 or more"]),
    ({"desirable_weight": 2.0}, ["desirable_weight=2.0", "method is dpo", "method: kto"]),
    ({"undesirable_weight": 0.5, "method": "ipo"}, ["undesirable_weight=0.5", "method is ipo"]),
    ({"sync_alpha": 1.1}, ["sync_alpha=1.1", "[0, 1]"]),
    ({"sync_alpha": -0.01}, ["sync_alpha=-0.01", "[0, 1]"]),
    ({"sync_alpha": math.nan}, ["sync_alpha=nan", "[0, 1]"]),
    ({"sync_every": 0}, ["sync_every=0", "at least 1", "sync: frozen"]),
    ({"sync_every": -3}, ["sync_every=-3", "at least 1"]),
    ({"sync_every": 2.5}, ["sync_every=2.5", "whole number"]),
    ({"sync": "frozen", "sync_alpha": 0.6}, ["sync_alpha=0.6", "sync=frozen", "remove one"]),
    ({"sync": "frozen", "sync_every": 64}, ["sync_every=64", "sync=frozen", "remove one"]),
    ({"sync": "hard", "sync_alpha": 0.6}, ["sync=hard", "sync_alpha=0.6", "sync: soft"]),
    ({"lora_r": 0}, ["lora_r=0", "at least 1"]),
    ({"lora_r": 8.5}, ["lora_r=8.5", "whole number"]),
    ({"lora_alpha": -1}, ["lora_alpha=-1", "at least 1"]),
    ({"lora_dropout": 1.0}, ["lora_dropout=1.0", "< 1"]),
    ({"lora_target_modules": []}, ["lora_target_modules", "all-linear"]),
    ({"max_length": 1}, ["max_length=1 ", "2 or more"]),
    ({"max_length": "512"}, ["max_length=512", "2 or more"]),
    ({"max_prompt_length": 0}, ["max_prompt_length=0", "1 or more"]),
    ({"max_prompt_length": 64, "max_length": 64}, ["max_prompt_length=64", "max_length=64", "below max_length"]),
    ({"max_tokens_per_pack": 0}, ["max_tokens_per_pack=0", "8192"]),
    ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size=0", "1 or more"]),
    ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0", "1 or more"]),
    ({"learning_rate": 0.0}, ["learning_rate=0.0", "above 0"]),
    ({"learning_rate": math.nan}, ["learning_rate=nan", "above 0"]),
    ({"num_train_epochs": 0}, ["num_train_epochs=0", "max_steps=-1", "above 0"]),
    ({"remove_unused_columns": True}, ["remove_unused_columns=True", "remove it"]),
    ({"logging_nan_inf_filter": True}, ["logging_nan_inf_filter=True", "remove it"]),
    ({"bf16": True, "fp16": True}, ["bf16 and fp16", "keep bf16"]),
    ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor=0.1", "set label_smoothing"]),
    ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha", "remove it"]),
    ({"use_liger_kernel": True}, ["use_liger_kernel", "remove it"]),
    ({"auto_find_batch_size": True}, ["auto_find_batch_size", "max_tokens_per_pack"]),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["deepspeed and fsdp", "torchrun"]),
    ({"fsdp": "full_shard"}, ["deepspeed and fsdp", "torchrun"]),
    ({"accelerator_config": {"split_batches": True}}, ["split_batches", "accelerator_config"]),
]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_one_contradiction(values, words):
    with pytest.raises(ConfigError) as caught:
        make(**values)
    lines = str(caught.value).splitlines()
    assert lines[0] == "This setting cannot work:" and len(lines) == 2, lines
    assert all(word in lines[1] for word in words), lines[1]
    assert isinstance(caught.value, LoratError) and isinstance(caught.value, ValueError)


def test_all_contradictions_in_one_message():
    with pytest.raises(ConfigError) as caught:
        make(
            method="ppo", beta=0, label_smoothing=0.7, sync="frozen", sync_alpha=2.0, sync_every=0, lora_r=0,
            lora_dropout=1.5, max_length=1, max_tokens_per_pack=0, bf16=True, fp16=True, use_liger_kernel=True,
        )  # fmt: skip
    text = str(caught.value)
    given = ["method='ppo'", "beta=0", "label_smoothing=0.7 says", "label_smoothing=0.7 belongs", "sync_alpha=2.0 is"]
    given += ["sync_alpha=2.0 moves", "sync_every=0 is", "sync_every=0 moves", "lora_r=0", "lora_dropout=1.5"]
    given += ["max_length=1", "max_tokens_per_pack=0", "bf16 and fp16", "use_liger_kernel"]
    assert text.startswith("This configuration cannot work:\n  - ")
    assert [word for word in given if word not in text] == []
    assert len(text.splitlines()) == 1 + len(given)


@pytest.mark.parametrize(
    "values",
    [
        {"sync_alpha": 0.0}, {"sync_alpha": 1.0}, {"sync_alpha": 1}, {"sync_every": 1}, {"sync_every": 64.0},
        {"sync": "hard", "sync_alpha": 1.0}, {"sync": "hard", "sync_every": 1}, {"label_smoothing": 0.49},
        {"label_smoothing": 0.1, "robust": True}, {"beta": 1}, {"desirable_weight": 0.0, "method": "kto"},
        {"max_length": None}, {"max_length": 2}, {"max_length": None, "max_prompt_length": 9},
        {"length_normalize": False, "method": "kto"}, {"max_steps": 5, "num_train_epochs": 0},
        {"lora_dropout": 0.9}, {"max_tokens_per_pack": 1},
    ],
    ids=str,
)  # fmt: skip
def test_the_edge_of_what_works(values):
    config = make(**values)
    for key, value in values.items():
        assert getattr(config, key) == value


def test_defaults_as_they_resolve():
    config = make().resolved()
    assert (config.method, config.beta, config.sync, config.sync_alpha, config.sync_every) == (
        "dpo", 0.1, "soft", 0.6, 512,
    )  # fmt: skip
    assert config.learning_rate == 1e-5 and config.logging_steps == 10 and config.max_tokens_per_pack == 8192
    assert config.checkpointing and getattr(config, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
    assert config.remove_unused_columns is False and config.logging_nan_inf_filter is False
    assert config.load_in_4bit and config.lora_target_modules == ["all-linear"] and config.bf16 is False


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [("dpo", None, False), ("ipo", None, True), ("kto", None, False), ("ipo", False, False), ("dpo", True, True)],
)
def test_length_normalize_by_method(method, given, expected):
    assert make(method=method, length_normalize=given).resolved().length_normalize is expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sync": "frozen"}, (None, None)),
        ({"sync": "hard"}, (None, 512)),
        ({"sync": "hard", "sync_every": 7}, (None, 7)),
        ({"sync": "soft", "sync_every": 7}, (0.6, 7)),
        ({"sync": "soft", "sync_alpha": 0.0}, (0.0, 512)),
        ({"sync": "adaptive", "sync_limit": 0.1}, (1.0, 32)),
        ({"sync": "adaptive", "sync_distance": 0.5, "sync_alpha": 0.3, "sync_every": 4}, (0.3, 4)),
        ({"sync": "paper-soft"}, (0.6, 1)),
        ({"sync": "paper-hard"}, (None, 512)),
        ({"sync": "trl"}, (0.6, 512)),
        ({"sync": "lag-100"}, (0.6, 86)),  # 86 * 7/6 - 1/2 = 99.8
    ],
    ids=str,
)
def test_sync_defaults(values, expected):
    config = make(**values).resolved()
    assert (config.sync_alpha, config.sync_every) == expected


def test_a_named_reference_is_the_settings_it_stands_for():
    """So that a resumed run may say either."""
    named, spelt = make(sync="lag-100"), make(sync="soft", sync_alpha=0.6, sync_every=86)
    assert named.own_fields() == spelt.own_fields() and named.identity() == spelt.identity()
    assert named.resolved().sync == "soft" and named.resolved().sync_space == "product"
    assert make(sync="paper-hard").resolved().sync == "hard"
    rule = make(sync="adaptive", sync_limit=0.1, sync_distance=0.5, sync_alpha=0.3, sync_every=4).update_rule()
    assert (rule.drift_limit, rule.distance_limit, rule.alpha, rule.every, rule.adaptive) == (0.1, 0.5, 0.3, 4, True)
    assert make(sync_space="factors").update_rule().space == "factors"


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_under_both_names(name):
    if name not in {f.name for f in fields(TrustRegionConfig)}:
        pytest.skip("this transformers does not have the name")
    assert not make(**{name: False}).checkpointing
    assert make(**{name: True}).checkpointing
    kept = make(**{f"{name}_kwargs": {"use_reentrant": True}}).resolved()
    assert getattr(kept, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": True} and kept.checkpointing


def test_lag_by_hand():
    """every*(1-a)/a + (every-1)/2: 512*(0.4/0.6) + 255.5 = 596.83; (a=0.5, 4): 4 + 1.5; hard 8: 0 + 3.5."""
    assert make().update_rule().lag == pytest.approx(596.8333, abs=1e-3)
    assert make(sync_alpha=0.5, sync_every=4).update_rule().lag == 5.5
    assert make(sync_alpha=0.6, sync_every=1).update_rule().lag == pytest.approx(2 / 3)
    assert make(sync="hard", sync_every=8).update_rule().lag == 3.5
    frozen = make(sync="frozen").update_rule()
    assert frozen.lag == math.inf and not frozen.moves


def test_update_rule_is_fresh_each_time():
    config = make(sync_every=4)
    first = config.update_rule()
    first.updates = 3
    assert config.update_rule().updates == 0 and (first.alpha, first.every) == (0.6, 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"fp16": True, "use_cpu": False}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "bf16": True}, torch.float32),
    ],
    ids=str,
)
def test_dtype(values, expected):
    assert make(**values).torch_dtype is expected


def test_one_target_module_may_be_text():
    assert make(lora_target_modules="q_proj").lora_target_modules == ["q_proj"]


def test_own_fields():
    config = make(beta=0.3)
    own = config.own_fields()
    assert own["beta"] == 0.3 and "learning_rate" not in own
    for f in fields(TrustRegionConfig):
        if f.name in own:
            assert f.metadata["group"] in GROUPS and f.metadata["help"].strip()
    assert {f.metadata["group"] for f in fields(TrustRegionConfig) if f.name in own} == set(GROUPS)


def test_field_default():
    by_name = {f.name: f for f in fields(TrustRegionConfig)}
    assert field_default(by_name["beta"]) == 0.1 and field_default(by_name["lora_target_modules"]) == ["all-linear"]
    assert by_name["lora_target_modules"].default is MISSING


# What the user set stays apart from what it resolves to


def as_set(config) -> dict:
    """Every field, as a value that later writes cannot reach."""
    return {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(config) if f.init}


SETTINGS = [
    {},
    {"sync": "frozen"},
    {"sync": "lag-100"},
    {"sync": "paper-hard"},
    {"sync": "adaptive", "sync_limit": 0.1},
    {"sync": "hard", "sync_every": 8},
    {"method": "ipo", "bf16": True, "lora_target_modules": "q_proj"},
    {"method": "kto", "gradient_checkpointing": False, "report_to": "none", "eval_strategy": "steps"},
    {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"offload": True}, "disable_tqdm": None, "fp16": True},
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_resolving_writes_nothing_and_a_copy_says_the_same(values):
    """lorat's own fields are as they were given; `replace` gives an equal configuration, resolved or not."""
    config = make(**values)
    given = as_set(config)
    for f in fields(config):
        if "group" in f.metadata and f.name != "lora_target_modules":
            assert given[f.name] == values.get(f.name, field_default(f)), f.name
    assert (given["bf16"], given[CHECKPOINTING]) == (
        values.get("bf16"),
        values.get(CHECKPOINTING, given[CHECKPOINTING]),
    )
    resolved = config.resolved()
    config.update_rule(), config.base(), config.adapter(), config.identity(), config.own_fields()
    assert as_set(config) == given
    for other in (dataclasses.replace(config), dataclasses.replace(resolved), resolved.resolved()):
        assert as_set(other.resolved()) == as_set(resolved) and other.identity() == config.identity()
    assert as_set(dataclasses.replace(config)) == given
    assert None not in (resolved.bf16, resolved.length_normalize, getattr(resolved, CHECKPOINTING))


@pytest.mark.parametrize("first", [s for s in SETTINGS if s.get("sync") not in ("adaptive", "hard")], ids=str)
@pytest.mark.parametrize(
    "change",
    [{"sync": "frozen"}, {"sync": "hard"}, {"sync": "trl"}, {"sync": "adaptive", "sync_distance": 0.5}],
    ids=str,
)
def test_another_reference_by_replace_is_that_reference(first, change):
    """What the first reference resolved to does not follow it into the second."""
    made = dataclasses.replace(make(**first), **change)
    expected = make(**{**first, **change})
    assert made.resolved().own_fields() == expected.resolved().own_fields()
    assert made.update_rule().state_dict() == expected.update_rule().state_dict()


def test_another_method_and_checkpointing_by_replace():
    assert make(method="ipo").resolved().length_normalize
    assert not dataclasses.replace(make(method="ipo"), method="dpo").resolved().length_normalize
    off = dataclasses.replace(make(), **{CHECKPOINTING: False})
    assert make().checkpointing and not off.checkpointing and off.identity() == make().identity()


def test_a_resolved_copy_shares_nothing_that_can_be_written_to():
    kwargs = {"use_reentrant": False, "offload": True}
    config = make(**{f"{CHECKPOINTING}_kwargs": kwargs}, lr_scheduler_kwargs={"a": 1}, report_to=["tensorboard"])
    given, resolved = as_set(config), config.resolved()
    resolved.lora_target_modules.append("x")
    resolved.lr_scheduler_kwargs["a"] = 2
    resolved.report_to.clear()
    getattr(resolved, f"{CHECKPOINTING}_kwargs")["offload"] = False
    resolved.accelerator_config.dispatch_batches = True
    resolved.beta = 0.7
    assert as_set(config) == given and kwargs == {"use_reentrant": False, "offload": True}
