"""Conformance checks: they pass a real plugin package and fail broken plugins."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.plugin_package import install, python
from support.tiny import tiny_weights
from support.videos import make_images, make_video

import pipeline.testing.conformance
from pipeline.base.errors import SourceError
from pipeline.base.records import Event, Frame
from pipeline.detect.protocol import Detection
from pipeline.prompts.resolving import ResolvedPrompt
from pipeline.testing.conformance import check_box_segmenter, check_detector, check_sink, check_source
from pipeline.video.sources import open_source

FRAMES = 13
URI = "made://up"


# --- the example package, installed --------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("plugins"))


def test_the_example_package_keeps_its_promises_and_tracks(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import json, sys
from pipeline.testing.conformance import main
from pipeline.tracking.files.track import track
from pipeline.prompts.resolving import PromptSet

model, out = sys.argv[1:]
checks = [["source", "squares://40x30/12", "--missing", "squares://40x30/many"],
          ["box-segmenter", "diamond"], ["detector", "bright"], ["sink", "jsonfiles"]]
codes = [main(check) for check in checks]
prompts = PromptSet.from_record({"version": 1, "objects": [{"id": 4, "box": [60, 0, 16, 16]}]})
summary = track("squares://80x60/11", out, prompts, stream_id="cam", model=model, threads=1, chunk_frames=4,
                box_segmenter="diamond", detector="bright", detect_every=1, detect_span=1,
                give_up_looks=100, sinks=["jsonfiles"])
print(json.dumps([codes, summary.state, summary.frames, summary.rows]))
"""
    sink, out = tmp_path / "sink", tmp_path / "out"
    monkeypatch.syspath_prepend(str(installed))
    from xmem_example_plugins.boxes import Diamond

    done = python(installed, "-c", program, tiny_weights(tmp_path), str(out), XMEM_JSON_FILES=str(sink))
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert json.loads(last) == [[0, 0, 0, 0], "finished", 11, 11 + 7]
    assert [line.rpartition(": ")[2] for line in said] == ["all checks passed"] * 4
    files = sorted(path.name for path in (sink / "cam").iterdir())
    assert files == [f"{a:012d}-{b:012d}.json" for a, b in ((0, 3), (4, 7), (8, 10))]
    given = [json.loads((sink / "cam" / name).read_text()) for name in files]
    rows = [(row["frame_index"], row["object_id"]) for chunk in given for row in chunk["tracks"]]
    assert [frame for frame, object_id in rows if object_id == 4] == [*range(11)]
    # Bright for three frames, found, and confirmed by the pipeline.
    assert [frame for frame, object_id in rows if object_id == 5] == [*range(4, 11)]
    events = [(e["kind"], e["reason"], e["object_id"]) for chunk in given for e in chunk["events"]]
    # With random weights a mask may leave its square, and the detector then corrects it.
    begun = [event for event in events if event != ("corrected", "drifted", 5)]
    assert begun == [("object_added", "prompt", 4), ("object_added", "detector", 5)]
    record = json.loads((out / "streams" / "cam.json").read_text())
    assert (record["settings"]["box_segmenter"], record["container"]) == ("diamond", "plugin")
    assert record["width"] == 80
    mask = ResolvedPrompt.from_record(record["resolved_prompts"]["0"]).masks[4]
    assert np.array_equal(mask, Diamond().segment(np.zeros((60, 80, 3), np.uint8), (60, 0, 16, 16)))


def test_the_command_line_names_what_is_broken(tmp_path: Path, installed: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(installed, broken)
    module = broken / "xmem_example_plugins" / "source.py"
    module.write_text(module.read_text().replace("range(start, count)", "range(start, count - start)"))
    done = python(broken, "-m", "pipeline.testing.conformance", "source", "squares://40x30/12")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("source squares://40x30/12: it ended at frame ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["source", "nowhere://x"], "no source plugin for nowhere:// is installed"),
        (["sink", "nobody"], "no sink 'nobody'"),
        (["detector", "nobody"], "no detector 'nobody'"),
        (["box-segmenter", "nobody"], "no box segmenter 'nobody'"),
    ],
)
def test_what_is_not_installed_is_said(capsys: Any, arguments: list[str], complaint: str) -> None:
    assert pipeline.testing.conformance.main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_what_is_built_in_keeps_its_promises(capsys: Any) -> None:
    assert pipeline.testing.conformance.main(["box-segmenter", "grabcut"]) == 0
    assert capsys.readouterr().out == "box-segmenter grabcut: all checks passed\n"


# --- sources -------------------------------------------------------------------------------------


