"""Hostile requests: all are refused, none causes an internal error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from support.live_standin import StandInHub

from pipeline.api.app import create_app
from pipeline.api.guard import LOOPBACK_HOSTS
from pipeline.api.service import ApiSettings
from pipeline.api.tokens import TicketOffice, TokenSet
from pipeline.tracks.masks import mask_to_rle

TOKEN = "a-token-for-tests-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CAMERA = "rtsp://10.20.0.31/h264"
NAMES = {
    "cam.example": ["10.20.0.5"],
    "inside.example": ["10.20.0.5", "169.254.169.254"],
    "home.example": ["127.0.0.1"],
}


def resolve(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise OSError("no such name")
    return NAMES[host]


def make_client(hub: StandInHub, *, tokens: bool = True, **settings: Any) -> TestClient:
    chosen = {"networks": ("10.20.0.0/16",), **settings}
    app = create_app(hub, ApiSettings(TokenSet([TOKEN]) if tokens else None, **chosen), resolver=resolve)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def door() -> Iterator[tuple[TestClient, StandInHub]]:
    """One application for all tests, as starting it takes longer than most requests."""
    hub = StandInHub()
    with make_client(hub) as client:
        client.headers.update(BEARER)
        yield client, hub


@pytest.fixture
def hub() -> StandInHub:
    return StandInHub()


@pytest.fixture
def client(door: tuple[TestClient, StandInHub], hub: StandInHub) -> TestClient:
    """The application in front of the `hub` of the same test."""
    door[1].__dict__ = hub.__dict__
    return door[0]


# --- addresses -----------------------------------------------------------------------------------

URLS = [
    "",
    "x",
    "http://10.20.0.31/",
    "https://10.20.0.31/",
    "file:///etc/passwd",
    "/etc/passwd",
    "concat:rtsp://10.20.0.31/",
    "rtp://10.20.0.31/x",
    "rtmp://10.20.0.31/x",
    "rtspt://10.20.0.31/x",
    "tcp://10.20.0.31:554",
    "RTSP:10.20.0.31",
    "rtsp://",
    "rtsp:///x",
    "rtsp://10.21.0.1/",
    "rtsp://127.0.0.1/",
    "rtsp://localhost/",
    "rtsp://home.example/",
    "rtsp://inside.example/",
    "rtsp://nowhere.example/",
    "rtsp://169.254.169.254/latest",
    "rtsp://[::1]/",
    "rtsp://[::ffff:127.0.0.1]/",
    "rtsp://[64:ff9b::7f00:1]/",
    "rtsp://0/",
    "rtsp://0x7f.1/",
    "rtsp://2130706433/",
    "rtsp://0177.0.0.1/",
    "rtsp://127.1/",
    "rtsp://10.20.0.31:22/",
    "rtsp://10.20.0.31:0/",
    "rtsp://10.20.0.31:99999/",
    "rtsp://10.20.0.31@127.0.0.1/",
    "rtsp://10.20.0.31#@127.0.0.1/",
    "rtsp://127.0.0.1\\@10.20.0.31/",
    "rtsp://10.20.0.31\r\nDESCRIBE x/",
    "rtsp://10.20.0.31/%0d%0aSETUP",
    "rtsp://10.20.0.31/\0",
    "rtsp://10.20.0.31/\ud800",
    " rtsp://10.20.0.31/",
    "rtsp://10.20.0.31 /",
    "rtsp://１０.20.0.31/",
    "rtsp://10.20.0.31/" + "x" * 3000,
    "rtsp://[fe80::1%25eth0]/",
    "rtsp://cam.example.:554:554/",
    "rtsp://cam..example/",
]


@pytest.mark.parametrize("url", URLS)
def test_urls(client: TestClient, hub: StandInHub, url: str) -> None:
    body = json.dumps({"id": "gate", "url": url, "detector": "motion"})
    answer = client.post("/v1/streams", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] in ("url_refused", "invalid")
    assert "169.254" not in answer.text or "169.254" in url  # what a name means in here is not told
    assert hub.specs == {}


def test_a_camera_by_name_is_let_through(client: TestClient, hub: StandInHub) -> None:
    body = {"id": "gate", "url": "rtsps://cam.example/x", "detector": "motion"}
    assert client.post("/v1/streams", json=body).status_code == 201


def test_without_networks_nothing_is_let_through(hub: StandInHub) -> None:
    with make_client(hub, networks=()) as client:
        body = {"url": CAMERA, "detector": "motion"}
        answer = client.post("/v1/streams", json=body, headers=BEARER)
        assert (answer.status_code, answer.json()["code"]) == (422, "url_refused")


# --- bodies --------------------------------------------------------------------------------------

BODIES: list[tuple[bytes, int]] = [
    (b"", 422),
    (b"{", 400),
    (b"null", 422),
    (b"[]", 422),
    (b'"x"', 422),
    (b"NaN", 422),
    (b"1e999", 422),
    (b"[" * 100_000, 400),
    (b'{"a":' * 50_000, 400),
    (b"9" * 5000, 400),
    (b"\xff\xfe{\0}\0", 422),
    (b"\x80", 400),
    (gzip.compress(b"{}"), 400),
    (b'{"url":"' + b"x" * 1_000_000 + b'"}', 422),
    (b" " * 2_000_000, 413),
    (b'{"url":"rtsp://10.20.0.31/","detector":"motion","\\ud800":1}', 422),
    (b'{"url":"rtsp://10.20.0.31/","detector":"motion","settings":{"ffmpeg_options":{"x":"y"}}}', 422),
    (b'{"url":"rtsp://10.20.0.31/","detector":"motion","settings":{"fps":NaN}}', 422),
    (b'{"url":"rtsp://10.20.0.31/","detector":"motion","settings":{"fps":1e400}}', 422),
    (b'{"url":"rtsp://10.20.0.31/","detector":"motion","settings":{"size":99999999999999999999999}}', 422),
    (b'{"url":"rtsp://10.20.0.31/","detector":"os.system"}', 422),
    (b'{"url":"rtsp://10.20.0.31/","detector":"other"}', 422),
    (b'{"url":"rtsp://10.20.0.31/"}', 422),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
def test_bodies(client: TestClient, hub: StandInHub, body: bytes, status: int) -> None:
    answer = client.post("/v1/streams", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text[:300]
    assert len(answer.content) < 2000
    assert hub.specs == {}


def test_a_body_of_unknown_length_is_limited_too(client: TestClient) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 65_536
            yield b"x" * 65_536

    assert client.post("/v1/streams", content=pieces()).status_code == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "99999999999999999999", "+5"])
def test_lengths(client: TestClient, length: str) -> None:
    answer = client.post("/v1/streams", content=b"{}", headers={"Content-Length": length})
    assert answer.status_code in (400, 413)


# --- masks, boxes --------------------------------------------------------------------------------

BOMB = {"size": [32768, 32768], "counts": [0, 2**30]}
OBJECTS: list[Any] = [
    {},
    {"id": 1},
    {"box": [0, 0, 10, 10], "rle": BOMB},
    {"rle": BOMB},
    {"rle": {"size": [32768, 32768], "counts": "0"}},
    {"rle": {"size": [4, 4], "counts": "o" * 400_000}},
    {"rle": {"size": [4, 4], "counts": "0" * 600_000}},
    {"rle": {"size": [4, 4], "counts": [17]}},
    {"rle": {"size": [4, 4], "counts": [-1, 17]}},
    {"rle": {"size": [4, 4], "counts": [16]}},
    {"rle": {"size": [4, 4], "counts": "\x7f\x00"}},
    {"rle": {"size": [4, 4], "counts": "ooooooooooooooooooooo"}},
    {"rle": {"size": [0, 4], "counts": [0]}},
    {"rle": {"size": [4], "counts": [16]}},
    {"rle": {"size": [4, 4], "counts": [0, 2**70]}},
    {"box": [0, 0, 0, 10]},
    {"box": [0, 0, -1, 10]},
    {"box": [0, 0, 10]},
    {"box": [0, 0, 10, 1e300]},
    {"box": "0,0,1,1"},
    {"box": [None, 0, 1, 1]},
    {"box": [True, 0, 1, 1]},
    {"polygons": []},
    {"polygons": [[1, 2, 3, 4]]},
    {"polygons": [[1, 2, 3, 4, 5, 6, 7]]},
    {"polygons": [[0.0] * 5000]},
    {"polygons": [[0, 0, 1, 1, 2, 0]] * 17},
    {"id": 0, "box": [0, 0, 1, 1]},
    {"id": 2**31, "box": [0, 0, 1, 1]},
    {"id": True, "box": [0, 0, 1, 1]},
    {"id": "1", "box": [0, 0, 1, 1]},
    {"category": "", "box": [0, 0, 1, 1]},
    {"category": "x" * 101, "box": [0, 0, 1, 1]},
    {"category": "\ud800", "box": [0, 0, 1, 1]},
    {"frame": 3, "box": [0, 0, 1, 1]},
]


@pytest.mark.parametrize("shown", OBJECTS, ids=range(len(OBJECTS)))
def test_masks(client: TestClient, hub: StandInHub, shown: Any) -> None:
    client.post("/v1/streams", json={"id": "gate", "url": CAMERA, "detector": "motion"})
    body = json.dumps({"prompts": {"objects": [shown]}})
    answer = client.patch("/v1/streams/gate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text[:300]
    assert len(answer.content) < 1000
    assert hub.requests == []


def test_many_objects(client: TestClient, hub: StandInHub) -> None:
    client.post("/v1/streams", json={"id": "gate", "url": CAMERA, "detector": "motion"})
    boxes = [{"id": n, "box": [0, 0, 1, 1]} for n in range(1, 34)]
    assert client.patch("/v1/streams/gate", json={"prompts": {"objects": boxes}}).status_code == 422
    assert client.patch("/v1/streams/gate", json={"prompts": {"objects": boxes[:32]}}).status_code == 200
    twice = {"objects": [boxes[0], boxes[0]]}
    assert client.patch("/v1/streams/gate", json={"prompts": twice}).status_code == 422
    good = {"objects": [{"rle": {"size": [2, 2], "counts": mask_to_rle([[0, 1], [0, 0]])}}]}
    assert client.patch("/v1/streams/gate", json={"prompts": good}).status_code == 200


# --- ids and paths -------------------------------------------------------------------------------

IDS = [
    "..",
    "%2e%2e",
    "a%2Fb",
    "a/b",
    "a%00",
    "a%0a",
    "-a",
    ".a",
    "a b",
    "%F0%9F%92%A9",
    "a'--",
    "x" * 129,
    "a;b",
    "%ff",
    "a%3Fb",
    "a\\b",
    "a%5Cb",
    "%252e%252e%252f",
]


@pytest.mark.parametrize("stream_id", IDS)
@pytest.mark.parametrize(
    ("method", "rest"), [("GET", ""), ("DELETE", ""), ("GET", "/tracks"), ("GET", "/frame.jpg")]
)
def test_ids(client: TestClient, stream_id: str, method: str, rest: str) -> None:
    answer = client.request(method, f"/v1/streams/{stream_id}{rest}")
    assert answer.status_code in (404, 405, 422), answer.text


@pytest.mark.parametrize("stream_id", ["..", "a/b", "", "x" * 129, "-a", "a\n", "ä", 3, None, ["a"], "a\0"])
def test_ids_in_bodies(client: TestClient, hub: StandInHub, stream_id: Any) -> None:
    answer = client.post("/v1/streams", json={"id": stream_id, "url": CAMERA})
    assert answer.status_code == 422
    assert hub.specs == {}


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/page.js/../tokens.py", "/%2e%2e/errors.py", "/docs", "/static/"]
)
def test_paths(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (200, 404)
    assert "Plain data" not in client.get(path).text


# --- who asks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-token-wrong-token"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Cookie": TOKEN},
    ],
)
def test_without_a_token(hub: StandInHub, headers: dict[str, str]) -> None:
    with make_client(hub) as client:
        client.post("/v1/streams", json={"id": "gate", "url": CAMERA, "detector": "motion"}, headers=BEARER)
        for method, path in [
            ("GET", "/v1/streams"),
            ("POST", "/v1/streams"),
            ("DELETE", "/v1/streams/gate"),
            ("GET", "/v1/streams/gate/frame.jpg"),
            ("GET", f"/v1/streams/gate/frame.jpg?ticket={TOKEN}"),
            ("POST", "/v1/streams/gate/ticket"),
            ("GET", "/metrics"),
            ("GET", "/v1/nothing"),
            ("GET", "//v1/streams"),
        ]:
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Bearer")
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/v1/streams/gate/live", headers=headers),
        ):
            pass
    assert list(hub.specs) == ["gate"]


def test_two_authorization_headers_count_as_none(hub: StandInHub) -> None:
    with make_client(hub) as client:
        twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer x")]
        assert client.get("/v1/streams", headers=twice).status_code == 401


def test_a_ticket_reads_one_stream_and_nothing_else(hub: StandInHub) -> None:
    with make_client(hub) as client:
        for name in ("gate", "door"):
            client.post("/v1/streams", json={"id": name, "url": CAMERA, "detector": "motion"}, headers=BEARER)
        ticket = client.post("/v1/streams/gate/ticket", headers=BEARER).json()["ticket"]
        query = f"?ticket={ticket}"
        assert client.get(f"/v1/streams/gate/frame.jpg{query}").status_code == 200
        assert client.get(f"/v1/streams/gate/preview.mjpeg{query}&frames=1").status_code == 200
        with client.websocket_connect(f"/v1/streams/gate/live{query}"):
            pass
        assert client.get(f"/v1/streams/door/frame.jpg{query}").status_code == 401
        assert client.get(f"/v1/streams/gate{query}").status_code == 401
        assert client.delete(f"/v1/streams/gate{query}").status_code == 401
        assert client.post(f"/v1/streams/gate/ticket{query}").status_code == 401
        assert client.get(f"/v1/streams/gate/frame.jpg{query}&ticket={ticket}").status_code == 401
        old = TicketOffice(key=b"k" * 32).issue("gate")
        assert client.get(f"/v1/streams/gate/frame.jpg?ticket={old}").status_code == 401


def test_pages_of_other_sites(hub: StandInHub) -> None:
    """Without tokens, on loopback: protection from web pages that the user visits."""
    with make_client(hub, tokens=False, hosts=LOOPBACK_HOSTS) as client:
        client.base_url = "http://127.0.0.1:8000"
        body = {"id": "gate", "url": CAMERA, "detector": "motion"}
        assert client.post("/v1/streams", json=body, headers={"Host": "evil.example:8000"}).status_code == 421
        assert client.get("/v1/streams", headers={"Host": "127.0.0.1.evil.example"}).status_code == 421
        assert (
            client.post("/v1/streams", json=body, headers={"Origin": "http://evil.example"}).status_code
            == 403
        )
        assert client.post("/v1/streams", json=body, headers={"Origin": "null"}).status_code == 403
        assert client.get("/v1/streams", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert hub.specs == {}
        own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
        assert client.post("/v1/streams", json=body, headers=own).status_code == 201
        live = "ws://127.0.0.1:8000/v1/streams/gate/live"
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect(live, headers={"Origin": "http://e.example"}),
        ):
            pass
        with client.websocket_connect(live, headers={"Origin": "http://127.0.0.1:8000"}):
            pass
        assert client.get("/v1/streams", headers={"Host": "[::1]:8000"}).status_code == 200


def test_headers_for_browsers(client: TestClient) -> None:
    for path in ("/", "/v1/streams", "/nothing", "/openapi.json"):
        headers = client.get(path, headers={"Origin": "http://testserver"}).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers


def test_request_ids_are_taken_only_if_harmless(client: TestClient) -> None:
    assert (
        client.get("/healthz", headers={"X-Request-Id": "abcd-1234"}).headers["x-request-id"] == "abcd-1234"
    )
    for bad in ("a", "x" * 65, "a b c d e f g", "<script>alert(1)</script>"):
        assert client.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad
