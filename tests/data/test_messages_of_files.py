"""Files that hold no rows: each is told for what it is, and what the message suggests is done here and works."""

import bz2
import csv
import gzip
import json
import lzma
import re
import shutil
import subprocess
import sys
import zipfile

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset

from lorat.data import archives
from lorat.data.reading import load_preference_data
from lorat.errors import DataError
from tests.data.test_files import PACKINGS, PAIRS, jsonl, zipped
from tests.helpers.worlds import SHARED

CASES = SHARED / "cases"
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def refused(path, split="train", config=None) -> str:
    with pytest.raises(DataError) as caught:
        load_preference_data(str(path), split, config)
    text = str(caught.value)
    for raw in ("Error:", "Traceback", "Exception"):
        assert raw not in text.replace("BadGzipFile: ", "") or "archive" in text
    return text


def follow(message: str, folder) -> str:
    """Runs the command that a message ends in, and gives the file that it wrote."""
    command = re.search(r"(?:python -c|iconv) .*", message, re.DOTALL)[0].rstrip(".")
    before = set(folder.iterdir())
    command = command.replace("python", sys.executable, 1) if command.startswith("python") else command
    subprocess.run(command, shell=True, check=True, cwd=folder)
    (new,) = set(folder.iterdir()) - before
    assert str(new) in message
    return str(new)


# --- broken archives ---------------------------------------------------------------------------------------------


def cut(data):
    return data[: len(data) * 2 // 3]


def scrambled(data):
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0x5A for b in data[middle : middle + 40]) + data[middle + 40 :]


@pytest.mark.parametrize("harm", [cut, scrambled, lambda data: data[:12]])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("packed", [p for p in PACKINGS if p])
def test_a_broken_archive(tmp_path, packed, ending, harm):
    text = {"": "", ".jsonl": LINES * 30, ".json": json.dumps(PAIRS * 30)}.get(ending)
    if text is None:
        text = "prompt,chosen,rejected\n" + "".join(f"q{i} {i * i},{i**3},{i**5}\n" for i in range(400))
    path = tmp_path / f"x{ending}{packed}"
    path.write_bytes(harm(PACKINGS[packed](text.encode())))
    message = refused(path)
    assert str(path) in message and ("broken" in message or "damaged" in message or "empty" in message), message
    assert re.search(r"again|damaged", message)


@pytest.mark.parametrize("packed", PACKINGS)
@pytest.mark.parametrize("harm", [cut, lambda data: b"PAR1" + data[:40], lambda data: b"nothing" * 9])
def test_a_broken_parquet_file(tmp_path, packed, harm):
    Dataset.from_list(PAIRS).to_parquet(tmp_path / "plain")
    path = tmp_path / f"x.parquet{packed}"
    path.write_bytes(PACKINGS[packed](harm((tmp_path / "plain").read_bytes())))
    assert re.search(r"x\.parquet.*(Parquet).*again", refused(path))


def test_something_else_under_the_name_of_an_archive(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(bytes(range(256)))
    assert "is named .gz, but what is in it is not packed so" in refused(tmp_path / "x.jsonl.gz")


def test_zip_archives_of_no_one_file(tmp_path):
    path = tmp_path / "x.jsonl.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train.jsonl", "test.jsonl"):
            archive.writestr(name, LINES)
    message = refused(path)
    assert (
        "holds 2 files (train.jsonl, test.jsonl)" in message
        and "Unpack it and give one of them, or the folder" in message
    )
    shutil.unpack_archive(path, tmp_path / "unpacked")
    for name in ("unpacked", "unpacked/test.jsonl"):
        assert list(load_preference_data(str(tmp_path / name))) == PAIRS
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", "")
    assert "holds no file" in refused(path)


def test_a_zip_with_a_password(tmp_path):
    data = bytearray(zipped(LINES))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):  # the flag of both headers of the last member
        place = data.rfind(mark)
        data[place + (6 if mark == b"PK\x03\x04" else 8)] |= 1
    (tmp_path / "x.jsonl.zip").write_bytes(bytes(data))
    assert "with a password" in refused(tmp_path / "x.jsonl.zip")


# --- no data at all ----------------------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 875191\n"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl", "x.csv", "x.parquet", "x.json.zst", "x.parquet.gz"])
@pytest.mark.parametrize(
    "content, words",
    [
        (LFS, ["Git LFS pointer", "875,191 bytes", "git lfs pull"]),
        ("/annex/objects/MD5E-s1--00.jsonl\n", ["git-annex pointer", "git annex get"]),
        ("<!DOCTYPE html>\n<html></html>", ["web page", "/resolve/"]),
        ("\n <HTML>", ["web page"]),
        ("", ["empty", "give a file with rows"]),
    ],
)
@pytest.mark.parametrize("how", ["file", "pattern", "folder"])
def test_what_stands_in_place_of_data(tmp_path, name, content, words, how):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text(content)
    message = refused({"file": tmp_path / "d" / name, "pattern": tmp_path / "d" / "*", "folder": tmp_path / "d"}[how])
    assert [word for word in words if word not in message] == [] and name in message


