"""Sampling says what the model says, whoever else is in the batch; files are what their readers expect."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorat.cli.main import main
from lorat.data.prompts import Prompt, encode_prompts, read_prompts
from lorat.errors import ConfigError, DataError, LoratError
from lorat.files import Pieces, pack_floats, unpack_floats
from lorat.measure import generation
from lorat.measure.generation import Request, Sampling, end_ids, logits, pick, sample, uniforms, within_positions
from lorat.measure.lineup import load
from lorat.measure.samples import SampledAnswer, check_format, markdown, render
from lorat.model.models import Head
from lorat.runs.folder import models_of
from tests.helpers.eval_runs import make_run, plain
from tests.helpers.worlds import make_pairs, make_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}dog :{% endif %}"


@pytest.fixture(scope="module")
def run(neox, tmp_path_factory):
    return make_run(neox, tmp_path_factory.mktemp("generation"), load_in_4bit=True)


@pytest.fixture(scope="module")
def lineup(run):
    return load(models_of(str(run)), cpu=True)


@pytest.fixture(scope="module")
def requests():
    tokenizer = make_tokenizer()
    return [Request(i, 0, tokenizer(p["prompt"]).input_ids) for i, p in enumerate(make_pairs(20, seed=4))]


def say(lineup, requests, tmp_path, name="policy", **how):
    how = Sampling(**{"max_new_tokens": 12, **how})
    return sample(lineup, name, requests, how, Pieces(tmp_path / "part", {}, overwrite=True))


def fresh(tmp_path, n):
    (tmp_path / str(n)).mkdir()
    return tmp_path / str(n)


def test_the_batch_does_not_change_what_is_said(lineup, requests, tmp_path):
    """In float32: prompts of 1 to 9 tokens, alone, in threes, all in one padded batch, and in another order."""
    assert len({len(r.ids) for r in requests}) > 5
    alone, threes, together = (say(lineup, requests, fresh(tmp_path, b), batch_size=b) for b in (1, 3, 20))
    assert alone == threes == together
    assert say(lineup, requests[::-1], fresh(tmp_path, 0), batch_size=7) == alone[::-1]
    assert len({tuple(c.ids) for c in alone}) > 15 and {c.ended for c in alone} == {True, False}
    assert say(lineup, requests, fresh(tmp_path, 99), seed=1) != alone


def test_greedy_is_plain_transformers_greedy(run, neox, requests, tmp_path):
    lineup = load(models_of(str(run)), cpu=True, in_4bit=False)
    for name, folder in (("policy", run), ("start", run / "start"), ("base", None)):
        model = plain(neox, folder)
        for got, r in zip(say(lineup, requests[:6], fresh(tmp_path, name), name, greedy=True), requests):
            row = list(r.ids)
            while len(row) < len(r.ids) + 12 and row[len(r.ids) :][-1:] != [1]:
                row.append(model(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
            assert got.ids == row[len(r.ids) :]


def test_learned_positions_and_left_padding(requests, tmp_path):
    """GPT-2 looks positions up: a padded prompt must start at 0 all the same. An adapter that PEFT alone wrote."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    lineup = load(models_of(str(tmp_path / "adapter")), cpu=True, in_4bit=False)
    together = say(lineup, requests[:8], fresh(tmp_path, 8), greedy=True, batch_size=8)
    model = plain(tmp_path / "base", tmp_path / "adapter")
    for got, r in zip(together, requests):
        row = list(r.ids)
        while len(row) < len(r.ids) + 12 and row[len(r.ids) :][-1:] != [1]:
            row.append(model(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
        assert got.ids == row[len(r.ids) :]


def test_models_differ_and_their_streams_do_not(lineup, requests, tmp_path):
    by_model = [say(lineup, requests, fresh(tmp_path, n), n) for n in ("policy", "reference", "start", "base")]
    assert all(a != b for i, a in enumerate(by_model) for b in by_model[:i])
    u = uniforms(0, 3, 1, 6)
    assert torch.equal(uniforms(0, 3, 1, 4), u[:4]) and u.dtype == torch.float64
    assert not any(torch.equal(u, uniforms(*other, 6)) for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2), (0, 31, 1)))
    many = torch.cat([uniforms(0, i, 0, 5) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 0.012 and abs(many.var() - 1 / 12) < 0.004


def test_a_pick_inverts_the_distribution_function():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    z = p.log().repeat(6, 1)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 1e-12], dtype=torch.float64)
    assert pick(z, u, Sampling()).tolist() == [0, 0, 2, 2, 3, 3]
    assert pick(z, u, Sampling(greedy=True)).tolist() == [2] * 6
    # top-p 0.8 keeps 0.6 and 0.3: two thirds and one third
    assert pick(z, u, Sampling(top_p=0.8)).tolist() == [2, 2, 2, 3, 3, 3]
    assert pick(z, u, Sampling(top_p=0.05)).tolist() == [2] * 6  # never none
    # temperature 1/2 squares: 0.01, 0, 0.36, 0.09 of 0.46
    cold = Sampling(temperature=0.5)
    assert pick(z[:4], torch.tensor([0.021, 0.0225, 0.80, 0.81], dtype=torch.float64), cold).tolist() == [0, 2, 2, 3]
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = pick(p.log().expand(100_000, 4), grid, Sampling()).bincount(minlength=4)
    assert counts.tolist() == [10_000, 0, 60_000, 30_000]


