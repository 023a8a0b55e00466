"""Simulated workers, streams and store for scheduler tests, in plain dictionaries.

It checks the scheduler's invariants at every step: one worker per stream, chunks in order, and the limits of
calls, streams and bytes per worker.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from jobs.scheduling.actions import Action, Call, Close, CloseWorker, Open, Release, SchedulerOptions, Track
from jobs.scheduling.scheduler import Scheduler
from jobs.scheduling.video_job import VideoJob
from pipeline.distributed.messages import ChunkReport, StreamSpec, StreamStatus
from pipeline.storage.failures import Failure

LOST = Failure("WorkerLost", "the worker process died", False)


@dataclass
class Film:
    """A simulated video.

    Args:
        chunks: number of chunks.
        kills_at: the chunk during which it kills its worker, every time. fails_at: or only fails.
        flaky: chunk -> number of failures before it succeeds.
        bad: failure of every attempt to open it.
    """

    name: str
    chunks: int = 3
    priority: float = 1.0
    state_bytes: int = 1
    workspace_bytes: int = 0
    kills_at: int | None = None
    fails_at: int | None = None
    permanent: bool = False
    flaky: dict[int, int] = field(default_factory=dict)
    bad: Failure | None = None
    committed: int = 0

    def job(self) -> VideoJob:
        return VideoJob(StreamSpec(self.name, f"mem://{self.name}.mp4"), self.priority)


@dataclass
class Machine:
    budget: int | None
    calls: deque[Call] = field(default_factory=deque)
    streams: dict[str, int] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)


class World:
    """Executes a scheduler's actions, one call at a time.

    Args:
        lag: a chunk's rows are committed only when the next one is tracked.
    """

    def __init__(
        self,
        films: list[Film],
        options: SchedulerOptions,
        workers: int = 1,
        budget: int | None = None,
        *,
        seed: int = 0,
        lag: bool = False,
    ) -> None:
        self.options = options
        self.size = options.chunk_frames
        self.scheduler = Scheduler(options)
        self.films = {f.name: f for f in films}
        self.random = random.Random(seed)
        self.machines: dict[int, Machine] = {}
        self.now = 0.0
        self.lag = lag
        self.numbers = 0
        self.crashes = 0
        self.tracked: list[tuple[str, int]] = []  # stream, first: every chunk whose tracking was begun
        self.opened: list[str] = []
        self.released: list[str] = []
        self.closed_workers: list[int] = []
        self.killers: list[tuple[str, ...]] = []  # streams open on a worker when it was killed by a film
        for film in films:
            self.scheduler.add(film.job())
        for _ in range(workers):
            self.boot(budget)

    def boot(self, budget: int | None = None) -> int:
        self.numbers += 1
        self.machines[self.numbers] = Machine(budget)
        self.scheduler.worker_ready(self.numbers, budget)
        return self.numbers

    # --- what the scheduler asks for -------------------------------------------------------------

    def ask(self) -> list[Action]:
        actions = self.scheduler.actions(self.now)
        for action in actions:
            if isinstance(action, CloseWorker):
                machine = self.machines.pop(action.worker)
                assert not machine.streams
                assert not machine.calls
                self.closed_workers.append(action.worker)
                continue
            machine = self.machines[action.worker]
            if self.options.together and isinstance(action, Track):
                earlier = [c for c in machine.calls if isinstance(c, Track) and c not in actions]
                assert not earlier, "a chunk was asked for before those under way were done"
            machine.calls.append(action)
            assert len(machine.calls) <= self.options.depth
            names = [name_of(c) for m in self.machines.values() for c in m.calls]
            assert len(names) == len(set(names)), "two calls of one stream"
        return actions

    def crash(self, number: int, *, blame: bool = True, restart: bool = True) -> None:
        budget = self.machines.pop(number).budget
        self.crashes += 1
        self.scheduler.worker_lost(number, LOST, self.now, blame=blame)
        if restart:
            self.boot(budget)

    def complete(self, number: int) -> None:
        """Execute and complete the first call of a worker."""
        machine = self.machines[number]
        action = machine.calls.popleft()
        film = self.films[name_of(action)]
        if isinstance(action, Open):
            self.scheduler.opened(action.call, self.open(machine, film), self.now)
        elif isinstance(action, Track):
            report = self.track(number, machine, film, action)
            if report is not None:
                self.scheduler.reported(action.call, report, self.now)
        else:
            position = machine.streams.pop(film.name, None)
            machine.tracked.discard(film.name)
            if isinstance(action, Release):
                self.released.append(film.name)
            if position is not None:
                film.committed = max(film.committed, position)
            self.scheduler.released(action.call, self.now)

    def open(self, machine: Machine, film: Film) -> StreamStatus:
        self.opened.append(film.name)
        holders = [m for m in self.machines.values() if film.name in m.streams]
        assert not holders or holders == [machine], "open on two workers"
        if film.bad is not None:
            return StreamStatus(film.name, failure=film.bad)
        position = machine.streams.setdefault(film.name, film.committed)
        assert len(machine.streams) <= self.options.max_streams
        if position >= film.chunks * self.size:
            del machine.streams[film.name]
            return StreamStatus(film.name, next_frame=position, finished=True)
        return StreamStatus(
            film.name,
            next_frame=position,
            rows=position,
            frame_count=film.chunks * self.size,
            state_bytes=film.state_bytes,
            workspace_bytes=film.workspace_bytes,
        )

    def track(self, number: int, machine: Machine, film: Film, action: Track) -> ChunkReport | None:
        ref = action.ref
        position = machine.streams.get(film.name)
        if position is None:
            return ChunkReport(film.name, "unknown")
        if ref.first != position:
            return ChunkReport(film.name, "refused", next_frame=position)
        assert (ref.last + 1) % self.size == 0
        self.tracked.append((film.name, ref.first))
        machine.tracked.add(film.name)
        self.check_memory(machine)
        chunk = ref.first // self.size
        if film.kills_at == chunk:
            self.killers.append(tuple(sorted(machine.streams)))
            self.crash(number)
            return None
        if film.fails_at == chunk or film.flaky.get(chunk, 0) > 0:
            if chunk in film.flaky:
                film.flaky[chunk] -= 1
            del machine.streams[film.name]
            machine.tracked.discard(film.name)
            failure = Failure("SourceError", f"{film.name} is broken at {chunk}", film.permanent)
            return ChunkReport(film.name, "failed", next_frame=position, rows=position, failure=failure)
        machine.streams[film.name] = ref.last + 1
        film.committed = max(film.committed, ref.first if self.lag else ref.last + 1)
        if chunk + 1 >= film.chunks:
            film.committed = ref.last + 1
            del machine.streams[film.name]
            machine.tracked.discard(film.name)
            return ChunkReport(
                film.name, "finished", next_frame=ref.last + 1, frames=self.size, rows=ref.last + 1
            )
        return ChunkReport(film.name, "tracked", next_frame=ref.last + 1, frames=self.size, rows=ref.last + 1)

    def check_memory(self, machine: Machine) -> None:
        if machine.budget is not None:
            films = [self.films[name] for name in machine.streams if name in machine.tracked]
            states = sum(f.state_bytes for f in films)
            assert states + max(f.workspace_bytes for f in films) <= machine.budget

    # --- time ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Ask for actions, then complete a call of a random worker, or let time pass.

        False if nothing can happen.
        """
        self.ask()
        busy = [n for n, m in self.machines.items() if m.calls]
        if busy:
            self.complete(self.random.choice(busy))
            return True
        wakeup = self.scheduler.wakeup()
        if wakeup is None:
            return False
        self.now = max(self.now, wakeup)
        return True

    def run(self, limit: int = 100_000) -> None:
        """Run until all videos have ended; AssertionError if stuck or after more than `limit` steps."""
        for _ in range(limit):
            if self.scheduler.done:
                return
            assert self.step(), f"stuck with {self.scheduler.progress()}"
        raise AssertionError(f"no end after {limit} steps: {self.scheduler.progress()}")

    def states(self) -> dict[str, str]:
        return {r.stream_id: r.state for r in self.scheduler.results()}


def name_of(action: Call) -> str:
    if isinstance(action, Open):
        return action.spec.stream_id
    if isinstance(action, Track):
        return action.ref.stream_id
    assert isinstance(action, Release | Close)
    return action.stream_id