def test_the_shared_pointer():
    path = CASES / "6_lfs_pointer.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared cases are not beside the project")
    assert "git lfs pull" in refused(path)


@pytest.mark.parametrize(
    "name, content", [("x.jsonl", " \n\n"), ("x.json", "[]"), ("x.json", " [ ] "), ("x.csv", "\n"), ("x.csv", "a,b\n")]
)
def test_files_without_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "empty" in refused(tmp_path / name)


# --- encodings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json", ".tsv"])
def test_other_encodings_are_named_with_the_command_that_converts_them(tmp_path, encoding, ending):
    if not shutil.which("iconv"):
        pytest.skip("the messages suggest iconv, which is not here")
    letter = "\x81" if encoding == "latin-1" else "’" if encoding == "cp1252" else "é"
    rows = [{"prompt": f"caf{letter}", "chosen": "oui", "rejected": "non"}] * 3
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if ending == ".json":
        text = json.dumps(rows, ensure_ascii=False)
    elif ending != ".jsonl":
        text = "\n".join(
            ("\t" if ending == ".tsv" else ",").join(line) for line in ([*rows[0]], *(r.values() for r in rows))
        )
    (tmp_path / f"x{ending}").write_bytes(text.encode(encoding))
    message = refused(tmp_path / f"x{ending}")
    named = {"cp1252": "WINDOWS-1252", "latin-1": "ISO-8859-1"}.get(encoding, encoding.split("-")[0].upper())
    assert named in message and "UTF-8" in message
    assert list(load_preference_data(follow(message, tmp_path))) == rows


def test_one_broken_byte_is_not_taken_for_another_encoding(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINES.encode() + b'{"prompt": "\xff"}\n')
    message = refused(tmp_path / "x.jsonl")
    assert "line 11 is not UTF-8" in message and "10 other lines are" in message and "iconv" not in message


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\x01\xff\x02"}\n')
    assert "no text" in refused(tmp_path / "x.jsonl")


# --- JSON --------------------------------------------------------------------------------------------------------

FRAMES = {
    "a key around the rows": {"version": 1, "data": PAIRS},
    "columns of cells": {c: [row[c] for row in PAIRS] for c in PAIRS[0]},
    "columns with an index": {c: {str(i): row[c] for i, row in enumerate(PAIRS)} for c in PAIRS[0]},
    "an index of rows": {str(i): row for i, row in enumerate(PAIRS)},
    "columns and data apart": {
        "columns": [*PAIRS[0]], "index": [*range(10)], "data": [[*row.values()] for row in PAIRS],
    },
    "a table with its schema": {"schema": {"fields": []}, "data": PAIRS},
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.json.bz2", "x.json.xz"])
def test_json_that_is_no_list_of_rows(tmp_path, frame, indent, name):
    """As pandas writes tables, and as many downloads hold theirs."""
    data = json.dumps(frame, indent=indent, ensure_ascii=False).encode()
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(packed(data))
    message = refused(tmp_path / name)
    assert str(tmp_path / name) in message and "10" in message and "rows are needed" in message
    assert list(load_preference_data(follow(message, tmp_path))) == PAIRS


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "gpt", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        {"messages": [{"role": "user", "content": "q"}]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "meta": [{"x": 1}]},
    ],
)
def test_a_file_of_a_single_row_is_that_row(tmp_path, row):
    for text in (json.dumps(row), json.dumps(row, indent=2), json.dumps([row])):
        (tmp_path / "x.json").write_text(text)
        assert list(load_preference_data(str(tmp_path / "x.json"))) == [row]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", '{"a": "b"}\n' + "[" * 9999, ["line 2 is nested too deep"]),
        ("x.json", "[" * 9999, ["row 0 is nested too deep"]),
        ("x.json", '[{"a": ' + '{"b": ' * 9999, ["row 0 is nested too deep"]),
        ("x.jsonl", '{"a": "b"}\n{"a": "x", "a": "y"}\n', ["line 2", "'a' stands twice"]),
        ("x.jsonl", '{"a": "\\ud83d"}\n', ["line 1", "half of a character"]),
        ("x.json", '[{"a": "b"}, ["c"]]', ["row 1 is a list, not an object"]),
        ("x.json", '["a", "b"]', ["row 0 is text, not an object"]),
        ("x.jsonl", '"a"\n', ["line 1 is text"]),
        ("x.jsonl", "{'a': 'b'}\n", ["line 1 is not valid JSON", "{'a'"]),
        ("x.jsonl", '{"a": "b"} {"a": "c"}\n', ["line 1 is not valid JSON (Extra data"]),
        ("x.jsonl", '{"a": "b"},\n{"a": "c"},\n', ["line 1 is not valid JSON (Extra data"]),
        ("x.json", '[{"a": "b"}', ["line 1 is not valid JSON", "delimiter"]),
        ("x.json", '[{"a": "b"},', ["not valid JSON"]),
        ("x.json", '[{"a": "b"}]\n[{"a": "c"}]', ["line 2 is not valid JSON", "end of the file"]),
        ("x.json", '{\n "a": "b"\n "c"}', ["line 3 is not valid JSON", "delimiter"]),
    ],
)
def test_json_with_a_fault_in_it(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    message = refused(tmp_path / name)
    assert [word for word in [str(tmp_path / name), *words] if word not in message] == []
    assert "correct or delete" in message


# --- CSV ---------------------------------------------------------------------------------------------------------


def table(path, rows, delimiter, head=""):
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(head)
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    "name, delimiter, head",
    [("x.csv", ";", ""), ("x.tsv", ";", ""), ("x.csv", "|", ""), ("x.csv", ";", "sep=;\n"), ("x.csv", ";", "\ufeff")],
)
def test_other_separators(tmp_path, name, delimiter, head):
    rows = [row | {"chosen": 'with "quotes",\nand; more|'} for row in PAIRS]
    message = refused(table(tmp_path / name, rows, delimiter, head))
    assert ("semicolons" if delimiter == ";" else "bars") in message
    assert list(load_preference_data(follow(message, tmp_path))) == rows


