"""The trainer: equivalences of the batch, the moving reference in a real run, metrics, and what stops a run."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorat.errors import NonFiniteError
from lorat.packs.packing import Batch, collate, pad_rows
from lorat.reference import adapter_parameters, snapshot
from tests.helpers.worlds import make_pairs, nudge, trainer_for


def logs(trainer, key="loss"):
    return [h[key] for h in trainer.state.log_history if key in h]


def gradients(trainer, batches):
    """Adapter gradients of one optimiser step over `batches` (lists of tokenised rows)."""
    samples, _ = trainer.get_batch_samples(iter([collate(b) for b in batches]), len(batches), torch.device("cpu"))
    trainer.model.zero_grad()
    for sample in samples:
        trainer.training_step(trainer.models, sample)
    trainer.meters.averages.reset()
    return {k: p.grad.clone() for k, p in adapter_parameters(trainer.model, "default").items()}


def close(left, right, tolerance=2e-6):
    scale = max(g.abs().max().item() for g in left.values())
    assert scale > 0
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_divided(neox, tmp_path, method, checkpointing):
    """One batch of 8 ≡ 8 of 1 ≡ 3 + 5 ≡ any token budget, on a 4-bit base; KTO's z0 spans the whole step."""
    trainer = trainer_for(
        neox, tmp_path / "run", make_pairs(8), method=method, activation_checkpointing=checkpointing, beta=0.3
    )
    nudge(trainer, scale=-0.05)
    rows = list(trainer.train_dataset)[:8]
    whole = gradients(trainer, [rows])
    if method == "kto":
        assert trainer.scorer.baseline([trainer.scorer.plan(Batch(r)) for r in ([rows[:3], rows[3:]])]).value > 0
    for division in ([[r] for r in rows], [rows[:3], rows[3:]]):
        close(whole, gradients(trainer, division))
    packer = trainer.scorer.packer
    assert packer.shared
    for budget in (1, 20, 64):
        for shared in (True, False):
            trainer.scorer.packer = dataclasses.replace(packer, budget=budget, shared=shared)
            assert len(trainer.scorer.plan(collate(rows)["batch"]).packs) > 1
            close(whole, gradients(trainer, [rows]))


def test_checkpointing_changes_no_gradient_and_lora_b_moves(neox, tmp_path):
    plain = trainer_for(neox, tmp_path / "a", make_pairs(4))
    recomputed = trainer_for(neox, tmp_path / "b", make_pairs(4), activation_checkpointing=True)
    enable = getattr(recomputed.model, "activation_checkpointing_enable", None)
    enable = enable or recomputed.model.gradient_checkpointing_enable
    enable()
    rows = list(plain.train_dataset)
    left, right = gradients(plain, [rows]), gradients(recomputed, [rows])
    close(left, right, 1e-6)
    assert all(g.abs().max() > 0 for name, g in right.items() if "lora_B" in name)


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_equal_adapters_give_a_log_ratio_of_exactly_zero(neox, tmp_path, method):
    """At step 0 and after each hard update: ln 2 for DPO, (1/2beta)^2 for IPO, 1/2 for KTO, to float precision."""
    expected = {"dpo": math.log(2), "ipo": (1 / (2 * 0.3)) ** 2, "kto": 0.5}[method]
    trainer = trainer_for(
        neox, tmp_path / "run", make_pairs(24), method=method, sync="hard", sync_every=3, beta=0.3, max_steps=6
    )
    trainer.train()
    losses = logs(trainer)
    for step, loss in enumerate(losses):
        if step % 3 == 0:
            assert loss == pytest.approx(expected, rel=2e-7), step
        else:
            assert abs(loss - expected) > 1e-4, step
    assert logs(trainer, "reference/updates") == [0, 0, 1, 1, 1, 2]
    assert logs(trainer, "reference/lag") == [1, 2, 0, 1, 2, 0]
    assert logs(trainer, "reference/distance")[2] == 0 < logs(trainer, "reference/distance")[1]
    assert all(d > 0 for d in logs(trainer, "start/distance"))


class Recorder:
    """A callback that keeps the policy after each step."""

    def __new__(cls):
        from transformers import TrainerCallback

        class _Recorder(TrainerCallback):
            def __init__(self):
                self.policies = []

            def on_optimizer_step(self, args, state, control, model=None, **kwargs):
                self.policies.append(snapshot(model, "default"))

        return _Recorder()


