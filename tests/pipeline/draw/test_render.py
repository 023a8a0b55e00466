"""Overlays: pixels, colours, the source's timing, and atomic output files."""

import colorsys
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from support import videos

from pipeline.base.errors import SourceError, StoreError, UsageError
from pipeline.base.records import MaskRecord
from pipeline.draw import frames as draw_frames
from pipeline.draw import output_file
from pipeline.draw import video as render
from pipeline.draw.contact_sheet import contact_sheet
from pipeline.draw.look import Look
from pipeline.draw.overlay import object_color, overlay
from pipeline.draw.video import render_video
from pipeline.tracks.masks import mask_to_rle
from pipeline.video.sources import open_source


def record(
    mask: NDArray[np.bool_], object_id: int = 1, frame_index: int = 0, category: str | None = None
) -> MaskRecord:
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1) if ys.size else None
    height, width = mask.shape
    return MaskRecord(
        frame_index,
        object_id,
        height,
        width,
        int(mask.sum()),
        0.9,
        category=category,
        bbox=box,
        mask_rle=mask_to_rle(mask) if ys.size else None,
    )


def square(width: int, height: int, x: int, y: int, side: int = 20) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), np.bool_)
    mask[y : y + side, x : x + side] = True
    return mask


def following(frame_index: int, width: int = 160, height: int = 120) -> Sequence[MaskRecord]:
    x, y = videos.shapes(frame_index, width, height)["square"]
    return [record(square(width, height, x, y, 24), 5, frame_index, "square")]


# ---------------------------------------------------------------- drawing


def test_masks_are_tinted_and_the_rest_is_left_alone() -> None:
    image = videos.scene(0, 200, 160)
    mask = square(200, 160, 80, 90, 50)
    mask[105:115, 95:105] = False
    drawn = overlay(image, [record(mask, 3)], Look(opacity=0.5))
    inner = cv2.erode(mask.astype(np.uint8), np.ones((7, 7))) > 0
    expected = image[inner] * 0.5 + np.array(object_color(3)) * 0.5
    assert np.abs(drawn[inner] - expected).max() <= 1
    outline = mask & ~inner
    assert (drawn[outline] == object_color(3)).all(axis=1).mean() > 0.25
    touched = (drawn != image).any(axis=2)
    far = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))) == 0
    far[50:95, 70:] = False  # where the label is
    assert not touched[far].any()
    assert np.array_equal(drawn[109, 99], image[109, 99])  # a hole stays a hole
    assert not np.shares_memory(drawn, image)


def test_labels_name_the_object() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    mask = square(300, 200, 100, 100)
    boxes = {}
    for category in (None, "person", "Lkw-Anhänger"):
        drawn = overlay(image, [record(mask, 7, category=category)], Look(opacity=0.0))
        ys, xs = np.nonzero(drawn[:98].any(axis=2))
        boxes[category] = int(np.ptp(xs))
        assert ys.min() > 60
        assert abs(int(xs.min()) - 100) <= 2
    assert boxes[None] < boxes["person"] < boxes["Lkw-Anhänger"]


@pytest.mark.parametrize("corner", [(0, 0), (140, 0), (0, 100), (140, 100)])
def test_labels_stay_inside_the_image(corner: tuple[int, int]) -> None:
    image = np.zeros((120, 160, 3), np.uint8)
    masked = record(square(160, 120, *corner), 123456, category="anything")
    drawn = overlay(image, [masked], Look(opacity=0.0))
    label = (drawn == object_color(123456)).all(axis=2)
    assert label.sum() > 300


def test_objects_out_of_sight_are_not_drawn() -> None:
    image = videos.scene(0)
    gone = MaskRecord(0, 1, 120, 160, 0, 0.0)
    assert np.array_equal(overlay(image, [gone]), image)
    assert np.array_equal(overlay(image, []), image)


def test_colours_are_stable_and_distinct() -> None:
    assert object_color(1) == object_color(1)
    for ids in (range(1, 25), range(70_000, 70_024), range(2**31 - 24, 2**31)):
        colors = [object_color(i) for i in ids]
        assert all(0 <= c <= 255 for color in colors for c in color)
        assert min(np.abs(np.subtract(a, b)).sum() for a, b in itertools.combinations(colors, 2)) >= 12
        hues = [colorsys.rgb_to_hsv(*(c / 255 for c in color))[0] for color in colors]
        neighbours = [abs((a - b + 0.5) % 1 - 0.5) for a, b in itertools.pairwise(hues)]
        assert min(neighbours) > 0.25


