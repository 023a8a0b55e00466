"""Recordings in pieces: frames, times, gaps and seeking of several files as one video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.videos import copy, make_video, scene, truncate

from pipeline.base.errors import NoSuchSourceError, NotAVideoError, SourceError, UsageError
from pipeline.base.joined_uris import joined_parts, joined_uri
from pipeline.base.records import Frame
from pipeline.video.sources import open_source
from pipeline.video.video_file import VideoFile

LENGTHS = (70, 90, 40)


def pieces(folder: Path, names: Sequence[str], lengths: Sequence[int] = LENGTHS, **recipe: Any) -> list[str]:
    """A recording of the pictures of `scene`, cut into files."""
    folder.mkdir(exist_ok=True)
    begin, paths = 0, []
    for name, length in zip(names, lengths, strict=True):
        images = [scene(i) for i in range(begin, begin + length)]
        paths.append(str(make_video(folder / name, images, gop=10, **recipe)))
        begin += length
    return paths


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return pieces(tmp_path_factory.mktemp("plain"), ("a.mp4", "b;1.mp4", "c%.mp4"))


def read(parts: Sequence[str], start: int = 0, previous: float | None = None) -> list[Frame]:
    with open_source(joined_uri(parts)) as source:
        return list(source.frames(start, previous_pts_seconds=previous))


def test_uris_of_joined_files() -> None:
    files = ["a b.mp4", "s3://bucket/c;d%3B%25.mp4", "https://x/e.mp4?sig=1;2"]
    uri = joined_uri(files)
    assert joined_parts(uri) == files
    assert joined_uri(["a.mp4"]) == "a.mp4"
    assert joined_uri([uri]) == uri
    assert joined_parts("a;b.mp4") is None
    with pytest.raises(UsageError, match=r"a\.mp4 is given twice"):
        joined_uri(["a.mp4", "a.mp4"])
    with pytest.raises(UsageError, match="no files to join"):
        joined_uri([])
    with pytest.raises(UsageError, match="cannot be joined with others"):
        joined_uri(["x.mp4", uri])


def test_frames_and_times_are_those_of_the_files_one_after_the_other(plain: list[str]) -> None:
    frames = read(plain)
    assert [f.frame_index for f in frames] == list(range(sum(LENGTHS)))
    own: list[Frame] = []
    for path in plain:
        with open_source(path) as source:
            own += source.frames()
    assert all(np.array_equal(a.image, b.image) for a, b in zip(frames, own, strict=True))
    with open_source(plain[0]) as source:
        assert source.rate is not None
        step = 1 / source.rate
    times = [f.pts_seconds for f in frames]
    assert times == pytest.approx([i * step for i in range(sum(LENGTHS))])
    assert times[: LENGTHS[0]] == [f.pts_seconds for f in own[: LENGTHS[0]]]
    assert not any(f.losses for f in frames)


def test_what_is_known_at_once(plain: list[str]) -> None:
    with open_source(joined_uri(plain)) as source, open_source(plain[0]) as first:
        assert (source.width, source.height, source.rate) == (first.width, first.height, first.rate)
        assert source.frame_count == 3 * LENGTHS[0]
        prints = {source.fingerprint}
    for other in (plain[::-1], plain[:2], [*plain[:2], plain[2], plain[0] + ".copy.mp4"]):
        if len(other) == 4:
            copy(plain[0], other[3])
        with open_source(joined_uri(other)) as source:
            prints.add(source.fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("start", [1, 69, 70, 71, 140, 159, 160, 170, 199])
def test_from_any_frame_on_it_seeks_and_gives_the_same(
    plain: list[str], start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(plain)
    asked: list[tuple[str, int]] = []
    frames = VideoFile.frames

    def counted(self: VideoFile, first: int = 0, **options: Any) -> Any:
        asked.append((self.uri, first))
        return frames(self, first, **options)

    monkeypatch.setattr(VideoFile, "frames", counted)
    found = read(plain, start, expected[start - 1].pts_seconds)
    assert [(f.frame_index, f.pts_seconds) for f in found] == [
        (f.frame_index, f.pts_seconds) for f in expected[start:]
    ]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(found, expected[start:], strict=True))
    at = 0 if start < 70 else 1 if start < 160 else 2
    assert asked[0] == (plain[at], start - (0, 70, 160)[at])  # no frame of the files before is decoded


def test_without_a_time_that_fits_it_decodes_from_the_start(plain: list[str]) -> None:
    expected = read(plain)
    for previous in (None, 1e9):
        found = read(plain, 165, previous)
        assert [(f.frame_index, f.pts_seconds) for f in found] == [
            (f.frame_index, f.pts_seconds) for f in expected[165:]
        ]
        assert np.array_equal(found[0].image, expected[165].image)


def test_times_in_names_make_gaps(tmp_path: Path) -> None:
    names = ["cam_20260301-100000.mp4", "cam_20260301-100003.mp4", "cam_20260301-100105.mp4"]
    parts = pieces(tmp_path, names)  # 70 / 25 = 2.8 s, 90 / 25 = 3.6 s
    frames = read(parts)
    assert frames[70].pts_seconds == pytest.approx(70 / 25, abs=1e-3)  # the second begins in time
    assert frames[70].losses == ()
    (gap,) = frames[160].losses
    assert (gap.kind, gap.reason, gap.count, gap.frame_index) == ("gap", "between files", 0, 160)
    assert gap.detail is not None
    assert gap.detail["seconds"] == pytest.approx(65 - 160 / 25, abs=1e-2)
    assert gap.detail["file"] == names[2]
    assert gap.pts_seconds == frames[160].pts_seconds == pytest.approx(65)
    resumed = read(parts, 170, frames[169].pts_seconds)
    assert [f.pts_seconds for f in resumed] == [f.pts_seconds for f in frames[170:]]


@pytest.mark.parametrize(
    "names",
    [
        ("2026-03-01 10-00-00.mp4", "2026-03-01 09-00-00.mp4"),  # they descend
        ("20260301_100000.mp4", "b.mp4"),
        ("20261301_100000.mp4", "20261302_100000.mp4"),  # no month 13
        ("20260301100000_20260301100100.mp4", "20260301100100_20260301100200.mp4"),  # two times
    ],
)
def test_names_without_certain_times(tmp_path: Path, names: tuple[str, str]) -> None:
    frames = read(pieces(tmp_path, names, (5, 5)))
    assert [f.pts_seconds for f in frames] == pytest.approx([i / 25 for i in range(10)], abs=1e-2)
    assert not any(f.losses for f in frames)


def test_a_file_that_is_no_video_is_a_gap(plain: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"\0" * 5000)
    frames = read([plain[0], str(bad), plain[1]])
    assert [f.frame_index for f in frames] == list(range(160))
    (gap,) = frames[70].losses
    assert (gap.kind, gap.reason, gap.frame_index) == ("gap", "file is no video", 70)
    assert gap.detail is not None
    assert gap.detail["file"] == "bad.mp4"
    resumed = read([plain[0], str(bad), plain[1]], 140, frames[139].pts_seconds)
    assert [f.pts_seconds for f in resumed] == [f.pts_seconds for f in frames[140:]]
    with open_source(joined_uri([plain[0], str(bad)])) as source:
        assert len(list(source.frames())) == 70
        (trailing,) = source.trailing_losses
        assert (trailing.reason, trailing.frame_index) == ("file is no video", 70)
    with pytest.raises(NotAVideoError):
        open_source(joined_uri([str(bad), plain[0]]))


def test_losses_of_a_damaged_file_are_numbered_through(plain: list[str], tmp_path: Path) -> None:
    cut = truncate(make_video(tmp_path / "whole.mkv", 60, gop=10), tmp_path / "cut.mkv", 0.6)
    with open_source(str(cut)) as source:
        own = list(source.frames())
        trailing = source.trailing_losses
    assert trailing
    with open_source(joined_uri([plain[0], str(cut), plain[1]])) as source:
        frames = list(source.frames())
    assert len(frames) == 70 + len(own) + 90
    after = frames[70 + len(own)]
    assert [(e.kind, e.count, e.frame_index) for e in after.losses] == [
        (e.kind, e.count, after.frame_index) for e in trailing
    ]
    again = read([plain[0], str(cut), plain[1]], 120, frames[119].pts_seconds)
    assert [(f.frame_index, f.pts_seconds) for f in again] == [
        (f.frame_index, f.pts_seconds) for f in frames[120:]
    ]


def test_what_is_refused(plain: list[str], tmp_path: Path) -> None:
    with pytest.raises(NoSuchSourceError, match=r"missing\.mp4"):
        open_source(joined_uri([plain[0], str(tmp_path / "missing.mp4")]))
    with pytest.raises(SourceError):
        open_source(joined_uri([plain[0], str(tmp_path)]))