@pytest.mark.parametrize(("alpha", "every"), [(0.6, 1), (0.1, 2)])
def test_a_soft_reference_follows_the_closed_form_through_a_real_run(neox, tmp_path, alpha, every):
    seen = Recorder()
    trainer = trainer_for(
        neox, tmp_path / "run", make_pairs(48), sync="soft", sync_alpha=alpha, sync_every=every, callbacks=[seen],
        sync_space="factors",
    )  # fmt: skip
    start = snapshot(trainer.model, "default")
    trainer.train()
    assert len(seen.policies) == 12
    for name, reference in adapter_parameters(trainer.model, "ref").items():
        expected = start[name].double()
        for k, policy in enumerate(seen.policies, 1):
            if k % every == 0:
                expected = alpha * policy[name].double() + (1 - alpha) * expected
        torch.testing.assert_close(reference.detach().double(), expected, rtol=0, atol=1e-6)


def test_a_soft_reference_in_product_space_follows_the_dense_one(neox, tmp_path):
    """ΔW of the reference against float64, with room for the rank of all blends: 4 at the start and 4 by each."""
    seen = Recorder()
    trainer = trainer_for(
        neox, tmp_path / "run", make_pairs(24), sync="soft", sync_alpha=0.3, sync_every=2, callbacks=[seen],
        ref_rank=16, learning_rate=1e-2,
    )  # fmt: skip
    assert {p.shape[0] for n, p in adapter_parameters(trainer.model, "ref").items() if "lora_A" in n} == {16}
    before = snapshot(trainer.model, "default")
    change = lambda s, n: s[n.replace("lora_A", "lora_B")].double() @ s[n].double()  # noqa: E731
    names = [n for n in before if "lora_A" in n]
    expected = {n: change(before, n) for n in names}
    trainer.train()
    assert len(seen.policies) == 6
    for policy in seen.policies[1::2]:
        expected = {n: 0.3 * change(policy, n) + 0.7 * expected[n] for n in names}
    reference = snapshot(trainer.model, "ref")
    for name in names:
        gap = (change(reference, name) - expected[name]).norm() / expected[name].norm()
        assert gap < 1e-5, (name, gap)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (dict(sync="soft", sync_alpha=0.0, sync_every=1), dict(sync="frozen")),
        (dict(sync="soft", sync_alpha=1.0, sync_every=2), dict(sync="hard", sync_every=2)),
    ],
)
def test_rules_that_are_the_same_run_the_same(neox, tmp_path, left, right):
    a = trainer_for(neox, tmp_path / "a", make_pairs(24), **left)
    b = trainer_for(neox, tmp_path / "b", make_pairs(24), **right)
    a.train(), b.train()
    assert logs(a) == logs(b)
    for adapter in ("default", "ref"):
        theirs = adapter_parameters(b.model, adapter)
        for name, p in adapter_parameters(a.model, adapter).items():
            assert torch.equal(p, theirs[name])


def test_the_base_is_there_once_and_only_the_policy_is_trained(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), sync="hard", sync_every=1, max_steps=2)
    base = {n: p for n, p in trainer.model.named_parameters() if "lora_" not in n}
    storages = {p.untyped_storage().data_ptr() for p in base.values()}
    # by hand: embedding, head, final norm (2), and for each of 2 layers: 2 norms (4), 4 linear layers (8)
    assert len(storages) == len(base) == 2 + 2 + 2 * (4 + 8)
    quantised = [p for p in base.values() if p.dtype == torch.uint8]
    assert len(quantised) == 2 * 4
    weights = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128)  # qkv, dense, two of the MLP
    assert sum(p.untyped_storage().nbytes() for p in quantised) == weights // 2  # 4 bits each
    before = {n: p.detach().clone() for n, p in base.items()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert (p.requires_grad, p.grad is None) == (".default." in name, True), name
        if name in before:
            assert torch.equal(p, before[name]), name
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in adapter_parameters(trainer.model, "default").values()}


