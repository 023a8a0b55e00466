"""All routes of the API against a stand-in for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.live_standin import StandInHub, record

from pipeline.api.app import PAGE, create_app
from pipeline.api.models import clean
from pipeline.api.service import ApiSettings
from pipeline.api.tokens import TokenSet
from pipeline.detect.settings import FinderSettings
from pipeline.live.spec import LiveSettings
from pipeline.tracks.masks import mask_to_rle

TOKEN = "a-token-for-tests-0123456789"
CAMERA = "rtsp://root:hunter2@10.20.0.31/h264?sig=s3cr3t"
PROMPTS = {"objects": [{"id": 7, "category": "bag", "box": [4, 6, 20, 12]}]}


def make_client(hub: StandInHub, **settings: Any) -> TestClient:
    chosen: dict[str, Any] = {
        "tokens": TokenSet([TOKEN]),
        "networks": ("10.20.0.0/16",),
        "hub_seconds": 5.0,
        **settings,
    }
    app = create_app(hub, ApiSettings(**chosen), resolver=lambda host, port: ["10.20.0.99"])
    return TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False)


@pytest.fixture
def hub() -> StandInHub:
    return StandInHub()


@pytest.fixture
def client(hub: StandInHub) -> Iterator[TestClient]:
    with make_client(hub) as client:
        yield client


def add(client: TestClient, stream_id: str = "gate", **values: Any) -> Any:
    body = {"id": stream_id, "url": CAMERA, "detector": "motion", **values}
    return client.post("/v1/streams", json={k: v for k, v in body.items() if v is not None})


def test_add_and_look(client: TestClient, hub: StandInHub) -> None:
    answer = add(client, settings={"fps": 10.0, "transport": "udp", "max_objects": 3})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/v1/streams/gate"
    assert answer.json()["url"] == "rtsp://10.20.0.31/h264?sig=***"
    spec = hub.specs["gate"]
    assert spec.url == CAMERA
    assert (spec.settings.fps, spec.settings.transport, spec.settings.finder.max_objects) == (10.0, "udp", 3)
    hub.publish("gate")
    stream = client.get("/v1/streams/gate").json()
    assert stream["ledger"] == {
        "received": 8, "tracked": 1, "dropped": {"late": 4, "queue full": 1}, "corrupt": {"damaged": 1},
        "in_flight": 1,
    }  # fmt: skip
    assert stream["objects"] == [
        {"id": 1, "category": "person", "score": 0.875, "presence": 0.75, "area": 6, "bbox": [10, 12, 3, 2]}
    ]
    assert stream["lag_seconds"] == {"p50": 0.08, "p99": 0.31}
    assert [s["id"] for s in client.get("/v1/streams").json()["streams"]] == ["gate"]


def test_what_a_request_leaves_out_is_the_services_own(hub: StandInHub) -> None:
    own = LiveSettings(finder=FinderSettings(every=9, max_objects=20), box_segmenter="ellipse", fps=4)
    with make_client(hub, streams=own, detectors=("motion", "people")) as client:
        answer = add(client, detector="people", settings={"max_objects": 3})
        assert answer.status_code == 201, answer.text
        assert "available are motion, people" in add(client, "b", detector="cars").text
    assert hub.specs["gate"].settings == replace(own, finder=FinderSettings(every=9, max_objects=3))


def test_a_detector_with_a_file_is_one_that_was_allowed(hub: StandInHub) -> None:
    allowed = "onnx:/models/yolo 11.onnx"
    with make_client(hub, detectors=("motion", allowed)) as client:
        answer = add(client, detector=allowed, settings={"detect_classes": "person,car"})
        assert answer.status_code == 201, answer.text
        for other in (
            "onnx:/models/other.onnx",
            "onnx:",
            "onnx",
            "file:/etc/passwd",
            allowed + "\n",
            "a" * 65,
        ):
            refused = add(client, "b", detector=other)
            assert refused.status_code == 422, other
        named = add(client, "b", detector="file:/etc/passwd").json()
        assert "'file:/etc/passwd' is not allowed: available are motion, onnx:" in named["message"]
        assert add(client, "b", settings={"detect_classes": "person,"}).status_code == 422
    assert hub.specs["gate"].detector == allowed
    assert hub.specs["gate"].settings.finder.wanted == frozenset({"person", "car"})


def test_no_answer_holds_a_cameras_password(client: TestClient) -> None:
    texts = [add(client).text, add(client).text, client.get("/v1/streams").text]
    texts += [client.get("/v1/streams/gate").text, client.get("/metrics").text]
    texts += [
        add(client, "g2", url=CAMERA.replace("10.20", "10.99")).text,
        add(client, "g3", settings=3).text,
    ]
    texts += [add(client, "g4", url=CAMERA + " ").text, add(client, "g5", url=[CAMERA]).text]
    assert not [text for text in texts if "hunter2" in text or "s3cr3t" in text]


def test_an_id_is_made_of_the_url(client: TestClient, hub: StandInHub) -> None:
    made = add(client, None, url="rtsp://10.20.0.31/front").json()["id"]  # type: ignore[arg-type]
    assert made.startswith("front-")
    assert list(hub.specs) == [made]


def test_prompts_reach_the_hub_as_a_prompts_file(client: TestClient, hub: StandInHub) -> None:
    assert add(client, detector=None, prompts=PROMPTS).status_code == 201
    given = {"version": 1, "objects": [{"id": 7, "category": "bag", "box": [4.0, 6.0, 20.0, 12.0]}]}
    assert hub.specs["gate"].prompts == given
    assert client.patch("/v1/streams/gate", json={"prompts": PROMPTS}).status_code == 200
    assert hub.requests == [("gate", {"prompts": given})]


def test_objects_may_be_given_later(client: TestClient, hub: StandInHub) -> None:
    body = {"id": "gate", "url": CAMERA}
    refused = client.post("/v1/streams", json=body)
    assert refused.status_code == 422
    assert "nothing to follow" in refused.json()["message"]
    assert client.post("/v1/streams", json=body | {"detector": None}).status_code == 201
    assert (hub.specs["gate"].prompts, hub.specs["gate"].detector) == (None, None)


def test_a_mask_is_taken_by_its_runs(client: TestClient, hub: StandInHub) -> None:
    counts = mask_to_rle([[0, 1], [1, 1]])
    shown = {"objects": [{"rle": {"size": [2, 2], "counts": counts}}]}
    assert add(client, detector=None, prompts=shown).status_code == 201
    assert hub.specs["gate"].prompts == {"version": 1, **shown}


def test_pause_and_remove(client: TestClient, hub: StandInHub) -> None:
    add(client)
    assert client.patch("/v1/streams/gate", json={"pause": True}).json()["state"] == "paused"
    assert client.patch("/v1/streams/gate", json={"pause": False}).json()["state"] == "running"
    assert client.patch("/v1/streams/gate", json={"remove": [3, 4]}).status_code == 200
    assert hub.requests[-1] == ("gate", {"remove": [3, 4]})
    assert client.delete("/v1/streams/gate").status_code == 204
    assert hub.specs == {}


ZONES = {"zones": [{"name": "door", "polygon": [[1, 1], [9, 1], [9, 9]]}]}


def test_zones(client: TestClient, hub: StandInHub) -> None:
    url = "rtsp://10.20.0.31/h264"
    added = client.post("/v1/streams", json={"id": "a", "url": url, "detector": "motion", "zones": ZONES})
    assert added.status_code == 201, added.text
    assert hub.specs["a"].zones == ZONES
    assert client.patch("/v1/streams/a", json={"zones": {}}).status_code == 200
    assert client.patch("/v1/streams/a", json={"zones": ZONES}).status_code == 200
    assert hub.requests == [("a", {"zones": {}}), ("a", {"zones": ZONES})]
    crossed = {"zones": [{"name": "door", "polygon": [[0, 0], [9, 9], [9, 0], [0, 9]]}]}
    for answer in (
        client.patch("/v1/streams/a", json={"zones": crossed}),
        client.post("/v1/streams", json={"id": "b", "url": url, "detector": "motion", "zones": crossed}),
    ):
        assert answer.status_code == 422
        assert "crosses itself" in answer.json()["message"]
    elsewhere = {"zones": [{**ZONES["zones"][0], "streams": "gate-*"}]}
    answer = client.patch("/v1/streams/a", json={"zones": elsewhere})
    assert answer.status_code == 422
    assert "matches no stream" in answer.json()["message"]
    assert len(hub.requests) == 2
    shown = client.get("/v1/streams/a").json()["zones_file"]
    assert shown["zones"][0]["polygon"] == ZONES["zones"][0]["polygon"]
    assert client.patch("/v1/streams/a", json={"zones": shown}).status_code == 200  # as it was shown


def test_rename(client: TestClient, hub: StandInHub) -> None:
    add(client)
    answer = client.patch("/v1/streams/gate", json={"rename": {"id": 7, "category": "suitcase"}})
    assert answer.status_code == 200, answer.text
    assert hub.requests == [("gate", {"rename": {"id": 7, "category": "suitcase"}})]
    for wrong in ({"id": 7}, {"id": 0, "category": "x"}, {"id": 7, "category": ""}, {"id": 7, "category": 7}):
        assert client.patch("/v1/streams/gate", json={"rename": wrong}).status_code == 422
    assert len(hub.requests) == 1


def test_memory(client: TestClient, hub: StandInHub) -> None:
    assert client.get("/v1/streams/gate/memory").status_code == 404
    add(client)
    shown = client.get("/v1/streams/gate/memory").json()
    assert (shown["stream_id"], shown["time"]) == ("gate", 4)
    assert shown["frames"][0]["kind"] == "permanent"
    picture = client.get("/v1/streams/gate/memory/0.jpg")
    assert (picture.status_code, picture.content[:2]) == (200, b"\xff\xd8")
    assert picture.headers["content-type"] == "image/jpeg"
    for path, status in (("gate/memory/3.jpg", 404), ("door/memory/0.jpg", 404), ("gate/memory/-1.jpg", 422)):
        assert client.get(f"/v1/streams/{path}").status_code == status
    copy = {"copy": {"stream": "door", "object": 3}}
    edits: tuple[dict[str, Any], ...] = (
        {"forget": [4, 9]},
        {"forget": [4, 9], "object": 7},
        {"pin": 0},
        {"unpin": 3},
        copy,
        {**copy, "object": 9, "category": "bag"},
    )
    for edit in edits:
        answer = client.patch("/v1/streams/gate", json={"memory": edit})
        assert answer.status_code == 200, answer.text
    assert hub.requests == [("gate", {"memory": edit}) for edit in edits]
    for wrong in (
        {},
        {"pin": -1},
        {"pin": 1, "unpin": 1},
        {"pin": 1, "object": 1},
        {"forget": [9, 4]},
        {**copy, "pin": 1},
        {"pin": 1, "category": "bag"},
        {"copy": {"object": 3}},
        {"copy": {"stream": "door", "object": 3, "out": "s3://elsewhere"}},
        {"x": 1},
    ):
        assert client.patch("/v1/streams/gate", json={"memory": wrong}).status_code == 422
    assert len(hub.requests) == len(edits)


def test_what_requests_may_ask_for(client: TestClient) -> None:
    options = client.get("/v1/options").json()
    assert options["detectors"] == ["people", "motion"]
    assert (options["networks"], options["max_streams"]) == (["10.20.0.0/16"], 64)
    assert 554 in options["ports"]
    assert options["streams"]["policy"] == "latest"


def test_recent_events(client: TestClient, hub: StandInHub) -> None:
    add(client)
    hub.happened["gate"] = [
        {"kind": "gap", "name": CAMERA, "frame_index": 9, "detail": {"seconds": float("nan")}},
        {"kind": "object_added", "name": "prompt", "frame_index": 3, "object_id": 1},
    ]
    events = client.get("/v1/streams/gate/events").json()["events"]
    assert [(e["kind"], e["object_id"]) for e in events] == [("gap", None), ("object_added", 1)]
    assert "hunter2" not in events[0]["name"]
    assert events[0]["detail"] == {"seconds": None}
    assert len(client.get("/v1/streams/gate/events", params={"limit": 1}).json()["events"]) == 1
    assert client.get("/v1/streams/gate").json()["recent_events"] == events


def test_clicks_give_a_mask_for_a_prompt(client: TestClient, hub: StandInHub) -> None:
    add(client)
    answer = client.post("/v1/streams/gate/clicks", json={"clicks": [{"x": 160, "y": 260}]})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["rle"]["size"] == [480, 640]  # of the picture
    x, y, width, height = found["bbox"]
    assert abs(x - 100) + abs(y - 120) + abs(width - 130) + abs(height - 290) < 60, found
    assert 0.7 < found["area"] / (width * height) <= 1
    stroke = {"points": [[160, 200], [160.5, 330]]}
    scribbled = client.post("/v1/streams/gate/clicks", json={"strokes": [stroke]})
    assert scribbled.status_code == 200, scribbled.text
    assert 0.9 < scribbled.json()["area"] / found["area"] < 1.1
    prompt = {"objects": [{"category": "bar", "rle": found["rle"]}]}
    assert client.patch("/v1/streams/gate", json={"prompts": prompt}).status_code == 200
    for wrong, said in (
        ([{"x": 900, "y": 3}], "outside"),
        ([{"x": 9, "y": 3, "positive": False}], "positive"),
        ([], "clicks"),
    ):
        refused = client.post("/v1/streams/gate/clicks", json={"clicks": wrong})
        assert refused.status_code == 422
        assert said in refused.json()["message"]


def test_another_camera(client: TestClient, hub: StandInHub) -> None:
    add(client, settings={"fps": 10.0})
    url = "rtsp://root:hunter3@10.20.0.32/front"
    answer = client.patch("/v1/streams/gate", json={"url": url, "transport": "udp"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["url"] == "rtsp://10.20.0.32/front"
    assert "hunter3" not in answer.text
    assert hub.specs["gate"].url == url
    assert (hub.specs["gate"].settings.transport, hub.specs["gate"].settings.fps) == ("udp", 10.0)
    assert client.patch("/v1/streams/gate", json={"transport": "auto"}).status_code == 200
    assert (hub.specs["gate"].url, hub.specs["gate"].settings.transport) == (url, "auto")
    # Checked as that of a new stream is.
    for wrong in ("rtsp://root:hunter3@10.99.0.32/front", "http://10.20.0.32/", "rtsp://10.20.0.32:22/", "x"):
        refused = client.patch("/v1/streams/gate", json={"url": wrong})
        assert refused.status_code == 422
        assert "hunter3" not in refused.text
    assert client.patch("/v1/streams/gate", json={"transport": "sctp"}).status_code == 422
    assert hub.specs["gate"].url == url


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pause": True, "remove": [1]},
        {"pause": True, "transport": "udp"},
        {"pause": None},
        {"stop": True},
        [],
        "x",
        3,
    ],
)
def test_a_change_is_one_thing(client: TestClient, hub: StandInHub, change: Any) -> None:
    add(client)
    answer = client.patch("/v1/streams/gate", json=change)
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid"
    assert hub.requests == []


def test_tracks(client: TestClient, hub: StandInHub) -> None:
    add(client)
    for _ in range(5):
        hub.publish("gate")
    rows = client.get("/v1/streams/gate/tracks").json()["tracks"]
    assert [r["frame_index"] for r in rows] == [0, 1, 2, 3, 4]
    assert rows[0] == record(0)
    later = client.get("/v1/streams/gate/tracks", params={"since": 2, "limit": 1}).json()["tracks"]
    assert [r["frame_index"] for r in later] == [3]
    assert client.get("/v1/streams/gate/tracks", params={"limit": 0}).status_code == 422


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/streams/gate"),
        ("DELETE", "/v1/streams/gate"),
        ("PATCH", "/v1/streams/gate"),
        ("GET", "/v1/streams/gate/tracks"),
        ("GET", "/v1/streams/gate/events"),
        ("POST", "/v1/streams/gate/clicks"),
        ("GET", "/v1/streams/gate/frame.jpg"),
        ("GET", "/v1/streams/gate/preview.mjpeg"),
        ("POST", "/v1/streams/gate/ticket"),
    ],
)
def test_what_is_not_there(client: TestClient, method: str, path: str) -> None:
    body: Any = {"pause": True} if method == "PATCH" else None
    if path.endswith("clicks"):
        body = {"clicks": [{"x": 1, "y": 1}]}
    answer = client.request(method, path, json=body)
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_twice_and_too_many(client: TestClient, hub: StandInHub) -> None:
    assert add(client).status_code == 201
    assert (add(client).status_code, add(client).json()["code"]) == (409, "exists")
    hub.room = 1
    refused = add(client, "door")
    assert (refused.status_code, refused.json()["code"]) == (409, "no_room")
    assert "65000000 bytes" in refused.json()["message"]


def test_the_api_has_a_limit_of_its_own(hub: StandInHub) -> None:
    with make_client(hub, max_streams=1) as client:
        assert add(client).status_code == 201
        assert add(client, "door").json()["code"] == "no_room"


def test_pictures(client: TestClient, hub: StandInHub) -> None:
    add(client)
    picture = client.get("/v1/streams/gate/frame.jpg", params={"max_side": 128})
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content[:2] == b"\xff\xd8"
    assert client.get("/v1/streams/gate/frame.jpg", params={"max_side": 10**6}).status_code == 422
    stream = client.get("/v1/streams/gate/preview.mjpeg", params={"frames": 3, "fps": 30, "max_side": 128})
    assert stream.headers["content-type"] == "multipart/x-mixed-replace; boundary=xmem-frame"
    parts = stream.content.split(b"--xmem-frame\r\n")
    assert len(parts) == 4
    head, _, body = parts[1].partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body) - 2}".encode() in head
    assert body[:2] == b"\xff\xd8"


def test_viewers_are_counted(hub: StandInHub) -> None:
    with make_client(hub, max_viewers=1) as client:
        add(client)
        with client.websocket_connect("/v1/streams/gate/live"):
            refused = client.get("/v1/streams/gate/preview.mjpeg", params={"frames": 1})
            assert (refused.status_code, refused.json()["code"]) == (429, "too_many_viewers")
        for _ in range(3):
            assert client.get("/v1/streams/gate/preview.mjpeg", params={"frames": 1}).status_code == 200


def test_viewers_who_come_at_once_are_counted_too(hub: StandInHub) -> None:
    with make_client(hub, max_viewers=1) as client, ThreadPoolExecutor(6) as pool:
        add(client)
        watched = {"frames": 6}
        answers = list(
            pool.map(lambda _: client.get("/v1/streams/gate/preview.mjpeg", params=watched), range(6))
        )
    assert {a.status_code for a in answers} <= {200, 429}
    assert [a.content.count(b"--xmem-frame\r\n") for a in answers if a.status_code == 200 and a.content] == [
        6
    ]


def test_records_as_they_come(client: TestClient, hub: StandInHub) -> None:
    add(client)
    hub.publish("gate")
    with client.websocket_connect("/v1/streams/gate/live") as live:
        first = live.receive_json()
        assert first == {
            "type": "records", "stream_id": "gate", "seq": 0, "frame_index": 0, "records": [record(0)],
        }  # fmt: skip
        hub.publish("gate", record(1, 5))
        assert [r["object_id"] for r in live.receive_json()["records"]] == [5]
        client.delete("/v1/streams/gate")
        assert live.receive()["type"] == "websocket.close"
    assert hub.waits[0] == -1


def test_a_client_that_talks_is_shown_out(client: TestClient) -> None:
    add(client)
    with client.websocket_connect("/v1/streams/gate/live") as live:
        for _ in range(16):
            live.send_text("x" * 100)
        assert live.receive() == {"type": "websocket.close", "code": 1008, "reason": "send nothing"}


def test_the_hub_is_gone_or_slow(client: TestClient, hub: StandInHub) -> None:
    add(client)
    assert client.get("/readyz").json() == {"status": "ready"}
    hub.down = True
    for path in ("/v1/streams", "/v1/streams/gate", "/v1/streams/gate/frame.jpg", "/readyz", "/metrics"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), path
        assert answer.headers["retry-after"] == "2"
        assert "hunter2" not in answer.text
    assert client.get("/healthz").status_code == 200
    hub.down, hub.slow = False, True
    with make_client(hub, hub_seconds=0.05) as impatient:
        assert impatient.get("/v1/streams").status_code == 503
        assert impatient.get("/healthz").status_code == 200


def test_a_fault_of_ours_is_not_shown(
    client: TestClient, hub: StandInHub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault = RuntimeError(f"no connection to {CAMERA} in /srv/secret.py")
    answer = client.get("/v1/streams")
    assert answer.status_code == 500
    assert set(answer.json()) == {"code", "message", "request_id"}
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.json()["request_id"] in caplog.text
    assert "no connection to rtsp://10.20.0.31" in caplog.text
    assert "hunter2" not in caplog.text


def test_metrics(client: TestClient, hub: StandInHub) -> None:
    add(client)
    hub.publish("gate")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'xmem_frames_tracked_total{stream_id="gate"} 1.0' in answer.text


def test_page(client: TestClient) -> None:
    page = client.get("/", headers={"Authorization": ""})
    assert page.headers["content-type"].startswith("text/html")
    assert '<script type="module" src="page.js"' in page.text
    for path in PAGE:
        assert "innerHTML" not in client.get(path).text, path
    assert "javascript" in client.get("/stream.js").headers["content-type"]


def test_openapi_has_examples_and_says_who_may_ask(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert len(document["components"]["schemas"]["NewStream"]["examples"]) == 2
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert bool(route.get("security")) == (path.startswith("/v1") or path == "/metrics"), (
                path,
                method,
            )
    assert "hunter2" not in json.dumps(document)


def test_masks_are_left_as_they_are_and_nothing_else() -> None:
    counts = "PPYo0;SIG=m;PW=abcO10O1"  # such letters do come up in run lengths
    row = {"mask_rle": counts, "category": "x?sig=s3cret", "cause": f"at ?{counts}"}
    cleaned = clean(row)
    assert cleaned["mask_rle"] == counts
    assert cleaned["category"] == "x?sig=***"
    assert "abc" not in cleaned["cause"]
    assert clean({"mask_rle": "rtsp://u:p@h/x"}) == {"mask_rle": "rtsp://h/x"}
