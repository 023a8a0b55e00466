"""Events to Kafka (librdkafka's mock cluster, over sockets) and MQTT (Mosquitto): in order, at least once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from support.servers import Mosquitto, mosquitto

from pipeline.base.errors import UsageError, XmemError
from pipeline.base.records import Event, events_table, tracks_table
from pipeline.live.hub import brokers
from pipeline.live.hub.brokers import BrokerSettings
from pipeline.live.hub.event_push import EventPush
from pipeline.tracks.store import StreamStore

pytest.importorskip("confluent_kafka", reason="confluent-kafka is not installed: pip install -e '.[kafka]'")
pytest.importorskip("paho.mqtt", reason="paho-mqtt is not installed: pip install -e '.[mqtt]'")

PATIENCE = 60.0


def commit(out: Path, frame: int, *kinds: str) -> None:
    events = [Event(frame, kind, "door", object_id=3, detail={"number": 1}) for kind in kinds]
    StreamStore(out, "cam").commit(frame, frame, tracks_table([]), events_table(events))


def pushing(url: str, out: Path) -> EventPush:
    return EventPush(BrokerSettings(url).connect(), str(out), "default", backoff_seconds=(0.05, 0.1))


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def cursor(out: Path, kind: str) -> int:
    path = out / "live" / f"default-{kind}" / "cam.json"
    return int(json.loads(path.read_text())["next_frame"]) if path.exists() else -1


EXPECTED = [
    ("cam:0:1", "cam", "zone_entered", 3, {"number": 1}),
    ("cam:1:0", "cam", "zone_left", 3, {"number": 1}),
    ("cam:1:1", "cam", "line_crossed", 3, {"number": 1}),
]


def shown(messages: list[bytes]) -> list[tuple[Any, ...]]:
    events = [json.loads(message) for message in messages]
    return [(e["id"], e["stream_id"], e["kind"], e["object_id"], e["detail"]) for e in events]


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    """Address of a mock cluster of one broker."""
    from confluent_kafka import Producer

    cluster = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = cluster.list_topics(timeout=PATIENCE).brokers.values()
    yield f"127.0.0.1:{broker.port}"
    cluster.flush(0)


def read_kafka(address: str, topic: str, count: int) -> list[tuple[bytes, bytes]]:
    from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": address, "group.id": "reader", "log_level": 0})
    partitions = consumer.list_topics(topic, timeout=PATIENCE).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    found: list[tuple[bytes, bytes]] = []
    try:
        end = time.monotonic() + PATIENCE
        while len(found) < count and time.monotonic() < end:
            message = consumer.poll(0.5)
            if message is not None and message.error() is None:
                found.append((message.key() or b"", message.value() or b""))
    finally:
        consumer.close()
    return found


def test_kafka_gets_events_in_order(tmp_path: Path, kafka: str) -> None:
    with pushing(f"kafka://{kafka}/zones", tmp_path) as push:
        push.watch("cam", 0)
        commit(tmp_path, 0, "object_added", "zone_entered")
        push.notify("cam", 0)
        commit(tmp_path, 1, "zone_left", "line_crossed")
        push.notify("cam", 1)
        until(lambda: cursor(tmp_path, "kafka") == 2)
    found = read_kafka(kafka, "zones", 3)
    assert {key for key, _ in found} == {b"cam"}
    assert shown([value for _, value in found]) == EXPECTED


def test_kafka_that_is_away_loses_nothing(
    tmp_path: Path, kafka: str, caplog: pytest.LogCaptureFixture
) -> None:
    commit(tmp_path, 0, "object_added", "zone_entered")
    commit(tmp_path, 1, "zone_left", "line_crossed")
    away = "kafka://127.0.0.1:1/later?message.timeout.ms=200"
    with pushing(away, tmp_path) as push:
        push.watch("cam", 0)
        until(lambda: "stream cam: kafka: 1 messages were not confirmed: " in caplog.text)
    assert cursor(tmp_path, "kafka") == 0
    with pushing(f"kafka://{kafka}/later", tmp_path) as push:
        push.watch("cam", 2)
        until(lambda: cursor(tmp_path, "kafka") == 2)
    assert shown([value for _, value in read_kafka(kafka, "later", 3)]) == EXPECTED


class FakeProducer:
    """In place of librdkafka: confirms messages after a while, but for those that are to fail once."""

    delay_seconds = 0.0
    failing: ClassVar[set[str]] = set()
    sent: ClassVar[list[str]] = []

    def __init__(self, _: Any) -> None:
        self.waiting: list[tuple[float, Any, Any]] = []

    def produce(self, _topic: str, value: bytes, *, key: str, on_delivery: Callable[..., None]) -> None:
        event = json.loads(value)["id"]
        self.sent.append(event)
        error = None
        if event in self.failing:
            self.failing.discard(event)
            error = SimpleNamespace(str=lambda: "timed out")
        self.waiting.append((time.monotonic() + self.delay_seconds, on_delivery, error))

    def poll(self, seconds: float) -> None:
        time.sleep(seconds / 10)
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            _, on_delivery, error = self.waiting.pop(0)
            on_delivery(error, None)

    def purge(self) -> None:
        self.waiting.clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeProducer]:
    monkeypatch.setattr("confluent_kafka.Producer", FakeProducer)
    FakeProducer.sent, FakeProducer.failing, FakeProducer.delay_seconds = [], set(), 0.0
    return FakeProducer


def test_kafka_gets_again_only_what_was_not_confirmed(fake: type[FakeProducer]) -> None:
    fake.failing = {"2"}
    kafka = BrokerSettings("kafka://host/zones").connect()
    some = [{"id": str(number)} for number in range(5)]
    with pytest.raises(XmemError, match="1 messages were not confirmed: timed out"):
        kafka.send("cam", some)
    kafka.send("cam", some)
    assert fake.sent == [*"01234", *"234"], "from the first that was not confirmed on, in order"
    kafka.send("cam", some)
    assert fake.sent[8:] == [*"01234"], "nothing is remembered of a call that succeeded"


def test_kafka_waits_as_long_as_a_message_may_take(
    fake: type[FakeProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "_SECONDS", 0.1)
    fake.delay_seconds = 0.5
    BrokerSettings("kafka://host/zones?message.timeout.ms=20000").connect().send("cam", [{"id": "0"}])
    assert fake.sent == ["0"]


class Subscriber:
    """Keeps the messages of all topics, in order; a session that outlives the broker's absence."""

    def __init__(self, port: int) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.messages: list[tuple[str, bytes]] = []
        self.ready = False
        self.client = Client(CallbackAPIVersion.VERSION2, client_id="reader")
        self.client.username_pw_set("me", "a+secret")
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self.client.on_subscribe = lambda *_: setattr(self, "ready", True)
        self.client.on_message = lambda _c, _d, m: self.messages.append((m.topic, bytes(m.payload)))
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        until(lambda: self.ready)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def broker() -> Iterator[Mosquitto]:
    with mosquitto() as running:
        yield running