def test_metrics_are_means_over_examples_under_accumulation_and_a_ragged_end(neox, tmp_path):
    """7 pairs as 2 batches of 2 and then 2 + 1: each log is the mean over its examples, by plain transformers."""
    trainer = trainer_for(
        neox,
        tmp_path / "run",
        make_pairs(7),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-30,  # leaves the weights as they are
        load_in_4bit=False,
        eval_pairs=make_pairs(7, seed=1),
    )
    nudge(trainer)
    order = []
    gather = trainer.get_batch_samples

    def spy(*args):
        samples, count = gather(*args)
        order.append([r for s in samples for r in s["row"].tolist()])
        return samples, count

    trainer.get_batch_samples = spy
    trainer.train()
    assert [len(o) for o in order] == [4, 3]
    for n, rows in enumerate(order):
        expected = plain_metrics(trainer, [trainer.train_dataset[i] for i in rows])
        for name, value in expected.items():
            assert logs(trainer, name)[n] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    metrics = trainer.evaluate()
    for name, value in plain_metrics(trainer, list(trainer.eval_dataset)).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def plain_metrics(trainer, rows, beta=0.1):
    """TRL's metrics from the model's own logits, one row a completion, float64."""
    values = {}
    for adapter in ("default", "ref"):
        trainer.model.set_adapter(adapter)
        for row in rows:
            for kind in ("chosen", "rejected"):
                ids = torch.tensor([row["prompt_ids"] + row[f"{kind}_ids"]])
                with torch.no_grad():
                    logits = trainer.model(input_ids=ids).logits[0, :-1].double()
                lp = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum().item()
                values.setdefault((adapter, kind), []).append(lp)
    trainer.model.set_adapter("default")
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    reward = {
        kind: [beta * (p - r) for p, r in zip(values["default", kind], values["ref", kind])]
        for kind in ("chosen", "rejected")
    }
    margins = [c - r for c, r in zip(reward["chosen"], reward["rejected"])]
    return {
        "loss": mean([math.log1p(math.exp(-m)) for m in margins]),
        "rewards/chosen": mean(reward["chosen"]),
        "rewards/rejected": mean(reward["rejected"]),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([float(m > 0) for m in margins]),
        "logps/chosen": mean(values["default", "chosen"]),
        "logps/rejected": mean(values["default", "rejected"]),
    }


def test_kto_runs_at_batch_size_one(neox, tmp_path):
    unpaired = [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(make_pairs(8))
    ]
    together = trainer_for(neox, tmp_path / "a", unpaired, method="kto", per_device_train_batch_size=4)
    alone = trainer_for(
        neox, tmp_path / "b", unpaired, method="kto", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    together.train(), alone.train()
    assert logs(alone) == pytest.approx(logs(together), rel=1e-5)
    assert logs(alone, "kl") == pytest.approx(logs(together, "kl"), rel=1e-4, abs=1e-6)
    single = trainer_for(neox, tmp_path / "c", unpaired[:2], method="kto", per_device_train_batch_size=1)
    single.train()
    assert logs(single, "kl") == [0.0, 0.0]  # a step of one example has no mismatched completion


def test_a_non_finite_loss_stops_the_run_before_anything_is_poisoned(neox, tmp_path):
    trainer = trainer_for(
        neox, tmp_path / "run", make_pairs(16), sync="soft", sync_every=1, save_strategy="steps", save_steps=1
    )
    seen = []

    def poison(score):
        def wrapped(examples, lp, baseline):
            out = score(examples, lp, baseline)
            if trainer.state.global_step == 2:
                seen.append([e["row"] for e in examples])
                out = dataclasses.replace(out, losses=out.losses * torch.tensor([1.0, float("nan"), 1.0, 1.0]))
            return out

        return wrapped

    object.__setattr__(trainer.scorer.method, "score", poison(trainer.scorer.method.score))
    before = {}

    def keep(*args, **kwargs):
        before.update({a: snapshot(trainer.model, a) for a in ("default", "ref")})

    trainer.signals.on_step_end = keep
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert f"rows [{seen[0][1]}]" in str(error.value)
    assert "step 3" in str(error.value)
    assert f"policy_adapter: {tmp_path / 'run' / 'checkpoint-2'}" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for adapter, tensors in before.items():
        for name, p in adapter_parameters(trainer.model, adapter).items():
            assert torch.equal(p, tensors[name])
            assert p.isfinite().all()


def test_dropout_reaches_the_policy_and_not_the_reference(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), lora_dropout=0.5)
    nudge(trainer)
    trainer.model.train()

    row = trainer.train_dataset[0]
    pack = pad_rows([(row["prompt_ids"], [row["chosen_ids"]])], 0)
    with torch.no_grad():
        with trainer.models.reference():
            first, second = (trainer.models.tokens(pack) for _ in range(2))
        assert torch.equal(first, second)
        assert trainer.model.training
        assert not torch.equal(*(trainer.models.tokens(pack) for _ in range(2)))


