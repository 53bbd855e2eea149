"""`lorat eval`: every number against plain transformers, enumeration or the trainer; kills; what it refuses."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from lorat.cli.main import main
from lorat.errors import LoratError
from lorat.files import Pieces
from lorat.measure import evaluation, generation
from lorat.measure.estimators import estimate
from lorat.measure.evaluation import (
    AGAINST,
    Ratios,
    in_turn,
    kl_measures,
    kl_passes,
    packer,
    preference_measures,
    sample_measures,
)
from lorat.measure.generation import Completion, Request, Sampling, sample
from lorat.measure.lineup import load
from lorat.runs.folder import models_of
from tests.helpers.eval_runs import folders, make_run, outcomes, plain, token_logps
from tests.helpers.worlds import make_pairs, make_tokenizer, save_neox, trainer_for


@pytest.fixture(scope="module")
def run(neox, tmp_path_factory):
    return make_run(neox, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = make_pairs(12, seed=3)
    rows += [{**rows[0], "chosen": rows[1]["chosen"], "rejected": rows[2]["chosen"]}]  # a prompt met twice
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def lineup(run):
    return load(models_of(str(run)), cpu=True)


def ids(text):
    return make_tokenizer()(text).input_ids


def test_rewards_against_plain_transformers(run, neox, pairs, tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert main(["eval", str(run), "--data", str(pairs), "--samples", "0", "--cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    got = json.loads(out.read_text())["preferences"]
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert (got["pairs"], got["prompts"], got["beta"]) == (13, 12, 0.3)
    assert list(got["against"]) == ["/".join(pair) for pair in AGAINST]
    tokens = {}
    for name, folder in folders(run).items():
        model = plain(neox, folder)
        both = (
            [token_logps(model, ids(r["prompt"]), [*ids(r[side]), 1]) for side in ("chosen", "rejected")] for r in rows
        )
        tokens[name] = list(both)
        chosen = torch.stack([c.sum() for c, _ in tokens[name]])
        mine = got["models"][name]
        assert mine["logp_chosen"] == pytest.approx(list(estimate(chosen, [r["prompt"] for r in rows])), rel=1e-4)
        lengths = sum(len(c) for c, _ in tokens[name])
        assert mine["logp_chosen_per_token"] == pytest.approx(chosen.sum().item() / lengths, rel=1e-4)
        likelier = sum(bool(c.sum() > r.sum()) for c, r in tokens[name])
        assert mine["prefers_chosen"][0] == pytest.approx(likelier / 13)
    for a, b in AGAINST:
        deltas = [[(x - y).sum().item() for x, y in zip(p, q)] for p, q in zip(tokens[a], tokens[b])]
        margins = [c - r for c, r in deltas]
        m = got["against"][f"{a}/{b}"]
        assert m["margin"][0] == pytest.approx(sum(margins) / 13, abs=1e-4)
        assert m["reward_margin"][0] == pytest.approx(0.3 * m["margin"][0])
        assert m["accuracy"][0] == pytest.approx(sum(x > 0 for x in margins) / 13) and m["ties"] == 0
        assert m["logratio_chosen"][0] == pytest.approx(sum(c for c, _ in deltas) / 13, abs=1e-4)
        assert m["logratio_rejected"][0] == pytest.approx(sum(r for _, r in deltas) / 13, abs=1e-4)
        assert m["reward_chosen"][0] == pytest.approx(0.3 * m["logratio_chosen"][0])
        count = sum(len(t) for row in tokens[a] for t in row)
        assert m["drift_per_token"] == pytest.approx(sum(abs(d) for row in deltas for d in row) / count, abs=1e-5)
        brier = sum((1 - 1 / (1 + math.exp(-0.3 * x))) ** 2 for x in margins) / 13
        assert m["brier"] == pytest.approx(brier, abs=1e-5)
        assert abs(m["margin"][0]) > 1e-3  # all models differ
        assert sum(line["pairs"] for line in m["reliability"]) == 13
    for words in ("policy vs reference", "policy vs start", "start vs base", "13 pairs, 12 prompts", str(out)):
        assert words in said


def test_the_same_numbers_as_the_trainer_in_4bit(neox, tmp_path):
    run = make_run(neox, tmp_path, load_in_4bit=True)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in make_pairs(12, seed=3)))
    assert main(["eval", str(run), "--data", str(data), "--samples", "3", "--max-new-tokens", "4", "--cpu"]) == 0
    got = json.loads((run / "eval.json").read_text())
    assert got["load_in_4bit"] and got["compute"] == "float32"
    theirs = json.loads((run / "eval_results.json").read_text())
    for ours, at in (("policy/reference", "eval_"), ("policy/start", "eval_start/")):
        m = got["preferences"]["against"][ours]
        assert m["accuracy"][0] == pytest.approx(theirs[f"{at}rewards/accuracies"])
        assert m["reward_margin"][0] == pytest.approx(theirs[f"{at}rewards/margins"], abs=1e-5)
        assert m["reward_chosen"][0] == pytest.approx(theirs[f"{at}rewards/chosen"], abs=1e-5)
    assert got["preferences"]["against"]["policy/reference"]["log_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert got["preferences"]["models"]["policy"]["logp_chosen"][0] == pytest.approx(
        theirs["eval_logps/chosen"], rel=1e-5
    )
    assert len((run / "eval.samples.jsonl").read_text().splitlines()) == 6


def test_kl_against_the_enumerated_one(run, neox, lineup, tmp_path):
    """One prompt, completions of at most 3 tokens: all 20,000 of them, against 3,000 samples."""
    prompt, n, longest = ids("the dog ?"), 3000, 3
    p, q = (outcomes(plain(neox, f), prompt, 1, longest) for f in (run, run / "start"))
    assert sum(map(math.exp, p.values())) == pytest.approx(1)
    kl = sum(math.exp(a) * (a - q[y]) for y, a in p.items())
    spread = math.sqrt(sum(math.exp(a) * (a - q[y] - kl) ** 2 for y, a in p.items()))
    how = Sampling(max_new_tokens=longest, batch_size=500)
    pieces = Pieces(tmp_path / "part", {})
    requests = [Request(0, s, prompt) for s in range(n)]
    said = sample(lineup, "policy", requests, how, pieces)
    groups = [(prompt, [c.ids]) for c in said]
    sums = kl_passes(lineup, "policy", ["start", "base"], groups, packer(lineup, 8192, 0, 16), pieces)
    sampled, exact = (estimate(x) for x in sums["start"])
    assert kl > 0.05
    assert abs(sampled.mean - kl) < 4 * sampled.error
    assert abs(exact.mean - kl) < 4 * exact.error
    assert sampled.error == pytest.approx(spread / math.sqrt(n), rel=0.1)
    assert exact.error < 0.7 * sampled.error
    for y, ratio in list(zip(said, sums["start"][0].tolist()))[:50]:  # each sample's own log-ratio
        assert ratio == pytest.approx(p[tuple(y.ids)] - q[tuple(y.ids)], abs=1e-4)
    # what was sampled is the model's distribution: no outcome is off by more than chance allows
    counts: dict[tuple[int, ...], int] = {}
    for c in said:
        for k in range(1, len(c.ids) + 1):
            counts[tuple(c.ids[:k])] = counts.get(tuple(c.ids[:k]), 0) + 1
        assert c.ended == (c.ids[-1] == 1)
    firsts = [sum(math.exp(a) for y, a in p.items() if y[0] == v) for v in range(len(make_tokenizer()))]
    for v, chance in enumerate(firsts):
        assert abs(counts.get((v,), 0) - n * chance) < 4.5 * math.sqrt(n * chance) + 1
    ended = sum(math.exp(a) for y, a in p.items() if y[-1] == 1)
    assert abs(sum(c.ended for c in said) - n * ended) < 4 * math.sqrt(n * ended)


def test_a_killed_evaluation_goes_on_to_the_same_result(run, pairs, tmp_path, monkeypatch, capsys):
    def arguments(out):
        how = ["--samples", "10", "--batch-size", "3", "--max-new-tokens", "6", "--max-tokens-per-pack", "64", "--cpu"]
        return ["eval", str(run), "--data", str(pairs), *how, "--out", str(tmp_path / out)]

    assert main(arguments("whole.json")) == 0
    whole = (tmp_path / "whole.json").read_text()
    passes = []

    def counted(owner, name, limit):
        inner = getattr(owner, name)

        def function(*args, **kwargs):
            passes.append(name)
            if len(passes) > limit:
                raise KeyboardInterrupt
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, function)

    total, tries = 0, 0
    for _ in range(40):  # killed again after every few forward passes
        if (tmp_path / "killed.json").exists():
            break
        passes.clear()
        counted(evaluation, "pack_floats", 6)
        counted(generation, "complete", 6)
        status = main(arguments("killed.json"))
        monkeypatch.undo()
        total, tries = total + min(len(passes), 6), tries + 1
        if status:
            assert status == 130 and "same command again" in capsys.readouterr().err
            with (tmp_path / "killed.json.part").open("a") as f:
                f.write('{"logps/policy/9999": "AAA')  # torn in the middle of a line
    assert (tmp_path / "killed.json").read_text() == whole
    samples = [(tmp_path / f"{name}.samples.jsonl").read_text() for name in ("whole", "killed")]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == 20
    assert not (tmp_path / "killed.json.part").exists()
    passes.clear()
    counted(evaluation, "pack_floats", 10**9)
    counted(generation, "complete", 10**9)
    main([*arguments("killed.json"), "--overwrite"])
    assert tries > 3 and total < len(passes) + 4 * tries  # what was done was not done again


def test_unfinished_work_of_other_settings_is_not_mixed_in(run, pairs, tmp_path, monkeypatch, capsys):
    arguments = ["eval", str(run), "--data", str(pairs), "--cpu", "--samples", "4", "--max-new-tokens", "4"]
    arguments += ["--out", str(tmp_path / "eval.json")]

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(generation, "complete", killed)
        assert main(arguments) == 130
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed: 0 then, 1 now" in capsys.readouterr().err
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert main([*arguments, "--seed", "1"]) == 2
    assert "eval.json' exists" in capsys.readouterr().err


def test_measures_of_pairs_by_hand():
    """Two pairs of one prompt and a tie of another: log-ratios 3 and 1, 1 and 4, 2 and 2 over 2 and 1, 1 and 4, 2 and 1 tokens."""
    ratios = Ratios(
        torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 4.0, 2.0]), torch.tensor([[2, 1], [1, 4], [2, 1]])
    )
    m = preference_measures(ratios, ["a", "a", "b"], beta=0.5, bins=4)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert m["accuracy"][0] == pytest.approx(1 / 3) and m["ties"] == 1
    assert m["margin"][0] == pytest.approx((2 - 3 + 0) / 3) and m["reward_margin"][0] == pytest.approx(-0.5 / 3)
    assert m["margin"][1] == pytest.approx(math.sqrt(2 * 2 * (1 / 3) ** 2 / 9))  # clusters: −1/3 in all and 1/3
    assert m["drift_per_token"] == pytest.approx(13 / 11)
    assert m["log_loss"] == pytest.approx(-sum(math.log(sigmoid(x)) for x in (1, -1.5, 0)) / 3)
    per_token = preference_measures(ratios, ["a", "a", "b"], beta=0.5, length_normalize=True, bins=4)
    assert per_token["log_loss"] == pytest.approx(-sum(math.log(sigmoid(x)) for x in (0.25, 0, -0.5)) / 3)
    assert per_token["accuracy"] == m["accuracy"] and per_token["margin"] == m["margin"]  # of sums, as in training logs
    assert len(m["reliability"]) == 3


def test_measures_of_samples_by_hand():
    """Two that ended (1 is the end token, not counted) and one that was cut."""
    said = [Completion([5, 6, 1], True), Completion([5, 6, 5, 6], False), Completion([1], True)]
    m = sample_measures(said, ["a b", "a b a b", " "], [0, 1, 2])
    assert m["length"] == pytest.approx([2.0, 2 / math.sqrt(3)]) and m["length_median"] == 2
    assert m["ended"][0] == pytest.approx(2 / 3) and m["empty"] == 1
    assert (m["distinct_1"], m["distinct_2"]) == (2 / 6, 2 / 4)
    sums = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.4, 0.8, 0.3])
    kl = kl_measures(sums, torch.tensor([3, 4, 1]), [0, 1, 2])
    assert kl["kl"][0] == pytest.approx(0.5) and kl["kl_sampled"][0] == pytest.approx(0.5)
    assert kl["kl_per_token"] == pytest.approx(1.5 / 8)


def test_each_prompt_before_any_again():
    turns = list(in_turn("abcde", 12, seed=0))
    assert [s for _, s in turns] == [0] * 5 + [1] * 5 + [2] * 2
    assert sorted(p for p, _ in turns[:5]) == list(range(5)) and [p for p, _ in turns[5:10]] == [
        p for p, _ in turns[:5]
    ]
    assert list(in_turn("abcde", 5, seed=1)) != turns[:5] == list(in_turn("abcde", 5, seed=0))


def test_what_the_options_change(run, pairs, tmp_path):
    def numbers(*options):
        out = tmp_path / "x.json"
        assert main(["eval", str(run), "--data", str(pairs), "--cpu", "--out", str(out), "--overwrite", *options]) == 0
        return json.loads(out.read_text())

    one = numbers("--samples", "30", "--max-new-tokens", "3", "--sample-from", "reference", "base", "--bins", "2")
    assert list(one["generation"]["models"]) == ["reference", "base"]
    reference, base = one["generation"]["models"].values()
    assert list(reference["against"]) == ["start"] and "against" not in base
    said = [json.loads(line) for line in (tmp_path / "x.samples.jsonl").read_text().splitlines()]
    mine = [t for t in said if t["model"] == "base"]
    assert (one["generation"]["samples"], one["generation"]["prompts"], len(mine)) == (30, 12, 30)
    ended = torch.tensor([float(t["ended"]) for t in mine])
    assert base["ended"] == pytest.approx(list(estimate(ended, [t["prompt"] for t in mine])))  # errors over prompts
    assert one["generation"]["max_new_tokens"] == 3 and reference["length"][0] <= 3
    assert all(
        line["high"] - line["low"] == 0.25 for line in one["preferences"]["against"]["policy/start"]["reliability"]
    )
    assert any("cut at 3 tokens" in note for note in one["notes"])
    other = numbers("--samples", "0", "--beta", "0.6", "--max-length", "8", "--split", "train[:9]")
    assert "generation" not in other and other["preferences"]["pairs"] < 10 and other["data"]["max_length"] == 8
    m = other["preferences"]["against"]["policy/start"]
    assert m["reward_margin"][0] == pytest.approx(0.6 * m["margin"][0])
    bf16 = numbers("--samples", "0", "--dtype", "bfloat16")
    assert bf16["dtype"] == "bfloat16" and bf16["compute"] == "bfloat16"
    gap = (
        bf16["preferences"]["models"]["base"]["logp_chosen"][0] - one["preferences"]["models"]["base"]["logp_chosen"][0]
    )
    assert 0 < abs(gap) < 0.5


def test_where_a_runs_models_lie(run, neox, tmp_path):
    last = run / "checkpoint-4"
    assert models_of(str(run)).folders == {"policy": run, "reference": last / "ref", "start": run / "start"}
    assert models_of(str(last)).folders == {"policy": last, "reference": last / "ref", "start": run / "start"}
    early = models_of(str(run / "checkpoint-2"))
    assert early.folders["reference"] == run / "checkpoint-2" / "ref" and early.settings["beta"] == 0.3
    assert models_of(str(run), start=str(last)).folders["start"] == last
    # the reference is that of the checkpoint with this very policy, not of the newest one; or it is not known
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.copy(run / "checkpoint-2" / "adapter_model.safetensors", other)
    assert models_of(str(other)).folders["reference"] == other / "checkpoint-2" / "ref"
    shutil.rmtree(other / "checkpoint-2")
    found = models_of(str(other))
    assert "reference" not in found.folders and any("not saved" in note for note in found.notes)
    with pytest.raises(LoratError, match="has no reference.*--reference names one"):
        found.which("reference")
    # a frozen reference is the start, which is the base where the run began with a fresh adapter
    trainer = trainer_for(neox, tmp_path / "frozen", make_pairs(8), load_in_4bit=False)
    trainer.train()
    trainer.save_model()
    found = models_of(str(tmp_path / "frozen"))
    assert list(found.folders) == ["policy"] and found.same_as == {"base": "start", "reference": "start"}
    assert found.names == ["policy", "start"]


def test_any_peft_adapter(run, neox, pairs, tmp_path, capsys):
    """No run: an adapter alone, on a base that lies elsewhere now."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, adapter)
    shutil.copytree(neox, base)
    common = ["--data", str(pairs), "--samples", "0", "--no-4bit", "--cpu", "--base-model", str(base)]
    assert main(["eval", str(adapter), *common]) == 0
    assert "taken to be the base" in capsys.readouterr().out
    got = json.loads((adapter / "eval.json").read_text())
    assert list(got["preferences"]["against"]) == ["policy/start"] and got["preferences"]["beta"] == 0.1
    assert main(["eval", str(run), *common, "--out", str(tmp_path / "run.json")]) == 0
    ours = json.loads((tmp_path / "run.json").read_text())["preferences"]["against"]["policy/base"]
    assert got["preferences"]["against"]["policy/start"]["margin"] == pytest.approx(ours["margin"], abs=1e-5)


def test_what_cannot_be_evaluated(run, pairs, tmp_path, capsys):
    def refused(*arguments):
        assert main(["eval", *map(str, arguments), "--cpu"]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    assert "has no adapter_model.safetensors" in refused(tmp_path, "--data", pairs)
    (tmp_path / "unfinished" / "checkpoint-7").mkdir(parents=True)
    assert "checkpoint-7" in refused(tmp_path / "unfinished", "--data", pairs)
    assert "nowhere.jsonl" in refused(run, "--data", tmp_path / "nowhere.jsonl")
    assert "--samples must be at least 0" in refused(run, "--data", pairs, "--samples", "-1")
    other = save_neox(tmp_path / "other", hidden=128)
    assert "does not fit" in refused(run, "--data", pairs, "--base-model", other, "--out", tmp_path / "x.json")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the dog"}\n')
    assert "no layout that lorat reads" in refused(run, "--data", prompts, "--out", tmp_path / "x.json")
