"""The reference in a run: what is measured of it, when an adaptive one moves, what is written down and said of it."""

from __future__ import annotations

import io
import json

import pytest
import torch

from lorat.packs.packing import Batch, collate
from lorat.reference import Adaptive, Soft, adapter_parameters, copy_, distance, snapshot
from lorat.reference.moving import JOURNAL, opening_lines
from tests.helpers import driver
from tests.helpers.two_ranks import results
from tests.helpers.worlds import make_pairs, nudge, trainer_for

ADAPTIVE = dict(sync="adaptive", sync_every=2, learning_rate=3e-3)


def journal(folder):
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def logs(trainer, name):
    return [h[name] for h in trainer.state.log_history if name in h]


def as_kto(pairs):
    return [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 3 > 0} for i, p in enumerate(pairs)]


def plain_logratios(trainer, groups):
    """Log-ratios of completions to the reference by plain transformers, float64: `[(log-ratio, tokens), …]`."""
    base = trainer.model.get_base_model()

    def logps():
        out = []
        for prompt, completions in groups:
            for completion in completions:
                logits = base(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
                out.append(logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
        return torch.stack(out)

    trainer.model.eval()
    with torch.no_grad():
        policy = logps()
        trainer.model.set_adapter("ref", inference_mode=True)
        reference = logps()
        trainer.model.set_adapter("default")
    return policy - reference, torch.tensor([len(c) for _, cs in groups for c in cs])


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_drift_and_bind_are_what_they_say(neox, tmp_path, method):
    """Sum of |log-ratio| over tokens; β·|margin| (KTO: β·|log-ratio|); and the drift of one step, over its packs."""
    pairs = make_pairs(6) if method == "dpo" else as_kto(make_pairs(6))
    trainer = trainer_for(neox, tmp_path / "run", pairs, method=method, beta=0.3, max_tokens_per_pack=25)
    nudge(trainer)
    rows = list(trainer.train_dataset)
    groups = [trainer.scorer.method.group(r) for r in rows]
    ratios, tokens = plain_logratios(trainer, groups)
    drift = (ratios.abs().sum() / tokens.sum()).item()
    bind = 0.3 * (ratios.view(-1, 2).diff(dim=1) if method == "dpo" else ratios).abs().mean().item()
    samples, _ = trainer.get_batch_samples(iter([collate(rows[:4]), collate(rows[4:])]), 2, torch.device("cpu"))
    for sample in samples:
        trainer.training_step(trainer.models, sample)
    means = trainer.meters.averages.means()
    assert means["reference/drift"] == pytest.approx(drift, rel=1e-5) and drift > 0.01
    assert means["reference/bind"] == pytest.approx(bind, rel=1e-5)
    assert trainer.stepper.drift() == pytest.approx(drift, rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_evaluation_measures_against_the_start(neox, tmp_path, method):
    """After the reference has moved: rewards are to the reference, start/rewards to where the run began."""
    pairs = make_pairs(7) if method == "dpo" else as_kto(make_pairs(7))
    trainer = trainer_for(neox, tmp_path / "run", pairs, method=method, beta=0.3, eval_pairs=pairs)
    nudge(trainer)
    copy_(trainer.model)
    nudge(trainer, seed=6)
    held = snapshot(trainer.model)
    metrics = trainer.evaluate()
    assert all(torch.equal(held[n], p) for n, p in adapter_parameters(trainer.model, "default").items())
    groups = [trainer.scorer.method.group(r) for r in trainer.eval_dataset]
    to_reference, tokens = plain_logratios(trainer, groups)
    with trainer.models.policy_as(trainer.evaluator.start):
        copy_(trainer.model)  # the reference is the start now
    to_start, _ = plain_logratios(trainer, groups)
    assert (to_start - to_reference).abs().min() > 1e-3
    for prefix, ratios in (("eval_", to_reference), ("eval_start/", to_start)):
        rewards = 0.3 * ratios
        if method == "dpo":
            chosen, rejected = rewards.view(-1, 2).T
            accuracy = (chosen > rejected).double().mean().item()
            assert metrics[f"{prefix}rewards/accuracies"] == pytest.approx(accuracy)
        else:
            labels = torch.tensor([r["label"] for r in trainer.eval_dataset])
            chosen, rejected = rewards[labels], rewards[~labels]
        assert metrics[f"{prefix}rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
        assert metrics[f"{prefix}rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
        margin = (chosen.mean() - rejected.mean()).item()
        assert metrics[f"{prefix}rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-6)
    drift = (to_start.abs().sum() / tokens.sum()).item()
    assert metrics["eval_start/drift"] == pytest.approx(drift, rel=1e-4)


def test_the_start_costs_one_forward_pass_in_a_run(neox, tmp_path, monkeypatch):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), eval_pairs=make_pairs(6, seed=3))
    asked = []
    tokens = trainer.scorer.tokens
    monkeypatch.setattr(trainer.scorer, "tokens", lambda groups: asked.extend(groups) or tokens(groups))
    first = trainer.evaluate()
    assert len(asked) == 6 and first["eval_start/rewards/margins"] == first["eval_start/drift"] == 0
    nudge(trainer)
    assert trainer.evaluate()["eval_start/drift"] > 0 and len(asked) == 6
    trainer.evaluate(trainer._prepared(driver_rows(make_pairs(3, seed=9)), trainer.processing_class, trainer.args, "x"))
    assert len(asked) == 9  # other data under the same name


def driver_rows(pairs):
    from datasets import Dataset

    return Dataset.from_list(pairs)


def test_an_adaptive_reference_moves_when_the_drift_says_so(neox, tmp_path):
    """Decisions predicted from the logged drifts: at least 2 steps apart, and above the limit."""
    probe = trainer_for(neox, tmp_path / "probe", make_pairs(48), **{**ADAPTIVE, "sync_limit": 1e9})
    probe.train()
    limit = sorted(logs(probe, "reference/drift"))[5]
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(48), **ADAPTIVE, sync_limit=limit)
    trainer.train()
    drifts, last, expected = logs(trainer, "reference/drift"), 0, []
    for step, drift in enumerate(drifts, 1):
        if step - last >= 2:
            moved = drift > limit
            expected.append((step, moved, pytest.approx(drift, rel=1e-6), "drift" if moved else ""))
            last = step if moved else last
    lines = journal(tmp_path / "run")
    assert [(x["step"], x["moved"], x["drift"], x["reason"]) for x in lines] == expected
    moves = [x["step"] for x in lines if x["moved"]]
    assert 0 < len(moves) < 11 and trainer.rule.updates == len(moves) and trainer.rule.last_step == moves[-1]
    assert [d for s, d in enumerate(drifts, 1) if s - 1 in moves] == [0.0] * sum(m < len(drifts) for m in moves)
    assert logs(trainer, "reference/lag")[moves[0] - 1] == 0


def test_an_adaptive_reference_by_distance(neox, tmp_path):
    """‖ΔW_p − ΔW_r‖/‖ΔW_p‖ is 1 until the first move, then 0: it moves at step 2, and when the half is passed again."""
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(48), **ADAPTIVE, sync_distance=0.5)
    trainer.train()
    lines = journal(tmp_path / "run")
    assert lines[0] == {"step": 2, "moved": True, "drift": None, "distance": 1.0, "reason": "distance", "error": 0.0}
    for line in lines[1:]:
        assert line["moved"] == (line["distance"] > 0.5) and line["reason"] == ("distance" if line["moved"] else "")
    assert any(not x["moved"] for x in lines)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_adaptive_decisions_survive_a_resume(neox, tmp_path, method):
    settings = {**ADAPTIVE, "sync_alpha": 0.7, "sync_limit": 1e9, "method": method, "num_train_epochs": 2}
    driver.make(neox, str(tmp_path / "still"), **settings).train()
    settings["sync_limit"] = sorted(x["drift"] for x in journal(tmp_path / "still"))[1]
    whole = driver.make(neox, str(tmp_path / "whole"), **settings)
    whole.train()
    part = driver.make(neox, str(tmp_path / "part"), **settings)
    part.signals.on_step_end = stop_at(part, 5)
    part.train()
    assert part.state.global_step == 5
    (tmp_path / "part" / JOURNAL).open("a").write('{"step": 6, "moved": true}\n{"step": 7, "mo')  # written, then killed
    resumed = driver.make(neox, str(tmp_path / "part"), **settings)
    resumed.train(resume_from_checkpoint=True)
    lines = journal(tmp_path / "whole")
    assert journal(tmp_path / "part") == lines
    moves = [x["moved"] for x in lines]
    assert any(moves) and not all(moves) and any(x["moved"] for x in lines if x["step"] > 5)
    assert resumed.rule.state_dict() == whole.rule.state_dict() and whole.rule.decision is not None
    for adapter in ("default", "ref"):
        left, right = snapshot(whole.model, adapter), snapshot(resumed.model, adapter)
        assert all(torch.equal(left[n], right[n]) for n in left)


def stop_at(trainer, step):
    original = trainer.signals.on_step_end

    def on_step_end(args, state, control, **kwargs):
        if state.global_step == step:
            trainer.signals.received = 15
        original(args, state, control, **kwargs)

    return on_step_end


def test_the_journal_has_each_move_and_the_blends_error(neox, tmp_path):
    trainer = trainer_for(
        neox, tmp_path / "run", make_pairs(32), sync="soft", sync_alpha=0.5, sync_every=3, logging_steps=4
    )
    trainer.train()
    lines = journal(tmp_path / "run")
    assert [x["step"] for x in lines] == [3, 6] and all(x["moved"] for x in lines)
    assert lines[-1]["error"] == trainer.rule.error.item()
    assert logs(trainer, "reference/error")[-1] == lines[-1]["error"]
    frozen = trainer_for(neox, tmp_path / "frozen", make_pairs(8), sync="frozen")
    frozen.train()
    assert not (tmp_path / "frozen" / JOURNAL).exists()


def test_what_is_said_of_an_adaptive_reference():
    both = "\n".join(opening_lines(Adaptive(0.03, 0.5, every=8, alpha=0.6), 0.1, 100))
    assert "0.6 of the policy blended in when the policy has drifted more than 0.03 nats a token from it or" in both
    assert "0.5 of its own weight change" in both and "8 optimiser steps after the last" in both
    assert "never move" in "\n".join(opening_lines(Adaptive(0.03, every=500), 0.1, 100))
    assert len(opening_lines(Adaptive(0.03), 0.1, 100)) == 1


def test_the_panel_on_a_terminal(neox, tmp_path):
    from rich.console import Console

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), sync="soft", sync_every=1, disable_tqdm=False)
    screen = io.StringIO()
    trainer.progress.console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    trainer.train()
    said = screen.getvalue()
    assert "╭─ DPO soft" in said and "does not bind" in said
    words = " ".join(said.replace("│", " ").split())
    for line in opening_lines(Soft(0.6), 0.1, 1):
        assert " ".join(line.split()) in words


def test_a_distance_is_zero_only_after_a_copy(neox, tmp_path):
    """The adaptive rule's other measure, on a run's own model."""
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4))
    nudge(trainer)
    assert distance(trainer.model) > 0
    copy_(trainer.model)
    assert distance(trainer.model) == 0
    batch = Batch(list(trainer.train_dataset))
    out, _ = trainer.scorer.score(
        trainer.models, trainer.scorer.plan(batch), [0, 1, 2, 3], trainer.scorer.baseline([trainer.scorer.plan(batch)])
    )
    assert out.metrics["reference/drift"][0].tolist() == [0.0] * 4
    assert results(trainer, {})["rule"]["updates"] == 0
