"""Tests of decoding by torchcodec on a CPU; run by `test_torchcodec.py` in a process that finds FFmpeg."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from numpy.typing import NDArray
from support.videos import corrupt, damage_packets, make_video, scene, truncate

from pipeline.base.joined_uris import joined_uri
from pipeline.base.records import Frame
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.video.device_frame import DeviceFrame
from pipeline.video.reversed_video import ReversedVideo
from pipeline.video.sources import open_source
from pipeline.video.torchcodec_decoding import Pictures

FRAMES = 90
UNEVEN = np.cumsum([1, 1, 2, 5, 1, 3, 1, 7, 1] * 10).tolist()
ROUNDING = 2
"""Levels by which two builds of FFmpeg's conversion to RGB may differ."""


def b_frames(folder: Path) -> Path:
    return make_video(folder / "a.mp4", FRAMES, b_frames=2, gop=20, start_pts=7)


def uneven(folder: Path) -> Path:
    return make_video(folder / "a.mkv", FRAMES, pts=UNEVEN, b_frames=2, gop=30)


def one_keyframe(folder: Path) -> Path:
    return make_video(folder / "a.mp4", FRAMES, gop=1000)


def mpeg4(folder: Path) -> Path:
    return make_video(folder / "a.avi", FRAMES, codec="mpeg4", gop=20)


def transport(folder: Path) -> Path:
    return make_video(folder / "a.ts", FRAMES, b_frames=2, gop=20)


def vp9(folder: Path) -> Path:
    return make_video(folder / "a.webm", FRAMES, codec="vp9", gop=20)


def turned(folder: Path) -> Path:
    return make_video(folder / "a.mp4", FRAMES, rotation=90)


MAKERS = (b_frames, uneven, one_keyframe, mpeg4, vp9, turned)


def frames_of(path: object, decoder: str, start: int = 0, previous: float | None = None) -> list[Frame]:
    with open_source(str(path), decoder=decoder) as source:
        return list(source.frames(start, previous_pts_seconds=previous))


def facts(frame: Frame) -> tuple[Any, ...]:
    return frame.frame_index, frame.pts_seconds, frame.size, frame.losses


