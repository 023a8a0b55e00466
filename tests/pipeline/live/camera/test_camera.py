"""Live streams from a real RTSP server (GStreamer), and failures of the server or the network."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.live_reader import PATIENCE, Reader, options
from support.rtsp_camera import Camera, Proxy, camera
from support.videos import make_video, scene

from pipeline.base.errors import SourceError, UsageError
from pipeline.base.records import Frame
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.source import LiveSource

REAL = Path("/work/shared/data/video/vtest.avi")
FRAMES, WIDTH, HEIGHT, RATE = 50, 160, 120, 25


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "plain": make_video(folder / "plain.mp4", FRAMES, gop=10),
        "b": make_video(folder / "b.mp4", FRAMES, gop=10, b_frames=2),
        "large": make_video(folder / "large.mp4", FRAMES, width=320, height=240, gop=10),
    }


@pytest.fixture(scope="module")
def shared(clips: dict[str, Path]) -> Iterator[Camera]:
    """A shared camera that no test disturbs."""
    with camera(clips["plain"], clips["large"]) as made:
        yield made


@pytest.fixture
def own(clips: dict[str, Path]) -> Iterator[Camera]:
    """A camera for one test."""
    with camera(clips["plain"], clips["large"]) as made:
        yield made


@functools.cache
def thumbnails(width: int, height: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The clip's pictures, small."""
    return np.stack([scene(i, width, height)[::4, ::4].astype(np.int64) for i in range(FRAMES)])


def shown_number(frame: Frame) -> int:
    """Index of the clip's picture that a frame shows."""
    height, width = frame.size
    errors = np.abs(thumbnails(width, height) - frame.image[::4, ::4]).mean(axis=(1, 2, 3))
    best = int(np.argmin(errors))
    assert errors[best] < 12
    return best


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_frames_are_the_clips_own(shared: Camera, transport: str) -> None:
    with LiveSource(shared.url(), options(transport=transport)) as source:
        reader = Reader(source)
        frames = reader.take(60)
        assert [frame.frame_index for frame in frames] == list(range(60))
        first = shown_number(frames[0])
        assert [shown_number(f) for f in frames] == [(first + i) % FRAMES for i in range(60)]
        steps = np.diff([frame.pts_seconds for frame in frames])
        np.testing.assert_allclose(steps, 1 / RATE, atol=1e-6)
        assert (source.width, source.height, source.codec) == (WIDTH, HEIGHT, "h264")
        assert frames[0].image.dtype == np.uint8
        assert frames[0].wall_time is not None
        assert [(e.kind, e.reason) for e in frames[0].losses] == [("clock", "source")]
        reader.finish()
        assert source.status().state == "closed"


def test_b_frames_come_in_the_order_shown(clips: dict[str, Path]) -> None:
    with camera(clips["b"]) as made, LiveSource(made.url(), options()) as source:
        reader = Reader(source)
        frames = reader.take(60)
        first = shown_number(frames[0])
        assert [shown_number(f) for f in frames] == [(first + i) % FRAMES for i in range(60)]
        np.testing.assert_allclose(np.diff([f.pts_seconds for f in frames]), 1 / RATE, atol=1e-6)
        reader.finish()


