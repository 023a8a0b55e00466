"""`xmem query`: where the statement comes from, its memory limit, and how a result is printed."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from support.chunks import NO_EVENTS, rows

from jobs.cli import query
from jobs.cli.app import main
from pipeline.tracks.compaction import compact
from pipeline.tracks.store import StreamStore

COUNT = "SELECT count(*) AS n FROM tracks"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stream of 10 frames with 20 rows."""
    folder = tmp_path_factory.mktemp("query") / "out"
    StreamStore(folder, "cam-1").commit(0, 9, rows(0, 9), NO_EVENTS)
    return folder


def call(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    "sql",
    [
        f"-- rows of all streams\n{COUNT}",
        f"--rows\n{COUNT}",
        f"--\n-- two = lines\n{COUNT} -- of them\n",
        f"/* a comment */ {COUNT};",
    ],
)
def test_sql_that_begins_with_a_comment(out: Path, capsys: pytest.CaptureFixture[str], sql: str) -> None:
    for arguments in ((sql, "--format", "json"), ("--format", "json", sql), ("--format=json", "--", sql)):
        assert call("query", out, *arguments) == 0
        assert json.loads(capsys.readouterr().out) == [{"n": 20}]


def test_an_option_that_is_misspelt_is_no_sql(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("query", out, COUNT, "--formt", "csv") == 2
    assert "--formt" in error(capsys)


def test_sql_from_a_file_and_from_stdin(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "question.sql"
    file.write_text(f"-- in a file\n{COUNT};\n", encoding="utf-8-sig")
    assert call("query", out, "-f", file, "--format", "csv") == 0
    assert capsys.readouterr().out == "n\n20\n"
    for given in (["-"], ["-f", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"-- piped\n{COUNT}"))
        assert call("query", out, *given, "--format", "csv") == 0
        assert capsys.readouterr().out == "n\n20\n"


def test_no_statement_or_two_are_errors(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("query", out) == 2
    assert "no query is given: give SQL as an argument, --file FILE, or -" in error(capsys)
    assert call("query", out, COUNT, "-f", "question.sql") == 2
    assert "both a query and --file are given" in error(capsys)
    assert call("query", out, "-f", tmp_path / "absent.sql") == 2
    assert "absent.sql cannot be read: No such file" in error(capsys)
    (tmp_path / "binary.sql").write_bytes(b"\xff\xfe\x00S")
    assert call("query", out, "-f", tmp_path / "binary.sql") == 2
    assert "binary.sql cannot be read: it is not text in UTF-8" in error(capsys)


def test_a_memory_limit(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("query", out, COUNT, "--memory-limit", "200MB", "--format", "csv") == 0
    assert capsys.readouterr().out == "n\n20\n"
    assert call("query", out, COUNT, "--memory-limit", "much") == 2
    assert "memory limit 'much' is not a size: give a number with a unit, such as 500MB" in error(capsys)
    greedy = "SELECT a.range FROM range(4000000) a ORDER BY hash(a.range), a.range % 77"
    assert call("query", out, greedy, "--memory-limit", "8MB") == 2
    assert "needs more memory than the limit of 8MB" in error(capsys)
    assert not list(Path().glob("*.tmp")), "nothing is spilled to the working directory"


def test_a_piped_table_and_a_vertical_one(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = (
        "SELECT stream_id, frame_index, category FROM tracks WHERE object_id = 7 ORDER BY frame_index LIMIT 2"
    )
    assert call("query", out, sql) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [["cam-1", "|", "0", "|"], ["cam-1", "|", "1", "|", "dog"]]
    assert call("query", out, sql, "--format", "vertical") == 0
    assert capsys.readouterr().out.splitlines() == [
        "row 1------",
        "stream_id    cam-1",
        "frame_index  0",
        "category",
        "row 2------",
        "stream_id    cam-1",
        "frame_index  1",
        "category     dog",
    ]


@pytest.mark.parametrize("fmt", ["table", "vertical", "csv", "json"])
def test_a_reader_that_has_gone_ends_it_quietly(
    out: Path, fmt: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code = call("query", out, "SELECT * FROM tracks", "--format", fmt)
        monkeypatch.undo()
    assert code == 0
    assert capfd.readouterr().err == ""


def test_many_small_files_are_mentioned_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "_MANY_FILES", 3)
    out = tmp_path / "out"
    store = StreamStore(out, "cam-1")
    for first in range(0, 30, 10):
        store.commit(first, first + 9, rows(first, first + 9), NO_EVENTS)
    for terminal, sql, mentioned in (
        (False, COUNT, False),
        (True, COUNT, True),
        (True, f"{COUNT} WHERE frame_index > 10", False),
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert call("query", out, sql) == 0
        assert ("xmem compact" in capsys.readouterr().err) == mentioned
    compact(out)
    assert call("query", out, COUNT) == 0
    assert capsys.readouterr().err == ""
