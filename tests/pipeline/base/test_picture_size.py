"""Pictures that are too large are refused by their headers, before anything is decoded."""

from __future__ import annotations

import resource
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.plain_png import GREY, plain_png
from support import videos

from pipeline.base.errors import NotAVideoError, PictureTooLargeError, PromptError, UsageError
from pipeline.base.picture_size import MAX_PIXELS, header_size
from pipeline.distributed.messages import StreamSpec, WorkerSettings
from pipeline.distributed.worker import Worker
from pipeline.draw.render import render
from pipeline.prompts.files import load_mask_png
from pipeline.prompts.index_png import decode_index_png
from pipeline.prompts.resolving import PromptSet
from pipeline.storage.failures import Failure
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from pipeline.video.sources import open_source

PICTURE = videos.scene(0, 53, 41)
WRITTEN = {
    "jpg": [],
    "progressive.jpg": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts.jpg": [cv2.IMWRITE_JPEG_RST_INTERVAL, 1],
    "png": [],
    "bmp": [],
    "webp": [cv2.IMWRITE_WEBP_QUALITY, 80],
    "lossless.webp": [cv2.IMWRITE_WEBP_QUALITY, 101],
    "tif": [],
    "packed.tiff": [cv2.IMWRITE_TIFF_COMPRESSION, 32773],
}


def encoded(kind: str) -> bytes:
    done, data = cv2.imencode("." + kind.rsplit(".", 1)[-1], PICTURE, WRITTEN[kind])
    assert done
    return bytes(data)


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels, 1 bit each."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    content = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [b"IHDR" + header, b"IDAT" + content, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks
    )


@pytest.fixture(scope="module")
def big() -> bytes:
    return bomb(20_000)


