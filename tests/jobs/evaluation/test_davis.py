from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.blobs import random_mask
from reference.plain_davis import plain_f, plain_j, plain_outline
from reference.plain_png import PALETTE, plain_png
from rich.console import Console
from support.labelled import HEIGHT, WIDTH, Replay, square, write_clip

from jobs.cli.app import main
from jobs.evaluation.davis import EvaluationReport, boundary_accuracy, outline, region_similarity, run
from pipeline.base.errors import UsageError

REAL = Path("/work/shared/data/davis2016-val-part")


def shifted(labels: np.ndarray, pixels: int = 1) -> np.ndarray:
    return np.roll(labels, pixels, axis=1)


# --- the measures --------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 18), st.integers(1, 18))


@settings(max_examples=40)
@given(SIZES, st.integers(0, 2**32 - 1))
def test_j_is_the_plain_one(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, truth = random_mask(rng, *size), random_mask(rng, *size)
    assert region_similarity(mask, truth) == plain_j(mask, truth)


@settings(max_examples=60)
@given(SIZES, st.integers(0, 2**32 - 1), st.sampled_from([0.008, 0.05, 0.12, 1, 2, 5]))
def test_f_is_the_plain_one(size: tuple[int, int], seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    mask, truth = random_mask(rng, *size), random_mask(rng, *size)
    assert list(zip(*np.nonzero(outline(mask)), strict=True)) == plain_outline(mask)
    assert boundary_accuracy(mask, truth, tolerance) == plain_f(mask, truth, tolerance)


def test_outline_of_a_pixel_lies_up_and_left_of_it_too() -> None:
    mask = np.zeros((4, 4), np.bool_)
    mask[2, 2] = True
    np.testing.assert_array_equal(
        outline(mask), np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.bool_)
    )


def test_matches_reach_as_far_as_the_rounded_up_share_of_the_diagonal_and_no_farther() -> None:
    # 480 x 854: 0.008 of the diagonal is 7.84, so 8 pixels match and 9 do not.
    assert math.ceil(0.008 * math.hypot(480, 854)) == 8
    scores = []
    for distance in (8, 9):
        mask, truth = np.zeros((480, 854), np.bool_), np.zeros((480, 854), np.bool_)
        truth[:, :400] = True
        mask[:, : 400 + distance] = True
        scores.append(boundary_accuracy(mask, truth))
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("mask", "truth", "j", "f"),
    [
        (np.zeros((9, 9), np.bool_), np.zeros((9, 9), np.bool_), 1.0, 1.0),
        (np.ones((9, 9), np.bool_), np.ones((9, 9), np.bool_), 1.0, 1.0),
        (np.zeros((9, 9), np.bool_), np.eye(9, dtype=np.bool_), 0.0, 0.0),
        (np.eye(9, dtype=np.bool_), np.zeros((9, 9), np.bool_), 0.0, 0.0),
        # Neither has an outline, so F sees no difference between everything and nothing; nor does DAVIS's.
        (np.ones((9, 9), np.bool_), np.zeros((9, 9), np.bool_), 0.0, 1.0),
    ],
)
def test_empty_and_full_masks(mask: Any, truth: Any, j: float, f: float) -> None:
    assert (region_similarity(mask, truth), boundary_accuracy(mask, truth)) == (j, f)


def drawn(kind: str, h: int, w: int, cy: int, cx: int, ry: int, rx: int) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    if kind == "ellipse":
        return np.asarray((y - cy) ** 2 * rx**2 + (x - cx) ** 2 * ry**2 <= (ry * rx) ** 2)
    if kind == "box":
        return np.asarray((abs(y - cy) <= ry) & (abs(x - cx) <= rx))
    return np.asarray(abs(y - cy) * rx + abs(x - cx) * ry <= ry * rx)  # diamond


