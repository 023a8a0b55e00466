"""Timestamps of live frames: increasing whatever cameras send, and accurate if cameras send the time."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.backoff import Backoff
from pipeline.live.camera.clock import Arrival, LiveClock, Stamp

T0 = 1_800_000_000.0  # UTC at monotonic 0
STEP = 0.04


def at(seconds: float, utc_offset: float = 0.0) -> Arrival:
    return Arrival(seconds, T0 + seconds + utc_offset)


def steady(clock: LiveClock, count: int, start: float = 0.0, raw: float = 7.0) -> list[Stamp]:
    """Punctual frames, from `start` on."""
    return [clock.stamp(raw + i * STEP, at(start + i * STEP)) for i in range(count)]


def reasons(stamp: Stamp) -> list[str]:
    return [change.reason for change in stamp.changes]


def test_time_begins_at_zero_and_follows_the_camera() -> None:
    stamps = steady(LiveClock(), 50)
    assert [s.pts_seconds for s in stamps] == pytest.approx([i * STEP for i in range(50)])
    assert reasons(stamps[0]) == ["source"]
    assert all(not s.changes for s in stamps[1:])
    assert stamps[25].wall_time == datetime.fromtimestamp(T0 + 1.0, UTC)


def test_jitter_of_the_network_is_not_in_the_times() -> None:
    clock = LiveClock()
    delays = [0.0, 0.03, 0.2, 0.01, 0.5, 0.0, 0.1] * 5
    stamps = [clock.stamp(i * STEP, at(i * STEP + 1.0 + d)) for i, d in enumerate(delays)]
    assert [s.pts_seconds for s in stamps] == pytest.approx([i * STEP for i in range(35)])
    errors = [s.wall_time.timestamp() - (T0 + 1.0 + i * STEP) for i, s in enumerate(stamps)]
    assert max(map(abs, errors)) < 0.005


def test_a_camera_clock_that_drifts_is_followed() -> None:
    """Two hours at 100 ppm fast or slow: wall times stay within 0.1 s of arrival."""
    for rate in (1.0001, 0.9999):
        clock = LiveClock()
        for i in range(7200):
            stamp = clock.stamp(i * rate, at(float(i)))
        assert stamp.wall_time.timestamp() == pytest.approx(T0 + 7199, abs=0.1)
        assert reasons(stamp) == []


def test_a_reconnect_takes_the_time_it_takes() -> None:
    clock = LiveClock()
    last = steady(clock, 10)[-1]
    clock.reconnected()
    back = clock.stamp(123456.0, at(30.0))
    assert back.pts_seconds == pytest.approx(30.0)
    assert back.changes == ()
    assert back.pts_seconds - last.pts_seconds == pytest.approx(30.0 - 9 * STEP)
    assert clock.stamp(123456.0 + STEP, at(30.04)).pts_seconds == pytest.approx(30.04)


def test_how_late_frames_were_before_an_outage_is_not_carried_on() -> None:
    """Several connections end with ever later frames; the next one is on time again."""
    clock, now = LiveClock(), 0.0
    for _ in range(20):
        for i in range(50):
            stamp = clock.stamp(i * STEP, at(now + i * STEP), camera_utc=T0 + now + i * STEP)
            assert stamp.source == "rtcp"
            assert stamp.wall_time.timestamp() == pytest.approx(T0 + now + i * STEP, abs=0.1)
            assert stamp.pts_seconds == pytest.approx(now + i * STEP, abs=0.1)
        for i in range(50, 75):
            clock.stamp(i * STEP, at(now + i * STEP + 0.04 * (i - 49)), camera_utc=T0 + now + i * STEP)
        now += 75 * STEP + 2.0
        clock.reconnected()


@pytest.mark.parametrize(
    ("jump", "reason"), [(3600.0, "jumped ahead"), (-3600.0, "jumped back"), (-0.5, "jumped back")]
)
def test_jumps_are_set_right_and_reported(jump: float, reason: str) -> None:
    clock = LiveClock()
    steady(clock, 10)
    stamp = clock.stamp(7.0 + 10 * STEP + jump, at(10 * STEP))
    assert stamp.pts_seconds == pytest.approx(10 * STEP)
    assert reasons(stamp) == [reason]
    assert stamp.changes[0].seconds == pytest.approx(jump)
    after = clock.stamp(7.0 + 11 * STEP + jump, at(11 * STEP))
    assert after.pts_seconds == pytest.approx(11 * STEP)
    assert after.changes == ()


def test_lost_frames_are_no_jump() -> None:
    clock = LiveClock()
    steady(clock, 10)
    stamp = clock.stamp(7.0 + 60 * STEP, at(60 * STEP))
    assert stamp.pts_seconds == pytest.approx(60 * STEP)
    assert stamp.changes == ()


def test_timestamps_that_stand_still_go_on_rising() -> None:
    clock = LiveClock()
    stamps = [clock.stamp(5.0, at(i * STEP)) for i in range(300)]
    times = [s.pts_seconds for s in stamps]
    assert all(b > a for a, b in pairwise(times))
    behind = [s for s in stamps if "fell behind" in reasons(s)]
    assert len(behind) == 2
    assert behind[0].pts_seconds == pytest.approx(stamps.index(behind[0]) * STEP)


def test_with_back_pressure_late_frames_are_nobodys_fault() -> None:
    clock = LiveClock(may_be_late=True)
    stamps = [clock.stamp(i * STEP, at(i * 10 * STEP)) for i in range(300)]
    assert [s.pts_seconds for s in stamps] == pytest.approx([i * STEP for i in range(300)])
    assert not any(s.changes for s in stamps[1:])


def test_missing_timestamps_are_made_from_the_last_duration() -> None:
    clock = LiveClock()
    first = clock.stamp(None, at(0.0), duration_seconds=STEP)
    second = clock.stamp(3.0, at(0.0), duration_seconds=STEP)  # both came in one burst
    third = clock.stamp(3.0 + STEP, at(0.0), duration_seconds=STEP)
    assert [s.pts_seconds for s in (first, second, third)] == pytest.approx([0.0, STEP, 2 * STEP])


def test_without_any_timestamps_arrival_is_all_there_is() -> None:
    clock = LiveClock()
    stamps = [clock.stamp(None, at(i * 0.1)) for i in range(20)]
    assert [s.pts_seconds for s in stamps] == pytest.approx([i * 0.1 for i in range(20)])


def test_the_cameras_clock_is_used_while_it_is_right() -> None:
    clock = LiveClock()
    steady(clock, 5)
    stamp = clock.stamp(7.0 + 5 * STEP, at(5 * STEP), camera_utc=T0 + 5 * STEP + 0.3)
    assert stamp.source == "rtcp"
    assert reasons(stamp) == ["source"]
    assert stamp.wall_time.timestamp() == pytest.approx(T0 + 5 * STEP + 0.3)
    wrong = clock.stamp(7.0 + 6 * STEP, at(6 * STEP), camera_utc=T0 + 86400)
    assert wrong.source == "arrival"
    assert reasons(wrong) == ["camera clock off", "source"]
    assert wrong.changes[0].seconds == pytest.approx(86400, abs=1)
    again = clock.stamp(7.0 + 7 * STEP, at(7 * STEP), camera_utc=T0 + 86400 + STEP)
    assert reasons(again) == []
    right = clock.stamp(7.0 + 8 * STEP, at(8 * STEP), camera_utc=T0 + 8 * STEP + 0.3)
    assert (right.source, reasons(right)) == ("rtcp", ["source"])


def test_a_camera_at_the_edge_of_trust_does_not_flicker() -> None:
    clock = LiveClock(max_skew_seconds=2.0)
    stamps = [
        clock.stamp(i * STEP, at(i * STEP), camera_utc=T0 + i * STEP + 1.9 + 0.2 * (i % 2)) for i in range(50)
    ]
    assert sum(len(s.changes) for s in stamps) == 1


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_our_own_clock_may_be_set(step: float) -> None:
    clock = LiveClock()
    steady(clock, 10)
    stamp = clock.stamp(7.0 + 10 * STEP, at(10 * STEP, step))
    assert reasons(stamp) == ["system clock stepped"]
    assert stamp.changes[0].seconds == pytest.approx(step)
    assert stamp.wall_time.timestamp() == pytest.approx(T0 + 10 * STEP + step)
    assert stamp.pts_seconds == pytest.approx(10 * STEP)
    after = clock.stamp(7.0 + 11 * STEP, at(11 * STEP, step))
    assert after.wall_time.timestamp() == pytest.approx(T0 + 11 * STEP + step)
    assert after.changes == ()


moments = st.tuples(
    st.one_of(st.none(), st.floats(-1e6, 1e6)),
    st.floats(0.0, 100.0),
    st.one_of(st.none(), st.floats(T0 - 1e5, T0 + 1e5)),
    st.booleans(),
)


@given(st.lists(moments, max_size=60), st.booleans())
def test_whatever_a_camera_says_time_rises(
    said: list[tuple[float | None, float, float | None, bool]], late: bool
) -> None:
    clock = LiveClock(may_be_late=late)
    now = 0.0
    stamps: list[Stamp] = []
    for raw, wait, utc, reconnected in said:
        now += wait
        if reconnected:
            clock.reconnected()
        stamps.append(clock.stamp(raw, at(now), camera_utc=utc))
    assert all(b.pts_seconds > a.pts_seconds for a, b in pairwise(stamps))
    assert all(b.wall_time >= a.wall_time for a, b in pairwise(stamps))
    # No more than a jump's limit, and the smallest step for each frame, ahead of the clock on the wall.
    assert all(s.pts_seconds <= now + 5.0 + 0.001 * len(stamps) for s in stamps)


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        LiveClock(max_jump_seconds=0)


def test_backoff_grows_to_its_limit_and_starts_anew() -> None:
    backoff = Backoff(0.5, 15.0)
    delays = [backoff.next_seconds() for _ in range(20)]
    steps = [0.5, 1, 2, 4, 8] + [15] * 15
    assert all(step / 2 <= delay <= step for delay, step in zip(delays, steps, strict=True))
    assert len(set(delays)) == 20
    backoff.reset()
    assert backoff.next_seconds() <= 0.5


def test_backoff_survives_years_of_tries() -> None:
    backoff = Backoff(0.5, 15.0)
    backoff.tries = 10**9
    assert backoff.next_seconds() <= 15.0


@pytest.mark.parametrize("wrong", [(0, 1, 2), (2, 1, 2), (1, 2, 0.5)])
def test_backoff_needs_sense(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="backoff"):
        Backoff(*wrong)
