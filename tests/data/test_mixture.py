"""Several datasets in one run: weights, caps, columns of their own, a report each; by hand."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from lorat.data.mixture import Mixture, Part, parts_of, prepare_all, read_evaluation, read_training
from lorat.errors import ConfigError, DataError
from tests.helpers.worlds import WORDS, make_tokenizer, run_config, trainer_for


def rows(first, n):
    """`n` pairs whose prompts are words `first`, `first + 1` …, so that each can be told by its prompt."""
    return [{"prompt": WORDS[first + i], "chosen": " cat", "rejected": " dog"} for i in range(n)]


def mixed(*parts, **settings):
    tokenizer = make_tokenizer()
    data = Mixture([(part, Dataset.from_list(found)) for part, found in parts])
    result, reports = prepare_all(data, tokenizer, **{"method": "dpo", "max_length": 64} | settings)
    return [(row["row"], tokenizer.decode(row["prompt_ids"])) for row in result], reports


def test_each_dataset_is_prepared_by_itself_and_rows_are_numbered_on():
    bad = [*rows(8, 2), {"prompt": "cat", "chosen": "", "rejected": " dog"}]
    found, reports = mixed((Part("a"), rows(0, 3)), (Part("b"), bad), (Part("c"), rows(12, 1)))
    prompts = [WORDS[i] for i in (0, 1, 2, 8, 9, 12)]
    assert found == list(zip([0, 1, 2, 3, 4, 6], prompts))
    assert [r.name for r in reports] == ["train, a", "train, b", "train, c"]
    assert reports[1].dropped == {"empty completion": [2]}
    told = [report.render().splitlines() for report in reports]
    assert "  3 examples an epoch; 50% of all" in told[0]
    assert "  2 examples an epoch; later messages count its rows from 3; 33% of all" in told[1]
    assert "  1 examples an epoch; later messages count its rows from 6; 17% of all" in told[2]


@pytest.mark.parametrize(
    "weight, counts", [(1, {1: 8}), (2, {2: 8}), (0.5, {1: 4}), (2.25, {2: 6, 3: 2}), (0.01, {1: 1})]
)
def test_a_weight_is_how_often_an_example_comes(weight, counts):
    found, _ = mixed((Part("a", weight=weight), rows(0, 8)))
    assert Counter(Counter(row for row, _ in found).values()) == counts
    assert all(prompt == WORDS[row] for row, prompt in found)


def test_what_is_drawn_depends_on_the_seed_alone():
    drawn = [tuple(mixed((Part("a", weight=0.5), rows(0, 12)), seed=seed)[0]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_datasets_may_have_columns_of_their_own():
    other = [{"prompt": "cat", "good": " dog", "bad": " bird"}]
    found, _ = mixed((Part("a"), rows(0, 1)), (Part("b", columns={"chosen": "good", "rejected": "bad"}), other))
    assert found == [(0, WORDS[0]), (1, "cat")]


def test_a_refusal_names_its_dataset():
    with pytest.raises(DataError, match=r"^train, b: the columns \['x'\]"):
        mixed((Part("a"), rows(0, 1)), (Part("b"), [{"x": "y"}]))


def test_a_class_of_kto_may_come_from_another_dataset():
    good = [{"prompt": "cat", "completion": " dog", "label": True}] * 9
    bad = [{"prompt": "cat", "completion": " dog", "label": False}]
    found, reports = mixed((Part("a"), good), (Part("b"), bad), method="kto")
    assert len(found) == 10 and "9 desirable to 1 undesirable" in reports[-1].render()
    with pytest.raises(DataError, match="train: all 18 completions are desirable"):
        mixed((Part("a"), good), (Part("b"), good), method="kto")


# --- from settings -----------------------------------------------------------------------------------------------


def test_entries_are_names_or_mappings():
    settings = {"dataset_name": "d", "dataset_split": "train[:5]", "dataset_config_name": "c"}
    entries = [
        "a",
        {"name": "b", "split": "test", "config": "x", "weight": "0.5", "max_rows": "7", "columns": {"prompt": "q"}},
    ]
    entries.append({"path": "trl/style", "name": "sub"})
    assert parts_of(settings | {"datasets": entries}) == [
        Part("d", "train[:5]", "c"),
        Part("a"),
        Part("b", "test", "x", 0.5, 7, {"prompt": "q"}),
        Part("trl/style", config="sub"),
    ]


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"nam": "a"}, "has nam; an entry takes name, split"),
        ({"weight": 2}, "has no name"),
        ({"name": "a", "weight": 0}, "weight=0 of a leaves nothing"),
        ({"name": "a", "weight": "inf"}, "weight=inf"),
        ({"name": "a", "weight": "much"}, "weight='much' of a is no number"),
        ({"name": "a", "max_rows": 0}, "max_rows=0"),
        ({"name": "a", "max_rows": 1.5}, "max_rows=1.5 of a is no number"),
        ({"name": "a", "columns": "prompt"}, "is no mapping"),
        (5, "datasets holds 5"),
    ],
)
def test_entries_that_make_no_sense(tmp_path, entry, words):
    with pytest.raises(ConfigError, match=words):
        Part.of(entry)
    with pytest.raises(ConfigError, match=words):
        run_config("m", tmp_path, datasets=[entry])


def jsonl(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def test_caps_and_splits_are_read(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", rows(0, 5)), jsonl(tmp_path / "b.jsonl", rows(8, 5))
    data = read_training({"dataset_name": a, "datasets": [{"name": b, "max_rows": 2, "split": "train[1:]"}]})
    assert [row["prompt"] for _, part in data.parts for row in part] == [WORDS[i] for i in (0, 1, 2, 3, 4, 9, 10)]
    assert len(data) == 7
    assert list(read_training({"datasets": [a]})) == list(read_training({"dataset_name": a})) == rows(0, 5)
    capped = read_training({"datasets": [{"name": a, "max_rows": 9}]})
    assert len(capped) == 5


def test_a_run_on_two_files(neox, tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", rows(0, 4)), jsonl(tmp_path / "b.jsonl", rows(8, 4))
    args = run_config(neox, tmp_path / "out", dataset_name=a, datasets=[{"name": b, "weight": 2}], dataset_num_proc=1)
    from lorat.train.trainer import TrustRegionTrainer

    trainer = TrustRegionTrainer(None, args, read_training(vars(args)))
    assert trainer.train_dataset["row"][:] == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert len(trainer.reports) == 2
    plain = trainer_for(neox, tmp_path / "plain", rows(0, 4))
    assert len(plain.train_dataset) == 4 and len(plain.reports) == 1


def test_the_settings_reach_their_yaml(tmp_path):
    from lorat.settings.arguments import parse_config

    file = tmp_path / "run.yaml"
    base = f"model_name_or_path: m\noutput_dir: {tmp_path / 'o'}\nuse_cpu: true\n"
    file.write_text(
        base + "datasets:\n  - a.jsonl\n  - {name: b.csv, weight: 0.5, max_rows: 100}\ndataset_num_proc: 2\n"
    )
    args = parse_config(["--config", str(file)])
    assert (
        args.datasets == ["a.jsonl", {"name": "b.csv", "weight": 0.5, "max_rows": 100}] and args.dataset_num_proc == 2
    )
    assert args.dataset_name is None
    for written in (
        ["a.jsonl", "{name: b.csv, weight: 0.5, max_rows: 100}"],
        ["[a.jsonl, {name: b.csv, weight: 0.5, max_rows: 100}]"],
    ):
        assert parse_config(["--config", str(file), "--datasets", *written]).datasets == args.datasets
    for wrong in ("datasets: 5\ndataset_num_proc: 0\n", "datasets: [[a]]\n"):
        file.write_text(base + wrong)
        with pytest.raises(ConfigError, match=r"dataset_num_proc=0|nested list"):
            parse_config(["--config", str(file)])
    file.write_text(base)
    with pytest.raises(ConfigError, match="dataset_name is not given"):
        parse_config(["--config", str(file)])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"eval_dataset_name": "{}/no.jsonl"}, r"eval_dataset_name=.*no\.jsonl: there is no file"),
        ({"eval_dataset_split": "test"}, r"eval_dataset_split=test: .*a\.jsonl has no split 'test'"),
    ],
)
def test_wrong_evaluation_data_is_told_by_its_setting(tmp_path, settings, words):
    a = jsonl(tmp_path / "a.jsonl", rows(0, 2))
    settings = {key: value.format(tmp_path) for key, value in settings.items()} | {"dataset_name": a}
    with pytest.raises(DataError, match=words):
        read_evaluation(settings)
    assert read_evaluation({"dataset_name": a}) is None
    assert len(read_evaluation({"dataset_name": a, "eval_dataset_split": "train[:1]"})) == 1
    with pytest.raises(DataError, match="set eval_dataset_name"):
        read_evaluation({"datasets": [a], "eval_dataset_split": "test"})
