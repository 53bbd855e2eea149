"""`lorat data` as a person types it: what it shows is computed by hand from the tokenizer of one word a token."""

from __future__ import annotations

import json

import pytest
from datasets import load_from_disk

from lorat.cli.main import main
from tests.helpers.worlds import make_tokenizer

ROWS = [
    {"prompt": "the small dog", "chosen": " runs", "rejected": " sleeps quickly ."},
    {"prompt": "the cat", "chosen": " sings", "rejected": " sings"},
    {"prompt": "a bird", "chosen": " sings on the tree", "rejected": ""},
    {"prompt": "the big red dog in the park", "chosen": " sleeps on a tree .", "rejected": " runs"},
]


@pytest.fixture
def data(tmp_path, monkeypatch, capsys):
    """`data(*options)` -> (exit status, output, errors); the model's folder holds a tokenizer and nothing else."""
    monkeypatch.setenv("COLUMNS", "80")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset_name: {tmp_path / 'pairs.jsonl'}\nmax_length: 8\n"
    )

    def start(*options):
        status = main(["data", "--config", str(tmp_path / "run.yaml"), *map(str, options)])
        said = capsys.readouterr()
        return status, said.out, said.err

    start.folder = tmp_path
    return start


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_report_lengths_and_rows(data):
    status, out, _ = data("--rows", 1)
    assert status == 0
    assert "4 pairs read as prompt, chosen, rejected (text); 2 kept; dropped 2" in out
    head, shown = out.split("row 0 ─")
    bars = [line.split() for line in head.splitlines() if "–" in line]
    assert [(line[0], line[1]) for line in bars] == [("7–7", "1"), ("8–8", "1")]  # 3 + 4; 7 + 6 cut to 8
    assert all(line[2] == "█" * 40 for line in bars) and bars[1][3:] == ["←", "max_length"]
    assert shown.splitlines()[1:] == [
        "prompt, 3 tokens, not trained",
        "│ the small dog",
        "chosen, 2 tokens, trained",
        "boundary: 'the' 'small' 'dog' ‖ 'runs' '<end>'",
        "│ runs<end>",
        "rejected, 4 tokens, trained",
        "boundary: 'the' 'small' 'dog' ‖ 'sleeps' 'quickly' '.'",
        "│ sleeps quickly .<end>",
    ]


def test_what_was_cut_is_shown(data):
    """7 + 6 tokens into 8: the prompt keeps 4 of its own, the completion 4 of 6."""
    _, out, _ = data("--row", 3)
    assert out.split("row 3 ─")[1].splitlines()[1:] == [
        "prompt, 4 tokens, not trained; 3 cut from its start",
        "│ ✂ the big red ✂dog in the park",
        "chosen, 4 tokens, trained; 2 cut from its end, so it has no end of text",
        "boundary: 'in' 'the' 'park' ‖ 'sleeps' 'on' 'a'",
        "│ sleeps on a tree✂ .<end> ✂",
        "rejected, 2 tokens, trained",
        "boundary: 'in' 'the' 'park' ‖ 'runs' '<end>'",
        "│ runs<end>",
    ]


@pytest.mark.parametrize("row, why", [(1, "chosen equals rejected"), (2, "empty completion")])
def test_a_dropped_row_says_why(data, row, why):
    assert f"dropped: {why}" in data("--row", row)[1].split(f"row {row} ─")[1]


def test_a_row_that_is_too_long_is_shown_whole_with_its_reason(data):
    shown = data("--row", 3, "--overlong", "drop")[1].split("row 3 ─")[1]
    assert "dropped: longer than max_length=8" in shown and "│ the big red dog in the park" in shown
    assert "not trained, since it is dropped" in shown


def test_labels_of_kto(data):
    shown = data("--method", "kto", "--row", 0)[1].split("row 0 ─")
    assert "chosen" not in shown[1] and "completion (desirable), 2 tokens" in shown[1]
    assert "completion (undesirable), 4 tokens" in shown[2]


def test_colours_on_a_terminal_alone(data, monkeypatch):
    assert "\x1b[" not in data("--rows", 1)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = data("--rows", 1)[1]
    assert "\x1b[36mthe small dog" in out and "\x1b[32mruns" in out and "\x1b[7;32m<end>" in out


def test_control_characters_of_the_data_do_not_reach_the_terminal(data):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\x1b[2J", "\r"])
    tokenizer.save_pretrained(data.folder / "model")
    write(data.folder / "pairs.jsonl", [{"prompt": "a \x1b[2J dog", "chosen": "\r cat", "rejected": "dog"}])
    out = data()[1]
    assert "\\x1b[2J" in out and "\\r" in out and not {"\x1b", "\r"} & set(out)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dataset_name", "no.jsonl"], "no file or folder no.jsonl"),
        (["--row", 4], "there are 4 rows, numbered from 0 to 3"),
        (["--max_tokens_per_pack", 5], "max_tokens_per_pack=5"),
        (["--max_length", 2, "--overlong", "drop"], "set max_length="),
        (["--eval_dataset_split", "test"], "eval_dataset_split=test"),
        (["--bta", 1], "did you mean beta"),
        (["--rows", -1], "--rows"),
        (["--model_name_or_path", "no-model"], "no tokenizer could be loaded"),
    ],
)
def test_what_train_would_refuse_ends_with_2(data, options, words):
    status, _, err = data(*options)
    assert status == 2 and words in err and "Traceback" not in err


def test_several_datasets(data):
    write(data.folder / "more.jsonl", [{"prompt": "the house", "chosen": " sleeps", "rejected": " sings"}])
    _, out, _ = data("--datasets", data.folder / "more.jsonl", "--row", 4)
    assert f"row 4 ({data.folder / 'more.jsonl'}, row 0)" in out.replace("\n", "") and "│ the house" in out


def test_out_is_a_dataset_that_trains_as_the_raw_one(data):
    out = data.folder / "prepared"
    status, said, _ = data("--out", out, "--eval_dataset_split", "train[:1]", "--rows", 0)
    assert status == 0 and f"dataset_name: {out}" in said and "eval_dataset_split: eval" in said
    train = load_from_disk(str(out))["train"]
    words = make_tokenizer().convert_tokens_to_ids
    assert train[0] == {
        "row": 0,
        "prompt_ids": words(["the", "small", "dog"]),
        "chosen_ids": words(["runs", "<end>"]),
        "rejected_ids": words(["sleeps", "quickly", ".", "<end>"]),
    }
    status, said, err = data("--dataset_name", out, "--eval_dataset_split", "eval")
    assert not err
    assert status == 0 and "train: 2 pairs read as tokenised examples; 2 kept" in said and "eval: 1 pairs" in said
    assert "row 1 ─" in said and "│ dog in the park" in said
    assert data("--out", out)[0] == 2 and data("--out", out, "--overwrite", "--rows", 0)[0] == 0
    assert set(load_from_disk(str(out))) == {"train"}
    status, _, err = data("--out", data.folder / "model", "--overwrite")
    assert status == 2 and "name a new folder" in err and (data.folder / "model/tokenizer.json").exists()


def test_prepared_data_is_refused_by_another_tokenizer(data):
    out = data.folder / "prepared"
    assert data("--out", out, "--rows", 0)[0] == 0
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    other.save_pretrained(data.folder / "model")
    status, _, err = data("--dataset_name", out)
    assert status == 2 and "prepared with another tokenizer" in err
