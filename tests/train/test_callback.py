"""The moving reference inside the real TRL trainers: what they compute with, what a checkpoint holds, exact resuming."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from lorat.errors import CheckpointError, ConfigError, ModelError
from lorat.reference import Adaptive, Frozen, Hard, Soft, UpdateRule, adapter_parameters, snapshot
from lorat.train.callback import ReferenceSyncCallback
from tests.helpers.worlds import make_pairs

STEPS, BATCH = 6, 4


class Watch(TrainerCallback):
    """Keeps the policy's and reference's dense changes after each step; stops after `stop`, as a kill would."""

    def __init__(self, stop: int | None = None) -> None:
        self.policy, self.reference, self.stop = {}, {}, stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.policy[state.global_step] = dense(model, "default")
        self.reference[state.global_step] = dense(model, "ref") if "ref" in model.peft_config else None
        if state.global_step == self.stop:
            control.should_training_stop = True


def dense(model, adapter):
    return {
        name: layer.scaling[adapter] * layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def unpaired(n):
    return [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 3)}
        for i, p in enumerate(make_pairs(n))
    ]


def trainer_for(folder, out, rule, *, kto=False, wrapped=False, stop=None, callback=None, **settings):
    """A real TRL trainer with the callback; the policy a `peft_config`, or a PeftModel that is `wrapped` before."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value", "dense"], task_type="CAUSAL_LM")
    if wrapped:
        model, peft_config = get_peft_model(model, peft_config), None
    values = dict(
        output_dir=str(out),
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        beta=0.3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=64,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=7,
    )
    values.update(settings)
    args, trainer = (KTOConfig, KTOTrainer) if kto else (DPOConfig, DPOTrainer)
    rows = unpaired(STEPS * BATCH) if kto else make_pairs(STEPS * BATCH)
    watch = Watch(stop)
    callbacks = [watch] if rule is None else [callback or ReferenceSyncCallback(rule), watch]
    made = trainer(
        model,
        args=args(**values),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
        callbacks=callbacks,
    )
    made.watch = watch
    return made


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kto", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_trl_computes_with_the_reference_that_moves(neox, tmp_path, kto, wrapped):
    """A copy after every step: policy and reference are equal at each loss, which is ln 2 (KTO: one half) then."""
    even = 0.5 if kto else math.log(2)
    moving = trainer_for(neox, tmp_path / "a", Hard(1), kto=kto, wrapped=wrapped)
    moving.train()
    assert losses(moving) == pytest.approx([even] * STEPS, abs=1e-6)
    still = trainer_for(neox, tmp_path / "b", None, kto=kto, wrapped=wrapped)
    still.train()
    assert losses(still)[0] == pytest.approx(even, abs=1e-6)
    assert abs(losses(still)[-1] - even) > 1e-3


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_reference_follows_the_closed_form_and_is_not_trained(neox, tmp_path, wrapped):
    rule = Soft(0.5, 2, space="product")
    trainer = trainer_for(neox, tmp_path, rule, wrapped=wrapped)
    given = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert given == {id(p) for p in adapter_parameters(trainer.model, "default").values()}
    expected = dense(trainer.model, "ref")
    trainer.train()
    for step in range(1, STEPS + 1):
        if step % 2 == 0:
            policy = trainer.watch.policy[step]
            expected = {n: 0.5 * policy[n] + 0.5 * expected[n] for n in expected}
        got = trainer.watch.reference[step]
        apart = sum((got[n] - expected[n]).square().sum() for n in expected)
        assert apart.sqrt() <= 0.02 * sum(t.square().sum() for t in expected.values()).sqrt()  # rank 4 of up to 12
    assert trainer.model.active_adapter == "default"
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["reference/updates"] for entry in logged] == [0, 1, 1, 2, 2, 3]
    # ages by hand: 1, (1+1)/2, 2, (2+1)/2, 2.5, (2.5+1)/2
    assert [entry["reference/lag"] for entry in logged] == [1, 1, 2, 1.5, 2.5, 1.75]
    for step, entry in enumerate(logged, 1):
        policy, reference = trainer.watch.policy[step], trainer.watch.reference[step]
        apart = sum((policy[n] - reference[n]).square().sum().item() for n in policy)
        assert entry["reference/distance"] == pytest.approx(math.sqrt(apart), rel=1e-4)


