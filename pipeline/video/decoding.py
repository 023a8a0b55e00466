"""Decoding with FFmpeg: opening files, two decoding paths, and frames as RGB arrays.

`lenient` returns whatever the decoder produces and counts the losses; with one thread its result depends only
on the bytes. `guarded` is for several threads and for decoding after a seek: it raises `Damage` at the first
sign of damage, before it yields a picture that could differ. FFmpeg's own messages are not printed (PyAV's
default).
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from statistics import median
from typing import Any, cast

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipeline.base.errors import NotAVideoError, SourceError, one_line
from pipeline.base.picture_size import MAX_PIXELS, check_size
from pipeline.base.redaction import shareable
from pipeline.storage.locations import GuardedFile, Location, read_error

log = logging.getLogger(__name__)

_STRICT = {"err_detect": "explode+crccheck+bitstream+buffer"}
_MAX_READ_FAILURES = 32
_BLOCK_MARGIN = 128 * (2 << 16)
"""Most pixels that padding to blocks of up to 128 x 128 adds to a picture with sides below 2^16."""
_HOLD_WITHOUT_PTS = 16
_HOLD_AT_MOST = 64
_HEADER_BYTES = 4 << 20
"""A file of at most this many bytes that can be read to its end and is still refused is truncated."""
_TEXT_FORMATS = ("tty", "bin", "adf", "idf", "xbin")
"""Demuxers by which FFmpeg renders text files as pictures; such files are refused."""
_HIDES_PICTURES = ("vp8", "libvpx")
"""Decoders of codecs with packets that are only referenced and never shown."""

Losses = tuple[tuple[str, int], ...]
"""(reason, number of frames), in order."""


MediaError = av.FFmpegError
"""Exceptions of FFmpeg."""

Matrix = tuple[int, int, int, int]


class Damage(Exception):  # noqa: N818 - a signal between this module and the source, never seen by users
    """The input may be damaged; only decoding from the start with one thread settles it."""


@dataclass
class Session:
    """An opened video: its container and video stream, and the reading position.

    Attributes:
        uri: as given by the user, for messages.
        max_pixels: limit for the pixels of a picture; larger decoded pictures count as lost.
        packets_read: position, in decode order, of the packet to be read next.
        trailing: losses after the last picture; set when the pictures end.
    """

    uri: str
    container: Any
    stream: Any
    handle: GuardedFile | None
    max_pixels: int = MAX_PIXELS
    packets_read: int = 0
    last_pts: int | None = None
    trailing: Losses = ()

    @property
    def time_base(self) -> Fraction:
        return Fraction(self.stream.time_base)

    @property
    def rate(self) -> float | None:
        """Average frames per second, if the container knows."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return float(rate) if rate else None

    def check_reading(self) -> None:
        """Raise SourceError if reading the underlying file failed, which is neither its end nor damage."""
        if self.handle is not None and self.handle.failure is not None:
            raise read_error(self.uri, self.handle.failure) from shareable(self.handle.failure)


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture, not yet converted, and the losses between it and the previous one."""

    frame: Any
    losses: Losses = ()


@contextmanager
def opened(
    location: Location, *, threads: int, strict: bool, block_size: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Session]:
    """Open a video for one reading. Pictures larger than `max_pixels` are not decoded and count as lost.

    Raises:
        PictureTooLargeError: the video begins with such pictures.
        NotAVideoError: the input is not a video.
        SourceError: the input cannot be read now.
    """
    # FFmpeg's limit includes block padding; ours is checked on each decoded picture.
    limit = {"max_pixels": str(max_pixels + _BLOCK_MARGIN)}
    with _demuxing(location, block_size, limit) as session:
        context = session.stream.codec_context
        if not context.width:  # unknown, or so large that FFmpeg did not examine it
            # The size in the headers, without decoding a picture.
            with _demuxing(location, block_size, {"skip_frame": "all"}) as probe:
                announced = probe.stream.codec_context
                check_size(location.uri, announced.width, announced.height, max_pixels)
        check_size(location.uri, context.width, context.height, max_pixels)
        session.stream.thread_count = threads
        session.stream.thread_type = "NONE" if threads == 1 else "AUTO"
        context.options = limit | (_STRICT if strict else {})
        session.max_pixels = max_pixels
        yield session


@contextmanager
def _demuxing(location: Location, block_size: int, probing: dict[str, str]) -> Iterator[Session]:
    """Open a video's container and stream. `probing`: options for FFmpeg's stream detection."""
    handle = None if location.is_local else location.open(block_size)
    container: Any = None
    try:
        try:
            container = av.open(
                location.path if handle is None else handle,
                mode="r",
                metadata_errors="replace",
                options=probing,
                buffer_size=32768 if handle is None else 1 << 18,
            )
        except Exception as error:
            if handle is not None and handle.failure is not None:
                raise read_error(location.uri, handle.failure) from shareable(error)
            if isinstance(error, FileNotFoundError | PermissionError):
                raise read_error(location.uri, error) from shareable(error)
            kind = NotAVideoError if _is_certain(error, location, handle) else SourceError
            raise kind(
                f"{location.uri}: not a readable video ({_reason(error)}); "
                "the file is of another type, or was cut off before its index was written"
            ) from shareable(error)
        if container.format.name in _TEXT_FORMATS:
            raise NotAVideoError(f"{location.uri}: is a text file, not a video; give a video file")
        stream = _video_stream(container)
        if stream is None:
            raise NotAVideoError(
                f"{location.uri}: has no video stream that can be decoded; give a video file"
            )
        for other in container.streams:
            if other is not stream:
                with suppress(AttributeError, ValueError):
                    other.discard = "all"
        yield Session(location.uri, container, stream, handle)
    finally:
        if container is not None:
            container.close()
        if handle is not None:
            with suppress(Exception):  # nothing was written, so a failed close loses nothing
                handle.close()


def guarded(session: Session, fed: Iterator[Any] | None = None) -> Iterator[Any]:
    """Yield frames in display order; raises Damage before a frame that damage could have changed.

    A frame is held back until every packet that precedes it in decode order has been shown: a damaged
    reference picture is flagged only when it is output itself, after pictures that were predicted from it.

    Args:
        session: opened with `strict=True`.
        fed: the packets to decode; all of the stream if None.
    """
    waiting: dict[int, int] = {}  # pts -> position, of packets without a picture yet
    held: deque[tuple[Any, int]] = deque()
    may_hide = session.stream.codec_context.name in _HIDES_PICTURES
    position = 0
    try:
        for packet in session.container.demux(session.stream) if fed is None else fed:
            session.check_reading()
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise Damage("corrupt packet")
            session.packets_read += 1
            session.last_pts = _later(session.last_pts, packet.pts)
            if packet.pts is not None and not packet.is_discard:
                waiting[packet.pts] = position
            position += 1
            for frame in packet.decode():
                _hold(session, frame, position, waiting, held)
            yield from _released(waiting, held, may_hide)
        for frame in session.stream.codec_context.decode(None):
            _hold(session, frame, position, waiting, held)
    except MediaError as error:
        session.check_reading()
        raise Damage(_reason(error)) from error
    if waiting and not may_hide:
        raise Damage("last packets yielded no picture")  # at the end FFmpeg reports no errors
    while held:
        yield held.popleft()[0]


def lenient(session: Session) -> Iterator[Picture]:
    """Yield whatever can be decoded, with one loss entry per contiguous loss.

    A packet is lost if pictures shown later have been output and an error was reported for it or for another
    packet lost with it. Pictures that the decoder flags as concealed are delivered, and counted as "damaged
    picture".
    """
    waiting: dict[int, bool] = {}  # pts -> whether an error was reported
    cadence = _Cadence()
    patched = unnamed = 0
    signs = False
    for packet in _packets(session):
        wrong = packet is None or packet.is_corrupt
        frames: list[Any] = []
        if packet is not None:
            session.last_pts = _later(session.last_pts, packet.pts)
            if packet.pts is not None and not packet.is_discard:
                waiting[packet.pts] = wrong
            frames, failed = _decoded(session, packet)
            wrong = wrong or failed
            if packet.pts is None:
                unnamed += failed
            elif failed and not packet.is_discard:
                waiting[packet.pts] = True
        signs = signs or wrong
        for frame in frames:
            picture, patched = _account(frame, waiting, cadence, unnamed, patched)
            unnamed = 0
            yield picture
    frames, _ = _decoded(session, None)
    for frame in frames:
        picture, patched = _account(frame, waiting, cadence, unnamed, patched)
        unnamed = 0
        yield picture
    lost = unnamed + (len(waiting) if any(waiting.values()) else 0)
    session.trailing = (*_some("damaged picture", patched), *trailing_losses(session, lost, damaged=signs))


def trailing_losses(session: Session, lost: int, *, damaged: bool) -> Losses:
    """Return the loss at the end: `lost` packets without a picture, and frames that are missing from the
    file.

    Containers that announce no length (MPEG-TS, fragments) miss nothing. AVI and MP4 also announce frames
    that were never stored or are edited out, so their length counts only if there are other signs of damage.
    """
    missing = 0
    announced, end = int(session.stream.frames or 0), _duration_tag(session.stream)
    if announced:
        if damaged or _index_beyond_end(session):
            missing = max(0, announced - session.packets_read)
    elif end is not None and session.last_pts is not None and session.rate:
        missing = round((end - float(session.last_pts * session.time_base)) * session.rate) - 1
        missing = missing if missing >= 3 else 0  # fewer may be rounding, or a last frame shown for longer
    return _some("file ends early" if missing else "decode error", lost + missing)


class Converter:
    """Converts one stream's decoded frames to upright RGB arrays.

    Use one for all frames: swscale's context is expensive to set up. A frame whose side data was read stays
    in memory until the garbage collector runs, so the display matrix is read only when the rotation changes,
    from a tiny copy. The decoder's buffers must be released soon: which of them are free influences how it
    conceals damage.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._rotation: int | None = None
        self._matrix: Matrix | None = None

    def to_image(self, frame: Any) -> NDArray[np.uint8]:
        """Convert a decoded frame to H x W x 3 uint8 RGB, upright and writable."""
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        if rgb.rotation != self._rotation:
            tiny = VideoReformatter().reformat(frame, width=16, height=16, format="gray", threads=1)
            self._rotation, self._matrix = rgb.rotation, display_matrix(tiny)
        image = upright(cast(NDArray[np.uint8], rgb.to_ndarray()), self._matrix)
        return image if image.flags.c_contiguous and image.flags.writeable else image.copy()


