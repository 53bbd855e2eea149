"""What stops a run, what must not be deleted, and what is said about the reference before it begins."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorat.errors import CheckpointError, ConfigError, ModelError, NonFiniteError
from lorat.model.adapters import attach
from lorat.model.base import load_base, load_tokenizer
from lorat.model.models import Models
from lorat.packs.packing import collate, pad_rows
from lorat.reference import Frozen, Hard, Soft, adapter_parameters, copy_, snapshot
from lorat.reference.moving import opening_lines
from lorat.runs import checkpoint as ck
from lorat.train.trainer import TrustRegionTrainer
from tests.helpers import driver
from tests.helpers.worlds import make_pairs, nudge, run_config, trainer_for

# ---- numbers


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_non_finite_gradient_of_a_finite_loss_stops_the_run(neox, tmp_path, max_grad_norm):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), max_grad_norm=max_grad_norm)
    before = snapshot(trainer.model)
    next(iter(adapter_parameters(trainer.model, "default").values())).register_hook(lambda g: g * float("nan"))
    with pytest.raises(NonFiniteError, match="gradient") as error:
        trainer.train()
    assert "learning_rate" in str(error.value) and "Start again" in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(trainer.model, "default").items())


def test_ktos_baseline_and_the_reference_have_no_dropout(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), method="kto", lora_dropout=0.5)
    nudge(trainer, scale=-0.05)
    trainer.model.train()
    batch = collate(list(trainer.train_dataset)[:8])["batch"]
    first, second = (trainer.scorer.baseline([trainer.scorer.plan(batch)]).value for _ in range(2))
    assert first > 0 and torch.equal(first, second) and trainer.model.training
    copy_(trainer.model)  # a reference whose B is not zero, so that dropout would show
    row = trainer.train_dataset[0]
    pack = pad_rows([(row["prompt_ids"], [row["completion_ids"]])], 0)
    with torch.no_grad(), trainer.models.reference():
        assert torch.equal(*(trainer.models.tokens(pack) for _ in range(2)))


def test_suspects_are_those_of_one_step(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(12))
    trainer.train()
    assert len(trainer.stepper._suspects) == 1


def test_a_second_evaluation_forgets_the_first(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), eval_pairs=make_pairs(6, seed=1))
    trainer.evaluate()
    nudge(trainer)
    second, third = trainer.evaluate(), trainer.evaluate()
    assert second["eval_loss"] == third["eval_loss"] != math.log(2)


def test_kto_counts_the_tokens_of_its_baseline(neox, tmp_path):
    rows = [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(make_pairs(4))
    ]
    trainer = trainer_for(neox, tmp_path / "run", rows, method="kto")
    trainer.train()
    sizes = [(len(r["prompt"].split()), len(r["completion"].split()) + 1) for r in rows]
    # each prompt and each completion goes through once as itself and once mismatched
    assert trainer.state.log_history[0]["num_tokens"] == 2 * sum(p + c for p, c in sizes)


def test_the_optimiser_holds_the_policy_whatever_the_flags_say(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4))
    trainer.model.set_adapter("ref")
    held = {id(p) for g in trainer.create_optimizer().param_groups for p in g["params"]}
    assert held == {id(p) for p in adapter_parameters(trainer.model, "default").values()}
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    args = run_config(neox, tmp_path / "other")
    trainer = TrustRegionTrainer(None, args, Dataset.from_list(make_pairs(4)), optimizers=(other, None))
    with pytest.raises(ConfigError, match="optimiser does not hold"):
        trainer.create_optimizer()


# ---- models that cannot be trained as they are


def test_a_head_that_is_not_what_it_seems_stops_the_trainer(neox, tmp_path):
    args = run_config(neox, tmp_path / "run")
    base = load_base(args.base())
    base.config.logits_scaling = 4.0
    with pytest.raises(ModelError, match="silently wrong"):
        TrustRegionTrainer(base, args, Dataset.from_list(make_pairs(4)), processing_class=load_tokenizer(args.base()))


def test_tokens_and_positions_the_model_does_not_have(neox, tmp_path):
    args = run_config(neox, tmp_path / "run", load_in_4bit=False)
    tokenizer, pairs = load_tokenizer(args.base()), Dataset.from_list(make_pairs(8))
    small = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(ModelError, match=r"token \d+, the model knows 10 tokens"):
        TrustRegionTrainer(small, args, pairs, processing_class=tokenizer)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ModelError, match="has learned 8 positions; set max_length to 8 or less"):
        TrustRegionTrainer(short, args, pairs, processing_class=tokenizer)


def test_what_the_model_is_is_written_down_and_not_what_was_asked_for(neox, tmp_path):
    """A float32 model handed over with load_in_4bit left on: the card and `lorat merge` must know."""
    from lorat.runs.merge import merge

    args = run_config(neox, tmp_path / "run", load_in_4bit=True)
    plain = AutoModelForCausalLM.from_pretrained(neox)
    trainer = TrustRegionTrainer(
        plain, args, Dataset.from_list(make_pairs(8)), processing_class=load_tokenizer(args.base())
    )
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / ck.RUN).read_text())
    assert (saved["load_in_4bit"], saved["dtype"]) == (False, "float32")
    assert "4-bit" not in (tmp_path / "run" / "README.md").read_text()
    report = merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert report.folded.largest < 1e-4 and "4-bit" not in report.render()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


def test_merging_knows_how_the_base_was_quantised(neox, tmp_path):
    from lorat.runs.merge import merge

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), bnb_4bit_quant_type="fp4")
    trainer.train()
    trainer.save_model()
    assert merge(str(tmp_path / "run"), str(tmp_path / "merged")).folded.largest < 1e-4
    assert merge(str(tmp_path / "run"), str(tmp_path / "original"), base="original").changed.mean > 0.05


def test_a_model_that_brings_its_adapters_takes_no_others(neox, tmp_path):
    from peft import LoraConfig

    model = attach(load_base(run_config(neox, tmp_path).base()), LoraConfig(target_modules=["dense"]))
    with pytest.raises(ModelError, match=r"\['default', 'ref'\].*/no/such"):
        attach(model, policy_adapter="/no/such/adapter")
    uneven = attach(load_base(run_config(neox, tmp_path).base()), LoraConfig(r=4, target_modules=["dense"]))
    uneven.delete_adapter("ref")
    uneven.add_adapter("ref", LoraConfig(r=2, target_modules=["dense"]))
    with pytest.raises(ModelError, match="own adapter 'ref' cannot be the reference"):
        attach(uneven)


def test_a_damaged_or_foreign_adapter(neox, tmp_path):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    get_peft_model(AutoModelForCausalLM.from_pretrained(neox), LoraConfig(target_modules=["dense"])).save_pretrained(
        tmp_path / "lora"
    )
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="damaged"):
        attach(load_base(run_config(neox, tmp_path).base()), policy_adapter=str(tmp_path / "lora"))
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(neox), tuned).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        attach(load_base(run_config(neox, tmp_path).base()), policy_adapter=str(tmp_path / "prompt"))


def test_an_adapter_whose_values_did_not_arrive_is_found(neox, tmp_path, monkeypatch):
    """Some versions of transformers and PEFT left a resumed policy silently at its first values."""
    from lorat.model import adapters

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), save_strategy="steps", save_steps=1)
    trainer.train()
    monkeypatch.setattr(adapters, "set_peft_model_state_dict", lambda *args, **kwargs: None)
    again = trainer_for(neox, tmp_path / "run", make_pairs(8), save_strategy="steps", save_steps=1)
    with pytest.raises(ModelError, match="did not load into 'default'"):
        again.train(resume_from_checkpoint=True)


def test_an_adapted_head_that_comes_with_the_model_is_refused(neox, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = load_base(run_config(neox, tmp_path, load_in_4bit=False).base())
    head = next(n for n, m in plain.named_modules() if m is plain.get_output_embeddings())
    with pytest.raises(ModelError, match="head is adapted or trainable"):
        attach(get_peft_model(plain, LoraConfig(target_modules=["dense", head])))


def test_a_reference_adapter_for_another_base_is_refused(neox, tmp_path):
    from tests.helpers.worlds import save_neox

    stranger = save_neox(tmp_path / "stranger", seed=9)
    other = trainer_for(stranger, tmp_path / "other", make_pairs(4))
    other.save_model()
    with pytest.raises(ModelError, match="was trained on .*stranger"):
        trainer_for(neox, tmp_path / "run", make_pairs(4), ref_adapter=str(tmp_path / "other"))


def test_the_reference_keeps_no_graph_and_the_policy_does(neox, tmp_path, monkeypatch):
    seen, compute = [], Models.tokens
    monkeypatch.setattr(
        Models,
        "tokens",
        lambda self, pack: seen.append((self.peft.active_adapter, torch.is_grad_enabled())) or compute(self, pack),
    )
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), max_steps=1)
    seen.clear()
    trainer.train()
    assert seen == [("ref", False), ("default", True)]


def test_a_tie_is_no_correct_answer(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(16), sync="hard", sync_every=2)
    trainer.train()
    accuracies = [h["rewards/accuracies"] for h in trainer.state.log_history if "loss" in h]
    assert accuracies[0] == accuracies[2] == 0.0 != accuracies[1]


# ---- checkpoints and folders


def test_a_finished_run_takes_no_further_step(neox, tmp_path):
    """max_steps in mid-epoch: resuming at the last step loads it and stops there."""
    whole = driver.make(neox, str(tmp_path / "run"), max_steps=4)
    whole.train()
    again = driver.make(neox, str(tmp_path / "run"), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert [p.name for p in ck.checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]
    for adapter in ("default", "ref"):
        for name, p in adapter_parameters(whole.model, adapter).items():
            assert torch.equal(adapter_parameters(again.model, adapter)[name], p)


def test_the_start_is_resumed_and_not_made_again(neox, tmp_path):
    whole = driver.make(neox, str(tmp_path / "run"), max_steps=4)
    nudge(whole)
    whole.evaluator.start_from(snapshot(whole.model))
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = driver.make(neox, str(tmp_path / "run"), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(again.evaluator.start[n], whole.evaluator.start[n]) for n in whole.evaluator.start)


def test_the_best_model_need_not_be_the_last(neox, tmp_path, monkeypatch):
    settings = dict(
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_pairs=make_pairs(6, seed=4),
    )
    trainer = driver.make(neox, str(tmp_path / "run"), **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-10"
    for adapter, folder in (("default", best), ("ref", best / "ref")):
        saved = load_file(folder / "adapter_model.safetensors")
        for name, p in adapter_parameters(trainer.model, adapter).items():
            assert torch.equal(p, saved[name])

    seal = ck.seal

    def full(folder):
        if folder.name == best.name:
            raise OSError(28, "No space left on device")
        seal(folder)

    monkeypatch.setattr(ck, "seal", full)  # the best one cannot be written: the run must not look for it at its end
    other = driver.make(neox, str(tmp_path / "other"), **settings)
    other.train()
    assert other.state.best_model_checkpoint is None or Path(other.state.best_model_checkpoint).is_dir()


def test_going_back_sets_later_checkpoints_aside(neox, tmp_path):
    """Torn or not, they are no longer this run's newest: neither resumed from nor kept in place of new ones."""
    out = tmp_path / "run"
    driver.make(neox, str(out)).train()
    shutil.copytree(out / "checkpoint-10", out / "checkpoint-500")
    (out / "checkpoint-500" / "optimizer.pt").write_bytes(b"torn")
    again = driver.make(neox, str(out), save_total_limit=1)
    again.train(resume_from_checkpoint=str(out / "checkpoint-8"))
    assert [p.name for p in ck.checkpoints(out)] == ["checkpoint-10"]
    assert ck.flaw(out / "checkpoint-10") is None
    assert (out / "set-aside-checkpoint-500" / "optimizer.pt").read_bytes() == b"torn"


