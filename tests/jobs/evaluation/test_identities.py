"""Scores of tracks against true boxes: computed by hand, those of TrackEval, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.evaluation.identities import box_ious, evaluate_tracking, read_truth, score_boxes
from jobs.evaluation.mot_measures import Overlaps, score_overlaps
from pipeline.base.errors import UsageError
from pipeline.base.records import EVENTS_SCHEMA, MaskRecord, tracks_table
from pipeline.tracks.store import StreamStore

BOX, ELSEWHERE = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 10.0, 10.0)
GOLDEN = Path(__file__).parents[2] / "golden" / "trackeval"
CLOSE = (0.0, 0.0, 10.0, 8.0)  # IoU 0.8 with BOX


def test_perfect_tracks_have_full_scores() -> None:
    true = {frame: {1: BOX, 2: ELSEWHERE} for frame in range(5)}
    scores = score_boxes(true, {frame: {7: BOX, 9: ELSEWHERE} for frame in range(5)})
    assert (scores.idf1, scores.mota, scores.recall, scores.precision) == (100, 100, 100, 100)
    assert scores.hota == pytest.approx(100)
    assert (scores.id_switches, scores.fragmentations, scores.mostly_tracked) == (0, 0, 2)
    assert (scores.people, scores.tracks, scores.frames, scores.boxes) == (2, 2, 5, 10)


def test_a_switch_a_gap_and_a_ghost_are_counted() -> None:
    true = {frame: {1: BOX} for frame in range(10)}
    # Track 1 on frames 0 to 5, a ghost on 0 and 6, track 2 on 7 to 9.
    found = {frame: {1: BOX} for frame in range(6)} | {frame: {2: BOX} for frame in (7, 8, 9)}
    found[0] = {1: BOX, 5: ELSEWHERE}
    found[6] = {5: ELSEWHERE}
    scores = score_boxes(true, found)
    assert (scores.id_switches, scores.fragmentations) == (1, 1)
    assert scores.recall == pytest.approx(90)
    assert scores.precision == pytest.approx(100 * 9 / 11)
    assert scores.mota == pytest.approx(100 * (9 - 2 - 1) / 10)
    assert scores.idf1 == pytest.approx(100 * 2 * 6 / (10 + 11))
    # DetA 9 / 12; AssA (6 x 6/10 + 3 x 3/10) / 9, at every threshold.
    assert scores.hota == pytest.approx(100 * np.sqrt(9 / 12 * (3.6 + 0.9) / 9))


def test_hota_counts_thresholds_up_to_the_overlap() -> None:
    scores = score_boxes({0: {1: BOX}}, {0: {1: CLOSE}})
    assert scores.hota == pytest.approx(100 * 16 / 19)  # 0.05 to 0.80
    assert scores.idf1 == 100


def test_a_match_is_kept_while_it_overlaps_enough() -> None:
    true = {0: {1: BOX}, 1: {1: BOX}}
    scores = score_boxes(true, {0: {1: BOX}, 1: {1: CLOSE, 2: BOX}})
    assert scores.id_switches == 0


def test_frames_that_the_truth_lacks_are_not_scored() -> None:
    scores = score_boxes({3: {1: BOX}}, {2: {5: BOX}, 3: {4: BOX}, 4: {6: BOX}})
    assert (scores.precision, scores.tracks) == (100, 1)
    empty = score_boxes({3: {1: BOX}}, {})
    assert (empty.idf1, empty.hota, empty.mota, empty.recall, empty.precision) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("case", range(6))
def test_scores_equal_those_of_trackeval(case: int) -> None:
    golden = json.loads((GOLDEN / "cases.json").read_text())[case]
    true, found = (
        {frame: {row[0]: tuple(row[1:]) for row in rows} for frame, rows in enumerate(golden[name])}
        for name in ("true", "found")
    )
    frames = [
        Overlaps([*true[at]], [*found[at]], box_ious([*true[at].values()], [*found[at].values()]))
        for at in range(len(true))
    ]
    of_boxes, of_masks = score_boxes(true, found).to_json(), score_overlaps(frames, masks=True).to_json()
    for name, expected in golden["scores"].items():
        assert of_masks[name] == pytest.approx(expected, abs=1e-9), name
        assert name == "smotsa" or of_boxes[name] == of_masks[name]
    assert "smotsa" not in of_boxes


def test_mot_text_and_csv_are_read_and_rows_not_to_be_scored_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gt.txt"
    path.write_text("frame,id,x,y,w,h\n1,4,1,2,3,4\n\n2,5,1,2,3,4,0,-1,-1,-1\n2,6,5,6,7,8,1,-1,-1,-1\n")
    assert read_truth(str(path)) == {0: {4: (1, 2, 3, 4)}, 1: {6: (5, 6, 7, 8)}}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,1,2,3\n", "line 1: 4 values; expected frame,id,x,y,w,h with frames from 1"),
        ("1,1,a,2,3,4\n", "line 1: could not convert string to float: 'a'"),
        ("0,1,1,2,3,4\n", "line 1: frame 0, not a whole number from 1 on"),
        ("1,1,1,2,3,4\n2.5,1,1,2,3,4\n", "line 2: frame 2.5, not a whole number from 1 on"),
        ("1,1.5,1,2,3,4\n", "line 1: id 1.5, not a whole number"),
        ("1,1,1,2,-3,4\n", "line 1: box of -3 x 4 pixels"),
        ("1,1,nan,2,3,4\n", "line 1: nan is not a finite number"),
        ("1,1,1,2,3,4\n1,1,5,6,7,8\n", "line 2: id 1 is twice on frame 1"),
    ],
)
def test_wrong_truth_is_named_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "gt.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        read_truth(str(path))


@pytest.fixture
def tracked(tmp_path: Path) -> Path:
    """An output folder with one object on frames 0 to 9 of 40 x 30 pixels."""
    rows = [
        MaskRecord(at, 3, 30, 40, 100, 0.9, bbox=(0, 0, 10, 10), centroid=(5.0, 5.0), mask_rle="PQ1")
        for at in range(10)
    ]
    out = tmp_path / "out"
    StreamStore(str(out), "cam").commit(0, 9, tracks_table(rows), EVENTS_SCHEMA.empty_table())
    return out


def test_the_command_scores_an_output_folder(tracked: Path, tmp_path: Path) -> None:
    truth = tmp_path / "gt.txt"
    truth.write_text("1,1,0,0,10,10\n6,1,0,0,10,10\n10,1,25,15,10,10\n")
    given = ["evaluate", "--tracking", str(truth), str(tracked)]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.output)
    assert (scores["frames"], scores["boxes"]) == (3, 3)
    assert scores["recall"] == pytest.approx(100 * 2 / 3)
    ranged = CliRunner().invoke(app, [*given, "--last-frame", "5", "--json"])
    assert json.loads(ranged.output)["recall"] == 100
    assert "IDF1" in CliRunner().invoke(app, given, env={"COLUMNS": "200"}).output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("11,1,0,0,10,10\n", "has boxes on frame 10, but tracks are committed up to frame 9"),
        ("1,1,40,0,10,10\n", "outside frame 0 of 40x30 pixels: it is of another video"),
        ("\n", "has no boxes on frames 0 to the end"),
    ],
)
def test_truth_that_does_not_fit_the_video_is_one_line(
    tracked: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    truth = tmp_path / "gt.txt"
    truth.write_text(text)
    with pytest.raises(UsageError, match=complaint) as raised:
        evaluate_tracking(str(truth), str(tracked))
    assert "\n" not in str(raised.value)


def test_boxes_off_frames_without_rows_do_not_fit_the_video_either(tmp_path: Path) -> None:
    row = MaskRecord(9, 3, 30, 40, 100, 0.9, bbox=(0, 0, 10, 10), centroid=(5.0, 5.0), mask_rle="PQ1")
    out, truth = tmp_path / "out", tmp_path / "gt.txt"
    StreamStore(str(out), "cam").commit(0, 9, tracks_table([row]), EVENTS_SCHEMA.empty_table())
    truth.write_text("1,1,400,0,10,10\n10,1,0,0,10,10\n")
    with pytest.raises(UsageError, match=r"has the box 400,0,10,10 outside frame 0 of 40x30 pixels"):
        evaluate_tracking(str(truth), str(out))
    # The stream's record has the size where no frame of the truth has rows.
    truth.write_text("1,1,400,0,10,10\n")
    assert evaluate_tracking(str(truth), str(out)).recall == 0
    StreamStore(str(out), "cam").write_record({"width": 40, "height": 30})
    with pytest.raises(UsageError, match=r"has the box 400,0,10,10 outside frame 0 of 40x30 pixels"):
        evaluate_tracking(str(truth), str(out))


def test_folders_and_streams_without_tracks_are_named(tracked: Path, tmp_path: Path) -> None:
    truth = tmp_path / "gt.txt"
    truth.write_text("1,1,0,0,10,10\n")
    with pytest.raises(UsageError, match=r"nowhere is no output folder of xmem: nothing in it under tracks/"):
        evaluate_tracking(str(truth), str(tmp_path / "nowhere"))
    StreamStore(str(tracked), "gate").commit(0, 9, tracks_table([]), EVENTS_SCHEMA.empty_table())
    with pytest.raises(UsageError, match=r"it has tracks of cam, gate: choose one with --stream$"):
        evaluate_tracking(str(truth), str(tracked))