def test_a_missing_reference_becomes_a_float32_copy_that_is_not_trained(neox):
    base = AutoModelForCausalLM.from_pretrained(neox)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["dense"], init_lora_weights=False))
    policy = adapter_parameters(model, "default")
    for p in policy.values():
        p.data = p.data.bfloat16()
    ReferenceSyncCallback(Hard(1)).on_init_end(None, None, None, model=model)
    for name, p in adapter_parameters(model, "ref").items():
        assert p.dtype == torch.float32 and torch.equal(p, policy[name].float()) and not p.requires_grad
    assert all(p.requires_grad for p in policy.values()) and model.active_adapter == "default"


RULES = {"soft": lambda: Soft(0.5, 2), "adaptive": lambda: Adaptive(distance_limit=0.5, every=2)}


@pytest.mark.parametrize(
    ("kto", "wrapped", "rule"),
    [(False, False, "soft"), (False, True, "soft"), (True, False, "soft"), (False, False, "adaptive")],
)
def test_killed_and_resumed_is_never_interrupted(neox, tmp_path, kto, wrapped, rule):
    make, common = RULES[rule], {"kto": kto, "wrapped": wrapped, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(neox, tmp_path / "whole", make(), **common)
    whole.train()
    killed = trainer_for(neox, tmp_path / "killed", make(), stop=3, **common)
    killed.train()
    assert killed.state.global_step == 3
    resumed = trainer_for(neox, tmp_path / "killed", again := make(), **common)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(resumed.watch.policy) == [4, 5, 6]
    for adapter in ("default", "ref"):
        expected = adapter_parameters(whole.model, adapter)
        for name, p in adapter_parameters(resumed.model, adapter).items():
            assert torch.equal(p, expected[name]), (adapter, name)
    rules = [c.rule for t in (whole, resumed) for c in t.callback_handler.callbacks if hasattr(c, "rule")]
    assert rules[0].state_dict() == rules[1].state_dict() and rules[1] is again
    assert again.updates >= 2
    keys = ("loss", "reference/updates", "reference/lag", "reference/distance", "step")
    history = [[tuple(e[k] for k in keys) for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert history[0] == history[1]


def stopped(neox, out, **settings):
    trainer = trainer_for(neox, out, Soft(0.5, 2), stop=3, save_strategy="steps", save_steps=3, **settings)
    trainer.train()
    return trainer, Path(out) / "checkpoint-3"


def test_a_checkpoint_holds_the_reference_and_the_rule(neox, tmp_path):
    trainer, folder = stopped(neox, tmp_path)
    saved = load_file(folder / "ref" / "adapter_model.safetensors")
    held = snapshot(trainer.model, "ref")
    assert len(saved) == len(held)
    for name, tensor in held.items():
        assert torch.equal(saved[name.removesuffix(".weight") + ".weight"], tensor)
    state = json.loads((folder / "reference_state.json").read_text())
    assert state["step"] == 3
    assert state["rule"] == {"updates": 1, "last_step": 2, "age": 2.0, "decision": None}
    assert {f.suffix for f in (folder / "ref").iterdir()} <= {".safetensors", ".json", ".md"}


def test_resuming_finds_the_reference_wherever_the_checkpoint_lies(neox, tmp_path):
    trainer, folder = stopped(neox, tmp_path / "first")
    held = snapshot(trainer.model, "ref")
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.update(snapshot(model, "ref"))

    rule = Soft(0.5, 2)
    resumed = trainer_for(neox, tmp_path / "second", rule)
    resumed.add_callback(Look())
    if Version(transformers.__version__) < Version("5.23"):  # does not load the policy, nor say where it would be
        with pytest.raises(CheckpointError, match="the policy of step 3 could not be put back"):
            resumed.train(resume_from_checkpoint=str(moved))
        resumed = trainer_for(neox, tmp_path / "second", rule, resume_from_checkpoint=str(moved))
        resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=str(moved))
    assert all(torch.equal(seen[name], tensor) for name, tensor in held.items())
    assert rule.updates == 3


@pytest.mark.parametrize("adapter", ["ref", "default"])
def test_an_adapter_that_transformers_does_not_load_is_read_by_the_callback(neox, tmp_path, adapter):
    """The callback's own way back, with what is in memory off and the checkpoint where it is expected."""
    trainer, _ = stopped(neox, tmp_path)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReferenceSyncCallback))
    held = snapshot(trainer.model, adapter)
    for p in adapter_parameters(trainer.model, adapter).values():
        p.data.zero_()
    callback.rule.load_state_dict({"updates": 9, "last_step": 9, "age": 9.0})
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    for name, p in adapter_parameters(trainer.model, adapter).items():
        assert torch.equal(p, held[name])
    assert (callback.rule.updates, callback.rule.last_step, callback.rule.age) == (1, 2, 2.0)


