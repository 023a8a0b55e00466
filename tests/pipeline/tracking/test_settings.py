"""Tracking settings: defined once, flat in records as before, with the same limits everywhere."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any, get_args, get_type_hints

import pytest
from support.small_net import SMALL_MEMORY, small_model

from pipeline.api.models import OPERATORS_OWN, StreamSettings
from pipeline.base.errors import UsageError
from pipeline.base.setting_fields import options_of
from pipeline.detect.settings import FinderSettings
from pipeline.distributed.messages import WorkerSettings
from pipeline.live.spec import LiveSettings
from pipeline.tracking.files.executor import Begun
from pipeline.tracking.settings import (
    CommitSettings,
    DetectorSettings,
    ModelSettings,
    TrackOptions,
    TrackSettings,
    track_options,
)
from xmem_core import MemoryConfig, VideoSegmenter

# Of a stream record that was written before settings were nested.
OLD_RECORD = (
    '{"model": "xmem-lite", "model_fingerprint": "538fc041816d6dffcafb37c0c8d524fd", '
    '"memory": {"mem_every": 2, "deep_update_every": -1, "top_k": 8, "min_mid_term_frames": 2, '
    '"max_mid_term_frames": 4, "num_prototypes": 6, "max_long_term_elements": 20, "enable_long_term": true, '
    '"max_permanent_frames": 6, "search_window": null, "forget_contradicted": true}, "size": 48, '
    '"dtype": "float32", "threads": 1, "chunk_frames": 8, "snapshot_chunks": 3, "max_frames": null, '
    '"box_segmenter": "grabcut", "detector": "motion", "detect_every": 2, "detect_confirmations": 3, '
    '"max_objects": 8, "out_of_sight_frames": 6}'
)
# Of a hub's list of streams, just as old.
OLD_LIVE = (
    '{"size": null, "fps": null, "policy": "latest", "transport": "tcp", "max_lag_seconds": 1.0, '
    '"queue_frames": 4, "rotate_seconds": 3.0, "rotate_rows": 20000, "snapshot_seconds": 60.0, '
    '"max_objects": 8, "detect_every": 2, "detect_confirmations": 3, "out_of_sight_frames": 250, '
    '"box_segmenter": "grabcut", "expected_height": 720, "expected_width": 1280}'
)


def test_an_old_record_is_read_and_written_in_the_same_bytes() -> None:
    settings = TrackSettings.from_dict(json.loads(OLD_RECORD))
    assert json.dumps(settings.to_dict()) == OLD_RECORD
    assert settings.model == ModelSettings("xmem-lite", size=48, dtype="float32", threads=1)
    assert settings.memory.top_k == 8
    assert settings.commit == CommitSettings(chunk_frames=8, snapshot_chunks=3, box_segmenter="grabcut")
    assert settings.detector == DetectorSettings("motion", FinderSettings(every=2, out_of_sight=6))
    assert settings.differences(json.loads(OLD_RECORD)) == []


def test_a_stream_goes_on_with_the_box_segmenter_that_was_the_default_when_it_was_begun() -> None:
    old = json.loads(OLD_RECORD)
    settings = TrackSettings.from_dict(old)

    def named(name: str) -> TrackSettings:
        return replace(settings, commit=replace(settings.commit, box_segmenter=name))

    default = named(CommitSettings().box_segmenter)
    assert default.differences(old) == []
    assert default.as_begun(old) == settings
    assert named("sam").differences(old) == ["box_segmenter was 'grabcut', now 'sam'"]
    new = old | {"box_segmenter": default.commit.box_segmenter}
    assert settings.differences(new) == ["box_segmenter was 'xmem-click', now 'grabcut'"]


def test_frames_as_they_are_have_no_size_in_a_record() -> None:
    old = json.loads(OLD_RECORD) | {"size": None}
    settings = TrackSettings.from_dict(old)
    assert settings.model.full_size
    assert settings.to_dict() == old
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=None)
    assert TrackSettings.of(size=0).of_segmenter(segmenter, 1).to_dict()["size"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk_frames": 5}, "chunk_frames was 8, now 5"),
        ({"detect_every": 7}, "detect_every was 2, now 7"),
        ({"out_of_sight_frames": 9}, "out_of_sight_frames was 6, now 9"),
        ({"detect_classes": "person,car"}, "detect_classes was None, now 'person,car'"),
        ({"detector": "people"}, "detector was 'motion', now 'people'"),
        ({"top_k": 9}, "memory.top_k was 8, now 9"),
        ({"threads": 2}, "threads was 1, now 2"),
        ({"size": 96}, "size was 48, now 96"),
    ],
)
def test_differences_have_the_names_of_the_record(change: dict[str, Any], said: str) -> None:
    stored = json.loads(OLD_RECORD)
    assert TrackSettings.from_dict(stored).with_options(change).differences(stored) == [said]


def test_what_changes_no_row_is_no_difference() -> None:
    stored = json.loads(OLD_RECORD)
    changed = TrackSettings.from_dict(stored).with_options(
        {"model": "elsewhere.pth", "snapshot_chunks": 9, "device": "cuda", "sinks": ("a",)}
    )
    assert changed.differences(stored) == []
    before_detectors = {k: v for k, v in stored.items() if not k.startswith(("detect", "max_obj", "out_of"))}
    without = TrackSettings.from_dict(stored | {"detector": None}).with_options({"detect_every": 50})
    assert without.differences(before_detectors) == []


def test_a_live_streams_settings_are_read_and_written_as_before() -> None:
    old = json.loads(OLD_LIVE)
    settings = LiveSettings.from_dict(old)
    assert settings.to_dict() == old
    assert settings.finder == FinderSettings(every=2)


def test_classes_are_recorded_once_they_are_given() -> None:
    assert "detect_classes" not in TrackSettings.of(detector="people").to_dict()
    given = TrackSettings.of(size=96, detector="people", detect_classes="person, car")
    assert given.to_dict()["detect_classes"] == "person, car"
    assert TrackSettings.from_dict(given.to_dict()) == given
    assert given.detector.finder.wanted == frozenset({"person", "car"})
    live = LiveSettings(finder=FinderSettings(classes="car"))
    assert LiveSettings.from_dict(live.to_dict()) == live
    with pytest.raises(UsageError, match=r"detect_classes='car,,bus' is not allowed: give names"):
        TrackSettings.of(detect_classes="car,,bus")


def test_a_record_names_the_segmenter_that_tracks() -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=96)
    asked = TrackSettings.of(model="xmem", size=480, detector="motion", max_frames=7)
    settings = asked.of_segmenter(segmenter, threads=3)
    assert settings.model == replace(asked.model, size=96, dtype="float32", threads=3)
    assert (settings.memory, settings.model_fingerprint) == (SMALL_MEMORY, segmenter.fingerprint)
    assert (settings.commit, settings.detector) == (asked.commit, asked.detector)
    assert TrackSettings.from_dict(settings.to_dict()) == settings


def test_what_a_stream_keeps_of_its_beginning() -> None:
    begun = Begun(threads=3, dtype="float32")
    assert begun.keep(ModelSettings()) == ModelSettings(dtype="float32", threads=3)
    asked = ModelSettings(dtype="bfloat16", threads=2)
    assert begun.keep(asked) == asked
    assert begun.keep(asked, threads=True) == replace(asked, threads=3)
    assert Begun().keep(asked, threads=True) == asked


def test_settings_are_frozen_and_given_by_flat_names() -> None:
    settings = TrackSettings.of(model="m", mem_every=3, sinks=["a"], memory=MemoryConfig(top_k=9))  # type: ignore[call-arg]
    assert settings.memory == MemoryConfig(mem_every=3, top_k=9)
    assert settings.commit.sinks == ("a",)
    with pytest.raises(FrozenInstanceError):
        settings.model.size = 5  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"unknown setting 'modle'; available: model, size, "):
        TrackSettings().with_options({"modle": "xmem"})
    with pytest.raises(UsageError, match="unknown setting 'model_fingerprint'"):  # nobody's choice
        TrackSettings().with_options({"model_fingerprint": "0"})
    with pytest.raises(UsageError, match="unknown setting 'out_dir'"):
        WorkerSettings.of("out", out_dir="x")  # type: ignore[call-arg]


WRONG = [
    ("model", 5),
    ("size", 8),
    ("size", 8193),
    ("size", True),
    ("device", None),
    ("dtype", "int8"),
    ("threads", 0),
    ("threads", 1.5),
    ("chunk_frames", 0),
    ("snapshot_chunks", 0),
    ("max_frames", 0),
    ("sinks", ("a", 1)),
    ("detect_every", 0),
    ("detect_every", 100_001),
    ("detect_confirmations", 1001),
    ("max_objects", 257),
    ("out_of_sight_frames", float("nan")),
    ("mem_every", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_is_not_allowed_is_named_with_what_is(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{name}=.* is not allowed: \S+") as caught:
        TrackSettings().with_options({name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threads", "4", 4),
        ("threads", "", None),
        ("max_mid_term_frames", "none", None),
        ("sinks", "a, b c", ("a", "b", "c")),
        ("enable_long_term", "off", False),
        ("model", " xmem ", "xmem"),
    ],
)
def test_values_from_words(name: str, text: str, value: Any) -> None:
    (option,) = (o for o in track_options() if o.name == name)
    assert option.parse(text) == value


@pytest.mark.parametrize(("name", "text"), [("threads", "many"), ("enable_long_term", "perhaps")])
def test_words_that_are_no_values(name: str, text: str) -> None:
    (option,) = (o for o in track_options() if o.name == name)
    with pytest.raises(UsageError, match=rf"^{name}.*{text}"):
        option.parse(text)


def test_every_option_is_explained_and_has_a_name_of_its_own() -> None:
    for options in (track_options(), options_of(LiveSettings)):
        assert len({o.name for o in options}) == len(options)
        for option in options:
            assert option.help.endswith((".", ")")), option.name
            assert option.help[0].isupper(), option.name


def test_the_keywords_of_track_are_the_options() -> None:
    """The only other place to add a new option to, for type checkers and editors."""
    hints = get_type_hints(TrackOptions)
    memory = hints.pop("memory")
    assert MemoryConfig in get_args(memory)
    options = {o.name: o for o in track_options() if o.path[0] != "memory"}
    assert set(hints) == set(options)
    for name, option in options.items():
        if option.kind is not tuple:
            wanted: Any = option.kind | None if option.optional else option.kind
            assert hints[name] == wanted, name


def test_the_api_has_the_settings_and_limits_of_live_streams() -> None:
    options = {o.name: o for o in options_of(LiveSettings)}
    schema = StreamSettings.model_json_schema()["properties"]
    assert set(schema) | set(OPERATORS_OWN) == set(options)
    assert not set(schema) & set(OPERATORS_OWN)
    assert all(OPERATORS_OWN.values())
    for name, field in schema.items():
        limits, (allowed, _) = options[name].limits, field["anyOf"]
        assert allowed.get("minimum") == limits.least, name
        assert allowed.get("exclusiveMinimum") == limits.above, name
        assert allowed.get("maximum") == limits.most, name
        assert tuple(allowed.get("enum", ())) == limits.choices, name
        assert field["description"] == options[name].help, name


def test_files_and_cameras_have_the_same_limits() -> None:
    files = {o.name: o for o in track_options()}
    shared = [o for o in options_of(LiveSettings) if o.name in files]
    assert {o.name for o in shared} == {
        "size", "detect_every", "detect_confirmations", "max_objects", "out_of_sight_frames",
        "detect_classes", "detect_score", "give_up_looks", "detect_span", "kept_for_prompts", "box_segmenter",
    }  # fmt: skip
    for option in shared:
        other = files[option.name]
        assert (option.limits, option.kind, option.default) == (other.limits, other.kind, other.default)
