"""A live hub in a real Ray actor: found by name, killed, and restarted with its streams."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from support.live_books import Committed
from support.tiny import tiny_weights
from support.videos import make_video

from pipeline.base.errors import UsageError
from pipeline.distributed.actors import WATCHERS, live_actor, live_actor_name
from pipeline.live.camera.options import LiveOptions
from pipeline.live.hub.hub import HubSettings
from pipeline.live.recent import LiveView
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.tracking.settings import TrackSettings
from xmem_core import MemoryConfig

pytestmark = pytest.mark.usefixtures("local_ray")

PATIENCE = 60.0
MEMORY = MemoryConfig(mem_every=2, max_mid_term_frames=4, min_mid_term_frames=2, num_prototypes=4, top_k=8)


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if found := what():
                return found
        except RayActorError:
            pass  # it is being started again
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_killed_actor_is_back_by_itself(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 40, gop=10)
    out = tmp_path / "out"
    settings = HubSettings(
        str(out),
        tracking=TrackSettings.of(
            model=tiny_weights(tmp_path), memory=MEMORY, size=48, dtype="float32", threads=1
        ),
        options=LiveOptions(first_backoff_seconds=0.1, most_backoff_seconds=0.2),
        calibrate=False,
        secrets=str(tmp_path / "secrets"),
    )
    actor = live_actor(settings)
    same = ray.get_actor(live_actor_name("default"))
    spec = LiveSpec(
        "cam",
        f"file://{clip}",
        {"objects": [{"id": 3, "box": [20, 20, 40, 40]}]},
        settings=LiveSettings(fps=20, policy="every", rotate_seconds=0.3, snapshot_seconds=0.5),
    )
    assert ray.get(actor.add.remote(spec))["state"] == "starting"
    with pytest.raises(UsageError, match="is there already"):
        ray.get(same.add.remote(spec))
    status = until(lambda: (s := ray.get(actor.status.remote("cam")))["committed_frames"] and s)
    assert [o["id"] for o in status["objects"]] == [3]
    waiting = [
        actor.view.options(concurrency_group=WATCHERS).remote("cam", LiveView.wait, 10**9, 4.0)
        for _ in range(40)
    ]  # more than there are calls
    assert ray.get(actor.view.remote("cam", LiveView.jpeg))[:2] == b"\xff\xd8"
    assert ray.wait(waiting, num_returns=1, timeout=0)[0] == []
    assert ray.get(waiting) == [None] * 40
    asked = ray.get(actor.request.remote("cam", {"prompts": {"objects": [{"box": [80, 30, 30, 30]}]}}))
    newest = ray.get(actor.status.remote("cam"))["next_frame"]
    pid = ray.get(actor.pid.remote())

    os.kill(pid, signal.SIGKILL)
    ids = {3, *asked["ids"]}
    until(lambda: {o["id"] for o in ray.get(actor.status.remote("cam"))["objects"]} == ids)
    assert ray.get(actor.pid.remote()) != pid
    assert ray.get(actor.view.remote("cam", LiveView.tracks))[0]["frame_index"] >= newest
    last = ray.get(actor.remove.remote("cam", PATIENCE))
    ray.get(actor.close.remote())
    ray.kill(actor)
    committed = Committed(out, "cam")
    ledger = dict(last["ledger"])
    assert ledger.pop("in_flight") == 0
    assert committed.ledger() == ledger
    assert committed.ids == ids
    (restart,) = committed.of("restart")
    assert restart["detail"]["seconds"] > 0