def test_evaluating_leaves_the_gradients_as_they_were(neox, llama, tmp_path):
    """bitsandbytes repacks 4-bit weights at an eval forward on some CPUs; without gradients, and rounded to bf16."""
    for folder in (neox, llama):
        fresh, evaluated = (
            trainer_for(folder, tmp_path / name, make_pairs(4), eval_pairs=make_pairs(4, seed=1)) for name in "ab"
        )
        rows = list(fresh.train_dataset)
        expected = gradients(fresh, [rows])
        evaluated.evaluate()
        got = gradients(evaluated, [rows])
        assert max(g.abs().max() for g in expected.values()) > 0
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_result_is_a_plain_peft_adapter(neox, tmp_path):
    from peft import PeftModel

    trainer = trainer_for(neox, tmp_path / "run", make_pairs(8), load_in_4bit=False)
    trainer.train()
    trainer.save_model()
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= names
    assert "ref" not in names
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pkl", ".pt")]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and neox in card and "beta 0.1" in card
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(neox), str(tmp_path / "run"))
    ids = AutoTokenizer.from_pretrained(str(tmp_path / "run"))("the dog runs", return_tensors="pt")["input_ids"]
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.model(ids).logits, rtol=1e-5, atol=1e-5)
    trainer.args.save_reference = True
    trainer.save_model(str(tmp_path / "both"))
    assert (tmp_path / "both" / "ref" / "adapter_model.safetensors").is_file()


# ---- packs


def test_kto_in_one_pass_is_kto_in_two(neox, tmp_path):
    """Losses, metrics and gradients, with z0 > 0; one pass only where it saves, and never with dropout."""
    pairs = make_pairs(6)
    for p in pairs:
        p["prompt"] = p["prompt"] * 4
    trainer = trainer_for(neox, tmp_path / "run", pairs, method="kto", beta=0.3, max_length=128)
    nudge(trainer, scale=-0.05)
    rows = list(trainer.train_dataset)[:6]
    batch = Batch(rows)
    packer = trainer.scorer.packer
    trainer.model.train()
    one = trainer.scorer.baseline([trainer.scorer.plan(batch)])
    assert one.value is None and one.partners == [r["completion_ids"] for r in [*rows[1:], rows[0]]]
    assert one.tokens == sum(len(r["completion_ids"]) for r in rows)
    joined = sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    trainer.scorer.packer = dataclasses.replace(packer, budget=joined + one.tokens)
    assert trainer.scorer.baseline([trainer.scorer.plan(batch)]).value is None
    together = gradients(trainer, [rows])
    outcome, _ = trainer.scorer.score(trainer.models, trainer.scorer.plan(batch), list(range(6)), one)
    trainer.scorer.packer = dataclasses.replace(packer, budget=joined + one.tokens - 1)
    two = trainer.scorer.baseline([trainer.scorer.plan(batch)])
    assert two.value > 0 and two.tokens == sum(len(r["prompt_ids"]) for r in rows) + one.tokens
    close(together, gradients(trainer, [rows]))
    again, _ = trainer.scorer.score(trainer.models, trainer.scorer.plan(batch), list(range(6)), two)
    torch.testing.assert_close(outcome.losses, again.losses, rtol=1e-6, atol=1e-6)
    for name, (values, weights) in outcome.metrics.items():
        torch.testing.assert_close(values, again.metrics[name][0], rtol=1e-5, atol=1e-5)
        assert torch.equal(weights, again.metrics[name][1])
    trainer.scorer.packer = packer
    next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)).p = 0.1
    assert trainer.scorer.baseline([trainer.scorer.plan(batch)]).value is not None
    trainer.model.eval()
    assert trainer.scorer.baseline([trainer.scorer.plan(batch)]).value is None


def test_kto_with_short_prompts_takes_two_passes_in_training_and_one_in_evaluation(neox, tmp_path):
    trainer = trainer_for(neox, tmp_path / "run", make_pairs(4), method="kto")
    batch = Batch(list(trainer.train_dataset)[:4])
    trainer.model.train()
    assert trainer.scorer.baseline([trainer.scorer.plan(batch)]).value is not None
    trainer.model.eval()
    assert trainer.scorer.baseline([trainer.scorer.plan(batch)]).value is None


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_evaluation_is_the_same_in_packs_and_in_rows(neox, tmp_path, method):
    pairs = make_pairs(13)
    if method == "kto":
        pairs = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 3 > 0} for i, p in enumerate(pairs)]
    results = []
    for shared, budget in ((None, 8192), (None, 60), (False, 8192)):
        trainer = trainer_for(
            neox, tmp_path / f"{shared}{budget}", pairs, method=method, eval_pairs=pairs, prefix_sharing=shared,
            max_tokens_per_pack=budget,
        )  # fmt: skip
        nudge(trainer, scale=-0.05)
        results.append({k: v for k, v in trainer.evaluate().items() if not k.endswith(("time", "per_second"))})
    assert results[0].keys() == results[1].keys() == results[2].keys() and len(results[0]) > 6
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5, abs=1e-5)
