"""The same batch through TRL's trainers and ours: loss, adapter gradients and metrics, frozen reference, float32."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from lorat.packs.packing import collate
from lorat.reference import adapter_parameters
from lorat.train.trainer import TrustRegionTrainer
from tests.helpers.worlds import make_pairs, run_config

N = 6


def drifted(folder: str):
    """A float32 base with a policy far from zero; deterministic, so that both trainers get the same one."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = "all-linear"
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    shift(model, 11, 0.05)
    return model


def shift(model, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model, "default").values():
        p.data += scale * torch.randn(p.shape, generator=generator)


def ours(folder, tmp_path, method, rows, drift=0.05, **settings):
    args = run_config(folder, tmp_path / "ours", method=method, load_in_4bit=False, **settings)
    from datasets import Dataset

    trainer = TrustRegionTrainer(
        drifted(folder), args, Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder)
    )
    shift(trainer.model, 12, drift)  # away from the reference, which was copied before
    samples, _ = trainer.get_batch_samples(iter([collate(rows)]), 1, torch.device("cpu"))
    loss = trainer.training_step(trainer.models, samples[0])
    return loss, {k: p.grad for k, p in adapter_parameters(trainer.model, "default").items()}, trainer


def compare(loss, grads, trl_loss, trl_model) -> None:
    torch.testing.assert_close(loss.double(), trl_loss.detach().double(), rtol=1e-5, atol=1e-6)
    theirs = {k: p.grad for k, p in adapter_parameters(trl_model, "default").items()}
    assert all(g is None for g in (p.grad for p in adapter_parameters(trl_model, "ref").values()))
    assert grads.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    assert largest > 1e-4  # the comparison is not one of zeros
    for name in theirs:
        torch.testing.assert_close(grads[name], theirs[name], rtol=1e-5, atol=1e-5 * largest.item(), msg=name)


@pytest.mark.parametrize("arch", ["neox", "llama"])
@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {"method": "dpo"}),
        ("ipo", {"method": "ipo"}),
        ("robust", {"method": "dpo", "robust": True, "label_smoothing": 0.1}),
        ("sigmoid_norm", {"method": "dpo", "length_normalize": True}),
        ("apo_zero", {"method": "apo_zero"}),
    ],
)
def test_pairs_have_the_gradient_that_trl_gives_them(request, arch, loss_type, settings, tmp_path):
    folder = request.getfixturevalue(arch)
    from datasets import Dataset

    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type=loss_type,
        beta=0.3,
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=64,
    )
    trl = DPOTrainer(
        drifted(folder),
        args=config,
        train_dataset=Dataset.from_list(make_pairs(N)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    shift(trl.model, 12, 0.05)
    rows = [dict(trl.train_dataset[i], row=i) for i in range(N)]
    rows = [{k: r[k] for k in ("row", "prompt_ids", "chosen_ids", "rejected_ids")} for r in rows]
    trl_loss = trl.compute_loss(trl.model, trl.data_collator(rows))
    trl_loss.backward()
    method = settings["method"]
    settings = {k: v for k, v in settings.items() if k != "method"} | {"beta": 0.3}
    loss, grads, trainer = ours(folder, tmp_path, method, rows, **settings)
    compare(loss, grads, trl_loss, trl.model)
    means = trainer.meters.averages.means()
    for name, values in trl._metrics["train"].items():
        if name in means:
            assert means[name] == pytest.approx(values[-1], rel=1e-5, abs=1e-5), name
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"} <= means.keys()


@pytest.mark.parametrize(("drift", "clamped"), [(0.05, True), (-0.05, False)])
def test_kto_has_the_gradient_that_trl_gives_it(neox, tmp_path, drift, clamped):
    from datasets import Dataset

    unpaired = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 3)}
        for i, p in enumerate(make_pairs(N))
    ]
    config = KTOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=64,
        per_device_train_batch_size=N,
    )
    trl = KTOTrainer(
        drifted(neox),
        args=config,
        train_dataset=Dataset.from_list(unpaired),
        processing_class=AutoTokenizer.from_pretrained(neox),
    )
    shift(trl.model, 12, drift)
    rows = [dict(trl.train_dataset[i]) for i in range(N)]
    for i, row in enumerate(rows):  # our rotation: the completion of the next example
        row["KL_completion_ids"] = rows[(i + 1) % N]["completion_ids"]
    trl_loss = trl.compute_loss(trl.model, trl.data_collator(rows))
    trl_loss.backward()
    keep = ("prompt_ids", "completion_ids", "label")
    mine = [{"row": i, **{k: r[k] for k in keep}} for i, r in enumerate(rows)]
    loss, grads, trainer = ours(
        neox, tmp_path, "kto", mine, drift, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7
    )
    compare(loss, grads, trl_loss, trl.model)
    means = trainer.meters.averages.means()
    theirs = trl._metrics["train"]
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert means[name] == pytest.approx(theirs[name][-1], rel=1e-5, abs=1e-5), name
    assert (means["kl"] == 0) == clamped  # both sides of z0 = max(0, …)