def test_overwriting_deletes_only_what_lorat_wrote_and_never_its_own_input(neox, tmp_path):
    out = tmp_path / "thesis"
    for name in ("ref/thesis.txt", "start/notes.txt", "adapter_notes.md"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    driver.make(neox, str(out), overwrite_output_dir=True, max_steps=2).train()
    for name in ("ref/thesis.txt", "start/notes.txt", "adapter_notes.md"):
        assert (out / name).read_text() == "mine"
    source = str(out / "checkpoint-2")
    again = driver.make(neox, str(out), overwrite_output_dir=True, policy_adapter=source, max_steps=2)
    with pytest.raises(CheckpointError, match="which this run starts from"):
        again.train()
    assert ck.flaw(Path(source)) is None
    foreign = tmp_path / "foreign"
    (foreign / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not written by lorat"):
        ck.guard_output_dir(foreign, resuming=False, overwrite=True)
    assert (foreign / "checkpoint-3").is_dir()


def test_a_checkpoint_without_its_optimiser_is_not_resumed(neox, tmp_path):
    driver.make(neox, str(tmp_path / "run"), save_only_model=True).train()
    again = driver.make(neox, str(tmp_path / "run"), save_only_model=True)
    with pytest.raises(CheckpointError, match=r"optimizer.pt.*save_only_model.*policy_adapter"):
        again.train(resume_from_checkpoint=True)


def test_other_data_of_the_same_size_is_another_run(neox, tmp_path):
    first = trainer_for(neox, tmp_path / "run", make_pairs(8), save_strategy="steps", save_steps=1)
    first.train()
    other = trainer_for(neox, tmp_path / "run", make_pairs(8, seed=1), save_strategy="steps", save_steps=1)
    with pytest.raises(CheckpointError, match="train_sha256"):
        other.train(resume_from_checkpoint=True)


def test_a_resume_elsewhere_is_complete_there(neox, tmp_path):
    driver.make(neox, str(tmp_path / "a"), max_steps=4).train()
    there = driver.make(neox, str(tmp_path / "b"), max_steps=4)
    there.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert (tmp_path / "b" / ck.RUN).read_text() == (tmp_path / "a" / ck.RUN).read_text()
    assert (tmp_path / "b" / "start" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_is_known_by_its_content_and_not_by_how_it_is_called(neox, tmp_path, monkeypatch):
    """A relative path to it, and another name: the same folder, the same step."""
    out = tmp_path / "run"
    driver.make(neox, str(out), max_steps=4).train()
    (out / "checkpoint-2").rename(out / "kept")
    start = (out / "start" / "adapter_model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    again = driver.make(neox, str(out), max_steps=4)
    again.train(resume_from_checkpoint="run/kept")
    assert again.state.global_step == 4
    assert (out / "set-aside-checkpoint-4").is_dir() and ck.flaw(out / "checkpoint-4") is None
    assert (out / "start" / "adapter_model.safetensors").read_bytes() == start


@pytest.mark.parametrize("content", ["[]", "null", '{"a": {}}', '{"a": 3}', "{", ""])
def test_a_manifest_of_another_shape_is_torn(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert (ck.flaw(tmp_path) or "").startswith("manifest.json cannot be read")


def test_one_flipped_byte_is_found(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    ck.seal(tmp_path)
    assert ck.flaw(tmp_path) is None
    (tmp_path / "weights").write_bytes(b"abd")
    assert "SHA-256" in ck.flaw(tmp_path)


def test_a_signal_saves_before_anything_else_and_once(neox, tmp_path, monkeypatch):
    done = []
    trainer = driver.make(
        neox,
        str(tmp_path / "run"),
        save_strategy="epoch",
        eval_strategy="epoch",
        eval_pairs=make_pairs(4, seed=2),
    )
    publish, evaluate = ck.publish, trainer.evaluate
    monkeypatch.setattr(ck, "publish", lambda staged, final: done.append(final.name) or publish(staged, final))
    monkeypatch.setattr(trainer, "evaluate", lambda **k: done.append("evaluated") or evaluate(**k))
    move = trainer.progress.on_step_end

    def interrupt(args, state, control, **kwargs):
        if state.global_step == 2 and trainer.signals.received is None:
            os.kill(os.getpid(), signal.SIGTERM)
        move(args, state, control, **kwargs)

    trainer.progress.on_step_end = interrupt
    trainer.train()
    assert done == ["checkpoint-3"]


def test_a_signal_in_the_last_step_changes_nothing(neox, tmp_path):
    trainer = driver.make(neox, str(tmp_path / "run"))
    move = trainer.progress.on_step_end

    def interrupt(args, state, control, **kwargs):
        if state.global_step == 9:  # heeded at the end of step 10, which is the last
            os.kill(os.getpid(), signal.SIGTERM)
        move(args, state, control, **kwargs)

    trainer.progress.on_step_end = interrupt
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 10
    assert ck.flaw(tmp_path / "run" / "checkpoint-10") is None


def test_a_second_ctrl_c_ends_at_once(neox, tmp_path):
    trainer = driver.make(neox, str(tmp_path / "run"))

    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.progress.on_step_end = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- words


def test_what_is_said_of_the_reference():
    assert opening_lines(Frozen(), 0.1, 100) == ["Reference: frozen at the start; it never moves."]
    loose = "\n".join(opening_lines(Soft(0.6), 0.05, 10_000))
    assert "lag 0.7 steps, beta*lag 0.03" in loose and "10000 updates in 10000 steps" in loose
    assert "does not bind" in loose
    advised = int(loose.split("Set sync_every to ")[1].split()[0])
    assert 0.05 * Soft(0.6, advised).lag == pytest.approx(50, rel=0.02)
    assert "too short" in "\n".join(opening_lines(Soft(0.6), 0.05, 100))
    never = "\n".join(opening_lines(Hard(512), 0.1, 100))
    assert "never move" in never and "0 updates" in never and "Set sync_every to 12 or less" in never
    assert len(opening_lines(Soft(0.6, 512), 0.1, 5000)) == 1  # beta*lag 60: nothing to add


def test_the_bar_on_a_terminal(neox, tmp_path):
    """Steps, loss, accuracy, margin, tokens/s and the reference's last move, on a terminal of 80 columns."""
    import io

    from rich.console import Console

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(16), sync="hard", sync_every=3, disable_tqdm=False)
    screen = io.StringIO()
    trainer.progress.console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    trainer.train()
    said = screen.getvalue()
    assert "DPO hard" in said and "4/4" in said and "lag 1.0 steps" in said
    last = said.split("loss ")[-1].splitlines()[0]
    logged = trainer.state.log_history[3]
    assert last.startswith(f"{logged['loss']:.4f}  acc {logged['rewards/accuracies']:.1%}")
    assert "tok/s" in last and last.rstrip().endswith("ref moved at 3")


def test_evaluation_without_data_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="eval_strategy=steps needs data"):
        trainer_for("/no/such/model", tmp_path / "run", make_pairs(4), eval_strategy="steps")
