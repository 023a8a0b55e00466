"""The webhook: signed, retried, never lost over restarts, and only what was committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.webhook_receiver import SECRET, Receiver
from support.webhook_receiver import receiver as serving

from pipeline.base.errors import UsageError
from pipeline.base.records import Event, events_table, tracks_table
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
    assert frames(receiver) == [1, 2, 3]


@pytest.mark.parametrize("url", ["ftp://a/b", "http://", "http://a b/", "https://a:99999/", "nothing"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="an http or https URL"):
        WebhookSettings(url, SECRET)


def test_secrets_are_long_and_in_no_repr() -> None:
    with pytest.raises(UsageError, match="too short: at least 16"):
        WebhookSettings("https://a/", "short")
    assert "secret" not in repr(WebhookSettings("https://a/secret", SECRET)).replace("secret=", "")
