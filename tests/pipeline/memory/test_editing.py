"""Edits of a stream's memory: durable, made once, whatever is killed or repeated; refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_net import SMALL_MEMORY, frame_at
from support.tiny import tiny_weights
from support.videos import make_video

from pipeline import edit_memory, query, stream_memory, track
from pipeline.base.errors import AnotherWriterError, UsageError
from pipeline.memory.memory_reads import memory_reads
from pipeline.prompts.resolving import PromptSet
from pipeline.storage import local_files
from pipeline.tracks.lease import lease
from pipeline.tracks.store import StreamStore

ROOT = Path(__file__).parents[3]
FRAMES, TRACKED = 30, 20
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 0, "id": 1, "category": "square", "polygons": [[4, 2, 18, 2, 18, 16, 4, 16]]},
        {"frame": 4, "id": 7, "polygons": [[27, 8, 39, 8, 39, 20, 27, 20]]},
    ],
}
EDIT: dict[str, Any] = {"forget": [4, 12]}


class Clip:
    """A video and weights; `out` is the folder in which its first frames were tracked as `walk`."""

    def __init__(self, folder: Path) -> None:
        self.video = make_video(folder / "walk.mkv", [frame_at(i) for i in range(FRAMES)])
        self.model = tiny_weights(folder)
        self.out = folder / "out"
        self.track(self.out, TRACKED)

    def track(self, out: Path, frames: int | None = None, **options: Any) -> Any:
        options = {"memory": SMALL_MEMORY, "chunk_frames": 4, "snapshot_chunks": 2, **options}
        prompts = PromptSet.from_record(PROMPTS)
        names: dict[str, Any] = {"stream_id": "walk", "model": self.model, "threads": 1, "max_frames": frames}
        return track(str(self.video), str(out), prompts, **(names | options))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(tmp_path_factory.mktemp("editing"))


@pytest.fixture
def out(clip: Clip, tmp_path: Path) -> Path:
    """A copy of the clip's output folder."""
    return Path(shutil.copytree(clip.out, tmp_path / "out"))


def files(out: Path, *folders: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in folders
        for path in (out / folder).rglob("*")
        if path.is_file()
    }


def edits(out: Path) -> list[tuple[int, str, Any]]:
    """Frame, kind and detail of the events of edits."""
    rows = query(
        out, "select frame_index, reason, detail from events where kind = 'memory_edited' order by all"
    )
    return [(row["frame_index"], row["reason"], json.loads(row["detail"])) for row in rows.to_pylist()]


def remembered(out: Path) -> set[int]:
    return {f.frame_index for f in stream_memory(out).frames if f.frame_index is not None}


def test_an_edit_is_listed_at_once_and_in_force_and_an_event_with_the_next_frame(
    clip: Clip, out: Path
) -> None:
    before, old = remembered(out), files(out, "tracks", "events", "state", "streams")
    assert edit_memory(out, EDIT) == TRACKED
    assert remembered(out) == {i for i in before if not 4 <= i <= 12} < before
    assert stream_memory(out).edits == (EDIT,)
    assert files(out, "tracks", "events", "state", "streams") == old  # nothing is overwritten
    assert edit_memory(out, EDIT) is None  # again: nothing changes, nothing is stored
    assert len(files(out, "edits")) == 1
    clip.track(out, 28)
    assert edits(out) == [(TRACKED, "forget", EDIT)]
    assert stream_memory(out).edits == ()
    assert not any(4 <= i <= 12 for i in remembered(out))
    plain = clip.out.parent / "plain"
    if not plain.exists():
        shutil.copytree(clip.out, plain)
        clip.track(plain, 28)
    rows = (
        "select * exclude (pts_seconds) from tracks where stream_id = 'walk' order by frame_index, object_id"
    )
    edited, unedited = (query(folder, rows).to_pylist() for folder in (out, plain))
    assert [r for r in edited if r["frame_index"] < TRACKED] == [
        r for r in unedited if r["frame_index"] < TRACKED
    ]
    assert edited != unedited


