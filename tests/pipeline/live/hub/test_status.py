"""Status of a stream that is not open, opening, open, waiting, paused and removed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from support.small_net import SMALL_MEMORY, small_model

from pipeline.base.errors import StoreError
from pipeline.live.camera.ledger import Ledger, LedgerCounts
from pipeline.live.hub.settings import HubSettings
from pipeline.live.hub.status import metrics_of, state_of, status_of
from pipeline.live.hub.stream import HubStream
from pipeline.live.spec import LiveSpec
from pipeline.live.tracker import Rejected
from xmem_core import VideoSegmenter


@pytest.fixture
def stream() -> HubStream:
    spec = LiveSpec("cam", "fake://me:geheim@cam")
    return HubStream.of(spec, HubSettings("out"), VideoSegmenter(small_model(), SMALL_MEMORY))


def opened(state: str = "streaming", *, paused: bool = False, **more: Any) -> Any:
    """A fake tracker with the properties that a status reads."""
    ledger = Ledger(LedgerCounts(10, 6, {"too old": 1}, {"damaged": 2}))
    feed = SimpleNamespace(state=state, failure="no route")
    source = SimpleNamespace(status=lambda: feed, ledger=ledger, width=64, height=48)
    values: dict[str, Any] = {
        "source": source,
        "began": True,
        "rates": lambda: {"received_fps": 10.004, "tracked_fps": 6.0},
        "lag_seconds": lambda: {"p50": 0.1, "p99": 0.2},
        "next_frame": 10,
        "record": SimpleNamespace(books=SimpleNamespace(frames=8), last_request=3),
        "zones": SimpleNamespace(status=lambda: {"zones": [], "lines": []}),
        "requests": SimpleNamespace(paused=paused, applied=2, rejected=[Rejected(2, "no object 9")]),
    }
    return SimpleNamespace(**(values | more))


def test_the_states(stream: HubStream) -> None:
    assert state_of(stream) == "starting"
    stream.failed(StoreError("the disk is full"), 0.0)
    assert state_of(stream) == "failed"
    assert status_of(stream)["cause"] == "the disk is full"
    stream.tracker = opened(began=False)
    assert state_of(stream) == "starting"
    stream.tracker = opened()
    assert state_of(stream) == "running"
    assert status_of(stream)["cause"] is None
    stream.tracker = opened("reconnecting")
    assert state_of(stream) == "waiting"
    assert status_of(stream)["cause"] == "no route"
    stream.tracker = opened("reconnecting", paused=True)
    assert state_of(stream) == "paused"
    stream.removed = True
    assert state_of(stream) == "stopped"


def test_a_closed_stream_tells_how_it_last_was(stream: HubStream) -> None:
    stream.last_ledger, stream.last_frame = LedgerCounts(4, 3), 4
    status = status_of(stream)
    assert (status["ledger"]["received"], status["ledger"]["in_flight"]) == (4, 1)
    assert (status["next_frame"], status["committed_frames"], status["objects"]) == (4, None, [])
    stream.tracker = opened()
    assert status_of(stream).keys() == status.keys()


def test_an_open_stream_tells_more(stream: HubStream) -> None:
    stream.tracker = opened()
    status = status_of(stream)
    assert "geheim" not in json.dumps(status)
    assert status["rates"] == {"received_fps": 10.0, "tracked_fps": 6.0}
    assert status["requests"] == {"last": 3, "applied": 2, "rejected": [{"seq": 2, "cause": "no object 9"}]}
    assert (status["width"], status["height"], status["committed_frames"]) == (64, 48, 8)


def test_metrics_are_the_numbers(stream: HubStream) -> None:
    assert metrics_of(stream)["up"] == 0
    stream.tracker = opened()
    metrics = metrics_of(stream)
    assert (metrics["up"], metrics["in_flight"], metrics["lag_p99_seconds"]) == (1, 1, 0.2)
    assert metrics["dropped"] == {"too old": 1}
    stream.tracker = opened("reconnecting")
    assert metrics_of(stream)["up"] == 0
