"""`xmem track --detect`: objects without prompts, from the command line."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.onnx_models import model_of
from support.onnx_models import picture as onnx_picture
from support.tiny import tiny_weights
from support.videos import make_video

from jobs.cli.app import main
from pipeline.analytics.query import query


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 frames per second; a dark object walks in after 1.5 s."""
    pictures = [np.full((96, 128, 3), 150, np.uint8) for _ in range(34)]
    for index in range(16, 34):
        pictures[index][30:70, 5 * (index - 16) : 5 * (index - 16) + 18] = (30, 30, 60)
    folder = tmp_path_factory.mktemp("clip")
    return make_video(folder / "clip.mkv", pictures, rate=10, time_base=Fraction(1, 10))


def call(clip: Path, out: Path, *more: str) -> int:
    model = tiny_weights(out.parent)
    with pytest.raises(SystemExit) as caught:
        main(["track", str(clip), "--out", str(out), "--model", model, "--threads", "1", *more])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_detect_needs_no_prompts(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(clip, out, "--stream-id", "s", "--detect", "motion", "--detect-every", "2") == 0
    added = query(out, "select frame_index, object_id from events where reason = 'detector'").to_pylist()
    assert added
    assert added[0]["object_id"] == 1
    assert 19 <= added[0]["frame_index"] <= 28
    record = json.loads((out / "streams" / "s.json").read_text())
    assert record["settings"]["detector"] == "motion"
    assert record["settings"]["detect_every"] == 2
    capsys.readouterr()
    # And on again, with nothing to do.
    assert call(clip, out, "--stream-id", "s", "--detect", "motion", "--detect-every", "2") == 0
    assert "nothing to do" in capsys.readouterr().err


def test_an_exported_network_finds_objects_with_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [
        onnx_picture(96, 128, red=(4 + 4 * at, 10, 24, 40), blue=(100 - 4 * at, 50, 20, 30))
        for at in range(10)
    ]
    video = make_video(tmp_path / "moving.mkv", pictures)
    network = "onnx:" + str(model_of("yolov8", tmp_path / "net.onnx"))
    out = tmp_path / "out"
    options = ("--stream-id", "s", "--detect-every", "1")
    assert call(video, out, *options, "--detect", network, "--detect-classes", "blue,green") == 0
    added = query(out, "select detail from events where reason = 'detector'").to_pylist()
    # The random weights may lose an object, which is then found again.
    assert {json.loads(each["detail"])["category"] for each in added} == {"blue"}
    assert query(out, "select distinct category from tracks").to_pylist() == [{"category": "blue"}]

    assert call(video, tmp_path / "other", "--detect", network, "--detect-classes", "bus") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("xmem: error: ")]
    assert lines == [
        f"xmem: error: detector {network!r} has no class 'bus': its classes are red, green, blue"
    ]


def test_an_unknown_detector_is_one_line(clip: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(clip, tmp_path / "out", "--detect", "emotion") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("xmem: error: ")]
    assert lines == ["xmem: error: no detector 'emotion'; available: motion, people, file:PATH, onnx:FILE"]
    assert call(clip, tmp_path / "out", "--detect", "motion", "--max-objects", "0") == 2
    assert "max_objects=0 is not allowed: a whole number from 1 to 256" in capsys.readouterr().err


def test_detections_of_another_video_are_one_line(clip: Path, tmp_path: Path, capsys: Any) -> None:
    detections = tmp_path / "det.txt"
    detections.write_text("1,-1,10,10,20,40,0.9\n2,-1,500,10,20,40,0.9\n")
    assert call(clip, tmp_path / "out", "--detect", f"file:{detections}", "--detect-every", "1") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("xmem: error: ")]
    assert lines == [
        f"xmem: error: {detections} line 2: box 500,10,20,40 is outside frame 1 of 128x96 pixels; use "
        "detections of this video, in its pixels"
    ]
