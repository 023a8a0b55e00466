"""`xmem compact`: what it says, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chunks import NO_EVENTS, rows

from jobs.cli.app import main
from pipeline.analytics.query import query
from pipeline.tracks.store import StreamStore


def call(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_it_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stream_id in ("a", "b"):
        for first in (0, 5):
            StreamStore(tmp_path, stream_id).commit(first, first + 4, rows(first, first + 4), NO_EVENTS)
    assert call("compact", tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4 files with 40 rows compacted into 1" in captured.err
    (tmp_path / "tracks/stream_id=b/frames-000000000010.parquet").write_bytes(b"PAR1")
    for first in (10, 15):
        StreamStore(tmp_path, "a").commit(first, first + 4, rows(first, first + 4), NO_EVENTS)
    assert call("compact", tmp_path, "--megabytes", 1) == 1
    error = capsys.readouterr().err
    assert "2 files with 20 rows compacted into 1" in error
    assert "xmem: error: not compacted, since files are missing or damaged: b" in error
    assert query(tmp_path, "SELECT count(*) n FROM tracks WHERE stream_id = 'a'")["n"].to_pylist() == [40]
    assert call("compact", tmp_path / "nowhere") == 2
    assert "is no output folder of xmem" in capsys.readouterr().err
