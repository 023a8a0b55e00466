"""File operations on disks and object stores that are full, forbidden, contested or missing."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.chunks import NO_EVENTS, rows

import pipeline.storage.local_files as local_disk
from pipeline.base.errors import AnotherWriterError, OutputError, StoreError
from pipeline.storage import retries
from pipeline.storage.files import Files
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.opening import open_files
from pipeline.storage.remote_files import RemoteFiles
from pipeline.tracks.store import CommittedRange, StreamStore

ROOT = Path(__file__).parents[3]


def leftovers(folder: Path) -> list[Path]:
    return list((folder / ".tmp").glob("*"))


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "local":
        return open_files(tmp_path)
    if request.param == "memory":
        return open_files(f"memory://{secrets.token_hex(6)}")
    server = request.getfixturevalue("s3_server")
    return open_files(server.uri(secrets.token_hex(6)), server.options)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# What every kind promises


def test_create_never_overwrites_and_replace_does(files: Files) -> None:
    assert files.create("a/b.bin", b"one")
    assert not files.create("a/b.bin", b"two")
    assert files.read("a/b.bin") == b"one"
    files.replace("a/b.bin", b"three")
    assert files.read("a/b.bin") == b"three"
    assert files.create("a/empty", b"")
    assert not files.create("a/empty", b"x")
    assert files.read("a/empty") == b""


def test_names_are_fresh_sorted_and_only_of_that_folder(files: Files) -> None:
    assert files.names("a") == []
    for name in ("a/2", "a/1", "a/sub/3", "ab/4"):
        files.create(name, b"x")
    assert files.names("a") == ["a/1", "a/2"]
    assert files.names("a", recursive=True) == ["a/1", "a/2", "a/sub/3"]
    files.remove("a/1")
    files.remove("a/1")
    assert files.names("a") == ["a/2"]
    assert files.exists("a/2")
    assert not files.exists("a/1")
    assert not files.exists("a")


def test_the_tail_of_a_file(files: Files) -> None:
    files.create("f", bytes(range(100)))
    assert files.tail("f", 10) == bytes(range(90, 100))
    assert files.tail("f", 1000) == bytes(range(100))
    with pytest.raises(FileNotFoundError):
        files.tail("none", 5)
    with pytest.raises(FileNotFoundError):
        files.read("none")


def test_of_many_threads_one_creates(files: Files) -> None:
    for round_ in range(2):
        outcomes: list[bool] = []
        barrier = threading.Barrier(8)

        def work(
            i: int, name: str = f"r{round_}", outcomes: list[bool] = outcomes, barrier: Any = barrier
        ) -> None:
            barrier.wait()
            outcomes.append(files.create(name, b"%d" % i * 1000))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [False] * 7 + [True]
        assert len(set(files.read(f"r{round_}"))) == 1


def test_a_file_uploaded_in_parts_is_created_exclusively_too(s3_server: Any) -> None:
    """s3fs uploads large files in parts, with the condition on the last request; here from 10 MB on."""
    files = open_files(s3_server.uri(secrets.token_hex(6)), s3_server.options)
    assert isinstance(files, RemoteFiles)
    pipe_file = files._fs.pipe_file
    files._fs = SimpleNamespace(
        pipe_file=partial(pipe_file, chunksize=5 * 2**20), info=files._fs.info, cat_file=files._fs.cat_file
    )
    large = bytes(11 * 2**20)
    assert files.create("large", large)
    assert not files.create("large", b"\1" * len(large))
    assert files.tail("large", 3) == bytes(3)


# Local disks


def test_a_full_disk_is_one_clear_line_and_loses_nothing(small_disk: Path) -> None:
    root = small_disk / "out"
    store = StreamStore(root, "cam-1")
    ends: list[int] = []

    def fill() -> None:
        for first in range(0, 100_000, 100):
            store.commit(first, first + 99, rows(first, first + 99), NO_EVENTS)
            ends.append(first + 100)

    with pytest.raises(
        OutputError, match=r"No space left on device; everything committed so far is kept"
    ) as caught:
        fill()
    end = ends[-1]
    assert "\n" not in str(caught.value)
    assert leftovers(root) == []
    assert StreamStore(root, "cam-1").committed(check=True) == CommittedRange(end, end // 100)
    with pytest.raises(StoreError, match="No space left"):
        store.save_snapshot(end, bytes(10**6))
    assert store.load_snapshot(end, bytes) is None
    # Space again: the same store goes on.
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert store.commit(end, end + 99, rows(end, end + 99), NO_EVENTS)
    assert StreamStore(root, "cam-1").committed(check=True).next_frame == end + 100


def test_a_disk_turned_read_only_is_one_clear_line(small_disk: Path) -> None:
    store = StreamStore(small_disk / "out", "cam-1")
    store.commit(0, 9, rows(0, 9), NO_EVENTS)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match=r"Read-only file system; choose a folder that you may write to"):
        store.commit(10, 19, rows(10, 19), NO_EVENTS)
    assert store.committed(check=True) == CommittedRange(10, 1)


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = StreamStore(tmp_path, "cam-1")
    store.commit(0, 9, rows(0, 9), NO_EVENTS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, hard))
    try:
        with pytest.raises(StoreError, match=r"File too large; everything committed so far is kept"):
            store.save_snapshot(10, bytes(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
    assert store.committed() == CommittedRange(10, 1)


def test_a_folder_one_may_not_write_to() -> None:
    """In a child process without root's rights: root may write everywhere."""
    code = (
        "import os, secrets, sys\n"
        "sys.path.insert(0, 'tests')\n"
        "from support.chunks import NO_EVENTS, rows\n"
        "from pipeline.tracks.store import StreamStore\n"
        "closed, opened = (StreamStore(sys.argv[1] + name, 'cam-1') for name in ('/closed/out', '/open'))\n"
        "opened.commit(0, 9, rows(0, 9), NO_EVENTS)\n"  # imports what is imported late
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "else: os.chmod(sys.argv[1] + '/closed', 0o555)\n"
        "try: closed.commit(0, 9, rows(0, 9), NO_EVENTS)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        os.mkdir(f"{folder}/closed", 0o755)
        command = [sys.executable, "-c", code, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.startswith(f"OutputError cannot write {folder}/closed/out/"), (
            done.stdout + done.stderr
        )
        assert "Permission denied; choose a folder that you may write to" in done.stdout
        assert os.listdir(f"{folder}/closed") == []


@pytest.mark.parametrize("inside", [".", "sub/out"])
def test_a_file_where_the_folder_should_be(tmp_path: Path, inside: str) -> None:
    (tmp_path / "out").write_text("a file")
    store = StreamStore(tmp_path / "out" / inside, "cam-1")
    with pytest.raises(StoreError, match=r"Not a directory(; a file is in the place of a folder)?") as caught:
        store.commit(0, 9, rows(0, 9), NO_EVENTS)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out").read_text() == "a file"


def test_without_hard_links_an_exclusive_rename_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(LocalFiles, "_is_taken", lambda *_: False)
    files = open_files(tmp_path)
    assert files.create("a/b", b"one")
    assert not files.create("a/b", b"two")
    assert files.read("a/b") == b"one"
    assert leftovers(tmp_path) == []


def test_with_neither_the_store_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr("pipeline.storage.local_places.sys.platform", "plan9")
    with pytest.raises(StoreError, match="neither hard links nor an exclusive rename"):
        open_files(tmp_path).create("a/b", b"one")
    assert not (tmp_path / "a/b").exists()
    assert leftovers(tmp_path) == []


def test_a_swept_temporary_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, calls = os.link, []

    def sweeping(source: str, target: str, **options: Any) -> None:
        calls.append(source)
        if len(calls) == 1:
            os.unlink(tmp_path / ".tmp" / source)
        link(source, target, **options)

    monkeypatch.setattr(os, "link", sweeping)
    assert open_files(tmp_path).create("a/b", b"one")
    assert len(calls) == 2
    assert (tmp_path / "a/b").read_bytes() == b"one"


def test_the_sweep_takes_only_what_dead_writers_left(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    folder = tmp_path / ".tmp"
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, token, mine = local_disk._HOST, local_disk._PROCESS_TOKEN, os.getpid()
    gone = [
        f"cam-1@{host}@{dead.pid}@aaaa@1.tmp",
        f"cam-1@{host}@{mine}@not-{token}@2.tmp",  # an earlier container's process of the same number
        "cam-2@elsewhere@1@aaaa@3.tmp",  # a day old
    ]
    kept = [
        f"cam-1@{host}@{mine}@{token}@4.tmp",
        f"cam-1@{host}@{os.getppid()}@aaaa@5.tmp",
        f"cam-2@{host}@{dead.pid}@aaaa@6.tmp",
        "cam-1@elsewhere@1@aaaa@7.tmp",
        "somebody's file",
    ]
    for name in (*gone, *kept):
        (folder / name).write_text("x")
    day_ago = time.time() - 25 * 3600
    os.utime(folder / gone[2], (day_ago, day_ago))
    files.sweep("cam-1")
    assert sorted(p.name for p in folder.iterdir()) == sorted(kept)


# Symbolic links


def outside(tmp_path: Path) -> Path:
    """A folder outside the output folder, with a file in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "frames-000000000000.parquet").write_bytes(b"theirs")
    return folder


LINKED = ["tracks", "tracks/stream_id=cam-1", "events", "events/stream_id=cam-1", "state", "state/cam-1"]
LINKED += ["streams", ".tmp"]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("link", LINKED)
def test_nothing_is_written_through_a_link(tmp_path: Path, link: str, relative: bool) -> None:
    theirs = outside(tmp_path)
    place = tmp_path / "out" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(os.path.relpath(theirs, place.parent) if relative else theirs, target_is_directory=True)
    store = StreamStore(tmp_path / "out", "cam-1")

    def write() -> None:
        store.prepare()
        store.commit(0, 9, rows(0, 9), NO_EVENTS)
        store.save_snapshot(10, b"state")
        store.write_record({"state": "running"})

    with pytest.raises(StoreError, match=rf"out/{link} is a symbolic link, and links inside .* not followed"):
        write()
    assert [p.name for p in theirs.iterdir()] == ["frames-000000000000.parquet"]
    assert place.is_symlink()
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.restart()
    assert [p.read_bytes() for p in theirs.iterdir()] == [b"theirs"]


def test_a_file_that_is_a_link_is_neither_read_nor_taken_for_ours(tmp_path: Path) -> None:
    theirs = outside(tmp_path) / "frames-000000000000.parquet"
    files = open_files(tmp_path / "out")
    assert files.create("tracks/stream_id=cam-1/notes", b"ours")
    link = tmp_path / "out/tracks/stream_id=cam-1/frames-000000000000.parquet"
    link.symlink_to(theirs)
    name = str(link.relative_to(tmp_path / "out"))
    assert not files.create(name, b"ours")
    for read in (files.read, files.exists, partial(files.tail, count=3)):
        with pytest.raises(StoreError, match=r"frames-000000000000\.parquet is a symbolic link"):
            read(name)
    with pytest.raises(StoreError, match="is a symbolic link"):
        files.names("tracks", recursive=True)
    files.replace(name, b"ours")  # in the place of the link
    assert (files.read(name), theirs.read_bytes()) == (b"ours", b"theirs")
    link.unlink()
    link.symlink_to(theirs)
    files.remove(name)
    assert theirs.read_bytes() == b"theirs"


def test_the_output_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk", target_is_directory=True)
    (tmp_path / "out").symlink_to(tmp_path / "link", target_is_directory=True)
    store = StreamStore(tmp_path / "out", "cam-1")
    store.prepare()
    assert store.commit(0, 9, rows(0, 9), NO_EVENTS)
    assert StreamStore(tmp_path / "disk", "cam-1").committed() == CommittedRange(10, 1)
    assert leftovers(tmp_path / "disk") == []


def test_a_link_that_comes_while_a_file_is_written_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder becomes a link between the check and the creation of the file."""
    theirs, link, calls = outside(tmp_path), os.link, []
    folder = tmp_path / "out/tracks/stream_id=cam-1"

    def swapping(source: str, target: str, **options: Any) -> None:
        calls.append(target)
        folder.rename(tmp_path / "moved")
        folder.symlink_to(theirs, target_is_directory=True)
        link(source, target, **options)

    files = open_files(tmp_path / "out")
    files.create("tracks/stream_id=cam-1/a", b"one")
    monkeypatch.setattr(os, "link", swapping)
    assert files.create("tracks/stream_id=cam-1/b", b"two")
    assert calls == ["b"]
    assert (tmp_path / "moved/b").read_bytes() == b"two"
    with pytest.raises(StoreError, match="is a symbolic link"):
        files.create("tracks/stream_id=cam-1/c", b"three")
    assert [p.name for p in theirs.iterdir()] == ["frames-000000000000.parquet"]


def test_without_operations_below_open_folders_links_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_disk, "HAS_PLACES", False)
    files = open_files(tmp_path / "out")
    assert files.create("a/b/c", b"one")
    assert not files.create("a/b/c", b"two")
    files.replace("a/b/d", b"three")
    assert files.names("a", recursive=True) == ["a/b/c", "a/b/d"]
    assert (files.read("a/b/c"), files.tail("a/b/d", 2), files.exists("a/b/e")) == (b"one", b"ee", False)
    files.remove("a/b/d")
    theirs = outside(tmp_path)
    (tmp_path / "out/a/link").symlink_to(theirs, target_is_directory=True)
    for use in (files.read, files.exists, partial(files.create, data=b""), partial(files.replace, data=b"")):
        with pytest.raises(StoreError, match="out/a/link is a symbolic link"):
            use("a/link/frames-000000000000.parquet")
    with pytest.raises(StoreError, match="out/a/link is a symbolic link"):
        files.names("a/link")
    assert [p.read_bytes() for p in theirs.iterdir()] == [b"theirs"]
    assert leftovers(tmp_path / "out") == []


# Object stores


class Fake(MemoryFileSystem):  # type: ignore[misc]
    """An object store with scripted responses to conditional writes."""

    protocol = "fake"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    answers: list[BaseException | None]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        answer = self.answers.pop(0) if mode == "create" and self.answers else None
        if answer is not None:
            raise answer
        super().pipe_file(path, value, mode="overwrite")


class ServerError(Exception):
    """Errors as client libraries raise them: with the HTTP status somewhere inside."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}\nof a server")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def faked(*answers: BaseException | None) -> RemoteFiles:
    fs = Fake()
    fs.answers = list(answers)
    files = RemoteFiles("fake://out", fs, f"/{secrets.token_hex(6)}")
    # The memory file system has its own exclusion; here the server's answers count.
    files._is_memory = False
    files._exclusive_checked = False
    return files


def test_a_store_that_ignores_the_condition_is_refused() -> None:
    with pytest.raises(StoreError, match="fake://out ignores the condition If-None-Match"):
        faked().create("a", b"x")


def test_a_store_that_honours_it_is_asked_once() -> None:
    files = faked(None, ServerError(412), None, None)
    assert files.create("a", b"x")
    assert files.create("b", b"x")
    assert files._fs.answers == [None]


def test_a_conflict_of_two_requests_is_asked_again() -> None:
    files = faked(ServerError(409), ServerError(409), None, FileExistsError())
    assert files.create("a", b"x")
    taken = faked(ServerError(409))
    taken.replace("a", b"theirs")
    assert not taken.create("a", b"x")
    with pytest.raises(StoreError, match="other writers kept writing"):
        faked(*[ServerError(409)] * 5).create("a", b"x")


def test_what_concerns_every_file_is_told_from_what_concerns_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", retries.Attempts(2, 0.001))
    missing = FileNotFoundError("The specified bucket does not exist")
    for whole in (ServerError(403), ServerError(401), PermissionError("Access Denied"), missing):
        with pytest.raises(OutputError, match="cannot write fake://out/a"):
            faked(whole).create("a", b"x")
    with pytest.raises(OutputError, match="507"):
        faked(*[ServerError(507)] * 2).create("a", b"x")
    for passing in (ServerError(503), ConnectionResetError("reset")):
        with pytest.raises(StoreError) as caught:
            faked(passing, passing).create("a", b"x")
        assert type(caught.value) is StoreError


def test_a_failing_request_is_tried_again_and_then_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", retries.Attempts(3, 0.001))
    files = faked(ServerError(503), ServerError(500), None, FileExistsError())
    assert files.create("a", b"x")
    assert files._fs.answers == []
    files = faked(*[ServerError(503)] * 4)
    with pytest.raises(StoreError, match=r"^cannot write fake://out/a: status 503 of a server$"):
        files.create("a", b"x")
    assert len(files._fs.answers) == 1
    files = faked(ServerError(403), None)
    with pytest.raises(StoreError, match="status 403"):
        files.create("a", b"x")
    assert files._fs.answers == [None]


def test_an_upload_that_landed_though_its_answer_was_lost_is_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library repeats the request and finds the name taken, by our own bytes."""
    store = StreamStore(f"memory://{secrets.token_hex(6)}", "cam-1")
    create = store._files.create
    monkeypatch.setattr(store._files, "create", lambda *a: (create(*a), create(*a))[1])
    assert store.commit(0, 9, rows(0, 9), NO_EVENTS) is False
    assert store.committed() == CommittedRange(10, 1)
    with pytest.raises(AnotherWriterError):
        StreamStore(store.root, "cam-1").commit(0, 9, rows(0, 9, salt=1), NO_EVENTS)


def test_sizes_folders_and_parts(files: Files) -> None:
    files.create("tracks/a/one", b"12345")
    files.create("tracks/b/two", b"123")
    files.create("tracks/three", b"1")
    assert files.sizes("tracks") == {"tracks/three": 1}
    assert files.sizes("tracks", recursive=True) == {"tracks/a/one": 5, "tracks/b/two": 3, "tracks/three": 1}
    assert files.folders("tracks") == ["a", "b"]
    assert files.folders("none") == []
    assert files.part("tracks/a/one", 1, 4) == b"234"
    with pytest.raises(FileNotFoundError):
        files.part("tracks/a/none", 0, 1)