@pytest.mark.parametrize(("where", "who"), [("ref", "reference"), (".", "policy")])
def test_an_adapter_that_is_not_the_saved_one_stops_the_run(neox, tmp_path, where, who):
    _, folder = stopped(neox, tmp_path)
    weights = load_file(folder / where / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1e-6
    save_file(weights, folder / where / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the {who} of step 3 could not be put back"):
        trainer_for(neox, tmp_path, Soft(0.5, 2)).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_from_without_the_callback_stops_the_run(neox, tmp_path):
    trainer_for(neox, tmp_path, None, stop=3, save_strategy="steps", save_steps=3).train()
    with pytest.raises(CheckpointError, match="written without this callback"):
        trainer_for(neox, tmp_path, Soft(0.5, 2)).train(resume_from_checkpoint=True)


def test_transformers_can_rebuild_the_callback_from_its_state(neox, tmp_path):
    stopped(neox, tmp_path)
    common = {"restore_callback_states_from_checkpoint": True}
    resumed = trainer_for(neox, tmp_path, UpdateRule(0.25, 5), **common)
    resumed.train(resume_from_checkpoint=True)
    callback = next(c for c in resumed.callback_handler.callbacks if isinstance(c, ReferenceSyncCallback))
    assert (callback.rule.alpha, callback.rule.every, callback.rule.updates) == (0.5, 2, 3)


def test_what_cannot_work_is_refused(neox, tmp_path):
    with pytest.raises(ConfigError, match="drift_limit=0.1"):
        ReferenceSyncCallback(Adaptive(drift_limit=0.1))
    with pytest.raises(ConfigError, match="target='default'"):
        ReferenceSyncCallback(Hard(1), target="default")
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        trainer_for(neox, tmp_path, Hard(1), precompute_ref_log_probs=True).train()
    callback = ReferenceSyncCallback(Frozen())
    plain = AutoModelForCausalLM.from_pretrained(neox)
    with pytest.raises(ModelError, match="needs a PEFT model"):
        callback.on_init_end(None, None, None, model=plain)


@pytest.mark.parametrize("rule", [Soft(0.5, 2), Hard(3)], ids=["soft", "hard"])
def test_trl_with_the_callback_ends_where_lorats_own_trainer_does(neox, tmp_path, rule):
    """Six steps of DPO on the same pairs, in the same order, from the same policy: policy, reference and losses."""
    from tests.helpers import worlds as conftest

    settings = dict(train_sampling_strategy="sequential", learning_rate=1e-3)
    theirs = trainer_for(neox, tmp_path / "trl", rule, **settings)
    sync = dict(sync="soft", sync_alpha=rule.alpha, sync_every=rule.every)
    mine = conftest.trainer_for(
        neox, tmp_path / "lorat", make_pairs(STEPS * BATCH), method="dpo", beta=0.3, max_steps=STEPS, load_in_4bit=False,
        lora_target_modules=["query_key_value", "dense"], per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant", **sync, **settings,
    )  # fmt: skip
    start = torch.Generator().manual_seed(3)
    policies = [adapter_parameters(t.model, "default") for t in (theirs, mine)]
    assert policies[0].keys() == policies[1].keys()
    for name in policies[0]:
        value = 0.1 * torch.randn(policies[0][name].shape, generator=start)
        for model, policy in ((theirs.model, policies[0]), (mine.model, policies[1])):
            policy[name].data.copy_(value)
            adapter_parameters(model, "ref")[name].data.copy_(value)
    theirs.train()
    mine.train()
    assert losses(theirs) == pytest.approx(losses(mine), rel=1e-4) and abs(losses(mine)[1] - math.log(2)) > 3e-4
    for adapter in ("default", "ref"):
        left, right = dense(theirs.model, adapter), dense(mine.model, adapter)
        for name in left:
            assert (left[name] - right[name]).norm() < 1e-4 * right[name].norm(), (adapter, name)
    apart = [(a - b).norm() for a, b in zip(dense(mine.model, "default").values(), dense(mine.model, "ref").values())]
    assert (max(apart) > 1e-3) == (rule.alpha < 1)  # Hard(3) has just copied
