from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduler_world import LOST, Film, World, name_of

from jobs.scheduling.actions import Close, CloseWorker, Open, Release, SchedulerOptions, Track
from jobs.scheduling.scheduler import Scheduler
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import UsageError
from pipeline.distributed.messages import ChunkReport, StreamSpec, StreamStatus
from pipeline.storage.failures import Failure

OPTIONS = SchedulerOptions(chunk_frames=10, quantum=3)


def films_of(source: random.Random, count: int, *, faults: bool) -> list[Film]:
    films = []
    for i in range(count):
        film = Film(
            f"v{i}",
            chunks=source.choice([1, 2, 3, 8, 20]),
            priority=source.choice([0.1, 1.0, 1.0, 7.5]),
            state_bytes=source.randint(1, 60),
            workspace_bytes=source.randint(0, 20),
        )
        fault = source.random() if faults else 1.0
        if fault < 0.12:
            film.kills_at = source.randrange(film.chunks)
        elif fault < 0.24:
            film.fails_at = source.randrange(film.chunks)
            film.permanent = source.random() < 0.3
        elif fault < 0.3:
            film.bad = Failure("SourceError", "no video", source.random() < 0.5)
        elif fault < 0.4:
            film.flaky = {source.randrange(film.chunks): source.randint(1, 3)}
        films.append(film)
    return films


def expected(film: Film, options: SchedulerOptions) -> str:
    if film.bad is not None:
        return "failed" if film.bad.permanent else "quarantined"
    if film.fails_at is not None:
        return "failed" if film.permanent else "quarantined"
    if film.kills_at is not None or max(film.flaky.values(), default=0) >= options.max_tries:
        return "quarantined"
    return "finished"


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**9),
    count=st.integers(1, 14),
    workers=st.integers(1, 4),
    streams=st.integers(1, 4),
    depth=st.integers(1, 3),
    quantum=st.integers(1, 5),
    lag=st.booleans(),
    accidents=st.integers(0, 12),
    together=st.booleans(),
)
def test_every_video_ends_as_it_deserves(
    seed: int,
    count: int,
    workers: int,
    streams: int,
    depth: int,
    quantum: int,
    lag: bool,
    accidents: int,
    together: bool,
) -> None:
    """Crashing and failing videos, and lost machines: all good videos finish, and no others."""
    source = random.Random(seed)
    options = SchedulerOptions(
        chunk_frames=10,
        max_streams=streams,
        depth=depth,
        quantum=quantum,
        guess_bytes=source.choice([1, 20, 500]),
        together=together,
    )
    films = films_of(source, count, faults=True)
    world = World(films, options, workers, budget=80, seed=seed, lag=lag)
    while not world.scheduler.done:
        if accidents and source.random() < 0.05:
            accidents -= 1
            number = source.choice(list(world.machines))
            world.crash(number, blame=False)
        assert world.step(), world.scheduler.progress()
        assert len(world.tracked) < 20_000
    states = world.states()
    assert states == {f.name: expected(f, options) for f in films}
    for film in films:
        result = world.scheduler.result(film.name)
        assert result is not None
        if result.state == "finished":
            assert (result.frames, result.rows, result.cause) == (film.chunks * 10, film.chunks * 10, None)
        else:
            assert result.cause is not None
            assert film.committed // 10 <= min(
                n for n in (film.kills_at, film.fails_at, film.chunks) if n is not None
            )
    # Nothing is left over.
    assert not world.scheduler.running()
    assert all(not m.streams for m in world.machines.values())


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), workers=st.integers(1, 3), streams=st.integers(1, 4))
def test_blamed_crashes_out_of_nowhere_still_let_everything_end(
    seed: int, workers: int, streams: int
) -> None:
    source = random.Random(seed)
    options = SchedulerOptions(chunk_frames=10, max_streams=streams, quantum=2)
    world = World(films_of(source, 8, faults=True), options, workers, budget=80, seed=seed, lag=True)
    for _ in range(100_000):
        if world.scheduler.done:
            break
        if source.random() < 0.03 and world.machines:
            world.crash(source.choice(list(world.machines)), restart=source.random() < 0.8)
        if not world.machines or source.random() < 0.01:
            world.boot(80)
        world.step()
    assert world.scheduler.done
    assert len(world.states()) == 8


