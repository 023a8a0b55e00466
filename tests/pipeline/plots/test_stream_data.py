"""Data of the figures: what is read of a stream, and the numbers that are computed from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.walks import BEGAN, HEIGHT, WIDTH, Walk, random_walk, record, walked_folder

from pipeline.base.errors import StoreError, UsageError
from pipeline.plots import stream_data
from pipeline.plots.stream_data import load_stream, mask_heat, zone_occupancy
from pipeline.tracks.masks import rle_to_mask
from pipeline.zones.config import parse_zones

# Object 1 is out of sight on frames 3 to 5; frame 8 has no rows; object 2 comes on frame 6 with another size.
STEPS = {f: [record(f, 1, None if 3 <= f <= 5 else (10.0 + f, 50.0), with_mask=True)] for f in range(8)} | {
    8: [],
    9: [record(9, 1, (19.0, 50.0), with_mask=True)],
}
for _f in (6, 7, 9):
    STEPS[_f].append(record(_f, 2, (100.0, 150.0), category=None, size=(200, 200), with_mask=True))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    walked_folder(str(folder), "its", Walk(STEPS))
    return folder


def test_columns_of_objects(out: Path) -> None:
    data = load_stream(out)
    assert (data.stream_id, data.first, data.last, data.every) == ("its", 0, 9, 1)
    assert data.size == (HEIGHT, WIDTH)
    one, two = data.objects
    assert (one.label, two.label) == ("1 person", "2")
    assert one.frames.tolist() == [*range(8), 9]
    assert one.spans() == [(0, 2), (6, 7), (9, 9)]
    assert np.isnan(one.foot[3]).all()
    assert one.foot[0].tolist() == [10, 50]
    # Rows of frames of another size are scaled to the usual one.
    assert two.foot[0].tolist() == [50, 75]
    assert two.area.tolist() == [8, 8, 8]
    assert data.frames.tolist() == list(range(10))
    assert data.counts.tolist() == [1, 1, 1, 0, 0, 0, 2, 2, 0, 2]
    assert data.clock == "seconds"
    assert data.times([0, 4, 9]).tolist() == pytest.approx([0, 0.4, 0.9])


def test_a_range_of_frames(out: Path) -> None:
    data = load_stream(out, "its", first=2, last=6)
    assert (data.first, data.last) == (2, 6)
    assert data.frames.tolist() == [2, 3, 4, 5, 6]
    assert [o.frames.tolist() for o in data.objects] == [[2, 3, 4, 5, 6], [6]]
    assert load_stream(out, last=99).last == 9


def test_times_of_live_streams(tmp_path: Path) -> None:
    walk = random_walk(3, wall=True)
    walked_folder(str(tmp_path), "gate", walk)
    data = load_stream(tmp_path)
    assert data.clock == "wall"
    rows = walk.records
    expected = {r.frame_index: r.wall_time.timestamp() for r in rows if r.wall_time is not None}
    assert data.times(list(expected)) == pytest.approx(list(expected.values()), abs=1e-5)
    assert data.times([min(expected)])[0] >= BEGAN.timestamp()


def test_many_rows_are_thinned(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_data, "MAX_ROWS", 5)
    data = load_stream(out)
    assert data.every == 3  # 12 rows
    one, two = data.objects
    assert one.frames.tolist() == [0, 3, 6, 9]
    assert one.spans(3) == [(0, 0), (6, 9)]
    assert two.frames.tolist() == [6, 9]


def test_heat_is_the_share_of_frames_that_cover_a_pixel(tmp_path: Path) -> None:
    walk = random_walk(7, with_mask=True)
    walked_folder(str(tmp_path), "gate", walk)
    data = load_stream(tmp_path)
    heat, frames = mask_heat(tmp_path, data)
    assert frames == len(data.frames)
    expected = np.zeros((HEIGHT, WIDTH))
    for rows in walk.frames.values():
        masks = [rle_to_mask(r.mask_rle, HEIGHT, WIDTH) for r in rows if r.mask_rle is not None]
        expected += np.any([np.zeros((HEIGHT, WIDTH), np.bool_), *masks], axis=0)
    assert expected.max() > 1
    assert heat == pytest.approx(expected / frames, abs=1e-6)


def test_heat_of_some_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = {f: [record(f, 1, (50, 50) if f % 2 else (20, 20), with_mask=True)] for f in range(8)}
    walked_folder(str(tmp_path), "gate", Walk(frames))
    monkeypatch.setattr(stream_data, "MAX_MASKS", 4)
    heat, count = mask_heat(tmp_path, load_stream(tmp_path))
    assert count == 4
    assert heat[15, 20] == 1  # the frames with even numbers
    assert heat[45, 50] == 0


def test_occupancy_of_zones(tmp_path: Path) -> None:
    frames = {f: [record(f, 1, (20.0 if f < 20 else 80.0, 50.0))] for f in range(40)}
    walked_folder(str(tmp_path), "gate", Walk(frames))
    zones = parse_zones({"zones": [{"name": "left", "polygon": [[0, 0], [50, 0], [50, 100], [0, 100]]}]})
    held = zone_occupancy(tmp_path, load_stream(tmp_path), zones)
    times, means = held["left"]
    assert times.tolist() == [0, 1, 2, 3]
    assert means.tolist() == pytest.approx([1, 1, 0, 0], abs=0.11)


def test_what_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tracks of stream 'x' in .*: it has its"):
        load_stream(out, "x")
    with pytest.raises(UsageError, match=r"no frames 12 to the end of stream 'its': frames 0 to 9 are"):
        load_stream(out, first=12)
    with pytest.raises(UsageError, match=r"no frames 5 to 3 of"):
        load_stream(out, first=5, last=3)
    with pytest.raises(UsageError, match="is no output folder of xmem"):
        load_stream(tmp_path)
    for name in ("a", "b"):
        walked_folder(str(tmp_path), name, Walk(STEPS))
    with pytest.raises(UsageError, match="has 2 streams: choose one with --stream-id: a, b"):
        load_stream(tmp_path)


def test_a_half_written_file_is_named(tmp_path: Path) -> None:
    walked_folder(str(tmp_path), "its", Walk(STEPS))
    newest = max((tmp_path / "tracks").rglob("*.parquet"))
    newest.write_bytes(newest.read_bytes()[:-20])
    with pytest.raises(StoreError, match="newest tracks file of stream 'its' cannot be read"):
        load_stream(tmp_path)