def test_edits_before_repeated_frames_are_made_again_and_counted_once(clip: Clip, out: Path) -> None:
    """Without the snapshots after the edit, frames around it are repeated: the files are the same."""
    edit_memory(out, {"pin": 18})
    edit_memory(out, EDIT)
    clip.track(out, 26)
    other = Path(shutil.copytree(out, out.parent / "other"))
    for path in (other / "state/walk").iterdir():
        if int(path.stem) > 16:
            path.unlink()
    for folder in (out, other):
        clip.track(folder)
    assert files(out, "tracks", "events") == files(other, "tracks", "events")
    assert edits(other) == [(TRACKED, "forget", EDIT), (TRACKED, "pin", {"pin": 18})]


def test_the_snapshot_may_be_older_than_the_rows(clip: Clip, out: Path) -> None:
    """Killed before its snapshot, a stream is edited where its rows end."""
    (out / "state/walk" / f"{TRACKED:012d}.safetensors").unlink()
    assert edit_memory(out, {"forget": [0, 3], "object": 1}) == TRACKED
    clip.track(out, 24)
    assert edits(out) == [(TRACKED, "forget", {"forget": [0, 3], "object": 1})]


def test_an_edit_that_is_impossible_when_its_frame_comes_is_reported(clip: Clip, out: Path) -> None:
    older = max(int(p.stem) for p in (out / "state/walk").iterdir() if int(p.stem) < TRACKED)
    (out / "state/walk" / f"{TRACKED:012d}.safetensors").unlink()
    gone = min(
        f.frame_index
        for f in stream_memory(out).frames
        if f.frame_index is not None and f.kind == "working" and f.frame_index > 0
    )
    edit_memory(out, {"pin": gone})
    summary = clip.track(out, 24)
    (event,) = edits(out)
    assert event[:2] == (TRACKED, "pin")
    assert older < TRACKED
    assert event[2]["refused"].startswith(f"frame {gone} is not in memory as a whole; whole frames: ")
    assert any("pin was not possible" in warning for warning in summary.warnings)


def test_a_run_at_work_stops_at_an_edit_and_the_next_goes_on_from_it(clip: Clip, out: Path) -> None:
    create = StreamStore(out, "walk")._files.create
    late = [True]

    def meanwhile(self: Any, name: str, data: bytes, owner: str = "") -> bool:
        if late and name.startswith("tracks/"):  # after the first check of the commit
            late.clear()
            edit_memory(out, EDIT)
        return bool(original(self, name, data, owner))

    original = type(create.__self__).create  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(create.__self__), "create", meanwhile)  # type: ignore[attr-defined]
        with pytest.raises(AnotherWriterError, match=r"was edited before frame 20 while this run tracked on"):
            clip.track(out, 28)
    assert StreamStore(out, "walk").committed(check=True).next_frame == TRACKED
    clip.track(out, 28)
    assert edits(out) == [(TRACKED, "forget", EDIT)]


def test_a_writer_killed_before_it_took_back_a_chunk_without_the_edit(clip: Clip, out: Path) -> None:
    ahead = Path(shutil.copytree(out, out.parent / "ahead"))
    clip.track(ahead, 24)
    edit_memory(out, EDIT)
    for kind in ("tracks", "events"):
        name = f"{kind}/stream_id=walk/frames-{TRACKED:012d}.parquet"
        shutil.copy(ahead / name, out / name)
    clip.track(out, 28)
    assert edits(out) == [(TRACKED, "forget", EDIT)]
    assert StreamStore(out, "walk").committed(check=True).next_frame == 28


def test_an_edit_whose_editor_was_killed_before_taking_it_back_was_never_made(clip: Clip, out: Path) -> None:
    """Its frame, and later ones, have rows without it: it is not made when they are repeated."""
    undisturbed = Path(shutil.copytree(out, out.parent / "undisturbed"))
    clip.track(undisturbed, 26)
    clip.track(out, 26)
    content = {"id": "x", "asked": "", "edit": EDIT}
    StreamStore(out, "walk").edit_log.add(TRACKED, 0, content)
    for folder in (out, undisturbed):
        for path in (folder / "state/walk").iterdir():
            if int(path.stem) > 16:
                path.unlink()
        clip.track(folder, 28)
    assert files(out, "tracks", "events") == files(undisturbed, "tracks", "events")
    assert edits(out) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pipeline.memory.editing import edit_memory