def test_what_cannot_be_drawn() -> None:
    image = videos.scene(0)
    with pytest.raises(UsageError, match=r"frame 4.*object 9 is 80x60.*160x120"):
        overlay(image, [record(square(80, 60, 3, 3), 9, 4)])
    damaged = MaskRecord(2, 8, 120, 160, 5, 0.5, mask_rle="no counts")
    with pytest.raises(UsageError, match=r"frame 2.*object 8 is damaged"):
        overlay(image, [damaged])
    with pytest.raises(UsageError, match=r"opacity 1\.5"):
        overlay(image, [], Look(opacity=1.5))


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_rendered_video_shows_source_and_masks(tmp_path: Path, suffix: str) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 20, quality=10))
    output = tmp_path / f"out{suffix}"
    seen: list[int] = []
    assert render_video(uri, following, str(output), progress=seen.append) == 20
    assert seen == list(range(1, 21))
    frames = list(open_source(str(output)).frames())
    assert len(frames) == 20
    for frame in frames:
        plain = videos.scene(frame.frame_index)
        expected = overlay(plain, following(frame.frame_index))
        assert np.abs(frame.image.astype(int) - expected).mean() < (12 if suffix == ".webm" else 9)
        x, y = videos.shapes(frame.frame_index, 160, 120)["square"]
        tinted = frame.image[y + 8 : y + 16, x + 8 : x + 16].mean(axis=(0, 1))
        wanted = np.array((230, 20, 20)) * 0.5 + np.array(object_color(5)) * 0.5
        assert np.abs(tinted - wanted).max() < 25


def test_colours_survive_the_way_to_yuv_and_back(tmp_path: Path) -> None:
    flat = [np.full((64, 96, 3), color, np.uint8) for color in [(200, 30, 30), (30, 200, 30), (40, 40, 220)]]
    uri = str(videos.make_video(tmp_path / "clip.mkv", flat, codec="ffv1", pix_fmt="bgr0"))
    render_video(uri, {}, str(tmp_path / "out.mp4"))
    for image, frame in zip(flat, open_source(str(tmp_path / "out.mp4")).frames(), strict=True):
        assert np.abs(frame.image.astype(int) - image).max() <= 6


def test_uneven_times_are_kept(tmp_path: Path) -> None:
    pts = [50, 51, 52, 56, 57, 58, 70, 71, 90, 91]
    uri = str(videos.make_video(tmp_path / "clip.mkv", 10, pts=pts, b_frames=2))
    for suffix in (".mp4", ".mkv"):
        render_video(uri, {}, str(tmp_path / f"out{suffix}"))
        times = [f.pts_seconds for f in open_source(str(tmp_path / f"out{suffix}")).frames()]
        assert np.allclose(np.array(times, float), [(t - 50) / 25 for t in pts], atol=6e-4)


def test_times_that_run_backwards_still_make_a_video(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.avi", 20, b_frames=2))  # such a container mixes them up
    assert render_video(uri, {}, str(tmp_path / "out.mp4")) == 20
    assert len(list(open_source(str(tmp_path / "out.mp4")).frames())) == 20


def test_images_get_a_steady_rate(tmp_path: Path) -> None:
    folder = str(videos.make_images(tmp_path / "clip", 6))
    render_video(folder, following, str(tmp_path / "out.mp4"))
    times = [f.pts_seconds for f in open_source(str(tmp_path / "out.mp4")).frames()]
    assert times == pytest.approx([i / 25 for i in range(6)])


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    pictures = [videos.scene(i, 97, 65) for i in range(4)]
    uri = str(videos.make_video(tmp_path / "clip.mkv", pictures, codec="ffv1"))
    tracks = {i: [record(square(97, 65, 30, 30), 2, i)] for i in range(4)}
    render_video(uri, tracks, str(tmp_path / "out.mp4"))
    frames = list(open_source(str(tmp_path / "out.mp4")).frames())
    assert len(frames) == 4
    for frame in frames:
        assert frame.size == (66, 98)
        expected = overlay(pictures[frame.frame_index], tracks[frame.frame_index])
        assert np.abs(frame.image[:65, :97].astype(int) - expected).mean() < 14


def test_sizes_that_change_are_scaled(tmp_path: Path) -> None:
    folder = videos.make_images(tmp_path / "clip", 2)
    cv2.imwrite(str(folder / "frame2.jpg"), videos.scene(2, 80, 60))
    render_video(str(folder), {}, str(tmp_path / "out.mp4"))
    assert {f.size for f in open_source(str(tmp_path / "out.mp4")).frames()} == {(120, 160)}


def test_only_the_frames_asked_for(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 120))
    asked: list[int] = []

    def tracks(frame_index: int) -> Sequence[MaskRecord]:
        asked.append(frame_index)
        return following(frame_index)

    assert render_video(uri, tracks, str(tmp_path / "out.mp4"), first=90, last=99) == 10
    assert asked == list(range(89, 100))  # the frame before tells its time, which lets the source seek
    first = next(open_source(str(tmp_path / "out.mp4")).frames())
    assert first.pts_seconds == 0
    assert np.abs(first.image.astype(int) - overlay(videos.scene(90), following(90))).mean() < 10
    with pytest.raises(UsageError, match=r"no frames 200\.\."):
        render_video(uri, {}, str(tmp_path / "none.mp4"), first=200)
    with pytest.raises(UsageError, match=r"frames 5\.\.4"):
        render_video(uri, {}, str(tmp_path / "none.mp4"), first=5, last=4)
    assert not (tmp_path / "none.mp4").exists()