def test_chunks_are_tracked_in_order_and_once_without_accidents() -> None:
    films = [Film(f"v{i}", chunks=7) for i in range(5)]
    world = World(films, OPTIONS, workers=2)
    world.run()
    for film in films:
        assert [first for name, first in world.tracked if name == film.name] == list(range(0, 70, 10))
    assert set(world.states().values()) == {"finished"}


def test_a_stream_stays_where_it_is_while_nobody_waits() -> None:
    world = World([Film("a", 50), Film("b", 50)], OPTIONS, workers=1)
    world.run()
    assert world.opened == ["a", "b"]
    assert world.released == []


def test_a_worker_always_has_the_next_call() -> None:
    world = World([Film("a", 5), Film("b", 5)], OPTIONS)
    for _ in range(6):
        world.ask()
        assert [name_of(c) for c in world.machines[1].calls] in (["a", "b"], ["b", "a"])
        world.complete(1)


# --- fairness -----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**9), longs=st.integers(1, 6), shorts=st.integers(1, 30), workers=st.integers(1, 3)
)
def test_long_videos_do_not_starve_short_ones(seed: int, longs: int, shorts: int, workers: int) -> None:
    films = [Film(f"long{i}", 300) for i in range(longs)] + [Film(f"short{i}", 2) for i in range(shorts)]
    world = World(films, OPTIONS, workers, seed=seed)
    begun: list[str] = []
    for _ in range(100_000):
        if len(begun) == len(films):
            break
        before = len(world.opened)
        world.step()
        begun += [name for name in world.opened[before:] if name not in begun]
    # Each place is free for the next one after a quantum, and every fourth at least is for the fresh.
    places = workers * OPTIONS.max_streams
    assert len(world.tracked) <= OPTIONS.quantum * (4 * len(films) + 2 * places)
    assert sorted(begun) == sorted(f.name for f in films)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**9), workers=st.integers(1, 3))
def test_short_videos_do_not_starve_a_long_one(seed: int, workers: int) -> None:
    """However many new videos are waiting, the long one gets every second free place."""
    world = World(
        [Film("long", 60)] + [Film(f"short{i}", 4) for i in range(1000)], OPTIONS, workers, seed=seed
    )
    while world.scheduler.result("long") is None:
        world.step()
    # 60 chunks are 20 quanta. Between two of them, as many others as there are places get one, twice.
    places = workers * OPTIONS.max_streams
    assert len(world.tracked) <= 20 * OPTIONS.quantum * (2 * places + 2)
    assert sum(s == "finished" for s in world.states().values()) < 500


def test_a_crowd_of_long_videos_leaves_places_for_fresh_ones() -> None:
    films = [Film(f"long{i}", 300) for i in range(40)] + [Film(f"short{i}", 2) for i in range(10)]
    world = World(films, OPTIONS)
    while len(world.states()) < 10:
        world.step()
    assert set(world.states()) == {f"short{i}" for i in range(10)}
    assert len(world.tracked) <= 50 * OPTIONS.quantum * 4 + 10


def test_priority_is_a_share_of_the_work() -> None:
    films = [Film(f"heavy{i}", 10_000, priority=3.0) for i in range(4)]
    films += [Film(f"light{i}", 10_000, priority=1.0) for i in range(4)]
    world = World(films, SchedulerOptions(chunk_frames=10, max_streams=1, quantum=2), workers=1)
    while len(world.tracked) < 4000:
        world.step()
    counts = Counter(name[:5] for name, _ in world.tracked)
    assert 2.8 < counts["heavy"] / counts["light"] < 3.2
    # And among equals it is equal.
    assert max(Counter(n for n, _ in world.tracked).values()) < 3.5 * min(
        Counter(n for n, _ in world.tracked).values()
    )


