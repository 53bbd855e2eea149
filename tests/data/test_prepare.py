"""Reading, preparing and reporting: expected values by hand, from `json`, or from TRL; never from lorat's output."""

import csv
import gzip
import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import unpair_preference_dataset

from lorat.data.prepare import DataReport, prepare
from lorat.data.reading import load_preference_data
from lorat.errors import DataError, ModelError
from tests.helpers.worlds import SHARED

DATA = SHARED / "data"
HH = DATA / "hh-harmless-base/test-mild.jsonl"
ROWS = [{"prompt": f"q{i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer():
    """One token a word: </s> is 0, <unk> 1, the words w2 … w29 are 2 … 29."""
    vocabulary = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 30)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def w(*ids):
    return "".join(f" w{i}" for i in ids)


def pairs(*rows):
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows])


def run(dataset, tokenizer, method="dpo", max_length=None, **options):
    prepared, report = prepare(dataset, tokenizer, method=method, max_length=max_length, **options)
    return prepared.to_list(), report


def write(path, rows):
    """`rows` in the format of the file's name, with the standard library alone (Parquet: with `datasets`)."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    plain = path.with_name("plain." + kind)
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(plain)
    elif kind in ("csv", "tsv"):
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        plain.write_text(json.dumps(rows, indent=1) if kind == "json" else "\n".join(map(json.dumps, rows)))
    path.write_bytes(gzip.compress(plain.read_bytes()) if path.suffix == ".gz" else plain.read_bytes())
    plain.unlink()
    return str(path)


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_files(tmp_path, kind, gz):
    name = write(tmp_path / f"data.{kind}{gz}", ROWS)
    assert load_preference_data(name).to_list() == ROWS
    assert load_preference_data(name, "train[1:3]").to_list() == ROWS[1:3]


def test_csv_cells_stay_text(tmp_path):
    rows = [{"prompt": "007", "chosen": "None", "rejected": "1"}, {"prompt": "NA", "chosen": "2", "rejected": ""}]
    assert load_preference_data(write(tmp_path / "data.csv", rows)).to_list() == rows


@pytest.mark.parametrize("split, expected", [("train", ROWS), ("test", ROWS[:1]), ("train[50%:]", ROWS[2:])])
@pytest.mark.parametrize("saved", [True, False])
def test_folders(tmp_path, split, expected, saved):
    folder = tmp_path / "folder"
    if saved:
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(folder)
    else:
        folder.mkdir()
        write(folder / "train.jsonl", ROWS)
        write(folder / "test.jsonl", ROWS[:1])
    assert load_preference_data(str(folder), split).to_list() == expected


def test_saved_dataset_is_the_split_train(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load_preference_data(str(tmp_path / "saved"), "train[:2]").to_list() == ROWS[:2]
    with pytest.raises(DataError, match=r"no split 'test'.*\['train'\]"):
        load_preference_data(str(tmp_path / "saved"), "test")


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "data.jsonl"
    assert load_preference_data(write(path, ROWS))[0]["prompt"] == "q0"
    assert load_preference_data(write(path, ROWS[::-1]))[0]["prompt"] == "q3"


def test_hub(monkeypatch):
    """A name that is no path goes to the hub as it is, with its configuration, and never with remote code."""
    seen, asked = [], []
    parquet = SimpleNamespace(name="parquet", config=SimpleNamespace(data_files={"test": ["x.parquet"]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: asked.append((a, k)) or parquet)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: seen.append((a, k)) or Dataset.from_list(ROWS))
    assert load_preference_data("org/name", "test[:2]", "small").to_list() == ROWS
    assert asked == [(("org/name", "small"), {})]
    assert seen == [(("org/name", "small"), {"split": "test[:2]"})]


def test_hub_failure_names_what_is_near(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mydata").mkdir()
    with pytest.raises(DataError, match=r"mydat is no local file.*mydata.*no route to the hub.*check the name"):
        load_preference_data("mydat")


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", f'{GOOD}\n{GOOD}\n\n{{"prompt": "a", "chosen": \n{GOOD}', ["line 4", '"chosen": ', "delete"]),
        ("x.jsonl.gz", f"{GOOD}\n{GOOD[:-2]}", ["line 2", "no 0"]),
        ("x.json", f"[\n{GOOD},\n{GOOD}\n{GOOD}]", ["line 4", "delimiter"]),
        ("x.jsonl", f"{GOOD}\n".encode() + b'{"prompt": "\xff"}\n', ["line 2", "UTF-8"]),
        ("x.jsonl", "", ["empty"]),
        ("x.csv", "", ["empty"]),
        ("x.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d,e\n", ["line 3", "correct"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    path = tmp_path / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError) as caught:
        load_preference_data(str(path))
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []


def test_a_broken_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl", ROWS)
    (tmp_path / "folder/test.jsonl").write_text(f"{GOOD}\n{{")
    with pytest.raises(DataError, match=r"folder/test\.jsonl.*line 2"):
        load_preference_data(str(tmp_path / "folder"), "test")
    assert load_preference_data(str(tmp_path / "folder")).to_list() == ROWS  # only what is asked for is read


def test_a_row_that_is_no_object_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", [*ROWS[:2], 7])
    with pytest.raises(DataError, match="line 3 is a number, not an object with columns"):
        load_preference_data(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_cells_of_mixed_type_are_read_as_they_are(tmp_path, name):
    rows = [*ROWS[:2], ROWS[2] | {"chosen": 5}]
    assert list(load_preference_data(write(tmp_path / name, rows))) == rows


def test_mixed_types_that_datasets_reads_are_dropped_with_their_row(tmp_path, tokenizer):
    rows = [{"prompt": w(2), "chosen": w(3), "rejected": w(4)} for _ in range(3)]
    path = write(tmp_path / "x.jsonl", [*rows[:2], rows[2] | {"chosen": 5}])
    assert run(load_preference_data(path), tokenizer)[1].dropped == {"chosen is a number, not text": [2]}


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "unlike.csv", ROWS)
    with pytest.raises(DataError, match=r"no file or folder .*trian\.jsonl.*train\.jsonl.*give a path that exists"):
        load_preference_data(str(tmp_path / "trian.jsonl"))


def test_file_of_unknown_type(tmp_path):
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"x\.xlsx is of no type.*\.jsonl"):
        load_preference_data(str(tmp_path / "x.xlsx"))


@pytest.mark.parametrize("split, words", [("test", "no split 'test'.*'train'"), ("train[5", "'train[5'.*train[:1000]")])
def test_wrong_split(tmp_path, split, words):
    path = write(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(DataError, match=words.replace("[", r"\[")):
        load_preference_data(path, split)


def test_progress_bars_are_left_as_they_were(tmp_path, capfd):
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load_preference_data(write(tmp_path / "x.jsonl", ROWS))
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level
    assert "examples" not in capfd.readouterr().err


# --- preparing -------------------------------------------------------------------------------------------------


def test_pairs(tokenizer):
    rows, report = run(pairs((w(2), w(3), w(4, 5)), (w(6, 7), w(8), w(9))), tokenizer)
    assert rows == [
        {"row": 0, "prompt_ids": [2], "chosen_ids": [3, 0], "rejected_ids": [4, 5, 0]},
        {"row": 1, "prompt_ids": [6, 7], "chosen_ids": [8, 0], "rejected_ids": [9, 0]},
    ]
    assert (report.rows_read, report.rows_kept, report.dropped, report.longest) == (2, 2, {}, 4)


def test_kto(tokenizer):
    data = {"prompt": [w(2), w(4)], "completion": [w(3), w(5)], "label": [1, 0]}
    rows, _ = run(Dataset.from_dict(data), tokenizer, "kto")
    assert rows == [
        {"row": 0, "prompt_ids": [2], "completion_ids": [3, 0], "label": True},
        {"row": 1, "prompt_ids": [4], "completion_ids": [5, 0], "label": False},
    ]


def test_kto_splits_pairs_as_trl_does(tokenizer):
    raw = pairs((w(2), w(3), w(4, 5)), (w(6, 7), w(8), w(9)), (w(2), w(10), w(11)))
    rows, report = run(raw, tokenizer, "kto")
    theirs = unpair_preference_dataset(raw)
    ids = tokenizer.convert_tokens_to_ids
    assert rows == [
        {
            "row": i % 3,
            "prompt_ids": ids(row["prompt"].split()),
            "completion_ids": [*ids(row["completion"].split()), 0],
            "label": row["label"],
        }
        for i, row in enumerate(theirs)
    ]
    assert (report.rows_read, report.rows_kept) == (3, 6)


def test_kto_keeps_the_good_half_of_a_pair(tokenizer):
    raw = pairs((w(2), w(3), " "), (w(2), "", w(4)), (w(2), w(3), w(3)), (w(2), w(5), w(6)), (w(2), " ", ""))
    rows, report = run(raw.select([4, 0, 1, 2, 3]), tokenizer, "kto")
    assert [(row["row"], row["label"]) for row in rows] == [(1, True), (4, True), (2, False), (4, False)]
    assert report.dropped == {"chosen equals rejected": [3], "empty completion": [0, 1, 2]}


def test_rows_that_teach_nothing_are_dropped_with_their_numbers(tokenizer):
    good = (w(2), w(3), w(4))
    raw = pairs(
        good, (" ", *good[1:]), (w(2), "\n", w(4)), (w(2), w(3), w(3)), (w(2), None, w(4)), good, ("", *good[1:])
    )
    rows, report = run(raw, tokenizer, name="eval")
    assert [row["row"] for row in rows] == [0, 5]
    assert report.dropped == {
        "empty prompt": [1, 6],
        "empty completion": [2],
        "chosen equals rejected": [3],
        "chosen is null, not text": [4],
    }
    head = report.render().split("\n")[0]
    assert head.startswith("eval: 7 pairs read as prompt, chosen, rejected (text); 2 kept; dropped 5: ")
    assert "empty prompt (rows 1, 6)" in head and "chosen equals rejected (row 3)" in head


def test_tokens_that_are_equal_are_dropped(tokenizer):
    raw = pairs((w(2), w(3, 4, 5), w(3, 4, 6)), (w(2), " x", " y"), (w(2), w(3), w(4)))
    rows, report = run(raw, tokenizer, max_length=3)
    assert [row["row"] for row in rows] == [2]
    assert report.dropped == {
        "chosen equals rejected after truncation": [0],
        "chosen equals rejected after tokenisation": [1],
    }


def test_truncation_is_counted(tokenizer):
    raw = pairs((w(2, 3, 4, 5), w(6), w(7)), (w(2), w(3, 4, 5, 6, 7, 8), w(9)), (w(2), w(3), w(4)))
    rows, report = run(raw, tokenizer, max_length=4)
    assert rows[0] == {"row": 0, "prompt_ids": [4, 5], "chosen_ids": [6, 0], "rejected_ids": [7, 0]}
    assert rows[1] == {"row": 1, "prompt_ids": [2], "chosen_ids": [3, 4, 5], "rejected_ids": [9, 0]}
    assert (report.prompts_cut, report.completions_cut, report.longest) == (1, 1, 8)
    assert "1 prompts at their start, 1 completions at their end" in report.render()
    assert "8 tokens" in report.render()


def test_prompts_are_capped(tokenizer):
    rows, report = run(pairs((w(2, 3, 4), w(6), w(7))), tokenizer, max_prompt_length=2)
    assert (rows[0]["prompt_ids"], report.prompts_cut) == ([3, 4], 1)


def test_overlong_rows_can_be_dropped(tokenizer):
    raw = pairs((w(2), w(3), w(4)), (w(2), w(3, 4), w(4)), (w(2, 3), w(3), w(4)))
    rows, report = run(raw, tokenizer, max_length=3, overlong="drop")
    assert [row["row"] for row in rows] == [0]
    assert report.dropped == {"longer than max_length=3": [1, 2]}
    rows, report = run(raw, tokenizer, max_prompt_length=1, overlong="drop")
    assert report.dropped == {"prompt longer than max_prompt_length=1": [2]}
    assert (report.prompts_cut, report.completions_cut) == (0, 0)


@pytest.mark.parametrize(
    "rows, options, words",
    [
        (
            [(w(2), "", w(3)), (w(2), w(3), w(3)), (w(4), " ", w(3))],
            {},
            ["none of 3 pairs", "2 × empty completion (rows 0, 2)", "1 × chosen equals rejected (row 1)", "Correct"],
        ),
        (  # totals 4, 6, 9
            [(w(2, 3), w(3), w(4)), (w(2, 3), w(3, 4, 5), w(4)), (w(2, 3, 4, 5), w(3, 4), w(4, 5, 6, 7))],
            {"max_length": 3, "overlong": "drop"},
            ["3 × longer than max_length=3", "4 (shortest)", "6 (median)", "9 (longest)", "set max_length=9"],
        ),
        (
            [(w(2, 3), w(3), w(4))],
            {"max_prompt_length": 1, "overlong": "drop"},
            ["1 × prompt longer than max_prompt_length=1", "raise max_prompt_length"],
        ),
        (
            [(w(2), w(3, 4), w(4, 5)), (w(2, 3), w(3, 4, 5), w(4, 5, 6))],
            {"max_length": 3},
            ["every completion was cut", "EOS", "4 (shortest)", "6 (longest)", "set max_length=6"],
        ),
        ([(w(2), w(3, 4), w(3, 5))], {"max_length": 2}, ["after truncation (row 0)", "set max_length=4"]),
    ],
)
def test_nothing_left(tokenizer, rows, options, words):
    with pytest.raises(DataError) as caught:
        run(pairs(*rows), tokenizer, **options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_one_whole_completion_is_enough(tokenizer):
    rows, report = run(pairs((w(2), w(3, 4), w(4))), tokenizer, max_length=3)
    assert (rows[0]["chosen_ids"], rows[0]["rejected_ids"], report.completions_cut) == ([3, 4], [4, 0], 1)


def test_prepared_data_passes_through(tokenizer):
    raw = pairs((w(2), w(3), w(3)), (w(2), w(3), w(4)))
    once, _ = prepare(raw, tokenizer, method="dpo", max_length=None)
    twice, report = prepare(once, tokenizer, method="dpo", max_length=None)
    assert (
        twice.to_list()
        == once.to_list()
        == [{"row": 1, "prompt_ids": [2], "chosen_ids": [3, 0], "rejected_ids": [4, 0]}]
    )
    assert (report.rows_read, report.rows_kept, report.lengths["total"]) == (1, 1, (3, 3, 3))
    without, _ = run(once.remove_columns("row"), tokenizer)
    assert [row["row"] for row in without] == [0]
    with pytest.raises(DataError, match=r"method=kto also needs \['completion_ids', 'label'\].*give the raw data"):
        run(once, tokenizer, "kto")
    with pytest.raises(DataError, match="0 rows"):
        run(once.select([]), tokenizer)


def test_ultrafeedback_from_a_file(tmp_path, tokenizer):
    """Dialogues beside a prompt string, through a file and the chat template; without a template the error says so."""
    turns = [[{"role": "user", "content": w(2)}, {"role": "assistant", "content": w(i)}] for i in (3, 4)]
    row = {"prompt": w(9), "prompt_id": "a", "chosen": turns[0], "rejected": turns[1], "score_chosen": 8.0}
    raw = load_preference_data(write(tmp_path / "x.jsonl", [row, row | {"rejected": turns[0]}]))
    with pytest.raises(ModelError, match="no chat template"):
        run(raw, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {{ 'w20 ' if m.role == 'user' }}{% endfor %}"
    rows, report = run(raw, tokenizer)
    assert rows == [{"row": 0, "prompt_ids": [2, 20], "chosen_ids": [3, 0], "rejected_ids": [4, 0]}]
    assert report.dropped == {"chosen equals rejected": [1]}


@pytest.mark.parametrize("bad", [DatasetDict({"train": Dataset.from_list(ROWS)}), ROWS])
def test_not_a_dataset(tokenizer, bad):
    with pytest.raises(DataError, match=f"{type(bad).__name__}.*give a Dataset"):
        run(bad, tokenizer)


def test_other_bad_input(tokenizer):
    with pytest.raises(DataError, match=r"'chosen'.*int64"):
        run(Dataset.from_dict({"prompt": ["a"], "chosen": [1], "rejected": ["b"]}), tokenizer)
    with pytest.raises(DataError, match="0 rows"):
        run(Dataset.from_list([]), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        run(Dataset.from_list(ROWS), tokenizer)


def test_torch_formatted_data_is_read_as_python(tokenizer):
    raw = Dataset.from_dict({"prompt": [w(2), w(2)], "completion": [w(3), w(4)], "label": [1, 0]}).with_format("torch")
    rows, _ = run(raw, tokenizer, "kto")
    assert rows == [
        {"row": 0, "prompt_ids": [2], "completion_ids": [3, 0], "label": True},
        {"row": 1, "prompt_ids": [2], "completion_ids": [4, 0], "label": False},
    ]


def test_lengths_by_nearest_rank(tokenizer):
    """Prompts of 1 … 20 tokens; completions of 2 (with EOS) and 3: the longer one counts in the total."""
    raw = pairs(*((w(*range(2, 3 + i)), w(3), w(4, 5)) for i in range(20)))
    _, report = run(raw, tokenizer)
    assert report.lengths == {"prompt": (10, 19, 20), "completion": (2, 3, 3), "total": (13, 22, 23)}
    assert "prompt 10 / 19 / 20, completion 2 / 3 / 3, total 13 / 22 / 23" in report.render()


def test_report_abbreviates_rows():
    report = DataReport("train", "x", "pairs", 100, 88, {"empty prompt": list(range(12))})
    assert report.render() == (
        "train: 100 pairs read as x; 88 kept; dropped 12: empty prompt (rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more)"
    )


# --- real data -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if not HH.is_file() or not (DATA / "pythia-tokenizer").is_dir():
        pytest.skip(f"no real data and tokenizer at {SHARED}")
    with HH.open() as file:
        return [json.loads(line) for line in file], AutoTokenizer.from_pretrained(DATA / "pythia-tokenizer")


def test_real_dialogues(real):
    """Every dialogue is whole again when decoded, but for the one row whose answer is empty."""
    raw, tokenizer = real
    rows, report = run(load_preference_data(str(HH)), tokenizer)
    assert report.format == "Anthropic-HH dialogues (prompt = common prefix)"
    empty = [i for i, r in enumerate(raw) if any(r[s].rstrip().endswith("Assistant:") for s in ("chosen", "rejected"))]
    assert (len(raw), report.rows_kept, report.dropped) == (860, 860 - len(empty), {"empty completion": empty})
    for row in rows:
        prompt = tokenizer.decode(row["prompt_ids"])
        assert prompt.endswith("\n\nAssistant:")
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"].count(tokenizer.eos_token_id) == 1
            text = raw[row["row"]][side]
            assert prompt + tokenizer.decode(row[f"{side}_ids"]) == text + "<|endoftext|>"
            assert row["prompt_ids"] + row[f"{side}_ids"] == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_real_dialogues_truncated(real):
    raw, tokenizer = real
    rows, report = run(load_preference_data(str(HH)), tokenizer, max_length=128)
    eos, cut = tokenizer.eos_token_id, 0
    for row in rows:
        total = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert total <= 128 and row["prompt_ids"] and row["chosen_ids"] and row["rejected_ids"]
        assert tokenizer.decode(row["prompt_ids"]).endswith("Assistant:")
        for side in ("chosen", "rejected"):
            whole = [*tokenizer(raw[row["row"]][side]).input_ids, eos]
            cut += row[f"{side}_ids"][-1] != eos
            if row[f"{side}_ids"][-1] == eos:
                assert whole[-len(row[f"{side}_ids"]) :] == row[f"{side}_ids"]
    assert cut == report.completions_cut > 0
    longest = max(len(tokenizer(r[side]).input_ids) + 1 for r in raw for side in ("chosen", "rejected"))
    assert f"the longest row has {longest} tokens" in report.render()
