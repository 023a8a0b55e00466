"""Opening and decoding videos: pixels, timestamps, and equal frames from any starting point."""

import itertools
import logging
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import av
import cv2
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support import videos
from support.recorded import recorded
from support.servers import S3Server

from pipeline.base import plugins
from pipeline.base.errors import NoSuchSourceError, NotAVideoError, SourceError
from pipeline.base.records import Frame
from pipeline.storage import retries
from pipeline.storage.failures import Failure
from pipeline.video import packet_index as packets
from pipeline.video import plugin_video, video_file
from pipeline.video.sources import VideoSource, open_source

SHARED = Path("/work/shared/data/video")
SMALL = {"images": 120, "width": 96, "height": 64}
UNEVEN = list(itertools.accumulate([1, 1, 1, 1, 2, 5, 1, 1, 3, 1, 7, 1] * 10, initial=0))[:120]


def signature(frame: Frame) -> tuple[Any, ...]:
    return frame.frame_index, frame.pts_seconds, frame.size, zlib.crc32(frame.image.tobytes()), frame.losses


def decode(source: VideoSource, start: int = 0, previous: float | None = None) -> list[tuple[Any, ...]]:
    return [signature(frame) for frame in source.frames(start, previous_pts_seconds=previous)]


@pytest.fixture
def seek_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "SEEK_FROM", 1)


# ---------------------------------------------------------------- what is delivered


def test_metadata(tmp_path: Path) -> None:
    path = videos.make_video(tmp_path / "clip.mp4", 30, width=98, height=66, b_frames=2)
    late = videos.make_video(tmp_path / "late.mkv", 30, start_pts=100)
    assert open_source(str(late)).frame_count == 30
    with open_source(str(path)) as source:
        assert (source.uri, source.width, source.height) == (str(path), 98, 66)
        assert (source.rate, source.frame_count) == (25.0, 30)
        assert (source.codec, source.container.split(",")[0]) == ("h264", "mov")
        frames = list(source.frames())
        assert [f.frame_index for f in frames] == list(range(30))
        assert [f.pts_seconds for f in frames] == [i / 25 for i in range(30)]
        assert source.trailing_losses == ()
        assert all(f.losses == () for f in frames)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "webm", "mov"])
def test_pictures_are_those_encoded(tmp_path: Path, suffix: str) -> None:
    codec = {"avi": "mpeg4", "webm": "vp9"}.get(suffix, "h264")
    path = videos.make_video(
        tmp_path / f"clip.{suffix}", 12, codec=codec, b_frames=0 if codec == "vp9" else 2
    )
    frames = list(open_source(str(path)).frames())
    assert [frame.frame_index for frame in frames] == list(range(12))
    for frame in frames:
        error = np.abs(frame.image.astype(int) - videos.scene(frame.frame_index)).mean()
        other = np.abs(frame.image.astype(int) - videos.scene(frame.frame_index + 3)).mean()
        assert error < min(8, other)


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_times_are_the_containers_own(tmp_path: Path, suffix: str) -> None:
    path = videos.make_video(tmp_path / f"clip.{suffix}", 24, pts=[50 + t for t in UNEVEN[:24]], b_frames=2)
    times = [f.pts_seconds for f in open_source(str(path)).frames()]
    assert times[0] == 2.0
    assert np.allclose(np.diff(np.array(times, float)), np.diff(UNEVEN[:24]) / 25, atol=1e-9)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_metadata_is_honoured(tmp_path: Path, rotation: int) -> None:
    picture = videos.quadrants(96, 64)
    path = videos.make_video(tmp_path / "clip.mp4", [picture] * 3, rotation=rotation)
    with open_source(str(path)) as source:
        image = next(source.frames()).image
        assert (source.width, source.height) == ((96, 64) if rotation == 180 else (64, 96))
    expected = np.rot90(picture, rotation // 90)  # counter-clockwise, as the display matrix counts
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected)[4:-4, 4:-4].mean() < 6
    capture = cv2.VideoCapture(str(path))
    by_opencv = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
    capture.release()
    assert np.abs(image.astype(int) - by_opencv).max() <= 2


