"""Plugins by name: created anew each time; errors name the plugin, the cause and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, Protocol, runtime_checkable

import pytest

import pipeline.base.plugins
from pipeline.base.errors import SourceError, StoreError, UsageError, XmemError
from pipeline.base.plugins import load_entry_point, load_plugin
from pipeline.detect.loading import load_detector
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.tracks.sinks import load_sink
from pipeline.video.plugin_video import find_plugin

GROUP = "xmem.brushes"


@runtime_checkable
class Brush(Protocol):
    def paint(self) -> str: ...


class Red:
    def paint(self) -> str:
        return "red"


def make_blue() -> object:
    blue = Red()
    blue.paint = lambda: "blue"  # type: ignore[method-assign]
    return blue


def broken() -> object:
    raise OSError("no paint\n  left")


def secret() -> object:
    raise ConnectionError("db://me:hunter2@host/x?token=abc does not answer")


class NeedsSize:
    def __init__(self, size: int) -> None:
        self.size = size


NOT_CALLABLE = 7
VALUES = {
    "red": "test_plugins:Red",
    "blue": "test_plugins:make_blue",
    "object": "builtins:object",
    "number": "test_plugins:NOT_CALLABLE",
    "sized": "test_plugins:NeedsSize",
    "broken": "test_plugins:broken",
    "secret": "test_plugins:secret",
    "gone": "no_such_package:Thing",
    "moved": "test_plugins:NoSuchName",
}

Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Registers entry points as an installed package would, by group."""

    def register(group: str, values: dict[str, str]) -> None:
        points = EntryPoints(EntryPoint(name, value, group) for name, value in values.items())
        monkeypatch.setattr(pipeline.base.plugins, "entry_points", lambda group: points.select(group=group))

    return register


def load(name: str, **options: Any) -> Any:
    return load_plugin(name, group=GROUP, kind="brush", protocol=Brush, lacking="cannot paint", **options)


def test_a_class_and_a_function_are_called_anew_each_time(register: Register) -> None:
    register(GROUP, VALUES)
    assert load("red").paint() == "red"
    assert load("blue").paint() == "blue"
    assert load("red") is not load("red")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("object", "brush 'object' (builtins:object) cannot paint; repair or uninstall it"),
        (
            "number",
            "brush 'number' (test_plugins:NOT_CALLABLE) cannot be loaded: TypeError: 'int' object is not "
            "callable; repair or uninstall it",
        ),
        (
            "broken",
            "brush 'broken' (test_plugins:broken) cannot be loaded: OSError: no paint left; repair or "
            "uninstall it",
        ),
        (
            "gone",
            "brush 'gone' (no_such_package:Thing) cannot be loaded: ModuleNotFoundError: No module named "
            "'no_such_package'; repair or uninstall it",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_full(register: Register, name: str, message: str) -> None:
    register(GROUP, VALUES)
    with pytest.raises(UsageError) as caught:
        load(name)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["sized", "moved", "broken", "number", "gone"])
def test_the_cause_is_kept(register: Register, name: str) -> None:
    register(GROUP, VALUES)
    with pytest.raises(UsageError, match=r"cannot be loaded: \w+Error: [^\n]*; repair") as caught:
        load(name)
    assert isinstance(caught.value.__cause__, Exception)


def test_a_cause_that_says_credentials_is_not_kept(register: Register) -> None:
    register(GROUP, VALUES)
    with pytest.raises(UsageError) as caught:
        load("secret")
    assert "db://host/x?token=*** does not answer; repair" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_an_unknown_name_lists_what_there_is(register: Register) -> None:
    register(GROUP, {"red": VALUES["red"], "blue": VALUES["blue"]})
    with pytest.raises(UsageError, match=r"^no brush 'green'; available: blue, red$"):
        load("green")
    with pytest.raises(UsageError, match=r"^no brush 'green'; available: pencil, blue, red$"):
        load("green", built_in=["pencil"])
    register("xmem.other", VALUES)
    with pytest.raises(
        UsageError, match=r"^no brush 'red'; available: none; install the package that provides it$"
    ):
        load("red")


def test_other_plugins_of_the_group_are_not_touched(register: Register) -> None:
    register(GROUP, {"gone": VALUES["gone"], "broken": VALUES["broken"], "red": VALUES["red"]})
    assert load("red").paint() == "red"


def test_an_entry_point_is_made_as_the_caller_says(register: Register) -> None:
    register(GROUP, VALUES)
    assert load_entry_point(GROUP, "number", "it", lambda loaded: loaded + 1) == (8, VALUES["number"])
    assert load_entry_point(GROUP, "green", "it", lambda loaded: loaded) is None
    with pytest.raises(StoreError, match=r"^it \(test_plugins:NOT_CALLABLE\) cannot be loaded: Zero"):
        load_entry_point(GROUP, "number", "it", lambda loaded: loaded / 0, StoreError)


@pytest.mark.parametrize(
    ("group", "find", "failure", "begins"),
    [
        ("xmem.box_segmenters", load_box_segmenter, UsageError, "box segmenter 'broken' "),
        ("xmem.detectors", load_detector, UsageError, "detector 'broken' "),
        ("xmem.sinks", load_sink, UsageError, "sink 'broken' "),
        ("xmem.sources", find_plugin, SourceError, "broken://: the source plugin "),
    ],
)
def test_every_kind_of_plugin_says_what_to_do(
    register: Register, group: str, find: Callable[[str], object], failure: type[XmemError], begins: str
) -> None:
    register(group, {"broken": "test_plugins:Broken"})
    with pytest.raises(failure) as caught:
        find("broken")
    assert type(caught.value) is failure
    assert str(caught.value) == (
        f"{begins}(test_plugins:Broken) cannot be loaded: ConnectionError: no paint left; "
        "repair or uninstall it"
    )


class Broken:
    def __init__(self) -> None:
        raise ConnectionError("no paint\n  left")
