"""`xmem serve` with a real camera while its hub, its replica and the whole service are killed."""

from __future__ import annotations

import os
import random
import signal
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from support.guarded import assert_guarded
from support.live_books import Committed
from support.ray_head import ray_head
from support.rtsp_camera import camera
from support.served import HUB, PATIENCE, REPLICA, Service, served
from support.sockets import listeners
from support.videos import make_video

CHAOS = "XMEM_CHAOS" in os.environ
ROUNDS = max(1, int(os.environ.get("XMEM_CHAOS", "1")) // 20)
PROMPTS = {"objects": [{"id": 3, "box": [20, 20, 40, 40]}]}
SLOW: dict[str, Any] = {"rate": 5, "time_base": Fraction(1, 5), "gop": 5}  # the camera: few frames to track
ANOTHER = {"prompts": {"objects": [{"id": 9, "box": [90, 60, 40, 40]}]}}


class Watcher:
    """A stream's frames as reported by the API, over all restarts of the service."""

    def __init__(self, service: Service, stream_id: str) -> None:
        self.service, self.path = service, f"/v1/streams/{stream_id}"
        self.seen: dict[tuple[int, int], datetime] = {}

    def look(self) -> datetime | None:
        """Time of the newest frame."""
        answer = self.service.get(f"{self.path}/tracks?limit=2000")
        if not answer or not answer["tracks"]:
            return None
        newest = None
        for row in answer["tracks"]:
            key, newest = (row["frame_index"], row["object_id"]), datetime.fromisoformat(row["wall_time"])
            assert self.seen.setdefault(key, newest) == newest, f"{key} is there a second time"
        return newest

    def newest(self) -> int:
        return max(index for index, _ in self.seen)

    def goes_on(self, after: datetime, ids: set[int]) -> None:
        """Wait for frames newer than a time that show exactly these objects."""
        # A look takes thousands of rows through three processes.
        self.service.until(lambda: (when := self.look()) and when > after, every=0.5)
        self.service.until(lambda: {o["id"] for o in self.status()["objects"]} == ids)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service.until(lambda: self.service.get(self.path))
        return found

    def durable(self) -> None:
        """Wait until the current frames are in a committed file."""
        reached = self.status()["next_frame"]
        self.service.until(
            lambda: (s := self.service.get(self.path)) and (s["committed_frames"] or 0) >= reached
        )


@pytest.mark.chaos
@pytest.mark.timeout(600 * (ROUNDS + 1))
def test_hub_replica_driver_and_raylet_killed(tmp_path: Path) -> None:
    clip, chance = make_video(tmp_path / "clip.mp4", 50, **SLOW), random.Random(5)
    restarts = certain = 0
    starts = 1
    with camera(clip) as made, served(tmp_path, made.port) as service:
        watcher = Watcher(service, "cam")
        service.until(lambda: service.get("/readyz"))
        added = service.client.post(
            "/v1/streams", json={"id": "cam", "url": made.url(), "prompts": PROMPTS, "settings": {}}
        )
        assert added.status_code == 201, added.text
        watcher.goes_on(datetime.now(UTC), {3})
        assert service.client.patch("/v1/streams/cam", json=ANOTHER).status_code == 200
        ids = {3, 9}
        watcher.goes_on(datetime.now(UTC), ids)
        watcher.durable()
        for _ in range(ROUNDS):
            kinds = ["hub", "replica", "driver"]
            if ROUNDS > 1:
                chance.shuffle(kinds)
            for kind in kinds:
                watcher.look()
                before, (hub,) = watcher.newest(), service.pids(HUB)
                if kind == "driver":
                    _has_said_that_it_serves(service, starts)
                    service.kill()
                    service.until(lambda: not service.pids())  # nobody tracks on
                    service.start()
                    starts += 1
                    service.until(lambda: service.get("/readyz"))
                else:
                    (victim,) = service.pids(HUB if kind == "hub" else REPLICA)
                    os.kill(victim, signal.SIGKILL)
                watcher.goes_on(datetime.now(UTC), ids)
                assert watcher.newest() > before
                assert (service.pids(HUB) == [hub]) == (kind == "replica")
                # One that is killed again before it has committed anything leaves no event of its own: the
                # next one tells of both.
                settles = ROUNDS == 1 or chance.random() < 0.5
                if settles:
                    watcher.durable()
                if kind != "replica":
                    restarts, certain = restarts + 1, certain + settles
        _has_said_that_it_serves(service, starts)
        _kill_raylet(service)
        service.start()
        watcher.goes_on(datetime.now(UTC), ids)
        watcher.durable()
        restarts, certain = restarts + 1, certain + 1
        for index in range(20):  # no answer is a server's error, and no request gets stuck, once it is back
            assert service.client.get("/v1/streams", timeout=30).status_code == 200, index
        assert service.client.delete("/v1/streams/cam").status_code == 204
        service.until(lambda: service.client.get("/v1/streams/cam").status_code == 404)
        _has_said_that_it_serves(service, starts + 1)
        assert service.stop() == 0, service.log.read_text(errors="replace")[-3000:]
    committed = Committed(service.out, "cam")
    assert committed.ids == ids
    assert [e["object_id"] for e in committed.of("object_added")] == [3, 9]
    assert committed.of("object_removed") == []
    found = committed.of("restart")
    assert certain <= len(found) <= restarts
    assert all(e["detail"]["snapshot"] is not None and e["detail"]["seconds"] > 0 for e in found)
    assert sum(e["detail"]["frames"] for e in found) == committed.sums("dropped")["restart"]
    stored = {(r["frame_index"], r["object_id"]): r["wall_time"] for r in committed.rows}
    assert len(stored) == len(committed.rows)
    told = {key: when for key, when in watcher.seen.items() if key in stored}
    assert len(told) > 50
    assert all(stored[key] == when for key, when in told.items())
    assert set(stored) - set(told)  # a look now and then does not show all


def _has_said_that_it_serves(service: Service, times: int) -> None:
    service.until(lambda: service.log.read_bytes().count(b"serving") == times)


def _kill_raylet(service: Service) -> None:
    """It ends all of the service, which says so in one line."""
    said = service.log.read_text()
    assert service.process is not None
    (hub,) = service.pids(HUB)
    (raylet,) = (pid for pid in service.pids() if Path(f"/proc/{pid}/comm").read_text() == "raylet\n")
    # The hub sees to it itself that it does not write on, whatever becomes of the driver.
    service.process.send_signal(signal.SIGSTOP)
    os.kill(raylet, signal.SIGKILL)
    service.until(lambda: hub not in service.pids(HUB))
    service.process.send_signal(signal.SIGCONT)
    assert service.process.wait(PATIENCE) == 1
    told = "xmem: error: Ray's raylet has died (exit code -9): run the command again\n"
    assert service.log.read_text().removeprefix(said) == told
    service.until(lambda: not service.pids())


@pytest.mark.chaos
@pytest.mark.skipif(not CHAOS, reason="takes a minute: make chaos runs it")
def test_on_a_cluster_a_killed_driver_is_not_even_missed(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 50, **SLOW)
    with camera(clip) as made, ray_head() as head, served(tmp_path, made.port, head.address) as service:
        watcher = Watcher(service, "cam")
        service.until(lambda: service.get("/readyz"))
        new = {"id": "cam", "url": made.url(), "prompts": PROMPTS}
        service.until(lambda: service.client.post("/v1/streams", json=new).status_code == 201)
        watcher.goes_on(datetime.now(UTC), {3})
        service.until(lambda: b"serving" in service.log.read_bytes())
        service.kill()
        watcher.goes_on(datetime.now(UTC), {3})
        watcher.durable()
        service.start()
        service.until(lambda: service.log.read_bytes().count(b"serving") == 2)
        watcher.goes_on(datetime.now(UTC), {3})
        assert service.stop() == 0, service.log.read_text(errors="replace")[-3000:]
        committed = Committed(service.out, "cam")
    assert committed.ids == {3}
    assert committed.of("restart") == []
    stored = {(r["frame_index"], r["object_id"]): r["wall_time"] for r in committed.rows}
    assert watcher.seen.items() <= stored.items()


def test_it_is_guarded_without_a_replica_it_refuses_requests_and_ctrl_c_says_nothing_of_ray(
    tmp_path: Path,
) -> None:
    with served(tmp_path, RAY_AUTH_MODE="disabled") as service:
        service.until(lambda: service.get("/readyz"))
        assert any("ServeReplica" in name for name, _, _ in listeners(service.pids()))
        assert_guarded(service.pids(), tmp_path)
        service.until(lambda: b"serving" in service.log.read_bytes())
        assert service.process is not None
        (replica,) = service.pids(REPLICA)
        os.kill(replica, signal.SIGKILL)
        answers = []

        def back() -> bool:
            answers.append(service.client.get("/v1/streams"))
            return answers[-1].status_code == 200 and service.pids(REPLICA) != [replica]

        service.until(back)
        refused = [answer for answer in answers if answer.status_code != 200]
        assert {answer.status_code for answer in refused} == {503}  # and they do not wait until it is there
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        assert refused[0].text == "the API is being restarted: try again"
        os.killpg(service.process.pid, signal.SIGINT)  # as a terminal does
        assert service.process.wait(PATIENCE) == 0
        service.until(lambda: not service.pids())
        assert service.log.read_text().splitlines() == [
            "no network is allowed (--allow-network): all cameras will be refused",
            f"serving http://127.0.0.1:{service.port} into {service.out}; Ctrl-C ends it",
            "closing: rows that are under way are committed",
        ]
