"""Video files: frames from any index on, the same as those of decoding from the start."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, suppress
from fractions import Fraction
from typing import Any

from pipeline.base.errors import NotAVideoError, SourceError, UsageError, one_line
from pipeline.base.picture_size import MAX_PIXELS, check_limit
from pipeline.base.records import Event, Frame
from pipeline.base.redaction import redacted, shareable
from pipeline.storage.locations import BLOCK_BYTES, Location, read_error
from pipeline.video import decoding
from pipeline.video import packet_index as packets
from pipeline.video.device_frame import DeviceFrame
from pipeline.video.plugin_video import OpenedVideo
from pipeline.video.torchcodec_decoding import (
    AV,
    DECODERS,
    TORCHCODEC,
    DifferenceError,
    Pictures,
    check_alike,
    check_torchcodec,
)

log = logging.getLogger(__name__)


SEEK_FROM = 64
"""Below this frame number, building an index for seeking is not worthwhile."""
_ALL = 1 << 40


class _Misprediction(Exception):  # noqa: N818 - a signal within this module
    """After a seek, the frames differed from those predicted by the packet index."""


class VideoFile(OpenedVideo):
    """A video file that FFmpeg decodes; see the module docstring and `VideoSource`.

    The decode that gave the first frame, and with it the size, is kept until `frames` is called, so that a
    file iterated from the start is opened only once. An iteration abandoned after the first frame leaves it
    to the next one.
    """

    height: int
    width: int
    rate: float | None
    frame_count: int | None
    container: str
    codec: str

    def __init__(
        self,
        location: Location,
        *,
        threads: int = 0,
        block_size: int = BLOCK_BYTES,
        max_pixels: int = MAX_PIXELS,
        decoder: str = AV,
        device: str = "cpu",
    ) -> None:
        if decoder not in DECODERS:
            raise UsageError(f"decoder={decoder!r} is not allowed: one of {', '.join(DECODERS)}")
        if decoder == TORCHCODEC:
            check_torchcodec()
        if threads < 0:
            raise SourceError(f"threads={threads}: must be 0 (automatic) or a positive number")
        self.uri = location.uri
        self.trailing_losses: tuple[Event, ...] = ()
        self._name = redacted(location.uri)
        self._location = location
        self._threads = threads
        self._block_size = block_size
        self._max_pixels = check_limit(max_pixels)
        self.damaged = False
        self._index: packets.PacketIndex | None = None
        self._indexable = True
        self._delivered: tuple[int, float | None] | None = None
        self.fingerprint = location.fingerprint()
        first, rest = self._begin()
        if first is None:
            raise NotAVideoError(
                f"{self.uri}: no frame can be decoded ({self.codec} in {self.container}); "
                f"the file is empty, truncated or damaged, or its pictures have over {max_pixels} pixels"
            )
        self.height, self.width = first.size
        self._begun: tuple[Frame, Generator[Frame]] | None = (first, rest)
        # The device of torchcodec, as long as that decodes this file, and what its first image must be.
        self._device = device if decoder == TORCHCODEC else None
        self._first_image = first.image if decoder == TORCHCODEC else None

    def _begin(self) -> tuple[Frame | None, Generator[Frame]]:
        """Return the first frame, None if there is none, and the decode from the start that follows it."""
        if self._threads != 1:
            way = self._guarded_from_start(0)
            try:
                return next(way, None), way
            except decoding.Damage as sign:
                log.info("%s: decoding starts over near frame 0: %s", self._name, sign)
                self.damaged = True
        way = self._from_start(0)
        return next(way, None), way

    def close(self) -> None:
        """Close the file; `frames` opens it again."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun[1].close()

    def frames(self, start: int = 0, *, previous_pts_seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames from `start` on, seeking if that gives the same frames as a decode from the start."""
        if start < 0:
            raise SourceError(f"frames from {start}: frame numbers begin at 0")
        if previous_pts_seconds is None and self._delivered and self._delivered[0] == start - 1:
            previous_pts_seconds = self._delivered[1]
        return self._frames(start, previous_pts_seconds)

    def indexed_times(self) -> list[float] | None:
        """The `pts_seconds` of all frames as the packet index predicts them; None if there is no index."""
        if self.damaged or not self._indexable:
            return None
        index = self._index_reaching(_ALL)
        if index is None or not index.complete:
            return None
        return [float(pts * self._time_base) for pts in index.order]

    def expected_pts_seconds(self, frame_index: int) -> float | None:
        """Time of a frame according to the packet index, without decoding.

        With the time of frame `start - 1`, `frames(start)` seeks to a keyframe. On files whose packets do
        not match their frames one to one, decoding finds other times.

        Returns:
            None if the file cannot be indexed, is damaged, or has fewer frames.
        """
        if frame_index < 0 or self.damaged or not self._indexable:
            return None
        index = self._index_reaching(frame_index)
        if index is None or not index.covers(frame_index):
            return None
        return _seconds(index.order[frame_index], self._time_base)

    def __repr__(self) -> str:
        return f"VideoFile({self._name!r}, {self.width}x{self.height}, {self.codec} in {self.container})"

    def _frames(self, start: int, previous: float | None) -> Iterator[Frame]:
        self.trailing_losses = ()
        if start:
            self.close()
        reached = start
        keyframes_back = 0  # number of keyframes by which decoding starts earlier than needed
        while True:
            whole = self._whole_index(start, previous)
            index = self._index_for(reached, previous, keyframes_back) if reached == start else None
            if whole is not None:
                self.close()
                way = self._by_torchcodec(reached, whole)
            elif reached == 0 and self._begun is not None:
                way = self._continued(*self._begun)
            elif index is not None:
                way = self._after_seek(reached, index, keyframes_back)
            elif self._threads == 1 or self.damaged:
                way = self._from_start(reached)
            else:
                way = self._guarded_from_start(reached)
            try:
                with closing(way) as frames:
                    for frame in frames:
                        reached = frame.frame_index + 1
                        self._delivered = (frame.frame_index, frame.pts_seconds)
                        yield frame
                return
            except DifferenceError as sign:
                log.warning("%s: PyAV decodes in place of torchcodec: %s", self._name, sign)
                self._device = None
            except (decoding.Damage, _Misprediction) as sign:
                log.info("%s: decoding starts over near frame %d: %s", self._name, reached, sign)
                if index is None:
                    self.damaged = True
                elif keyframes_back or reached > start:
                    self._indexable = False
                else:  # pictures before the keyframe may be needed after all
                    keyframes_back = 1

    def _continued(self, first: Frame, rest: Generator[Frame]) -> Generator[Frame]:
        self._begun = None
        try:
            yield first
        except GeneratorExit:
            self._begun = first, rest
            raise
        yield from rest

    def _from_start(self, start: int) -> Generator[Frame]:
        converter = decoding.Converter()
        with self._session(threads=1, strict=False) as session:
            self._describe(session)
            number = -1
            for number, picture in enumerate(decoding.lenient(session)):
                if picture.losses or picture.frame.is_corrupt:
                    self.damaged = True
                if number >= start:
                    pts = _seconds(picture.frame.pts, session.time_base)
                    losses = _events(number, pts, picture.losses)
                    yield Frame(converter.to_image(picture.frame), number, pts, losses=losses)
            self.trailing_losses = _events(number + 1, None, session.trailing)

    def _guarded_from_start(self, start: int) -> Generator[Frame]:
        with self._session(threads=self._threads, strict=True) as session:
            self._describe(session)
            yield from self._numbered(session, decoding.guarded(session), 0, start)

    def _whole_index(self, start: int, previous: float | None) -> packets.PacketIndex | None:
        """The index of all frames if torchcodec decodes them; then the number of `start` is certain."""
        if self._device is None or self.damaged or not self._indexable:
            return None
        index = self._index_reaching(_ALL)
        if index is None or not index.complete or start > len(index.order):
            return None
        if start and previous != _seconds(index.order[start - 1], self._time_base):
            return None
        return index

    def _by_torchcodec(self, start: int, index: packets.PacketIndex) -> Generator[Frame]:
        assert self._device is not None
        handle = None if self._location.is_local else self._location.open(self._block_size)
        try:
            pictures = Pictures(
                self._location.path if handle is None else handle,
                self._stream_index,
                device=self._device,
                threads=self._threads,
                time_base=self._time_base,
            )
            if len(pictures) != len(index.order):
                raise DifferenceError(f"{len(pictures)} frames, not {len(index.order)}")
            assert self._first_image is not None
            check_alike(pictures.at(0, index.order[0]), self._first_image)
            if (reason := pictures.fallback) is not None:
                log.info("%s: decoded by the CPU: %s", self._name, reason)
            for number in range(start, len(index.order)):
                image = pictures.at(number, index.order[number])
                if tuple(image.shape) != self._first_image.shape:
                    raise DifferenceError(f"frame {number} has shape {tuple(image.shape)}")
                yield DeviceFrame(image, number, _seconds(index.order[number], self._time_base))
        except DifferenceError as error:
            if handle is not None and handle.failure is not None:
                raise read_error(self.uri, handle.failure) from shareable(error)
            raise
        finally:
            if handle is not None:
                with suppress(Exception):  # nothing was written, so a failed close loses nothing
                    handle.close()
        with self._session(threads=1, strict=False) as session:
            session.packets_read, session.last_pts = len(index.pts), max(index.pts)
            losses = decoding.trailing_losses(session, 0, damaged=False)
        self.trailing_losses = _events(len(index.order), None, losses)

    def _describe(self, session: decoding.Session) -> None:
        self.rate, self._time_base = session.rate, session.time_base
        self.container = str(session.container.format.name)
        self.codec = str(session.stream.codec_context.name)
        self.frame_count = _estimate(session)
        self._stream_index = int(session.stream.index)

    def _after_seek(self, start: int, index: packets.PacketIndex, back: int) -> Generator[Frame]:
        with self._session(threads=self._threads, strict=True) as session:
            fed = _packets_from_keyframe(session, index, start, back)
            keyframe = index.positions[next(fed).pts]
            session.packets_read = keyframe
            number = index.rank(keyframe)
            log.debug("%s: decoding from frame %d to reach frame %d", self._name, number, start)
            shown = _as_predicted(decoding.guarded(session, fed), index, keyframe)
            yield from self._numbered(session, shown, number, start)

    def _numbered(
        self, session: decoding.Session, shown: Iterator[Any], number: int, start: int
    ) -> Generator[Frame]:
        """Convert shown frames, the first of which is number `number`, to Frames from `start` on."""
        converter = decoding.Converter()
        for frame in shown:
            if number >= start:
                pts = _seconds(frame.pts, session.time_base)
                yield Frame(converter.to_image(frame), number, pts)
            number += 1
        self.trailing_losses = _events(number, None, decoding.trailing_losses(session, 0, damaged=False))

    def _session(self, *, threads: int, strict: bool) -> AbstractContextManager[decoding.Session]:
        return decoding.opened(
            self._location,
            threads=threads,
            strict=strict,
            block_size=self._block_size,
            max_pixels=self._max_pixels,
        )

    def _index_for(self, start: int, previous: float | None, back: int) -> packets.PacketIndex | None:
        """Return the index for a seek to frame `start` if it is certain to be right and worthwhile."""
        if previous is None or start < SEEK_FROM or self.damaged or not self._indexable:
            return None
        index = self._index_reaching(start)
        if not index or not index.covers(start) or not index.keyframe_before(start, back):
            return None
        return index if _seconds(index.order[start - 1], self._time_base) == previous else None

    def _index_reaching(self, frame_index: int) -> packets.PacketIndex | None:
        if self._index is None or not (self._index.complete or self._index.covers(frame_index)):
            try:
                with self._session(threads=1, strict=False) as session:
                    found = packets.build(session.container.demux(session.stream), 2 * frame_index)
                    session.check_reading()
            except decoding.MediaError as error:
                log.debug("%s: no index: %s", self._name, redacted(one_line(error)))
                found = None
            self._index, self._indexable = found, found is not None
            log.debug("%s: %s", self._name, found)
        return self._index


def _packets_from_keyframe(
    session: decoding.Session, index: packets.PacketIndex, start: int, back: int
) -> Generator[Any]:
    """Seek, then yield the packets from the keyframe that precedes frame `start`, the keyframe twice.

    The first of the two tells where decoding begins. Raises _Misprediction if the packets after the seek are
    not the indexed ones.
    """
    wanted = index.keyframe_before(start, back)
    for further in range(3):
        target = index.keyframe_before(start, back + further)
        if wanted is None or target is None:
            break
        try:
            session.container.seek(index.pts[target], stream=session.stream, backward=True)
        except decoding.MediaError as error:
            session.check_reading()
            raise _Misprediction(f"seeking failed: {one_line(error)}") from error
        demuxed = session.container.demux(session.stream)
        for packet in demuxed:
            position = index.positions.get(packet.pts, -1)
            if position == wanted:
                yield packet
                yield packet
                yield from _as_indexed(demuxed, index, wanted)
                return
            if position > wanted:
                break
        session.check_reading()
    raise _Misprediction(f"seeking did not lead to packet {wanted}")


def _as_indexed(demuxed: Iterator[Any], index: packets.PacketIndex, keyframe: int) -> Iterator[Any]:
    position = keyframe + 1
    for packet in demuxed:
        if packet.size and position < len(index.pts):
            if packet.pts != index.pts[position] or packet.size != index.sizes[position]:
                raise _Misprediction(f"packet {position} differs after a seek")
            position += 1
            if packet.pts < index.pts[keyframe]:
                continue  # shown before the keyframe, predicted from pictures not decoded
        yield packet


def _as_predicted(shown: Iterator[Any], index: packets.PacketIndex, keyframe: int) -> Iterator[Any]:
    """Yield frames from the keyframe on, checked against the index as far as it reaches."""
    number = index.rank(keyframe)
    for frame in shown:
        if index.covers(number) and frame.pts != index.order[number]:
            raise _Misprediction(f"frame {number} has pts {frame.pts}, not {index.order[number]}")
        yield frame
        number += 1
    if index.covers(number):
        raise _Misprediction(f"frames end at {number}")


def _estimate(session: decoding.Session) -> int | None:
    announced, microseconds = int(session.stream.frames or 0), int(session.container.duration or 0)
    if "matroska" in session.container.format.name:  # which counts from 0, not from the first frame
        microseconds -= int(session.container.start_time or 0)
    if announced:
        return announced
    if microseconds and session.rate:
        return round(microseconds / 1e6 * session.rate)
    return None


def _events(number: int, pts_seconds: float | None, losses: decoding.Losses) -> tuple[Event, ...]:
    return tuple(Event(number, "corrupt", reason, count, pts_seconds) for reason, count in losses)


def _seconds(pts: int | None, time_base: Fraction) -> float | None:
    return None if pts is None else float(pts * time_base)