def peak_bytes() -> int:
    """Peak memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITTEN)
def test_headers_say_the_size(kind: str) -> None:
    assert header_size(encoded(kind)) == (53, 41)


def test_headers_of_other_makers() -> None:
    os2 = b"BM" + bytes(12) + (12).to_bytes(4, "little") + b"\x35\0\x29\0" + bytes(8)
    assert header_size(os2) == (53, 41)
    upside_down = bytearray(encoded("bmp"))
    upside_down[22:26] = (-41).to_bytes(4, "little", signed=True)
    assert header_size(bytes(upside_down)) == (53, 41)
    big_endian = b"MM\0*\0\0\0\x08\0\x02" + b"\1\0\0\3\0\0\0\1\0\x35\0\0" + b"\1\1\0\4\0\0\0\1\0\0\0\x29"
    assert header_size(big_endian) == (53, 41)
    wide = b"II+\0\x08\0\0\0" + (16).to_bytes(8, "little") + (2).to_bytes(8, "little")
    for tag, value in ((256, 53), (257, 41)):
        wide += tag.to_bytes(2, "little") + (16).to_bytes(2, "little") + (1).to_bytes(8, "little")
        wide += value.to_bytes(8, "little")
    assert header_size(wide) == (53, 41)
    extended = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + (52).to_bytes(3, "little") + b"\x28\0\0"
    assert header_size(extended) == (53, 41)


def test_a_thumbnail_is_not_taken_for_the_picture() -> None:
    photo = encoded("jpg")
    _, small = cv2.imencode(".jpg", PICTURE[:8, :8])
    inside = b"Exif\0\0" + bytes(small)
    photo = photo[:2] + b"\xff\xe1" + (len(inside) + 2).to_bytes(2, "big") + inside + photo[2:]
    assert header_size(photo) == (53, 41)
    assert np.asarray(cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)).shape == (41, 53, 3)


@given(st.sampled_from(sorted(WRITTEN)), st.integers(0, 400), st.binary(max_size=4), st.integers(0, 60))
def test_damaged_headers_raise_nothing(kind: str, length: int, noise: bytes, at: int) -> None:
    data = bytearray(encoded(kind)[:length])
    data[at : at + len(noise)] = noise
    size = header_size(bytes(data))
    assert size is None or min(size) >= 1


def test_what_is_no_picture_has_no_size() -> None:
    for data in (b"", b"GIF89a\1\0\1\0", b"BM", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff\xd9", b"II*\0"):
        assert header_size(data) is None


# --- folders of images -----------------------------------------------------------------------------


def test_a_bomb_in_a_folder_is_refused_before_it_is_decoded(tmp_path: Path, big: bytes) -> None:
    folder = videos.make_images(tmp_path / "clip", 2, "png")
    (folder / "frame2.png").write_bytes(big)
    before = peak_bytes()
    with open_source(str(folder)) as source, pytest.raises(PictureTooLargeError) as caught:
        list(source.frames())
    assert peak_bytes() - before < 100e6
    said = str(caught.value)
    for part in (f"{folder}: frame2.png", "20000x20000", "400000000", str(MAX_PIXELS), "--max-pixels"):
        assert part in said
    assert Failure.of(caught.value).permanent
    (folder / "frame2.png").rename(folder / "a-frame.png")
    with pytest.raises(PictureTooLargeError, match="20000x20000"):
        open_source(str(folder))


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_limit_is_the_largest_size_allowed(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(encoded(kind))
    with open_source(str(tmp_path), max_pixels=53 * 41) as source:
        assert [f.size for f in source.frames()] == [(41, 53)]
    with pytest.raises(PictureTooLargeError, match="53x41 has 2173 pixels; at most 2172"):
        open_source(str(tmp_path), max_pixels=53 * 41 - 1)


def test_the_suffix_does_not_choose_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("png"))
    with pytest.raises(PictureTooLargeError, match="53x41"):
        open_source(str(tmp_path), max_pixels=100)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "9"])
def test_a_limit_is_a_whole_number_of_pixels(tmp_path: Path, limit: object) -> None:
    folder = videos.make_images(tmp_path / "clip", 1, "png")
    video = videos.make_video(tmp_path / "clip.mp4", 2)
    for path in (folder, video):
        with pytest.raises(UsageError, match=r"max_pixels=.* is not allowed"):
            open_source(str(path), max_pixels=limit)  # type: ignore[arg-type]


# --- videos ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("clip.mp4", {}),
        ("clip.mkv", {}),
        ("clip.ts", {}),
        ("clip.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("clip.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("mpeg4.mp4", {"codec": "mpeg4"}),
        ("clip.mpg", {"codec": "mpeg2"}),
    ],
)
def test_a_video_of_larger_pictures_is_refused(tmp_path: Path, name: str, recipe: dict[str, Any]) -> None:
    video = videos.make_video(tmp_path / name, 8, **recipe)
    with pytest.raises(PictureTooLargeError) as caught:
        open_source(str(video), max_pixels=160 * 120 - 1)
    for part in (str(video), "160x120 has 19200 pixels", "at most 19199", "--max-pixels"):
        assert part in str(caught.value)
    with open_source(str(video), max_pixels=160 * 120) as source:
        assert len(list(source.frames())) == 8


def test_larger_pictures_in_the_midst_of_a_video_are_lost(tmp_path: Path) -> None:
    count = 240  # more than FFmpeg looks at to find out what the stream is
    small = videos.make_video(tmp_path / "small.ts", count)
    large = videos.make_video(tmp_path / "large.ts", 8, width=320, height=240, start_pts=count * 512)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    for threads in (1, 2):
        with open_source(str(both), threads=threads) as source:
            assert {f.size for f in source.frames()} == {(120, 160), (240, 320)}
        with open_source(str(both), threads=threads, max_pixels=160 * 120) as source:
            assert [f.size for f in source.frames()] == [(120, 160)] * count
            assert sum(event.count for event in source.trailing_losses) == 8


def test_a_picture_larger_than_its_container_says_is_not_decoded(tmp_path: Path) -> None:
    """The size in an MP4's sample entry may be wrong; the decoder uses the stream's own."""
    video = videos.make_video(tmp_path / "clip.mp4", 8)
    data = bytearray(video.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert data[at : at + 4] == b"\0\xa0\0\x78"
    data[at : at + 4] = b"\0\x10\0\x10"
    video.write_bytes(bytes(data))
    with pytest.raises(NotAVideoError, match="160x120 has 19200 pixels"):
        open_source(str(video), max_pixels=160 * 120 - 1)


def test_tracking_and_rendering_take_a_limit(tmp_path: Path, model: str) -> None:
    folder = videos.make_images(tmp_path / "clip", 2, "png")
    out = tmp_path / "out"
    prompts = PromptSet.from_record(
        {"version": 1, "objects": [{"frame": 0, "id": 1, "polygons": [[9, 9, 49, 9, 49, 49, 9, 49]]}]}
    )
    chosen: dict[str, Any] = {"model": model, "threads": 1, "stream_id": "clip"}
    with pytest.raises(PictureTooLargeError, match="at most 100"):
        track(folder, out, prompts, max_pixels=100, **chosen)
    assert track(folder, out, prompts, max_pixels=160 * 120, **chosen).frames == 2
    with pytest.raises(PictureTooLargeError, match="at most 100"):
        render(folder, out, tmp_path / "overlay.mp4", stream_id="clip", max_pixels=100)
    worker = Worker(
        WorkerSettings(str(out), tracking=TrackSettings.of(model=model, threads=1, max_pixels=100))
    )
    failure = worker.open(StreamSpec("other", str(folder), prompts=prompts.to_record())).failure
    assert failure is not None
    assert (failure.kind, failure.permanent) == ("PictureTooLargeError", True)


# --- prompts ---------------------------------------------------------------------------------------


def test_a_bomb_given_as_masks_is_refused_before_it_is_decoded(tmp_path: Path, big: bytes) -> None:
    path = tmp_path / "masks.png"
    path.write_bytes(big)
    before = peak_bytes()
    with pytest.raises(PromptError, match=r"masks\.png: .*20000x20000.*--max-pixels"):
        load_mask_png(str(path))
    assert peak_bytes() - before < 100e6
    small = plain_png(np.ones((4, 5), np.int64), 8, GREY)
    with pytest.raises(PromptError, match="5x4 has 20 pixels; at most 19"):
        decode_index_png(small, "m.png", 19)
    assert decode_index_png(small, "m.png", 20).shape == (4, 5)
