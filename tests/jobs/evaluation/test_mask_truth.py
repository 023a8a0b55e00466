"""Scores of tracks against true masks, and truth that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.evaluation.identities import evaluate_tracking
from jobs.evaluation.mask_truth import is_mask_truth
from pipeline.base.errors import UsageError
from pipeline.base.records import EVENTS_SCHEMA, MaskRecord, tracks_table
from pipeline.tracks.masks import mask_to_rle, record_of_mask
from pipeline.tracks.store import StreamStore

HEIGHT, WIDTH = 30, 40


def mask(left: int, top: int, width: int, height: int) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.bool_)
    pixels[top : top + height, left : left + width] = True
    return pixels


def row(frame: int, object_id: int, pixels: np.ndarray) -> MaskRecord:
    return record_of_mask(mask_to_rle(pixels), HEIGHT, WIDTH, frame_index=frame, object_id=object_id)


def line(frame: int, track: int, pixels: np.ndarray, kind: int = 2) -> str:
    return f"{frame + 1} {track} {kind} {HEIGHT} {WIDTH} {mask_to_rle(pixels)}\n"


A, B, FAR = mask(0, 0, 10, 10), mask(20, 5, 8, 20), mask(0, 20, 6, 6)
MOST_OF_A = mask(0, 0, 10, 8)
SMALLER = mask_to_rle(np.ones((20, 40), np.bool_))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Tracks 3 and 4 on frames 0 to 9: 3 has 0.8 of A, 4 is B until frame 4; from then on track 5 is B."""
    rows = []
    for frame in range(10):
        rows += [row(frame, 3, MOST_OF_A), row(frame, 4 if frame < 5 else 5, B)]
    rows.append(row(0, 6, FAR))
    folder = tmp_path / "out"
    rows.sort(key=lambda r: (r.frame_index, r.object_id))
    StreamStore(str(folder), "cam").commit(0, 9, tracks_table(rows), EVENTS_SCHEMA.empty_table())
    return folder


def test_masks_of_mots_are_compared_pixel_by_pixel(out: Path, tmp_path: Path) -> None:
    truth = tmp_path / "any.txt"
    truth.write_text("".join(line(f, 2001, A) + line(f, 2002, B) for f in range(10)))
    scores = evaluate_tracking(str(truth), str(out))
    assert (scores.people, scores.tracks, scores.frames, scores.boxes) == (2, 4, 10, 20)
    assert (scores.recall, scores.id_switches) == (100, 1)
    assert scores.precision == pytest.approx(100 * 20 / 21)
    assert scores.mota == pytest.approx(100 * (20 - 1 - 1) / 20)
    assert scores.smotsa == pytest.approx(100 * (10 * 0.8 + 10 - 1 - 1) / 20)
    assert scores.idf1 == pytest.approx(100 * 2 * 15 / (20 + 21))


def test_what_is_on_unjudged_regions_does_not_count_unless_it_matches(out: Path, tmp_path: Path) -> None:
    truth = tmp_path / "any.txt"
    regions = mask(0, 15, 30, 15) | mask(20, 0, 8, 15)  # of FAR and of B
    text = "".join(line(f, 2001, A) + line(f, 2002, B) for f in range(10))
    truth.write_text(text + line(0, 10000, regions, 10))
    assert evaluate_tracking(str(truth), str(out)).precision == 100
    # Frame 0 has no true B any more: the track there is not judged either.
    truth.write_text(line(0, 2001, A) + line(0, 10000, regions, 10))
    scores = evaluate_tracking(str(truth), str(out))
    assert (scores.precision, scores.recall, scores.tracks) == (100, 100, 1)
    truth.write_text(line(0, 2001, A) + line(0, 10000, mask(0, 20, 6, 2), 10))  # a third of FAR
    assert evaluate_tracking(str(truth), str(out)).precision == pytest.approx(100 / 3)


def test_folders_of_index_pngs_and_coco_are_truth_too(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cam"
    folder.mkdir()
    for frame in (0, 7):
        index = np.zeros((HEIGHT, WIDTH), np.uint8)
        index[A], index[B] = 1, 2
        Image.fromarray(index).save(folder / f"{frame:05d}.png")
    scores = evaluate_tracking(str(folder), str(out))
    assert (scores.frames, scores.boxes, scores.recall, scores.id_switches) == (2, 4, 100, 1)
    document = {
        "images": [{"id": 1, "file_name": "cam/3.png", "height": HEIGHT, "width": WIDTH, "frame_index": 3}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": 1, "image_id": 1, "category_id": 1, "track_id": 9,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": mask_to_rle(A)},
            }
        ],
    }  # fmt: skip
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(document))
    scores = evaluate_tracking(str(path), str(out))
    assert (scores.frames, scores.boxes, scores.recall, scores.precision) == (1, 1, 100, 50)
    assert scores.smotsa == pytest.approx(100 * (0.8 - 1))


