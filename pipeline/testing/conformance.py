"""Conformance checks for plugins: one function per kind of plugin, for its author's tests.

    from pipeline.testing.conformance import check_source

    def test_my_source(tmp_path):
        check_source(MySource(), "my://some/short/video")

Each raises AssertionError with one line that says what the plugin violates, and where; pytest is not needed.
Installed plugins can be checked from the command line, by the names of their entry points:

    python -m pipeline.testing.conformance source my://some/short/video
    python -m pipeline.testing.conformance box-segmenter NAME
    python -m pipeline.testing.conformance detector NAME
    python -m pipeline.testing.conformance sink NAME

A sink gets rows of streams named `conformance-...`: let it write where that does no harm.
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
from collections.abc import Generator
from contextlib import closing
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any

import numpy as np

from pipeline.base.errors import SourceError, UsageError, one_line
from pipeline.base.records import Event, Frame
from pipeline.detect.loading import load_detector
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.storage.locations import scheme_of
from pipeline.testing.boxes import check_box_segmenter
from pipeline.testing.detectors import check_detector
from pipeline.testing.sinks import check_sink
from pipeline.tracks.sinks import load_sink
from pipeline.video.plugin_video import Source, find_plugin

__all__ = ["check_box_segmenter", "check_detector", "check_sink", "check_source", "main"]

_PATIENCE_SECONDS = 60.0


def _need(condition: bool, message: str) -> None:
    """An assertion that `python -O` does not remove."""
    if not condition:
        raise AssertionError(message)


# --- sources -------------------------------------------------------------------------------------


def check_source(source: Source, uri: str, *, missing: str | None = None) -> None:
    """Conformance test for authors of sources.

    Reads the video several times, from its start and from later frames: use a short one, best of some dozen
    frames. Checked are: frames are numbered without gaps from the requested frame, and are the same in every
    reading, wherever it begins; images are H x W x 3 uint8, contiguous, and are not modified later; readings
    do not disturb one another, may be abandoned and may happen in any thread; after the end there are no
    frames and no errors; an input that cannot be opened is a SourceError.

    Args:
        uri: a video that the source can read, of at least 3 frames.
        missing: a URI that it cannot read. By default one is made up with the same scheme; a source that
            generates frames for that one, too, passes.

    Raises:
        AssertionError: a check fails; the message says which, and at which frame.
    """
    _need(callable(getattr(source, "open", None)), "there is no method open(uri, start)")
    kept: list[tuple[Frame, bytes]] = []
    for frame in _reading(source, uri, 0):
        _check_frame(frame, len(kept), "from the start")
        kept.append((frame, _digest(frame)))
    count = len(kept)
    _need(count >= 3, f"{uri} has {count} frames; the check needs at least 3: give a longer video")
    for frame, digest in kept:
        _need(
            _digest(frame) == digest,
            f"the image of frame {frame.frame_index} changed after later frames were read: give each frame "
            "its own memory",
        )
    digests = [digest for _, digest in kept]
    kept.clear()
    for start in sorted({0, 1, 2, count // 2, count - 1}):
        _check_reading(source, uri, start, digests)
    for start in (count, count + 5):
        after = [frame.frame_index for frame in _reading(source, uri, start)]
        _need(not after, f"frames {after} came when frames from {start} on were requested: there are {count}")
    _check_side_by_side(source, uri, digests)
    _check_elsewhere(source, uri, digests)
    _check_missing(source, missing, f"{scheme_of(uri)}://no-such-host-3f7a/no-such-video")


def _reading(source: Source, uri: str, start: int) -> Generator[Frame]:
    """Read as the pipeline does; errors name the step."""
    doing = f"open({uri!r}, {start})"
    try:
        frames = source.open(uri, start)
    except Exception as error:
        raise AssertionError(f"{doing} raised {type(error).__name__}: {one_line(error)}") from error
    _need(hasattr(frames, "__iter__"), f"{doing} returned a {type(frames).__name__}, not an iterator")
    frames = iter(frames)
    while True:
        try:
            frame = next(frames, None)
        except Exception as error:
            raise AssertionError(
                f"reading on after {doing} raised {type(error).__name__}: {one_line(error)}"
            ) from error
        if frame is None:
            return
        yield frame


def _check_frame(frame: Any, index: int, where: str) -> None:
    _need(isinstance(frame, Frame), f"a {type(frame).__name__} came instead of a Frame, {where}")
    _need(
        frame.frame_index == index,
        f"frame {frame.frame_index} came instead of frame {index}, {where}: frames are numbered from the "
        "video's first, without gaps",
    )
    where = f"at frame {index}, {where}"
    image = frame.image
    _need(isinstance(image, np.ndarray), f"the image is a {type(image).__name__}, not an array, {where}")
    _need(image.dtype == np.uint8, f"the image is {image.dtype}, not uint8, {where}")
    _need(
        image.ndim == 3 and image.shape[2] == 3 and min(image.shape) > 0,
        f"the image has shape {image.shape}, not (height, width, 3), {where}",
    )
    _need(
        bool(image.flags.c_contiguous), f"the image is not contiguous (np.ascontiguousarray helps), {where}"
    )
    pts = frame.pts_seconds
    _need(
        pts is None or (isinstance(pts, float) and math.isfinite(pts)),
        f"pts_seconds is {pts!r}, neither None nor a finite float, {where}",
    )
    clock = frame.wall_time
    _need(
        clock is None or (isinstance(clock, datetime) and clock.utcoffset() == timedelta(0)),
        f"wall_time is {clock!r}, neither None nor a datetime in UTC, {where}",
    )
    _need(
        isinstance(frame.losses, tuple) and all(isinstance(e, Event) for e in frame.losses),
        f"losses are {frame.losses!r}, not a tuple of Events, {where}",
    )
    for event in frame.losses:
        _need(event.frame_index == index, f"a loss is reported for frame {event.frame_index}, {where}")


def _digest(frame: Frame) -> bytes:
    """Digest of everything that the pipeline uses."""
    facts = (frame.frame_index, frame.image.shape, frame.pts_seconds, frame.losses)
    return blake2b(frame.image.tobytes() + repr(facts).encode(), digest_size=16).digest()


def _check_reading(source: Source, uri: str, start: int, digests: list[bytes]) -> None:
    where = f"when frames from {start} on were requested"
    index = start
    for index, frame in enumerate(_reading(source, uri, start), start):
        _check_frame(frame, index, where)
        _need(index < len(digests), f"frame {index} came {where}; the first reading had {len(digests)}")
        _need(
            _digest(frame) == digests[index],
            f"frame {index} differs {where}: a reading that starts at a frame must get what a reading "
            "from the start got",
        )
    _need(index == len(digests) - 1, f"it ended at frame {index} {where}, not at {len(digests) - 1}")


def _check_side_by_side(source: Source, uri: str, digests: list[bytes]) -> None:
    """Abandon one reading after a frame, and read another between two frames of a third."""
    given_up = _reading(source, uri, 0)
    next(given_up, None)
    first, second = _reading(source, uri, 0), _reading(source, uri, 1)
    with closing(first), closing(second):
        for index in range(len(digests) - 1):
            pair = next(first, None), next(second, None)
            found = [None if frame is None else _digest(frame) for frame in pair]
            _need(
                found == [digests[index], digests[index + 1]],
                f"two readings at the same time disturb each other at frame {index}: every open() must "
                "return an independent iterator",
            )


def _check_elsewhere(source: Source, uri: str, digests: list[bytes]) -> None:
    """Read in another thread, as prefetching does."""
    found: list[bytes] = []
    failures: list[BaseException] = []

    def read() -> None:
        try:
            found.extend(_digest(frame) for frame in _reading(source, uri, 1))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    _need(not thread.is_alive(), f"reading in another thread took more than {_PATIENCE_SECONDS:.0f} s")
    reason = f": {one_line(failures[0])}" if failures else ""
    _need(found == digests[1:], f"it cannot be read in another thread than it was made in{reason}")


def _check_missing(source: Source, given: str | None, made_up: str) -> None:
    """Check that unreadable input raises SourceError, from `open` or the first frame, or has no frames."""
    uri = given or made_up
    try:
        frame = next(iter(source.open(uri, 0)), None)
    except SourceError as error:
        _need("\n" not in str(error), f"the error about {uri} is not one line: {error!r}")
        return
    except Exception as error:
        raise AssertionError(
            f"{uri} raised {type(error).__name__} ({one_line(error)}): unreadable input must raise "
            "pipeline.base.errors.SourceError, otherwise it counts as a bug of the plugin"
        ) from error
    _need(frame is None or given is None, f"{uri} has frames, though it should not be readable")


# --- the command line ----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Check an installed plugin. Exit codes: 0 passed, 1 failed, 2 not installed."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.testing.conformance", description="Check a plugin."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    source = kinds.add_parser("source", help="a plugin of the group xmem.sources, found by the URI's scheme")
    source.add_argument("name", metavar="URI", help="a short video that the plugin can read")
    source.add_argument("--missing", metavar="URI", help="an input that the plugin cannot read")
    for kind, group in (("box-segmenter", "box_segmenters"), ("detector", "detectors"), ("sink", "sinks")):
        kinds.add_parser(kind, help=f"plugin of the group xmem.{group}").add_argument("name", metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        _check_installed(options)
    except AssertionError as error:
        sys.stdout.write(f"{options.kind} {options.name}: {one_line(error)}\n")
        return 1
    except (UsageError, SourceError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{options.kind} {options.name}: all checks passed\n")
    return 0


def _check_installed(options: argparse.Namespace) -> None:
    name = options.name
    if options.kind == "source":
        source = find_plugin(scheme_of(name))
        if source is None:
            raise UsageError(f"no source plugin for {scheme_of(name)}:// is installed")
        check_source(source, name, missing=options.missing)
    elif options.kind == "box-segmenter":
        check_box_segmenter(load_box_segmenter(name))
    elif options.kind == "detector":
        check_detector(lambda: load_detector(name))
    else:
        check_sink(lambda: load_sink(name))


if __name__ == "__main__":
    sys.exit(main())