def test_logits_with_softcap_scale_and_bias():
    draw = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(s, generator=draw, dtype=torch.bfloat16) for s in ((3, 8), (9000, 8), (9000,)))
    exact = h.double() @ w.double().T + b.double()
    got = logits(Head(w, b, 5.0, 2.0), h)
    torch.testing.assert_close(got.double(), 5 * torch.tanh(exact / 5) / 2, rtol=0, atol=1e-5)
    assert got.dtype == torch.float32


def test_which_tokens_end_a_text(lineup, monkeypatch):
    config = lineup.model.get_base_model().generation_config
    for listed, ends in ((None, [1]), (7, [1]), ([7, 8], [1]), ([7, 1], [1, 7])):
        monkeypatch.setattr(config, "eos_token_id", listed)
        assert end_ids(lineup) == ends


def test_prompts_and_samples_fit_the_models_positions(lineup):
    short, long = [5, 6], list(range(3, 23)) * 7  # 140 tokens; the model has 128 positions
    ids, how, notes = within_positions(lineup, [short, long], Sampling(max_new_tokens=100))
    assert how.max_new_tokens == 64 and ids == [short, long[-64:]] and len(notes) == 2
    assert within_positions(lineup, [short], Sampling(max_new_tokens=8))[1:] == (Sampling(max_new_tokens=8), [])


def test_pieces_survive_and_are_exact(tmp_path):
    x = torch.randn(100) * 1e-20
    pieces = Pieces(tmp_path / "p", {"a": 1})
    pieces["x"] = pack_floats(x)
    pieces["none"] = pack_floats(x[:0])
    with (tmp_path / "p").open("a") as f:
        f.write('{"y": "tor')
    again = Pieces(tmp_path / "p", {"a": 1})
    assert torch.equal(unpack_floats(again["x"]), x) and len(unpack_floats(again["none"])) == 0 and "y" not in again
    again["y"] = 2
    assert Pieces(tmp_path / "p", {"a": 1})["y"] == 2
    with pytest.raises(LoratError, match="a: 1 then, 2 now"):
        Pieces(tmp_path / "p", {"a": 2})
    assert "x" not in Pieces(tmp_path / "p", {"a": 2}, overwrite=True)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the dog\na small cat sleeps\n\nin the park ?\n")
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_generate_goes_on_to_the_same_file(run, prompts, tmp_path, monkeypatch, capsys):
    def arguments(out):
        how = ["--samples", "3", "--max-new-tokens", "9", "--batch-size", "2", "--cpu"]
        return ["generate", str(run), "--prompts", str(prompts), "--out", str(tmp_path / out), *how]

    assert main(arguments("whole.jsonl")) == 0
    assert "9 answers of the policy to 3 prompts" in capsys.readouterr().out
    inner, calls = generation.complete, []

    def twice(*args):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(generation, "complete", twice)
    assert [main(arguments("killed.jsonl")) for _ in range(3)] == [130, 130, 0]
    assert len(calls) == 5 + 2  # 5 batches, and the two that were interrupted
    assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not list(tmp_path.glob("*.part"))
    got = rows(tmp_path / "whole.jsonl")
    assert [(r["index"], r["sample"]) for r in got] == [(i, s) for i in range(3) for s in range(3)]
    assert got[0]["prompt"] == "the dog" and got[0]["generator"] == "run" and len({r["output"] for r in got}) > 5
    assert all(len(r["output"].split()) <= r["tokens"] <= 9 and r["ended"] == (r["tokens"] < 9) for r in got)


