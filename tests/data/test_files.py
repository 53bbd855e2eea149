"""Every kind of file, packed in every way, cell by cell as written; expected values from the literals and the standard library."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.json.json import JsonConfig

from lorat.data import shapes
from lorat.data.reading import load_preference_data
from lorat.data.shapes import Written, merged, shape
from lorat.errors import DataError
from tests.helpers.worlds import SHARED

CASES = SHARED / "cases"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["held", "two passes"])
def blocks(request, monkeypatch):
    """Files that are held whole, and files far larger than a block."""
    if request.param == "two passes":
        monkeypatch.setattr(shapes, "HELD", 100)
        monkeypatch.setattr(shapes, "CHUNK", 3)
        monkeypatch.setattr("lorat.data.json_rows.BLOCK", 16)
    return request.param


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def zipped(data, name="pairs"):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._pairs.jsonl", b"\x00\x05")
        archive.writestr(name, data)
    return sink.getvalue()


PAIRS = [{"prompt": f"q{i} ü", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(10)]
ODD = {
    "a number": 6,
    "not a number": float("inf"),
    "a boolean": True,
    "null": None,
    "a list": ["x", 1],
    "an object": {"b": 0.7, "a": [10**30, None]},
}


# --- cells as written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("place", [0, 7, 19])
def test_one_odd_cell_leaves_the_others_alone(tmp_path, blocks, odd, place):
    texts = ['"Yes"', "007", "null", "[1]", '{"a": 1}', "1e5", "", " x ", "NaN", "true"] * 2
    rows = [{"prompt": "p", "chosen": text} for text in texts]
    rows[place]["chosen"] = odd
    assert list(load_preference_data(jsonl(tmp_path / "x.jsonl", rows))) == rows
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=2))
    assert list(load_preference_data(str(tmp_path / "x.json"))) == rows


def test_not_a_number_among_texts(tmp_path, blocks):
    (tmp_path / "x.jsonl").write_text('{"chosen": "a"}\n{"chosen": NaN}\n{"chosen": "\\"b\\""}\n')
    read = load_preference_data(str(tmp_path / "x.jsonl"))["chosen"]
    assert (read[0], read[2]) == ("a", '"b"') and read[1] != read[1]


@pytest.mark.parametrize(
    "late",
    [
        {"new": "column"},
        {"a": None},
        {"a": 1},
        {"m": [{"role": "user", "content": "c", "name": "n"}]},
        {"m": []},
        {"m": "t"},
    ],
)
def test_a_late_row_of_another_shape_reads_as_an_early_one(tmp_path, blocks, late):
    plain = {"a": "text", "m": [{"role": "user", "content": "c"}]}
    first, last = [plain | late] + [plain] * 30, [plain] * 30 + [plain | late]
    read = [load_preference_data(jsonl(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate((first, last))]
    assert read[0].features == read[1].features
    columns = {**plain, **late}
    for data, rows in zip(read, (first, last)):
        assert list(data) == [{c: row.get(c) for c in columns} for row in rows]


def test_the_order_of_keys_and_missing_keys_are_kept(tmp_path, blocks):
    calls = [{"x": 0.7, "y": 1}, {"y": 1.0, "x": None}, {"x": 2}, {}]
    rows = [{"prompt": "p", "tools": [{"arguments": call}]} for call in calls]
    read = list(load_preference_data(jsonl(tmp_path / "x.jsonl", rows)))
    assert [json.dumps(row) for row in read] == [json.dumps(row) for row in rows]


@pytest.mark.parametrize(
    "a, b, both",
    [
        ("x", None, "text"),
        (1, 2, "int"),
        (1, 1.5, "any"),
        (1, True, "any"),
        ([], ["x"], ("list", "text")),
        ([1], ["x"], "any"),
        ({"a": 1}, {"a": None}, ("object", ("a",), ("int",))),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "any"),
        (2**63, 1, "any"),
        ([None], [{"a": "b"}], ("list", ("object", ("a",), ("text",)))),
    ],
)
def test_shapes_hold_both_to_the_letter(a, b, both):
    assert merged(shape(a), shape(b)) == merged(shape(b), shape(a)) == both


def test_texts_are_plain_columns_and_written_ones_go_through_everything(tmp_path):
    rows = [{"a": "x", "b": '"x"'}, {"a": "y", "b": 7}]
    data = load_preference_data(jsonl(tmp_path / "x.jsonl", rows))
    assert data.features["a"] == datasets.Value("string") and data.features["b"] == Written()
    assert data.map(lambda row: {"c": repr(row["b"])}, remove_columns=["b"])["c"][:] == ["'\"x\"'", "7"]
    assert list(datasets.concatenate_datasets([data.select([1, 0]), data])) == [*rows[::-1], *rows]
    assert list(data.filter(lambda row: row["b"] == 7)) == rows[1:]
    data.save_to_disk(tmp_path / "saved")
    assert list(load_preference_data(str(tmp_path / "saved"))) == rows


def test_the_shared_case_of_one_number():
    path = CASES / "5_one_number_rewrites_text.jsonl"
    if not path.exists():
        pytest.skip("the shared cases are not beside the project")
    data = load_preference_data(str(path))
    assert data["chosen"][:] == ['"Yes"', "007", 6] and data["rejected"][:] == ["No", "No", "five"]


# --- how files are laid out and packed ---------------------------------------------------------------------------

PACKINGS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".zst": zstd,
    ".zip": zipped,
}


@pytest.mark.parametrize("packed", PACKINGS)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"])
def test_every_kind_in_every_packing(tmp_path, ending, packed):
    if ending == ".parquet":
        Dataset.from_list(PAIRS).to_parquet(tmp_path / "plain")
        data = (tmp_path / "plain").read_bytes()
    elif ending in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, PAIRS[0], delimiter="," if ending == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(PAIRS)
        data = text.getvalue().encode()
    elif ending == ".json":
        data = json.dumps(PAIRS).encode()
    else:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in PAIRS).encode()
    path = tmp_path / f"pairs{ending}{packed}"
    path.write_bytes(PACKINGS[packed](data))
    assert list(load_preference_data(str(path))) == PAIRS
    assert list(load_preference_data(str(path), "train[-3:]")) == PAIRS[-3:]


@pytest.mark.parametrize(
    "name, packed", [("x.jsonl", ".gz"), ("x.jsonl.gz", ".zst"), ("x.jsonl.gz", ""), ("x.jsonl.zip", ".xz")]
)
def test_the_bytes_say_how_a_file_is_packed(tmp_path, name, packed):
    data = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
    (tmp_path / name).write_bytes(PACKINGS[packed](data))
    assert list(load_preference_data(str(tmp_path / name))) == PAIRS


def test_archives_of_several_members_are_read_to_their_end(tmp_path):
    """As `cat a.gz b.gz`, pigz and pbzip2 write them."""
    halves = ["".join(json.dumps(row) + "\n" for row in half).encode() for half in (PAIRS[:5], PAIRS[5:])]
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"x.jsonl{packed}"
        path.write_bytes(b"".join(map(PACKINGS[packed], halves)))
        assert list(load_preference_data(str(path))) == PAIRS, packed


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(json.dumps(row, indent=3) for row in PAIRS),  # as jq writes it
        "\r\n".join(json.dumps(row) for row in PAIRS),
        "\ufeff" + "\n".join(json.dumps(row) for row in PAIRS) + "\n\n",
        "\ufeff \n" + json.dumps(PAIRS, indent=1),
        "[" + " , ".join(json.dumps(row) for row in PAIRS) + "]  \n",
    ],
)
def test_json_however_it_is_laid_out(tmp_path, blocks, text):
    (tmp_path / "x.json").write_text(text, newline="", encoding="utf-8")
    assert list(load_preference_data(str(tmp_path / "x.json"))) == PAIRS


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    rows = [{"chosen": "a\u2028b\x85c\u2029"}]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(load_preference_data(str(tmp_path / "x.jsonl"))) == rows


def test_csv_columns_of_numbers_and_booleans(tmp_path, blocks):
    """A column is one of numbers where each of its cells, of the whole file, is written so; names of texts stay text."""
    header = "prompt,label,flag,score,code,mixed,note\n"
    rows = ["1,1,True,0.5,007,1,\n", "2,-1,False,1.0,008,2,\n"] * 20 + ["3,,True,2.5,9,two,\n"]
    (tmp_path / "x.csv").write_text(header + "".join(rows))
    read = list(load_preference_data(str(tmp_path / "x.csv")))
    tail = {"code": "007", "mixed": "1", "note": ""}
    assert read[0] == {"prompt": "1", "label": 1, "flag": True, "score": 0.5} | tail
    assert read[1]["label"] == -1 and read[1]["flag"] is False
    tail = {"code": "9", "mixed": "two", "note": ""}
    assert read[40] == {"prompt": "3", "label": None, "flag": True, "score": 2.5} | tail


def test_csv_cells_with_line_breaks_and_quotes(tmp_path, blocks):
    rows = [{"prompt": 'say "hi",\nplease\r\n', "chosen": "a\tb", "rejected": " "}] * 5
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert list(load_preference_data(str(tmp_path / "x.csv"))) == rows


# --- several files -----------------------------------------------------------------------------------------------


def test_a_pattern_reads_its_files_in_order(tmp_path, blocks):
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "b.jsonl", [{"a": 1, "b": "x"}])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": "1"}\n{"a": "\\"2\\""}'))
    jsonl(tmp_path / "deep/c.ndjson", [{"a": None}])
    (tmp_path / "note.txt").write_text("no data")
    expected = [{"a": "1", "b": None}, {"a": '"2"', "b": None}, {"a": 1, "b": "x"}]
    assert list(load_preference_data(str(tmp_path / "*"))) == expected
    everything = load_preference_data(str(tmp_path / "**/*"), "train[1:]")
    assert list(everything) == [*expected[1:], {"a": None, "b": None}]


def test_a_pattern_of_parquet_files(tmp_path):
    for n in range(2):
        Dataset.from_list(PAIRS[5 * n : 5 * n + 5]).to_parquet(tmp_path / f"{n}.parquet")
    assert list(load_preference_data(str(tmp_path / "?.parquet"))) == PAIRS


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert list(load_preference_data(jsonl(tmp_path / "x[1].jsonl", PAIRS))) == PAIRS


def test_splits_are_added_and_only_what_is_asked_for_is_read(tmp_path):
    jsonl(tmp_path / "train.jsonl", PAIRS[:4])
    jsonl(tmp_path / "test.jsonl", PAIRS[4:])
    (tmp_path / "validation.jsonl").write_text("{")
    assert list(load_preference_data(str(tmp_path), "test[1:]+train[:1]")) == [*PAIRS[5:], PAIRS[0]]


def test_a_folder_names_what_it_does_not_read(tmp_path, caplog):
    jsonl(tmp_path / "train.jsonl", PAIRS)
    jsonl(tmp_path / "more.jsonl", PAIRS)
    assert list(load_preference_data(str(tmp_path))) == PAIRS
    assert "not read: more.jsonl" in caplog.text


def test_json_of_the_hub_is_read_as_written_too(tmp_path, monkeypatch):
    """`datasets` finds and downloads the files; they lie under names of its own."""
    rows = [{"chosen": '"Yes"'}, {"chosen": 6}]
    jsonl(tmp_path / "blob", rows)
    config = JsonConfig(data_files=DataFilesDict(test=DataFilesList(["hf://datasets/o/n@1/test.jsonl"], [()])))
    builder = SimpleNamespace(name="json", config=config)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a: builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda self, urls: [str(tmp_path / "blob") for _ in urls])
    assert list(load_preference_data("o/n", "test")) == rows
    with pytest.raises(DataError, match=r"no split 'train'.*\['test'\]"):
        load_preference_data("o/n")


def test_a_dataset_of_the_hub_is_there_without_a_network(tmp_path, monkeypatch, caplog):
    builder = SimpleNamespace(name="json", config=JsonConfig())
    builder.config.data_files = {"train": ["hf://datasets/o/n@1/train.jsonl"]}
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda self, urls: [str(tmp_path / "blob") for _ in urls])

    def hub(reached):
        def found(*_):
            if not reached:
                raise ConnectionError("no route to the hub")
            return builder

        monkeypatch.setattr(datasets, "load_dataset_builder", found)

    jsonl(tmp_path / "blob", PAIRS)
    hub(False)
    with pytest.raises(DataError, match="no route to the hub"):
        load_preference_data("o/n")
    for rows in (PAIRS, PAIRS[:3]):  # a later version takes the place of an earlier one
        jsonl(tmp_path / "blob", rows)
        hub(True)
        assert list(load_preference_data("o/n")) == rows
        hub(False)
        assert list(load_preference_data("o/n")) == rows and "the hub was not reached" in caplog.text
    with pytest.raises(DataError, match="no route to the hub"):
        load_preference_data("o/n", "train", "another configuration")
    (tmp_path / "blob").unlink()
    with pytest.raises(DataError, match="no route to the hub"):
        load_preference_data("o/n")


def test_large_files_are_read_once_and_a_torn_copy_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "HELD", 100)
    path = jsonl(tmp_path / "x.jsonl", PAIRS)
    assert list(load_preference_data(path)) == PAIRS
    (copy,) = (tmp_path / "cache/lorat").glob("read-*/rows.arrow")
    read = []
    import lorat.data.reading as reading

    plain = reading.read_json
    monkeypatch.setattr(reading, "read_json", lambda *a: read.append(a) or plain(*a))
    assert list(load_preference_data(path)) == PAIRS and not read
    whole = copy.read_bytes()
    for torn in (whole[:-20], whole[:100] + b"?" + whole[101:]):
        copy.write_bytes(torn)
        assert list(load_preference_data(path)) == PAIRS and len(read) == 2
        read.clear()
    jsonl(tmp_path / "x.jsonl", PAIRS[::-1])
    assert list(load_preference_data(path)) == PAIRS[::-1]