# Truth, answer, and J and F as `db_eval_iou` and `db_eval_boundary` of davis2017-evaluation (commit 30b698a,
# with NumPy's removed `np.bool` as `bool`, OpenCV and scikit-image) print them.
OF_THE_TOOLKIT = {
    "larger": (
        ("ellipse", 480, 854, 200, 300, 60, 90),
        ("ellipse", 480, 854, 203, 305, 71, 84),
        (0.8334790434559013, 0.6857036727492223),
    ),
    "box and diamond": (
        ("box", 480, 854, 240, 427, 50, 80),
        ("diamond", 480, 854, 240, 427, 70, 110),
        (0.70580950842621, 0.39350586722391895),
    ),
    "at the edge": (
        ("box", 480, 854, 470, 10, 40, 60),
        ("box", 480, 854, 462, 2, 52, 57),
        (0.631578947368421, 0.13545816733067728),
    ),
    "thin": (
        ("box", 240, 427, 100, 200, 1, 60),
        ("box", 240, 427, 104, 205, 0, 66),
        (0.0, 0.6587652057990334),
    ),
    "one pixel": (("box", 240, 427, 100, 200, 0, 0), ("box", 240, 427, 102, 203, 0, 0), (0.0, 1.0)),
    "apart": (("ellipse", 240, 427, 60, 80, 20, 30), ("ellipse", 240, 427, 160, 300, 25, 20), (0.0, 0.0)),
    "small picture": (
        ("ellipse", 20, 30, 9, 14, 5, 8),
        ("diamond", 20, 30, 10, 15, 6, 9),
        (0.6879432624113475, 0.7922535211267606),
    ),
    "odd sides": (
        ("diamond", 481, 855, 300, 600, 120, 160),
        ("ellipse", 481, 855, 310, 590, 88, 118),
        (0.7672533810660302, 0.37217763023261097),
    ),
}


@pytest.mark.parametrize("case", OF_THE_TOOLKIT)
def test_hand_made_cases_have_the_figures_of_the_davis_toolkit(case: str) -> None:
    truth, mask, (j, f) = OF_THE_TOOLKIT[case]
    shown, given = drawn(*truth), drawn(*mask)
    assert region_similarity(given, shown) == pytest.approx(j, abs=1e-12)
    assert boundary_accuracy(given, shown) == pytest.approx(f, abs=1e-12)


def test_a_hand_made_video_has_the_figures_of_the_davis_toolkit(tmp_path: Path) -> None:
    """Two objects, without the first and last frame; the answer drifts, grows and loses one on a frame."""
    truth, answer = [], []
    for t in range(6):
        one, two = (
            drawn("ellipse", 40, 60, 12 + t, 16 + 2 * t, 8, 11),
            drawn("box", 40, 60, 28 - t, 42 - 2 * t, 6, 8),
        )
        truth.append(np.where(one, 1, np.where(two, 2, 0)).astype(np.uint8))
        one = drawn("ellipse", 40, 60, 12 + t, 16 + 3 * t, 7 + t % 3, 11)
        two = drawn("box", 40, 60, 28 - t, 41 - 2 * t, -1 if t == 3 else 6, 9)
        answer.append(np.where(one, 1, np.where(two, 2, 0)).astype(np.uint8))
    write_clip(tmp_path, "two", truth)
    report = run(tmp_path, Replay(answer))
    expected = [[0.7356413724283155, 0.6047711426000899], [0.6483127965918896, 0.5939166646786188]]
    found = [[o.j, o.f] for o in report.clips[0].objects]
    np.testing.assert_allclose(np.array(found, np.float64), expected, rtol=0, atol=1e-12)
    assert report.j == pytest.approx(0.6919770845101025, abs=1e-12)
    assert report.f == pytest.approx(0.5993439036393544, abs=1e-12)


# --- a data set ----------------------------------------------------------------------------------


def test_truth_against_itself_is_a_hundred_and_a_pixel_off_costs_j_only(tmp_path: Path) -> None:
    truth = [square(10, 5 + 3 * i) for i in range(6)]
    write_clip(tmp_path, "walk", truth)
    exact = run(tmp_path, Replay(truth)).to_json()
    assert exact["overall"] == {"J&F": 100.0, "J": 100.0, "F": 100.0}
    off = run(tmp_path, Replay([shifted(t) for t in truth])).to_json()
    assert off["overall"]["F"] == 100.0
    assert off["overall"]["J"] == pytest.approx(100 * 132 / 156, abs=1e-3)
    assert off["overall"]["J&F"] == pytest.approx((100 + 100 * 132 / 156) / 2, abs=1e-3)
    assert set(off["clips"]) == {"walk"}
    assert {k: off["clips"]["walk"][k] for k in ("J&F", "J", "F")} == off["overall"]