@pytest.mark.parametrize(("depth", "together"), [(1, False), (4, True)])
def test_streams_of_one_worker_take_turns_by_their_weight(depth: int, together: bool) -> None:
    films = [Film("heavy", 10_000, priority=2.0), *(Film(f"light{i}", 10_000) for i in range(3))]
    options = SchedulerOptions(chunk_frames=10, max_streams=4, depth=depth, together=together)
    world = World(films, options, workers=1)
    while len(world.tracked) < 1000:
        world.step()
    counts = Counter(name for name, _ in world.tracked)
    assert counts["heavy"] == pytest.approx(400, abs=5)
    assert counts["light1"] == pytest.approx(200, abs=5)


def test_streams_that_are_tracked_together_stay_together() -> None:
    """Also those that were opened one after another, and after one of them has ended."""
    films = [Film(f"film{i}", 40) for i in range(3)] + [Film("short", 20)]
    world = World(films, SchedulerOptions(chunk_frames=10, max_streams=4, depth=4, together=True))
    batches = []
    while not world.scheduler.done:
        asked = [action for action in world.ask() if isinstance(action, Track)]
        if asked:
            batches.append(len(asked))
        if not world.scheduler.done:
            world.step()
    assert sum(batches) == 3 * 40 + 20
    assert batches.count(4) >= 15
    assert batches.count(3) >= 15


def test_a_low_priority_is_no_exclusion() -> None:
    films = [Film("low", 2, priority=1e-9), *(Film(f"v{i}", 2, priority=10.0) for i in range(50))]
    world = World(films, OPTIONS)
    world.run()
    assert world.states()["low"] == "finished"


# --- memory ---------------------------------------------------------------------------------------


def test_a_stream_that_does_not_fit_waits_closed_until_it_does() -> None:
    options = SchedulerOptions(chunk_frames=10, guess_bytes=1)
    world = World([Film("a", 4, state_bytes=70), Film("b", 4, state_bytes=60)], options, budget=100)
    world.run()
    assert world.states() == {"a": "finished", "b": "finished"}
    assert world.opened == ["a", "b", "b"]
    # One after the other, as the second would not have fitted.
    assert [name for name, _ in world.tracked] == ["a"] * 4 + ["b"] * 4


def test_workspace_counts_once_and_states_add_up() -> None:
    options = SchedulerOptions(chunk_frames=10, max_streams=3, guess_bytes=1)
    fitting = [Film(f"v{i}", 4, state_bytes=20, workspace_bytes=40) for i in range(3)]
    world = World(fitting, options, budget=100)
    world.run()
    assert Counter(world.opened) == {"v0": 1, "v1": 1, "v2": 1}


def test_a_stream_too_big_for_an_empty_worker_fails_with_the_numbers() -> None:
    world = World([Film("big", state_bytes=70, workspace_bytes=31), Film("ok")], OPTIONS, budget=100)
    world.run()
    result = world.scheduler.result("big")
    assert result is not None
    assert (result.state, result.tries, result.frames) == ("failed", 1, 0)
    assert result.cause is not None
    assert "101 bytes" in result.cause.message
    assert "100 for streams" in result.cause.message
    assert world.states()["ok"] == "finished"


def test_a_big_stream_is_not_starved_by_small_ones() -> None:
    options = SchedulerOptions(chunk_frames=10, max_streams=4, quantum=2, guess_bytes=10)
    films = [Film("big", 3, state_bytes=90), *(Film(f"s{i}", 5, state_bytes=30) for i in range(200))]
    world = World(films, options, budget=100)
    world.run()
    ended = [r.stream_id for r in world.scheduler.results()]
    assert ended.index("big") < 40


def test_the_larger_worker_gets_what_only_fits_there() -> None:
    world = World([Film(f"v{i}", 3, state_bytes=80) for i in range(4)], OPTIONS, workers=1, budget=50)
    world.boot(100)
    world.run()
    assert set(world.states().values()) == {"finished"}


def test_too_big_for_those_that_are_left_is_not_for_ever() -> None:
    """The large worker is lost: the video is delayed, and ends on the next large worker."""
    options = SchedulerOptions(chunk_frames=10, quantum=1)
    world = World([Film("big", 5, state_bytes=80), Film("s", 40)], options, workers=1, budget=100)
    while not any(name == "big" for name, _ in world.tracked):
        world.step()
    world.crash(1, blame=False, restart=False)
    world.boot(50)
    while world.now < 40:
        world.step()
    assert world.scheduler.result("big") is None
    world.boot(100)
    world.run()
    assert world.states() == {"big": "finished", "s": "finished"}