from pipeline.storage import local_files
step, at = sys.argv[3], local_files
if step == "before":  # its name is not given yet
    at.link_exclusively = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    link = at.link_exclusively
    def after(*places):
        link(*places)
        os.kill(os.getpid(), signal.SIGKILL)
    at.link_exclusively = after
edit_memory(sys.argv[2], {"forget": [4, 12]})
"""


@pytest.mark.parametrize("step", ["before", "after"])
def test_an_editor_killed_leaves_the_edit_or_nothing_and_asking_again_doubles_nothing(
    clip: Clip, out: Path, step: str
) -> None:
    arguments = [sys.executable, "-c", KILLED, str(ROOT), str(out), step]
    killed = subprocess.run(arguments, env={**os.environ}, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(files(out, "edits")) == (0 if step == "before" else 1)
    assert edit_memory(out, EDIT) == (TRACKED if step == "before" else None)
    clip.track(out, 24)
    assert edits(out) == [(TRACKED, "forget", EDIT)]


COPY: dict[str, Any] = {"copy": {"object": 1, "stream": "walk"}, "object": 5}


@pytest.fixture
def second(clip: Clip, out: Path) -> Path:
    """The output folder with another stream, of which eight frames are tracked."""
    clip.track(out, 8, stream_id="second")
    return out


def test_an_object_is_copied_into_another_stream_and_stays_whatever_becomes_of_its_source(
    clip: Clip, second: Path
) -> None:
    assert edit_memory(second, COPY, "second") == 8
    assert edit_memory(second, COPY, "second") is None
    listed = stream_memory(second, "second")
    assert listed.objects == {1: "square", 7: None, 5: "square"}
    assert [(f.frame_index, f.age, f.objects) for f in listed.frames if f.kind == "copied"] == [
        (None, None, (5,))
    ]
    clip.track(second, 16, stream_id="second")
    (share, *_) = memory_reads(second, 9, object_id=5, stream_id="second").objects[5]
    assert (share.kind, share.frame_index) == ("copied", None)
    other = Path(shutil.copytree(second, second.parent / "other"))
    for kind in ("tracks/stream_id=", "events/stream_id=", "state/"):
        shutil.rmtree(other / f"{kind}walk")
    for path in (other / "state/second").iterdir():
        path.unlink()  # all frames are repeated
    for folder in (second, other):
        clip.track(folder, 20, stream_id="second")
    names = ("tracks/stream_id=second", "events/stream_id=second")
    assert files(second, *names) == files(other, *names)
    ((frame, kind, detail),) = edits(second)
    assert (frame, kind) == (8, "copy")
    assert detail.items() > {**COPY, "category": "square"}.items()
    rows = "select min(frame_index) as first, any_value(category) as category, count(*) as n from tracks"
    (row,) = query(second, f"{rows} where stream_id = 'second' and object_id = 5").to_pylist()
    assert row == {"first": 8, "category": "square", "n": 12}
    added = "select frame_index from events where kind = 'object_added' and reason = 'copy'"
    assert query(second, added)["frame_index"].to_pylist() == [8]
    clip.track(second, 4, stream_id="second", restart=True)
    assert files(second, "edits") == {}


@pytest.mark.parametrize("step", range(4))
def test_killed_while_it_copies_an_object_an_editor_leaves_the_edit_or_nothing(
    clip: Clip, second: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after each of the two files is created: that of the copy and that of the edit."""
    link, left = vars(local_files)["link_exclusively"], [step]

    def alive() -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1

    def killed(*places: Any) -> None:
        alive()
        link(*places)
        alive()

    with monkeypatch.context() as patch:
        patch.setattr(local_files, "link_exclusively", killed)
        with pytest.raises(KeyboardInterrupt):
            edit_memory(second, COPY, "second")
    assert edit_memory(second, COPY, "second") == (None if step == 3 else 8)
    clip.track(second, 12, stream_id="second")
    assert [kind for _, kind, _ in edits(second)] == ["copy"]