def display_matrix(frame: Any) -> Matrix | None:
    """Return (a, b, c, d) of the display matrix as -1, 0, 1: (x, y) is shown at (a x + c y, b x + d y).

    None if there is no matrix, or one that is neither mirroring nor a quarter turn: such pictures stay as
    stored.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    cells = np.frombuffer(bytes(data), dtype=np.int32)
    if cells.size < 5:
        return None
    a, b, c, d = (round(int(cells[i]) / 65536) for i in (0, 1, 3, 4))
    straight = b == c == 0 and abs(a) == abs(d) == 1
    turned = a == d == 0 and abs(b) == abs(c) == 1
    return (a, b, c, d) if straight or turned else None


def upright(image: NDArray[np.uint8], matrix: Matrix | None) -> NDArray[np.uint8]:
    """Rotate an H x W x 3 image by the display matrix; H and W swap for a quarter turn."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if a == 0:
        image = image.transpose(1, 0, 2)
        a, d = c, b
    return image[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]


class _Cadence:
    """Detects missing pictures in a stream with a constant frame rate; ignores streams without one."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=8)
        self._last: int | None = None

    def step(self, pts: int | None, *, doubtful: bool) -> int:
        """Take the next picture's time.

        If it is doubtful, return the number of pictures missing before it.
        """
        missing = 0
        if pts is not None and self._last is not None:
            gap = pts - self._last
            if doubtful and len(self._steps) == 8:
                usual = median(self._steps)
                if usual > 0 and max(self._steps) - min(self._steps) <= max(1, usual / 10):
                    missing = max(0, round(gap / usual) - 1)
            if not missing:
                self._steps.append(gap)
        self._last = pts
        return missing


def _account(
    frame: Any, waiting: dict[int, bool], cadence: _Cadence, unnamed: int, patched: int
) -> tuple[Picture, int]:
    """Return the frame with its preceding losses, and the length of the run of concealed pictures it ends."""
    passed: list[int] = []
    if frame.pts is not None:
        waiting.pop(frame.pts, None)
        passed = [pts for pts in waiting if pts < frame.pts]
    lost = len(passed) if any(waiting[pts] for pts in passed) else 0
    for pts in passed:
        del waiting[pts]
    lost = max(lost + unnamed, cadence.step(frame.pts, doubtful=lost > 0 or frame.is_corrupt))
    losses = _some("decode error", lost)
    if frame.is_corrupt:
        return Picture(frame, losses), patched + 1
    return Picture(frame, (*_some("damaged picture", patched), *losses)), 0


def _packets(session: Session) -> Iterator[Any | None]:
    """Yield the stream's packets; None stands for a failed read after which reading went on."""
    failures = 0
    while failures < _MAX_READ_FAILURES:
        try:
            for packet in session.container.demux(session.stream):
                session.check_reading()
                if packet.size:
                    failures = 0
                    session.packets_read += 1
                    yield packet
            return
        except MediaError as error:
            session.check_reading()
            failures += 1
            log.debug("reading failed: %s", _reason(error))
            yield None