def assert_same(own: list[Frame], expected: list[Frame]) -> None:
    assert [facts(f) for f in own] == [facts(f) for f in expected]
    for a, b in zip(own, expected, strict=True):
        assert np.abs(a.image.astype(int) - b.image).max() <= ROUNDING


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_frames_are_those_of_pyav(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    own, expected = frames_of(path, "torchcodec"), frames_of(path, "av")
    assert len(own) == FRAMES
    assert all(isinstance(frame, DeviceFrame) for frame in own)
    assert_same(own, expected)


@pytest.mark.parametrize("make", [b_frames, uneven, one_keyframe, mpeg4], ids=lambda make: make.__name__)
@pytest.mark.parametrize("start", [1, 19, 21, 64, 89])
def test_a_resume_gives_the_frames_of_a_pass(
    tmp_path: Path, make: Callable[[Path], Path], start: int
) -> None:
    path = make(tmp_path)
    whole = frames_of(path, "torchcodec")
    rest = frames_of(path, "torchcodec", start, whole[start - 1].pts_seconds)
    assert all(isinstance(frame, DeviceFrame) for frame in rest)
    assert [facts(f) for f in rest] == [facts(f) for f in whole[start:]]
    for a, b in zip(rest, whole[start:], strict=True):
        assert np.array_equal(a.image, b.image)


def test_a_resume_that_the_index_contradicts_is_decoded_by_pyav(tmp_path: Path) -> None:
    path = b_frames(tmp_path)
    rest = frames_of(path, "torchcodec", 30, 99.0)
    assert not any(isinstance(frame, DeviceFrame) for frame in rest)
    assert_same(rest, frames_of(path, "av")[30:])


def test_several_files_as_one(tmp_path: Path) -> None:
    parts = [[scene(i) for i in range(first, first + 40)] for first in (0, 40)]
    uri = joined_uri([str(make_video(tmp_path / f"{i}.mp4", p, gop=10)) for i, p in enumerate(parts)])
    own = frames_of(uri, "torchcodec")
    assert all(isinstance(frame, DeviceFrame) for frame in own)
    assert_same(own, frames_of(uri, "av"))


def test_remote_files(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/clips/a.mp4", b_frames(tmp_path).read_bytes())
    own = frames_of("memory://clips/a.mp4", "torchcodec")
    assert all(isinstance(frame, DeviceFrame) for frame in own)
    assert_same(own, frames_of("memory://clips/a.mp4", "av"))


def test_backward_frames_do_not_stay_on_the_device(tmp_path: Path) -> None:
    path = b_frames(tmp_path)
    with open_source(str(path), decoder="torchcodec") as source:
        shown = list(ReversedVideo(source, 50).frames())
    assert not any(isinstance(frame, DeviceFrame) for frame in shown)
    for own, expected in zip(shown, reversed(frames_of(path, "av")[:51]), strict=True):
        assert np.abs(own.image.astype(int) - expected.image).max() <= ROUNDING


def cut(folder: Path) -> Path:
    return truncate(mpeg4(folder), folder / "cut.avi", 0.7)


def holes(folder: Path) -> Path:
    return damage_packets(mpeg4(folder), folder / "holes.avi", [30, 31])


def mirrored(folder: Path) -> Path:
    import av

    path = folder / "mirrored.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.set_display_rotation(0, hflip=True, vflip=False)
        for i in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(i), format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("make", [cut, mirrored, transport], ids=lambda make: make.__name__)
def test_frames_of_files_that_torchcodec_reads_otherwise(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)
    assert_same(frames_of(path, "torchcodec"), frames_of(path, "av"))


def test_a_frame_that_torchcodec_lacks_is_where_pyav_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = b_frames(tmp_path)
    real = Pictures.at

    def at(self: Pictures, number: int, pts: int) -> Any:
        return real(self, number + (number == 33), pts)

    monkeypatch.setattr(Pictures, "at", at)
    with caplog.at_level(logging.WARNING):
        own = frames_of(path, "torchcodec")
    assert [isinstance(frame, DeviceFrame) for frame in own] == [i < 33 for i in range(FRAMES)]
    assert_same(own, frames_of(path, "av"))
    assert "PyAV decodes in place of torchcodec: frame 34 has pts" in caplog.text


def test_damage_in_packets_keeps_numbers_and_times(tmp_path: Path) -> None:
    for path in (holes(tmp_path), corrupt(b_frames(tmp_path), tmp_path / "c.mp4", count=3)):
        own, expected = frames_of(path, "torchcodec"), frames_of(path, "av")
        assert [(f.frame_index, f.pts_seconds) for f in own] == [
            (f.frame_index, f.pts_seconds) for f in expected
        ]


def rows(out: Path) -> list[tuple[Any, ...]]:
    files = str(out / "tracks" / "*" / "*.parquet")
    asked = f"SELECT frame_index, object_id, area, pts_seconds, mask_rle FROM '{files}' ORDER BY ALL"
    return duckdb.connect().execute(asked).fetchall()


def test_rows_of_a_track_and_of_one_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = b_frames(tmp_path)
    prompts = PromptSet.from_record({"version": 1, "objects": [{"id": 1, "box": [30, 30, 50, 50]}]})
    options: dict[str, Any] = {"chunk_frames": 10, "snapshot_chunks": 1, "threads": 1, "size": 64}
    done: dict[str, list[tuple[Any, ...]]] = {}
    for decoder in ("av", "torchcodec"):
        track(path, tmp_path / decoder, prompts, decoder=decoder, **options)
        done[decoder] = rows(tmp_path / decoder)
    copied: list[int] = []

    def image(frame: DeviceFrame) -> NDArray[np.uint8]:
        copied.append(frame.frame_index)
        shown: NDArray[np.uint8] = frame.picture.cpu().numpy()
        return shown

    monkeypatch.setattr(DeviceFrame, "image", property(image))
    track(path, tmp_path / "parts", prompts, decoder="torchcodec", max_frames=70, **options)
    track(path, tmp_path / "parts", prompts, decoder="torchcodec", **options)
    assert rows(tmp_path / "parts") == done["torchcodec"]
    # The box was made a mask on frame 0; the tracker took the others where they were.
    assert set(copied) == {0}
    for own, expected in zip(done["torchcodec"], done["av"], strict=True):
        assert (own[0], own[1], own[3]) == (expected[0], expected[1], expected[3])
        assert abs(own[2] - expected[2]) <= max(3, 0.01 * expected[2])


def test_frames_may_be_renumbered_where_they_are(tmp_path: Path) -> None:
    frame = frames_of(b_frames(tmp_path), "torchcodec")[5]
    assert isinstance(frame, DeviceFrame)
    other = frame.renumbered(7, 1.5, ())
    assert (other.frame_index, other.pts_seconds, other.wall_time) == (7, 1.5, None)
    assert other.picture is frame.picture
    assert replace(frame.on_host(), frame_index=3).frame_index == 3
    assert repr(frame) == "Frame(5, 160x120, pts_seconds=" + f"{frame.pts_seconds})"
