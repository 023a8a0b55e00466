"""RayPool: runs a `Scheduler`'s actions on tracker actors of a Ray cluster.

The pool makes the scheduler's calls and passes it the results; it makes no decisions about videos and keeps
no results. It manages processes: an actor that died is restarted by Ray and is a new worker to the scheduler;
an actor that is permanently dead is replaced. Actors that do not fit the cluster wait for resources.
"""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from jobs.cluster.ray_errors import brief, death
from jobs.scheduling.actions import Action, Call, CloseWorker, Open, Progress, Release, Track
from jobs.scheduling.scheduler import Scheduler
from pipeline.base.errors import UsageError, XmemError
from pipeline.base.redaction import redacted
from pipeline.storage.failures import Failure

logger = logging.getLogger(__name__)

# Maximum wait; signals and requests are checked between waits.
_NAP_SECONDS = 0.25
_PROBE_SECONDS = 0.5
_COUNT_SECONDS = 2.0
# A lost machine is noticed some time after its processes.
_DOUBT_SECONDS = 60.0
_REPLACE_SECONDS = (0.5, 30.0)
# Consecutive constructor failures, with no actor ever ready, that end the run.
_HOPELESS = 3


@dataclass(eq=False)
class _Slot:
    """One actor and its successors."""

    actor: Any = None
    number: int = 0  # the scheduler's name for the process; 0 while there is none
    instance: tuple[Any, ...] = ()  # the process of the last answer
    lost: bool = False  # that process is abandoned; its later answers are ignored
    calls: set[Any] = field(default_factory=set)
    next_try: float = 0.0
    failures: int = 0  # constructors that failed in a row