def test_first_and_last_frame_do_not_count(tmp_path: Path) -> None:
    truth = [square(10, 5 + 3 * i) for i in range(5)]
    nothing = np.zeros_like(truth[0])
    write_clip(tmp_path, "a", truth)
    assert run(tmp_path, Replay([nothing, *truth[1:4], nothing])).j == 1.0
    for wrong in (1, 2, 3):
        answer = list(truth)
        answer[wrong] = nothing
        report = run(tmp_path, Replay(answer))
        assert report.j == pytest.approx(2 / 3)
        assert report.f == pytest.approx(2 / 3)


def test_overall_is_the_mean_over_objects_not_over_clips(tmp_path: Path) -> None:
    def two(i: int) -> np.ndarray:
        return np.asarray(square(2, 3 + i, value=1) + square(20, 30 + i, value=2))

    pair, single = [two(i) for i in range(4)], [square(9, 9 + i) for i in range(4)]
    write_clip(tmp_path, "b-pair", pair)
    write_clip(tmp_path, "a-single", single)
    lost_second = [np.where(p == 2, 0, p) for p in pair]
    report = run(tmp_path, Replay(single, lost_second))
    assert [c.name for c in report.clips] == ["a-single", "b-pair"]
    assert [(o.object_id, o.j, o.f, o.frames) for o in report.clips[1].objects] == [
        (1, 1.0, 1.0, 2),
        (2, 0.0, 0.0, 2),
    ]
    assert report.clips[1].j == 0.5
    assert report.j == pytest.approx(2 / 3)
    figures = report.to_json()
    assert figures["clips"]["b-pair"]["J"] == 50.0
    assert figures["overall"]["J"] == pytest.approx(66.667)


def test_labels_swapped_between_objects_score_nothing(tmp_path: Path) -> None:
    truth = [square(2, 3 + i, value=1) + square(20, 30 + i, value=2) for i in range(4)]
    write_clip(tmp_path, "a", truth)
    swapped = [np.choose(t, [0, 2, 1]) for t in truth]
    assert run(tmp_path, Replay(swapped)).j == 0.0


def test_the_segmenter_gets_rgb_frames_in_order_and_the_first_mask_only(tmp_path: Path) -> None:
    truth = [square(5, 5 + i, value=3) for i in range(4)]
    write_clip(tmp_path, "x", truth)
    write_clip(tmp_path, "y", truth)
    replay = Replay(truth, truth)
    run(tmp_path, replay)
    assert len(replay.states) == 2  # nothing is carried from clip to clip
    for state in replay.states:
        assert len(state["frames"]) == 4
        for i, frame in enumerate(state["frames"]):
            assert (frame.dtype, frame.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
            assert np.abs(frame[0, 0].astype(int) - (10 * i, 100, 200)).max() <= 3
        first, *later = state["prompts"]
        assert later == [None, None, None]
        assert list(first.masks) == [3]
        np.testing.assert_array_equal(np.asarray(first.masks[3]), truth[0] == 3)


def test_an_object_that_shows_later_is_given_there_and_scored_from_the_next_frame(tmp_path: Path) -> None:
    truth = [square(5, 5 + i) for i in range(5)]
    for i in (2, 3, 4):
        truth[i] = truth[i] + square(22, 30 + i, value=7)
    write_clip(tmp_path, "late", truth)
    replay = Replay([truth[0], truth[1], np.where(truth[2] == 7, 0, truth[2]), truth[3], truth[4]])
    report = run(tmp_path, replay)
    given = [sorted(p.masks) if p is not None else [] for p in replay.states[0]["prompts"]]
    assert given == [[1], [], [7], [], []]
    assert [(o.object_id, o.j, o.frames) for o in report.clips[0].objects] == [(1, 1.0, 3), (7, 1.0, 1)]


def test_255_alone_is_object_one_and_beside_others_counts_for_nobody(tmp_path: Path) -> None:
    truth = [square(10, 5 + i) for i in range(4)]
    write_clip(tmp_path / "binary", "a", [t * 255 for t in truth])
    assert run(tmp_path / "binary", Replay(truth)).j == 1.0

    marked = [t + square(25, 5 + i, value=255) for i, t in enumerate(truth)]
    write_clip(tmp_path / "void", "a", marked)
    spilt = [np.where(m == 255, 1, m) for m in marked]
    replay = Replay(spilt)
    report = run(tmp_path / "void", replay)
    assert [o.object_id for o in report.clips[0].objects] == [1]
    assert (report.j, report.f) == (1.0, 1.0)
    np.testing.assert_array_equal(np.asarray(replay.states[0]["prompts"][0].masks[1]), truth[0] == 1)


def test_palette_annotations_and_a_layout_without_480p(tmp_path: Path) -> None:
    colours = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (0, 0, 0)]
    truth = [square(2, 3 + i, value=1) + square(20, 30 + i, value=3) for i in range(4)]
    write_clip(tmp_path, "a", [plain_png(t, 8, PALETTE, colours) for t in truth], layer=".")
    replay = Replay(truth)
    report = run(tmp_path, replay)
    assert sorted(replay.states[0]["prompts"][0].masks) == [1, 3]
    assert (report.j, report.f) == (1.0, 1.0)


