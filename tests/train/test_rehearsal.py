"""The heaviest packs are tried before the first step, and leave no trace."""

from __future__ import annotations

import pytest
import torch

from lorat.reference import adapter_parameters, snapshot
from lorat.train.rehearsal import RehearsalCallback, _missing_state, fullest, rehearse
from tests.helpers.worlds import make_pairs, trainer_for


def run_rehearsal(trainer):
    size = trainer.args.per_device_train_batch_size
    return rehearse(trainer.scorer, trainer.train_dataset, size, trainer.optimizer)


def pairs_with_a_long_one():
    pairs = make_pairs(12)
    pairs[7]["prompt"] = pairs[7]["prompt"] * 4
    pairs[3]["chosen"] = pairs[3]["chosen"] * 4
    return pairs


def test_the_longest_come_first_and_the_pack_is_full(neox, tmp_path):
    trainer = trainer_for(
        neox, tmp_path / "run", pairs_with_a_long_one(), per_device_train_batch_size=8, max_length=200
    )
    rows = list(trainer.train_dataset)
    need = lambda r: len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"])  # noqa: E731
    by_need = sorted(rows, key=need, reverse=True)
    chosen = fullest(trainer.scorer, trainer.train_dataset, trainer.args.per_device_train_batch_size)
    assert [need(r) for r in chosen] == [need(r) for r in by_need[:8]]
    completions = fullest(
        trainer.scorer, trainer.train_dataset, trainer.args.per_device_train_batch_size, prompts=False
    )
    longest = max(rows, key=lambda r: len(r["chosen_ids"]) + len(r["rejected_ids"]))
    assert completions[0]["row"] == longest["row"]
    budget = need(by_need[0]) + need(by_need[-1])  # room for the longest and a short one
    tight = trainer_for(
        neox, tmp_path / "tight", pairs_with_a_long_one(), per_device_train_batch_size=8, max_length=200,
        max_tokens_per_pack=budget,
    )  # fmt: skip
    tokens = run_rehearsal(tight)
    assert len(tokens) == 2 and need(by_need[0]) < max(tokens) <= budget


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_nothing_is_left_of_it(neox, tmp_path, monkeypatch, method):
    """Parameters, gradients and random numbers: a run with it is the run without it, dropout and all."""

    def run(name, rehearsed):
        trainer = trainer_for(
            neox, tmp_path / name, make_pairs(8), method=method, lora_dropout=0.2, sync="hard", sync_every=1
        )
        if rehearsed:
            monkeypatch.setattr(
                RehearsalCallback,
                "on_train_begin",
                lambda self, args, state, control, optimizer=None, **k: seen.append(
                    rehearse(self.scorer, self.dataset, self.batch_size, optimizer)
                ),
            )
        trainer.train()
        return trainer

    seen = []
    plain, rehearsed = run("plain", False), run("rehearsed", True)
    assert len(seen) == 1 and min(seen[0]) > 0
    for adapter in ("default", "ref"):
        left, right = snapshot(plain.model, adapter), snapshot(rehearsed.model, adapter)
        assert all(torch.equal(left[n], right[n]) for n in left)


def test_gradients_are_made_and_taken_away(neox, tmp_path, monkeypatch):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4))
    made = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: made.append(p.grad.norm()))
        for p in adapter_parameters(trainer.model, "default").values()
    ]
    run_rehearsal(trainer)
    assert len(made) == 2 * len(handles)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_room_for_the_optimiser_is_held(neox, tmp_path, monkeypatch):
    """Two tensors a parameter for Adam before its first step, none after it; one with momentum; none for bitsandbytes'."""
    made = []
    empty_like = torch.empty_like
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), max_steps=1)
    policy = list(adapter_parameters(trainer.model, "default").values())
    trainer.create_optimizer()
    mine = {id(p) for p in policy}
    spy = lambda p, *a, **k: (made.append(id(p)) if id(p) in mine else None) or empty_like(p, *a, **k)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", spy)
        run_rehearsal(trainer)
    assert len(made) == 2 * 2 * len(policy)  # two rehearsals
    trainer.train()
    assert _missing_state(trainer.optimizer, policy) == 0
    assert _missing_state(torch.optim.SGD(policy, momentum=0.9), policy) == 1
    assert _missing_state(torch.optim.SGD(policy), policy) == 0
    import bitsandbytes as bnb

    assert _missing_state(bnb.optim.AdamW8bit(policy), policy) == 0


def test_only_a_gpu_is_rehearsed_on(neox, tmp_path, monkeypatch):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4))
    monkeypatch.setattr("lorat.train.rehearsal.rehearse", lambda *a: pytest.fail("this is a CPU"))
    RehearsalCallback(trainer.scorer, trainer.train_dataset, 4).on_train_begin(
        trainer.args, trainer.state, trainer.control
    )


