"""Live streams from real cameras in a hub: outages, a changed size, the motion detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.live_books import Committed
from support.live_reader import options
from support.rtsp_camera import camera
from support.small_net import SMALL_MEMORY, small_model
from support.videos import make_video
from test_hub import PATIENCE, QUICK, tracked, until

from pipeline.base.errors import UsageError
from pipeline.live.hub.hub import HubSettings, LiveHub
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.tracking.settings import TrackSettings
from xmem_core import VideoSegmenter

BOX = {"objects": [{"id": 1, "box": [20, 20, 40, 40]}]}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        make_video(folder / "plain.mp4", 50, gop=10),
        make_video(folder / "large.mp4", 50, width=320, height=240, gop=10),
    ]


def hub_of(out: Path, **more: Any) -> LiveHub:
    settings = HubSettings(
        str(out),
        tracking=TrackSettings.of(memory=SMALL_MEMORY, size=48, threads=1),
        options=options(),
        calibrate=False,
        secrets=str(out) + "-secrets",
        **more,
    )
    return LiveHub(settings, segmenter=VideoSegmenter(small_model(), SMALL_MEMORY, size=48))


def spec(name: str, url: str, **more: Any) -> LiveSpec:
    settings = LiveSettings.from_dict(QUICK | {"policy": "latest"} | more.pop("settings", {}))
    return LiveSpec(name, url, more.pop("prompts", BOX), settings=settings, **more)


def test_objects_outlive_outages_and_another_size(tmp_path: Path, clips: list[Path]) -> None:
    out = tmp_path / "out"
    with camera(clips[0]) as made, hub_of(out) as hub:
        for name in ("a", "b"):
            hub.add(spec(name, made.url()))
        for name in ("a", "b"):
            tracked(hub, name)
        made.kill()
        until(lambda: hub.status("a")["state"] == "waiting")
        assert hub.status("a")["cause"]
        assert hub.metrics()["a"]["up"] == 0
        made.start({"/live": [clips[1]]})
        for name in ("a", "b"):
            until(lambda: hub.status(name)["width"] == 320)  # noqa: B023
            tracked(hub, name)
            assert [o["id"] for o in hub.status(name)["objects"]] == [1]
        last = {name: hub.remove(name, wait=PATIENCE) for name in ("a", "b")}
    for name in ("a", "b"):
        committed = Committed(out, name)
        ledger = dict(last[name]["ledger"])
        assert ledger.pop("in_flight") == 0
        assert committed.ledger() == ledger
        assert committed.ids == {1}
        assert {r["frame_width"] for r in committed.rows} == {160, 320}
        assert len(committed.of("gap")) == len(committed.of("reconnect")) == 1
        assert len(committed.of("resized")) == 1
        assert committed.of("restart") == []
        assert all(r["wall_time"] is not None for r in committed.rows)


def test_another_url_and_transport_keep_objects_and_books(tmp_path: Path, clips: list[Path]) -> None:
    out = tmp_path / "out"
    with camera(clips[0]) as old, camera(clips[1], user="root:geheim-1", transport="udp") as new:
        with hub_of(out) as hub:
            hub.add(spec("cam", old.url(), settings={"transport": "tcp"}))
            before = tracked(hub, "cam")
            hub.request("cam", {"camera": {"url": new.url(user="root:geheim-1"), "transport": "udp"}})
            assert hub.status("cam")["url"] == new.url()
            until(lambda: hub.status("cam")["width"] == 320)
            tracked(hub, "cam")
            status = hub.status("cam")
            assert status["ledger"]["tracked"] > before
            assert [o["id"] for o in status["objects"]] == [1]
            assert status["settings"]["transport"] == "udp"
            for wrong in ({}, {"url": "nowhere"}, {"transport": "sctp"}, {"fps": 3}, "rtsp://x/"):
                with pytest.raises(UsageError):
                    hub.request("cam", {"camera": wrong})
            with pytest.raises(UsageError, match="there is no stream"):
                hub.request("other", {"camera": {"transport": "tcp"}})
        for path in out.rglob("*"):
            assert path.is_dir() or b"geheim-1" not in path.read_bytes()
        with hub_of(out) as again:  # it was durable
            tracked(again, "cam")
            assert again.status("cam")["width"] == 320
            last = again.remove("cam", wait=PATIENCE)
    committed = Committed(out, "cam")
    ledger = dict(last["ledger"])
    assert ledger.pop("in_flight") == 0
    assert committed.ledger() == ledger
    assert committed.ids == {1}
    assert [e["object_id"] for e in committed.of("object_added")] == [1]
    assert committed.of("object_removed") == []
    assert {r["frame_width"] for r in committed.rows} == {160, 320}
    assert len(committed.of("restart")) == 2


def test_a_camera_that_failed_for_good_can_be_replaced(tmp_path: Path, clips: list[Path]) -> None:
    with camera(clips[0]) as made, hub_of(tmp_path / "out") as hub:
        hub.add(spec("cam", "rtsp://127.0.0.1:1/live"))
        until(lambda: hub.status("cam")["cause"])
        hub.request("cam", {"camera": {"url": made.url()}})
        tracked(hub, "cam")
        assert hub.status("cam")["state"] == "running"


def test_what_moves_is_found_and_kept(tmp_path: Path) -> None:
    from pipeline.testing.detectors import drawn_scene

    clip = make_video(tmp_path / "walk.mp4", [f.image for f in drawn_scene(100)], gop=10)
    out = tmp_path / "out"
    with camera(clip) as made, hub_of(out) as hub:
        hub.add(spec("door", made.url(), prompts=None, detector="motion", settings={"max_objects": 3}))
        objects = until(lambda: hub.status("door")["objects"])
        assert objects[0]["id"] >= 1
        tracked(hub, "door")
        last = hub.remove("door", wait=PATIENCE)
    committed = Committed(out, "door")
    ledger = dict(last["ledger"])
    assert ledger.pop("in_flight") == 0
    assert committed.ledger() == ledger
    added = committed.of("object_added")
    assert {e["reason"] for e in added} == {"detector"}
    assert committed.ids == {e["object_id"] for e in added}
