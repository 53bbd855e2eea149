"""What is written is whole or not there, and lines are only appended: killed at any moment, nothing is lost or mixed."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from lorat import files
from lorat.errors import CheckpointError
from lorat.files import Lines, Pieces, append_lines, put, put_json, write_whole


class Stopped(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [Stopped, OSError(28, "No space left on device")], ids=["killed", "full"])
def test_whatever_happens_the_earlier_file_is_there(tmp_path, monkeypatch, moment, error):
    path = tmp_path / "result.json"
    put(path, "before")

    def stop(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", stop) if moment == "fsync" else (Path, "replace", stop)))
        with pytest.raises((Stopped, OSError)):
            put(path, "after")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["result.json"]
    put(path, b"after")
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["result.json"]


def test_a_link_is_followed_and_permissions_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    put(real, "a")
    real.chmod(0o640)
    link.symlink_to(real)
    put(link, "b")
    assert link.is_symlink() and real.read_text() == "b" and stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_that_any_has(tmp_path):
    (tmp_path / "plain").write_text("")
    put(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    put(pipe, "text")
    reader.join()
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_name_as_long_as_names_may_be(tmp_path):
    put(tmp_path / ("ü" * 127), "x")
    assert (tmp_path / ("ü" * 127)).read_text() == "x"


def test_json_and_results(tmp_path):
    put_json(tmp_path / "a.json", {"b": Path("x"), "a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1,\n "b": "x"\n}\n'
    write_whole(tmp_path / "new" / "out.txt", "lone surrogate: \udcff")
    assert (tmp_path / "new" / "out.txt").read_text() == "lone surrogate: ?"
    with pytest.raises(CheckpointError, match="cannot be written .* set --out"):
        write_whole(tmp_path / "a.json" / "x", "")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_whole(tmp_path / "new", "a folder lies there")
    with pytest.raises(OSError):
        put(tmp_path / "missing" / "x", "")


ROWS = [{"a": 1}, {"b": "über\u2028 x\n"}, {"c": [1.5, None]}]


def test_lines_torn_at_any_byte_lose_that_line_alone(tmp_path):
    path = tmp_path / "lines"
    append_lines(path, ROWS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = sum(end <= size or end == size + 1 for end in ends)  # all but its line's end: whole
        lines = Lines(path)
        assert lines.rows == ROWS[:expected] and lines.skipped == 0
        lines.append({"next": size})
        lines.close()
        assert Lines(path).rows == [*ROWS[:expected], {"next": size}]


def test_lines_that_are_none_of_ours_stay_and_are_counted(tmp_path):
    path = tmp_path / "lines"
    deep = b"[" * 100_000
    path.write_bytes(b'{"a": 1}\nnot json\n\n[1]\n\xff\xfe\n' + deep + b'\n{"b": "\xff"}\n')
    lines = Lines(path)
    assert lines.rows == [{"a": 1}, {"b": "\ufffd"}] and lines.skipped == 4
    lines.append({"c": 2})
    assert b"not json" in path.read_bytes() and path.read_bytes().endswith(b'{"c": 2}\n')


def test_each_line_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    synced = []
    lines = Lines(tmp_path / "lines")
    monkeypatch.setattr(files.os, "fsync", lambda handle: synced.append((tmp_path / "lines").read_text().count("\n")))
    lines.append({"a": 1})
    lines.append({"b": 1}, {"c": 1})
    assert synced == [1, 3]


def test_pieces_go_on_and_are_never_mixed(tmp_path):
    path = tmp_path / "part"
    pieces = Pieces(path, {"seed": 1, "n": (2, 3)})
    pieces["x"] = [1]
    with path.open("a") as file:
        file.write('{"y": ')
    again = Pieces(path, {"seed": 1, "n": [2, 3]})
    assert again["x"] == [1] and "y" not in again
    with pytest.raises(CheckpointError, match=r"seed: 1 then, 2 now.*--overwrite"):
        Pieces(path, {"seed": 2, "n": [2, 3]})
    assert json.loads(path.read_text().splitlines()[0]) == {"seed": 1, "n": [2, 3]}
    dropped = Pieces(path, {"seed": 2}, overwrite=True)
    assert dropped.done == {} and path.read_text() == '{"seed": 2}\n'
    dropped.remove()
    assert not path.exists()


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '"seed"\n'])
def test_pieces_leave_a_file_of_another_kind_alone(tmp_path, text):
    path = tmp_path / "part"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="first line is not lorat's"):
        Pieces(path, {"seed": 1})
    assert path.read_text() == text


def test_a_full_disk_is_said_and_the_pieces_before_are_kept(tmp_path, monkeypatch):
    pieces = Pieces(tmp_path / "part", {})
    pieces["x"] = 1

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="free space there, then run the same command to go on"):
        pieces["y"] = 2
    assert "y" not in pieces and pieces["x"] == 1
