"""Pacing with a simulated clock: late and surplus frames, and measured rates."""

from __future__ import annotations

import pytest

from pipeline.live.camera.ledger import Ledger
from pipeline.live.pacing import LookPace, Pace
from pipeline.live.spec import LiveSettings


def test_frames_that_would_be_too_old_once_tracked_are_unwanted() -> None:
    pace = Pace(LiveSettings(max_lag_seconds=1.0))
    assert pace.unwanted(0.9, 0.0) is None
    assert pace.unwanted(1.1, 0.0) == "too old"
    pace.tracked(0.1, 0.4)
    assert pace.unwanted(0.5, 0.0) is None
    assert pace.unwanted(0.7, 0.0) == "too old"
    for _ in range(3):  # the slow frame is remembered: the next may be slow again
        pace.tracked(0.1, 0.01)
    assert pace.unwanted(0.65, 0.0) == "too old"
    pace.tracked(0.1, 5.0)
    assert pace.unwanted(0.25, 0.0) is None  # however slow: some frames are tracked
    assert [pace.is_late(lag) for lag in (0.9, 1.1)] == [False, True]
    assert Pace(LiveSettings(policy="every")).unwanted(99.0, 0.0) is None
    assert not Pace(LiveSettings(policy="every")).is_late(99.0)


def test_a_rate_is_kept_on_average_though_frames_jitter() -> None:
    pace = Pace(LiveSettings(policy="every", fps=10))
    arrivals = [i / 30 + (0.01 if i % 2 else 0.0) for i in range(300)]
    wanted = [t for t in arrivals if pace.unwanted(0.5, t + 0.5) is None]
    assert len(wanted) == pytest.approx(100, abs=3)
    assert pace.unwanted(0.0, 9.98) == "rate limit"
    assert pace.unwanted(0.0, 60.0) is None  # after silence, no more than one frame ahead of the rate
    taken = [t for t in (60.001, 60.002, 60.003) if pace.unwanted(0.0, t) is None]
    assert len(taken) <= 1


def test_slowness_is_told_once_and_only_where_frames_are_dropped() -> None:
    pace = Pace(LiveSettings(max_lag_seconds=1.0))
    assert [pace.tracked(0.0, took) for took in (0.9, 1.1, 1.2)] == [False, True, False]
    assert not Pace(LiveSettings(policy="every", max_lag_seconds=1.0)).tracked(0.0, 1.1)


def test_lags_are_those_of_tracked_frames() -> None:
    pace = Pace(LiveSettings())
    assert pace.lag_seconds() == {"p50": None, "p99": None}
    for _ in range(600):
        pace.tracked(0.25, 0.5)
    assert pace.lag_seconds() == {"p50": 0.75, "p99": 0.75}


def test_rates_are_of_the_last_seconds() -> None:
    pace, ledger = Pace(LiveSettings()), Ledger()
    assert pace.rates() == {"received_fps": 0.0, "tracked_fps": 0.0}
    for i in range(40):  # 20 a second, half of them tracked; then silence
        ledger.received(10)
        ledger.tracked(5)
        pace.sample(i / 2, ledger)
        pace.sample(i / 2 + 0.1, ledger)  # too soon to matter
    assert pace.rates() == {"received_fps": pytest.approx(20.0), "tracked_fps": pytest.approx(10.0)}
    pace.sample(29.0, ledger)  # ten frames came in the last ten seconds
    assert pace.rates()["received_fps"] == pytest.approx(1.0)


def test_looks_take_a_limited_share_of_the_time_while_frames_are_dropped() -> None:
    looks, now, late, seen = LookPace(), 0.0, 0, 0
    assert looks.may_look(now, late)
    for _ in range(500):  # a look takes 0.4 s, tracking 0.1 s; whatever comes meanwhile is dropped
        if looks.may_look(now, late):
            looks.looked(now, now + 0.4, late)
            now, seen = now + 0.4, seen + 1
        now, late = now + 0.1, late + 1
    assert 0.3 * now < 0.4 * seen <= 0.4 * now


def test_looks_are_not_held_back_where_every_frame_is_tracked() -> None:
    looks = LookPace()
    looks.looked(0.0, 0.4, late=7)
    assert looks.may_look(0.5, late=7)
    assert not looks.may_look(0.5, late=8)
    assert looks.may_look(1.1, late=8)
    looks.looked(1.1, 1.5, late=8)  # caught up: what was dropped before counts no more
    assert looks.may_look(1.6, late=8)
