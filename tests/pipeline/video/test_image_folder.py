"""Image folders as videos."""

from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
from support import videos

from pipeline.base.errors import SourceError
from pipeline.video.image_folder import natural_key
from pipeline.video.sources import open_source


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_images_are_frames_in_natural_order(tmp_path: Path, suffix: str) -> None:
    folder = videos.make_images(tmp_path / "clip", 12, suffix)
    (folder / "notes.txt").write_text("no image")
    (folder / f".hidden.{suffix}").write_bytes(b"neither")
    with open_source(str(folder)) as source:
        assert (source.width, source.height, source.frame_count) == (160, 120, 12)
        assert (source.rate, source.container) == (None, "images")
        frames = list(source.frames())
        assert [f.frame_index for f in source.frames(9)] == [9, 10, 11]
    assert [f.frame_index for f in frames] == list(range(12))
    assert {f.pts_seconds for f in frames} == {None}
    for frame in frames:
        error = np.abs(frame.image.astype(int) - videos.scene(frame.frame_index)).mean()
        assert error < (6 if suffix == "jpg" else 0.5)
        assert frame.image.flags.writeable


def test_sizes_may_differ(tmp_path: Path) -> None:
    folder = videos.make_images(tmp_path / "clip", 2)
    cv2.imwrite(str(folder / "frame2.png"), np.zeros((31, 17, 3), np.uint8))
    assert [f.size for f in open_source(str(folder)).frames()] == [(120, 160), (120, 160), (31, 17)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_broken_images_are_losses_and_no_frames(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = videos.make_images(tmp_path / "clip", 10, suffix)
    for i, keep in {3: 0.0, 4: 0.6, 9: 0.3}.items():
        path = folder / f"frame{i}.{suffix}"
        videos.truncate(path, path, keep)
    with open_source(str(folder)) as source:
        frames = list(source.frames())
        (last,) = source.trailing_losses
        resumed = [(f.frame_index, f.losses) for f in source.frames(3)]
    assert len(frames) == 7
    (event,) = [e for f in frames for e in f.losses]
    assert (event.frame_index, event.kind, event.count) == (3, "corrupt", 2)
    assert event.detail == {"files": [f"frame3.{suffix}", f"frame4.{suffix}"]}
    assert (last.frame_index, last.count) == (7, 1)
    assert np.abs(frames[3].image.astype(int) - videos.scene(5)).mean() < 6
    assert resumed == [(f.frame_index, f.losses) for f in frames[3:]]
    assert capfd.readouterr() == ("", "")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no images.*png"):
        open_source(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match="none of the folder's 1 images"):
        open_source(str(tmp_path))


def test_prefixes_on_other_file_systems(tmp_path: Path) -> None:
    folder = videos.make_images(tmp_path / "clip", 3, "png")
    fs = fsspec.filesystem("memory")
    for path in folder.iterdir():
        fs.pipe_file(f"/pictures/{path.name}", path.read_bytes())
    local, remote = open_source(str(folder)), open_source("memory://pictures")
    assert [f.image.tobytes() for f in local.frames()] == [f.image.tobytes() for f in remote.frames()]
    assert local.fingerprint == remote.fingerprint
    fs.pipe_file("/pictures/frame3.png", b"more")
    assert open_source("memory://pictures").fingerprint != local.fingerprint


def test_grey_deep_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))
    cv2.imwrite(str(tmp_path / "0.png"), grey)
    cv2.imwrite(str(tmp_path / "1.png"), grey.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "2.png"), np.dstack([grey, grey, grey, np.zeros_like(grey)]))
    for frame in open_source(str(tmp_path)).frames():
        assert frame.image.dtype == np.uint8
        assert np.array_equal(frame.image, np.dstack([grey] * 3))


def test_natural_order() -> None:
    names = ["a10.png", "a9.png", "a1.png", "B2.png", "b10.png", "007.png", "7a.png", "x.png"]
    assert sorted(names, key=natural_key) == [
        "a1.png",
        "a9.png",
        "a10.png",
        "B2.png",
        "b10.png",
        "x.png",
        "007.png",
        "7a.png",
    ]