def test_every_adapter_answers(run, prompts, tmp_path):
    said = {}
    for name in ("policy", "reference", "start", "base"):
        out = tmp_path / f"{name}.jsonl"
        how = ["--adapter", name, "--max-new-tokens", "8", "--cpu"]
        assert main(["generate", str(run), "--prompts", str(prompts), "--out", str(out), *how]) == 0
        said[name] = [r["output"] for r in rows(out)]
        assert rows(out)[0]["generator"] == ("run" if name == "policy" else f"run-{name}")
    assert len({tuple(s) for s in said.values()}) == 4


def test_formats_of_others(run, tmp_path):
    questions = tmp_path / "question.jsonl"
    questions.write_text('{"uid": "q1", "category": "x", "prompt": "the dog"}\n{"uid": "q2", "prompt": "a cat ?"}\n')
    old = tmp_path / "old.jsonl"
    old.write_text('{"question_id": "q7", "turns": [{"content": "the dog"}]}\n')
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": "the dog", "output": "x", "generator": "y", "dataset": "helpful"}]))

    def written(form, prompts, *more):
        out = tmp_path / f"out.{form}.json"
        how = ["--format", form, "--name", "mine", "--max-new-tokens", "6", "--cpu", "--greedy", *more]
        assert main(["generate", str(run), "--prompts", str(prompts), "--out", str(out), *how]) == 0
        return out

    rows_ = json.loads(written("alpaca-eval", alpaca).read_text())
    text = rows_[0]["output"]
    assert rows_ == [{"instruction": "the dog", "output": text, "generator": "mine", "dataset": "helpful"}]
    first, second = rows(written("arena-hard", questions))
    assert first["uid"] == "q1" and first["model"] == "mine" and first["ans_id"] != second["ans_id"]
    assert first["messages"] == [
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": {"answer": text}},
    ]
    assert first["tstamp"] > 1.7e9 and first["metadata"].keys() == {
        "token_len",
        "header_count",
        "list_count",
        "bold_count",
    }
    (one,) = rows(written("arena-hard-0.1", old))
    assert (one["question_id"], one["model_id"]) == ("q7", "mine")
    assert one["choices"] == [{"index": 0, "turns": [{"content": text}]}] and one.keys() >= {"answer_id", "tstamp"}


def test_markdown_counts():
    text = "# A\n## B\n## C\n- x\n* y\n1. z\n**bold** and __bold__\n```\n# no\n- no\n```"
    counts = markdown(text)
    assert counts["header_count"] == {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 2} and counts["bold_count"] == {"**": 1, "__": 1}


