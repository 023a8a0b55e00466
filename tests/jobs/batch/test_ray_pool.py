from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from support.standin import CHUNK, Actor, committed, notes

from jobs.batch.ray_pool import RayPool, room_for, shortage, used
from jobs.scheduling.actions import Progress, SchedulerOptions
from jobs.scheduling.scheduler import Scheduler
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import UsageError, XmemError
from pipeline.distributed.messages import StreamSpec

pytestmark = pytest.mark.usefixtures("local_ray")

OPTIONS = SchedulerOptions(chunk_frames=CHUNK, quantum=3, backoff_seconds=0.05)


def video(name: str, **traits: object) -> VideoJob:
    query = "&".join(f"{k}={v}" for k, v in {"chunks": 3, **traits}.items())
    return VideoJob(StreamSpec(name, f"standin://?{query}"))


class Run:
    """A pool of fake trackers over some videos, whose actors the test can access."""

    def __init__(
        self,
        folder: Path,
        jobs: list[VideoJob],
        workers: int | Callable[[], int] = 2,
        options: SchedulerOptions = OPTIONS,
    ) -> None:
        self.folder = folder
        self.jobs = jobs
        self.scheduler = Scheduler(options)
        for job in jobs:
            self.scheduler.add(job)
        self.actors: list[Any] = []
        self.pids: list[int] = []
        self.chances: list[
            Callable[[], None]
        ] = []  # one is taken at every progress that finds some chunks done
        self.seen: list[Progress] = []
        self.pool = RayPool(
            self.scheduler,
            self.make,
            workers,
            budget=self.budget,
            on_progress=self.progressed,
            progress_seconds=0.0,
        )

    def make(self) -> Any:
        actor = Actor.options(num_cpus=1).remote(str(self.folder))
        self.actors.append(actor)
        return actor

    def budget(self, facts: Any) -> int:
        self.pids.append(facts["pid"])
        self.done = self.seen[-1].chunks if self.seen else 0
        return 1000

    def progressed(self, progress: Progress) -> None:
        self.seen.append(progress)
        if self.chances and progress.running and progress.chunks >= self.done + 3:
            self.done = 10**9
            self.chances.pop()()

    def kill_newest(self) -> None:
        os.kill(self.pids[-1], signal.SIGKILL)

    def states(self) -> dict[str, str]:
        return {r.stream_id: r.state for r in self.scheduler.results()}

    def assert_complete_but(self, *names: str) -> None:
        assert notes(self.folder, "twice") == []
        for job in self.jobs:
            result = self.scheduler.result(job.spec.stream_id)
            assert result is not None
            if job.spec.stream_id not in names:
                assert result.state == "finished", result
                assert result.frames == CHUNK * committed(self.folder, job.spec.stream_id) > 0


