"""The store's guarantees on a local disk, file://, memory:// and a real S3 server."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, events, rows
from support.recorded import recorded

from pipeline.base.errors import AnotherWriterError, OutputError, StoreError, UsageError
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracks.chunk_file import events_bytes
from pipeline.tracks.store import CommittedRange, StreamStore


@dataclass
class Output:
    """An empty output folder somewhere."""

    root: str
    options: dict[str, Any] = field(default_factory=dict)

    def store(self, stream_id: str = "cam-1") -> StreamStore:
        return StreamStore(self.root, stream_id, self.options)

    @property
    def files(self) -> Files:
        return open_files(self.root, self.options)

    def content(self, *folders: str) -> dict[str, bytes]:
        names = [n for folder in folders for n in self.files.names(folder, recursive=True)]
        return {name: self.files.read(name) for name in names}


@pytest.fixture(params=["local", "file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    if request.param == "local":
        return Output(str(tmp_path / "out"))
    if request.param == "file":
        return Output((tmp_path / "out").as_uri())
    if request.param == "memory":
        return Output(f"memory://{secrets.token_hex(6)}/out")
    server = request.getfixturevalue("s3_server")
    return Output(server.uri(f"test-{secrets.token_hex(6)}"), server.options)


@pytest.fixture
def local(tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out"))


def track(kind: str, first: int, stream_id: str = "cam-1") -> str:
    return f"{kind}/stream_id={stream_id}/frames-{first:012d}.parquet"


def fill(output: Output, stream_id: str = "cam-1", ends: tuple[int, ...] = (10, 20, 25)) -> StreamStore:
    """Commit chunks that end before the given frames; events in every second one."""
    store = output.store(stream_id)
    first = 0
    for i, end in enumerate(ends):
        assert store.commit(first, end - 1, rows(first, end - 1), events(first) if i % 2 else NO_EVENTS)
        first = end
    return store


# Commit and resume


def test_commits_lie_where_the_layout_says_and_hold_what_was_given(output: Output) -> None:
    assert output.store().committed() == CommittedRange(0, 0)
    store = fill(output)
    found = output.content("tracks", "events", "state", "streams")
    assert sorted(found) == sorted(
        track(kind, first) for kind in ("tracks", "events") for first in (0, 10, 20)
    )
    table = pq.read_table(pa.BufferReader(found[track("tracks", 10)]))
    assert table.to_pylist() == rows(10, 19).to_pylist()
    happened = pq.read_table(pa.BufferReader(found[track("events", 10)]))
    assert happened.to_pylist() == events(10).to_pylist()
    assert store.committed() == output.store().committed(check=True) == CommittedRange(25, 3)


def test_a_second_store_goes_on_where_the_first_stopped(output: Output) -> None:
    fill(output)
    store = output.store()
    store.prepare()
    assert store.committed().next_frame == 25
    assert store.commit(25, 40, rows(25, 40), NO_EVENTS)
    assert output.store().committed(check=True) == CommittedRange(41, 4)


def test_a_chunk_without_rows_moves_the_stream_on(output: Output) -> None:
    store = output.store()
    assert store.commit(0, 49, rows(0, 1).slice(0, 0), NO_EVENTS)
    assert output.store().committed() == CommittedRange(50, 1)


def test_repeating_a_chunk_is_success_and_writes_nothing(output: Output) -> None:
    store = fill(output)
    before = output.content("tracks", "events")
    assert store.commit(10, 19, rows(10, 19), events(10)) is False
    assert output.store().commit(20, 24, rows(20, 24), NO_EVENTS) is False
    assert output.content("tracks", "events") == before


@pytest.mark.parametrize("what", ["rows", "events", "length"])
def test_other_content_under_a_taken_name_is_another_writer(output: Output, what: str) -> None:
    fill(output)
    before = output.content("tracks", "events")
    last = 30 if what == "length" else 24
    tracks = rows(20, last, salt=what == "rows")
    with pytest.raises(
        AnotherWriterError, match=r"frames-000000000020\.parquet already holds other rows.*cam-1"
    ):
        output.store().commit(20, last, tracks, events(20) if what == "events" else NO_EVENTS)
    assert output.content("tracks", "events") == before


def test_a_writer_that_was_overtaken_stops(output: Output) -> None:
    slow, fast = output.store(), output.store()
    slow.commit(0, 9, rows(0, 9), NO_EVENTS)
    fast.commit(0, 9, rows(0, 9), NO_EVENTS)
    fast.commit(10, 19, rows(10, 19), NO_EVENTS)
    with pytest.raises(AnotherWriterError):
        slow.commit(10, 29, rows(10, 29), NO_EVENTS)
    assert output.store().committed(check=True) == CommittedRange(20, 2)


def test_frames_cannot_be_left_out_or_overlap(local: Output) -> None:
    store = fill(local)
    with pytest.raises(StoreError, match=r"frames 30\.\.39 cannot be committed before frames 25\.\.29"):
        store.commit(30, 39, rows(30, 39), NO_EVENTS)
    with pytest.raises(ValueError, match="begins at 15"):
        store.commit(15, 30, rows(15, 30), NO_EVENTS)
    assert local.store().committed(check=True) == CommittedRange(25, 3)


def test_two_streams_do_not_meet(output: Output) -> None:
    fill(output, "cam-1")
    fill(output, "cam", ends=(7,))
    assert output.store("cam").committed() == CommittedRange(7, 1)
    assert output.store("cam-1").committed() == CommittedRange(25, 3)


# What a killed writer leaves


def test_events_without_tracks_are_ignored_and_taken_over(output: Output) -> None:
    store = fill(output)
    name = track("events", 25)
    assert output.files.create(name, events_bytes("cam-1", 25, 29, events(25)))
    assert output.store().committed() == CommittedRange(25, 3)
    assert store.commit(25, 29, rows(25, 29), events(25))
    assert output.files.read(name) == events_bytes("cam-1", 25, 29, events(25))


def test_leftover_events_of_other_content_are_replaced(output: Output) -> None:
    fill(output)
    name = track("events", 25)
    assert output.files.create(name, events_bytes("cam-1", 25, 27, events(25, salt=5)))
    assert output.store().commit(25, 29, rows(25, 29), events(25))
    assert output.files.read(name) == events_bytes("cam-1", 25, 29, events(25))


def test_killed_between_tracks_and_replacing_leftover_events(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(output)
    name = track("events", 25)
    output.files.create(name, events_bytes("cam-1", 25, 27, events(25, salt=5)))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_settle_events", killed)
    with pytest.raises(KeyboardInterrupt):
        store.commit(25, 29, rows(25, 29), events(25))
    assert output.store().committed().next_frame == 30
    again = output.store()
    again.prepare()
    assert output.files.read(name) == events_bytes("cam-1", 25, 29, events(25))


def test_the_loser_of_a_race_does_not_touch_the_winners_events(output: Output) -> None:
    """Both wrote events before either had written the tracks; the tracks file decides."""
    fill(output)
    loser, winner = output.store(), output.store()
    loser.committed()
    winner.committed()
    create = loser._files.create

    def interleaved(name: str, data: bytes, owner: str = "") -> bool:
        if name.startswith("tracks/"):
            winner.commit(25, 29, rows(25, 29), events(25))
        return create(name, data, owner)

    loser._files.create = interleaved  # type: ignore[method-assign]
    with pytest.raises(AnotherWriterError):
        loser.commit(25, 29, rows(25, 29, salt=1), events(25, salt=1))
    assert output.files.read(track("events", 25)) == events_bytes("cam-1", 25, 29, events(25))


def test_prepare_changes_nothing_in_a_stream_left_in_order(output: Output) -> None:
    fill(output).write_record({"state": "done"})
    before = output.content("tracks", "events", "streams")
    output.store().prepare()
    assert output.content("tracks", "events", "streams") == before


def test_prepare_of_nothing_makes_nothing(local: Output) -> None:
    local.store().prepare()
    assert not Path(local.root).exists()


# Gaps and damage


@pytest.mark.parametrize("first", [0, 10, 30, 40])
@pytest.mark.parametrize("check", [False, True])
def test_a_missing_file_is_found_and_named(local: Output, first: int, check: bool) -> None:
    fill(local, ends=(10, 20, 30, 40, 50, 60))
    local.files.remove(track("tracks", first))
    with pytest.raises(StoreError, match=rf"frames-{first:012d}\.parquet is missing.*--restart"):
        local.store().committed(check)


def test_every_second_file_missing_is_found(local: Output) -> None:
    fill(local, ends=(10, 20, 30, 40, 50))
    for first in (10, 30):
        local.files.remove(track("tracks", first))
    with pytest.raises(StoreError, match=r"frames-000000000010\.parquet is missing"):
        local.store().committed()


def test_without_its_last_files_a_stream_goes_on_from_before_them(local: Output) -> None:
    fill(local)
    local.files.remove(track("tracks", 20))
    store = local.store()
    store.prepare()
    assert store.committed() == CommittedRange(20, 2)
    assert store.commit(20, 29, rows(20, 29), events(20))


def test_overlapping_files_are_found(local: Output) -> None:
    fill(local)
    stray = Output(local.root + "-2")
    fill(stray, ends=(5, 12))
    local.files.create(track("tracks", 5), stray.files.read(track("tracks", 5)))
    with pytest.raises(StoreError, match=r"frames-000000000005\.parquet begins before frame 10"):
        local.store().committed()


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "other name"])
def test_a_damaged_newest_file_is_named_and_left(local: Output, damage: str) -> None:
    fill(local)
    name = track("tracks", 20)
    path = Path(local.root, name)
    data = path.read_bytes()
    bad = {"cut": data[:-20], "empty": b"", "zeros": bytes(len(data))}.get(damage)
    path.write_bytes(Path(local.root, track("tracks", 0)).read_bytes() if bad is None else bad)
    with pytest.raises(
        StoreError, match=r"frames-000000000020\.parquet (is damaged|holds frames 0\.\.9)"
    ) as caught:
        local.store().committed()
    assert "\n" not in str(caught.value)
    assert path.exists()
    with pytest.raises(StoreError):
        local.store().commit(25, 29, rows(25, 29), NO_EVENTS)


def test_files_that_are_not_ours_are_no_chunks(local: Output) -> None:
    fill(local)
    folder = Path(local.root, "tracks/stream_id=cam-1")
    for name in ("notes.txt", "frames-1.parquet", "frames-000000000025.parquet.part", ".DS_Store"):
        (folder / name).write_text("?")
    assert local.store().committed(check=True) == CommittedRange(25, 3)


@pytest.mark.slow
def test_many_files_need_few_footers(local: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = (*range(3, 601, 3), *range(605, 701, 5), 703)
    chunk = fill(local, ends=(3,))
    for first, end in zip((3, *ends[1:]), ends[1:], strict=False):
        chunk.commit(first, end - 1, rows(0, 0).slice(0, 0), NO_EVENTS)
    store = local.store()
    reads: list[str] = []
    tail = store._files.tail
    monkeypatch.setattr(store._files, "tail", recorded(tail, reads, 0))
    assert store.committed() == CommittedRange(703, len(ends))
    assert 2 <= len(reads) <= 5
    assert local.store().committed(check=True) == CommittedRange(703, len(ends))


# Snapshots


def test_the_newest_snapshot_not_after_the_rows_is_loaded(output: Output) -> None:
    store = output.store()
    assert store.load_snapshot(100, bytes) is None
    for frame in (10, 20):
        store.save_snapshot(frame, b"state %d" % frame)
    assert output.store().load_snapshot(25, bytes) == (20, b"state 20")
    assert store.load_snapshot(20, bytes) == (20, b"state 20")
    assert store.load_snapshot(19, bytes) == (10, b"state 10")
    assert store.load_snapshot(9, bytes) is None


def test_the_newest_two_snapshots_are_kept(output: Output) -> None:
    store = output.store()
    for frame in (10, 20, 30):
        store.save_snapshot(frame, b"x")
    assert output.files.names("state/cam-1") == [f"state/cam-1/{f:012d}.safetensors" for f in (20, 30)]
    for frame in (40, 50, 60):
        store.save_snapshot(frame, b"x", keep=3)
    assert len(output.files.names("state/cam-1")) == 3
    store.save_snapshot(45, b"y")
    assert [n[-18:-12] for n in output.files.names("state/cam-1")] == ["000040", "000045"]


def test_snapshots_are_spread_over_the_stream(local: Output) -> None:
    """Whatever frame one goes back to, a snapshot is not far before it."""
    store = StreamStore(local.root, "cam-1", snapshots=3, spread=80)
    for frame in range(10, 1010, 10):
        store.save_snapshot(frame, bytes(10))  # eight of them are 80 bytes
    frames = [int(name[-24:-12]) for name in local.files.names("state/cam-1")]
    assert len(frames) == 8
    assert frames[-1] == 1000
    gaps = np.diff([0, *frames])
    assert max(gaps) <= 2 * 1000 / 8
    store.save_snapshot(1010, bytes(100))  # larger ones: as many as are always kept
    assert len(local.files.names("state/cam-1")) == 3


def test_a_damaged_snapshot_gives_way_to_an_older_one(
    local: Output, caplog: pytest.LogCaptureFixture
) -> None:
    store = local.store()
    store.save_snapshot(10, b"good")
    store.save_snapshot(20, b"bad")

    def validate(blob: bytes) -> str:
        if blob != b"good":
            raise ValueError("no safetensors header")
        return blob.decode()

    assert store.load_snapshot(50, validate) == (10, "good")
    assert "000000000020.safetensors is not usable" in caplog.text
    assert "no safetensors header" in caplog.text
    store.save_snapshot(10, b"bad")
    assert store.load_snapshot(50, validate) is None


# The record


def test_the_record_comes_back_with_its_version(output: Output) -> None:
    store = output.store()
    assert store.read_record() is None
    store.write_record({"source": "größe.mp4", "settings": {"mem_every": 5}})
    store.write_record({"source": "größe.mp4", "settings": {"mem_every": 3}, "format_version": 99})
    assert output.store().read_record() == {
        "format_version": 1,
        "stream_id": "cam-1",
        "source": "größe.mp4",
        "settings": {"mem_every": 3},
    }
    text = output.files.read("streams/cam-1.json").decode()
    assert json.loads(text)["source"] == "größe.mp4"
    assert "größe" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b'{"format_version": 1, "stre', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[1]", "has no format_version"),
        (b"{}", "has no format_version"),
        (b'{"format_version": 2, "stream_id": "cam-1"}', "format version 2.*upgrade"),
        (b'{"format_version": 1, "stream_id": "cam-2"}', "is that of stream 'cam-2'"),
    ],
)
def test_a_damaged_record_says_what_to_do(local: Output, content: bytes, message: str) -> None:
    store = fill(local)
    local.files.replace("streams/cam-1.json", content)
    with pytest.raises(
        StoreError, match=rf"stream record .*streams/cam-1\.json {message}|format version 2"
    ) as caught:
        store.read_record()
    assert "\n" not in str(caught.value)
    store.prepare()
    assert store.committed().next_frame == 25
    store.restart()
    assert local.content("tracks", "streams") == {}


# Starting over


def test_restart_removes_this_stream_only(output: Output) -> None:
    for stream_id in ("cam-1", "cam", "cam-1.x"):
        store = fill(output, stream_id)
        store.save_snapshot(10, b"x")
        store.write_record({"state": "done"})
    before = output.content("tracks", "events", "state", "streams")
    store = output.store("cam-1")
    store.restart()
    left = {
        n: d
        for n, d in before.items()
        if "/cam-1/" not in n.replace("stream_id=", "") and n != "streams/cam-1.json"
    }
    assert output.content("tracks", "events", "state", "streams") == left
    assert len(left) == len(before) - 8
    assert store.committed() == CommittedRange(0, 0)
    assert store.commit(0, 4, rows(0, 4, salt=1), NO_EVENTS)


@pytest.mark.parametrize("removals", range(9))
def test_a_restart_killed_anywhere_leaves_no_gap_and_is_finished_next_time(
    local: Output, removals: int
) -> None:
    store = fill(local)
    store.save_snapshot(10, b"x")
    store.save_snapshot(20, b"x")
    store.write_record({"state": "done", "model": "m"})
    remove, left = store._files.remove, [removals]

    def counted(name: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(name)

    store._files.remove = counted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        store.restart()
    again = local.store()
    assert again.committed(check=True).files == max(0, 3 - removals)
    record = again.read_record()
    assert record is not None
    assert (record["state"], record["model"]) == ("restarting", "m")
    again.prepare()
    assert local.content("tracks", "events", "state", "streams") == {}
    assert again.committed() == CommittedRange(0, 0)


def test_a_writer_still_at_work_stops_when_its_stream_is_restarted(output: Output) -> None:
    old = fill(output)
    output.store().restart()
    with pytest.raises(AnotherWriterError, match=r"frames-000000000020\.parquet has vanished: another run"):
        old.commit(25, 29, rows(25, 29), NO_EVENTS)
    assert output.store().committed() == CommittedRange(0, 0)


@pytest.mark.parametrize("before", ["events", "tracks"])
def test_a_commit_in_the_middle_of_a_restart_is_taken_back(output: Output, before: str) -> None:
    """The restart removes everything after the writer's check and before its write."""
    old = fill(output)
    create = old._files.create

    def late(name: str, data: bytes, owner: str = "") -> bool:
        if name.startswith(before):
            output.store().restart()
        return create(name, data, owner)

    old._files.create = late  # type: ignore[method-assign]
    with pytest.raises(AnotherWriterError, match=r"frames-000000000020\.parquet has vanished: another run"):
        old.commit(25, 29, rows(25, 29), NO_EVENTS)
    assert output.content("tracks", "events", "streams") == {}