def test_a_real_clip(tmp_path: Path) -> None:
    """People in a street, 768x576: every picture is bit-identical to the decoded file."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not on this machine")
    with av.open(str(REAL)) as container:
        pictures: Any = [f.to_ndarray(format="rgb24") for f in islice(container.decode(video=0), 40)]
    clip = make_video(tmp_path / "street.mp4", pictures, rate=10, time_base=Fraction(1, 10), b_frames=2)
    with av.open(str(clip)) as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    with camera(clip) as made, LiveSource(made.url(), options()) as source:
        made.tell("rate 4")
        reader = Reader(source)
        frames = reader.take(50)
        first = next(i for i, image in enumerate(decoded) if np.array_equal(image, frames[0].image))
        for i, frame in enumerate(frames):
            np.testing.assert_array_equal(frame.image, decoded[(first + i) % 40])
        reader.finish()


def test_wall_time_comes_from_the_cameras_reports(shared: Camera) -> None:
    with LiveSource(shared.url(), options()) as source:
        reader = Reader(source)
        frame = reader.until("clock", "source")
        assert frame.frame_index == 0
        while source.status().wall_source != "rtcp":
            reader.take(1)
        reader.take(10)
        changes = [e.detail["wall_time"] for e in reader.of("clock") if e.detail]
        assert changes == ["arrival", "rtcp"]
        reader.finish()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_killed_and_replaced_by_another_size(own: Camera, clips: dict[str, Path], transport: str) -> None:
    with LiveSource(own.url(), options(transport=transport)) as source:
        reader = Reader(source)
        before = reader.take(10)[-1]
        own.kill()
        own.start({"/live": [clips["large"]]})
        after = reader.until("reconnect")
        assert after.size == (240, 320)
        gap, reconnect, *_ = [e for e in after.losses if e.kind in ("gap", "reconnect")]
        assert (gap.kind, reconnect.kind) == ("gap", "reconnect")
        assert gap.reason in ("closed", "read error")
        assert gap.detail is not None
        last = reader.frames[-2]
        assert last.pts_seconds is not None
        assert after.pts_seconds == pytest.approx(last.pts_seconds + gap.detail["seconds"], abs=0.3)
        (resized,) = reader.of("resized")
        assert resized.detail == {"from": [120, 160], "to": [240, 320]}
        assert before.size == (120, 160)
        assert shown_number(reader.take(1)[0]) >= 0
        reader.finish()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_frozen_camera_is_given_up_and_found_again(own: Camera, transport: str) -> None:
    with LiveSource(own.url(), options(transport=transport)) as source:
        reader = Reader(source)
        reader.take(5)
        own.freeze()
        try:
            while source.status().tries == 0:
                if source.read(0.1):
                    source.ledger.dropped("test")
            assert "stalled" in str(source.status().failure)
        finally:
            own.thaw()
        frame = reader.until("gap", "stalled")
        assert [e.kind for e in frame.losses if e.kind in ("gap", "reconnect")] == ["gap", "reconnect"]
        assert source.status().state == "streaming"
        assert source.status().failure is None
        source.close()
        assert source.ledger.counts().settled


def test_a_network_that_swallows_everything(shared: Camera) -> None:
    with Proxy(shared.port) as proxy, LiveSource(proxy.url(), options(open_seconds=1.0)) as source:
        reader = Reader(source)
        reader.take(5)
        proxy.swallow = True
        while source.status().tries < 2:
            if source.read(0.1):
                source.ledger.dropped("test")
        proxy.swallow = False
        gap = [e for e in reader.until("reconnect").losses if e.kind == "gap"]
        assert [e.reason for e in gap] == ["stalled"]
        assert gap[0].detail is not None
        assert gap[0].detail["tries"] >= 2
        source.close()


def test_silence_within_a_connection_is_a_gap(own: Camera) -> None:
    with LiveSource(own.url(), options(stall_seconds=20.0)) as source:
        reader = Reader(source)
        reader.take(5)
        own.tell("pause")
        while (source.status().silent_seconds or 0) < 1.5:
            if source.read(0.1):
                source.ledger.dropped("test")
        own.tell("resume")
        frame = reader.until("gap")
        (gap,) = reader.of("gap")
        assert gap.reason == "silence"
        assert gap.detail is not None
        assert gap.detail["seconds"] >= 1.4
        assert source.status().connections == 1
        assert gap.frame_index == frame.frame_index
        source.close()


def test_another_size_in_the_same_connection(own: Camera) -> None:
    with LiveSource(own.url(), options()) as source:
        reader = Reader(source)
        reader.take(12)
        own.tell("clip 1")
        frame = reader.until("resized")
        assert frame.size == (240, 320)
        assert shown_number(frame) == 0
        assert source.status().connections == 1
        own.tell("clip 0")
        assert reader.until("resized").size == (120, 160)
        assert not reader.of("gap")
        reader.finish()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_clocks_that_jump(own: Camera, jump: float) -> None:
    """RTP timestamps are changed on the way: a server's pipeline would wait out a jump."""

    def shift(channel: int, data: bytes) -> bytes:
        if channel != 0:
            return data
        stamp = (int.from_bytes(data[4:8], "big") + round(jump * 90000)) % 2**32
        return data[:4] + stamp.to_bytes(4, "big") + data[8:]

    with Proxy(own.port) as proxy, LiveSource(proxy.url(), options()) as source:
        reader = Reader(source)
        before = reader.take(20)[-1]
        proxy.mangle = shift
        frame = reader.until("clock", "jumped ahead" if jump > 0 else "jumped back")
        event = next(e for e in frame.losses if str(e.reason).startswith("jumped"))
        assert event.detail is not None
        assert event.detail["seconds"] == pytest.approx(jump, abs=5)
        assert before.pts_seconds is not None
        assert frame.pts_seconds is not None
        assert frame.pts_seconds - before.pts_seconds < 60
        steps = np.diff([f.pts_seconds for f in reader.take(20)])
        np.testing.assert_allclose(steps, 1 / RATE, atol=1e-6)
        reader.finish()