# --- failures --------------------------------------------------------------------------------------


def test_a_failure_is_tried_again_later_each_time_until_it_is_given_up() -> None:
    options = SchedulerOptions(chunk_frames=10, backoff_seconds=1.0, jitter=0.5, max_tries=4)
    world = World([Film("bad", 5, fails_at=2)], options)
    at = []
    while world.scheduler.result("bad") is None:
        before = len(world.tracked)
        world.step()
        at += [world.now for name, first in world.tracked[before:] if first == 20]
    waits = [b - a for a, b in pairwise(at)]
    assert len(waits) == 3
    for wait, least in zip(waits, (1.0, 2.0, 4.0), strict=True):
        assert least <= wait <= least * 1.5
    result = world.scheduler.result("bad")
    assert result is not None
    assert (result.state, result.tries, result.frames) == ("quarantined", 4, 20)
    assert result.cause == Failure("SourceError", "bad is broken at 2", False)


def test_progress_gives_all_tries_back() -> None:
    world = World([Film("flaky", 6, flaky={1: 3, 3: 3, 5: 3})], OPTIONS)
    world.run()
    result = world.scheduler.result("flaky")
    assert result is not None
    assert (result.state, result.tries, result.cause) == ("finished", 10, None)


def test_a_permanent_failure_is_not_tried_again() -> None:
    world = World(
        [Film("a", fails_at=1, permanent=True), Film("b", bad=Failure("UsageError", "no", True))], OPTIONS
    )
    world.run()
    assert world.states() == {"a": "failed", "b": "failed"}
    assert Counter(world.opened) == {"a": 1, "b": 1}


def test_a_retry_goes_to_another_worker_if_there_is_one() -> None:
    world = World([Film("a", flaky={0: 1})], OPTIONS, workers=2)
    world.ask()
    (first,) = [n for n, m in world.machines.items() if m.calls]
    while len(world.opened) < 2:
        world.step()
    (second,) = [n for n, m in world.machines.items() if "a" in m.streams]
    assert second != first


def test_only_a_crash_while_alone_counts() -> None:
    films = [Film("killer", 9, kills_at=3), *(Film(f"v{i}", 9) for i in range(5))]
    world = World(films, SchedulerOptions(chunk_frames=10, max_streams=3), workers=2, lag=True)
    world.run()
    states = world.states()
    assert states.pop("killer") == "quarantined"
    assert set(states.values()) == {"finished"}
    # Once in company; then alone, as often as a video may be tried.
    assert len(world.killers[0]) > 1
    assert world.killers[1:] == [("killer",)] * 4
    assert all(world.scheduler.result(f.name).tries == 1 for f in films[1:])  # type: ignore[union-attr]
    assert world.scheduler.result("killer").cause == LOST  # type: ignore[union-attr]


def test_two_killers_are_told_from_their_neighbours() -> None:
    films = [Film(f"v{i}", 12, kills_at=1 if i in (2, 3) else None) for i in range(6)]
    world = World(films, SchedulerOptions(chunk_frames=10, max_streams=6), workers=1, lag=True)
    world.run()
    assert {n for n, s in world.states().items() if s == "quarantined"} == {"v2", "v3"}
    assert sum(s == "finished" for s in world.states().values()) == 4


def test_a_machine_that_goes_away_is_nobodys_fault() -> None:
    world = World([Film("a", 30)], OPTIONS)
    for _ in range(20):
        world.step()
        world.crash(next(iter(world.machines)), blame=False)
    world.run()
    result = world.scheduler.result("a")
    assert result is not None
    assert (result.state, result.tries) == ("finished", 1)


def test_a_machine_that_is_found_to_have_gone_was_nobodys_fault_either() -> None:
    """Blame is withdrawn, from streams that were together and from the one that was alone."""
    for count in (1, 2):
        films = [Film(f"v{i}", 30) for i in range(count)]
        world = World(films, SchedulerOptions(chunk_frames=10, max_tries=2))
        for i in range(20):
            world.ask()
            while not any(isinstance(c, Track) for m in world.machines.values() for c in m.calls):
                assert not world.scheduler.done
                world.step()
                world.ask()
            (lost,) = world.machines
            world.crash(lost)
            if i % 3:
                world.step()
            world.scheduler.absolve(lost)
        world.run()
        assert set(world.states().values()) == {"finished"}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), workers=st.integers(1, 3), accidents=st.integers(0, 20))