def test_mqtt_gets_events_again_after_an_outage(tmp_path: Path, broker: Mosquitto) -> None:
    reader = Subscriber(broker.port)
    try:
        with pushing(f"mqtt://me:a%2Bsecret@127.0.0.1:{broker.port}/site/zones", tmp_path) as push:
            push.watch("cam", 0)
            commit(tmp_path, 0, "object_added", "zone_entered")
            push.notify("cam", 0)
            until(lambda: len(reader.messages) == 1)
            until(lambda: cursor(tmp_path, "mqtt") == 1)
            broker.stop()
            reader.ready = False
            commit(tmp_path, 1, "zone_left", "line_crossed")
            push.notify("cam", 1)
            until(lambda: push._backoffs["cam"].next_seconds() > 0)
            assert cursor(tmp_path, "mqtt") == 1
            push.close()
        broker.start()
        until(lambda: reader.ready)
        with pushing(f"mqtt://me:a%2Bsecret@127.0.0.1:{broker.port}/site/zones", tmp_path) as push:
            push.watch("cam", 2)
            until(lambda: len(reader.messages) >= 3)
            until(lambda: cursor(tmp_path, "mqtt") == 2)
    finally:
        reader.close()
    assert {topic for topic, _ in reader.messages} == {"site/zones/cam"}
    assert shown([payload for _, payload in reader.messages]) == EXPECTED


def test_mqtt_that_refuses_is_told(
    tmp_path: Path, broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    commit(tmp_path, 0, "zone_entered")
    with pushing(f"mqtt://me:wrong-one@127.0.0.1:{broker.port}/zones", tmp_path) as push:
        push.watch("cam", 0)
        until(lambda: "the broker refused the connection: Not authorized" in caplog.text)
    assert "wrong-one" not in caplog.text
    assert cursor(tmp_path, "mqtt") == 0


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("amqp://host/topic", "it begins with kafka://, mqtt:// or mqtts://"),
        ("kafka:///topic", "it names no host"),
        ("kafka://a b/topic", "it names no host"),
        ("mqtt://a,b/topic", "it names no host"),
        ("kafka://host/", "a Kafka topic has 1 to 249"),
        ("kafka://host/a/b", "a Kafka topic has 1 to 249"),
        ("mqtt://me:hidden@host", "an MQTT topic to publish to is not empty"),
        ("mqtt://host/a/%23", "an MQTT topic to publish to is not empty and has no # and +"),
        ("mqtts://host/a/#", "an MQTT topic to publish to is not empty and has no # and +"),
    ],
)
def test_topics_that_are_none(url: str, problem: str) -> None:
    with pytest.raises(UsageError, match="is not allowed: ") as caught:
        BrokerSettings(url)
    assert problem in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_settings_of_kafka_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"settings of Kafka are not allowed: .*no\.such\.setting"):
        BrokerSettings("kafka://host/topic?no.such.setting=1").connect()


def test_a_client_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho", None)
    with pytest.raises(UsageError, match=r"mqtt:// needs a client: pip install 'xmem-pipeline\[mqtt\]'"):
        BrokerSettings("mqtt://host/topic")
    assert "secret" not in repr(BrokerSettings("kafka://me:secret@host/topic"))