def test_frames_without_annotation_are_tracked_but_not_scored(tmp_path: Path) -> None:
    truth = [square(10, 5 + i) for i in range(6)]
    write_clip(tmp_path, "sparse", [truth[0], None, truth[2], None, None, truth[5]])
    nothing = np.zeros_like(truth[0])
    replay = Replay([truth[0], nothing, shifted(truth[2]), nothing, nothing, nothing])
    (clip,) = run(tmp_path, replay).clips
    assert (clip.frames, clip.objects[0].frames) == (6, 1)
    assert clip.j == pytest.approx(132 / 156)


def test_clips_and_frames_can_be_limited_and_progress_is_told(tmp_path: Path) -> None:
    truth = [square(10, 5 + i) for i in range(6)]
    for name in ("a", "b", "c"):
        write_clip(tmp_path, name, truth)
    lines: list[str] = []
    answer = [truth[0], truth[1], truth[2], np.zeros_like(truth[0])]  # the fourth frame is now the last
    replay = Replay(answer, answer)
    report = run(tmp_path, replay, clips=["c", "a"], max_frames=4, progress=lines.append)
    assert [(c.name, c.frames, c.objects[0].frames, c.j) for c in report.clips] == [
        ("a", 4, 2, 1.0),
        ("c", 4, 2, 1.0),
    ]
    assert [len(s["frames"]) for s in replay.states] == [4, 4]
    assert lines[0] == f"DAVIS ({tmp_path}): 2 clips, 8 frames; 2 objects are scored on 4 annotated frames"
    assert [line.split(":")[0] for line in lines[1:]] == ["1/2 a", "2/2 c"]
    assert all("J&F 100.0" in line for line in lines[1:])
    assert all(clip.seconds > 0 and clip.frames_per_second > 0 for clip in report.clips)


def test_tensors_are_taken_too(tmp_path: Path) -> None:
    truth = [square(10, 5 + i) for i in range(4)]
    write_clip(tmp_path, "a", truth)

    class OnSomeDevice:
        """A tensor that, like one on a GPU, NumPy can't read before it was copied."""

        def __init__(self, labels: np.ndarray) -> None:
            self.labels = torch.from_numpy(labels)

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise TypeError("can't convert a device tensor to numpy")

        def cpu(self) -> torch.Tensor:
            return self.labels

    class Tensors(Replay):
        def step(self, state: dict[str, Any], frame: Any, prompt: Any = None) -> Any:
            return SimpleNamespace(label_map=OnSomeDevice(super().step(state, frame, prompt).label_map))

    assert run(tmp_path, Tensors(truth)).j == 1.0


def test_table_shows_the_same_figures(tmp_path: Path) -> None:
    truth = [square(10, 5 + i) for i in range(4)]
    write_clip(tmp_path, "some-clip", truth)
    text = io.StringIO()
    Console(file=text, width=120).print(run(tmp_path, Replay([shifted(t) for t in truth])).table())
    rows = [line for line in text.getvalue().splitlines() if "some-clip" in line or "overall" in line]
    assert len(rows) == 2
    assert all("92.3" in row and "84.6" in row and "100.0" in row for row in rows)


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_clip(tmp_path, "a", [square(10, 5 + i) for i in range(4)])
    return tmp_path