def test_all_videos_are_done_by_several_actors(tmp_path: Path) -> None:
    run = Run(tmp_path, [video(f"v{i}", chunks=2 + i, meet=2) for i in range(7)])
    run.pool.run()
    run.assert_complete_but()
    assert len(set(run.pids)) == 2
    last = run.seen[-1]
    assert (last.finished, last.running, last.waiting) == (7, 0, 0)
    assert last.chunks == sum(range(2, 9))
    assert last.frames == last.chunks * CHUNK
    # Nothing is left running.
    for pid in run.pids:
        wait_for(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def test_chunks_of_a_workers_streams_are_one_call(tmp_path: Path) -> None:
    """Also when a process is killed, and one of the videos fails again and again."""
    options = replace(OPTIONS, max_streams=3, depth=3, together=True)
    jobs = [video(f"v{i}", chunks=8, ms=10) for i in range(3)] + [video("bad", fail=2)]
    run = Run(tmp_path, jobs, workers=1, options=options)
    run.chances = [run.kill_newest]
    run.pool.run()
    run.assert_complete_but("bad")
    assert run.states()["bad"] == "quarantined"
    assert run.chances == []
    assert max(len(names.split()) for names in notes(tmp_path, "together")) == 3


def test_what_a_call_of_several_chunks_raises_counts_against_the_chunk_that_raises_alone(
    tmp_path: Path,
) -> None:
    jobs = [video(f"v{i}", chunks=4) for i in range(3)] + [video("raises", boom=1), video("z", chunks=4)]
    options = replace(OPTIONS, max_streams=5, depth=5, together=True)
    run = Run(tmp_path, jobs, workers=1, options=options)
    run.pool.run()
    run.assert_complete_but("raises")
    raised = [names for names in notes(tmp_path, "together") if "raises" in names.split()]
    assert len(raised) > 1  # the calls that raised were of several chunks
    result = run.scheduler.result("raises")
    assert result is not None
    assert (result.state, result.tries) == ("quarantined", OPTIONS.max_tries)
    others = [run.scheduler.result(name) for name in ("v0", "v1", "v2", "z")]
    assert [other.tries for other in others if other is not None] == [1, 1, 1, 1]


def test_a_call_of_several_chunks_that_raises_once_costs_nothing(tmp_path: Path) -> None:
    jobs = [video(f"v{i}", chunks=4) for i in range(2)] + [video("raises", boom=1, once=1)]
    options = replace(OPTIONS, max_streams=3, depth=3, together=True)
    run = Run(tmp_path, jobs, workers=1, options=options)
    run.pool.run()
    run.assert_complete_but()
    assert {run.scheduler.result(job.spec.stream_id).tries for job in jobs} == {1}  # type: ignore[union-attr]


def test_chunks_that_are_not_tracked_together_are_calls_of_their_own(tmp_path: Path) -> None:
    """So that what one of them raises is told of no other one."""
    jobs = [video(f"v{i}", chunks=4) for i in range(3)] + [video("raises", boom=1)]
    run = Run(tmp_path, jobs, workers=1, options=replace(OPTIONS, max_streams=4, depth=4))
    run.pool.run()
    run.assert_complete_but("raises")
    assert notes(tmp_path, "together") == []
    assert {run.scheduler.result(f"v{i}").tries for i in range(3)} == {1}  # type: ignore[union-attr]


def test_a_killed_process_loses_and_doubles_nothing(tmp_path: Path) -> None:
    # One worker: another might finish everything before the killed one is back to be killed again.
    run = Run(tmp_path, [video(f"v{i}", chunks=12, ms=10) for i in range(6)], workers=1)
    run.chances = [run.kill_newest] * 2
    run.pool.run()
    run.assert_complete_but()
    assert run.chances == []
    assert len(set(run.pids)) >= 3


def test_an_actor_that_is_dead_for_good_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, [video(f"v{i}", chunks=12, ms=10) for i in range(4)])
    run.chances = [lambda: ray.kill(run.actors[0])]
    run.pool.run()
    run.assert_complete_but()
    assert len(run.actors) == 3


def test_a_video_that_kills_its_process_is_quarantined_alone(tmp_path: Path) -> None:
    jobs = [video("killer", kill=1), *(video(f"v{i}", chunks=4) for i in range(5))]
    run = Run(tmp_path, jobs, workers=1, options=replace(OPTIONS, max_tries=2))
    run.pool.run()
    run.assert_complete_but("killer")
    result = run.scheduler.result("killer")
    assert result is not None
    assert (result.state, result.frames, result.tries) == ("quarantined", CHUNK, 2)
    assert result.cause is not None
    assert result.cause.kind == "WorkerLost"
    assert "process died" in result.cause.message


def test_failures_of_all_kinds(tmp_path: Path) -> None:
    jobs = [
        video("fails", fail=1),
        video("recovers", fail=1, once=1),
        video("raises", boom=1),
        video("raises-once", boom=1, once=1),
        video("bad", bad="permanent"),
        video("empty", bad="now"),
        video("good"),
    ]
    run = Run(tmp_path, jobs)
    run.pool.run()
    run.assert_complete_but("fails", "raises", "bad", "empty")
    states = run.states()
    assert [states[n] for n in ("fails", "raises", "bad", "empty")] == [
        "quarantined",
        "quarantined",
        "failed",
        "quarantined",
    ]
    cause = run.scheduler.result("raises").cause  # type: ignore[union-attr]
    assert cause is not None
    assert cause.kind == "KeyError"
    assert "boom at 1" in cause.message
    assert "secret" not in cause.message
    assert run.scheduler.result("raises-once").tries == 2  # type: ignore[union-attr]
    assert notes(tmp_path, "open").count("bad") == 1


def test_actors_without_room_wait_and_others_do_the_work(tmp_path: Path) -> None:
    run = Run(tmp_path, [video(f"v{i}") for i in range(8)], workers=6)
    run.pool.run()
    run.assert_complete_but()
    assert 0 < len(set(run.pids)) <= 3
    assert room_for(1) == 3
    assert room_for(2, 0) == 1
    assert room_for(1, 1) == 0