def test_a_camera_that_lies_about_the_time(shared: Camera) -> None:
    def year_ahead(channel: int, data: bytes) -> bytes:
        if channel != 1 or data[1] != 200:  # RTCP sender reports
            return data
        seconds = (int.from_bytes(data[8:12], "big") + 365 * 86400) % 2**32
        return data[:8] + seconds.to_bytes(4, "big") + data[12:]

    with Proxy(shared.port) as proxy:
        proxy.mangle = year_ahead
        with LiveSource(proxy.url(), options()) as source:
            reader = Reader(source)
            frame = reader.until("clock", "camera clock off")
            (event,) = [e for e in frame.losses if e.reason == "camera clock off"]
            assert event.detail is not None
            assert event.detail["wall_time"] == "arrival"
            assert event.detail["seconds"] == pytest.approx(365 * 86400, abs=60)
            first = reader.frames[0].wall_time
            assert first is not None
            assert frame.wall_time is not None
            assert (frame.wall_time - first).total_seconds() < 120
            reader.take(30)
            assert len(reader.of("clock")) == 2  # said once, beside "source" at the beginning
            reader.finish()


def test_nothing_is_shown_before_a_keyframe(shared: Camera) -> None:
    """The first keyframe's packets are lost: the next nine pictures cannot be decoded."""
    seen = {"keyframes": 0}

    def without_the_first_keyframe(channel: int, data: bytes) -> bytes | None:
        if channel != 0:
            return data
        kind = data[12] & 31
        start_of_idr = kind == 5 or (kind == 28 and data[13] & 0x80 and data[13] & 31 == 5)
        if start_of_idr:
            seen["keyframes"] += 1
        idr = kind == 5 or (kind == 28 and data[13] & 31 == 5)
        return None if idr and seen["keyframes"] == 1 else data

    with Proxy(shared.port) as proxy:
        proxy.mangle = without_the_first_keyframe
        with LiveSource(proxy.url(), options(stall_seconds=5.0)) as source:
            reader = Reader(source)
            (frame,) = reader.take(1)
            assert shown_number(frame) == 10
            (dropped,) = reader.of("dropped")
            assert (dropped.reason, dropped.count) == ("before the first keyframe", frame.frame_index)
            assert dropped.count in (9, 10)  # parameter sets alone may pass as a packet
            reader.finish()


def test_damage_is_counted_and_not_shown(shared: Camera) -> None:
    counted = {"packets": 0}

    def damaged(channel: int, data: bytes) -> bytes:
        if channel != 0:
            return data
        counted["packets"] += 1
        if counted["packets"] % 7 or len(data) < 60:
            return data
        return data[:30] + bytes((b * 7 + 13) % 256 for b in data[30:])

    with Proxy(shared.port) as proxy, LiveSource(proxy.url(), options()) as source:
        reader = Reader(source)
        reader.take(5)
        proxy.mangle = damaged
        reader.until("corrupt")
        proxy.mangle = None
        reader.take(40)
        assert source.ledger.counts().corrupt_total > 0
        reader.finish()


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 50 pictures in four slices each, a keyframe every 25."""
    return make_video(
        tmp_path_factory.mktemp("sliced") / "sliced.mp4", FRAMES, gop=25, options={"slices": "4"}
    )


def digest(image: Any) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def decoded(clip: Path) -> list[str]:
    """Keys of the pictures."""
    with av.open(str(clip)) as container:
        return [digest(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


def test_keyframes_that_come_in_pieces_are_whole(sliced: Path) -> None:
    """GStreamer's payloader repeats parameter sets before each slice, which FFmpeg takes for new pictures."""
    pictures = decoded(sliced)
    with camera(sliced, repeat=True) as made, LiveSource(made.url(), options()) as source:
        reader = Reader(source)
        frames = reader.take(60)
        assert [frame.frame_index for frame in frames] == list(range(60))
        first = pictures.index(digest(frames[0].image))
        assert [digest(f.image) for f in frames] == [pictures[(first + i) % FRAMES] for i in range(60)]
        assert source.ledger.counts().corrupt == {}
        reader.finish()


def test_nothing_is_shown_between_damage_and_the_next_keyframe(sliced: Path) -> None:
    """One slice is lost: only that picture is damaged, but the following ones are predicted from it."""
    pictures = decoded(sliced)
    lost: list[bytes] = []
    stamps: dict[bytes, int] = {}

    def without_a_slice(channel: int, data: bytes) -> bytes | None:
        if channel != 0:
            return data
        count = stamps[data[4:8]] = stamps.get(data[4:8], 0) + 1
        if len(stamps) > 30 and data[12] & 31 == 1 and count == 2 and not lost:
            lost.append(data)
            return None
        return data

    with camera(sliced) as made, Proxy(made.port) as proxy:
        proxy.mangle = without_a_slice
        with LiveSource(proxy.url(), options(policy="every")) as source:
            reader = Reader(source)
            frames = reader.take(60)
            assert len(lost) == 1
            numbers = [pictures.index(digest(frame.image)) for frame in frames]  # each is one of the clip's
            jump = next(i for i in range(60) if frames[i].frame_index != i)
            missing = frames[jump].frame_index - jump
            assert numbers[jump] % 25 == 0
            assert numbers == [(numbers[0] + f.frame_index) % FRAMES for f in frames]
            found = [(e.reason, e.count) for e in frames[jump].losses if e.kind == "corrupt"]
            assert found == [("damaged picture", 1), ("after damage", missing - 1)]
            assert missing > 1
            reader.finish()


