"""A live hub in a process of its own that follows a real clip, played by an RTSP server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from support.measured import resident_bytes
from support.videos import ENCODERS, make_video

WORKER = Path(__file__).with_name("live_camera_worker.py")
REAL = Path("/work/shared/data/video/vtest.avi")
PATIENCE = 120.0
# What is freed goes back at once: a leak is looked for, not how much glibc keeps for later.
STRICT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Hub:
    """The worker process, controlled by lines.

    Args:
        size: one thread and little memory at this size; None for the defaults of `xmem serve`.
    """

    def __init__(self, out: Path, log: Path, size: int | None = None) -> None:
        environment = os.environ | ({} if size is None else {"OMP_NUM_THREADS": "1", **STRICT})
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), str(out), *([] if size is None else [str(size)])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise AssertionError(log.read_text(errors="replace")[-2000:])

    def call(self, *request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def resident(self) -> int:
        """Resident bytes."""
        return resident_bytes(self.process.pid)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


@contextlib.contextmanager
def hub_at(out: Path, log: Path, size: int | None = None) -> Iterator[Hub]:
    hub = Hub(out, log, size)
    try:
        yield hub
    finally:
        hub.close()


def as_h264(source: Path, target: Path) -> Path:
    """Pictures of the camera, one by one, as the whole clip takes a gigabyte."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        video = read.streams.video[0]
        rate = Fraction(video.average_rate or 10)
        stream: Any = written.add_stream(ENCODERS["h264"], rate=rate)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 20, 1
        stream.options = {"preset": "ultrafast", "crf": "23", "tune": "zerolatency"}
        for i, frame in enumerate(read.decode(video)):
            frame.pts, frame.time_base = i, 1 / rate
            written.mux(stream.encode(frame))
        written.mux(stream.encode(None))
    return target


def the_clip(folder: Path) -> Path:
    if REAL.exists():
        return as_h264(REAL, folder / "vtest.mp4")
    from pipeline.testing.detectors import drawn_scene

    return make_video(folder / "walk.mp4", [f.image for f in drawn_scene(200)], gop=10, rate=10)
