"""Batch progress: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jobs.batch.durations import duration
from jobs.cli.progress import BatchDisplay, Rate, ended, line, seconds_left, share
from jobs.scheduling.actions import Progress, Running


def standing(**given: Any) -> Progress:
    names = dict.fromkeys(set(Progress._fields) - {"shortage"}, 0)
    return Progress(**{**names, **given})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.of(0) == 0.0
    for second in range(1, 61):
        clock.now = 1000.0 + second
        shown = rate.of(10 * second)
    assert shown == pytest.approx(10.0)
    for second in range(61, 121):
        clock.now = 1000.0 + second
        shown = rate.of(600 + 2 * (second - 60))
    assert shown == pytest.approx(2.0)
    clock.now += 1000.0
    assert rate.of(720) < 0.1


def test_lines_where_there_is_no_terminal() -> None:
    clock, said = Clock(), list[str]()
    console = Console(file=io.StringIO(), force_terminal=False)
    with BatchDisplay(console, speak=said.append, every_seconds=30, clock=clock) as display:
        display(standing(videos=4, running=2, workers=1), [])
        assert said == []
        clock.now += 30
        display(
            standing(
                videos=4, finished=1, failed=1, running=1, waiting=1, frames=300, workers=1, mean_frames=100
            ),
            [Running("a", 50, 100)],
        )
        assert said == [
            "1 of 4 videos finished, 1 bad, 1 running, 300 frames, 10.0 frames/s, about 15 s left"
        ]
        clock.now += 29
        display(standing(videos=4, finished=4), [])
        assert len(said) == 1
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_bars_on_a_terminal() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140, color_system=None, highlight=False)
    display = BatchDisplay(console, speak=lambda text: pytest.fail(text))
    running = [Running(f"video-{i}", 40, 100 if i else None) for i in range(20)]
    display(standing(videos=50, finished=3, quarantined=2, running=20, frames=800), running)
    console.print(display._progress)
    shown = output.getvalue()
    assert "all videos" in shown
    assert "5/50, 2 bad" in shown
    assert "40/100" in shown
    assert sum(f"video-{i} " in shown for i in range(20)) == 12
    output.truncate(0)
    display(
        standing(videos=50, finished=5, quarantined=2, running=1, frames=800), [Running("[red]x", 7, None)]
    )
    console.print(display._progress)
    shown = output.getvalue()
    assert "video-1 " not in shown
    assert "[red]x" in shown
    assert "7/50, 2 bad" in shown


def test_parts_of_running_videos_count() -> None:
    assert share(Running("a", 25, 100)) == 0.25
    assert share(Running("a", 150, 100)) == 1.0
    assert share(Running("a", 25, None)) == 0.0
    assert ended(standing(finished=1, failed=2, quarantined=3, cancelled=4, pending=5, running=6)) == 15


def test_waiting_for_cpus_is_said_soon_and_when_it_changes() -> None:
    clock, said = Clock(), list[str]()
    console = Console(file=io.StringIO(), force_terminal=False)
    display = BatchDisplay(console, speak=said.append, every_seconds=30, clock=clock)
    busy = standing(
        videos=2, waiting=2, missing=2, shortage="no free CPUs (2 of 2 in use, 2 of them by others)"
    )
    display(busy, [])
    assert said == []  # perhaps it is over in a moment
    for _ in range(10):
        clock.now += 1
        display(busy, [])
    expected = (
        "0 of 2 videos finished, 0 running, 0 frames, 0.0 frames/s, "
        "waiting for 2 workers: no free CPUs (2 of 2 in use, 2 of them by others)"
    )
    assert said == [expected]
    display(busy._replace(shortage="no machine of the cluster has 8 CPUs for a worker"), [])
    assert len(said) == 2
    assert said[1].endswith("waiting for 2 workers: no machine of the cluster has 8 CPUs for a worker")
    clock.now += 30
    display(standing(videos=2, running=1, waiting=1, workers=1, missing=1), [])
    assert said[2] == "0 of 2 videos finished, 1 running, 0 frames, 0.0 frames/s"


def test_nothing_is_foretold_without_grounds() -> None:
    known = standing(videos=4, finished=1, running=1, waiting=2, frames=100, workers=1, mean_frames=100)
    assert seconds_left(known, [Running("a", 50, 100)], 10.0) == pytest.approx(25.0)
    assert seconds_left(known, [Running("a", 50, None)], 10.0) == pytest.approx(25.0)
    for unknown in (
        standing(videos=3, waiting=3),
        known._replace(frames=0),  # what was finished before this run says nothing of its speed
        known._replace(workers=0),
        known._replace(running=0, waiting=0),
    ):
        assert seconds_left(unknown, [], 10.0) is None
    assert "left" not in line(known, 0.0, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (3 * 3600, "3.0 h"), (36 * 3600, "1.5 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
