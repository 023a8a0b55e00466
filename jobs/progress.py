"""How a batch gets on, for people: bars on a terminal, a line every so often elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jobs.actions import Progress as Standing
from jobs.actions import Running
from jobs.terminal import SPEAK_EVERY_S, duration, say

_MOST_BARS = 12
_RATE_SECONDS = 30.0
_ESTIMATE_SECONDS = 600.0
_NAME_WIDTH = 40


class Rate:
    """Frames per second over the last half minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])

    def of(self, frames: int) -> float:
        """Takes note of how many frames there are by now, and returns the rate."""
        now = self._clock()
        self._seen.append((now, frames))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0]
        return (frames - before) / (now - then) if now > then else 0.0


class BatchDisplay:
    """Shows a batch's standing; use it as a context manager, call it with every news.

    On a terminal: one bar for all videos, one for each that is running (12 at most). Elsewhere: lines.
    """

    def __init__(
        self,
        console: Console,
        *,
        speak: Callable[[str], None] = say,
        every_seconds: float = SPEAK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = Rate(clock)
        self._clock = clock
        self._started = self._spoke = clock()
        self._speak, self._every_seconds = speak, every_seconds
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False, justify="right"),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=_ESTIMATE_SECONDS,
        )
        self._all = self._progress.add_task("all videos", total=None, count="starting", rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, standing: Standing, running: Sequence[Running]) -> None:
        rate = self._rate.of(standing.frames)
        done = ended(standing) + sum(share(video) for video in running)
        if self._progress.disable:
            now = self._clock()
            if now - self._spoke >= self._every_seconds:
                self._spoke = now
                self._speak(line(standing, rate, done, now - self._started))
            return
        self._show(standing, running, rate, done)

    def _show(self, standing: Standing, running: Sequence[Running], rate: float, done: float) -> None:
        bad = standing.failed + standing.quarantined
        count = f"{ended(standing)}/{standing.videos}" + (f", {bad} bad" if bad else "")
        rates = f"{rate:.1f} frames/s" if rate else ""
        self._progress.update(self._all, total=standing.videos, completed=done, count=count, rate=rates)
        shown = {video.stream_id: video for video in running[:_MOST_BARS]}
        for stream_id in [i for i in self._bars if i not in shown]:
            self._progress.remove_task(self._bars.pop(stream_id))
        for stream_id, video in shown.items():
            if stream_id not in self._bars:
                name = stream_id if len(stream_id) <= _NAME_WIDTH else f"{stream_id[: _NAME_WIDTH - 1]}…"
                self._bars[stream_id] = self._progress.add_task(f"  {name}", total=None, count="", rate="")
            of = f"/{video.frame_count}" if video.frame_count else ""
            total = max(video.frame_count, video.frames) if video.frame_count else None
            self._progress.update(
                self._bars[stream_id], total=total, completed=video.frames, count=f"{video.frames}{of}"
            )


def ended(standing: Standing) -> int:
    """Videos for which nothing more is done in this run."""
    parts = (standing.finished, standing.failed, standing.quarantined, standing.cancelled, standing.pending)
    return sum(parts)


def share(video: Running) -> float:
    """How much of a running video is done, 0 to 1; 0 where its length is unknown."""
    return min(1.0, video.frames / video.frame_count) if video.frame_count else 0.0


def line(standing: Standing, rate: float, done: float, seconds: float) -> str:
    """The standing in one line; `done` videos, parts counted, took so many seconds."""
    bad = standing.failed + standing.quarantined
    parts = [f"{standing.finished} of {standing.videos} videos finished"]
    if bad:
        parts.append(f"{bad} bad")
    parts += [f"{standing.running} running", f"{standing.frames} frames", f"{rate:.1f} frames/s"]
    left = standing.videos - done
    if done > 0 and seconds > 0 and left > 0:
        parts.append(f"about {duration(seconds / done * left)} left")
    return ", ".join(parts)
