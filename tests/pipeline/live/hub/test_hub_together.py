"""Streams of a hub that are tracked together, as on a GPU: rows and failures are those of streams alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live_books import Committed
from support.live_fake import HEIGHT, WIDTH
from support.live_scripted import ScriptedFeed
from support.small_net import SMALL_MEMORY, frame_at, small_model, square

from pipeline.live.camera.ledger import Ledger
from pipeline.live.hub.hub import HubSettings, LiveHub
from pipeline.live.hub.together import EXPECTED_SECONDS, MOST_TOGETHER, WAIT_SECONDS
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.masks import mask_to_rle
from xmem_core import VideoSegmenter

PATIENCE = 60.0
FRAMES = 16


def prompts(*ids: int) -> dict[str, Any]:
    masks = {i: square(HEIGHT, WIDTH, 8, 4 + 16 * k, 14) for k, i in enumerate(ids)}
    return {
        "objects": [
            {"id": i, "rle": {"size": [HEIGHT, WIDTH], "counts": mask_to_rle(mask)}}
            for i, mask in masks.items()
        ]
    }


def until(what: Callable[[], Any], about: Callable[[], Any] = str) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, f"it never came: {about()}"
        time.sleep(0.01)


class Batches:
    """A segmenter that notes how many streams advance at once."""

    def __init__(self, *, joint: bool) -> None:
        self.segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, batch_streams=joint)
        self.sizes: list[int] = []
        step, step_each = self.segmenter.step, self.segmenter.step_each

        def noted_step(*given: Any) -> Any:
            self.sizes.append(1)
            return step(*given)

        def noted_each(steps: Any) -> Any:
            self.sizes.append(len(steps))
            return step_each(steps)

        self.segmenter.step = noted_step  # type: ignore[assignment, method-assign]
        self.segmenter.step_each = noted_each  # type: ignore[method-assign]


@pytest.fixture
def hubs() -> Iterator[list[LiveHub]]:
    made: list[LiveHub] = []
    yield made
    for hub in made:
        hub.close()


def hub_of(out: Path, batches: Batches, feed: Any, hubs: list[LiveHub], **more: Any) -> LiveHub:
    settings = HubSettings(
        str(out),
        tracking=TrackSettings.of(memory=SMALL_MEMORY, threads=1),
        calibrate=False,
        first_backoff_seconds=0.05,
        **more,
    )
    hubs.append(LiveHub(settings, segmenter=batches.segmenter, open_feed=feed))
    return hubs[-1]


def spec(name: str, *ids: int, **settings: Any) -> LiveSpec:
    quick = {"rotate_seconds": 0.3, "snapshot_seconds": 0.5} | settings
    return LiveSpec(
        name, "fake://cam?fps=40", prompts(*ids) if ids else None, settings=LiveSettings.from_dict(quick)
    )


class Cameras:
    """Cameras that show the same pictures in every run, as far as the test allows."""

    def __init__(self) -> None:
        self.feeds: dict[str, ScriptedFeed] = {}
        self.allowed = 0

    def __call__(self, spec: LiveSpec, ledger: Ledger) -> ScriptedFeed:
        offset = 30 * int(spec.stream_id[-1])
        feed = ScriptedFeed(spec, ledger, lambda i: frame_at(i + offset))
        feed.allowed = self.allowed
        self.feeds[spec.stream_id] = feed
        return feed

    def show(self, allowed: int, *names: str) -> None:
        self.allowed = allowed
        for name in names or self.feeds:
            self.feeds[name].allowed = allowed


def tracked(hub: LiveHub, name: str) -> int:
    return int(hub.status(name)["ledger"]["tracked"])


def rows_of(joint: bool, out: Path, hubs: list[LiveHub]) -> tuple[dict[str, Committed], Batches]:
    batches, cameras = Batches(joint=joint), Cameras()
    hub = hub_of(out, batches, cameras, hubs)
    names = {"cam-0": (1, 2), "cam-1": (7,), "cam-2": (), "cam-3": (3, 4, 5)}
    for name, ids in names.items():
        hub.add(spec(name, *ids))
    until(lambda: len(cameras.feeds) == 4)
    for allowed in (FRAMES // 2, FRAMES):
        cameras.show(allowed)
        until(lambda n=allowed: all(tracked(hub, name) == n for name in names), hub.list)  # type: ignore[misc]
        if allowed < FRAMES:
            hub.request("cam-1", {"prompts": prompts(9)})
    for name in names:
        hub.remove(name, wait=PATIENCE)
    return {name: Committed(out, name) for name in names}, batches


def test_rows_are_those_of_streams_that_are_tracked_one_by_one(tmp_path: Path, hubs: list[LiveHub]) -> None:
    alone, one = rows_of(False, tmp_path / "alone", hubs)
    together, joint = rows_of(True, tmp_path / "together", hubs)
    assert set(one.sizes) == {1}
    assert max(joint.sizes) == 4
    for name, committed in alone.items():
        other = together[name]
        assert other.ledger() == committed.ledger()
        assert len(other.rows) == len(committed.rows)
        for a, b in zip(committed.rows, other.rows, strict=True):
            for key in a:
                if key in ("score", "presence"):  # rounding
                    assert b[key] == pytest.approx(a[key], abs=1e-4)
                else:
                    assert b[key] == a[key], (name, a["frame_index"], key)
        assert [e["kind"] for e in other.events] == [e["kind"] for e in committed.events]


def test_a_stream_that_fails_leaves_the_others_of_its_batch_alone(
    tmp_path: Path, hubs: list[LiveHub], caplog: pytest.LogCaptureFixture
) -> None:
    cameras = Cameras()
    hub = hub_of(tmp_path / "out", Batches(joint=True), cameras, hubs)
    names = [f"cam-{k}" for k in range(3)]
    for name in names:
        hub.add(spec(name, 1))
    until(lambda: len(cameras.feeds) == 3)
    cameras.show(4)
    until(lambda: all(tracked(hub, name) == 4 for name in names), hub.list)
    first, failing = cameras.feeds["cam-1"], hub._streams["cam-1"].tracker
    assert failing is not None
    memory: Any = failing.state.memory

    def broken(*given: Any, **options: Any) -> Any:
        raise RuntimeError("a damaged memory")

    memory.choose = broken
    cameras.show(10)
    until(lambda: cameras.feeds["cam-1"] is not first)  # it was closed, and opened again
    until(lambda: all(tracked(hub, name) == 10 for name in ("cam-0", "cam-2")), hub.list)
    cameras.show(20)
    until(lambda: tracked(hub, "cam-1") > 10, hub.list)
    assert "stream cam-1: Traceback" in caplog.text
    assert "a damaged memory" in caplog.text
    for name in names:
        hub.remove(name, wait=PATIENCE)
        committed = Committed(tmp_path / "out", name)
        assert committed.sums("dropped") == ({"failed": 1} if name == "cam-1" else {}), name


def test_only_streams_that_were_just_tracked_are_waited_for(tmp_path: Path, hubs: list[LiveHub]) -> None:
    cameras, waits = Cameras(), list[float]()
    hub = hub_of(tmp_path / "out", Batches(joint=True), cameras, hubs)
    stop: Any = hub._stop
    wait = stop.wait

    def noted(seconds: float | None = None) -> bool:
        waits.append(seconds or 0.0)
        return bool(wait(seconds))

    stop.wait = noted
    for name in ("cam-0", "cam-1"):
        hub.add(spec(name, 1))
    until(lambda: len(cameras.feeds) == 2)
    cameras.show(3)
    until(lambda: all(tracked(hub, name) == 3 for name in ("cam-0", "cam-1")), hub.list)
    hub._streams["cam-1"].tracked_at = time.monotonic() + 3600  # as if it were always just tracked
    cameras.show(6, "cam-0")
    until(lambda: tracked(hub, "cam-0") == 6, hub.list)
    assert 0 < max(waits) <= WAIT_SECONDS
    hub._streams["cam-1"].tracked_at = time.monotonic() - EXPECTED_SECONDS
    waits.clear()
    cameras.show(9, "cam-0")
    until(lambda: tracked(hub, "cam-0") == 9, hub.list)
    assert not waits


def test_no_batch_has_more_streams_than_allowed(tmp_path: Path, hubs: list[LiveHub]) -> None:
    batches, cameras = Batches(joint=True), Cameras()
    hub = hub_of(tmp_path / "out", batches, cameras, hubs)
    names = [f"cam-{k}" for k in range(MOST_TOGETHER + 2)]
    for name in names:
        hub.add(spec(name))  # without objects: fast
    until(lambda: len(cameras.feeds) == len(names))
    cameras.show(6)
    until(lambda: all(tracked(hub, name) == 6 for name in names), hub.list)
    assert max(batches.sizes) == MOST_TOGETHER
    assert sum(batches.sizes) == 6 * len(names)
