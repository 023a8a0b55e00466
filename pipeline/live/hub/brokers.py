"""Kafka and MQTT: zone events of live streams as messages, one per event; see `pipeline.live.hub.event_push`.

The clients are optional: `pip install 'xmem-pipeline[kafka]'` (confluent-kafka) or `[mqtt]` (paho-mqtt).
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pipeline.base.errors import UsageError, XmemError
from pipeline.base.redaction import redacted
from pipeline.live.hub.event_push import Receiver

_SECONDS = 10.0
_CLIENTS = {"kafka": "confluent_kafka", "mqtt": "paho", "mqtts": "paho"}
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_KAFKA_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


@dataclass(frozen=True)
class BrokerSettings:
    """A topic that events are pushed to; UsageError for what makes no sense or whose client is not installed.

    Args:
        url: `kafka://[user:password@]host[:9092][,host...]/topic[?setting=value&...]` with settings of
            librdkafka, or `mqtt://[user:password@]host[:1883]/topic`; `mqtts://` (port 8883) with TLS. In no
            repr: it may hold a password.
        first_backoff_seconds, most_backoff_seconds: between tries.
    """

    url: str = field(repr=False)
    first_backoff_seconds: float = 1.0
    most_backoff_seconds: float = 60.0

    def __post_init__(self) -> None:
        kind, hosts, topic = self.kind, self._hosts, self.topic
        problem = None
        if kind not in _CLIENTS:
            problem = "it begins with kafka://, mqtt:// or mqtts://"
        elif not all(_HOST.fullmatch(host) for host in hosts) or (kind != "kafka" and len(hosts) > 1):
            problem = "it names no host"
        elif kind == "kafka" and not _KAFKA_TOPIC.fullmatch(topic):
            problem = "a Kafka topic has 1 to 249 letters, digits, dots, dashes and underscores"
        elif kind != "kafka" and (
            not topic or len(topic) > 60_000 or {*topic} & {"#", "+", "\0"} or "#" in self.url
        ):
            problem = "an MQTT topic to publish to is not empty and has no # and +"
        if problem is not None:
            raise UsageError(f"event topic {redacted(self.url)!r} is not allowed: {problem}")
        if importlib.util.find_spec(_CLIENTS[kind]) is None:
            extra = "kafka" if kind == "kafka" else "mqtt"
            raise UsageError(f"{kind}:// needs a client: pip install 'xmem-pipeline[{extra}]'")

    @property
    def kind(self) -> str:
        return self.url.partition("://")[0]

    @property
    def _hosts(self) -> list[str]:
        return self._parts[1].rpartition("@")[2].split(",")

    @property
    def topic(self) -> str:
        return unquote(self._parts[2].removeprefix("/"))

    @property
    def _parts(self) -> tuple[str, str, str, str, str]:
        try:
            return tuple(urlsplit(self.url))  # type: ignore[return-value]
        except ValueError:
            return "", "", "", "", ""

    @property
    def _user(self) -> tuple[str | None, str | None]:
        given, at, _ = self._parts[1].rpartition("@")
        user, colon, password = given.partition(":")
        return (unquote(user) if at else None), (unquote(password) if colon else None)

    def connect(self) -> Receiver:
        """A receiver of events. The broker need not be there yet."""
        user, password = self._user
        if self.kind == "kafka":
            return _Kafka(self._hosts, self.topic, user, password, dict(parse_qsl(self._parts[3])))
        return _Mqtt(self._hosts[0], self.topic, user, password, tls=self.kind == "mqtts")


def _message(stream_id: str, event: Mapping[str, Any]) -> bytes:
    return json.dumps({"stream_id": stream_id, **event}).encode()


class _Kafka:
    """Messages with the stream id as key, so that each stream's are in order within a partition."""

    name = "kafka"

    def __init__(
        self,
        hosts: Sequence[str],
        topic: str,
        user: str | None,
        password: str | None,
        settings: Mapping[str, str],
    ) -> None:
        import confluent_kafka

        given: dict[str, Any] = {
            "bootstrap.servers": ",".join(hosts),
            "enable.idempotence": True,
            "message.timeout.ms": int(_SECONDS * 1000),
            "linger.ms": 0,
            "log_level": 0,  # what fails is in our own messages
        }
        if user is not None:
            given |= {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "PLAIN",
                "sasl.username": user,
                "sasl.password": password or "",
            }
        self._given = given | dict(settings)
        try:
            self._producer = confluent_kafka.Producer(self._given)
        except confluent_kafka.KafkaException as error:
            raise UsageError(f"settings of Kafka are not allowed: {_reason(error)}") from error
        # Every message is confirmed or fails within its time, in milliseconds; then its fate is known.
        limits = [self._given.get(name, "") for name in ("message.timeout.ms", "delivery.timeout.ms")]
        known = [int(limit) / 1000 for limit in limits if str(limit).isdigit()]
        self._patience = max(known, default=_SECONDS) + _SECONDS
        self._failed = False
        self._closed = threading.Event()
        self._topic = topic
        self._confirmed: dict[str, set[str]] = {}
        """Ids of events of a call that failed which were confirmed before all others, by stream."""

    def send(self, stream_id: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Deliver events to all replicas that are in sync. XmemError if one is not confirmed.

        If it fails, what was confirmed up to the first event that was not is left out of the next call.
        """
        import confluent_kafka

        if self._failed:  # what it may still hold would be sent twice, and out of order
            self._producer = confluent_kafka.Producer(self._given)
        self._failed = True
        confirmed = self._confirmed.setdefault(stream_id, set())
        left = [event for event in events if event["id"] not in confirmed]
        verdicts: dict[int, str | None] = {}

        def delivered(index: int, error: Any, _: Any) -> None:
            verdicts[index] = None if error is None else str(error.str())

        for index, event in enumerate(left):
            self._producer.produce(
                self._topic,
                _message(stream_id, event),
                key=stream_id,
                on_delivery=partial(delivered, index),
            )
        until, problem = time.monotonic() + self._patience, None
        while len(verdicts) < len(left) and problem is None:
            if self._closed.is_set():
                problem = "closed"
            elif time.monotonic() > until:
                problem = f"no answer in {self._patience:.0f} s"
            else:
                self._producer.poll(0.1)
        good = [index in verdicts and verdicts[index] is None for index in range(len(left))]
        if not all(good):
            self._producer.purge()
            first = good.index(False)
            confirmed.update(event["id"] for event in left[:first])
            reason = problem or verdicts[first]
            raise XmemError(f"{good.count(False)} messages were not confirmed: {reason}")
        del self._confirmed[stream_id]
        self._failed = False

    def close(self) -> None:
        """End `send`; what was not delivered is sent after the next start."""
        self._closed.set()


def _reason(error: Any) -> str:
    return str(error.args[0].str() if hasattr(error.args[0], "str") else error)


class _Mqtt:
    """Messages with quality of service 1 to `<topic>/<stream id>`; a connection for each call."""

    name = "mqtt"

    def __init__(self, host: str, topic: str, user: str | None, password: str | None, *, tls: bool) -> None:
        parts = urlsplit(f"//{host}")
        self._host, self._port = parts.hostname or "", parts.port or (8883 if tls else 1883)
        self._topic, self._user, self._password, self._tls = topic, user, password, tls

    def send(self, stream_id: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Deliver events until the broker has confirmed each. XmemError if it does not."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client = Client(CallbackAPIVersion.VERSION2)
        if self._user is not None:
            client.username_pw_set(self._user, self._password)
        if self._tls:
            client.tls_set()
        answered = threading.Event()
        refused: list[str] = []

        def connected(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            if reason.is_failure:
                refused.append(str(reason))
            answered.set()

        client.on_connect = connected
        client.connect_timeout = _SECONDS
        try:
            client.connect(self._host, self._port)
        except OSError as error:
            raise XmemError(f"no connection: {type(error).__name__}: {error}") from error
        client.loop_start()
        try:
            if not answered.wait(_SECONDS):
                raise XmemError(f"no answer in {_SECONDS:.0f} s")
            if refused:
                raise XmemError(f"the broker refused the connection: {refused[0]}")
            topic = f"{self._topic}/{stream_id}"
            sent = [client.publish(topic, _message(stream_id, event), qos=1) for event in events]
            until = time.monotonic() + _SECONDS
            for info in sent:
                try:
                    info.wait_for_publish(max(0.0, until - time.monotonic()))
                except (RuntimeError, ValueError) as error:
                    raise XmemError(f"a message was not sent: {error}") from error
                if not info.is_published():
                    raise XmemError(f"a message was not confirmed in {_SECONDS:.0f} s")
        finally:
            client.disconnect()
            client.loop_stop()

    def close(self) -> None:
        """Nothing is kept open."""
