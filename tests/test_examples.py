"""The programs of `examples/` run unchanged. The one for Ray Data is run by the tests of its stage."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.rtsp_camera import camera
from support.servers import S3Server
from support.videos import make_video, shapes

from pipeline import open_tracks, query

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
FRAMES = 24
BOX = {"version": 1, "objects": [{"id": 1, "category": "square", "box": [0, 30, 24, 24]}]}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_video(tmp_path / "clip.mp4", FRAMES)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run an example in this process as `python examples/NAME ARGUMENTS` would; returns its lines."""

    def ran(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        assert ended.value.code == 0, printed
        return printed.splitlines()

    return ran


def test_all_examples_are_listed() -> None:
    listed = re.findall(r"^\| \[`(\w+\.py)`\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in EXAMPLES.glob("*.py"))


def test_a_file(run: Any, clip: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "tracks"
    lines = run("track_file.py", clip, "--box", "0,30,24,24:7:square", "--out", out, "--model", model)
    assert lines[0] == f"example: {FRAMES} frames, {FRAMES} rows in {out}"
    assert lines[1].startswith("{'object_id': 7, 'category': 'square', 'frames_in_sight': ")
    assert lines[-1] == f"{FRAMES} frames drawn to {out / 'overlay.mp4'}"
    assert (out / "overlay.mp4").stat().st_size > 0


def test_masks_from_python(run: Any, clip: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "tracks"
    options = ("--color", "230,20,20", "--correct-at", 10, "--out", out, "--model", model)
    lines = run("masks.py", clip, *options)
    covered = {int(n): int(m) for n, m in re.findall(r"frame (\d+): object 7 covers (\d+)", "\n".join(lines))}
    reader = open_tracks(str(clip), out, "masks")
    for frame in (0, 10):  # as given: the red square of 24 x 24 pixels, but for its edges in the video
        (record,) = reader.at(frame)
        assert covered[frame] == record.area == pytest.approx(24 * 24, rel=0.15)
        assert record.bbox is not None
        assert record.bbox[:2] == pytest.approx(shapes(frame, 160, 120)["square"], abs=1)
        assert record.category == "colored"
    kinds = query(out, "SELECT frame_index, kind FROM events ORDER BY ALL").to_pylist()
    assert [(e["frame_index"], e["kind"]) for e in kinds] == [(0, "object_added"), (10, "corrected")]


def test_a_bucket(s3_server: S3Server, clip: Path, model: str) -> None:
    import s3fs

    folder = f"{s3_server.uri('examples')}/{os.getpid()}"
    fs = s3fs.S3FileSystem(**s3_server.options, use_listings_cache=False)
    for name in ("a", "b"):
        fs.put_file(str(clip), f"{folder}/{name}.mp4")
        fs.pipe_file(f"{folder}/{name}.prompts.json", json.dumps(BOX).encode())
    fs.pipe_file(f"{folder}/c.mp4", b"no video")
    fs.pipe_file(f"{folder}/c.prompts.json", json.dumps(BOX).encode())
    out = f"{folder}/tracks"
    command = [sys.executable, str(EXAMPLES / "bucket.py"), f"{folder}/*.mp4", "--out", out, "--model", model]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | s3_server.environment
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    a, b, c, total = done.stdout.splitlines()
    assert a.startswith(f"{folder}/a.mp4: {FRAMES} frames, {FRAMES} rows as a-")
    assert b.startswith(f"{folder}/b.mp4: {FRAMES} frames, {FRAMES} rows as b-")
    assert c.startswith(f"{folder}/c.mp4: ")
    assert "not a readable video" in c
    assert total == f"the output folder holds 2 streams with {2 * FRAMES} rows"


def test_a_live_camera(run: Any, clip: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "live"
    options = ("--box", "0,30,24,24", "--seconds", 4, "--out", out, "--secrets", tmp_path / "secrets")
    with camera(clip) as made:
        lines = run("live.py", made.url(), *options, "--model", model)
    received, tracked, dropped, corrupt = next(
        map(int, re.findall(r"\d+", line)) for line in lines if "frames received" in line
    )
    assert received == tracked + dropped + corrupt
    assert tracked > 0
    assert any(re.fullmatch(r"frame \d+: object 1 at .*", line) for line in lines)
    assert "{'kind': 'object_added', 'n': 1}" in lines
    (row,) = query(out, "SELECT count(DISTINCT frame_index) AS n FROM tracks").to_pylist()
    assert row["n"] == tracked


def test_zones(run: Any) -> None:
    folder = Path(__file__).parent / "golden" / "before_rooms" / "whole"
    (size,) = query(
        folder, "SELECT any_value(frame_width) AS w, any_value(frame_height) AS h FROM tracks"
    ).to_pylist()
    w, h = size["w"], size["h"]
    zone, line = f"all=0,0 {w},0 {w},{h} 0,{h}", f"middle={w / 2},0 {w / 2},{h}"
    lines = run("zones.py", folder, "--zone", zone, "--line", line)
    titles = [line for line in lines if not line.startswith(" ")]
    assert len(titles) == 4
    (seen,) = query(folder, "SELECT count(DISTINCT object_id) AS n FROM tracks WHERE area > 0").to_pylist()
    assert sum("'zone': 'all', 'object_id'" in line for line in lines) == seen["n"]


def test_questions(run: Any, tmp_path: Path) -> None:
    """Query an output folder of the tests: 40 frames of a walk, with detected objects."""
    folder = Path(__file__).parent / "golden" / "before_rooms" / "whole"
    lines = run("questions.py", folder)
    titles = [line for line in lines if not line.startswith(" ")]
    assert len(titles) == 6
    answers: dict[str, list[str]] = {title: [] for title in titles}
    for line in lines:
        if line in answers:
            title = line
        else:
            answers[title].append(line.strip())
    assert all(found != ["none"] for title, found in answers.items() if "out of sight" not in title), answers
    assert answers["What are the streams?"][0].startswith("stream_id=walk, state=finished, frames=")
    assert run("questions.py", folder, "--sql", "SELECT max(next_frame) AS n FROM streams")[1:] == [
        "    n=40"
    ]