@pytest.mark.parametrize("name, delimiter, new", [("x.csv", "\t", "x.tsv"), ("x.tsv", ",", "x.csv")])
def test_the_wrong_one_of_two_endings(tmp_path, name, delimiter, new):
    path = table(tmp_path / name, PAIRS, delimiter)
    assert f"rename it to {new}." in refused(path)
    path.rename(tmp_path / new)
    assert list(load_preference_data(str(tmp_path / new))) == PAIRS


@pytest.mark.parametrize(
    "content, words",
    [
        ("a,b\n1,2\n3\n", ["line 3 has 1 cells, but the header has 2"]),
        ('a,b\n1,2\n"3,4\n5,6\n', ["the row that begins in line 3", "double quotes"]),
        ('a,b\n"1"x,2\n', ["line 2", "double quote"]),
        ("a,b,a\n1,2,3\n", ["['a'] stand twice"]),
    ],
)
def test_csv_with_a_fault_in_it(tmp_path, content, words):
    (tmp_path / "x.csv").write_text(content)
    message = refused(tmp_path / "x.csv")
    assert [word for word in words if word not in message] == []


MESSAGES = {
    "prompt": [{"role": "user", "content": 'it\'s "hi"\n'}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "note": "[INST]",
}


def test_messages_that_pandas_wrote_as_text(tmp_path):
    cells = {key: str(value) for key, value in MESSAGES.items()}
    message = refused(table(tmp_path / "x.csv", [cells] * 2, ","))
    assert "'prompt' look like messages written as text" in message
    assert list(load_preference_data(follow(message, tmp_path))) == [MESSAGES] * 2


def test_the_shared_messages_in_csv():
    path = CASES / "11_messages_in_csv.csv"
    if not path.exists():
        pytest.skip("the shared cases are not beside the project")
    assert "look like messages written as text" in refused(path)


# --- names -------------------------------------------------------------------------------------------------------


def test_a_folder_with_several_configurations(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"
    )
    jsonl(tmp_path / "a.jsonl", PAIRS[:3])
    jsonl(tmp_path / "b.jsonl", PAIRS[3:])
    message = refused(tmp_path)
    assert "['one', 'two']" in message and "set dataset_config_name" in message
    assert list(load_preference_data(str(tmp_path), "train", "two")) == PAIRS[3:]
    assert "has no configuration 'three'; it has ['one', 'two']" in refused(tmp_path, config="three")
    assert "has no configurations" in refused(tmp_path / "a.jsonl", config="one")


@pytest.mark.parametrize(
    "name, words",
    [
        ("*.jsonl", "no file of data fits"),
        ("*.txt", r"no file of data fits .*\(it fits note.txt\)"),
        ("https://example.org/x.jsonl", "is an address; download the file"),
        ("no.jsonl", "there is no file or folder"),
        ("note.txt", "of no type that can be read"),
        ("empty", "holds no files of data"),
    ],
)
def test_names_of_nothing(tmp_path, name, words):
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert re.search(words, refused(name if "://" in name else tmp_path / name))


def test_files_of_two_kinds_in_a_pattern(tmp_path):
    jsonl(tmp_path / "a.jsonl", PAIRS)
    table(tmp_path / "b.csv", PAIRS, ",")
    assert "different kinds" in refused(tmp_path / "*")
    assert list(load_preference_data(str(tmp_path / "*.csv"))) == PAIRS


def test_every_ending_that_is_named_is_read(tmp_path):
    for ending in (*archives.SUFFIXES, *archives.PACKED):
        assert ending in archives.READABLE


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "x.jsonl", PAIRS)

    def no(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archives.Path, "open", no)
    assert "check its permissions" in refused(path)


def test_zstd_is_read_without_a_library_of_its_own():
    assert pa.Codec.is_available("zstd")
