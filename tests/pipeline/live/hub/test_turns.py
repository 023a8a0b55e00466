"""Scheduling of streams with a simulated clock: guaranteed rates are kept, the others progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import pytest

from pipeline.live.hub.turns import Turn, Turns
from pipeline.live.pacing import Pace
from pipeline.live.spec import LiveSettings

CAMERA_FPS = 25.0
QUEUE = 4


@dataclass
class Stream:
    """A camera whose newest frames wait, as in `LiveQueue`, with the pace that selects some of them."""

    name: str
    fps: float | None
    seconds: float
    camera_fps: float = CAMERA_FPS
    waiting: deque[float] = field(default_factory=lambda: deque(maxlen=QUEUE))
    shown: int = 0
    tracked: int = 0

    def __post_init__(self) -> None:
        self.pace = Pace(LiveSettings(fps=self.fps))
        self.turn = Turn(self.name, self.fps, self.seconds)

    def wants(self, now: float) -> bool:
        while self.shown / self.camera_fps <= now:
            self.waiting.append(self.shown / self.camera_fps)
            self.shown += 1
        self.pace.looks(now)
        while self.waiting:
            arrival = self.waiting.popleft()
            if self.pace.unwanted(now - arrival, now) is None:
                self.pace.tracked(now - arrival, self.seconds)
                return True
        return False


def run(streams: list[Stream], seconds: float, promised: float = 0.9) -> None:
    turns, now = Turns(promised), 0.0
    named = {stream.name: stream for stream in streams}
    while now < seconds:
        for key in turns.order([stream.turn for stream in streams], now):
            stream = named[str(key)]
            if stream.wants(now):
                now += stream.seconds
                stream.tracked += 1
                turns.tracked(stream.turn, stream.seconds, now)
                break
        else:
            now += 0.005


def run_together(streams: list[Stream], seconds: float, promised: float = 0.9) -> None:
    """As `run`, several streams at a time, as a hub does on a GPU; which saves nothing here."""
    turns, now = Turns(promised), 0.0
    named = {stream.name: stream for stream in streams}

    def ask(batch: list[Stream], keys: Iterable[Hashable], now: float, *, alone: bool) -> list[Hashable]:
        refused = []
        for key in keys:
            stream = named[str(key)]
            if not turns.joins(stream.turn, [other.turn for other in batch], alone=alone):
                refused.append(key)
            elif stream.wants(now):
                batch.append(stream)
        return refused

    while now < seconds:
        batch: list[Stream] = []
        refused = ask(batch, turns.order([stream.turn for stream in streams], now), now, alone=False)
        if all(stream.fps is None for stream in batch):
            ask(batch, refused, now, alone=True)
        now += sum(stream.seconds for stream in batch) or 0.005
        for stream in batch:
            stream.tracked += 1
            turns.tracked(stream.turn, stream.seconds, now)


RUNS = pytest.mark.parametrize("run", [run, run_together])


@RUNS
def test_a_promise_is_kept_beside_many_without(run: Callable[..., None]) -> None:
    promised = Stream("promised", 1.0, 0.6)
    others = [Stream(f"other-{i}", None, 0.6) for i in range(7)]
    run([*others, promised], 40.0)
    assert promised.tracked >= 39
    counts = [stream.tracked for stream in others]
    assert sum(counts) >= (40 - 40 * 0.6) / 0.6 - 2  # all that is left is used,
    assert max(counts) - min(counts) <= 1  # in turn


@RUNS
@pytest.mark.parametrize("slow", [0.05, 0.5, 1.5])
def test_promises_of_different_rates_are_all_kept(slow: float, run: Callable[..., None]) -> None:
    """Together they take 80 %; frames of a stream without a guarantee delay them repeatedly."""
    streams = [
        Stream("a", 10.0, 0.02),
        Stream("b", 2.0, 0.15),
        Stream("c", 0.5, 0.6),
        Stream("slow", None, slow),
    ]
    run(streams, 60.0)
    for stream in streams[:3]:
        assert stream.fps is not None
        assert 0.95 * 60 * stream.fps <= stream.tracked <= 60 * stream.fps + 2, stream.name
    assert streams[3].tracked * slow >= 60 * 0.1  # it has what is left


@RUNS
def test_nobody_starves_where_promises_turn_out_too_dear(run: Callable[..., None]) -> None:
    """They would take 150 % of the time: it is shared, and a tenth is left for the other streams."""
    streams = [
        Stream("a", 5.0, 0.2),
        Stream("b", 2.5, 0.2),
        Stream("rest", None, 0.2),
        Stream("more", None, 0.2),
    ]
    run(streams, 100.0)
    time = {stream.name: stream.tracked * 0.2 for stream in streams}
    assert time["rest"] + time["more"] == pytest.approx(10.0, abs=1.0)
    assert abs(streams[2].tracked - streams[3].tracked) <= 1
    assert time["a"] > 30
    assert time["b"] > 30


def test_one_stream_alone_has_all_the_time() -> None:
    only = Stream("only", None, 0.1)
    run([only], 10.0)
    assert only.tracked >= 99


def test_streams_without_promises_all_join() -> None:
    turns = Turns(0.9)
    batch = [Turn(name, None, 0.1) for name in ("a", "b", "c")]
    turns.order(batch, 0.0)
    assert not turns.joins(batch[2], batch[:2])  # not before the promised ones were asked
    assert turns.joins(batch[2], batch[:2], alone=True)


def test_no_batch_takes_longer_than_the_shortest_promised_gap() -> None:
    turns = Turns(0.9)
    streams = [Turn("a", 10.0, 0.04), Turn("b", 10.0, 0.05), Turn("c", 5.0, 0.02)]
    turns.order(streams, 0.0)
    assert turns.joins(streams[1], streams[:1])
    assert not turns.joins(streams[2], streams[:2])


def test_streams_that_left_are_forgotten() -> None:
    turns = Turns(0.9)
    old, new, rest = Turn("old", 1.0), Turn("new", 1.0), Turn("rest")
    assert turns.order([rest, old], 0.0) == ["old", "rest"]
    turns.tracked(old, 0.1, 0.0)
    assert turns.order([old, new], 0.0) == ["new", "old"]
    turns.order([rest], 0.0)
    assert turns.order([old, new], 0.0) == ["old", "new"]