def _decoded(session: Session, packet: Any | None) -> tuple[list[Any], bool]:
    """Decode a packet (None: the end); return the frames output, and whether an error was reported."""
    try:
        frames = session.stream.codec_context.decode(packet)
        allowed = [frame for frame in frames if not _too_large(session, frame)]
        return allowed, len(allowed) < len(frames)
    except MediaError as error:
        log.debug("decoding failed: %s", _reason(error))
        return [], True


def _too_large(session: Session, frame: Any) -> bool:
    return int(frame.width) * int(frame.height) > session.max_pixels


def _hold(
    session: Session, frame: Any, position: int, waiting: dict[int, int], held: deque[tuple[Any, int]]
) -> None:
    if _too_large(session, frame):
        raise Damage(f"picture of {frame.width}x{frame.height}")
    if frame.is_corrupt:
        raise Damage("patched-up picture")
    held.append((frame, position if frame.pts is None else waiting.pop(frame.pts, position)))


def _released(waiting: dict[int, int], held: deque[tuple[Any, int]], may_hide: bool) -> Iterator[Any]:
    while held:
        frame, position = held[0]
        if frame.pts is None:
            if len(held) <= _HOLD_WITHOUT_PTS:
                return
        elif len(held) <= _HOLD_AT_MOST and any(p < position and t > frame.pts for t, p in waiting.items()):
            return
        held.popleft()
        if frame.pts is not None:
            passed = [t for t in waiting if t < frame.pts]
            if passed and not may_hide:
                raise Damage("packet yielded no picture")
            for pts in passed:
                del waiting[pts]
        yield frame


