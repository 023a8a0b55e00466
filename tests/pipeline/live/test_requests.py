"""Requests to a live stream: validation against tracked objects and pending requests, and progress."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import PromptError, UsageError
from pipeline.live.record import LiveRecord
from pipeline.live.requests import LiveRequests, Rejected
from pipeline.live.spec import LivePrompts, LiveSettings, LiveSpec
from pipeline.prompts import files as prompt_files
from pipeline.prompts.resolving import PromptSet
from pipeline.tracks.masks import mask_to_rle
from pipeline.tracks.store import StreamStore

SPEC = LiveSpec("cam", "fake://cam", settings=LiveSettings.from_dict({"max_objects": 3}))
SIZE = (48, 64)
SMALL_MASK = {"size": [4, 4], "counts": mask_to_rle(np.ones((4, 4), np.bool_))}


def prompts(*ids: int | None) -> dict[str, Any]:
    box = {"box": [1, 1, 8, 8]}
    return {"objects": [box if i is None else {"id": i, **box} for i in ids]}


def requests_in(folder: Path, *tracked: int, detected: tuple[int, ...] = (), **more: Any) -> LiveRequests:
    record = LiveRecord(StreamStore(folder, "cam"), {})
    objects = SimpleNamespace(object_ids=[*tracked, *detected], detected_ids=list(detected))
    return LiveRequests(SPEC, record, objects, **more)


def test_objects_without_an_id_get_one_that_none_ever_had(tmp_path: Path) -> None:
    requests = requests_in(tmp_path)
    assert requests.ask({"prompts": prompts(5, None)}, SIZE) == {"seq": 1, "ids": [5, 6]}
    assert requests.ask({"prompts": prompts(None)}, SIZE) == {"seq": 2, "ids": [7]}
    assert requests.promised_ids() == [5, 6, 7]


def test_room_is_reckoned_with_what_waits(tmp_path: Path) -> None:
    requests = requests_in(tmp_path, 1, 2)
    requests.ask({"prompts": prompts(3)}, SIZE)
    with pytest.raises(UsageError, match="4 objects would be tracked, 3 are allowed"):
        requests.ask({"prompts": prompts(4)}, SIZE)
    requests.ask({"prompts": prompts(3)}, SIZE)  # a correction
    assert requests.ask({"remove": [3, 1, 3]}, SIZE)["ids"] == [1, 3]
    requests.ask({"prompts": prompts(4, 5)}, SIZE)
    with pytest.raises(UsageError, match=r"no object 9 is tracked: there are \[1, 2\]"):
        requests.ask({"remove": [9]}, SIZE)


def test_a_name_is_for_an_object_that_is_there_or_coming(tmp_path: Path) -> None:
    requests = requests_in(tmp_path, 1)
    requests.ask({"prompts": prompts(2)}, SIZE)
    for object_id in (1, 2):
        asked = requests.ask({"rename": {"id": object_id, "category": "bag"}}, SIZE)
        assert asked["ids"] == [object_id]
    assert [r.content.get("rename") for r in requests.waiting()][1:] == [
        {"id": 1, "category": "bag"},
        {"id": 2, "category": "bag"},
    ]


def test_detected_objects_take_no_users_place(tmp_path: Path) -> None:
    requests = requests_in(tmp_path, 1, detected=(2, 3))
    requests.ask({"prompts": prompts(4)}, SIZE)
    requests.ask({"prompts": prompts(3)}, SIZE)  # corrected, it is the user's
    with pytest.raises(UsageError, match="4 objects would be tracked, 3 are allowed"):
        requests.ask({"prompts": prompts(5)}, SIZE)
    requests.ask({"remove": [1]}, SIZE)
    assert requests.ask({"prompts": prompts(None)}, SIZE)["ids"] == [5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "one of prompts, remove, rename, memory and pause"),
        ({"pause": True, "remove": [1]}, "one of prompts, remove, rename, memory and pause"),
        ({"rename": {"id": 1}}, "is not allowed"),
        ({"memory": {"pin": "a"}}, "pin='a' is not allowed: frames are numbers from 0"),
        ({"rename": {"id": True, "category": "x"}}, "is not allowed"),
        ({"rename": {"id": 1, "category": "x" * 101}}, "1 to 100 characters"),
        ({"rename": {"id": 9, "category": "x"}}, r"no object 9 is tracked: there are \[1\]"),
        ({"stop": 1}, "unknown request 'stop'"),
        ({"pause": 1}, "pause=1 is not allowed: true or false"),
        ({"remove": []}, "a list of object ids"),
        ({"remove": [True]}, "a list of object ids"),
        ({"prompts": prompts(1_000_000_001)}, "up to 1000000000"),
        ({"prompts": {"objects": [{"id": 1, "rle": SMALL_MASK}]}}, "its mask is 4x4, the stream 64x48"),
    ],
)
def test_what_is_wrong_is_not_written_down(tmp_path: Path, content: Any, message: str) -> None:
    requests = requests_in(tmp_path, 1)
    with pytest.raises((UsageError, PromptError), match=message):
        requests.ask(content, SIZE)
    assert not requests.waiting()


def test_a_pause_counts_at_once_and_after_a_restart(tmp_path: Path) -> None:
    requests = requests_in(tmp_path)
    requests.ask({"pause": True}, None)
    assert requests.paused
    (request,) = requests.waiting()
    assert requests_in(tmp_path).paused
    assert not requests_in(tmp_path, applied=request.number).paused  # the snapshot would know of it
    assert requests_in(tmp_path, applied=request.number, paused=True).paused
    requests.ask({"pause": False}, None)
    assert not requests.paused
    assert not requests_in(tmp_path, paused=True).paused


def test_prompts_to_begin_with_are_asked_for_once(tmp_path: Path) -> None:
    for _ in range(2):
        requests = requests_in(tmp_path)
        requests.begin_with(LivePrompts.of(prompts(1)))
        assert [r.number for r in requests.waiting()] == [1]
    requests.begin_with(LivePrompts.of(prompts(2)))
    assert [r.number for r in requests.waiting()] == [1, 2]


def test_prompts_are_parsed_once_and_travel_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LiveSpec("cam", "fake://cam", prompts(None, 2))
    change = {"prompts": LivePrompts.of(prompts(None))}
    parsed = []
    monkeypatch.setattr(prompt_files, "_parse", lambda *given: parsed.append(given))
    spec, change = pickle.loads(pickle.dumps((spec, change)))  # from the API to the hub's process
    requests = requests_in(tmp_path)
    assert spec.parsed_prompts is not None
    requests.begin_with(spec.parsed_prompts)
    assert requests.ask(change, SIZE) == {"seq": 2, "ids": [4]}
    assert [r.object_ids for r in requests.waiting()] == [[3, 2], [4]]
    assert not parsed
    monkeypatch.undo()
    begun, asked = (PromptSet.from_record(r.content["prompts"]) for r in requests.waiting())
    assert [o.box for o in (*begun.at(0), *asked.at(0))] == [(1, 1, 8, 8)] * 3


def test_what_is_distrusted_is_refused_and_told(tmp_path: Path) -> None:
    requests = requests_in(tmp_path, distrusted={1: "it failed"})
    requests.ask({"prompts": prompts(1)}, None)
    requests.ask({"prompts": prompts(2)}, None)
    first, second = requests.waiting()
    assert requests.refuses(first)
    assert not requests.refuses(second)
    assert list(requests.rejected) == [Rejected(1, "it failed")]
    requests.done(first)
    assert requests.waiting() == [second]
    assert requests.applied == 1