def refused(root: Path, labels: list[np.ndarray] | None = None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        run(root, Replay(labels or [square(10, 5)] * 9), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_of_another_layout_is_refused(tmp_path: Path, good: Path) -> None:
    assert "no folder JPEGImages" in refused(good / "JPEGImages")
    assert "no folder JPEGImages" in refused(good / "nowhere")
    empty = tmp_path / "empty"
    for name in ("JPEGImages", "Annotations"):
        (empty / name / "480p").mkdir(parents=True)
    assert "holds no clip" in refused(empty)


def test_unknown_clips_and_too_few_frames_are_refused(good: Path) -> None:
    assert "no clip 'b'" in (message := refused(good, clips=["a", "b"]))
    assert "there are: a" in message
    assert "at least 3" in refused(good, max_frames=2)
    (good / "JPEGImages/480p/a/00003.jpg").unlink()
    (good / "JPEGImages/480p/a/00002.jpg").unlink()
    assert "2 .jpg files" in refused(good)


def test_annotations_that_are_missing_or_stray_are_refused(good: Path) -> None:
    masks = good / "Annotations/480p/a"
    (masks / "00009.png").write_bytes((masks / "00001.png").read_bytes())
    assert "00009.png has no frame of that name" in refused(good)
    for path in masks.iterdir():
        path.unlink()
    assert "has no annotation" in refused(good)


def test_unreadable_pictures_are_named(good: Path) -> None:
    (good / "Annotations/480p/a/00001.png").write_bytes(b"no picture")
    assert "00001.png is not a PNG" in refused(good)
    assert cv2.imwrite(str(good / "Annotations/480p/a/00001.png"), square(10, 6))
    (good / "JPEGImages/480p/a/00002.jpg").write_bytes(b"no picture")
    assert "00002.jpg cannot be decoded" in refused(good)


def test_coloured_annotations_are_refused(good: Path) -> None:
    assert cv2.imwrite(
        str(good / "Annotations/480p/a/00000.png"), np.dstack([square(1, 1)] * 2 + [square(2, 2)])
    )
    assert "coloured" in refused(good)


def test_annotations_of_another_size_are_refused(good: Path) -> None:
    assert cv2.imwrite(str(good / "Annotations/480p/a/00001.png"), np.zeros((20, 30), np.uint8))
    message = refused(good)
    assert "00001.png is 30x20, its frame 60x40" in message


def test_clips_that_show_nothing_are_refused(good: Path) -> None:
    for path in (good / "Annotations/480p/a").iterdir():
        assert cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH), np.uint8))
    assert "clip a: no annotated object" in refused(good)


def test_labels_of_another_size_are_refused(good: Path) -> None:
    assert "labels of (20, 30)" in refused(good, [np.zeros((20, 30), np.uint8)] * 4)


# --- other benchmarks' layouts ------------------------------------------------------------------


def never_asked(root: Path, **options: Any) -> str:
    """The refusal of a data set on which nothing is tracked before it is refused."""
    replay = Replay([square(10, 5)] * 9)
    with pytest.raises(UsageError) as caught:
        run(root, replay, **options)
    assert replay.states == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_annotations_of_new_objects_only_are_no_truth(tmp_path: Path) -> None:
    new = square(22, 30, value=2)
    write_clip(tmp_path, "0a1b", [square(5, 5), None, new, None, None, None], layer=".")
    message = never_asked(tmp_path)
    assert "clip 0a1b cannot be scored" in message
    assert "YouTube-VOS" in message
    # Nor is it a matter of how the frames in between are written.
    empty = np.zeros_like(new)
    write_clip(tmp_path / "filled", "a", [square(5, 5), empty, new, empty, empty], layer=".")
    assert "YouTube-VOS" in never_asked(tmp_path / "filled")
    # One clip of that kind is enough, behind others that could be scored.
    write_clip(tmp_path / "mixed", "a", [square(5, 5 + i) for i in range(4)], layer=".")
    write_clip(tmp_path / "mixed", "b", [square(5, 5), new, None, None], layer=".")
    assert "clip b" in never_asked(tmp_path / "mixed")


