"""Videos read backward: the same frames as forward, with a bounded number of them in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.videos import damage_packets, make_images, make_video, scene, truncate

from pipeline.base.joined_uris import joined_uri
from pipeline.base.records import Frame
from pipeline.video import image_folder
from pipeline.video.reversed_video import ReversedVideo
from pipeline.video.sources import open_source

FRAMES = 150
FRAME_BYTES = 160 * 120 * 3


def plain(folder: Path) -> str:
    return str(make_video(folder / "a.mp4", FRAMES, b_frames=2, gop=20, start_pts=7))


def without_keyframes(folder: Path) -> str:
    return str(make_video(folder / "a.mkv", FRAMES, gop=1000))


def damaged(folder: Path) -> str:
    whole = make_video(folder / "whole.avi", FRAMES, codec="mpeg4", gop=20)
    return str(damage_packets(whole, folder / "a.avi", [30, 31, 90]))


def cut(folder: Path) -> str:
    return str(truncate(make_video(folder / "whole.avi", FRAMES, gop=20), folder / "a.avi", 0.8))


def joined(folder: Path) -> str:
    pieces = [[scene(i) for i in range(first, first + 75)] for first in (0, 75)]
    return joined_uri([str(make_video(folder / f"{i}.mp4", p, gop=10)) for i, p in enumerate(pieces)])


def images(folder: Path) -> str:
    clip = make_images(folder / "clip", 40, "png")
    for broken in (11, 12, 39):
        truncate(clip / f"frame{broken}.png", clip / f"frame{broken}.png", 0.3)
    return str(clip)


MAKERS = (plain, without_keyframes, damaged, cut, joined, images)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_frames_are_those_of_the_video(tmp_path: Path, make: Callable[[Path], str]) -> None:
    uri = make(tmp_path)
    with open_source(uri) as source:
        forward = list(source.frames())
    last = min(FRAMES, len(forward)) - 4
    for start, kept in ((0, 12), (0, 1000), (last - 90 if last > 90 else 9, 7), (last, 1)):
        with open_source(uri) as source:
            video = ReversedVideo(source, last, kept_bytes=kept * FRAME_BYTES)
            found = list(video.frames(start))
        assert [f.frame_index for f in found] == list(range(start, last + 1))
        for frame in found:
            other = forward[last - frame.frame_index]
            assert frame.pts_seconds == other.pts_seconds
            assert np.array_equal(frame.image, other.image)
            assert frame.losses == ()


def test_a_video_that_ends_before_keeps_its_numbers(tmp_path: Path) -> None:
    with open_source(str(make_video(tmp_path / "a.mp4", 20))) as source:
        video = ReversedVideo(source, 29, kept_bytes=6 * FRAME_BYTES)
        assert [f.frame_index for f in video.frames()] == list(range(10, 30))
        assert list(video.frames(30)) == []


def test_images_are_decoded_twice_at_most_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = image_folder.ImageFolder._decode

    def decode(self: image_folder.ImageFolder, path: str, info: dict[str, object]) -> object:
        decoded.append(path)
        return original(self, path, info)

    with open_source(str(make_images(tmp_path / "clip", 60, "png"))) as source:
        monkeypatch.setattr(image_folder.ImageFolder, "_decode", decode)
        assert len(list(ReversedVideo(source, 59, kept_bytes=8 * FRAME_BYTES).frames())) == 60
    assert len(decoded) == 60 + 60 - 8


def test_frames_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(str(make_video(tmp_path / "a.mp4", 100, gop=10))) as source:
        forward, alive, most = source.frames, [], 0

        def frames(start: int = 0, **given: float | None) -> Iterator[Frame]:
            for frame in forward(start, **given):
                alive.append(weakref.ref(frame.image))
                yield frame

        monkeypatch.setattr(source, "frames", frames)
        for _ in ReversedVideo(source, 99, kept_bytes=10 * FRAME_BYTES).frames():
            most = max(most, sum(image() is not None for image in alive))
    assert len(alive) == 100 + 90
    assert 10 <= most <= 12
