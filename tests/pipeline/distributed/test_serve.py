"""The application in a real Ray Serve, in front of a fake hub in a real actor."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import warnings
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import ray
from support import live_standin
from support.live_standin import StandInHub
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from pipeline.api import slow_clients
from pipeline.api.service import ApiSettings
from pipeline.api.tokens import TokenSet
from pipeline.base.errors import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own modules use what pydantic calls deprecated
    from ray import serve

    from pipeline.distributed.actors import WATCHERS
    from pipeline.distributed.serve import NAMESPACE, HubPlace, application, settings_from

# So do some of its functions when they are called.
pytestmark = pytest.mark.filterwarnings("ignore:::ray.*", "ignore::pydantic.PydanticDeprecatedSince20")

TOKEN = "a-token-for-tests-0123456789"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
CAMERA = "rtsp://root:hunter2@10.20.0.31/h264"


def start_hub(name: str) -> Any:
    """The actor's process cannot import modules beside the tests: the class is pickled by value."""
    ray.cloudpickle.register_pickle_by_value(live_standin)
    try:
        options = {"name": name, "namespace": NAMESPACE, "max_concurrency": 50, "num_cpus": 0}
        # `options` takes no concurrency groups.
        remote: Any = ray.remote
        actor = remote(concurrency_groups={WATCHERS: 50})(StandInHub).options(**options).remote()
        ray.get(actor.capacity.remote())
    finally:
        ray.cloudpickle.unregister_pickle_by_value(live_standin)
    return actor


@pytest.fixture(scope="module")
def service(local_ray: None) -> Iterator[str]:
    """The service's address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    try:
        hub = start_hub("hub-one")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        api = ApiSettings(TokenSet([TOKEN]), ("10.20.0.0/16",), hosts=("127.0.0.1",), hub_seconds=20.0)
        serve.run(application(api, HubPlace("hub-one")), name="xmem-live", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        del hub
    finally:
        serve.shutdown()


def test_a_stream_from_post_to_websocket(service: str) -> None:
    with httpx.Client(base_url=service, headers=HEADERS, timeout=60) as client:
        added = client.post("/v1/streams", json={"id": "gate", "url": CAMERA, "detector": "motion"})
        assert added.status_code == 201, added.text
        assert "hunter2" not in added.text
        assert client.get("/v1/streams/none").status_code == 404
        ticket = client.post("/v1/streams/gate/ticket").json()["ticket"]
        hub = ray.get_actor("hub-one", namespace=NAMESPACE)
        ray.get(hub.publish.remote("gate"))
        live = service.replace("http", "ws") + f"/v1/streams/gate/live?ticket={ticket}"
        with connect(live, open_timeout=60) as socket:
            news = json.loads(socket.recv(timeout=60))
            assert (news["seq"], news["records"][0]["object_id"]) == (0, 1)
        preview = httpx.get(
            f"{service}/v1/streams/gate/preview.mjpeg?frames=2&max_side=64&ticket={ticket}", timeout=60
        )
        assert preview.content.count(b"--xmem-frame\r\n") == 2
        assert 'xmem_frames_tracked_total{stream_id="gate"} 1.0' in client.get("/metrics").text


def test_who_has_no_token_stays_outside(service: str) -> None:
    assert httpx.get(f"{service}/v1/streams", timeout=60).status_code == 401
    assert httpx.get(f"{service}/healthz", timeout=60).status_code == 200
    assert httpx.get(f"{service}/", headers={"Host": "evil.example"}, timeout=60).status_code == 421
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(service.replace("http", "ws") + "/v1/streams/gate/live"),
    ):
        pass
    assert caught.value.response.status_code == 403


def test_clients_that_send_half_a_request_keep_nobody_out(service: str) -> None:
    """As many bodies as the replica has slots, and more heads than may wait: the oldest are closed."""
    port = int(service.rpartition(":")[2])
    head = b"POST /v1/streams HTTP/1.1\r\nHost: 127.0.0.1\r\n" + f"Authorization: Bearer {TOKEN}\r\n".encode()
    with contextlib.ExitStack() as stack:

        def sent(data: bytes) -> socket.socket:
            end = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            end.sendall(data)
            return end

        heads = [sent(head) for _ in range(slow_clients.MOST_IDLE_PER_CLIENT + 20)]
        bodies = [sent(head + b"Content-Length: 100\r\n\r\n{") for _ in range(210)]
        with httpx.Client(base_url=service, headers=HEADERS, timeout=60) as client:
            assert client.get("/v1/streams").status_code == 200
            assert client.post("/v1/streams", json={"id": "x"}).status_code == 422
        assert heads[0].recv(100) == b""
        assert bodies[0].recv(100).startswith(b"HTTP/1.1 503")


def test_a_body_in_pieces_has_the_same_limit(service: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"[" * 65_536

    try:
        answer = httpx.post(f"{service}/v1/streams", content=pieces(), headers=HEADERS, timeout=60)
    except httpx.TransportError:  # cut off while it was still sending
        return
    assert answer.status_code == 413


def test_a_hub_that_died_is_503_and_found_again(service: str) -> None:
    ray.kill(ray.get_actor("hub-one", namespace=NAMESPACE))
    with httpx.Client(base_url=service, headers=HEADERS, timeout=60) as client:
        assert client.get("/healthz").status_code == 200
        statuses = {client.get("/readyz").status_code for _ in range(3)}
        assert statuses == {503}
        hub = start_hub("hub-one")
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert client.get("/v1/streams").json() == {"streams": []}
        del hub


def test_settings_from_words() -> None:
    words = {
        "out": "s3://b/live",
        "allow_network": "10.0.0.0/8, 192.168.1.7",
        "threads": "4",
        "hosts": "a.example",
    }
    api, place = settings_from(words, {"XMEM_API_TOKENS": TOKEN})
    assert api.tokens is not None
    assert api.tokens.allows(TOKEN)
    assert api.networks == ("10.0.0.0/8", "192.168.1.7")
    assert api.hosts == ("a.example",)
    assert place.settings is not None
    assert (place.name, place.settings.tracking.model.threads) == ("xmem-live-default", 4)
    guard = place.settings.options.guard
    assert guard is not None
    assert [str(n) for n in guard.networks] == ["10.0.0.0/8", "192.168.1.7/32"]


@pytest.mark.parametrize(
    ("words", "tokens", "said"),
    [
        ({"out": "o"}, "", "no token"),
        ({}, TOKEN, "'out' is missing"),
        ({"out": "o", "alow_network": "10.0.0.0/8"}, TOKEN, "unknown option 'alow_network'"),
        ({"out": "o", "allow_network": "10.0.0.1/8"}, TOKEN, "10.0.0.1/8"),
        ({"out": "o", "threads": "many"}, TOKEN, "threads: 'many' is not a whole number"),
    ],
)
def test_wrong_words(words: dict[str, str], tokens: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_from(words, {"XMEM_API_TOKENS": tokens})
