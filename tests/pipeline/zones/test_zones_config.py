"""Zones files: what is read, and that every mistake is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.base.errors import UsageError
from pipeline.zones.config import ZoneSet, load_zones, parse_zones, zones_schema

VALIDATOR = jsonschema.Draft202012Validator(zones_schema())
SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]
FULL: dict[str, Any] = {
    "version": 1,
    "units": "share",
    "streams": ["gate-*", "door"],
    "gap_seconds": 1.5,
    "unseen_seconds": 3,
    "frame_rate": 25,
    "zones": [
        {"name": "lawn", "polygon": [[0, 0], [1, 0], [0.5, 1]], "min_seconds": 2, "leave_seconds": 0.5},
        {
            "name": "bay",
            "units": "pixels",
            "polygon": [*SQUARE, [0, 0]],
            "part": "mask",
            "least_share": 0.3,
            "streams": "door",
            "categories": "truck",
        },
    ],
    "lines": [{"name": "kerb", "from": [0.1, 0.5], "to": [0.9, 0.5], "margin": 3, "categories": ["person"]}],
    "near": [{"name": "close", "distance": 1.5, "units": "metres", "min_seconds": 1}],
    "homographies": [{"matrix": [[0.1, 0, 0], [0, 0.1, 0], [0, 0, 1]]}],
}


def test_a_full_file_is_read_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "zones.json"
    path.write_text(json.dumps(FULL))
    zones = load_zones(path)
    assert zones.names == ["lawn", "bay", "kerb", "close"]
    lawn, bay = zones.zones
    assert (lawn.units, lawn.streams, lawn.part) == ("share", ("gate-*", "door"), "foot")
    assert (bay.units, bay.streams, bay.categories) == ("pixels", ("door",), ("truck",))
    assert bay.polygon == tuple(map(tuple, SQUARE))
    assert zones.lines[0].start == (0.1, 0.5)
    assert zones.needs_masks
    assert not zones.of_stream("gate-1").needs_masks
    assert zones.of_stream("gate-1").names == ["lawn", "kerb", "close"]
    assert not zones.of_stream("other")
    assert parse_zones(json.loads(json.dumps(zones.to_json()))) == zones


def test_the_schema_takes_what_the_parser_takes() -> None:
    jsonschema.Draft202012Validator.check_schema(zones_schema())
    VALIDATOR.validate(FULL)
    VALIDATOR.validate(parse_zones(FULL).to_json())


def zone(**changed: Any) -> dict[str, Any]:
    return {"zones": [{"name": "z", "polygon": SQUARE, **changed}]}


def line(**changed: Any) -> dict[str, Any]:
    return {"lines": [{"name": "l", "from": [0, 0], "to": [5, 0], **changed}]}


WRONG: list[tuple[Any, str]] = [
    ([], "zones is []: a JSON object is needed"),
    ({}, "no zones, lines, near or homographies"),
    ({**zone(), "zonez": 1}, "zones: unknown key 'zonez': there are version, units"),
    ({**zone(), "version": 2}, "version=2 is not allowed: this xmem reads version 1"),
    (zone(polygon=[[0, 0], [10, 10], [10, 0], [0, 10]]), "zone 'z': polygon="),
    (zone(polygon=[[0, 0], [10, 10], [10, 0], [0, 10]]), "crosses itself: the edge of corners 0 and 1"),
    (zone(polygon=[[0, 0], [10, 0], [5, 0]]), "crosses itself"),
    (zone(polygon=[[0, 0], [10, 0]]), "2 corners are not allowed: 3 to 200"),
    (zone(polygon=[[0, 0], [10, 0], [10, 0], [3, 9]]), "corners 1 and 2 are the same point"),
    (zone(polygon=[[0, 0], [10, 0], [float("inf"), 9]]), "inf is not allowed"),
    (zone(polygon=[[0, 0], [10, 0], [True, 9]]), "True is not allowed"),
    (zone(units="share"), "10 is not allowed: numbers from 0 to 1 (share)"),
    (zone(units="metres"), "units='metres': not allowed: use pixels, share"),
    (zone(part="head"), "part='head': not allowed: use foot, centroid, box, mask"),
    (zone(least_share=0.4), "least_share goes with part 'box' or 'mask', not with 'foot'"),
    (zone(part="box", least_share=0), "least_share=0: not allowed: a number above 0 and at most 1"),
    (zone(min_second=1), "zone 'z': unknown key 'min_second'"),
    (zone(name=""), "name='': not allowed"),
    (zone(name="a\nb"), "name='a\\nb': not allowed"),
    (zone(streams=[]), "streams=[]: not allowed: a stream id or pattern"),
    (zone(categories=3), "categories=3: not allowed"),
    ({"zones": [{"polygon": SQUARE}]}, "zone 0: 'name' is missing"),
    ({"zones": [{"name": "z"}]}, "zone 'z': 'polygon' is missing"),
    ({"zones": [{"name": "z", "poligon": SQUARE}]}, "'polygon' is missing (there is 'poligon')"),
    ({**zone(), **{"lines": [{"name": "z", "from": [0, 0], "to": [1, 1]}]}}, "there is a zone of that name"),
    (line(to=[0, 0]), "from and to are the same point"),
    (line(part="mask"), "part='mask': not allowed: use foot, centroid"),
    (line(margin=-1), "margin=-1: not allowed"),
    ({"near": [{"name": "n", "distance": 2, "units": "metres"}]}, "units='metres' needs homographies"),
    ({"homographies": [{"matrix": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]}]}, "cannot be inverted"),
    ({"homographies": [{"matrix": [[1, 0], [2, 0]]}]}, "three rows of three numbers"),
    ({"zones": zone()["zones"] * 201}, "201 zones are too many"),
]


@pytest.mark.parametrize(("document", "message"), WRONG, ids=range(len(WRONG)))
def test_every_mistake_is_one_line(document: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_zones(document)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zones": [', "is no JSON"),
        ('{"version": 1, "version": 1}', "the key 'version' is there twice"),
        ('{"zones": NaN}', "NaN is no number in JSON"),
        ("[" * 100_000, "zones.json"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "zones.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_zones(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_of_bytes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json cannot be read"):
        load_zones(tmp_path / "none.json")
    (tmp_path / "zones.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not text in UTF-8"):
        load_zones(tmp_path / "zones.json")


def test_unknown_streams_are_named() -> None:
    zones: ZoneSet = parse_zones(zone(streams=["gate-*", "dor"]))
    zones.check_streams(["gate-1", "dor"])
    with pytest.raises(
        UsageError, match=r"zone 'z': streams='dor' matches no stream: there are gate-1, door"
    ):
        zones.check_streams(["gate-1", "door"])