def test_the_command_prints_smotsa_for_masks_only(out: Path, tmp_path: Path) -> None:
    masks, boxes = tmp_path / "masks.txt", tmp_path / "boxes.txt"
    masks.write_text(line(2, 1, A))
    boxes.write_text("3,1,0,0,10,10\n")
    runner = CliRunner()
    for truth, told in ((masks, True), (boxes, False)):
        given = ["evaluate", "--tracking", str(truth), str(out)]
        result = runner.invoke(app, [*given, "--json"])
        assert result.exit_code == 0, result.output
        assert ("smotsa" in json.loads(result.output)) is told
        assert ("sMOTSA" in runner.invoke(app, given, env={"COLUMNS": "240"}).output) is told


def test_which_truth_is_of_masks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "b.txt").write_text("1 2 3 30 40 PQ1\n")
    (tmp_path / "c.txt").write_text("1, 2, 3, 4, 5, 6\n")
    found = {name: is_mask_truth(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt", "d.txt")}
    assert found == {"a.txt": False, "b.txt": True, "c.txt": False, "d.txt": False}
    assert is_mask_truth(str(tmp_path))
    assert not is_mask_truth("s3://bucket/b.txt")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (line(10, 1, A), "has masks on frame 10, but tracks are committed up to frame 9"),
        (f"1 1 2 20 40 {SMALLER}\n", "a mask of 40x20 pixels on frame 0 of 40x30: it is of another video"),
        (line(0, 1, A) + "1 2 2 30 40\n", "line 2: it needs frame, id, class, height, width and run lengths"),
        (line(0, 1, A) + "0 2 2 30 40 PQ1\n", "line 2: frames count from 1"),
    ],
)
def test_masks_that_do_not_fit_are_one_line(out: Path, tmp_path: Path, text: str, complaint: str) -> None:
    truth = tmp_path / "gt.txt"
    truth.write_text(text)
    with pytest.raises(UsageError, match=complaint) as raised:
        evaluate_tracking(str(truth), str(out))
    assert "\n" not in str(raised.value)


def test_masks_of_another_size_are_refused_on_frames_where_nothing_is_seen(tmp_path: Path) -> None:
    hidden = record_of_mask(mask_to_rle(A & FAR), HEIGHT, WIDTH, frame_index=1, object_id=3)
    assert hidden.bbox is None
    rows = tracks_table([row(0, 3, A), hidden])
    store = StreamStore(str(tmp_path / "out"), "cam")
    store.commit(0, 4, rows, EVENTS_SCHEMA.empty_table())
    truth = tmp_path / "gt.txt"
    for frame in (1, 2):  # a hidden object's row, no row
        other = f"{frame + 1} 1 2 20 40 {SMALLER}\n"
        truth.write_text(line(0, 1, A) + other)
        with pytest.raises(
            UsageError, match=f"40x20 pixels on frame {frame} of 40x30: it is of another video"
        ):
            evaluate_tracking(str(truth), str(tmp_path / "out"))
        truth.write_text(line(0, 1, A) + line(frame, 1, A))
        assert evaluate_tracking(str(truth), str(tmp_path / "out")).recall == 50
    # No scored frame has a row: the stream's record has the size, if there is one.
    truth.write_text(f"3 1 2 20 40 {SMALLER}\n")
    assert evaluate_tracking(str(truth), str(tmp_path / "out")).recall == 0
    store.write_record({"width": WIDTH, "height": HEIGHT})
    with pytest.raises(UsageError, match="40x20 pixels on frame 2 of 40x30: it is of another video"):
        evaluate_tracking(str(truth), str(tmp_path / "out"))


def test_the_truth_of_another_stream_is_refused(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "instances_txt"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(line(0, 1, A))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty has no masks$"):
        evaluate_tracking(str(tmp_path / "empty"), str(out))
    with pytest.raises(UsageError, match=r"no masks of stream 'cam'; it has those of one, two"):
        evaluate_tracking(str(folder), str(out))
    (folder / "cam.txt").write_text(line(0, 1, A) + line(0, 2, B))
    assert evaluate_tracking(str(folder), str(out)).boxes == 2
    with pytest.raises(UsageError, match="has no masks on frames 3 to the end"):
        evaluate_tracking(str(folder), str(out), first=3)
