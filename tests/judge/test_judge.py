"""The judge: what is asked and read, the cache, retries, cost; against a scripted server and a real one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from lorat.cli.judge import _names
from lorat.cli.main import main
from lorat.errors import ConfigError, DataError
from lorat.judge.answers import Answer, join, read_answers
from lorat.judge.prompts import FOLDER, fill, load_prompt, parse_verdict, tasks
from lorat.judge.verdicts import thin
from tests.helpers.judge_server import completion, failure, save_judge, serving


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is shorter, B is right.\nVerdict: B", "B"),
        ("Verdict: A\nVerdict: B", "B"),  # the last word counts
        ("**Verdict:** **A**", "A"),
        ("Comparison: both are good.\nPreferred: \"A\"", "A"),
        ("More helpful: Response B.", "B"),
        ("### Final verdict: [[A]]", "A"),
        ("My final verdict is tie: [[C]]", "tie"),
        ("Verdict:\nB", "B"),
        ("verdict: Tie", "tie"),
        ("Verdict: A, since it is right", "A"),
        ("Verdict: B (clearly)", "B"),
        ("Some words.\n\nb", "B"),
        ("Summary A", "A"),
        ("<think>Verdict: A, or is it?</think>\nVerdict: B", "B"),
        ("thinking Verdict: A</think>Verdict: tie", "tie"),
        ("<think>Verdict: A", None),  # cut off in thought
        ("", None),
        ("I like A more than B.", None),
        ("Verdict: A or B", None),
        ("Verdict: A/B", None),
        ("Verdict: A, B", None),
        ("Verdict: A better summary would name the dog", None),  # the article
        ("Verdict: neither", None),
        ("Verdict: A\nVerdict: hard to say", None),
        ("[[A]] [[B]]", None),
        ("Both are bad", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_and_never_guessed(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize("task", ["dialogue", "summarisation"])
def test_the_prompts_that_come_along(task):
    template = load_prompt(task)
    asked = fill(template, "POST {a}", "ONE {b}", "TWO {prompt}")
    assert asked.index("POST {a}") < asked.index("ONE {b}") < asked.index("TWO {prompt}")  # slots in answers stay
    assert all(parse_verdict(line) for line in template.strip().splitlines()[-3:])  # what it asks for can be read
    assert (FOLDER / f"{task}.txt").is_file() and task in tasks()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_of_answers_in_every_accepted_form(tmp_path):
    rows = [
        {"prompt": "p ", "output": " x"},
        {"instruction": "q", "completion": "y"},
        {"prompt": "r", "response": "z\u2028"},
    ]
    expected = [Answer("p", "x"), Answer("q", "y"), Answer("r", "z")]
    assert read_answers(write(tmp_path / "a.jsonl", rows)) == expected
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    assert read_answers(tmp_path / "raw.jsonl") == expected
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    assert read_answers(tmp_path / "a.json") == expected
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    row = {"prompt": chat, "completion": [{"role": "assistant", "content": "gone"}]}
    (answer,) = read_answers(write(tmp_path / "chat.jsonl", [row]))
    assert answer == Answer("user: hi\n\nassistant: yes?\n\nuser: go", "gone")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no rows"]),
        ('{"prompt": "a", "output": "b"}\n{"prompt": "c", "ou', ["line 2", "JSON"]),
        ('{"question": "a", "output": "b"}', ["line 1", "question", "prompt or instruction"]),
        ('{"prompt": "a", "text": "b"}', ["output or completion or response", "text"]),
        ('["a"]', ["row 1", "str"]),
        ('[{"prompt": "a"', ["no JSON list"]),
        ('{"prompt": "a", "output": 3}', ["line 1, output", "3"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        read_answers(tmp_path / "bad.jsonl")
    for word in [*words, "bad.jsonl"]:
        assert word in str(error.value)


def test_a_file_of_several_models_is_never_taken_for_one(tmp_path):
    rows = [{"model": m, "prompt": "p", "output": f"by {m}"} for m in ("policy", "start")]
    path = write(tmp_path / "eval.samples.jsonl", rows)
    assert read_answers(f"{path}:start") == [Answer("p", "by start")]
    for given in (path, f"{path}:base"):
        with pytest.raises(DataError, match=r"eval\.samples\.jsonl:policy, .*eval\.samples\.jsonl:start"):
            read_answers(given)
    assert _names(f"{path}:policy", f"{path}:start") == ("policy", "start")
    (tmp_path / "a:b.jsonl").write_text('{"instruction": "p", "output": "x", "generator": "g"}')
    assert read_answers(tmp_path / "a:b.jsonl") == [Answer("p", "x")]  # a file's own name comes first


def test_joining_by_prompt_and_sample():
    a = [Answer("q", "1"), Answer("p", "2"), Answer("q", "3")]
    b = [Answer("p", "x"), Answer("q", "y"), Answer("q", "z")]
    found = [(pair.number, pair.prompt, pair.a, pair.b) for pair in join(a, b, ("a", "b"))]
    assert found == [(0, "q", "1", "y"), (0, "q", "3", "z"), (1, "p", "2", "x")]
    with pytest.raises(DataError) as error:
        join([*a, Answer("only here", "")], [*b, Answer("there", ""), Answer("p", "again")], ("one", "two"))
    said = str(error.value)
    assert "1 of 3 prompts of one are not in two" in said and "'only here'" in said and "'there'" in said
    assert "'p': 1 in one, 2 in two" in said


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of twelve answers; the good one's say so. `files(url, ...)` runs the command with a cache in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    good = write(tmp_path / "good.jsonl", [{"prompt": f"p{i}", "output": f"good answer {i}"} for i in range(12)])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": f"p{i}", "output": f"bad {i}"} for i in range(12)])

    def run(url, *more):
        return main(["judge", good, bad, "--model", "m", "--base-url", url, "--out", "out.json", *more])

    run.arguments = [good, bad, "--model", "m"]
    return run


def shown(body):
    """`(number of the prompt, answer A, answer B)` of a request with the dialogue prompt."""
    text = body["messages"][0]["content"]
    inside = [
        re.search(rf"<{t}>\n(.*?)\n</{t}>", text, re.DOTALL)[1] for t in ("conversation", "response_a", "response_b")
    ]
    return int(inside[0][1:]), inside[1], inside[2]


def prefers_good(number, body, headers):
    return completion("Verdict: " + ("A" if shown(body)[1].startswith("good") else "B"))


def result():
    return json.loads(Path("out.json").read_text())


def test_both_orders_are_asked_and_a_good_model_wins(files, capsys):
    with serving(prefers_good) as (url, seen):
        assert files(url, "--price-in", "2", "--price-out", "8", "--max-tokens", "77") == 0
    assert sorted(shown(b) for b in seen) == sorted(
        (i, *pair) for i in range(12) for pair in ((f"good answer {i}", f"bad {i}"), (f"bad {i}", f"good answer {i}"))
    )
    assert all(b["model"] == "m" and b["temperature"] == 0 and b["max_tokens"] == 77 for b in seen)
    out = result()
    assert (out["wins"], out["ties"], out["losses"]) == (12, 0, 0) and out["win_rate"]["value"] == 1
    assert (out["orders_agree"], out["first_shown_wins"], out["a"], out["b"]) == (1, 0.5, "good", "bad")
    # 24 answers of 10 tokens in and 3 out, as the server counts: 240 * 2e-6 + 72 * 8e-6
    assert out["cost"]["this_run"] | {"money": 0} == dict(
        questions=24, tokens_in=240, tokens_out=72, not_counted=0, money=0
    )
    assert out["cost"]["this_run"]["money"] == pytest.approx(240 * 2e-6 + 72 * 8e-6)
    said = capsys.readouterr().out
    assert "100.0%" in said and "24 questions asked, 240 tokens in, 72 out, 0.001056 at the given prices" in said


def test_ties_a_judge_of_places_and_verdicts_that_cannot_be_read(files):
    """Prompts 0-2: ties; 3-5: always the first shown; 6-7: one order unreadable; 8: cut off; the rest: good wins."""

    def answer(number, body, headers):
        i, first, _ = shown(body)
        if i < 3:
            return completion("Verdict: tie")
        if i < 6:
            return completion("Verdict: A")
        if i < 8 and first.startswith("bad"):
            return completion("I cannot decide.")
        if i == 8:
            return completion("Verdict: A"[:6], finish="length")
        return prefers_good(number, body, headers)

    with serving(answer) as (url, _):
        assert files(url) == 0
    out = result()
    assert (out["pairs"], out["judged"], out["left_out"]) == (12, 9, 3)
    assert (out["unreadable"], out["cut_off"], out["refused"]) == (4, 2, 0)
    assert (out["wins"], out["ties"], out["losses"]) == (3, 6, 0) and out["win_rate"]["value"] == 6 / 9
    assert out["orders_agree"] == 6 / 9 and out["first_shown_wins"] == (3 * 2 + 3) / (6 + 6)
    assert [row["preference"] for row in out["rows"]] == [0.5] * 6 + [None] * 3 + [1.0] * 3


def test_equal_answers_are_a_tie_that_costs_nothing_and_samples_of_a_prompt_stay_together(tmp_path, files):
    a = write(tmp_path / "a.jsonl", [{"prompt": "p", "output": x} for x in ("good 1", "same", "good 3")])
    b = write(tmp_path / "b.jsonl", [{"prompt": "p", "output": x} for x in ("bad 1", "same", "bad 3")])

    def prefers(number, body, headers):
        return completion("Verdict: " + ("A" if "<response_a>\ngood" in body["messages"][0]["content"] else "B"))

    with serving(prefers) as (url, seen):
        assert main(["judge", a, b, "--model", "m", "--base-url", url, "--out", "out.json"]) == 0
    out = result()
    assert len(seen) == 4 and out["equal_answers"] == 1 and [r["preference"] for r in out["rows"]] == [1, 0.5, 1]
    rate = out["win_rate"]
    assert rate["value"] == pytest.approx(5 / 6) and rate["low"] == rate["high"] == pytest.approx(5 / 6)  # one prompt


def test_a_second_run_asks_nothing_and_another_judge_is_another_question(files, capsys):
    with serving(prefers_good) as (url, seen):
        assert files(url) == 0
        first = result()
        assert files(url) == 0 and len(seen) == 24
        assert result()["rows"] == first["rows"] and result()["cost"]["this_run"]["questions"] == 0
        assert "0 questions asked" in capsys.readouterr().out
        assert files(url, "--model", "other", "--limit", "2") == 0 and len(seen) == 28
        assert files(url, "--temperature", "1", "--limit", "2") == 0 and len(seen) == 32
        assert files(url, "--request", '{"seed": 4, "max_tokens": null}', "--limit", "1") == 0 and len(seen) == 34
        assert seen[-1]["seed"] == 4 and "max_tokens" not in seen[-1]


def test_what_passes_is_tried_again_and_what_does_not_stops_with_all_answers_kept(files, capsys):
    def shaky(number, body, headers):  # every second request fails, as 429 or 503
        return (failure(429), failure(503))[number // 2 % 2] if number % 2 else prefers_good(number, body, headers)

    with serving(shaky) as (url, seen):
        assert files(url, "--concurrency", "1") == 0
    assert len(seen) == 47 and result()["wins"] == 12  # 24 answers, 23 failures between them

    def dies(number, body, headers):
        return prefers_good(number, body, headers) if number < 10 else failure(500, "out of order")

    os.remove("judge-cache.jsonl")
    with serving(dies) as (url, seen):
        assert files(url, "--concurrency", "1", "--retries", "2") == 2
        said = capsys.readouterr().err
        assert "out of order" in said and "10 of 24 questions were answered" in said and "Traceback" not in said
        assert len(seen) == 10 + 1 + 2
        assert Path("judge-cache.jsonl").read_text().count("\n") == 10


@pytest.mark.parametrize(("status", "words"), [(401, "OPENAI_API_KEY"), (404, "--base-url")])
def test_what_no_retry_can_cure_stops_at_once_and_the_key_stays_secret(
    files, status, words, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    with serving(lambda n, body, headers: failure(status, f"bad {headers['Authorization']}")) as (url, seen):
        assert files(url, "--concurrency", "1") == 2
    said = capsys.readouterr()
    assert len(seen) == 1 and words in said.err and "bad Bearer ***" in said.err
    with serving(prefers_good) as (url, _):
        assert files(url.replace("http://", "http://user:pass-word@")) == 0
    said = said.out + said.err + "".join(capsys.readouterr())
    for text in (said, *(p.read_text() for p in tmp_path.iterdir())):
        assert "sk-secret" not in text and "pass-word" not in text


def test_a_request_that_is_turned_down_is_reported_and_the_others_go_on(files, capsys):
    def answer(number, body, headers):
        if shown(body)[0] in (7, 9) and shown(body)[1].startswith("bad"):
            return failure(400 if shown(body)[0] == 7 else 413, "context length exceeded")
        return prefers_good(number, body, headers)

    with serving(answer) as (url, _):
        assert files(url) == 0
    out = result()
    assert (out["judged"], out["left_out"], out["refused"], out["unreadable"]) == (10, 2, 2, 0)
    assert "context length exceeded" in out["refused_because"][0]
    with serving(lambda *_: failure(400, "unknown field max_tokens")) as (url, seen):
        assert files(url, "--concurrency", "1") == 2 and len(seen) == 5
    assert "unknown field max_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, {}, {"object": "list", "data": []}), "no chat completion"),
        ((200, {"Content-Type": "text/html"}, "<html>hello</html>"), "no chat completion"),
        ((200, {}, "{torn"), "0 of 24"),
        (completion("who knows"), "not one prompt"),
        (completion(None, finish="length"), "--max-tokens"),
    ],
)
def test_garbage_is_said_to_be_garbage(files, reply, words, capsys):
    with serving(lambda *_: reply) as (url, _):
        assert files(url, "--concurrency", "1") == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


NONE = [{}, {"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": [{"message": None}]}, ["x"], "{torn"]


def test_an_answer_that_is_no_completion_is_one_bad_answer_and_is_asked_again(files, capsys):
    def answer(number, body, headers):
        i, first, _ = shown(body)
        bad = i < len(NONE) and first.startswith("bad") and len(seen) <= 24
        return (200, {}, NONE[i]) if bad else prefers_good(number, body, headers)

    with serving(answer) as (url, seen):
        assert files(url) == 0
        out = result()
        assert (out["judged"], out["left_out"], out["refused"]) == (12 - len(NONE), len(NONE), len(NONE))
        assert all("no chat completion" in why for why in out["refused_because"])
        assert files(url) == 0 and len(seen) == 24 + len(NONE)  # and only those
    assert (result()["judged"], result()["refused"]) == (12, 0)


@pytest.mark.parametrize(
    ("judged", "pairs", "words"),
    [
        (9, 9, ", from only 9 pairs"),
        (49, 98, ", from only 49 pairs"),
        (50, 100, ""),
        (50, 101, ", from only 50 of 101 pairs"),
        (1200, 3000, ", from only 1,200 of 3,000 pairs"),
        (1500, 3000, ""),
    ],
)
def test_a_rate_from_few_pairs_says_so(judged, pairs, words):
    assert thin(judged, pairs) == words


def test_a_rate_from_few_pairs_says_so_in_its_line(files, capsys):
    def half(number, body, headers):
        return completion(
            "Verdict: " + ("A" if shown(body)[1].startswith("good") else "B" if shown(body)[0] < 5 else "?")
        )

    with serving(half) as (url, _):
        assert files(url) == 0
    lines = capsys.readouterr().out.splitlines()
    rates = [line for line in lines if "win rate" in line or "at equal length" in line]
    assert len(rates) == 2 and all("100.0%" in line and ", from only 5 of 12 pairs" in line for line in rates)


def test_the_cache_lies_beside_the_result(files, tmp_path):
    (tmp_path / "here").mkdir()
    with serving(prefers_good) as (url, seen):
        assert files(url, "--out", "here/judge.json", "--limit", "2") == 0
        assert Path("here/judge-cache.jsonl").is_file() and not Path("judge-cache.jsonl").exists()
        assert files(url, "--cache", "mine.jsonl", "--limit", "2") == 0 and len(seen) == 8
    assert Path("mine.jsonl").read_text().count("\n") == 4 and not Path("judge-cache.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_asks_only_what_is_missing(files, number, tmp_path):
    reached, done = threading.Event(), threading.Event()

    def stalls(n, body, headers):
        if n == 9:
            reached.set()
            done.wait(60)
        return prefers_good(n, body, headers)

    with serving(stalls) as (url, seen):
        command = [sys.executable, "-m", "lorat", "judge", *files.arguments, "--base-url", url, "--concurrency", "1"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert reached.wait(120)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        done.set()
    if number == signal.SIGINT:
        assert process.returncode == 130 and "9 answers are in judge-cache.jsonl" in error and "Traceback" not in error
    cache = tmp_path / "judge-cache.jsonl"
    assert cache.read_text().count("\n") == 9
    port = int(re.search(r":(\d+)/", url)[1])
    cache.write_text(cache.read_text() + '{"key": "torn')  # as a machine that lost power leaves it
    from lorat.judge.client import Cache

    assert len(Cache(cache).replies) == 9
    before = len(seen)
    with serving(prefers_good, port) as (again, asked):  # the address is part of a question
        assert again == url and files(again) == 0
    assert before == 10 and len(asked) == 24 - 9 and result()["wins"] == 12
    assert sorted(map(shown, asked + seen[:9])) == sorted({shown(b) for b in asked + seen[:9]})


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ("x/good.jsonl", "x/bad.jsonl", ("good", "bad")),
        ("x/samples.jsonl", "x/sft.jsonl", ("x/samples", "sft")),
        ("x/out.jsonl", "y/out.jsonl", ("x/out", "y/out")),
        ("z/x/out.jsonl", "w/x/out.jsonl", ("z/x/out.jsonl", "w/x/out.jsonl")),
    ],
)
def test_models_are_called_by_what_tells_them_apart(a, b, names):
    assert _names(a, b) == names
    with pytest.raises(DataError, match="given twice"):
        _names(a, f"./{a}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "none.txt"], "--prompt"),
        (["--request", "[1]"], "--request"),
        (["--request", "{"], "--request"),
        (["--out", "no/such/out.json"], "--out"),
        (["--cache", "."], "--cache"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked(files, arguments, words, capsys):
    with serving(prefers_good) as (url, seen):
        assert files(url, *arguments) == 2 and not seen
    assert words in capsys.readouterr().err


def test_a_prompt_of_ones_own(files, tmp_path):
    (tmp_path / "own.txt").write_text("Q {prompt} one {a} two {b} three")
    with serving(lambda *_: completion("Verdict: tie")) as (url, seen):
        assert files(url, "--prompt", "own.txt", "--limit", "1", "--concurrency", "1") == 0
    assert seen[0]["messages"] == [{"role": "user", "content": "Q p0 one good answer 0 two bad 0 three"}]
    (tmp_path / "own.txt").write_text("Q {prompt} one {a}")
    with pytest.raises(ConfigError, match=r"no \{b\}"):
        load_prompt("dialogue", str(tmp_path / "own.txt"))


def test_a_real_server_and_a_real_model(files, tmp_path, capsys):
    """`transformers serve` with a Llama that always says "Verdict: A": both orders make exactly 50 % of it."""
    model = save_judge(tmp_path / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--host", "127.0.0.1"]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "serve.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)  # until it listens
        assert files(f"http://127.0.0.1:{port}/v1", "--model", model, "--limit", "4", "--concurrency", "2") == 0
    finally:
        server.terminate()
        server.wait(30)
    out = result()
    assert (out["wins"], out["ties"], out["losses"]) == (0, 4, 0) and out["win_rate"]["value"] == 0.5
    assert (out["first_shown_wins"], out["orders_agree"], out["unreadable"]) == (1, 0, 0)
    words = sum(len(fill(load_prompt("dialogue"), r["prompt"], r["a"], r["b"]).split()) for r in out["rows"])
    assert out["cost"]["this_run"]["tokens_in"] == 2 * (words + 4 * 2)  # a word is a token here, and two are roles
    assert out["cost"]["this_run"]["tokens_out"] == 8 * 3  # Verdict: A, and the end