def test_a_part_without_truth_is_refused_where_nothing_is_written(tmp_path: Path) -> None:
    write_clip(tmp_path / "valid", "0a1b", [square(5, 5), None, None, None], layer=".")
    (tmp_path / "valid" / "meta.json").write_text('{"videos": {}}')
    for root in (tmp_path / "valid", tmp_path):
        message = never_asked(root)
        assert "clip 0a1b cannot be scored" in message
        assert message.endswith("--masks-out DIR writes the masks without a score")


@pytest.mark.parametrize("clips", [None, ["a"]])
def test_annotations_of_first_frames_only_cannot_be_scored(tmp_path: Path, clips: Any) -> None:
    write_clip(tmp_path, "a", [square(5, 5), None, None, None])
    write_clip(tmp_path, "b", [square(5, 5), None, None, None])
    message = never_asked(tmp_path, clips=clips)
    assert "clip a cannot be scored: one of its 4 frames has an annotation, as in DAVIS test-dev" in message


def test_the_validation_list_is_honoured(tmp_path: Path) -> None:
    truth = [square(10, 5 + i) for i in range(4)]
    for name in ("cows", "dog", "train-only"):
        write_clip(tmp_path, name, truth)
    # As in the full DAVIS: a clip of another list may have no annotations at all.
    for path in (tmp_path / "Annotations/480p/train-only").iterdir():
        path.unlink()
    lists = tmp_path / "ImageSets"
    (lists / "480p").mkdir(parents=True)
    told: list[str] = []
    lines = [f"/JPEGImages/480p/cows/{i:05d}.jpg /Annotations/480p/cows/{i:05d}.png" for i in range(4)]
    (lists / "480p" / "val.txt").write_text("\n".join(lines) + "\n")
    assert [c.name for c in run(tmp_path, Replay(truth)).clips] == ["cows"]
    (lists / "2016").mkdir()
    (lists / "2016" / "val.txt").write_text("dog\n")
    assert [c.name for c in run(tmp_path, Replay(truth)).clips] == ["dog"]
    (lists / "2017").mkdir()
    (lists / "2017" / "val.txt").write_text("cows\ndog\n\n")
    report = run(tmp_path, Replay(truth, truth), progress=told.append)
    assert [c.name for c in report.clips] == ["cows", "dog"]
    assert told[0] == (
        f"DAVIS 2017 ({lists / '2017' / 'val.txt'}): 2 clips, 8 frames; 2 objects are scored on 4 annotated "
        "frames"
    )
    assert [c.name for c in run(tmp_path, Replay(truth), clips=["dog"]).clips] == ["dog"]
    (lists / "2017" / "val.txt").write_text("cows\ngoat\n")
    assert "names clip 'goat', which is not in" in never_asked(tmp_path)


def test_a_root_whose_lists_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", [square(5, 5), None, None, None])
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "test-dev.txt").write_text("a\n")
    assert "as in DAVIS test-dev" in never_asked(tmp_path)


def test_the_command_ends_with_2_and_without_a_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path, "a", [square(5, 5), square(22, 30, value=2), None, None])
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(tmp_path), "--json"])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "YouTube-VOS" in told.err


# --- real data -----------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here")
def test_real_clips_score_a_hundred_against_themselves() -> None:
    truth = {}
    for clip in ("bmx-trees", "dog"):
        files = sorted((REAL / "Annotations/480p" / clip).glob("*.png"))[:4]
        truth[clip] = [
            (np.asarray(cv2.imread(str(f), cv2.IMREAD_UNCHANGED)) > 0).astype(np.uint8) for f in files
        ]
    report: EvaluationReport = run(REAL, Replay(*truth.values()), clips=list(truth), max_frames=4)
    assert report.to_json()["overall"] == {"J&F": 100.0, "J": 100.0, "F": 100.0}
    off = run(
        REAL,
        Replay(*[[shifted(t) for t in clip] for clip in truth.values()]),
        clips=list(truth),
        max_frames=4,
    )
    assert off.f == 1.0
    assert off.j is not None
    assert 0.8 < off.j < 1.0
