"""Files opened at little cost: the same rows as pyarrow's own, each footer parsed once, damage found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, rows
from support.recorded import recorded

from pipeline.analytics.query import query
from pipeline.analytics.scan import parquet_file
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.parquet_file import open_parquet, read_metadata
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.store import StreamStore

NAME = chunk_name("tracks", "a", 0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    StreamStore(tmp_path, "a").commit(0, 199, rows(0, 199), NO_EVENTS)
    return tmp_path


@pytest.fixture(params=["reader", "public"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's reader, and what is used where its version has none."""
    if request.param == "public":
        monkeypatch.setattr(parquet_file, "ParquetReader", None)


def opened(out: Path, tail_bytes: int = 1 << 13) -> parquet_file.ParquetFile:
    return open_parquet(open_files(out), NAME, (out / NAME).stat().st_size, tail_bytes)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("small", [1 << 15, 0])
@pytest.mark.parametrize("tail_bytes", [1 << 13, 100])
def test_rows_are_those_that_pyarrow_reads(
    out: Path, small: int, tail_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_file, "_SMALL_BYTES", small)
    expected = pq.read_table(out / NAME, partitioning=None)
    file = opened(out, tail_bytes)
    assert file.names == expected.schema.names
    assert file.metadata.metadata[b"xmem.stream_id"] == b"a"
    chosen = ["category", "frame_index", "mask_rle"]
    for found in (file.read(chosen), file.read_row_group(0, chosen)):
        assert found.select(chosen).equals(expected.select(chosen))
    assert file.read_row_group(0, []).num_rows == expected.num_rows


@pytest.mark.usefixtures("way")
def test_metadata_need_no_more_than_the_end(out: Path) -> None:
    size = (out / NAME).stat().st_size
    for tail_bytes in (100, 1 << 13, 1 << 20):
        found = read_metadata(open_files(out), NAME, size, tail_bytes)
        assert (found.num_rows, found.metadata[b"xmem.last"]) == (400, b"199")
    (out / NAME).write_bytes((out / NAME).read_bytes()[:-1])
    with pytest.raises(pa.ArrowInvalid, match="its end is missing"):
        read_metadata(open_files(out), NAME, size - 1, 100)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("small", [1 << 15, 0])
def test_damage_is_an_error(out: Path, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_file, "_SMALL_BYTES", small)
    data = (out / NAME).read_bytes()
    page = pq.read_metadata(out / NAME).row_group(0).column(4)
    at = page.dictionary_page_offset + page.total_compressed_size - 1
    wrong: list[tuple[bytes, type[Exception] | tuple[type[Exception], ...]]] = [
        (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], OSError),
        (data[:-1], pa.ArrowInvalid),
        (data[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1", (OSError, pa.ArrowException)),
        (data[:-300] + bytes(292) + data[-8:], (OSError, pa.ArrowException)),
    ]
    for changed, kind in wrong:
        (out / NAME).write_bytes(changed)
        with pytest.raises(kind):
            opened(out).read(["category"])


def test_the_view_of_streams_reads_little_of_each(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    part = LocalFiles.part

    def note(self: LocalFiles, name: str, start: int, end: int) -> bytes:
        read.append(end - start)
        return part(self, name, start, end)

    monkeypatch.setattr(LocalFiles, "part", note)
    StreamStore(out, "a").commit(200, 2199, rows(200, 2199), NO_EVENTS)
    assert query(out, "SELECT next_frame FROM streams")["next_frame"].to_pylist() == [2200]
    assert read == [1 << 13]


def test_a_footer_is_parsed_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("pyarrow's class parses it, and prepares for what is not needed")

    parsed: list[Any] = []
    monkeypatch.setattr(ChunkDataset, "joins_files", False)
    monkeypatch.setattr(pq, "read_metadata", recorded(pq.read_metadata, parsed))
    monkeypatch.setattr(pq, "ParquetFile", refused)
    assert query(out, "SELECT count(*) AS n FROM tracks")["n"].to_pylist() == [400]
    assert len(parsed) == 1


def test_a_footer_that_does_not_begin_like_one_is_an_error(out: Path) -> None:
    """pyarrow's inner function for it ends the process."""
    path = out / NAME
    data = bytearray(path.read_bytes())
    data[len(data) - 8 - int.from_bytes(data[-8:-4], "little")] ^= 1
    path.write_bytes(data)
    code = (
        "import sys; from pipeline import query\n"
        "try: query(sys.argv[1], 'FROM tracks')\nexcept Exception as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert (ended.returncode, NAME in ended.stdout) == (0, True), ended.stderr
