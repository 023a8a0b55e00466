"""Batch progress for people: bars on a terminal, a line at intervals elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from jobs.batch.durations import duration
from jobs.cli.terminal import SPEAK_EVERY_S, say
from jobs.scheduling.actions import Progress as Standing
from jobs.scheduling.actions import Running

_MOST_BARS = 12
_RATE_SECONDS = 30.0
_ESTIMATE_SECONDS = 600.0
_NAME_WIDTH = 40
# A shortage of workers is reported after this time, and again when its cause changes; normal start-up is not.
_WAIT_SECONDS = 5.0


class Rate:
    """Frames per second over the last 30 seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])

    def of(self, frames: int) -> float:
        """Record the current number of frames and return the rate."""
        now = self._clock()
        self._seen.append((now, frames))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0]
        return (frames - before) / (now - then) if now > then else 0.0


class _TimeLeft(TimeRemainingColumn):
    """Shows the task's field `left` if it has one, else rich's estimate."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return super().render(task) if left is None else Text(left, style="progress.remaining")


class BatchDisplay:
    """Shows a batch's progress. Use it as a context manager and call it with each update.

    On a terminal: one bar for all videos and one per running video (12 at most). Elsewhere: log lines.
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
        self._spoke = self._waits_since = clock()
        self._working_since: float | None = None
        self._said = ""
        self._speak, self._every_seconds = speak, every_seconds
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False, justify="right"),
            TextColumn("{task.fields[rate]}", markup=False),
            _TimeLeft(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=_ESTIMATE_SECONDS,
        )
        self._all = self._progress.add_task("all videos", total=None, count="starting", rate="", left="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, standing: Standing, running: Sequence[Running]) -> None:
        rate, now = self._rate.of(standing.frames), self._clock()
        if standing.workers and self._working_since is None:
            self._working_since = now
        left = seconds_left(standing, running, now - (self._working_since or now))
        if not self._progress.disable:
            self._show(standing, running, rate, left)
            return
        due = now - self._spoke >= self._every_seconds
        if not standing.shortage:
            self._waits_since, self._said = now, ""
        elif not standing.workers and now - self._waits_since >= min(_WAIT_SECONDS, self._every_seconds):
            due = due or standing.shortage != self._said
        if due:
            self._spoke, self._said = now, standing.shortage
            self._speak(line(standing, rate, left))

    def _show(self, standing: Standing, running: Sequence[Running], rate: float, left: float | None) -> None:
        bad = standing.failed + standing.quarantined
        count = f"{ended(standing)}/{standing.videos}" + (f", {bad} bad" if bad else "")
        rates = [f"{rate:.1f} frames/s"] if rate else []
        rates += [waiting] if (waiting := waits_for(standing)) else []
        done = ended(standing) + sum(share(video) for video in running)
        self._progress.update(
            self._all,
            total=standing.videos,
            completed=done,
            count=count,
            rate=", ".join(rates),
            left="" if left is None else f"{duration(left)} left",
        )
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
    """Number of videos that have ended in this run, in whatever state."""
    parts = (standing.finished, standing.failed, standing.quarantined, standing.cancelled, standing.pending)
    return sum(parts)


def share(video: Running) -> float:
    """Fraction of a running video that is done, 0 to 1; 0 if its length is unknown."""
    return min(1.0, video.frames / video.frame_count) if video.frame_count else 0.0


def seconds_left(standing: Standing, running: Sequence[Running], seconds: float) -> float | None:
    """Estimated remaining seconds at the rate so far; None if there is no estimate or no worker yet.

    Lengths are limited by --max-frames. Videos not opened yet count with the mean length of the others.

    Args:
        seconds: time since the first worker was ready.
    """
    unfinished = standing.running + standing.waiting
    if not (standing.workers and standing.frames and standing.mean_frames and unfinished and seconds > 0):
        return None
    mean = standing.mean_frames
    frames = sum(max(0.0, (video.frame_count or mean) - video.frames) for video in running)
    frames += max(0, unfinished - len(running)) * mean
    return seconds / standing.frames * frames


def waits_for(standing: Standing) -> str:
    """Why requested workers are missing; empty if none is."""
    if not standing.missing:
        return ""
    workers = f"{standing.missing} worker{'s' if standing.missing > 1 else ''}"
    if standing.shortage:
        return f"waiting for {workers}: {standing.shortage}"
    return "" if standing.workers else f"{workers} starting"


def line(standing: Standing, rate: float, left: float | None) -> str:
    """Progress in one line; `left`: estimated remaining seconds, or None."""
    bad = standing.failed + standing.quarantined
    parts = [f"{standing.finished} of {standing.videos} videos finished"]
    if bad:
        parts.append(f"{bad} bad")
    parts += [f"{standing.running} running", f"{standing.frames} frames", f"{rate:.1f} frames/s"]
    if left is not None:
        parts.append(f"about {duration(left)} left")
    if waiting := waits_for(standing):
        parts.append(waiting)
    return ", ".join(parts)