def test_blame_that_is_taken_back_harms_nobody(seed: int, workers: int, accidents: int) -> None:
    source = random.Random(seed)
    films = films_of(source, 8, faults=True)
    world = World(films, OPTIONS, workers, budget=80, seed=seed, lag=True)
    lost: list[int] = []
    while not world.scheduler.done:
        if accidents and source.random() < 0.1:
            accidents -= 1
            lost.append(source.choice(list(world.machines)))
            world.crash(lost[-1])
        elif lost and source.random() < 0.7:
            world.scheduler.absolve(lost.pop())
        world.step()
    assert all(not m.streams for m in world.machines.values())
    innocents = {f.name for f in films if expected(f, OPTIONS) == "finished"}
    ended = Counter(world.states().values())
    assert ended.total() == 8
    assert {n for n, s in world.states().items() if s == "finished"} <= innocents


def test_other_videos_go_on_while_a_suspect_waits_for_its_next_try() -> None:
    options = SchedulerOptions(chunk_frames=10, backoff_seconds=1000.0, max_backoff_seconds=1e6)
    world = World([Film("killer", kills_at=0), *(Film(f"v{i}", 5) for i in range(10))], options)
    while sum(s == "finished" for s in world.states().values()) < 10:
        assert world.step()
    assert world.now < 1500
    assert world.scheduler.result("killer") is None


def test_own_late_commit_is_no_other_writer_but_another_writer_is() -> None:
    world = World([Film("a", 3)], OPTIONS)
    theirs = Failure("AnotherWriterError", "somebody else", True)
    world.ask()
    world.complete(1)
    world.ask()
    world.crash(1, blame=False)
    for _ in range(2):
        while not any(m.calls for m in world.machines.values()):
            world.now = world.scheduler.wakeup() or world.now
            world.ask()
        call = world.machines[2].calls.popleft()
        assert isinstance(call, Open)
        world.scheduler.opened(call.call, StreamStatus("a", failure=theirs), world.now)
    result = world.scheduler.result("a")
    assert result is not None
    assert (result.state, result.tries, result.cause) == ("failed", 2, theirs)


# --- answers that do no harm, or come too late --------------------------------------------------------


def one_open() -> tuple[Scheduler, Track]:
    scheduler = Scheduler(OPTIONS)
    scheduler.add(VideoJob(StreamSpec("a", "a.mp4")))
    scheduler.worker_ready(1)
    (opening,) = scheduler.actions(0.0)
    assert isinstance(opening, Open)
    scheduler.opened(opening.call, StreamStatus("a", next_frame=13), 0.0)
    (track,) = scheduler.actions(0.0)
    assert isinstance(track, Track)
    return scheduler, track


def test_chunks_end_at_multiples_of_their_size() -> None:
    _, track = one_open()
    assert (track.ref.first, track.ref.last) == (13, 19)


def test_a_refusal_puts_the_position_right() -> None:
    scheduler, track = one_open()
    scheduler.reported(track.call, ChunkReport("a", "refused", next_frame=30), 0.0)
    (again,) = scheduler.actions(0.0)
    assert isinstance(again, Track)
    assert (again.ref.first, again.ref.last) == (30, 39)


def test_an_unknown_stream_is_opened_again_where_it_was() -> None:
    scheduler, track = one_open()
    scheduler.reported(track.call, ChunkReport("a", "unknown"), 0.0)
    (opening,) = scheduler.actions(0.0)
    assert isinstance(opening, Open)
    assert opening.worker == 1
    scheduler.opened(opening.call, StreamStatus("a", next_frame=10), 0.0)
    (again,) = scheduler.actions(0.0)
    assert isinstance(again, Track)
    assert again.ref.first == 10
    assert scheduler.result("a") is None