def test_what_workers_wait_for_is_said(tmp_path: Path) -> None:
    @ray.remote(num_cpus=2.5)
    class Other:
        def here(self) -> bool:
            return True

    other: Any = Other.remote()  # type: ignore[attr-defined]
    assert ray.get(other.here.remote())
    run = Run(tmp_path, [video("a"), video("b")], workers=2)
    run.pool._needs = {"CPU": 1.0, "GPU": 0.0}
    waiting: list[Progress] = []

    def progressed(progress: Progress) -> None:
        run.seen.append(progress)
        if progress.shortage and not waiting:
            waiting.append(progress)
            ray.kill(other)

    run.pool._on_progress = progressed
    run.pool.run()
    run.assert_complete_but()
    assert (waiting[0].missing, waiting[0].workers) == (2, 0)
    assert waiting[0].shortage == "no free CPUs (2.5 of 3 in use, 2.5 of them by others)"
    assert run.seen[0].shortage == waiting[0].shortage
    assert all(not seen.shortage or seen.workers < 2 for seen in run.seen)
    assert shortage({"CPU": 4.0}, 0) == "no machine of the cluster has 4 CPUs for a worker"
    assert shortage({"CPU": 1.0, "GPU": 0.5}, 0) == (
        "no machine of the cluster has 1 CPUs and 0.5 GPUs for a worker"
    )


def test_workers_that_start_are_not_taken_for_others(tmp_path: Path) -> None:
    wait_for(lambda: used()["CPU"] == 0)  # Ray takes a moment to see that the last test's actors are gone
    run = Run(tmp_path, [video(f"v{i}", meet=3) for i in range(3)], workers=3)
    run.pool._needs = {"CPU": 1.0, "GPU": 0.0}
    run.pool.run()
    run.assert_complete_but()
    assert {seen.shortage for seen in run.seen} == {""}
    assert any(seen.missing for seen in run.seen)


def test_workers_are_added_when_there_is_more_room(tmp_path: Path) -> None:
    jobs = [video(f"v{i}", chunks=4, meet=2) for i in range(3)]
    run: Run = Run(tmp_path, jobs, workers=lambda: 2 if run.pids else 1)
    run.pool.run()
    run.assert_complete_but()
    assert len(set(run.pids)) == 2


def test_drained_by_a_signal(tmp_path: Path) -> None:
    run = Run(tmp_path, [video(f"v{i}", chunks=200, ms=5) for i in range(4)], workers=1)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run.chances = [lambda: os.kill(os.getpid(), signal.SIGTERM)]
    run.pool.run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert set(run.states().values()) == {"pending"}
    opened = set(notes(tmp_path, "open"))
    assert opened == set(notes(tmp_path, "release")) | set(notes(tmp_path, "close"))
    done = sum(committed(tmp_path, f"v{i}") for i in range(4))
    assert 0 < done < 100
    assert done == sum(r.frames for r in run.scheduler.results()) / CHUNK


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, [video("slow", ms=100_000), video("waits")], workers=1)

    def twice() -> None:
        wait_for(lambda: "slow" in notes(tmp_path, "track"))
        os.kill(os.getpid(), signal.SIGINT)
        # The first one has to be seen: of two at once the second is lost.
        wait_for(lambda: run.scheduler._draining)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=twice)
    thread.start()
    run.pool.run()
    thread.join()
    assert run.states() == {"slow": "pending", "waits": "pending"}
    for pid in run.pids:
        wait_for(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def test_cancelled_while_running_and_from_another_thread(tmp_path: Path) -> None:
    run = Run(
        tmp_path, [video("a", chunks=1000, ms=5), video("b", chunks=5), video("c", chunks=1000)], workers=1
    )

    def cancel() -> None:
        wait_for(lambda: committed(tmp_path, "a") > 2)
        run.pool.cancel("a")

    thread = threading.Thread(target=cancel)
    run.pool.cancel("c")
    thread.start()
    run.pool.run()
    thread.join()
    assert run.states() == {"a": "cancelled", "b": "finished", "c": "cancelled"}
    assert notes(tmp_path, "open").count("c") == 0
    assert notes(tmp_path, "release")[-1] == "a"


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [
        ("usage", UsageError, r"^there is no model 'x'"),
        ("no GPU here", XmemError, r"no worker can start: .*no GPU here"),
    ],
)
def test_a_constructor_that_fails_is_told(
    tmp_path: Path, fails: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.batch.ray_pool._REPLACE_SECONDS", (0.01, 0.01))
    run = Run(tmp_path, [video("a")])
    monkeypatch.setattr(
        run.pool, "_make_actor", lambda: Actor.options(num_cpus=1).remote(str(tmp_path), fails=fails)
    )
    with pytest.raises(error, match=message):
        run.pool.run()
    assert run.states() == {"a": "pending"}


def test_no_workers_are_no_pool(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 workers"):
        Run(tmp_path, [], workers=0)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