# ---- embeddings in few bits


@pytest.mark.parametrize(("kind", "error"), [("8bit", 0.01), ("4bit", 0.12)])
def test_embeddings_in_few_bits(neox, tmp_path, kind, error):
    """The rows come back to the rounding of their type; the run trains, and names its setting."""
    from lorat.model.base import load_base
    from lorat.model.folding import dequantised

    plain = trainer_for(neox, tmp_path / "plain", make_pairs(4))
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), quantize_embeddings=kind)
    table, exact = (t.model.get_base_model().get_input_embeddings() for t in (trainer, plain))
    assert table.weight.element_size() * table.weight.numel() <= exact.weight.numel() * (1 if kind == "8bit" else 0.5)
    rows = torch.arange(exact.num_embeddings)
    with torch.no_grad():
        gap = (table(rows) - exact(rows)).norm() / exact(rows).norm()
    assert 0 < gap < error
    before = snapshot(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in adapter_parameters(trainer.model, "default").items())
    model = load_base(trainer.args.base())
    looked_up = model.get_input_embeddings()(rows)
    plain = dequantised(model.get_input_embeddings())
    assert torch.equal(plain(rows), looked_up)
    assert type(plain) is torch.nn.Embedding


def test_a_run_is_loaded_again_with_its_embeddings_as_they_were(neox, tmp_path):
    """By `lorat eval` and `generate`, and by `lorat merge`, whose model is what was trained."""
    from lorat.measure.lineup import load
    from lorat.runs.folder import models_of
    from lorat.runs.merge import merge

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), quantize_embeddings="8bit")
    trainer.train()
    trainer.save_model()
    ids = torch.arange(9)
    trained = trainer.model.get_base_model().get_input_embeddings()(ids)
    lineup = load(models_of(str(tmp_path / "run")), cpu=True)
    assert torch.equal(lineup.model.get_base_model().get_input_embeddings()(ids), trained)
    assert merge(str(tmp_path / "run"), str(tmp_path / "merged")).folded.largest < 1e-4


def test_embeddings_that_are_the_head_stay(tmp_path):
    from lorat.errors import ModelError
    from tests.helpers.architectures import SHARED, make
    from tests.helpers.worlds import make_tokenizer

    tokenizer = make_tokenizer()
    make("Qwen2", SHARED["Qwen2"], vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="one matrix"):
        trainer_for(str(tmp_path / "m"), tmp_path / "run", make_pairs(4), quantize_embeddings="8bit")


# ---- the pack that fits


def test_gpu_memory_sets_the_pack_or_says_what_would_help(neox, tmp_path):
    """As the plan finds it for this data; never below the longest example, and refused before a model is loaded."""
    from lorat.data.prepare import pack_sizes
    from lorat.errors import ConfigError
    from lorat.model.base import read_model_config
    from lorat.plan.advice import fit
    from lorat.plan.card import bytes_of

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(12), gpu_memory="2GiB")
    longest = int(pack_sizes(trainer.train_dataset, True).max())
    row = max(trainer.train_dataset, key=lambda r: len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]))
    assert longest == len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    workload = trainer.args.workload()
    plan = fit(workload, read_model_config(workload.base), bytes_of("2GiB"), longest)
    assert plan.fits and trainer.args.max_tokens_per_pack == plan.tokens >= longest
    assert trainer.scorer.packer.budget == plan.tokens
    with pytest.raises(ConfigError, match=r"gpu_memory=501MiB: packs of \d+ tokens, the least this data needs"):
        trainer_for(neox, tmp_path / "small", make_pairs(12), gpu_memory="501MiB")


def test_ranks_plan_for_the_least_memory_among_them(neox, tmp_path, monkeypatch):
    """Each asks its own card: all get the same packs, and where one has too little, all say so."""
    from lorat.errors import ConfigError
    from lorat.model.base import read_model_config
    from lorat.plan.card import bytes_of
    from lorat.plan.memory import Planner
    from lorat.train import trainer as module
    from tests.helpers.worlds import run_config

    workload = run_config(neox, tmp_path).workload()
    planner = Planner(workload, read_model_config(workload.base))
    middle = f"{(planner.at(64).total + planner.at(100).total) / 2**21:.3f}MiB"

    def packs(own, other):
        monkeypatch.setattr(module, "gather_object", lambda values: [*values, bytes_of(other)])
        return trainer_for(neox, tmp_path / "run", make_pairs(12), gpu_memory=own).args.max_tokens_per_pack

    assert packs("2GiB", middle) == packs(middle, "2GiB") < packs("2GiB", "2GiB")
    with pytest.raises(ConfigError, match="the least this data needs"):
        packs("2GiB", "500MiB")