@pytest.mark.parametrize("outcome", ["refused", "unknown", "tracked"])
def test_a_worker_that_only_refuses_does_not_keep_a_video_for_ever(outcome: str) -> None:
    scheduler, action = one_open()
    for now in range(1000):
        answer(scheduler, action, outcome, float(now) * 60)
        actions = scheduler.actions(now * 60 + 59.0)
        if scheduler.done:
            break
        if not actions:
            actions = scheduler.actions(now * 60 + 59.9)
        if actions:
            (action,) = actions  # type: ignore[assignment]
    result = scheduler.result("a")
    assert result is not None
    assert result.state == "quarantined"
    assert result.cause is not None
    assert outcome in result.cause.message


def answer(scheduler: Scheduler, action: object, outcome: str, now: float) -> None:
    if isinstance(action, Open):
        scheduler.opened(action.call, StreamStatus("a", next_frame=13), now)
    elif isinstance(action, Track):
        scheduler.reported(action.call, ChunkReport("a", outcome, next_frame=action.ref.first), now)  # type: ignore[arg-type]
    else:
        assert isinstance(action, Close)
        scheduler.released(action.call, now)


def test_answers_of_a_lost_worker_are_not_listened_to() -> None:
    scheduler, track = one_open()
    scheduler.worker_lost(1, LOST, 0.0, blame=False)
    scheduler.reported(track.call, ChunkReport("a", "finished", next_frame=99), 0.0)
    scheduler.released(track.call, 0.0)
    scheduler.call_failed(track.call, LOST, 0.0)
    scheduler.worker_lost(1, LOST, 0.0)
    scheduler.worker_ready(2)
    (opening,) = scheduler.actions(0.0)
    assert isinstance(opening, Open)
    assert opening.worker == 2


def test_a_stream_is_started_over_once() -> None:
    scheduler = Scheduler(OPTIONS)
    scheduler.add(VideoJob(StreamSpec("a", "a.mp4", restart=True)))
    scheduler.worker_ready(1)
    (opening,) = scheduler.actions(0.0)
    assert isinstance(opening, Open)
    assert opening.spec.restart
    scheduler.opened(opening.call, StreamStatus("a"), 0.0)
    scheduler.worker_lost(1, LOST, 0.0, blame=False)
    scheduler.worker_ready(2)
    (opening,) = scheduler.actions(0.0)
    assert isinstance(opening, Open)
    assert not opening.spec.restart


def test_a_call_that_raised_closes_the_stream_and_counts() -> None:
    scheduler, track = one_open()
    scheduler.call_failed(track.call, Failure("KeyError", "KeyError: 'x'", False), 0.0)
    (close,) = scheduler.actions(0.0)
    assert isinstance(close, Close)
    scheduler.call_failed(close.call, Failure("OSError", "OSError: closing too", False), 0.0)
    assert scheduler.actions(0.0) == []
    assert scheduler.wakeup() is not None
    (opening,) = scheduler.actions(2.0)
    assert isinstance(opening, Open)


# --- the user ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(0, 30, 3))
def test_cancelled_videos_end_where_they_stand(steps: int) -> None:
    world = World([Film(f"v{i}", 20) for i in range(6)], OPTIONS, workers=1)
    for _ in range(steps):
        world.step()
    assert world.scheduler.cancel("v1")
    assert world.scheduler.cancel("v5")
    assert not world.scheduler.cancel("nobody")
    world.run()
    states = world.states()
    assert {n for n, s in states.items() if s == "cancelled"} == {"v1", "v5"}
    assert sum(s == "finished" for s in states.values()) == 4
    result = world.scheduler.result("v1")
    assert result is not None
    assert result.frames == world.films["v1"].committed < 200
    assert not world.scheduler.cancel("v1")


def test_cancel_all() -> None:
    world = World([Film(f"v{i}", 20) for i in range(6)], OPTIONS)
    for _ in range(10):
        world.step()
    assert world.scheduler.cancel()
    world.run()
    assert set(world.states().values()) == {"cancelled"}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), steps=st.integers(0, 200))