class RayPool:
    """Executes a scheduler's actions on Ray actors.

    Args:
        scheduler: scheduler with its videos.
        make_actor: returns the handle of a new actor with the methods of
            `pipeline.distributed.actors.Tracker`. It should restart for ever and never repeat a call
            (`max_restarts=-1, max_task_retries=0`).
        workers: number of actors, or a function that returns it, which is called again as machines come.
        budget: function from an actor's `facts` to bytes of device memory for its streams; None: no limit.
        first: a call that one actor answers before any actor gets a video: a function that makes the call,
            and one that takes the answer (None: no answer), whose exceptions end the run.
        on_progress: called about every `progress_seconds`, and at the end.
        name_machines: name the machine in failures due to missing credentials or permissions.
        cpus, gpus: an actor's resources; used only to explain why actors do not start.

    Raises:
        UsageError: fewer than one worker is requested.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        make_actor: Callable[[], Any],
        workers: int | Callable[[], int],
        *,
        budget: Callable[[Mapping[str, Any]], int | None] = lambda facts: None,
        first: tuple[Callable[[Any], Any], Callable[[Any], None]] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        progress_seconds: float = 0.5,
        name_machines: bool = False,
        cpus: float = 0.0,
        gpus: float = 0.0,
    ) -> None:
        if isinstance(workers, int) and workers < 1:
            raise UsageError(f"{workers} workers are not allowed: use at least 1")
        self._scheduler = scheduler
        self._make_actor = make_actor
        self._workers = workers
        self._budget = budget
        self._first = first
        self._asking: Any = None  # the call `first`
        self._held: dict[int, int | None] = {}  # workers waiting for its answer, with their budgets
        self._on_progress = on_progress
        self._progress_seconds = progress_seconds
        self._name_machines = name_machines
        self._needs = {"CPU": cpus, "GPU": gpus}
        self._slots: list[_Slot] = []
        self._wanted = 0
        # None: a call for the actor's facts.
        self._pending: dict[Any, tuple[_Slot, Call | tuple[Track, ...] | None]] = {}
        self._numbers = itertools.count(1)
        self._by_number: dict[int, _Slot] = {}
        self._requests: deque[Callable[[], Any]] = deque()
        self._doubtful: list[tuple[float, int, str]] = []  # lost workers whose machine may be lost too
        self._stopped = False
        self._ever_ready = False
        self._next_look = self._next_progress = self._next_count = 0.0
        self._shortage = ""
        self._used_before: dict[str, float] = {}

    # --- from any thread, or a signal handler ----------------------------------------------------

    def drain(self) -> None:
        """Finish the current chunks, release all streams to the store, and end."""
        self._requests.append(self._scheduler.drain)

    def cancel(self, stream_id: str | None = None) -> None:
        """Cancel a video, or all."""
        self._requests.append(lambda: self._scheduler.cancel(stream_id))

    def stop(self) -> None:
        """End at once. Committed rows are kept; another run resumes the rest."""
        self._stopped = True

    # --- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until every video has ended. SIGINT and SIGTERM drain; a second one stops.

        Raises:
            XmemError: no actor can be started because their constructors fail.
        """
        scheduler = self._scheduler
        try:
            with self._signals():
                self._used_before = used() if self._needs["CPU"] or self._needs["GPU"] else {}
                while not scheduler.done and not self._stopped:
                    while self._requests:
                        self._requests.popleft()()
                    now = time.monotonic()
                    self._look_after_actors(now)
                    self._do_all(scheduler.actions(now))
                    self._report(now)
                    if not scheduler.done:
                        self._take(self._ready())
        finally:
            self._end()
            self._report(time.monotonic(), always=True)

    def _do_all(self, actions: Sequence[Action]) -> None:
        """Execute actions. Chunks that a worker is to track together are one call; else each is its own."""
        tracks: dict[int, list[Track]] = {}
        for action in actions:
            if isinstance(action, Track) and self._scheduler.options.together:
                tracks.setdefault(action.worker, []).append(action)
            else:
                self._do(action)
        for number, chunks in tracks.items():
            if len(chunks) == 1:
                self._do(chunks[0])
                continue
            slot = self._by_number[number]
            ref = slot.actor.track_many.remote([chunk.ref for chunk in chunks])
            self._pending[ref] = (slot, tuple(chunks))
            slot.calls.add(ref)

    def _do(self, action: Action) -> None:
        slot = self._by_number[action.worker]
        if isinstance(action, CloseWorker):
            del self._by_number[action.worker]
            self._slots.remove(slot)
            ray.kill(slot.actor)
            return
        actor = slot.actor
        if isinstance(action, Track):
            ref = actor.track.remote(action.ref)
        elif isinstance(action, Open):
            ref = actor.open.remote(action.spec)
        elif isinstance(action, Release):
            ref = actor.release.remote(action.stream_id)
        else:
            ref = actor.close.remote(action.stream_id)
        self._pending[ref] = (slot, action)
        slot.calls.add(ref)

    def _ready(self) -> Sequence[Any]:
        """The answered calls; waits for the first one while there is nothing else to do."""
        now = time.monotonic()
        wakeup = self._scheduler.wakeup()
        seconds = _NAP_SECONDS if wakeup is None else max(0.0, min(wakeup - now, _NAP_SECONDS))
        if not self._pending:
            time.sleep(seconds)
            return ()
        ready: list[Any]
        ready, others = ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        if ready and others:
            # Fetch all ready calls, to share the cost of a round.
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        return ready

    def _take(self, ready: Sequence[Any]) -> None:
        if not ready:
            return
        answers: Sequence[Any]
        try:
            answers = ray.get(ready)
        except RayError:
            answers = [_answer(ref) for ref in ready]
        now = time.monotonic()
        for ref, answer in zip(ready, answers, strict=True):
            # Absent if an earlier answer showed that its worker is lost.
            slot, call = self._pending.pop(ref, (None, None))
            if slot is None:
                continue
            slot.calls.discard(ref)
            if isinstance(answer, RayTaskError):
                self._raised(slot, call, answer, now)
            elif isinstance(answer, RayError):
                self._lost(slot, answer, now)
            elif ref == self._asking:
                self._answered_first(answer)
            elif call is None:
                self._introduced(slot, answer, now)
            elif isinstance(call, tuple | Track):
                calls, reports = ((call,), (answer,)) if isinstance(call, Track) else (call, answer)
                for one, report in zip(calls, reports, strict=True):
                    self._log(report)
                    self._scheduler.reported(one.call, self._located(slot, report), now)
            elif isinstance(call, Open):
                self._log(answer)
                self._scheduler.opened(call.call, self._located(slot, answer), now)
            else:
                self._scheduler.released(call.call, now)

    def _located(self, slot: _Slot, answer: Any) -> Any:
        """The answer; access failures get the machine's name, since other machines may have access."""
        failure: Failure | None = answer.failure
        if failure is None or not failure.access or not self._name_machines:
            return answer
        message = f"{failure.message} (on the worker at {_address(slot.instance[0])})"
        return replace(answer, failure=replace(failure, message=message))

    def _log(self, answer: Any) -> None:
        for warning in answer.warnings:
            logger.warning("stream %s: %s", answer.stream_id, warning)

    def _report(self, now: float, always: bool = False) -> None:
        if self._on_progress is not None and (always or now >= self._next_progress):
            self._next_progress = now + self._progress_seconds
            standing = self._scheduler.progress()
            missing = sum(not slot.number for slot in self._slots)
            if missing:
                standing = standing._replace(missing=missing, shortage=self._why_missing(now))
            self._on_progress(standing)

    def _why_missing(self, now: float) -> str:
        """Why requested actors are missing; empty if nothing prevents their start."""
        if now >= self._next_count and ray.is_initialized():
            self._next_count = now + _COUNT_SECONDS
            missing = sum(not slot.number for slot in self._slots)
            self._shortage = shortage(self._needs, len(self._by_number), missing, self._used_before)
        return self._shortage

    # --- actors ----------------------------------------------------------------------------------

    def _look_after_actors(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + _PROBE_SECONDS
        self._clear_doubts(now)
        workers = self._workers
        self._wanted = max(1, workers) if isinstance(workers, int) else max(1, workers())
        while len(self._slots) < min(self._wanted, self._scheduler.unfinished):
            self._slots.append(_Slot())
        for slot in self._slots:
            if slot.number or slot.calls or now < slot.next_try:
                continue
            if slot.actor is None:
                slot.actor, slot.instance, slot.lost = self._make_actor(), (), False
            self._ask(slot, slot.actor.facts.remote(), None)

    def _ask(self, slot: _Slot, ref: Any, call: Call | None) -> None:
        self._pending[ref] = (slot, call)
        slot.calls.add(ref)

    def _introduced(self, slot: _Slot, facts: Mapping[str, Any], now: float) -> None:
        """Handle an actor's facts: its process is running."""
        instance = (facts.get("node_id"), facts.get("pid"))
        if slot.lost and instance == slot.instance:
            # It lives although it was abandoned: end it, since others have its streams by now.
            ray.kill(slot.actor, no_restart=False)
            slot.next_try = now + _PROBE_SECONDS
            return
        slot.instance, slot.lost, slot.failures = instance, False, 0
        slot.number = next(self._numbers)
        self._by_number[slot.number] = slot
        self._ever_ready = True
        budget = self._budget(facts)
        if self._first is None:
            self._scheduler.worker_ready(slot.number, budget)
            return
        self._held[slot.number] = budget
        if self._asking is None:
            self._ask_first(slot)

    def _ask_first(self, slot: _Slot) -> None:
        assert self._first is not None
        self._asking = self._first[0](slot.actor)
        self._ask(slot, self._asking, None)

    def _answered_first(self, answer: Any) -> None:
        assert self._first is not None
        take, self._first, self._asking = self._first[1], None, None
        take(answer)
        for number, budget in self._held.items():
            self._scheduler.worker_ready(number, budget)
        self._held.clear()

    def _lost(self, slot: _Slot, error: RayError, now: float) -> None:
        """Handle an actor whose process has died or cannot be reached."""
        asked = self._asking in slot.calls
        for ref in slot.calls:
            self._pending.pop(ref, None)
        slot.calls.clear()
        self._held.pop(slot.number, None)
        if asked:
            self._asking = None
            if other := next(iter(self._held), None):
                self._ask_first(self._by_number[other])
        if slot.number:
            away = getattr(error, "preempted", False) or slot.instance[0] in _gone()
            message = death(error, _address(slot.instance[0]), machine_gone=away)
            logger.warning("worker %d: %s", slot.number, message)
            logger.debug("worker %d: %s", slot.number, error)
            cause = Failure("WorkerLost", redacted(message), False)
            self._scheduler.worker_lost(slot.number, cause, now, blame=not away)
            if not away:
                self._doubtful.append((now, slot.number, slot.instance[0]))
            del self._by_number[slot.number]
            slot.number, slot.lost = 0, True
        slot.next_try = now
        if isinstance(error, ActorDiedError):
            slot.actor = None
            if getattr(error, "actor_init_failed", False):
                self._stillborn(slot, error, now)

    def _stillborn(self, slot: _Slot, error: RayError, now: float) -> None:
        """Handle a failed constructor, due to wrong settings or to a fault of one machine."""
        slot.failures += 1
        message = brief(str(error).strip().splitlines()[-1])
        logger.debug("a worker cannot start: %s", error)
        first, most = _REPLACE_SECONDS
        slot.next_try = now + min(first * 2 ** (slot.failures - 1), most)
        logger.warning("a worker cannot start: %s", redacted(message))
        if not self._ever_ready:
            if f"{UsageError.__name__}: " in message:
                raise UsageError(message.split(f"{UsageError.__name__}: ", 1)[1])
            if slot.failures >= _HOPELESS:
                raise XmemError(f"no worker can start: {message}")

    def _clear_doubts(self, now: float) -> None:
        """Absolve the streams of workers whose machine was lost."""
        if not self._doubtful:
            return
        gone = _gone()
        for at, number, machine in list(self._doubtful):
            if machine in gone:
                self._scheduler.absolve(number)
            elif now - at < _DOUBT_SECONDS:
                continue
            self._doubtful.remove((at, number, machine))

    def _raised(
        self, slot: _Slot, call: Call | tuple[Track, ...] | None, error: RayTaskError, now: float
    ) -> None:
        cause = getattr(error, "cause", None)
        failure = Failure.of(cause if isinstance(cause, BaseException) else error)
        logger.warning("worker %d: %s", slot.number, failure.message)
        if self._asking is not None and slot.number in self._held and call is None:
            self._answered_first(None)  # each video reports the error itself
        elif call is None:
            slot.next_try = now + _PROBE_SECONDS
        elif isinstance(call, tuple):
            # Which of the chunks it was, only calls of their own show; what is done of them is refused there.
            for one in call:
                self._do(one)
        else:
            self._scheduler.call_failed(call.call, failure, now)

    def _end(self) -> None:
        """End all actors. Another run resumes the streams that they still hold."""
        self._pending.clear()
        if not self._scheduler.done:
            self._scheduler.drain()
            stopped = Failure("Stopped", "the run was stopped", False)
            for number in list(self._by_number):
                self._scheduler.worker_lost(number, stopped, time.monotonic(), blame=False)
        for slot in self._slots:
            if slot.actor is not None and ray.is_initialized():
                ray.kill(slot.actor)
        self._slots.clear()
        self._by_number.clear()

    # --- signals ---------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        seen = 0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal seen
            seen += 1
            if seen == 1:
                self.drain()
            else:
                self.stop()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def room_for(cpus: float, gpus: float = 0.0) -> int:
    """Number of actors with these CPUs and GPUs that fit the current machines."""
    counts = []
    for machine in _machines():
        there = machine["Resources"] if machine["Alive"] else {}
        shares = [there.get(name, 0.0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need > 0]
        # Tolerance, so that three thirds of a GPU add up to one.
        counts.append(int(min(shares, default=0.0) + 1e-6))
    return sum(counts)


def used() -> dict[str, float]:
    """Number of reserved CPUs and GPUs of the cluster."""
    untyped: Any = ray
    total, free = untyped.cluster_resources(), untyped.available_resources()
    return {name: total.get(name, 0.0) - free.get(name, 0.0) for name in ("CPU", "GPU")}


def shortage(
    needs: Mapping[str, float], own: int, missing: int = 0, before: Mapping[str, float] | None = None
) -> str:
    """Short description of the resources that one more actor lacks; empty if actors are starting.

    Args:
        needs: CPUs and GPUs that an actor reserves.
        own: number of this pool's running actors.
        missing: number of this pool's missing actors, some of which may have resources and be starting.
        before: resources reserved before this pool's first actor; Ray does not tell owners apart.
    """
    needs = {name: need for name, need in needs.items() if need > 0}
    if needs and not room_for(needs.get("CPU", 0.0), needs.get("GPU", 0.0)):
        wanted = " and ".join(f"{need:g} {name}s" for name, need in needs.items())
        return f"no machine of the cluster has {wanted} for a worker"
    untyped: Any = ray
    total, free = untyped.cluster_resources(), untyped.available_resources()
    for name, need in needs.items():
        there, left = total.get(name, 0.0), free.get(name, 0.0)
        if left + 1e-6 < need:
            taken = there - left
            starting = int((taken - (before or {}).get(name, taken)) / need + 1e-6) - own
            starting = max(0, min(starting, missing))
            if missing and starting == missing:
                continue
            others = max(0.0, taken - (own + starting) * need)
            used = f", {others:g} of them by others" if others >= 1e-6 else ""
            return f"no free {name}s ({there - left:g} of {there:g} in use{used})"
    return ""


def _machines() -> list[dict[str, Any]]:
    machines: list[dict[str, Any]] = ray.nodes()
    return machines


def _gone() -> set[str]:
    return {machine["NodeID"] for machine in _machines() if not machine["Alive"]}


def _address(node_id: str) -> str:
    """Name or address of a machine, for messages."""
    found = (m for m in _machines() if m["NodeID"] == node_id)
    return str(next((m.get("NodeManagerAddress") or node_id for m in found), node_id))


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        return error