@pytest.mark.parametrize(("hflip", "vflip"), [(True, False), (False, True), (True, True)])
def test_mirrored_display_matrix(tmp_path: Path, hflip: bool, vflip: bool) -> None:
    picture = videos.quadrants(96, 64)
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(0, hflip=hflip, vflip=vflip)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    image = next(open_source(str(path)).frames()).image
    expected = picture[:: -1 if vflip else 1, :: -1 if hflip else 1]
    assert np.abs(image.astype(int) - expected)[4:-4, 4:-4].mean() < 8


PALETTE = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128), (250, 250, 250), (10, 10, 10)]


def stripes() -> np.ndarray:
    return np.repeat(np.array([PALETTE], np.uint8), 16, axis=1).repeat(32, axis=0)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("h264", "yuv420p", "mp4"),
        ("h264", "yuv420p10le", "mkv"),
        ("ffv1", "gray", "mkv"),
        ("ffv1", "gray10le", "mkv"),
        ("ffv1", "bgr0", "mkv"),
        ("h264_rgb", "rgb24", "mkv"),
        ("mjpeg", "yuvj420p", "avi"),
    ],
)
def test_colours_of_pixel_formats(tmp_path: Path, codec: str, pix_fmt: str, suffix: str) -> None:
    path = videos.make_video(
        tmp_path / f"clip.{suffix}", [stripes()] * 2, codec=codec, pix_fmt=pix_fmt, quality=1
    )
    image = next(open_source(str(path)).frames()).image
    for i, color in enumerate(PALETTE):
        wanted = np.array(color) @ [0.299, 0.587, 0.114] if "gray" in pix_fmt else np.array(color)
        assert np.abs(image[16, i * 16 + 8].astype(float) - wanted).max() <= 6, (i, image[16, i * 16 + 8])


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    ("space", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (2, 0.299, 0.114)]
)
def test_declared_matrix_and_range(
    tmp_path: Path, space: int, red: float, blue: float, full_range: bool
) -> None:
    rgb = stripes() / 255
    luma = rgb @ [red, 1 - red - blue, blue]
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    scaled = (
        [luma * 255, *(c * 255 + 128 for c in chroma)]
        if full_range
        else [luma * 219 + 16, *(c * 224 + 128 for c in chroma)]
    )
    frame = av.VideoFrame.from_ndarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8), format="yuv444p")
    frame.colorspace, frame.color_range = space, 2 if full_range else 1
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = rgb.shape[1], rgb.shape[0], "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, frame.color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    image = next(open_source(str(path)).frames()).image
    for i, color in enumerate(PALETTE):
        assert np.abs(image[16, i * 16 + 8].astype(int) - color).max() <= 3


