"""An opened output folder in Python: SQL, tables, the dataset of its files, masks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.chunks import NO_EVENTS, events, rows

from pipeline import Archive, open_archive
from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.masks import mask_to_rle
from pipeline.tracks.store import StreamStore


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Streams a and b of two files of ten rows each."""
    for stream_id in ("a", "b"):
        store = StreamStore(tmp_path / "out", stream_id)
        store.commit(0, 4, rows(0, 4), events(2))
        store.commit(5, 9, rows(5, 9), NO_EVENTS)
    return tmp_path / "out"


@pytest.fixture
def archive(out: Path) -> Any:
    with open_archive(out) as opened:
        yield opened


SQL = "SELECT stream_id, sum(area) AS area FROM tracks GROUP BY ALL ORDER BY ALL"
AREA = sum(rows(0, 9)["area"].to_pylist())


def test_answers_as_pyarrow_pandas_and_a_relation(archive: Archive, out: Path) -> None:
    expected = {"stream_id": ["a", "b"], "area": [AREA, AREA]}
    assert archive.arrow(SQL).to_pydict() == expected
    frame = archive.pandas(SQL)
    assert isinstance(frame, pandas.DataFrame)
    assert frame["area"].tolist() == expected["area"]
    relation = archive.sql(SQL)
    assert relation.filter("stream_id = 'b'").fetchall() == [("b", AREA)]
    assert archive.connection.sql("SELECT count(*) FROM streams").fetchall() == [(2,)]
    assert archive.streams == ["a", "b"]
    assert repr(archive) == f"Archive('{out}')"


def test_polars(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import polars
    except ImportError:
        with pytest.raises(
            UsageError, match=r"polars is not installed: pip install polars, or use Archive\.arrow"
        ):
            archive.polars(SQL)
    else:
        assert isinstance(archive.polars(SQL), polars.DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pandas is not installed"):
        archive.pandas(SQL)


def test_an_archive_answers_again_after_an_error(archive: Archive, out: Path) -> None:
    path = out / chunk_name("tracks", "a", 5)
    data = path.read_bytes()
    path.write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"frames-000000000005\.parquet cannot be read"):
        archive.arrow(SQL)
    with pytest.raises(UsageError, match=r"not found.*\(views: tracks, events, streams, .*masks\)"):
        archive.arrow("SELECT nothing FROM tracks")
    path.write_bytes(data)
    assert archive.arrow(SQL)["area"].to_pylist() == [AREA, AREA]
    for statement in ("DROP VIEW tracks", "COPY tracks TO 'x.csv'"):
        for ask in (archive.sql, archive.arrow, archive.pandas):
            with pytest.raises(UsageError, match="is not allowed, an output folder is only read"):
                ask(statement)


def test_the_files_as_a_dataset_of_pyarrow(archive: Archive) -> None:
    dataset = archive.dataset()
    assert dataset.schema.names[:2] == ["stream_id", "frame_index"]
    assert dataset.count_rows() == 40
    some = dataset.to_table(filter=(pc.field("stream_id") == "b") & (pc.field("frame_index") < 3))
    assert some.drop_columns(["stream_id"]).to_pylist() == rows(0, 2).to_pylist()
    assert {*some["stream_id"].to_pylist()} == {"b"}
    assert len([*dataset.get_fragments(pc.field("frame_index") >= 5)]) == 2, (
        "files of other frames are left out"
    )
    found = archive.dataset("events").to_table().drop_columns(["stream_id"]).to_pylist()
    assert found == events(2).to_pylist() * 2
    with pytest.raises(UsageError, match="there is no dataset 'frames': tracks or events"):
        archive.dataset("frames")


def test_the_dataset_verifies_checksums(archive: Archive, out: Path) -> None:
    path = out / chunk_name("tracks", "a", 0)
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)checksum|crc|corrupt"):
        archive.dataset().to_table()


def test_the_dataset_of_another_store() -> None:
    root = "memory://archive-dataset/out"
    StreamStore(root, "a").commit(0, 4, rows(0, 4), NO_EVENTS)
    with open_archive(root) as archive:
        assert (
            archive.dataset().to_table(columns=["area"])["area"].to_pylist() == rows(0, 4)["area"].to_pylist()
        )
    open_files(root).remove(chunk_name("tracks", "a", 0))


def test_masks_of_rows(archive: Archive, tmp_path: Path) -> None:
    masks = [np.eye(4, 6) > 0, np.zeros((4, 6), np.bool_)]
    table = pa.table(
        {
            "mask_rle": [mask_to_rle(masks[0]), None],
            "frame_height": pa.array([4, 4], pa.int32()),
            "frame_width": pa.array([6, 6], pa.int32()),
            "area": [4, 0],
        }
    )
    frame = table.to_pandas()
    for many in (table, table.to_batches()[0], frame, table.to_pylist(), frame.itertuples()):
        found = archive.masks(many)
        assert [mask.shape for mask in found] == [(4, 6), (4, 6)]
        np.testing.assert_array_equal(found, masks)
    for one in (table.to_pylist()[0], frame.iloc[0], next(frame.itertuples())):
        np.testing.assert_array_equal(archive.masks(one), masks[0])
    mask = {"mask": {"counts": mask_to_rle(masks[0]), "height": 4, "width": 6}}
    np.testing.assert_array_equal(archive.masks(mask), masks[0])
    with pytest.raises(UsageError, match="a row lacks frame_height, frame_width: select mask_rle"):
        archive.masks(table.select(["mask_rle"]))
    with pytest.raises(StoreError, match="a mask is damaged: RLE counts cover 24 pixels"):
        archive.masks({"mask_rle": mask_to_rle(masks[0]), "frame_height": 5, "frame_width": 6})


def test_a_folder_that_is_none_and_a_limit_that_is_none(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="is no output folder of xmem"):
        open_archive(tmp_path / "videos")
    with pytest.raises(UsageError, match="memory limit 'lots' is not a size"):
        open_archive(out, memory_limit="lots")