def _is_certain(error: Exception, location: Location, handle: GuardedFile | None) -> bool:
    """Whether FFmpeg refused a file for its content, not for a failed read."""
    if isinstance(error, av.InvalidDataError | av.EOFError):
        return True
    if handle is not None:  # each of its reads has succeeded
        return isinstance(error, MediaError)
    if getattr(error, "errno", None) != errno.EIO:
        return False
    # Some of FFmpeg's demuxers report a file that ends within its header as an input error; reading it works.
    try:
        with open(location.path, "rb") as file:
            return len(file.read(_HEADER_BYTES + 1)) <= _HEADER_BYTES
    except OSError:
        return False


def _video_stream(container: Any) -> Any | None:
    for stream in container.streams.video:
        pictured = stream.disposition & av.stream.Disposition.attached_pic
        if stream.codec_context is not None and not pictured:
            return stream
    return None


def _index_beyond_end(session: Session) -> bool:
    entries = getattr(session.stream, "index_entries", None)
    if not entries or session.container.size <= 0:
        return False
    last = entries[len(entries) - 1]
    return bool(last.pos + last.size > session.container.size)


def _duration_tag(stream: Any) -> float | None:
    """Matroska's statistics tag: the end of the stream's last frame, in seconds."""
    parts = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _later(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


def _some(reason: str, count: int) -> Losses:
    return ((reason, count),) if count else ()


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or one_line(error)
