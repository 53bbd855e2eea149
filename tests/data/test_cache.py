"""What was prepared is kept by its content: used when nothing changed, made again when anything did, never when torn."""

import json
import pickle
import time

import datasets
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lorat.data import cache
from lorat.data import prepare as module
from lorat.data.columns import RowSettings
from lorat.data.prepare import prepare
from lorat.data.tokenization import encode
from lorat.errors import DataError
from tests.helpers.worlds import make_pairs, make_tokenizer

CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """`prepared(rows, tokenizer, **settings)` -> (rows, report, whether anything was tokenised)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "LEAST", 1)
    calls = []
    monkeypatch.setattr(module, "encode", lambda *a: calls.append(1) or encode(*a))

    def prepared(data=None, tokenizer=None, **settings):
        calls.clear()
        data = Dataset.from_list(make_pairs(12)) if data is None else data
        result, report = prepare(data, tokenizer or make_tokenizer(), **{"method": "dpo", "max_length": 64} | settings)
        return list(result), report, bool(calls)

    prepared.folder = tmp_path / "cache/lorat"
    return prepared


def test_the_second_time_nothing_is_tokenised_and_all_is_the_same(world):
    odd = Dataset.from_list([*make_pairs(12), {"prompt": "cat", "chosen": " dog", "rejected": " dog"}])
    rows, report, work = world(odd, max_length=10)
    again, same, none = world(odd, max_length=10, name="held out", num_proc=2)
    assert (work, none) == (True, False)
    assert again == rows and same.name == "held out"
    same.name = report.name
    assert same == report and report.dropped and report.completions_cut + report.prompts_cut
    assert same.render() == report.render()


def other_tokenizer(**changes) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    return tokenizer


CHANGES = {
    "a cell": lambda: {"data": Dataset.from_list([*make_pairs(11), {"prompt": "a", "chosen": "b", "rejected": "c"}])},
    "their order": lambda: {"data": Dataset.from_list(make_pairs(12)).select(range(11, -1, -1))},
    "max_length": lambda: {"max_length": 63},
    "max_prompt_length": lambda: {"max_prompt_length": 60},
    "overlong": lambda: {"overlong": "drop"},
    "method": lambda: {"method": "kto"},
    "columns": lambda: {"rows": RowSettings(columns={"chosen": "rejected", "rejected": "chosen"})},
    "end of text": lambda: {"tokenizer": other_tokenizer(eos_token="<pad>")},
    "template": lambda: {"tokenizer": other_tokenizer(chat_template=CHAT)},
    "a word": lambda: {"tokenizer": other_tokenizer() if not (t := other_tokenizer()).add_tokens(["zebra"]) else t},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_the_rows_makes_them_again(world, change):
    world()
    assert world(**change())[2]
    assert not world(**change())[2] and not world()[2]


def test_the_same_cells_are_known_however_they_lie(world, tmp_path):
    pairs = Dataset.from_list(make_pairs(12))
    world(pairs)
    in_pieces = datasets.concatenate_datasets([pairs.select(range(5)), pairs.select([5]), pairs.select(range(6, 12))])
    pairs.save_to_disk(tmp_path / "saved")
    turned = pairs.select(range(11, -1, -1)).select(range(11, -1, -1))
    for same in (in_pieces, datasets.load_from_disk(str(tmp_path / "saved")), turned):
        assert not world(same)[2]


@pytest.mark.parametrize("file", ["rows.arrow", "report.json", "sealed.json"])
@pytest.mark.parametrize("harm", [lambda b: b[:-9], lambda b: b"", lambda b: b[:40] + b"#" + b[41:], None])
def test_a_torn_entry_is_never_used(world, file, harm):
    rows, report, _ = world()
    (entry,) = world.folder.glob("prepared-*")
    path = entry / file
    path.write_bytes(harm(path.read_bytes())) if harm else path.unlink()
    again, same, work = world()
    assert work and (again, same) == (rows, report)
    assert not world()[2]


def test_an_entry_is_there_whole_or_not_at_all(world, monkeypatch):
    plain = module._write

    def killed(folder, *rest):
        plain(folder, *rest)
        (folder / "report.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        world()
    assert list(world.folder.iterdir()) == []


def test_work_goes_on_where_nothing_can_be_kept(world, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    rows, _, work = world()
    assert len(rows) == 12 and work and "is not kept" in caplog.text


def test_small_data_is_not_kept(world, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 13)
    assert world()[2] and world()[2] and not world.folder.exists()


def test_refusals_are_not_kept(world):
    equal = Dataset.from_list([{"prompt": "a", "chosen": "cat", "rejected": "cat"}] * 12)
    for _ in range(2):
        with pytest.raises(DataError, match="equals"):
            world(equal)


def test_what_nobody_used_for_a_month_goes(world, monkeypatch):
    world()
    world(max_length=20)
    later = time.time() + 20 * 86400
    monkeypatch.setattr(cache.time, "time", lambda: later)
    (old,) = [
        e
        for e in world.folder.iterdir()
        if json.loads((e / "report.json").read_text())["longest"] and e != _newest(world)
    ]
    import os

    os.utime(old, (later - 31 * 86400,) * 2)
    world(max_length=30)
    assert not old.exists() and len(list(world.folder.iterdir())) == 2


def _newest(world):
    return max(world.folder.iterdir(), key=lambda e: (e / "sealed.json").stat().st_mtime_ns)


def test_nothing_that_could_run_is_stored(world):
    world()
    files = [f for f in world.folder.rglob("*") if f.is_file()]
    assert {f.name for f in files} == {"rows.arrow", "report.json", "sealed.json"}
    for file in files:
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(file.read_bytes())