def test_copies_that_do_not_fit_are_one_line(second: Path) -> None:
    for edit, message in (
        ({**COPY, "object": 7}, "object 7 is tracked already: give the copy another id"),
        ({"copy": {"object": 3, "stream": "walk"}}, r"no object 3 is tracked: there are \[1, 7\]"),
    ):
        with pytest.raises(UsageError, match=message):
            edit_memory(second, edit, "second")
    with pytest.raises(UsageError, match=r"has 2 streams: choose one with --from-stream: second, walk"):
        edit_memory(second, {"copy": {"object": 1}}, "second")
    edit_memory(second, COPY, "second")
    with pytest.raises(UsageError, match="max_long_term_elements=20 are allowed: copy fewer objects"):
        edit_memory(second, {**COPY, "object": 6}, "second")


def test_restart_removes_the_edits(clip: Clip, out: Path) -> None:
    edit_memory(out, EDIT)
    clip.track(out, 8, restart=True)
    assert files(out, "edits") == {}
    assert edits(out) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({}, "an edit of the memory is one of forget, pin, unpin, copy, not"),
        ({"pin": 1, "unpin": 2}, "an edit of the memory is one of"),
        ({"pin": -1}, r"pin='-1' is not allowed: frames are numbers from 0"),
        ({"pin": 1, "object": 1}, "pin, has no field 'object'"),
        ({"forget": 3}, "forget='3' is not allowed: the first and the last frame"),
        ({"forget": [9, 8]}, "the first frame is after the last"),
        ({"forget": [1, 2], "object": "1"}, "object='1' is not allowed: the id of an object"),
        ({"forget": [0, 100]}, "object 1 would remember nothing any more: forget less"),
        ({"forget": [0, 1], "object": 5}, r"no object 5 is tracked: there are \[1, 7\]"),
        ({"copy": 1}, "copy: 1 names no remembered object"),
        ({"copy": {"object": 1}, "x": 1}, "copy, has no field 'x'"),
        ({"copy": {"object": 1, "stream": "gate"}}, "object 1 of stream gate cannot be copied: no tracks of"),
        ({"copy": {"object": 1, "stream": "walk"}}, "stream 'walk' is the one that would receive the copy"),
        ({"copy": {"object": 1, "out": "/none"}}, "object 1 in /none cannot be copied: /none is no output"),
        ({"copy": {"object": 1, "out": "s3://k:secret@b/x"}}, "is stored as it is: leave credentials out"),
        ({"pin": 1000}, "frame 1000 is not in memory as a whole; whole frames: "),
    ],
)
def test_an_edit_that_cannot_be_made_is_one_line_and_changes_nothing(
    clip: Clip, edit: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        edit_memory(clip.out, edit)
    assert "\n" not in str(raised.value)
    assert files(clip.out, "edits") == {}


def test_streams_that_cannot_be_edited_are_named(clip: Clip, out: Path) -> None:
    store = StreamStore(out, "walk")
    with (
        lease(store._files, "batch-1", ["walk"]),
        pytest.raises(UsageError, match=r"is being tracked by batch batch-1 on .* edit its memory when"),
    ):
        edit_memory(out, EDIT)
    clip.track(out)
    with pytest.raises(UsageError, match="is tracked to the end of its video: no frame follows"):
        edit_memory(out, EDIT)


def test_the_command_edits(out: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = call("memory", out, "--forget", "4:6", "--object", "1")
    assert (code, "the next run of the same command tracks frame 20" in err) == (0, True)
    code, _, err = call("memory", out, "--pin", "18")
    assert code == 0
    code, _, err = call("memory", out, "--pin", "18")
    assert (code, "nothing changed" in err) == (0, True)
    code, table, err = call("memory", out)
    assert "pinned" in table
    assert 'waiting for the next run: {"forget": [4, 6], "object": 1}' in err
    code, listed, _ = call("memory", out, "--json")
    assert json.loads(listed)["edits"] == [{"forget": [4, 6], "object": 1}, {"pin": 18}]
    for options, message in (
        (("--copy", "1"), "object 1 cannot be copied: stream 'walk' is the one that would receive the copy"),
        (("--from-stream", "a"), "--from-stream goes with --copy OBJECT"),
        (("--forget", "6"), "--forget '6' is not allowed: FIRST:LAST, such as 40:55"),
        (("--pin", "3", "--unpin", "3"), "--pin and --unpin are edits of their own: give one at a time"),
        (("--object", "3"), "--object goes with --forget FIRST:LAST"),
    ):
        code, _, err = call("memory", out, *options)
        assert (code, message in err) == (2, True), err