def test_a_restart_removes_what_is_committed_while_it_removes(output: Output) -> None:
    old, new = fill(output), output.store()
    remove, late = new._files.remove, [True]

    def removing(name: str) -> None:
        if late and name == track("tracks", 20):
            late.clear()
            assert old.commit(25, 29, rows(25, 29), NO_EVENTS)
        remove(name)

    new._files.remove = removing  # type: ignore[method-assign]
    new.restart()
    assert not late
    assert output.content("tracks", "events", "streams") == {}


# Opening


def test_a_bad_id_is_refused_before_anything_is_touched(local: Output) -> None:
    with pytest.raises(UsageError, match=r"'\.\./x' is not allowed"):
        local.store("../x")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("", "name is empty"),
        ("simplecache::s3://b/x", "chained"),
        ("nosuch://x", "nosuch"),
    ],
)
def test_a_root_that_cannot_be_is_refused(root: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        StreamStore(root, "cam-1")


def test_a_bucket_that_cannot_be_written_is_one_clear_line(s3_server: Any) -> None:
    store = StreamStore("s3://x/out", "cam-1", s3_server.options)
    with pytest.raises(OutputError, match=r"cannot (write|list) s3://x/out/.*bucket is not valid") as caught:
        store.commit(0, 9, rows(0, 9), NO_EVENTS)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_one_clear_line(s3_server: Any) -> None:
    wrong = dict(s3_server.options, secret="wrong")
    with pytest.raises(OutputError, match=r"cannot list s3://videos/out/tracks/stream_id=cam-1: ") as caught:
        StreamStore("s3://videos/out", "cam-1", wrong).committed()
    assert "\n" not in str(caught.value)


def test_missing_credentials_are_a_fault_of_the_whole_output(
    s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = {"client_kwargs": s3_server.options["client_kwargs"], "skip_instance_cache": True}
    with pytest.raises(OutputError, match="redentials"):
        StreamStore("s3://videos/out", "cam-1", nobody).committed()