def test_latest_drops_the_oldest_and_counts_them(shared: Camera) -> None:
    with LiveSource(shared.url(), options(queue_frames=2)) as source:
        reader = Reader(source)
        reader.take(1)
        pause = threading.Event()
        # On a busy machine, frames are dropped before the first one, too.
        before = sum(e.count for e in reader.frames[0].losses if e.kind == "dropped")
        while source.ledger.counts().dropped_total - before < 35:
            pause.wait(0.05)
        taken = reader.take(2)
        skipped = taken[0].frame_index - reader.frames[0].frame_index - 1
        drops = [e for e in taken[0].losses if e.kind == "dropped"]
        assert [(e.reason, e.count) for e in drops] == [("queue full", skipped)]
        assert skipped >= 35
        assert taken[1].frame_index == taken[0].frame_index + 1
        # The camera's own clock may become known at any frame.
        assert {e.kind for e in taken[1].losses} <= {"clock"}
        reader.finish()


def test_frames_too_old_are_dropped(shared: Camera) -> None:
    with LiveSource(shared.url(), options(queue_frames=500, max_age_seconds=0.5)) as source:
        reader = Reader(source)
        reader.take(1)
        pause = threading.Event()
        while source.ledger.counts().received < 50:
            pause.wait(0.05)
        (frame,) = reader.take(1)
        assert (source.status().lag_seconds or 0) <= 0.5
        assert {e.reason for e in frame.losses if e.kind == "dropped"} == {"too old"}
        reader.finish()


def test_every_lets_the_camera_wait(shared: Camera) -> None:
    with LiveSource(shared.url(), options(policy="every", queue_frames=3, stall_seconds=20.0)) as source:
        reader = Reader(source)
        reader.take(1)
        pause = threading.Event()
        pause.wait(1.5)
        assert source.ledger.counts().in_flight <= 4
        frames = reader.take(60)
        assert [f.frame_index for f in frames] == list(range(1, 61))
        assert not reader.of("dropped")
        reader.finish()


def test_every_can_be_closed_while_it_waits(shared: Camera) -> None:
    source = LiveSource(shared.url(), options(policy="every", queue_frames=1))
    source.wait_ready(PATIENCE)
    while source.ledger.counts().received < 2:
        threading.Event().wait(0.02)
    source.close()
    counts = source.ledger.counts()
    assert counts.settled
    assert dict(counts.dropped) == {"closed": 2}
    assert sum(e.count for e in source.trailing_losses if e.kind == "dropped") == 2


def test_going_on_after_a_restart(shared: Camera) -> None:
    with LiveSource(shared.url(), options()) as source:
        earlier = Reader(source).take(5)[-1]
    assert earlier.pts_seconds is not None
    with LiveSource(shared.url(), options()) as source:
        frames = source.frames(
            100, previous_pts_seconds=earlier.pts_seconds, previous_wall_time=earlier.wall_time
        )
        first, second = next(frames), next(frames)
        assert (first.frame_index, second.frame_index) == (100, 101)
        assert first.pts_seconds is not None
        assert second.pts_seconds is not None
        assert earlier.wall_time is not None
        assert first.wall_time is not None
        away = (first.wall_time - earlier.wall_time).total_seconds()
        assert first.pts_seconds - earlier.pts_seconds == pytest.approx(away)
        assert second.pts_seconds - first.pts_seconds == pytest.approx(1 / RATE)


def test_no_camera_is_a_reason_to_wait_and_to_say_so() -> None:
    with LiveSource("rtsp://user:secret@127.0.0.1:1/live", options()) as source:
        with pytest.raises(SourceError) as caught:
            source.wait_ready(0.5)
        assert "refused" in str(caught.value).lower()
        assert "secret" not in str(caught.value) + repr(source) + str(source.status())
        assert source.read(0.05) is None
        assert not source.closed


@pytest.mark.parametrize("url", ["", "clip.mp4", "rtsp://a\0b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        LiveSource(url)


@pytest.mark.parametrize(
    "wrong", [{"transport": "sctp"}, {"policy": "some"}, {"stall_seconds": 0}, {"most_backoff_seconds": 0.01}]
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LiveOptions(**wrong)
