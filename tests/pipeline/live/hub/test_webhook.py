"""The webhook: signed, retried, never lost over restarts, and only what was committed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.webhook_receiver import SECRET, Receiver
from support.webhook_receiver import receiver as serving

from pipeline.base.errors import UsageError, XmemError
from pipeline.base.records import Event, events_table, tracks_table
from pipeline.live.hub import webhook
from pipeline.live.hub.event_push import EventPush
from pipeline.live.hub.webhook import Webhook, WebhookSettings
from pipeline.tracks.store import StreamStore


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serving() as made:
        yield made


def settings(receiver: Receiver) -> WebhookSettings:
    return WebhookSettings(receiver.url, SECRET, 0.01, 0.02)


def pushing(receiver: Receiver, out: Path) -> EventPush:
    return EventPush(Webhook(settings(receiver)), str(out), "default", backoff_seconds=(0.01, 0.02))


def commit(out: Path, frame: int, *kinds: str) -> None:
    events = [Event(frame, kind, "door", object_id=3, detail={"number": 1}) for kind in kinds]
    StreamStore(out, "cam").commit(frame, frame, tracks_table([]), events_table(events))


def frames(receiver: Receiver) -> list[int]:
    return [event["frame_index"] for event in receiver.events]


def test_events_are_pushed_signed_and_tried_again(tmp_path: Path, receiver: Receiver) -> None:
    receiver.statuses = [500, 302, 429]
    with pushing(receiver, tmp_path) as hook:
        hook.watch("cam", 0)
        commit(tmp_path, 0, "object_added", "zone_entered")
        hook.notify("cam", 0)
        receiver.until(lambda: bool(receiver.events))
        commit(tmp_path, 1, "zone_left", "line_crossed")
        hook.notify("cam", 1)
        receiver.until(lambda: len(receiver.events) == 3)
    assert [(e["id"], e["kind"], e["name"], e["object_id"]) for e in receiver.events] == [
        ("cam:0:1", "zone_entered", "door", 3),
        ("cam:1:0", "zone_left", "door", 3),
        ("cam:1:1", "line_crossed", "door", 3),
    ]
    assert receiver.events[0]["detail"] == {"number": 1}
    assert receiver.forged == 0
    assert receiver.requests == 5


def test_nothing_is_lost_over_a_restart_and_old_events_are_not_pushed(
    tmp_path: Path, receiver: Receiver
) -> None:
    commit(tmp_path, 0, "zone_entered")  # before there was a webhook
    receiver.statuses = [503] * 1000
    with pushing(receiver, tmp_path) as hook:
        hook.watch("cam", 1)
        commit(tmp_path, 1, "zone_left")
        hook.notify("cam", 1)
        receiver.until(lambda: receiver.requests >= 3)
    assert receiver.events == []
    commit(tmp_path, 2, "zone_entered")  # nobody said so
    receiver.statuses = []
    with pushing(receiver, tmp_path) as hook:
        hook.watch("cam", 3)
        receiver.until(lambda: len(receiver.events) == 2)
    assert frames(receiver) == [1, 2]
    with pushing(receiver, tmp_path) as hook:
        hook.watch("cam", 3)
        commit(tmp_path, 3, "line_crossed")
        hook.notify("cam", 3)
        receiver.until(lambda: 3 in frames(receiver))
    # What was pushed just before the restart may come again, if its answer was not read.
    assert list(dict.fromkeys(frames(receiver))) == [1, 2, 3]


class Dripping:
    """A receiver that begins an answer and never ends it: a byte now and then, or long headers."""

    def __init__(self, piece: bytes) -> None:
        self.piece = piece
        self.answering = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with connection, suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 ")
                    while True:
                        connection.sendall(self.piece)
                        self.answering.set()
                        time.sleep(0.05)


@pytest.fixture(params=[b"2", b"100 Continue\r\n\r\nHTTP/1.1 ", b"200 OK\r\nX: " + b"y" * 30_000 + b"\r\n"])
def dripping(request: pytest.FixtureRequest) -> Iterator[Dripping]:
    made = Dripping(request.param)
    yield made
    made.socket.close()


def test_a_receiver_that_never_ends_its_answer_is_given_up(
    dripping: Dripping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "_SECONDS", 0.4)
    began = time.monotonic()
    hook = Webhook(WebhookSettings(dripping.url, SECRET))
    if b"200" in dripping.piece:  # that is confirmed, whatever follows
        hook.send("cam", [])
    else:
        with pytest.raises(XmemError, match="no answer"):
            hook.send("cam", [])
    assert time.monotonic() - began < 8


def test_closing_does_not_wait_for_a_receiver(tmp_path: Path) -> None:
    dripping = Dripping(b"2")
    push = EventPush(Webhook(WebhookSettings(dripping.url, SECRET)), str(tmp_path), "default")
    push.watch("cam", 0)
    commit(tmp_path, 0, "zone_entered")
    push.notify("cam", 0)
    assert dripping.answering.wait(20)
    began = time.monotonic()
    push.close()
    assert time.monotonic() - began < 8
    dripping.socket.close()


def test_what_an_answer_holds_is_not_read(receiver: Receiver) -> None:
    """Redirects are not followed, wherever they lead, and a large answer costs nothing."""
    receiver.statuses = [302, 307]
    hook = Webhook(settings(receiver))
    for status in (302, 307):
        with pytest.raises(XmemError, match=f"it answered {status}"):
            hook.send("cam", [])
    assert receiver.requests == 2


@pytest.mark.parametrize("url", ["ftp://a/b", "http://", "http://a b/", "https://a:99999/", "nothing"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="an http or https URL"):
        WebhookSettings(url, SECRET)


def test_credentials_in_an_address_are_refused_since_they_are_not_sent() -> None:
    with pytest.raises(UsageError, match="user and password are not sent") as error:
        WebhookSettings("https://me:pass-word@a/", SECRET)
    assert "pass-word" not in str(error.value)


def test_secrets_are_long_and_in_no_repr() -> None:
    with pytest.raises(UsageError, match="too short: at least 16"):
        WebhookSettings("https://a/", "short")
    assert "secret" not in repr(WebhookSettings("https://a/secret", SECRET)).replace("secret=", "")