@pytest.mark.parametrize("size", [(97, 65), (33, 17), (95, 64), (2, 2)])
def test_sizes_need_not_be_multiples_of_anything(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    picture = cv2.GaussianBlur(videos.scene(0, 200, 150)[:height, :width], (0, 0), 3).astype(np.uint8)
    path = videos.make_video(tmp_path / "clip.mkv", [picture] * 2, codec="ffv1")
    image = next(open_source(str(path)).frames()).image
    error = np.abs(image.astype(int) - picture)
    assert error.shape == (height, width, 3)
    assert max(error.mean(), error[:, -1].mean(), error[-1].mean()) < 6


def test_size_may_change_within_a_stream(tmp_path: Path) -> None:
    one = videos.make_video(tmp_path / "1.ts", 10, width=96, height=64)
    two = videos.make_video(tmp_path / "2.ts", 10, width=64, height=48, start_pts=10)
    both = tmp_path / "both.ts"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    for threads in (1, 2):
        with open_source(str(both), threads=threads) as source:
            assert (source.width, source.height) == (96, 64)
            sizes = [frame.size for frame in source.frames()]
            assert sizes == [(64, 96)] * 10 + [(48, 64)] * 10


# ---------------------------------------------------------------- resume equals decoding from the start

RESUMABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("clip.mp4", {}),
    "b_frames": ("clip.mp4", {"b_frames": 3}),
    "open_gop": ("clip.mp4", {"b_frames": 3, "open_gop": True}),
    "pyramid_late_start": ("clip.mkv", {"b_frames": 7, "open_gop": True, "start_pts": 70}),
    "uneven": ("clip.mkv", {"b_frames": 2, "pts": UNEVEN}),
    "uneven_mp4": ("clip.mp4", {"pts": UNEVEN}),
    "edit_list": ("clip.mp4", {"b_frames": 2, "start_pts": -5}),
    "fragments": ("clip.mp4", {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "ts": ("clip.ts", {"b_frames": 3, "open_gop": True, "start_pts": 50}),
    "mpeg4_avi": ("clip.avi", {"codec": "mpeg4"}),
    "mpeg4_avi_b": ("clip.avi", {"codec": "mpeg4", "b_frames": 2}),
    "vp9": ("clip.webm", {"codec": "vp9"}),
    "vp8_hidden": ("clip.webm", {"codec": "vp8", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "mjpeg": ("clip.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
}
UNSEEKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "wrong_pts": (
        "clip.avi",
        {"b_frames": 2},
    ),  # H.264 with B-frames in AVI: times are not those of the frames
    "intra_refresh": (
        "clip.mp4",
        {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0:threads=1"}},
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("seek_early")
@pytest.mark.parametrize("case", [*RESUMABLE, *UNSEEKABLE])
def test_every_start_equals_decoding_from_the_start(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, recipe = {**RESUMABLE, **UNSEEKABLE}[case]
    path = str(videos.make_video(tmp_path / name, **SMALL, **recipe))
    caplog.set_level(logging.DEBUG, "pipeline.video")
    with open_source(path, threads=1) as source:
        whole = decode(source)
    assert len(whole) >= 115
    assert [s[0] for s in whole] == list(range(len(whole)))
    sought = 0
    for start in range(1, len(whole) + 1):
        if start % 20 == 1:
            source = open_source(path, threads=1 + start // 20 % 2)
        caplog.clear()
        stop = None if start % 11 == 0 else 4
        frames = source.frames(start, previous_pts_seconds=whole[start - 1][1])
        got = [signature(frame) for frame in itertools.islice(frames, stop)]
        assert got == (whole[start:] if stop is None else whole[start : start + 4]), f"from {start}"
        sought += "to reach frame" in caplog.text and "starts over" not in caplog.text
    assert sought >= 90 if case in RESUMABLE else sought == 0


def test_start_without_knowing_the_time_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(videos.make_video(tmp_path / "clip.mp4", **SMALL, b_frames=2))
    whole = decode(open_source(path))
    caplog.set_level(logging.DEBUG, "pipeline.video")
    for start in (1, 70, 119, 120, 500):
        assert decode(open_source(path), start) == whole[start:]
    assert "to reach frame" not in caplog.text


def test_a_source_remembers_what_it_delivered_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(videos.make_video(tmp_path / "clip.mp4", **SMALL, b_frames=2))
    with open_source(path) as source:
        whole = decode(source)
        head = [signature(f) for f in itertools.islice(source.frames(), 90)]
        caplog.set_level(logging.DEBUG, "pipeline.video")
        assert head + decode(source, 90) == whole
    assert "to reach frame 90" in caplog.text


@pytest.mark.usefixtures("seek_early")
def test_a_time_that_does_not_fit_forbids_seeking(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If an earlier packet had yielded no frame, frame 79 would have another packet's time."""
    path = str(videos.make_video(tmp_path / "clip.mp4", **SMALL))
    whole = decode(open_source(path))
    caplog.set_level(logging.DEBUG, "pipeline.video")
    assert decode(open_source(path), 80, whole[78][1]) == whole[80:]
    assert "to reach frame" not in caplog.text


def test_unusable_start_is_refused(tmp_path: Path) -> None:
    path = str(videos.make_video(tmp_path / "clip.mp4", 3))
    with open_source(path) as source, pytest.raises(SourceError, match=r"-1.*begin at 0"):
        source.frames(-1)
    with pytest.raises(SourceError, match="threads=-2"):
        open_source(path, threads=-2)


# ---------------------------------------------------------------- damage

DAMAGE = [
    ("clip.mp4", {}, {"count": 1}),
    ("clip.mp4", {"b_frames": 3, "open_gop": True}, {"count": 3, "run": 8}),
    ("clip.ts", {"b_frames": 2}, {"count": 2}),
    ("clip.mkv", {"b_frames": 2}, {"count": 1, "run": 3000}),
    ("clip.avi", {"codec": "mpeg4"}, {"count": 4, "run": 8}),
    ("clip.webm", {"codec": "vp9"}, {"count": 1, "run": 2000}),
]


@pytest.mark.usefixtures("seek_early")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "recipe", "harm"), DAMAGE)
def test_damaged_input_is_the_same_however_it_is_read(
    tmp_path: Path, name: str, recipe: dict[str, Any], harm: dict[str, Any], seed: int
) -> None:
    good = videos.make_video(tmp_path / name, 100, width=160, height=120, **recipe)
    bad = str(videos.corrupt(good, tmp_path / f"bad-{name}", **harm, seed=seed))
    with open_source(bad, threads=1) as source:
        whole, trailing = decode(source), source.trailing_losses
        assert (decode(source), source.trailing_losses) == (whole, trailing)
    assert 40 < len(whole) <= 100
    assert [s[3] for s in whole] != [s[3] for s in decode(open_source(str(good)))]  # the harm was done
    for threads in (2, 3):
        with open_source(bad, threads=threads) as source:
            assert (decode(source), source.trailing_losses) == (whole, trailing)
    for start in (17, 60, len(whole) - 1):
        for threads, previous in itertools.product((1, 2), (None, whole[start - 1][1])):
            with open_source(bad, threads=threads) as source:
                assert (decode(source, start, previous), source.trailing_losses) == (whole[start:], trailing)


@pytest.mark.slow
def test_damage_that_shows_before_it_is_flagged(tmp_path: Path) -> None:
    """B-frames come out before the damaged picture that they were predicted from, and are not flagged."""
    good = videos.make_video(tmp_path / "good.mp4", 60, gop=30, b_frames=3, quality=12)
    with av.open(str(good)) as container:
        stored = [(p.pts, p.pos, p.size) for p in container.demux(video=0) if p.pts is not None]
    pairs = itertools.pairwise(stored)
    referred = [(pos or 0, size) for (pts, pos, size), after in pairs if after[0] < (pts or 0)]
    assert len(referred) > 10
    flagged_late = 0
    for number, (position, size) in enumerate(referred):
        data = bytearray(good.read_bytes())
        data[position + 20 + number % 4 * (size - 30) // 4] ^= 0x55
        bad = tmp_path / "bad.mp4"
        bad.write_bytes(data)
        whole = decode(open_source(str(bad), threads=1))
        assert decode(open_source(str(bad), threads=2)) == whole
        flagged_late += any(s[4] for s in whole)
    assert flagged_late > 5


@pytest.mark.parametrize("keep", [0.55, 0.6, 0.65, 0.7, 0.75, 0.8])
def test_damage_in_the_last_packets(tmp_path: Path, keep: float) -> None:
    """At the end of the stream FFmpeg's threads swallow errors and pictures."""
    good = videos.make_video(tmp_path / "good.ts", 100, width=320, height=240, b_frames=2, gop=30)
    bad = str(videos.truncate(good, tmp_path / "bad.ts", keep))
    with open_source(bad, threads=1) as source:
        whole, trailing = decode(source), source.trailing_losses
    for threads in (2, 3, 4):
        with open_source(bad, threads=threads) as source:
            assert (decode(source), source.trailing_losses) == (whole, trailing)


def test_frames_after_a_seek_are_compared_with_the_index() -> None:
    times = [0, 10, 20, 30, 40]
    stored = [
        SimpleNamespace(pts=t, dts=t, size=9, is_keyframe=t in (0, 20), is_corrupt=False, is_discard=False)
        for t in times
    ]
    index = packets.build(stored, 10)
    assert index is not None
    right = [SimpleNamespace(pts=t) for t in (20, 30, 40)]
    assert list(video_file._as_predicted(iter(right), index, 2)) == right
    for wrong in ((20, 40), (30, 40), (20, 30), (10, 20, 30, 40), (20, None, 40)):
        with pytest.raises(video_file._Misprediction):
            list(video_file._as_predicted((SimpleNamespace(pts=t) for t in wrong), index, 2))


def test_each_loss_is_one_event_and_nothing_is_lost_twice(tmp_path: Path) -> None:
    good = videos.make_video(tmp_path / "good.mp4", **SMALL, gop=10)
    bad = videos.damage_packets(good, tmp_path / "bad.mp4", [25, 26, 27, 63])
    with open_source(str(bad)) as source:
        frames = list(source.frames())
        events = [e for f in frames for e in f.losses] + list(source.trailing_losses)
    lost = [e for e in events if e.reason == "decode error"]
    assert [e.count for e in lost] == [3, 1]
    assert [e.frame_index for e in lost] == [25, 60]  # numbers count what was delivered
    assert {e.kind for e in events} == {"corrupt"}
    assert [e.pts_seconds for e in lost] == [28 / 25, 64 / 25]
    assert len(frames) == 120 - 4
    assert [f.pts_seconds for f in frames] == [i / 25 for i in range(120) if i not in (25, 26, 27, 63)]


def test_patched_up_pictures_are_delivered_and_reported(tmp_path: Path) -> None:
    good = videos.make_video(tmp_path / "good.mp4", 60, gop=12)
    bad = tmp_path / "bad.mp4"
    with av.open(str(good)) as container:
        packet = next(itertools.islice(container.demux(video=0), 24, None))
        middle = (packet.pos or 0) + packet.size // 2
    data = bytearray(good.read_bytes())
    data[middle : middle + 40] = bytes(40)
    bad.write_bytes(data)
    frames = list(open_source(str(bad)).frames())
    assert len(frames) == 60
    events = [e for f in frames for e in f.losses]
    assert [(e.frame_index, e.reason, e.count) for e in events] == [(25, "damaged picture", 1)]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("clip.mp4", {"container_options": {"movflags": "faststart"}}),
        ("clip.avi", {"codec": "mpeg4"}),
        ("clip.mkv", {}),
        ("clip.webm", {"codec": "vp9"}),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_truncated_video_is_read_up_to_the_cut(
    tmp_path: Path, name: str, recipe: dict[str, Any], threads: int
) -> None:
    good = videos.make_video(tmp_path / name, 100, **recipe)
    cut = videos.truncate(good, tmp_path / f"cut-{name}", 0.5)
    with open_source(str(cut), threads=threads) as source:
        frames = list(source.frames())
        assert 30 < len(frames) < 70
        (event,) = [e for e in source.trailing_losses if e.reason != "damaged picture"]
        assert (event.kind, event.reason, event.frame_index) == ("corrupt", "file ends early", len(frames))
        assert len(frames) + event.count == 100


def test_whole_files_lose_nothing_at_the_end(tmp_path: Path) -> None:
    for name, recipe in RESUMABLE.values():
        with open_source(str(videos.make_video(tmp_path / name, **SMALL, **recipe)), threads=2) as source:
            losses = [frame.losses for frame in source.frames()]
            assert losses == [()] * len(losses) != [], name
            assert source.trailing_losses == (), name


# ---------------------------------------------------------------- what is no video


def refused(path: object, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_a_video(tmp_path: Path) -> None:
    for name, data in {
        "empty.mp4": b"",
        "text.mp4": b"no video\n" * 99,
        "noise.avi": random.Random(1).randbytes(9999),  # some noise is taken for a film
    }.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "not a readable video")
    refused(tmp_path / "absent.mp4", "no such file")
    refused("/dev/zero", "neither a file nor a folder")
    refused("nosuchscheme://bucket/clip.mp4", "is not a valid path or URI")
    with pytest.raises(SourceError, match="give a path"):
        open_source("")


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_certainly_no_video_is_told_from_what_cannot_be_read(tmp_path: Path, remote: bool) -> None:
    good = videos.make_video(tmp_path / "good.mkv", 10)
    videos.truncate(videos.make_video(tmp_path / "good.mp4", 10), tmp_path / "cut.mp4", 0.5)
    for name, data in {
        "empty.mp4": b"",
        "page.mp4": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20,
        "notes.txt": b"Dear editor,\nthe recording follows by post.\n" * 20,
        "header.mkv": good.read_bytes()[:60],
        "cut.mp4": (tmp_path / "cut.mp4").read_bytes(),
        "folder/readme.txt": b"nothing here",
    }.items():
        if remote:
            fsspec.filesystem("memory").pipe_file(f"/certain/{name}", data)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
    root = "memory://certain" if remote else str(tmp_path)
    for name in ("empty.mp4", "page.mp4", "notes.txt", "header.mkv", "cut.mp4", "folder"):
        with pytest.raises(NotAVideoError, match=name.partition(".")[0]) as caught:
            open_source(f"{root}/{name}")
        assert Failure.of(caught.value).permanent
    with pytest.raises(NoSuchSourceError):
        open_source(f"{root}/absent.mp4")


def test_raw_streams_have_no_times(tmp_path: Path) -> None:
    """As documented: frames are numbered, `pts_seconds` is unknown."""
    path = videos.make_video(tmp_path / "raw.h264", 20, b_frames=2, gop=8)
    source = open_source(str(path))
    assert [(f.frame_index, f.pts_seconds) for f in source.frames()] == [(i, None) for i in range(20)]
    assert source.frame_count is None
    assert decode(source, 12) == decode(source)[12:]


def test_mp4_that_lost_its_index(tmp_path: Path) -> None:
    good = videos.make_video(tmp_path / "good.mp4", 50)
    refused(videos.truncate(good, tmp_path / "cut.mp4", 0.9), "cut off before its index was written")


def test_no_frame_can_be_decoded(tmp_path: Path) -> None:
    good = videos.make_video(tmp_path / "good.mp4", 10)
    refused(videos.damage_packets(good, tmp_path / "bad.mp4", range(10)), "no frame can be decoded")
    refused(
        videos.truncate(videos.make_video(tmp_path / "a.mkv", 10), tmp_path / "b.mkv", 0.1), "no frame can"
    )


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(path, "no video stream")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = videos.make_video(tmp_path / "clip.mp4", 3)
    path.chmod(0)
    refused(path, "permission denied")


def test_ffmpeg_never_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = videos.make_video(tmp_path / "clip.ts", 40, b_frames=2)
    bad = str(videos.corrupt(good, tmp_path / "bad.ts", count=30, run=8))
    for threads in (1, 2):
        assert len(decode(open_source(bad, threads=threads))) > 5
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- other file systems, plugins


class BrokenFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """memory:// under another name, with a connection that breaks where specified."""

    protocol = "broken"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    breaks_at: ClassVar[int | None] = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("broken://").lstrip("/")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        handle = super()._open(path, mode, **kwargs)
        read = handle.read

        def failing(size: int = -1) -> bytes:
            if self.breaks_at is not None and handle.tell() + size > self.breaks_at:
                raise ConnectionResetError("connection reset by peer")
            return bytes(read(size))

        handle.read = failing
        return handle


def test_remote_files_are_read_in_ranges(tmp_path: Path) -> None:
    path = videos.make_video(tmp_path / "clip.mp4", **SMALL, b_frames=2)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/sources/clip.mp4", path.read_bytes())
    local, remote = open_source(str(path)), open_source("memory://sources/clip.mp4", block_size=1 << 12)
    whole = decode(local)
    assert decode(remote) == whole
    assert decode(remote, 100, whole[99][1]) == whole[100:]
    assert decode(open_source(f"file://{path}")) == whole
    with pytest.raises(SourceError, match="no such file"):
        open_source("memory://sources/absent.mp4")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_broken_connection_is_no_damage(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    monkeypatch.setattr(retries, "ATTEMPTS", retries.Attempts(3, 0.001))
    path = videos.make_video(tmp_path / "clip.mkv", 100, width=320, height=240, gop=2)
    BrokenFileSystem().pipe_file("/clip.mkv", path.read_bytes())
    with open_source("broken://clip.mkv", threads=threads, block_size=1 << 14) as source:
        assert len(list(source.frames())) == 100
        monkeypatch.setattr(BrokenFileSystem, "breaks_at", path.stat().st_size * 2 // 3)
        delivered: list[Frame] = []
        with pytest.raises(SourceError, match=r"connection reset by peer.*try again"):
            delivered.extend(source.frames())
        assert 20 < len(delivered) < 100
        assert all(frame.losses == () for frame in delivered)
    monkeypatch.setattr(BrokenFileSystem, "breaks_at", 100)
    refused("broken://clip.mkv", "connection reset by peer")
    with pytest.raises(SourceError) as caught:
        open_source("broken://clip.mkv")
    assert not Failure.of(caught.value).permanent


def test_videos_and_images_on_s3(tmp_path: Path, s3_server: S3Server) -> None:
    path = videos.make_video(tmp_path / "clip.mp4", **SMALL, b_frames=2)
    pictures = videos.make_images(tmp_path / "pictures", 3)
    fs = fsspec.filesystem("s3", **s3_server.options)
    clip, folder = s3_server.uri("sources/clip.mp4"), s3_server.uri("sources/pictures")
    fs.pipe_file(clip, path.read_bytes())
    for picture in pictures.iterdir():
        fs.pipe_file(f"{folder}/{picture.name}", picture.read_bytes())
    whole = decode(open_source(str(path)))
    with open_source(clip, storage_options=s3_server.options, block_size=1 << 16) as source:
        assert decode(source) == whole
        assert decode(source, 100, whole[99][1]) == whole[100:]
    with open_source(folder, storage_options=s3_server.options) as source:
        assert [s[3] for s in decode(source)] == [s[3] for s in decode(open_source(str(pictures)))]
    with pytest.raises(SourceError, match="no such file"):
        open_source(s3_server.uri("sources/absent.mp4"), storage_options=s3_server.options)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_video_is_opened_once(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = videos.make_video(tmp_path / "clip.mp4", **SMALL, b_frames=2)
    whole = decode(open_source(str(path)))
    opened: list[Any] = []
    monkeypatch.setattr(av, "open", recorded(av.open, opened))
    with open_source(str(path), threads=threads) as source:
        assert next(source.frames()).frame_index == 0  # left after the first frame
        assert decode(source) == whole
        assert len(opened) == 1
        assert decode(source) == whole
        assert len(opened) == 2


def test_a_closed_video_holds_no_file(tmp_path: Path) -> None:
    def held() -> int:
        return [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()].count(str(path))

    path = videos.make_video(tmp_path / "clip.mp4", **SMALL, b_frames=2)
    with open_source(str(path)) as source:
        assert held() == 1
        whole = decode(source)
        assert held() == 0
    other = open_source(str(path))
    other.close()
    assert held() == 0
    assert decode(other) == whole
    late = open_source(str(path))
    assert decode(late, 100, whole[99][1]) == whole[100:]
    assert held() == 0


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = videos.make_video(tmp_path / "clip.mp4", 20)
    first = open_source(str(path)).fingerprint
    os.utime(path, (1, 1))
    copy = videos.copy(path, tmp_path / "copy.mp4")
    assert open_source(str(path)).fingerprint == open_source(str(copy)).fingerprint == first
    videos.make_video(path, 20, quality=19)
    assert open_source(str(path)).fingerprint != first


class Countdown:
    """A source plugin: as many frames as the URI says, with the frame's number in every pixel."""

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        for i in range(start, int(uri.split("://")[1])):
            yield Frame(np.full((4, 6, 3), i, np.uint8), i, i / 10)


def test_plugins_read_their_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("countdown", f"{__name__}:Countdown", plugin_video.ENTRY_POINT_GROUP),
            EntryPoint("gone", "no_such_module:Source", plugin_video.ENTRY_POINT_GROUP),
        ]
    )
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: points.select(**wanted))
    with open_source("countdown://5") as source:
        assert (source.width, source.height, source.rate, source.frame_count) == (6, 4, None, None)
        assert [f.frame_index for f in source.frames(3)] == [3, 4]
    with pytest.raises(SourceError, match="delivered no frame"):
        open_source("countdown://0")
    with pytest.raises(SourceError, match=r"gone.*no_such_module"):
        open_source("gone://x")


# ---------------------------------------------------------------- real videos, memory

REAL = {"vtest.avi": (795, 768, 576), "car-detection.mp4": (377, 768, 432)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_videos_resume_exactly(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    count, width, height = REAL[name]
    with open_source(str(path), threads=2) as source:
        assert (source.width, source.height, source.frame_count) == (width, height, count)
        whole = decode(source)
    assert len(whole) == count
    for start in (count // 3, count - 40):
        with open_source(str(path), threads=1) as source:
            assert decode(source, start, whole[start - 1][1]) == whole[start:]


SOAK = """
import sys
from pipeline.video.sources import open_source

def resident():
    with open("/proc/self/statm") as stats:
        return int(stats.read().split()[1]) * 4096 / 2**20

sizes = []
for _ in range(6):
    for frame in open_source(sys.argv[1], threads=2).frames():
        pass
    sizes.append(resident())
print(max(sizes[1:]) - sizes[0])
"""


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """300 frames of 640x480 are 264 MiB as RGB: keeping a noticeable share of them would show."""
    path = videos.make_video(tmp_path / "clip.mp4", 300, width=640, height=480, b_frames=2, rotation=90)
    done = subprocess.run([sys.executable, "-c", SOAK, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60


def test_time_base_is_exact(tmp_path: Path) -> None:
    path = videos.make_video(
        tmp_path / "clip.mp4", 5, time_base=Fraction(1001, 30000), rate=30, pts=[0, 1, 2, 3, 4]
    )
    times = [f.pts_seconds for f in open_source(str(path)).frames()]
    assert times == [float(i * Fraction(1001, 30000)) for i in range(5)]