def test_formats_refuse_what_they_cannot_hold():
    named, nameless = Prompt("a", id="1"), Prompt("a")
    for form, prompts, n, words in (
        ("alpaca-eval", [nameless], 2, "one answer a prompt"),
        ("arena-hard", [nameless], 1, "uid"),
        ("arena-hard-0.1", [named, nameless], 1, "question_id"),
        ("arena-hard", [named, named], 1, "share one"),
    ):
        with pytest.raises(LoratError, match=words):
            check_format(form, prompts, n)
    check_format("arena-hard-0.1", [named], 3)
    line = render("arena-hard-0.1", [SampledAnswer(0, named, s, f"t{s}", 1, True) for s in range(3)], "m", 0.0)
    assert [c["turns"][0]["content"] for c in json.loads(line)["choices"]] == ["t0", "t1", "t2"]


def read(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_prompts(str(path))


def test_prompts_of_every_kind(tmp_path):
    user = lambda t: {"role": "user", "content": t}  # noqa: E731
    answer = {"role": "assistant", "content": "a cat"}
    assert read(tmp_path, {"prompt": "the dog"}) == [Prompt("the dog", dataset="p")]
    assert read(tmp_path, {"prompt": [user("the dog")]})[0].content == [user("the dog")]
    assert read(tmp_path, {"messages": [user("x"), answer]})[0].content == [user("x")]
    assert read(tmp_path, {"instruction": "x", "dataset": "d"})[0] == Prompt("x", True, None, "d")
    assert read(tmp_path, {"question_id": 5, "turns": [{"content": "x"}]})[0] == Prompt("x", True, "5", "p")
    pair = {"prompt": "the dog", "chosen": " runs", "rejected": " sings"}
    assert [p.content for p in read(tmp_path, pair)] == ["the dog"]
    dialogue = {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}
    assert read(tmp_path, dialogue)[0].content == "\n\nHuman: hi\n\nAssistant:"
    for row, words in (
        ({"prompt": " "}, "row 0: its prompt is empty"),
        ({"question_id": 1, "turns": ["a", "b"]}, "2 turns"),
        ({"messages": [answer]}, "an answer alone"),
        ({"text": "x"}, "none of which holds prompts"),
    ):
        with pytest.raises(DataError, match=words):
            read(tmp_path, row)


def test_chat_templates(tokenizer):
    tokenizer = make_tokenizer()
    said = [Prompt([{"role": "user", "content": "a cat"}]), Prompt("a cat", turn=True), Prompt("a cat")]
    plain_ids = tokenizer("a cat").input_ids
    assert encode_prompts(said[1:], tokenizer) == [plain_ids, plain_ids]
    with pytest.raises(LoratError, match="no chat template"):
        encode_prompts(said[:1], tokenizer)
    tokenizer.chat_template = TEMPLATE
    chat = tokenizer("user : a cat dog :").input_ids
    assert encode_prompts(said, tokenizer) == [chat, chat, plain_ids]
    assert encode_prompts(said, tokenizer, "always") == [chat] * 3
    assert encode_prompts(said[1:], tokenizer, "never") == [plain_ids] * 2
    around = encode_prompts(said[1:], tokenizer, template="the {prompt} ?")
    assert around == [tokenizer("the a cat ?").input_ids] * 2
    for how, words in ((dict(chat="never"), "list of messages"), (dict(template="x"), "must hold")):
        with pytest.raises(LoratError, match=words):
            encode_prompts(said, tokenizer, **how)


def test_settings_that_mean_nothing_are_refused_together(run, prompts, tmp_path, capsys):
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=0, top_p=0, max_new_tokens=0, batch_size=0)
    assert all(
        w in str(error.value) for w in ("temperature=0", "--greedy", "top_p=0", "max_new_tokens=0", "batch_size")
    )
    with pytest.raises(ConfigError):
        Sampling(temperature=math.nan)
    common = ["generate", str(run), "--prompts", str(prompts), "--cpu"]
    assert main([*common, "--out", str(prompts)]) == 2
    assert "exists" in capsys.readouterr().err and prompts.read_text().startswith("the dog")
    assert main([*common, "--out", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "x"), "--greedy", "--samples", "2"]) == 2
    assert main([*common, "--out", str(tmp_path / "x"), "--format", "arena-hard"]) == 2
    assert "uid" in capsys.readouterr().err and not (tmp_path / "x").exists()