def test_masks_of_another_video_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 10))
    tracks = {i: following(i) for i in range(10)}
    tracks[6] = [record(square(320, 240, 9, 9), 4, 6)]
    output = tmp_path / "new" / "out.mp4"
    with pytest.raises(UsageError, match=r"frame 6.*object 4 is 320x240.*160x120"):
        render_video(uri, tracks, str(output))
    assert list(output.parent.iterdir()) == []


def test_an_existing_output_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 10))
    output = tmp_path / "out.mp4"
    output.write_bytes(b"older")
    with pytest.raises(UsageError):
        render_video(uri, {5: [record(square(8, 8, 1, 1, 3))]}, str(output))
    assert output.read_bytes() == b"older"
    render_video(uri, {}, str(output))
    assert len(list(open_source(str(output)).frames())) == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


def test_unwritable_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 3))
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "folder.mp4", tmp_path / "file" / "out.mp4", Path("/proc/none/out.mp4")):
        with pytest.raises(StoreError, match=f"{output}: cannot be written"):
            render_video(uri, {}, str(output))
    with pytest.raises(UsageError, match=r"cannot write \.gif.*\.mp4"):
        render_video(uri, {}, str(tmp_path / "out.gif"))
    with pytest.raises(UsageError, match="is the video itself"):
        render_video(uri, {}, uri)
    with pytest.raises(SourceError, match="no such file"):
        render_video(str(tmp_path / "absent.mp4"), {}, str(tmp_path / "out.mp4"))

    def full(self: object, frame: object) -> None:
        raise output_file.unwritable("out.mp4", OSError(28, "No space left on device"))

    monkeypatch.setattr(render._Writer, "_mux", full)
    with pytest.raises(StoreError, match="No space left"):
        render_video(uri, {}, str(tmp_path / "out.mp4"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "file", "folder.mp4"]


def test_outputs_on_other_file_systems(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 5))
    render_video(uri, following, "memory://rendered/out.mp4")
    contact_sheet(uri, following, "memory://rendered/sheet.png", frames=2)
    assert len(list(open_source("memory://rendered/out.mp4").frames())) == 5
    assert fsspec.filesystem("memory").cat_file("/rendered/sheet.png").startswith(b"\x89PNG")


def test_without_x264_mpeg4_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(render._SUFFIXES, ".mp4", "no_such_encoder")
    uri = str(videos.make_video(tmp_path / "clip.mp4", 5))
    render_video(uri, following, str(tmp_path / "out.mp4"))
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert (source.codec, len(list(source.frames()))) == ("mpeg4", 5)


# ---------------------------------------------------------------- contact sheets


def picture(path: Path) -> NDArray[Any]:
    found = cv2.imread(str(path))
    assert found is not None
    return found


def test_contact_sheet_holds_the_frames_asked_for(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 30, quality=5))
    contact_sheet(uri, following, str(tmp_path / "sheet.png"), frames=[20, 0, 10], columns=2, tile_width=160)
    sheet = cv2.cvtColor(picture(tmp_path / "sheet.png"), cv2.COLOR_BGR2RGB)
    assert sheet.shape == (120 * 2 + 4, 160 * 2 + 4, 3)
    for i, frame_index in enumerate((0, 10, 20)):
        y, x = i // 2 * 124, i % 2 * 164
        tile = sheet[y : y + 105, x : x + 160].astype(int)  # without the caption
        assert np.abs(tile - overlay(videos.scene(frame_index), following(frame_index))[:105]).mean() < 6
    assert (sheet[124:, 164:] == 255).all()


@pytest.mark.parametrize("tracks", [following, {i: following(i) for i in range(30)}])
def test_contact_sheet_spreads_a_number_of_frames(tmp_path: Path, tracks: draw_frames.Tracks) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 30))
    contact_sheet(uri, tracks, str(tmp_path / "sheet.png"), frames=6, columns=3, tile_width=80)
    assert picture(tmp_path / "sheet.png").shape == (60 * 2 + 4, 80 * 3 + 8, 3)


def test_contact_sheet_of_nothing(tmp_path: Path) -> None:
    uri = str(videos.make_video(tmp_path / "clip.mp4", 3))
    output = str(tmp_path / "sheet.png")
    with pytest.raises(UsageError, match=r"none of the frames 7\.\.9"):
        contact_sheet(uri, {}, output, frames=[7, 9])
    for frames in ([], [-1], 0):
        with pytest.raises(UsageError, match="at least one frame number"):
            contact_sheet(uri, {}, output, frames=frames)
    with pytest.raises(UsageError, match="columns=0"):
        contact_sheet(uri, {}, output, columns=0)
