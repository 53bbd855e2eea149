"""Whole runs on a GPU: the CPU's run again, memory options that change no number, the rehearsal, and what comes after."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from lorat.cli.main import main
from lorat.reference import snapshot
from lorat.settings.config import CHECKPOINTING
from tests.helpers.worlds import make_pairs, trainer_for

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
RUN = dict(use_cpu=not ON_GPU, sync="soft", sync_alpha=0.5, sync_every=2, learning_rate=2e-3)


def trained(neox, out, **settings):
    """Losses of four steps, and the trainer."""
    trainer = trainer_for(neox, out, make_pairs(16), **{**RUN, **settings})
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_a_run_is_the_cpus_run(neox, tmp_path, method):
    """float32, not in 4-bit: the same losses to rounding, and the first exactly where policy and reference are one."""
    settings = dict(method=method, load_in_4bit=False, dtype="float32")
    there, gpu = trained(neox, tmp_path / "gpu", **settings)
    here, _ = trained(neox, tmp_path / "cpu", **settings, **{"use_cpu": True})
    assert next(gpu.model.parameters()).device.type == ("cuda" if ON_GPU else "cpu")
    assert not gpu.separate  # packs share prompts
    assert there[0] == pytest.approx(here[0], abs=1e-6) and there == pytest.approx(here, rel=2e-3)
    assert len(set(here)) == len(here) > 3


def test_a_step_does_not_depend_on_packs_checkpointing_or_where_checkpoints_are(neox, tmp_path):
    """In 4-bit and bf16, as a user has it: the first step's gradient has no time to drift apart."""

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
            self.first = getattr(self, "first", torch.cat(grads))

    def first(name, **settings):
        look = Gradient()
        common = dict(bf16=ON_GPU, per_device_train_batch_size=16, max_steps=1, policy_adapter=str(tmp_path / "start"))
        trainer = trainer_for(neox, tmp_path / name, make_pairs(16), callbacks=[look], **{**RUN, **common, **settings})
        trainer.train()
        return look.first

    _, away = trained(neox, tmp_path / "away")  # B is zero in a fresh adapter, and A then has no gradient
    away.save_model(str(tmp_path / "start"))
    whole = first("whole")
    assert whole.norm() > 0
    kwargs = f"{CHECKPOINTING}_kwargs"
    others = {
        "packs": dict(max_tokens_per_pack=64),
        "recomputed": dict(activation_checkpointing=True),
        "offloaded": dict(activation_checkpointing=True, **{kwargs: {"offload": True}}),
        "every other": dict(activation_checkpointing=True, **{kwargs: {"every_n_layers": 2}}),
    }
    for name, settings in others.items():
        assert (first(name, **settings) - whole).norm() < 0.02 * whole.norm(), name


def test_the_rehearsal_takes_what_the_steps_take(neox, tmp_path):
    """Pairs of one length: the peak before the first step is that of the steps, optimiser state and all."""

    class Peaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.before = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

    look, ids = Peaks(), "a small dog runs " * 12
    pairs = [{"prompt": ids, "chosen": " a cat" * 20, "rejected": " the cat" * 20} for _ in range(16)]
    settings = dict(bf16=True, max_tokens_per_pack=1024, max_length=128, per_device_train_batch_size=4)
    trainer = trainer_for(neox, tmp_path / "run", pairs, callbacks=[look], **{**RUN, **settings})
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert torch.cuda.max_memory_allocated() <= 1.02 * look.before


def test_paged_8bit_adamw_and_embeddings_in_8_bits_train_and_resume(neox, tmp_path):
    settings = dict(optim="paged_adamw_8bit", lora_r=64, quantize_embeddings="8bit", bf16=ON_GPU)
    settings |= dict(save_strategy="steps", save_steps=2)
    whole, trainer = trained(neox, tmp_path / "run", **settings)
    states = [s["state1"].dtype for s in trainer.optimizer.optimizer.state.values() if "state1" in s]
    assert torch.uint8 in states
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "last")
    resumed = trainer_for(neox, tmp_path / "run", make_pairs(16), **{**RUN, **settings})
    resumed.train(resume_from_checkpoint="auto")
    again = [e["loss"] for e in resumed.state.log_history if "loss" in e]
    assert again[:2] == whole[:2] and again == pytest.approx(whole, rel=1e-2)
    for adapter in ("default", "ref"):  # attention's backward sums in no fixed order on a GPU, so not bit for bit
        left, right = snapshot(trainer.model, adapter), snapshot(resumed.model, adapter)
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=0.05, atol=5e-3)


def test_gpu_memory_auto_sets_packs_that_train(neox, tmp_path):
    losses, trainer = trained(neox, tmp_path / "run", gpu_memory="auto" if ON_GPU else "8GiB", bf16=ON_GPU)
    assert trainer.args.max_tokens_per_pack > 64 and len(losses) == 4


def test_a_run_is_evaluated_and_answers(neox, tmp_path):
    """eval and generate as a user calls them; the exact and the sampled KL agree within their errors."""
    _, trainer = trained(neox, tmp_path / "run", bf16=ON_GPU, save_strategy="steps", save_steps=4)
    trainer.save_model()
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(p) + "\n" for p in make_pairs(12, seed=3)))
    out = tmp_path / "eval.json"
    how = [] if ON_GPU else ["--cpu"]
    asked = ["--samples", "64", "--max-new-tokens", "12"]
    assert main(["eval", str(tmp_path / "run"), "--data", str(held_out), "--out", str(out), *asked, *how]) == 0
    answers = tmp_path / "answers.jsonl"
    asked = ["--prompts", str(held_out), "--out", str(answers), "--max-new-tokens", "12"]
    assert main(["generate", str(tmp_path / "run"), *asked, *how]) == 0
    assert len(answers.read_text().splitlines()) == 12
    found = json.dumps(json.loads(out.read_text()))
    assert "NaN" not in found and '"accuracy"' in found
