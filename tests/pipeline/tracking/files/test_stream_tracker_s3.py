"""From bucket to bucket with a real S3 server: the same rows as on a disk, whichever process dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.servers import S3Server
from support.tiny import tiny_weights
from support.videos import make_video

Call = Callable[..., tuple[int, str, str]]
FRAMES = 12
BOX = "20,20,40,40:3:shape"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    os.rename(tiny_weights(folder), folder / "tiny.safetensors")
    make_video(folder / "clip.mp4", FRAMES)
    return folder


Xmem = Callable[..., str]
"""Runs `xmem` with arguments and an expected exit code; returns standard output and error together."""


def xmem_alone(server: S3Server, *arguments: str | Path, expect: int = 0) -> str:
    """The command in a separate process, which finds the server by environment variables, as for users."""
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[4]), **server.environment)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def xmem(s3_server: S3Server, call: Call, monkeypatch: pytest.MonkeyPatch) -> Iterator[Xmem]:
    """The command in this process with the server's environment variables."""
    import s3fs

    def run(*arguments: object, expect: int = 0) -> str:
        code, out, err = call(*arguments)
        assert code == expect, err
        return out + err

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    # Its instances keep the credentials with which they were made.
    s3fs.S3FileSystem.clear_instance_cache()
    yield run
    s3fs.S3FileSystem.clear_instance_cache()


def tracking(made: Path, video: str, out: str, *more: str) -> list[Any]:
    """Arguments of `xmem track`."""
    arguments: list[Any] = ["track", video, "--out", out, "--model", made / "tiny.safetensors", "--box", BOX]
    return [*arguments, "--threads", "1", "--chunk", "5", "--stream-id", "cam", *more]


def rows(xmem: Xmem, out: str) -> Any:
    ask = "select * exclude (stream_id) from tracks order by all"
    return json.loads(xmem("query", out, ask, "--format", "json"))


def test_track_query_render_and_resume_on_s3(
    s3_server: S3Server, made: Path, tmp_path: Path, xmem: Xmem
) -> None:
    import s3fs

    def track(video: str, out: str, *more: str, expect: int = 0) -> str:
        return xmem(*tracking(made, video, out, *more), expect=expect)

    fs = s3fs.S3FileSystem(**s3_server.options, use_listings_cache=False)
    video, out = s3_server.uri("in put/clip.mp4"), s3_server.uri("stream-out")
    fs.pipe_file(video, (made / "clip.mp4").read_bytes())

    assert f"cam: {FRAMES} frames, {FRAMES} rows" in xmem_alone(s3_server, *tracking(made, video, out))
    track(str(made / "clip.mp4"), str(tmp_path / "out"))
    assert rows(xmem, out) == rows(xmem, str(tmp_path / "out"))
    # The very bytes: a stream may move between disk and bucket.
    for path in (tmp_path / "out" / "tracks").rglob("*.parquet"):
        assert fs.cat_file(f"{out}/{path.relative_to(tmp_path / 'out')}") == path.read_bytes()

    assert "nothing to do" in track(video, out)
    assert "chunk_frames was 5, now 4" in track(video, out, "--chunk", "4", expect=2)
    overlay, sheet = s3_server.uri("over.mp4"), s3_server.uri("sheet.png")
    assert f"{FRAMES} frames written" in xmem("render", video, out, "-o", overlay, "--sheet", sheet)
    assert fs.info(overlay)["size"] > 1000
    assert fs.cat_file(sheet).startswith(b"\x89PNG")

    # What a run leaves that was killed after its second commit.
    fs.rm_file(f"{out}/tracks/stream_id=cam/frames-000000000010.parquet")
    assert "resumed at frame 10" in track(video, out)
    assert rows(xmem, out) == rows(xmem, str(tmp_path / "out"))
    assert f"cam: {FRAMES} frames" in track(video, out, "--chunk", "4", "--restart")
    assert len(fs.ls(f"{out}/tracks/stream_id=cam")) == 3


@pytest.mark.parametrize(
    ("video", "out", "changed", "code", "said"),
    [
        ("s3://videos/absent.mp4", "s3://videos/o", {}, 2, "absent.mp4: no such file"),
        ("s3://nobucket-here/a.mp4", "s3://videos/o", {}, 2, "nobucket-here/a.mp4"),
        ("clip.mp4", "s3://videos/o", {"AWS_ACCESS_KEY_ID": "nobody"}, 1, "s3://videos/o"),
    ],
)
def test_what_cannot_be_reached_is_one_clear_line(
    xmem: Xmem,
    made: Path,
    video: str,
    out: str,
    changed: dict[str, str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = video if "://" in video else str(made / video)
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    output = xmem(*tracking(made, uri, out), expect=code)
    errors = [line for line in output.splitlines() if "error" in line]
    assert len(errors) == 1
    assert said in errors[0]
