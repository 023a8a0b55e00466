from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from support.live_standin import StandInHub, record

from pipeline.api.metrics import metrics_text
from pipeline.live.spec import LiveSpec


def samples(values: Any, capacity: Any = None) -> dict[tuple[str, ...], float]:
    """(name, label values...) -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics_text(values, capacity).decode()):
        for sample in family.samples:
            key = (sample.name, *(sample.labels[k] for k in sorted(sample.labels)))
            assert key not in found
            found[key] = sample.value
    return found


async def _hub() -> tuple[Any, Any]:
    hub = StandInHub()
    await hub.add(LiveSpec("gate", "rtsp://root:hunter2@10.0.0.9/x", detector="motion"))
    await hub.add(LiveSpec("door", "rtsp://10.0.0.10/x", detector="motion"))
    hub.publish("gate", record(0), record(0, 2, area=0, bbox=None))
    await hub.request("door", {"pause": True})
    return await hub.list(), await hub.capacity()


def test_the_ledger_adds_up_in_the_metrics_too() -> None:
    found = samples(*asyncio.run(_hub()))
    received = found["xmem_frames_received_total", "gate"]
    assert received == 8
    assert found["xmem_frames_tracked_total", "gate"] == 1
    assert found["xmem_frames_dropped_total", "late", "gate"] == 4
    assert found["xmem_frames_dropped_total", "queue full", "gate"] == 1
    assert found["xmem_frames_corrupt_total", "damaged", "gate"] == 1
    assert found["xmem_frames_in_flight", "gate"] == received - 1 - 4 - 1 - 1


def test_states_rates_objects() -> None:
    found = samples(*asyncio.run(_hub()))
    assert found["xmem_stream_state", "running", "gate"] == 1
    assert found["xmem_stream_state", "paused", "gate"] == 0
    assert found["xmem_stream_state", "paused", "door"] == 1
    assert found["xmem_objects", "gate"] == 2
    assert found["xmem_objects_visible", "gate"] == 1
    assert found["xmem_tracked_fps", "gate"] == 12.5
    assert found["xmem_lag_seconds", "0.99", "gate"] == 0.31
    assert found["xmem_capacity_max_streams",] == 8
    assert ("xmem_capacity_device",) not in found


def test_objects_by_category() -> None:
    objects = [
        {"id": 1, "category": "person", "area": 40},
        {"id": 2, "category": "person", "area": 30},
        {"id": 3, "category": "person", "area": 0},
        {"id": 4, "category": "car", "area": 0},
        {"id": 5, "category": None, "area": 9},
    ]
    found = samples([{"id": "gate", "state": "running", "objects": objects}])
    of = {key[1]: value for key, value in found.items() if key[0] == "xmem_objects_visible_by_category"}
    assert of == {"person": 2, "car": 0, "": 1}


def test_zones_and_lines() -> None:
    zones = {
        "zones": [{"name": "door", "inside": 2, "entered": 7, "left": 5}],
        "lines": [{"name": "kerb", "left_to_right": 3, "right_to_left": 1}],
    }
    found = samples([{"id": "gate", "state": "running", "zones": zones}])
    assert found["xmem_zone_objects", "gate", "door"] == 2
    assert found["xmem_zone_entered_total", "gate", "door"] == 7
    assert found["xmem_zone_left_total", "gate", "door"] == 5
    assert found["xmem_line_crossed_total", "left_to_right", "kerb", "gate"] == 3
    assert found["xmem_line_crossed_total", "right_to_left", "kerb", "gate"] == 1


def test_no_streams_and_half_a_status() -> None:
    assert samples([]) == {}
    found = samples([{"id": "gate", "state": "starting"}])
    assert found["xmem_frames_received_total", "gate"] == 0
    assert ("xmem_lag_seconds", "0.5", "gate") not in found


def test_labels_hold_no_credentials_and_cannot_break_out() -> None:
    text = metrics_text([{"id": "a", "ledger": {"dropped": {'x"\n} 1 rtsp://u:hunter2@h/': 3}}}])
    assert b"hunter2" not in text
    found = samples([{"id": "a", "ledger": {"dropped": {'x"\n} 1': 3}}}])
    assert found["xmem_frames_dropped_total", 'x"\n} 1', "a"] == 3