def test_drained_streams_are_in_the_store_and_go_on_another_time(seed: int, steps: int) -> None:
    source = random.Random(seed)
    films = films_of(source, 8, faults=True)
    world = World(films, OPTIONS, workers=2, budget=80, seed=seed)
    for _ in range(steps):
        world.step()
    world.scheduler.drain()
    tracked = len(world.tracked)
    world.ask()
    in_flight = sum(isinstance(c, Track) for m in world.machines.values() for c in m.calls)
    world.run()
    assert len(world.tracked) <= tracked + in_flight
    pending = {r.stream_id: r.frames for r in world.scheduler.results() if r.state == "pending"}
    assert all(world.films[name].committed >= frames for name, frames in pending.items())
    assert all(not m.streams for m in world.machines.values())
    # The next run does the rest.
    again = World([f for f in films if f.name in pending], OPTIONS, workers=2, budget=80)
    again.run()
    assert again.states() == {name: expected(world.films[name], OPTIONS) for name in pending}


def test_a_video_comes_once() -> None:
    scheduler = Scheduler(OPTIONS)
    scheduler.add(VideoJob(StreamSpec("a", "a.mp4")))
    with pytest.raises(UsageError, match="'a' appears twice"):
        scheduler.add(VideoJob(StreamSpec("a", "b.mp4")))
    with pytest.raises(UsageError, match="depth 0"):
        SchedulerOptions(depth=0)


def test_workers_without_work_are_given_back() -> None:
    options = SchedulerOptions(chunk_frames=10, idle_seconds=30.0)
    world = World([Film("a", 3), Film("b", 200)], options, workers=3)
    for _ in range(20):
        world.step()
    assert world.closed_workers == []
    world.now += 100
    actions = world.ask()
    assert sum(isinstance(a, CloseWorker) for a in actions) == 2
    world.run()
    assert len(world.machines) == 1


def test_progress_adds_up() -> None:
    world = World(
        [Film(f"v{i}", 4, fails_at=1 if i == 0 else None, permanent=True) for i in range(9)], OPTIONS
    )
    for _ in range(20):
        world.step()
    progress = world.scheduler.progress()
    ended = progress.finished + progress.failed
    assert progress.videos == 9 == ended + progress.running + progress.waiting
    assert progress.running == 2 == len(world.scheduler.running())
    world.run()
    progress = world.scheduler.progress()
    assert (progress.finished, progress.failed, progress.waiting) == (8, 1, 0)
    assert progress.frames == 8 * 40 + 10
    assert progress.rows == 8 * 40 + 10


def test_releases_are_few() -> None:
    """Streams are released only for waiting ones: at most one release per quantum and place."""
    world = World([Film(f"v{i}", 30) for i in range(7)], OPTIONS, workers=2)
    world.run()
    assert 0 < len(world.released) <= 7 * 30 / OPTIONS.quantum


def test_a_fault_of_the_output_stops_everything_and_nobody_is_to_blame() -> None:
    full = Failure("OutputError", "No space left on device", False, output=True)
    scheduler = Scheduler(SchedulerOptions(chunk_frames=10, max_streams=2, depth=2, max_tries=1))
    for i in range(5):
        scheduler.add(VideoJob(StreamSpec(f"v{i}", f"mem://v{i}")))
    scheduler.worker_ready(1)
    first, second = scheduler.actions(0.0)
    for action in (first, second):
        assert isinstance(action, Open)
        scheduler.opened(action.call, StreamStatus(action.spec.stream_id, frame_count=100), 1.0)
    one, other = scheduler.actions(2.0)
    assert isinstance(one, Track)
    scheduler.reported(one.call, ChunkReport("v0", "failed", next_frame=20, rows=40, failure=full), 3.0)
    assert scheduler.fault == full
    # What is under way ends as it does; nothing else is begun.
    assert isinstance(other, Track)
    scheduler.reported(other.call, ChunkReport("v1", "tracked", next_frame=10, frames=10, rows=20), 4.0)
    (release,) = scheduler.actions(5.0)
    assert isinstance(release, Release)
    scheduler.released(release.call, 6.0)
    assert scheduler.done
    results = {r.stream_id: r for r in scheduler.results()}
    assert {r.state for r in results.values()} == {"pending"}
    assert (results["v0"].frames, results["v0"].rows, results["v0"].cause) == (20, 40, full)
    assert (results["v1"].frames, results["v1"].rows, results["v1"].cause) == (10, 20, None)
