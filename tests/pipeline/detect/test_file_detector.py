"""The detector file:PATH: its formats, replay by frame, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UsageError
from pipeline.base.records import Frame
from pipeline.detect.file_detector import FileDetector
from pipeline.detect.loading import load_detector
from pipeline.testing.detectors import check_detector

MOT = """\
1,-1,10.4,5.6,4.0,8.0,0.9,-1,-1,-1
1,-1,-3,2,10,10,0.5,-1,-1,-1

3,-1,20,10,30,40,0.25
"""


def frame_at(index: int) -> Frame:
    return Frame(np.zeros((30, 40, 3), np.uint8), index, None)


def written(folder: Path, text: str, name: str = "det.txt") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_mot_text_is_replayed_from_frame_zero_with_boxes_cut_at_the_edge(tmp_path: Path) -> None:
    detector = load_detector("file:" + written(tmp_path, MOT))
    first = detector.detect(frame_at(0))
    assert [(d.bounds, d.score, d.category) for d in first] == [
        ((10, 6, 4, 8), 0.9, None),
        ((0, 2, 7, 10), 0.5, None),
    ]
    assert detector.detect(frame_at(1)) == []
    assert [d.bounds for d in detector.detect(frame_at(2))] == [(20, 10, 20, 20)]
    assert detector.detect(frame_at(3)) == []


def test_csv_with_a_header_counts_frames_from_zero_and_has_categories(tmp_path: Path) -> None:
    text = "frame_index,category,x,y,w,h,score\n0,person,1,2,3,4,0.5\n1,,5,6,7,8,\n"
    detector = FileDetector(written(tmp_path, text))
    (person,), (unnamed,) = detector.detect(frame_at(0)), detector.detect(frame_at(1))
    assert (person.bounds, person.category, person.score) == ((1, 2, 3, 4), "person", 0.5)
    assert (unnamed.bounds, unnamed.category, unnamed.score) == ((5, 6, 7, 8), None, 1.0)


def test_it_keeps_the_promises_of_a_detector(tmp_path: Path) -> None:
    lines = "".join(f"{number},-1,{number},10,20,30,0.8\n" for number in range(1, 101))
    path = written(tmp_path, lines)
    check_detector(lambda: FileDetector(path))


def test_state_of_another_file_is_refused(tmp_path: Path) -> None:
    one = FileDetector(written(tmp_path, MOT))
    other = FileDetector(written(tmp_path, MOT + "4,-1,1,1,5,5,1\n", "other.txt"))
    with pytest.raises(ValueError, match=r"other\.txt"):
        other.from_bytes(one.to_bytes())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,-1,1,2,3\n", "line 1: 5 values; expected MOT text"),
        ("1,-1,1,2,3,4,1\n2,-1,1,2,0,4,1\n", "line 2: box of 0 x 4 pixels"),
        ("0,-1,1,2,3,4,1\n", "line 1: frame 0, not a whole number from 1 on"),
        ("1,-1,1,2,3,4,37.5\n", "line 1: score 37.5, not from 0 to 1"),
        ("1,-1,nan,2,3,4,1\n", "line 1: nan is not a finite number"),
        ("1,-1,one,2,3,4,1\n", "line 1: could not convert string to float: 'one'"),
        ("frame_index,left,y,w,h\n", "line 1: no column x; expected"),
    ],
)
def test_wrong_files_are_named_with_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=complaint) as raised:
        FileDetector(path)
    assert "det.txt" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_text_or_missing_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "det.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"det.bin is not a text file of detections"):
        FileDetector(str(binary))
    with pytest.raises(UsageError, match=r"gone.txt: no such file"):
        FileDetector(str(tmp_path / "gone.txt"))
    with pytest.raises(UsageError, match=r"names no file: give file:PATH"):
        load_detector("file:")


def test_a_box_off_the_frame_is_an_error_with_its_line(tmp_path: Path) -> None:
    detector = FileDetector(written(tmp_path, "1,-1,50,2,3,4,1\n"))
    with pytest.raises(UsageError, match=r"det.txt line 1: box 50,2,3,4 is outside frame 0 of 40x30 pixels"):
        detector.detect(frame_at(0))