def picture(index: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(index).integers(0, 256, (18, 24, 3), dtype=np.uint8)


class Good:
    """Frames of noise, with a loss, and some without timestamps."""

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        if uri != URI:
            raise SourceError(f"{uri}: not there")
        return (self.frame(index) for index in range(start, FRAMES))

    def frame(self, index: int) -> Frame:
        losses = (Event(index, "corrupt", "lost"),) if index == 6 else ()
        return Frame(picture(index), index, None if index % 4 == 1 else index / 25, losses=losses)


class NotAFrame(Good):
    def frame(self, index: int) -> Any:
        return picture(index)


class AlwaysFromTheStart(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        return super().open(uri, 0)


class NumbersFromTheReading(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        frames = super().open(uri, start)
        return (Frame(f.image, i, f.pts_seconds, losses=()) for i, f in enumerate(frames))


class OneFrameLate(Good):
    """Correct numbers, but the picture of the previous frame: a wrong seek."""

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        for frame in super().open(uri, start):
            image = picture(frame.frame_index - 1) if start > 2 else frame.image
            yield Frame(image, frame.frame_index, frame.pts_seconds, losses=frame.losses)


class TimesFromTheReading(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        for frame in super().open(uri, start):
            yield Frame(frame.image, frame.frame_index, (frame.frame_index - start) / 25, losses=frame.losses)


class LossesOnlyFromTheStart(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        for frame in super().open(uri, start):
            yield Frame(
                frame.image, frame.frame_index, frame.pts_seconds, losses=() if start else frame.losses
            )


class OneBuffer(Good):
    """Fast, but wrong if a frame is kept."""

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        buffer = np.zeros((18, 24, 3), np.uint8)
        for frame in super().open(uri, start):
            buffer[:] = frame.image
            yield Frame(buffer, frame.frame_index, frame.pts_seconds, losses=frame.losses)


class Floats(Good):
    def frame(self, index: int) -> Frame:
        return Frame(picture(index).astype(np.float32), index, 0.0)


class Grey(Good):
    def frame(self, index: int) -> Frame:
        return Frame(picture(index)[:, :, 0], index, 0.0)


class Mirrored(Good):
    def frame(self, index: int) -> Frame:
        return Frame(picture(index)[:, ::-1], index, 0.0)


class NanTimes(Good):
    def frame(self, index: int) -> Frame:
        return Frame(picture(index), index, float("nan"))


class Milliseconds(Good):
    def frame(self, index: int) -> Frame:
        return Frame(picture(index), index, index * 40)


class LossElsewhere(Good):
    def frame(self, index: int) -> Frame:
        return Frame(picture(index), index, 0.0, losses=(Event(0, "corrupt"),))


class Moody(Good):
    def __init__(self) -> None:
        self.readings = 0

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        self.readings += 1
        end = FRAMES - (self.readings == 3)
        return (self.frame(index) for index in range(start, end))


class OneReading(Good):
    """The position belongs to the source and not to the reading."""

    def __init__(self) -> None:
        self.position = 0

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        if uri != URI:
            raise SourceError("not there")
        self.position = start
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        while self.position < FRAMES:
            self.position += 1
            yield self.frame(self.position - 1)


class BoundToItsThread(Good):
    def __init__(self) -> None:
        self.made_by = threading.get_ident()

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        if threading.get_ident() != self.made_by:
            raise RuntimeError("objects of this library cannot go to another thread")
        return super().open(uri, start)


class AfraidOfTheEnd(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        if uri == URI and start >= FRAMES:
            raise SourceError(f"there is no frame {start}")
        return super().open(uri, start)


class FileErrors(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        if uri != URI:
            raise FileNotFoundError(uri)
        return super().open(uri, start)


class ManyLines(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        if uri != URI:
            raise SourceError("not there\nand never was")
        return super().open(uri, start)


class Short(Good):
    def open(self, uri: str, start: int) -> Iterator[Frame]:
        return (self.frame(index) for index in range(start, 2))


class NoIterator(Good):
    def open(self, uri: str, start: int) -> Any:
        return None


class Crashes(Good):
    def frame(self, index: int) -> Frame:
        return super().frame(index) if index < 9 else Frame(None, index, 0.0)  # type: ignore[arg-type]


def test_a_good_source_passes() -> None:
    check_source(Good(), URI)
    check_source(Good(), URI, missing="made://down")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (NotAFrame(), "a ndarray came instead of a Frame"),
        (AlwaysFromTheStart(), "frame 0 came instead of frame 1, when frames from 1 on"),
        (NumbersFromTheReading(), "frame 0 came instead of frame 1"),
        (OneFrameLate(), r"frame 6 differs when frames from 6 on"),
        (TimesFromTheReading(), "frame 1 differs"),
        (LossesOnlyFromTheStart(), "frame 6 differs"),
        (OneBuffer(), "the image of frame 0 changed after later frames were read"),
        (Floats(), "the image is float32, not uint8, at frame 0"),
        (Grey(), r"the image has shape \(18, 24\)"),
        (Mirrored(), "the image is not contiguous"),
        (NanTimes(), "pts_seconds is nan"),
        (Milliseconds(), "pts_seconds is 0, neither None nor a finite float"),
        (LossElsewhere(), "a loss is reported for frame 0, at frame 1"),
        (Moody(), "it ended at frame 11 when frames from 1 on were requested, not at 12"),
        (OneReading(), "two readings at the same time disturb each other at frame 1"),
        (BoundToItsThread(), "cannot be read in another thread than it was made in: .*cannot go"),
        (
            AfraidOfTheEnd(),
            r"open\('made://up', 13\) raised SourceError|after open\('made://up', 13\) raised",
        ),
        (
            FileErrors(),
            "raised FileNotFoundError .*: unreadable input must raise pipeline.base.errors.SourceError",
        ),
        (ManyLines(), "is not one line"),
        (Short(), "made://up has 2 frames"),
        (NoIterator(), "returned a NoneType, not an iterator"),
        (Crashes(), "the image is a NoneType, not an array, at frame 9"),
        (object(), r"there is no method open\(uri, start\)"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_broken_sources_are_refused(source: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_source(source, URI)


def test_a_source_that_reads_what_it_should_not() -> None:
    with pytest.raises(AssertionError, match="has frames, though it should not be readable"):
        check_source(Good(), URI, missing=URI)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_built_in_sources_would_pass(tmp_path: Path, kind: str) -> None:
    """The checks demand nothing that decoding real files does not fulfil."""
    if kind == "file":
        path = make_video(tmp_path / "clip.mkv", 80, width=48, height=32, b_frames=2, gop=8)
    else:
        path = make_images(tmp_path / "images", 5, width=48, height=32)

    class Plugin:
        def open(self, uri: str, start: int) -> Iterator[Frame]:
            return open_source(uri).frames(start)

    check_source(Plugin(), str(path), missing=str(tmp_path / "nothing.mp4"))


# --- sinks ---------------------------------------------------------------------------------------


class Table:
    """The storage that sinks of several processes write to: rows by stream, range and kind."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, str, dict[str, Any]]] = []


class Replacing:
    def __init__(self, table: Table) -> None:
        self.table = table

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        self.table.rows = [r for r in self.table.rows if not self.void(r, stream_id, first, last)]
        self.add(stream_id, first, last, tracks, events)

    def void(self, row: Any, stream_id: str, first: int, last: int) -> bool:
        return row[0] == stream_id and (first == 0 or first <= row[4]["frame_index"] <= last)

    def add(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        for kind, table in (("tracks", tracks), ("events", events)):
            self.table.rows += [(stream_id, first, last, kind, row) for row in table.to_pylist()]

    def read(self, stream_id: str) -> tuple[list[Any], list[Any]]:
        held = [(kind, row) for stream, _, _, kind, row in self.table.rows if stream == stream_id]
        tracks, events = ([row for kind, row in held if kind == wanted] for wanted in ("tracks", "events"))
        return tracks, events


class Appending(Replacing):
    def void(self, *_: Any) -> bool:
        return False


class FirstWins(Replacing):
    """Skips known ranges: then Parquet has other rows, on a GPU."""

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        if not any(row[:3] == (stream_id, first, last) for row in self.table.rows):
            super().commit(stream_id, first, last, tracks, events)


class MixesStreams(Replacing):
    def void(self, row: Any, stream_id: str, first: int, last: int) -> bool:
        return bool(first <= row[4]["frame_index"] <= last)


class NeverForgets(Replacing):
    """Replaces ranges, but keeps later ones of a stream that was started over."""

    def void(self, row: Any, stream_id: str, first: int, last: int) -> bool:
        return bool(row[0] == stream_id and first <= row[4]["frame_index"] <= last)


class TracksOnly(Replacing):
    def add(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        super().add(stream_id, first, last, tracks, events.slice(0, 0))


class Buffering(Replacing):
    """Writes a range when the next one comes, so the last one is lost when it dies."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.waiting: list[Any] = []

    def commit(self, *given: Any) -> None:
        self.waiting.append(given)
        if len(self.waiting) > 1:
            super().commit(*self.waiting.pop(0))


class OffByOne(Replacing):
    def void(self, row: Any, stream_id: str, first: int, last: int) -> bool:
        return bool(row[0] == stream_id and (first == 0 or first <= row[4]["frame_index"] < last))


class NoEmptyOnes(Replacing):
    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        tracks.to_pylist()[0]
        super().commit(stream_id, first, last, tracks, events)


class NoSecondTime(Replacing):
    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        if any(row[:2] == (stream_id, first) for row in self.table.rows):
            raise ValueError("UNIQUE constraint failed")
        super().commit(stream_id, first, last, tracks, events)


class Ascii(Replacing):
    def add(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        category = [
            None if v is None else v.encode("ascii", "ignore").decode()
            for v in tracks["category"].to_pylist()
        ]
        tracks = tracks.set_column(4, "category", pa.array(category, pa.string()))
        super().add(stream_id, first, last, tracks, events)


class SmallIds(Replacing):
    def add(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        small = tracks["object_id"].to_numpy().astype(np.int16).astype(np.int32)
        super().add(stream_id, first, last, tracks.set_column(3, "object_id", pa.array(small)), events)


class Async(Replacing):
    async def commit(self, *_: Any) -> None:  # type: ignore[override]
        raise RuntimeError("never awaited")


class Nothing:
    pass


def test_a_good_sink_passes() -> None:
    table = Table()
    check_sink(lambda: Replacing(table))
    assert {row[0] for row in table.rows} == {"conformance-a", "conformance-b"}
    frames = {row[4]["frame_index"] for row in table.rows if row[0] == "conformance-a"}
    assert frames == set(range(10))  # of its second life


def test_what_is_read_back_may_have_fewer_columns_and_other_types() -> None:
    table = Table()

    def read(stream_id: str) -> tuple[pa.Table, list[Any]]:
        tracks, events = Replacing(table).read(stream_id)
        columns = ("object_id", "frame_index", "mask_rle")
        return (
            pa.table({name: [row[name] for row in reversed(tracks)] for name in columns}),
            [{"frame_index": row["frame_index"], "id": i} for i, row in enumerate(events)],
        )

    check_sink(lambda: Replacing(table), read)


def test_without_reading_back_only_the_calls_are_made() -> None:
    calls: list[tuple[str, int, int]] = []

    class Blind:
        def commit(self, stream_id: str, first: int, last: int, *_: Any) -> None:
            calls.append((stream_id, first, last))

    check_sink(Blind)
    assert max(calls.count(call) for call in calls) > 1
    assert ("conformance-b", 0, 9) in calls


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (Appending, "after the same range again, with the same rows .* are 4 rows, not 2|some are doubled"),
        (FirstWins, "with other rows .*: the tracks of conformance-a differ"),
        (MixesStreams, r"the tracks of conformance-a are missing for frames \[0, 1, 2"),
        (NeverForgets, r"the tracks of conformance-a should be gone for frames \[10,|gone for frames \[7, 8"),
        (TracksOnly, r"the events of conformance-a are missing for frames \[0\]"),
        (Buffering, r"the tracks of conformance-a are missing for frames \[0, 1"),
        (OffByOne, "some are doubled or lost"),
        (NoEmptyOnes, "commit raised IndexError"),
        (NoSecondTime, "again.*commit raised ValueError: UNIQUE constraint failed"),
        (Ascii, "the tracks of conformance-a differ"),
        (SmallIds, "the tracks of conformance-a differ"),
        (Async, "commit is a coroutine or generator and did nothing"),
        (lambda table: Nothing(), "there is no commit"),
    ],
)
def test_broken_sinks_are_refused(make: Callable[[Table], Any], complaint: str) -> None:
    table = Table()
    with pytest.raises(AssertionError, match=complaint):
        check_sink(lambda: make(table))


# --- the other two, whose checks have tests beside them ------------------------------------------


class WholeBox:
    def segment(self, frame: Any, box: Any) -> Any:
        x, y, width, height = box
        mask = np.zeros(frame.shape[:2], np.bool_)
        mask[y : y + height, x : x + width] = True
        return mask


class TooWide(WholeBox):
    def segment(self, frame: Any, box: Any) -> Any:
        return np.ones(frame.shape[:2], np.bool_)


class Forgetful:
    """Counts frames, but does not serialize the count."""

    def __init__(self) -> None:
        self.seen = 0

    def detect(self, frame: Frame) -> list[Detection]:
        self.seen += 1
        return [Detection(box=(self.seen % 20, 0, 5, 5))]

    def to_bytes(self) -> bytes:
        return b""

    def from_bytes(self, blob: bytes) -> None:
        pass


class Remembering(Forgetful):
    def to_bytes(self) -> bytes:
        return json.dumps([self.seen]).encode()

    def from_bytes(self, blob: bytes) -> None:
        (self.seen,) = json.loads(blob)


def test_all_four_are_to_be_had_from_one_place() -> None:
    check_box_segmenter(WholeBox())
    with pytest.raises(AssertionError, match="outside the box"):
        check_box_segmenter(TooWide())
    check_detector(Remembering)
    with pytest.raises(AssertionError, match="found something else"):
        check_detector(Forgetful)
