"""Reading a video over S3: compares caches and block sizes. Prints a table; needs no network.

A real SeaweedFS behind a proxy that adds latency and limits the bandwidth of all connections together; a real
H.264 video in MP4, with its index at the end (as cameras and most encoders write it) and at the start.

    PYTHONPATH=.:tests python tests/benchmarks/s3_reading.py [VIDEO] [--latency 0.02]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import fsspec
from fsspec.caching import caches
from support.faults import Happened, Proxy, faulty
from support.servers import seaweedfs
from support.videos import make_video

from pipeline.storage.locations import GuardedFile, Location, locate
from pipeline.video import decoding
from pipeline.video.video_file import VideoFile

CACHES = ("growing", "none", "readahead", "bytes", "blockcache", "background", "first")
BLOCKS = tuple(1 << n for n in (18, 20, 21, 22, 23, 24))
REPEATS = 4


class Cached(Location):
    """A location whose files are read through the given cache."""

    cache = "growing"

    def open(self, block_size: int) -> GuardedFile:
        if self.cache == "growing":
            return GuardedFile(self, block_size)
        return GuardedFile(self, block_size, partial(FsspecCache, self.cache))


class FsspecCache:
    """One of fsspec's caches."""

    def __init__(self, kind: str, fetch: Callable[[int, int], bytes], size: int, block: int) -> None:
        self._cache = caches[kind](block, fetch, size)

    def read(self, start: int, end: int) -> bytes:
        return bytes(self._cache._fetch(start, end))


@dataclass(frozen=True)
class Cost:
    requests: int
    mib: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.requests:4d} {self.mib:6.1f} {self.seconds:6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("video", nargs="?", help="default: one of made-up pictures")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds added to every request")
    parser.add_argument("--mib-per-second", type=float, default=50.0)
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--blocks", default=",".join(map(str, BLOCKS)), help="bytes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, seaweedfs() as server:
        paths = make_clips(Path(folder), given.video)
        fs = fsspec.filesystem("s3", **server.options)
        for path in paths:
            fs.pipe_file(server.uri(path.name), path.read_bytes())
        bandwidth = given.mib_per_second * 2**20
        with faulty(server.endpoint, latency=given.latency, bandwidth=bandwidth) as proxy:
            options = proxy.options(server.options)
            for path in paths:
                times = sorted(float(p.pts * p.time_base) for p in packets_of(path))
                row(
                    f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB; {given.latency * 1000:.0f} ms, "
                    f"{given.mib_per_second:.0f} MiB/s; requests, MiB read, seconds"
                )
                titles = "".join(f"   {title:19}" for title in ("one pass", "resume half-way", "first frame"))
                row(f"{'cache':12}{'block KiB':>10}{titles}")
                for cache in given.caches.split(","):
                    for block in map(int, given.blocks.split(",")):
                        location = locate(server.uri(path.name), options)
                        one = measured(proxy, partial(one_pass, location, cache, block))
                        two = measured(proxy, partial(resume, location, cache, block, times))
                        three = measured(proxy, partial(first_frame, location, cache, block))
                        row(f"{cache:12}{block >> 10:10d}   {one!s:19}   {two!s:19}   {three!s:19}")
                        if cache == "none":
                            break


def make_clips(folder: Path, video: str | None) -> list[Path]:
    """H.264 in MP4 with the index at the end, and at the start: the video repeated several times."""
    encoded = folder / "encoded.mp4"
    if video is not None and Path(video).suffix == ".mp4":
        encoded = Path(video)
    elif video is not None:
        with av.open(video) as source:
            pictures: list[Any] = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
        make_video(encoded, pictures, gop=50, b_frames=2)
    else:
        make_video(encoded, 300, width=768, height=576, gop=50, b_frames=2)
    clips = []
    for name, flags in (("index-at-end.mp4", ""), ("index-at-start.mp4", "+faststart")):
        options = {"movflags": flags} if flags else {}
        with av.open(str(folder / name), "w", options=options) as target:
            copy: Any = None
            shift = 0
            for _ in range(REPEATS):
                with av.open(str(encoded)) as source:
                    stream: Any = source.streams.video[0]
                    copy = copy or target.add_stream_from_template(stream)
                    for packet in source.demux(stream):
                        if packet.dts is None:
                            continue
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copy
                        target.mux(packet)
                    shift += int(stream.duration)
        clips.append(folder / name)
    return clips


def packets_of(path: Path) -> list[Any]:
    with av.open(str(path)) as source:
        return [p for p in source.demux(video=0) if p.pts is not None]


def measured(proxy: Proxy, work: Callable[[], object]) -> Cost:
    proxy.happened = Happened()
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    return Cost(len(proxy.happened.requests), proxy.happened.sent / 2**20, seconds)


def as_cached(location: Location, cache: str) -> Location:
    kind = type("Cached", (Cached,), {"cache": cache})
    return kind(location.uri, location.fs, location.path)  # type: ignore[no-any-return]


def one_pass(location: Location, cache: str, block: int) -> int:
    """Read all packets of the video stream, without decoding, which costs the same with every cache."""
    with decoding.opened(as_cached(location, cache), threads=1, strict=False, block_size=block) as session:
        count = sum(1 for packet in session.container.demux(session.stream) if packet.size)
        session.check_reading()
    return count


def resume(location: Location, cache: str, block: int, times: list[float]) -> Iterator[Any]:
    """The reads of a run that resumes half-way, up to its first frame."""
    source = VideoFile(as_cached(location, cache), threads=1, block_size=block)
    middle = (source.frame_count or 0) // 2
    frames = source.frames(middle, previous_pts_seconds=times[middle - 1])
    next(frames)
    assert source._index is not None
    return frames


def first_frame(location: Location, cache: str, block: int) -> Iterator[Any]:
    """The reads that every video needs."""
    frames = VideoFile(as_cached(location, cache), threads=1, block_size=block).frames()
    next(frames)
    return frames


def row(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
