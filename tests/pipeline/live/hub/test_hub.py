"""Live streams in a hub, with fake cameras, a small network and real files."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.live_books import Committed
from support.live_fake import HEIGHT, WIDTH, FakeFeed
from support.small_net import SMALL_MEMORY, small_model, square
from support.webhook_receiver import SECRET, receiver

from pipeline.analytics.query import query
from pipeline.base.errors import PromptError, SettingsConflictError, UsageError, XmemError
from pipeline.live.camera.ledger import Ledger
from pipeline.live.hub.capacity import Load
from pipeline.live.hub.hub import HubSettings, LiveHub
from pipeline.live.hub.webhook import WebhookSettings
from pipeline.live.recent import LiveView
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.tracks.masks import mask_to_rle
from pipeline.tracks.store import StreamStore
from xmem_core import TrackerState, VideoSegmenter

PATIENCE = 40.0
QUICK: dict[str, Any] = {"rotate_seconds": 0.3, "snapshot_seconds": 0.5}


@pytest.fixture(scope="module")
def segmenter() -> VideoSegmenter:
    return VideoSegmenter(small_model(), SMALL_MEMORY)


def mask_of(top: int = 8, left: int = 4, side: int = 14) -> dict[str, Any]:
    counts = mask_to_rle(square(HEIGHT, WIDTH, top, left, side))
    return {"rle": {"size": [HEIGHT, WIDTH], "counts": counts}}


def prompts(*ids: int) -> dict[str, Any]:
    return {"objects": [{"id": i, **mask_of(left=4 + 16 * k)} for k, i in enumerate(ids)]}


def spec(name: str = "cam", url: str = "fake://cam?fps=40", /, **more: Any) -> LiveSpec:
    settings = LiveSettings.from_dict(QUICK | more.pop("settings", {}))
    return LiveSpec(name, url, more.pop("prompts", prompts(1)), settings=settings, **more)


def until(what: Callable[[], Any], patience: float = PATIENCE) -> Any:
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return found


class World:
    def __init__(self, out: Path, segmenter: Any) -> None:
        self.out, self.segmenter = out, segmenter
        self.hubs: list[LiveHub] = []
        self.feeds: dict[str, FakeFeed] = {}

    def hub(self, **more: Any) -> LiveHub:
        values: dict[str, Any] = {
            "tracking": TrackSettings.of(memory=SMALL_MEMORY, threads=1),
            "calibrate": False,
            "first_backoff_seconds": 0.05,
        }
        values |= {"secrets": str(self.out.parent / "secrets")} | more
        chosen = values.pop("segmenter", self.segmenter)
        made = LiveHub(HubSettings(str(self.out), **values), segmenter=chosen, open_feed=self._feed)
        self.hubs.append(made)
        return made

    def _feed(self, spec: LiveSpec, ledger: Ledger) -> FakeFeed:
        feed = self.feeds[spec.stream_id] = FakeFeed(spec, ledger)
        return feed


@pytest.fixture
def world(tmp_path: Path, segmenter: VideoSegmenter) -> Iterator[World]:
    made = World(tmp_path / "out", segmenter)
    yield made
    for hub in made.hubs:
        hub.close()


def tracked(hub: LiveHub, name: str = "cam", more: int = 10) -> int:
    """Wait until this number of further frames has been tracked."""
    until(lambda: hub.status(name)["ledger"]["received"])  # as far as earlier runs came
    goal: int = hub.status(name)["ledger"]["tracked"] + more
    until(lambda: hub.status(name)["ledger"]["tracked"] >= goal)
    return goal


def books_match(hub_status: dict[str, Any], committed: Committed) -> None:
    ledger = dict(hub_status["ledger"])
    assert ledger.pop("in_flight") == 0
    assert committed.ledger() == ledger


def test_a_stream_is_tracked_and_its_books_are_even(world: World) -> None:
    hub = world.hub()
    status = hub.add(spec(prompts=prompts(1, 7)))
    assert status["state"] == "starting"
    tracked(hub, more=30)
    status = hub.status("cam")
    assert status["state"] == "running"
    assert [o["id"] for o in status["objects"]] == [1, 7]
    assert status["width"] == WIDTH
    until(lambda: hub.status("cam")["committed_frames"])
    last = hub.remove("cam", wait=PATIENCE)
    assert last["state"] == "stopped"
    committed = Committed(world.out, "cam")
    books_match(last, committed)
    assert committed.ids == {1, 7}
    assert len(committed.rows) == 2 * committed.tracked
    assert [e["object_id"] for e in committed.of("object_added")] == [1, 7]
    assert committed.record["state"] == "finished"
    assert len(committed.footers) > 1
    with pytest.raises(UsageError, match="there is no stream 'cam'"):
        hub.status("cam")


def test_a_stream_that_is_being_opened_when_the_hub_closes_is_closed_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()

    def slow(spec: LiveSpec, ledger: Ledger) -> FakeFeed:
        feed = world.feeds[spec.stream_id] = FakeFeed(spec, ledger)
        opening.set()
        assert go_on.wait(PATIENCE)
        return feed

    monkeypatch.setattr(world, "_feed", slow)
    hub = world.hub()
    hub.add(spec())
    assert opening.wait(PATIENCE)
    closing = threading.Thread(target=hub.close)
    closing.start()
    hub._thread.join(PATIENCE)
    go_on.set()
    closing.join(PATIENCE)
    assert world.feeds["cam"].closed


def test_a_closed_hub_goes_on_with_the_same_objects(world: World) -> None:
    hub = world.hub()
    hub.add(spec())
    tracked(hub)
    ids = hub.request("cam", {"prompts": {"objects": [mask_of(left=40)]}})["ids"]
    assert len(ids) == 1
    assert ids[0] > 1
    until(lambda: [o["id"] for o in hub.status("cam")["objects"]] == [1, *ids])
    seen = hub.status("cam")["next_frame"]
    hub.close()
    before = Committed(world.out, "cam")

    again = world.hub()
    until(lambda: [o["id"] for o in again.status("cam")["objects"]] == [1, *ids])
    tracked(again)
    last = again.remove("cam", wait=PATIENCE)
    after = Committed(world.out, "cam")
    books_match(last, after)
    assert min(after.frames - before.frames) >= seen
    assert len(after.of("object_added")) == 2
    (restart,) = after.of("restart")
    assert restart["detail"]["snapshot"] == before.received
    assert restart["detail"]["seconds"] > 0
    assert after.sums("dropped").get("restart", 0) == 0


def memory_of(hub: LiveHub) -> dict[str, Any]:
    def known() -> dict[str, Any] | None:
        with suppress(XmemError):
            return hub.view("cam", LiveView.memory)
        return None

    return dict(until(known))


def test_the_memory_is_listed_and_edited_between_frames(world: World) -> None:
    hub = world.hub()
    hub.add(spec())
    tracked(hub, more=30)
    store = StreamStore(world.out, "cam")
    older = until(lambda: _snapshot(store))
    restored = TrackerState.from_bytes(LiveSnapshot.from_bytes(older[1]).stream.tracker).time
    assert restored > 3
    # A listing is up to a second old; what is forgotten must reach as far as the snapshot.
    listed = until(lambda: (m := memory_of(hub)) and m["time"] > max(20, restored) and m)
    assert listed["objects"] == [{"id": 1, "category": None}]
    pictures = {f["time"]: hub.view("cam", LiveView.thumbnail, f["time"]) for f in memory_of(hub)["frames"]}
    assert pictures
    assert all(data is not None and data[:2] == b"\xff\xd8" for data in pictures.values())
    assert hub.view("cam", LiveView.thumbnail, 10**6) is None
    whole = max(f["time"] for f in listed["frames"] if f["kind"] == "working")
    seq = hub.request("cam", {"memory": {"forget": [3, whole]}})["seq"]
    assert until(lambda: not any(3 <= f["time"] <= whole for f in memory_of(hub)["frames"]))
    with pytest.raises(UsageError, match="pin='True' is not allowed"):
        hub.request("cam", {"memory": {"pin": True}})
    late = hub.request("cam", {"memory": {"pin": 10**6}})["seq"]
    (rejected,) = until(lambda: hub.status("cam")["requests"]["rejected"])
    assert rejected["seq"] == late
    assert "frame 1000000 is not in memory as a whole; whole frames: " in rejected["cause"]
    until(lambda: edited(world.out))

    # As after a kill between the commit of the event and the next snapshot: the edit is made again and not
    # reported again.
    copy = World(world.out.parent / "killed" / "out", world.segmenter)
    shutil.copytree(world.out, copy.out, ignore=shutil.ignore_patterns(".tmp"))
    state = copy.out / "state" / "cam"
    shutil.rmtree(state)
    state.mkdir()
    (state / f"{older[0]:012d}.safetensors").write_bytes(older[1])
    hub.close()
    again = copy.hub()
    copy.hubs.clear()
    try:
        assert not any(3 <= f["time"] <= restored for f in memory_of(again)["frames"])
        tracked(again)
    finally:
        again.close()
    assert edited(copy.out) == [{"forget": [3, whole], "request": seq}]
    assert edited(world.out) == edited(copy.out)


def test_an_object_is_copied_from_another_stream_and_stays_after_a_restart(world: World) -> None:
    hub = world.hub()
    hub.add(spec(prompts={"objects": [{"id": 1, "category": "bag", **mask_of()}]}))
    hub.add(spec("door", "fake://door?fps=40", prompts=None))
    store = StreamStore(world.out, "cam")
    until(lambda: _snapshot(store))
    tracked(hub, "door", more=2)
    copy: dict[str, Any] = {"copy": {"stream": "cam", "object": 1}}
    (new,) = hub.request("door", {"memory": copy})["ids"]
    objects = [{"id": new, "category": "bag"}]
    until(lambda: [{k: o[k] for k in ("id", "category")} for o in hub.status("door")["objects"]] == objects)
    for wrong, message in (
        ({**copy, "object": new}, f"object {new} is tracked already: give the copy another id"),
        ({"copy": {"stream": "cam", "object": 8}}, r"no object 8 is tracked: there are \[1\]"),
        ({"copy": {"stream": "cam", "object": 1, "out": "/elsewhere"}}, "a stream of the same output folder"),
        ({"copy": {"stream": "door", "object": 1}}, "'door' is the one that would receive the copy"),
    ):
        with pytest.raises(UsageError, match=message):
            hub.request("door", {"memory": wrong})
    hub.request("door", {"remove": [new]})
    (again,) = hub.request("door", {"memory": copy})["ids"]
    assert again > new
    hub._capacity._budget = 1 << 20
    with pytest.raises(UsageError, match="stream door does not fit the device's memory"):
        hub.request("door", {"memory": copy})
    until(lambda: [o["id"] for o in hub.status("door")["objects"]] == [again])
    hub.close()
    resumed = world.hub()
    until(lambda: [o["id"] for o in resumed.status("door")["objects"]] == [again])
    tracked(resumed, "door", more=2)
    resumed.remove("door", wait=PATIENCE)
    committed = Committed(world.out, "door")
    assert [(e["object_id"], e["reason"]) for e in committed.of("object_added")] == [
        (new, "copy"),
        (again, "copy"),
    ]
    assert [e["detail"]["category"] for e in committed.of("memory_edited")] == ["bag", "bag"]


def edited(out: Path) -> list[dict[str, Any]]:
    rows = query(str(out), "select detail from events where kind = 'memory_edited'")
    return [json.loads(detail) for detail in rows["detail"].to_pylist()]


def _snapshot(store: StreamStore) -> tuple[int, bytes] | None:
    """The newest snapshot of a stream in which objects are tracked."""
    found = store.load_snapshot(2**60, lambda blob: blob)
    return found if found and LiveSnapshot.from_bytes(found[1]).stream.categories else None


def test_requests_are_done_and_answered(world: World) -> None:
    hub = world.hub()
    hub.add(spec(settings={"max_objects": 3}))
    tracked(hub)
    assert hub.request("cam", {"prompts": prompts(5)}) == {"seq": 2, "ids": [5]}
    until(lambda: {o["id"] for o in hub.status("cam")["objects"]} == {1, 5})
    assert hub.request("cam", {"rename": {"id": 5, "category": "bag"}}) == {"seq": 3, "ids": [5]}
    until(lambda: {o["category"] for o in hub.status("cam")["objects"]} == {None, "bag"})
    assert hub.request("cam", {"remove": [1]}) == {"seq": 4, "ids": [1]}
    until(lambda: {o["id"] for o in hub.status("cam")["objects"]} == {5})
    hub.request("cam", {"prompts": {"objects": [{"id": 5, **mask_of(left=20)}]}})
    with pytest.raises(UsageError, match="4 objects would be tracked, 3 are allowed"):
        hub.request("cam", {"prompts": prompts(6, 7, 8)})
    rle = {"size": [10, 10], "counts": mask_to_rle(np.ones((10, 10), np.bool_))}
    with pytest.raises(PromptError, match="its mask is 10x10, the stream 64x48"):
        hub.request("cam", {"prompts": {"objects": [{"id": 9, "rle": rle}]}})
    with pytest.raises(UsageError, match="no object 77 is tracked"):
        hub.request("cam", {"remove": [77]})
    wrong: list[Any] = [
        {},
        {"pause": 1},
        {"jump": 1},
        {"remove": []},
        {"remove": [True]},
        {"prompts": {}},
        [],
    ]
    for bad in wrong:
        with pytest.raises(UsageError):
            hub.request("cam", bad)
    with pytest.raises(PromptError, match="up to 1000000000"):
        hub.request("cam", {"prompts": prompts(2**31 - 1)})
    outside = {"objects": [{"id": 6, "box": [500, 500, 5, 5]}]}
    seq = hub.request("cam", {"prompts": outside})["seq"]
    (rejected,) = until(lambda: hub.status("cam")["requests"]["rejected"])
    assert rejected["seq"] == seq
    assert "no pixel inside the frame" in rejected["cause"]
    tracked(hub)
    hub.remove("cam", wait=PATIENCE)
    committed = Committed(world.out, "cam")
    assert [e["object_id"] for e in committed.of("object_removed")] == [1]
    assert [(e["object_id"], e["reason"]) for e in committed.of("corrected")] == [
        (5, "renamed"),
        (5, "prompt"),
    ]
    names = [r["category"] for r in committed.rows if r["object_id"] == 5]
    assert names == sorted(names, key=lambda name: name is not None)  # from one frame on
    assert set(names) == {None, "bag"}


def test_a_pause_lets_frames_pass_and_outlives_the_hub(world: World) -> None:
    hub = world.hub()
    hub.add(spec())
    tracked(hub)
    hub.request("cam", {"pause": True})
    assert hub.status("cam")["state"] == "paused"
    at = until(lambda: (s := hub.status("cam")["ledger"])["dropped"].get("paused", 0) > 10 and s)
    assert hub.status("cam")["ledger"]["tracked"] <= at["tracked"] + 1
    hub.close()
    again = world.hub()
    until(lambda: again.status("cam")["state"] == "paused")
    until(lambda: again.status("cam")["ledger"]["dropped"]["paused"] > at["dropped"]["paused"] + 20)
    again.request("cam", {"pause": False})
    tracked(again)
    last = again.remove("cam", wait=PATIENCE)
    committed = Committed(world.out, "cam")
    books_match(last, committed)
    assert committed.ids == {1}


class Slow:
    """A slow segmenter."""

    def __init__(self, inner: VideoSegmenter, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self, *arguments: Any) -> Any:
        time.sleep(self._seconds)
        return self._inner.step(*arguments)


@pytest.mark.alone
@pytest.mark.parametrize("policy", ["latest", "every"])
def test_overload_is_counted_and_bounded(world: World, segmenter: VideoSegmenter, policy: str) -> None:
    hub = world.hub(segmenter=Slow(segmenter, 0.05))  # 20 a second at most, and 40 come
    hub.add(spec(settings={"policy": policy, "max_lag_seconds": 1.0}))
    tracked(hub, more=60)
    status, metrics = hub.status("cam"), hub.metrics()["cam"]
    if policy == "latest":
        assert status["lag_seconds"]["p99"] < 1.0
        assert status["ledger"]["dropped"]["queue full"] > 20
    else:
        assert not status["ledger"]["dropped"]
    assert len(world.feeds["cam"].queue._frames) <= 5
    assert metrics["received"] >= status["ledger"]["received"]
    hub.request("cam", {"pause": False})
    last = hub.remove("cam", wait=PATIENCE)
    committed = Committed(world.out, "cam")
    books_match(last, committed)
    dropped = [e for e in committed.of("dropped") if e["reason"] == "queue full"]
    assert len(dropped) <= len(committed.footers), "one row per file is enough"


def test_a_lag_that_cannot_be_kept_is_told_once(
    world: World, segmenter: VideoSegmenter, caplog: pytest.LogCaptureFixture
) -> None:
    hub = world.hub(segmenter=Slow(segmenter, 0.05))
    hub.add(spec(settings={"max_lag_seconds": 0.04}))
    until(lambda: hub.status("cam")["ledger"]["tracked"] >= 3)
    told = [r.getMessage() for r in caplog.records if "max_lag_seconds=0.04" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("stream cam: a frame with 1 objects took 0.")
    assert hub.status("cam")["ledger"]["dropped"]


def test_the_rate_asked_for_is_kept(world: World) -> None:
    hub = world.hub()
    hub.add(spec(settings={"fps": 2}))
    tracked(hub, more=8)
    status = hub.status("cam")
    assert status["ledger"]["dropped"]["rate limit"] > 20
    last = hub.remove("cam", wait=PATIENCE)
    books_match(last, Committed(world.out, "cam"))


def test_a_promised_rate_comes_before_streams_without_one(world: World, segmenter: VideoSegmenter) -> None:
    """Eight streams, and time for six frames per second: two of them are guaranteed to one stream."""
    hub = world.hub(segmenter=Slow(segmenter, 0.15))
    expected = {"expected_height": HEIGHT, "expected_width": WIDTH, "max_objects": 1}
    hub.add(spec("promised", settings={"fps": 2, **expected}))
    others = [f"other-{i}" for i in range(7)]
    for name in others:
        hub.add(spec(name, settings=expected))
    for name in ("promised", *others):
        tracked(hub, name, more=1)
    before = {name: hub.status(name)["ledger"]["tracked"] for name in (*others, "promised")}
    until(lambda: sum(hub.status(n)["ledger"]["tracked"] - before[n] for n in before) >= 30)
    more = {name: hub.status(name)["ledger"]["tracked"] - before[name] for name in before}
    assert more["promised"] >= 2 * max(more[name] for name in others), more
    assert min(more.values()) >= 1, more  # none starves


class Poison(Slow):
    """Fails on frames of one stream, those with a marked first pixel, a number of times."""

    def __init__(self, inner: VideoSegmenter) -> None:
        super().__init__(inner, 0)
        self.failures = 0
        self.victim: Any = None

    def step(self, state: Any, image: Any, prompt: Any) -> Any:
        if self.victim is state and self.failures > 0:
            self.failures -= 1
            state.poisoned = "by the test"
            raise RuntimeError("it went wrong\nin two lines")
        return self._inner.step(state, image, prompt)


def test_a_poisoned_stream_disturbs_nobody(world: World, segmenter: VideoSegmenter) -> None:
    poison = Poison(segmenter)
    hub = world.hub(segmenter=poison)
    names = ["a", "b", "c", "d"]
    for name in names:
        hub.add(spec(name, "fake://x?fps=15"))
    for name in names:
        tracked(hub, name)
    until(lambda: hub.status("b")["committed_frames"])
    poison.failures, poison.victim = 1, hub._streams["b"].tracker.state  # type: ignore[union-attr]
    until(lambda: hub.status("b")["failures"])
    assert hub.metrics()["b"]["failures"] == 1
    for name in names:
        tracked(hub, name)
    assert [o["id"] for o in hub.status("b")["objects"]] == [1]
    last = {name: hub.remove(name, wait=PATIENCE) for name in names}
    for name in names:
        committed = Committed(world.out, name)
        books_match(last[name], committed)
        assert committed.ids == {1}
        assert len(committed.of("restart")) == (name == "b")
        assert committed.sums("dropped").get("failed", 0) == (name == "b")


class Prompted(Slow):
    """Fails on every frame with a prompt for an object."""

    def __init__(self, inner: VideoSegmenter, object_id: int) -> None:
        super().__init__(inner, 0)
        self._object_id = object_id
        self.failures = 0

    def step(self, state: Any, image: Any, prompt: Any) -> Any:
        if prompt is not None and self._object_id in prompt.masks:
            self.failures += 1
            raise RuntimeError("not with rtsp://user:secret@camera/it")
        return self._inner.step(state, image, prompt)


def test_a_prompt_that_tracking_fails_with_is_given_up(
    world: World, segmenter: VideoSegmenter, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Prompted(segmenter, 7)
    hub = world.hub(segmenter=broken, first_backoff_seconds=0.01, most_backoff_seconds=0.05)
    hub.add(spec())
    tracked(hub)
    first, second = ({"prompts": {"objects": [{"id": i, **mask_of(left=30)}]}} for i in (7, 8))
    number = hub.request("cam", first)["seq"]
    until(lambda: broken.failures)

    def asked() -> Any:
        with suppress(XmemError):  # it is being opened again
            return hub.request("cam", second)

    until(asked)
    until(lambda: {1, 8} == {o["id"] for o in hub.status("cam")["objects"]})
    (rejected,) = hub.status("cam")["requests"]["rejected"]
    assert rejected["seq"] == number
    assert "failed 3 times" in rejected["cause"]
    assert "not with rtsp://camera/it" in rejected["cause"]
    assert broken.failures == 3
    tracked(hub)
    last = hub.remove("cam", wait=PATIENCE)
    books_match(last, Committed(world.out, "cam"))
    assert "Traceback" in caplog.text
    assert "secret" not in caplog.text


def test_a_stream_that_cannot_be_opened_says_why_and_is_tried_again(world: World) -> None:
    hub = world.hub()
    folder = world.out / "tracks"
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("in the way")
    hub.add(spec())
    until(lambda: hub.status("cam")["state"] == "failed")
    assert hub.status("cam")["cause"]
    with pytest.raises(XmemError, match="ask again later"):
        until(lambda: hub.request("cam", {"pause": True}))
    folder.unlink()
    tracked(hub)


def test_a_class_that_the_detector_does_not_have_is_refused(world: World) -> None:
    hub = world.hub()
    with pytest.raises(UsageError, match="'motion' has no class 'person': its detections have no class"):
        hub.add(spec(detector="motion", settings={"detect_classes": "person"}))
    assert hub.list() == []


def test_a_camera_that_ends_is_tried_again(world: World) -> None:
    hub = world.hub()
    hub.add(spec("cam", "fake://x?fps=40&count=15", settings={"policy": "every"}))
    until(lambda: hub.status("cam")["failures"] and hub.status("cam")["ledger"]["received"] > 5)
    until(lambda: hub.status("cam")["failures"] >= 2)
    last = hub.remove("cam", wait=PATIENCE)
    committed = Committed(world.out, "cam")
    books_match(last, committed)
    assert committed.ids == {1}
    assert committed.of("restart")


def test_another_kind_of_stream_is_not_touched(world: World) -> None:
    hub = world.hub()
    hub.add(spec())
    tracked(hub)
    hub.remove("cam", wait=PATIENCE)
    record = world.out / "streams" / "cam.json"
    record.write_text(record.read_text().replace('"live":', '"dead":'))
    before = sorted(p.name for p in world.out.rglob("*"))
    hub.add(spec())
    until(lambda: hub.status("cam")["state"] == "failed")
    assert "not live" in hub.status("cam")["cause"]
    assert sorted(p.name for p in world.out.rglob("*")) == before
    assert SettingsConflictError.__name__ == hub._streams["cam"].failure.kind  # type: ignore[union-attr]


def test_what_is_added_again_goes_on_and_its_prompts_are_asked_again(world: World) -> None:
    hub = world.hub()
    hub.add(spec())
    tracked(hub)
    hub.request("cam", {"remove": [1]})
    until(lambda: not hub.status("cam")["objects"])
    hub.remove("cam", wait=PATIENCE)
    hub.add(spec(prompts=prompts(4)))
    until(lambda: [o["id"] for o in hub.status("cam")["objects"]] == [4])
    hub.remove("cam", wait=PATIENCE)
    committed = Committed(world.out, "cam")
    assert committed.ids == {1, 4}


def test_the_list_and_its_secrets(world: World, tmp_path: Path) -> None:
    hub = world.hub()
    status = hub.add(spec("cam", "fake://me:geheim@host?fps=20&token=auch", prompts=None))
    assert "geheim" not in str(status)
    assert "auch" not in str(status)
    with pytest.raises(UsageError, match="is there already"):
        hub.add(spec())
    tracked(hub)
    hub.close()
    for path in world.out.rglob("*"):
        assert path.is_dir() or b"geheim" not in path.read_bytes()
        assert path.is_dir() or b"auch" not in path.read_bytes()
    (kept,) = (tmp_path / "secrets").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    again = world.hub()
    assert again._streams["cam"].spec.url == "fake://me:geheim@host?fps=20&token=auch"
    assert "geheim" not in repr(again._streams["cam"].spec)
    again.close()
    kept.unlink()
    third = world.hub()
    (lost,) = third.list()
    assert lost["state"] == "failed"
    assert "credentials" in lost["cause"]
    third.remove("cam")
    assert third.list() == []


def test_watching(world: World) -> None:
    hub = world.hub(kept_records=20)
    hub.add(spec(prompts=prompts(1, 2)))
    assert hub.view("cam", LiveView.wait, 10**9, timeout=0.01) is None
    with pytest.raises(XmemError, match="no frame has been tracked yet"):
        hub.view("cam", LiveView.jpeg)
    first = hub.view("cam", LiveView.wait, -1, PATIENCE)
    assert first is not None
    assert [r["object_id"] for r in first["records"]] == [1, 2]
    second = hub.view("cam", LiveView.wait, first["seq"], PATIENCE)
    assert second is not None
    assert second["seq"] > first["seq"]
    tracked(hub, more=20)
    added = [("object_added", 2), ("object_added", 1)]
    happened = hub.view("cam", LiveView.events)
    assert [(e["kind"], e["object_id"]) for e in happened] == added
    assert hub.status("cam")["recent_events"] == happened
    assert len(hub.view("cam", LiveView.events, 1)) == 1
    rows = hub.view("cam", LiveView.tracks)
    assert len(rows) == 20
    since = rows[5]["frame_index"]
    later = hub.view("cam", LiveView.tracks, since=since, limit=3)
    assert len(later) == 2
    assert all(r["frame_index"] > since for r in later)
    data = hub.view("cam", LiveView.jpeg, max_side=32)
    assert data[:2] == b"\xff\xd8"
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    assert image.shape == (24, 32, 3)
    assert hub.view("cam", LiveView.jpeg, overlay=False) != hub.view("cam", LiveView.jpeg, overlay=True)
    for bad in ({"max_side": 1}, {"quality": 0}):
        with pytest.raises(UsageError):
            hub.view("cam", LiveView.jpeg, **bad)  # type: ignore[arg-type]


def test_admission_has_the_numbers(world: World) -> None:
    hub = world.hub(calibrate=True, max_streams=2)
    capacity = hub.capacity()
    assert capacity["ms_per_frame"] > 0
    assert capacity["budget_bytes"] < capacity["device_bytes"]
    most = 0.9 * 1000 / capacity["ms_per_frame"]
    expected = {"expected_height": HEIGHT, "expected_width": WIDTH}
    trial = {"expected_height": 480, "expected_width": 854, "max_objects": 1}
    with pytest.raises(UsageError, match=r"time: .* frames/s at .* ms each .* take .* ask for at most"):
        hub.add(spec(settings={"fps": min(1000.0, most * 1.5), **trial}))
    assert hub.list() == []
    hub.add(spec("one", settings={"fps": most * 0.02, **expected}))
    hub.add(spec("two", settings=expected))
    with pytest.raises(UsageError, match="2 are allowed"):
        hub.add(spec("three"))
    small = world.hub(hub="small", memory_bytes=1 << 20)
    with pytest.raises(UsageError, match=r"memory: \d+ MiB would be used"):
        small.add(spec("four"))


def test_memory_is_reckoned_again_when_the_frames_are_known(world: World) -> None:
    probe = world.hub(hub="probe")
    tiny = {"expected_height": 16, "expected_width": 16, "max_objects": 4}
    before = probe._capacity._memory([Load(spec(settings=tiny))])
    real = probe._capacity._memory([Load(spec(settings=tiny), (HEIGHT, WIDTH))])
    assert before < real
    hub = world.hub(memory_bytes=(before + real) // 2)
    hub.add(spec(settings=tiny))
    until(lambda: hub.status("cam")["state"] == "failed")
    assert "memory" in hub.status("cam")["cause"]


def test_a_damaged_snapshot_costs_nothing_but_its_news(world: World) -> None:
    hub = world.hub()
    hub.add(spec(prompts=prompts(1, 2)))
    folder = world.out / "state" / "cam"
    until(lambda: folder.exists() and len(list(folder.iterdir())) == 2)
    hub.close()
    for path in sorted(folder.iterdir())[-1:]:
        path.write_bytes(path.read_bytes()[:-40])
    again = world.hub()
    tracked(again)
    assert [o["id"] for o in again.status("cam")["objects"]] == [1, 2]
    again.close()
    for path in folder.iterdir():
        path.write_bytes(b"not one of them")
    third = world.hub()
    tracked(third)
    assert third.status("cam")["objects"] == []
    last = third.remove("cam", wait=PATIENCE)
    committed = Committed(world.out, "cam")
    books_match(last, committed)
    gone = [e["object_id"] for e in committed.of("object_removed") if e["reason"] == "restart"]
    assert gone == [1, 2]


def test_a_store_that_hangs_stops_no_other_stream(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = world.hub()
    hub.add(spec("stuck", settings={"rotate_seconds": 0.1}))
    hub.add(spec("free"))
    for name in ("stuck", "free"):
        tracked(hub, name)
    gate, commit = threading.Event(), StreamStore.commit

    def slow(store: StreamStore, *arguments: Any) -> bool:
        if store.stream_id == "stuck":
            assert gate.wait(PATIENCE)
        return commit(store, *arguments)

    monkeypatch.setattr(StreamStore, "commit", slow)
    try:
        # No number is given out that is not reserved, and reserving waits for the store.
        stalled = until(
            lambda: (
                (s := hub.status("stuck"))["next_frame"] + 20 < s["ledger"]["received"] and s["next_frame"]
            )
        )
        tracked(hub, "free")
        assert hub.status("stuck")["next_frame"] <= stalled + 8
    finally:
        gate.set()
    tracked(hub, "stuck")
    for name in ("stuck", "free"):
        last = hub.remove(name, wait=PATIENCE)
        committed = Committed(world.out, name)
        books_match(last, committed)
        assert committed.of("restart") == []


WHOLE = {"name": "whole", "units": "share", "polygon": [[0, 0], [1, 0], [1, 1], [0, 1]]}


def test_zone_events_are_pushed_once_they_are_committed(world: World) -> None:
    with receiver() as got:
        hub = world.hub(webhook=WebhookSettings(got.url, SECRET, 0.01, 0.02))
        hub.add(spec(zones={"zones": [WHOLE], "gap_seconds": 60}))
        got.until(lambda: bool(got.events))
    (event,) = got.events
    assert (event["kind"], event["name"], event["object_id"]) == ("zone_entered", "whole", 1)
    committed = query(world.out, "SELECT frame_index FROM events WHERE kind = 'zone_entered'").to_pylist()
    assert [row["frame_index"] for row in committed] == [event["frame_index"]]


def test_zones_make_events_and_outlive_a_hub(world: World) -> None:
    """Given with the stream, changed while it runs, and resumed by another hub: as found in the rows."""
    hub = world.hub()
    hub.add(spec(zones={"zones": [WHOLE], "gap_seconds": 60}))
    until(lambda: hub.status("cam")["zones"]["zones"])
    until(lambda: hub.status("cam")["zones"]["zones"][0]["inside"] == 1)
    (first,) = hub.status("cam")["zones"]["zones"]
    assert first == {"name": "whole", "inside": 1, "entered": 1, "left": 0}
    tracked(hub)
    hub.close()
    again = world.hub()
    tracked(again)
    assert again.status("cam")["zones"]["zones"] == [first]
    with pytest.raises(UsageError, match="made by itself"):
        again.request("cam", {"zones": {}, "pause": True})
    other = {**WHOLE, "name": "other", "polygon": [[0, 0], [0.001, 0], [0, 0.001]]}
    again.request("cam", {"zones": {"zones": [other]}})
    until(lambda: again.status("cam")["zones"]["zones"][0]["name"] == "other")
    news = until(lambda: again.view("cam", LiveView.wait, 0, 5.0))
    assert [e["kind"] for e in news["events"]] == ["zones_changed", "zone_left"]
    tracked(again)
    again.remove("cam", wait=PATIENCE)
    sql = "SELECT kind, reason, object_id FROM events WHERE kind LIKE 'zone%' ORDER BY frame_index"
    rows = query(world.out, sql)
    assert [tuple(row.values()) for row in rows.to_pylist()] == [
        ("zone_entered", "whole", 1),
        ("zones_changed", None, None),
        ("zone_left", "whole", 1),
    ]
