"""Manifests: listing of videos, assignment of prompts, and errors of invalid rows."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.servers import S3Server

from jobs.batch.listing import Skipped, sidecar_of
from jobs.batch.manifest import load_manifest
from jobs.batch.manifest_file import absolute
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import UsageError
from pipeline.base.joined_uris import joined_parts
from pipeline.base.stream_ids import generate_stream_id, relative_stream_id
from pipeline.distributed.messages import StreamSpec

BOX = {"version": 1, "objects": [{"frame": 0, "id": 1, "box": [1, 2, 30, 40]}]}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(BOX) if name.endswith(".json") else "x")
    return folder


def names(jobs: list[VideoJob], root: Path | str) -> list[str]:
    return [job.spec.uri.removeprefix(f"{root}/") for job in jobs]


def prompts(jobs: list[VideoJob], root: Path | str) -> list[str | None]:
    return [p and p.removeprefix(f"{root}/") for p in (job.spec.prompts_uri for job in jobs)]


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_manifest(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def manifest(folder: Path, *rows: Any, name: str = "m.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


# --- folders and globs ---------------------------------------------------------------------------


def test_a_folder_means_its_videos_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.MKV", "deep/er/c.webm", "notes.txt", "a.prompts.json", "c.masks.png")
    touch(tmp_path, ".hidden.mp4", ".cache/d.mp4", "deep/.trash/e.mp4", "out/streams/f.json", "noext")
    jobs = load_manifest(tmp_path, detector="d")
    assert names(jobs, tmp_path) == ["a.MKV", "b.mp4", "deep/er/c.webm"]
    assert [j.spec.stream_id for j in jobs] == [generate_stream_id(j.spec.uri) for j in jobs]
    assert [j.priority for j in jobs] == [1.0] * 3


def test_what_a_folder_or_a_glob_skips_is_named_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.mp4", "a.prompts.json", "notes.txt", "deep/b.jpg", "d.masks.png", ".hidden.txt")
    skipped = Skipped()
    load_manifest(tmp_path, skipped=skipped)
    assert skipped.files == [
        (f"{tmp_path}/deep/b.jpg", "not a video suffix"),
        (f"{tmp_path}/notes.txt", "not a video suffix"),
        (f"{tmp_path}/d.masks.png", "prompts or masks without a video"),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 3 files skipped: b.jpg, notes.txt (not a video suffix); d.masks.png (prompts or "
        "masks without a video)"
    ]
    skipped = Skipped()
    load_manifest(f"{tmp_path}/*", skipped=skipped)
    assert [Path(uri).name for uri, _ in skipped.files] == ["notes.txt", "d.masks.png"]
    caplog.clear()
    load_manifest(f"{tmp_path}/*.mp4")
    assert caplog.records == []
    for i in range(2000):
        skipped.add(f"s3://b/{i}.jpg", "not a video suffix")
    assert (skipped.count, len(skipped.files)) == (2002, 1000)
    assert str(skipped).endswith("; and 1994 more, see the report")


def test_the_output_folder_is_no_part_of_the_videos_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.mp4", "out/streams/a.json", "out/tracks/stream_id=a/f.parquet", "out/a-masks.mp4")
    touch(tmp_path, "outside/b.mp4")
    monkeypatch.chdir(tmp_path)
    for out in ("out", "out/", f"{tmp_path}/out", f"file://{tmp_path}/out"):
        for videos in (".", f"{tmp_path}", "**/*.mp4"):
            jobs = load_manifest(videos, detector="d", out=out)
            assert names(jobs, tmp_path) == ["a.mp4", "outside/b.mp4"], (videos, out)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.mp4", ["a.mp4", "b.mp4"]),
        ("**/*.mp4", ["a.mp4", "b.mp4", "x/c.mp4", "x/y/d.mp4"]),
        ("x/*", ["x/c.mp4", "x/e.avi"]),
        ("*/y/*.mp4", ["x/y/d.mp4"]),
        ("[ac].mp4", ["a.mp4"]),
        ("?.*", ["a.mp4", "b.mp4", "c.raw"]),
        ("*.raw", ["c.raw"]),
        ("*", ["a.mp4", "b.mp4"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.raw", "x/c.mp4", "x/e.avi", "x/readme", "x/y/d.mp4", ".h.mp4")
    touch(tmp_path, "a.prompts.json", "b.masks.png")
    monkeypatch.chdir(tmp_path)
    for given in (f"{tmp_path}/{pattern}", f"file://{tmp_path}/{pattern}", pattern):
        assert names(load_manifest(given, detector="d"), tmp_path) == expected, given


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "take[1].mp4", "take1.mp4")
    jobs = load_manifest(tmp_path / "take[1].mp4", detector="d")
    assert names(jobs, tmp_path) == ["take[1].mp4"]
    assert names(load_manifest(f"{tmp_path}/take[12].mp4", detector="d"), tmp_path) == ["take1.mp4"]


def test_local_videos_are_named_so_that_another_process_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "in/a.mp4", "in/a.prompts.json")
    monkeypatch.chdir(tmp_path)
    expected = StreamSpec(
        generate_stream_id(f"{tmp_path}/in/a.mp4"), f"{tmp_path}/in/a.mp4", f"{tmp_path}/in/a.prompts.json"
    )
    manifest(tmp_path, {"uri": "in/a.mp4"})
    for source in ("in", "in/a.mp4", f"file://{tmp_path}/in", "./in/*.mp4", "m.jsonl", "in/../in/a.mp4"):
        assert [job.spec for job in load_manifest(source)] == [expected], source


def test_the_memory_file_system_keeps_its_scheme() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for name in ("a.mp4", "sub/b.mp4", "sub/b.prompts.json"):
        fs.pipe_file(f"/manifest-test/{name}", b"x")
    for source in ("memory://manifest-test", "memory://manifest-test/", "memory://manifest-test/**/*.mp4"):
        jobs = load_manifest(source)
        assert names(jobs, "memory://manifest-test") == ["a.mp4", "sub/b.mp4"]
        assert prompts(jobs, "memory://manifest-test") == [None, "sub/b.prompts.json"]


def test_videos_in_an_archive_are_named_within_it(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for name in ("one/a.mp4", "one/a.prompts.json", "two/b.mp4"):
            archive.writestr(name, "x")
    jobs = load_manifest(f"zip://**/*.mp4::file://{tmp_path}/v.zip")
    assert [j.spec.uri for j in jobs] == [
        f"zip://{n}::file://{tmp_path}/v.zip" for n in ("one/a.mp4", "two/b.mp4")
    ]
    assert jobs[0].spec.prompts_uri == f"zip://one/a.prompts.json::file://{tmp_path}/v.zip"


def test_a_bucket_is_listed_once_however_many_videos_it_holds(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3_server.options)
    root = s3_server.uri("manifest")
    fs.pipe({f"{root}/{i:02d}/v{i}.mp4": b"x" for i in range(30)})
    fs.pipe({f"{root}/{i:02d}/v{i}.prompts.json": b"x" for i in range(0, 30, 2)})
    fs.pipe(f"{root}/.tmp/z.mp4", b"x")
    calls: list[str] = []
    plain = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return await plain(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    for source in (root, f"{root}/**/*.mp4"):
        calls.clear()
        jobs = load_manifest(source, storage_options=s3_server.options)
        assert names(jobs, root) == [f"{i:02d}/v{i}.mp4" for i in range(30)]
        assert prompts(jobs, root) == [None if i % 2 else f"{i:02d}/v{i}.prompts.json" for i in range(30)]
        assert len(calls) < 8, calls
    monkeypatch.undo()
    assert jobs[3].spec.stream_id == generate_stream_id(f"{root}/03/v3.mp4")
    fs.pipe(f"{root}/30/v30.mp4", b"x")  # nothing of the first listing is remembered
    assert len(load_manifest(root, storage_options=s3_server.options)) == 31


def test_a_manifest_in_a_bucket_is_relative_to_itself(s3_server: S3Server) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3_server.options)
    root = s3_server.uri("relative")
    fs.pipe(f"{root}/lists/m.csv", b"uri,prompts\na.mp4,p.json\n../clips/b.mp4,\n/../c.mp4,/p.json\n")
    fs.pipe(f"{root}/clips/b.masks.png", b"x")
    jobs = load_manifest(f"{root}/lists/m.csv", storage_options=s3_server.options)
    assert [j.spec.uri for j in jobs] == [f"{root}/lists/a.mp4", f"{root}/clips/b.mp4", "/../c.mp4"]
    expected = [f"{root}/lists/p.json", f"{root}/clips/b.masks.png", "/p.json"]
    assert [j.spec.prompts_uri for j in jobs] == expected


def test_nothing_found_says_what_there_is(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "none")
    assert "holds no video (0 other files" in refused(tmp_path)
    touch(tmp_path, "frames/0.jpg", "frames/1.jpg")
    assert "name it in a manifest" in refused(tmp_path)
    assert "matches no video" in refused(f"{tmp_path}/*.mp4")
    touch(tmp_path, "list.txt")
    assert "a manifest is one of .jsonl" in refused(tmp_path / "list.txt")
    assert "xyz" in refused("xyz://bucket/folder")


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        (["a.prompts.json"], "a.prompts.json"),
        (["a.masks.png"], "a.masks.png"),
        (["a.mp4.prompts.json", "a.prompts.json"], "a.mp4.prompts.json"),
        (["a.mp4.masks.png"], "a.mp4.masks.png"),
        (["a.masks.png", "a.prompts.json"], "a.prompts.json"),
        (["b.prompts.json", "a.prompts.yaml", "A.prompts.json"], None),
    ],
)
def test_sidecars(tmp_path: Path, beside: list[str], expected: str | None) -> None:
    assert sidecar_of("a.mp4", set(beside)) == expected
    touch(tmp_path, "a.mp4", *beside)
    manifest(tmp_path, {"uri": "a.mp4"})
    for source in (tmp_path, tmp_path / "a.mp4", tmp_path / "m.jsonl"):
        assert prompts(load_manifest(source, detector="d"), tmp_path) == [expected], source


def test_a_video_without_suffix_and_a_folder_of_images_have_sidecars_too(tmp_path: Path) -> None:
    touch(tmp_path, "v1.0/0.png", "v1.0.prompts.json", "clip", "clip.masks.png")
    jobs = load_manifest(manifest(tmp_path, {"uri": "v1.0/"}, {"uri": "clip"}))
    assert prompts(jobs, tmp_path) == ["v1.0.prompts.json", "clip.masks.png"]


def test_own_prompts_come_before_those_for_all(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4", "b.prompts.json", "d.prompts.json", "all.json")
    rows = [
        {"uri": "a.mp4"},
        {"uri": "b.mp4"},
        {"uri": "c.mp4", "prompts": BOX},
        {"uri": "d.mp4", "prompts": "s3://elsewhere/d.png"},
    ]
    jobs = load_manifest(manifest(tmp_path, *rows), prompts=str(tmp_path / "all.json"))
    assert prompts(jobs, tmp_path) == ["all.json", "b.prompts.json", None, "s3://elsewhere/d.png"]
    assert [j.spec.prompts for j in jobs] == [None, None, BOX, None]


def test_prompts_for_all_are_checked_before_anything_starts(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "bad.json").write_text('{"version": 1, "objects": [{"id": 1}]}')
    assert "objects[0]: has none of box" in refused(tmp_path, prompts=str(tmp_path / "bad.json"))
    assert "cannot be read" in refused(tmp_path, prompts=str(tmp_path / "none.json"))
    assert "give a .json prompts file or a .png" in refused(tmp_path, prompts="prompts.txt")
    cv2.imwrite(str(tmp_path / "empty.png"), np.zeros((2, 2), np.uint8))
    assert "shows no object" in refused(tmp_path, prompts=str(tmp_path / "empty.png"))


def test_nothing_to_track_anywhere_is_an_error_something_somewhere_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    message = refused(tmp_path)
    assert "any of the 2 videos" in message
    assert "a.prompts.json" in message
    assert "--detect" in message
    assert len(load_manifest(tmp_path, detector="d")) == 2
    touch(tmp_path, "b.masks.png")
    assert prompts(load_manifest(tmp_path), tmp_path) == [None, "b.masks.png"]


def test_a_folder_that_cannot_be_listed_has_no_sidecars(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    touch(tmp_path, "a.mp4", "b.mp4", "p.json")

    def ls(self: Any, path: str, **options: Any) -> Any:
        raise PermissionError("no right to list")

    rows = [{"uri": "a.mp4", "prompts": "p.json"}, {"uri": "b.mp4"}, {"uri": "gone/c.mp4"}, {"uri": "c.mp4"}]
    source = manifest(tmp_path, *rows)
    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    assert prompts(load_manifest(source), tmp_path) == ["p.json", None, None, None]
    assert caplog.text.count(f"{tmp_path} cannot be listed") == 1


def test_prompts_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.prompts.json").write_text("not JSON at all")
    assert prompts(load_manifest(tmp_path), tmp_path) == ["a.prompts.json"]


# --- manifest files ------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"uri": "a.mp4", "stream_id": "first", "prompts": "a.json", "priority": 2.5, "direction": "both"},
    {"uri": "sub/b.mp4", "stream_id": None, "prompts": None, "priority": None, "direction": None},
    {
        "uri": "s3://bucket/c.mp4",
        "stream_id": "third",
        "prompts": "s3://bucket/c.png",
        "priority": 1.0,
        "direction": "backward",
    },
]


def as_jsonl(folder: Path) -> Path:
    return manifest(folder, ROWS[0], "", {k: v for k, v in ROWS[1].items() if v}, ROWS[2])


def as_csv(folder: Path) -> Path:
    cells = [[str(v or "") for v in row.values()] for row in ROWS]
    return manifest(
        folder, "\ufeffuri,stream_id,prompts,priority,direction", *map(",".join, cells), name="m.csv"
    )


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "m.parquet")
    return folder / "m.parquet"


def as_gzip(folder: Path) -> Path:
    path = folder / "m.ndjson.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_gzip])
def test_every_format_says_the_same(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    second = f"{tmp_path}/sub/b.mp4"
    assert load_manifest(write(tmp_path), priority=3) == [
        VideoJob(StreamSpec("first", f"{tmp_path}/a.mp4", f"{tmp_path}/a.json", direction="both"), 2.5),
        VideoJob(StreamSpec(generate_stream_id(second), second), 3),
        VideoJob(StreamSpec("third", "s3://bucket/c.mp4", "s3://bucket/c.png", direction="backward"), 1.0),
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "line 2: not a JSON object"),
        ('"a.mp4"', "line 2: 'a.mp4' is not a JSON object"),
        ("[" * 100_000, "line 2: not a JSON object"),
        ({}, "line 2: uri None is not allowed"),
        ({"uri": " "}, "line 2: uri ' ' is not allowed"),
        ({"uri": 7}, "line 2: uri 7 is not allowed"),
        ({"uri": "a.mp4", "promts": "x.json"}, "line 2: column 'promts' is unknown: did you mean prompts"),
        ({"uri": "a.mp4", "stream_id": "a b"}, "line 2: stream id 'a b' is not allowed"),
        ({"uri": "a.mp4", "stream_id": 5}, "line 2: stream id 5 is not allowed"),
        (
            {"uri": "a.mp4", "direction": "left"},
            "line 2: direction 'left' is not allowed: give one of forward, backward, both",
        ),
        ({"uri": "a.mp4", "direction": ["both"]}, "line 2: direction ['both'] is not allowed"),
        ({"uri": "a.mp4", "priority": 0}, "line 2: priority 0 is not allowed: give a number above 0"),
        ({"uri": "a.mp4", "priority": -1.5}, "line 2: priority -1.5 is not allowed"),
        ({"uri": "a.mp4", "priority": True}, "line 2: priority True is not allowed"),
        ({"uri": "a.mp4", "priority": "high"}, "line 2: priority 'high' is not allowed"),
        ('{"uri": "a.mp4", "priority": NaN}', "line 2: priority nan is not allowed"),
        ('{"uri": "a.mp4", "priority": Infinity}', "line 2: priority inf is not allowed"),
        ({"uri": "a.mp4", "prompts": 5}, "line 2: prompts 5 is not allowed"),
        ({"uri": "a.mp4", "prompts": "p.txt"}, "line 2: prompts 'p.txt' is not allowed"),
        ({"uri": "a.mp4", "prompts": {"objects": []}}, "line 2: prompts: not a prompts file"),
        (
            {"uri": "a.mp4", "prompts": {"version": 1, "objects": [{"id": 0, "box": [0, 0, 1, 1]}]}},
            "line 2: prompts: objects[0]",
        ),
    ],
)
def test_a_wrong_row_is_named_with_what_is_allowed(tmp_path: Path, row: Any, complaint: str) -> None:
    source = manifest(tmp_path, {"uri": "ok.mp4", "prompts": BOX}, row)
    assert complaint in refused(source)


def test_all_wrong_rows_are_counted(tmp_path: Path) -> None:
    source = manifest(tmp_path, {"uri": 1}, {"uri": "a.mp4", "prompts": BOX}, "nonsense", {"uri": ""})
    message = refused(source)
    assert "m.jsonl line 1: uri 1" in message
    assert message.endswith("; 2 more lines are invalid, too")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no column uri"),
        (
            "video,prompts\na.mp4,\n",
            "no column uri; it is required, stream_id, sequence, prompts, priority",
        ),
        ("prompts\na.json\n", "no column uri"),
        ("uri,uri\na,b\n", "column uri appears twice"),
        ("uri,prompts\na.mp4,a.json\nb.mp4\n", "line 3: 1 cells where the header names 2"),
        ("uri,prompts\na.mp4,a.json,b.json\n", "line 2: 3 cells where the header names 2"),
        ('uri\n"a.mp4\n', "line 2: not CSV"),
        ('uri,prompts\n\n"a\nb.mp4",x.txt\n', "line 4: prompts 'x.txt'"),
        ("uri\n", "lists no video"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert complaint in refused(tmp_path / "m.csv", detector="d")


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_text("uri\na.mp4\n")
    assert "is not Parquet" in refused(tmp_path / "m.parquet")
    pq.write_table(pa.table({"uri": [1, 2]}), tmp_path / "n.parquet")
    assert "n.parquet line 1: uri 1 is not allowed" in refused(tmp_path / "n.parquet")
    (tmp_path / "m.csv").write_bytes(b"uri\n\xff\xfe\n")
    assert "not UTF-8" in refused(tmp_path / "m.csv")
    (tmp_path / "m.jsonl").write_bytes(b'{"uri": "\xff"}\n')
    assert "m.jsonl line 1: not a JSON object" in refused(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl.gz").write_bytes(b"no gzip")
    assert "cannot be read" in refused(tmp_path / "m.jsonl.gz")
    assert "no such file" in refused(tmp_path / "none.jsonl")


def test_the_same_stream_or_video_twice_names_both_lines(tmp_path: Path) -> None:
    first = {"uri": "a.mp4", "prompts": BOX}
    message = refused(manifest(tmp_path, first, {"uri": "b.mp4"}, "", {"uri": "./x/../a.mp4"}))
    assert f"lines 1 and 4: video {tmp_path}/a.mp4 appears twice" in message
    rows = [{"uri": u, "stream_id": "s", "prompts": BOX} for u in ("a.mp4", "b.mp4")]
    message = refused(manifest(tmp_path, {"uri": "c.mp4"}, *rows))
    assert "lines 2 and 3: stream id s appears twice" in message
    assert f"{tmp_path}/b.mp4" in message
    message = refused(manifest(tmp_path, {"uri": "a.mp4"}, {"uri": "a.mp4", "stream_id": "s"}))
    assert "lines 1 and 2" in message
    # Credentials are no part of what a video is, nor of what is said about it.
    rows = [{"uri": f"ftp://me:{word}@host/a.mp4", "prompts": BOX} for word in ("secret1", "secret2")]
    message = refused(manifest(tmp_path, *rows))
    assert "ftp://host/a.mp4 appears twice" in message
    assert "secret" not in message


def test_a_video_twice_under_names_of_its_own_is_meant(tmp_path: Path) -> None:
    rows = [{"uri": "a.mp4", "stream_id": s, "prompts": BOX} for s in ("left", "right")]
    assert [j.spec.stream_id for j in load_manifest(manifest(tmp_path, *rows))] == ["left", "right"]


def test_no_credentials_in_a_job_s_repr(tmp_path: Path) -> None:
    (job,) = load_manifest(manifest(tmp_path, {"uri": "ftp://me:secret@host/a.mp4", "prompts": BOX}))
    assert job.spec.uri == "ftp://me:secret@host/a.mp4"
    assert "secret" not in repr(job)


@pytest.mark.parametrize(
    ("uri", "base", "expected"),
    [
        ("a.mp4", "/m/list.csv", "/m/a.mp4"),
        ("../a.mp4", "/m/list.csv", "/a.mp4"),
        ("/x/a.mp4", "s3://b/m/list.csv", "/x/a.mp4"),
        ("a.mp4", "file:///m/list.csv", "/m/a.mp4"),
        ("sub/a#1.mp4", "s3://b/list.csv", "s3://b/sub/a#1.mp4"),
        ("../../../a.mp4", "s3://b/m/list.csv", "s3://b/a.mp4"),
        ("a.mp4", "https://host/m/list.csv?token=x", "https://host/m/a.mp4"),
        ("a.mp4", "simplecache::s3://b/m/list.csv", "simplecache::s3://b/m/a.mp4"),
        ("rtsp://cam/1", "/m/list.csv", "rtsp://cam/1"),
    ],
)
def test_relative_uris(uri: str, base: str, expected: str) -> None:
    assert absolute(uri, base) == expected


def test_relative_to_a_relative_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a.mp4", "lists/m.csv") == os.path.join(tmp_path, "lists/a.mp4")
    assert absolute("~/a.mp4", "lists/m.csv") == os.path.expanduser("~/a.mp4")


@pytest.mark.parametrize("priority", [0, -1, float("nan"), float("inf")])
def test_a_priority_is_above_0(priority: float) -> None:
    with pytest.raises(UsageError, match="give a number above 0"):
        VideoJob(StreamSpec("s", "a.mp4"), priority)


# --- several sources, ids, columns of one's own --------------------------------------------------


def test_what_a_shell_makes_of_a_glob(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mkv", "a.prompts.json", "notes.txt"):
        (tmp_path / name).write_text(json.dumps(BOX) if name.endswith(".json") else "x")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.dat").write_text("x")
    skipped = Skipped()
    jobs = load_manifest(
        [*sorted(str(p) for p in tmp_path.iterdir() if p.is_file()), str(tmp_path / "more" / "c.dat")],
        skipped=skipped,
    )
    assert [Path(job.spec.uri).name for job in jobs] == ["a.mp4", "b.mkv", "c.dat"]
    assert jobs[0].spec.prompts_uri == f"{tmp_path}/a.prompts.json"
    assert [Path(uri).name for uri, _ in skipped.files] == ["notes.txt"]
    with pytest.raises(UsageError, match=r"video .*a\.mp4 appears twice"):
        load_manifest([str(tmp_path / "a.mp4"), str(tmp_path / "*.mp4")])


def test_ids_that_survive_a_move_of_the_archive(tmp_path: Path) -> None:
    def stream_ids(folder: str, source: str) -> list[str]:
        there = tmp_path / folder / "cam1"
        there.mkdir(parents=True, exist_ok=True)
        for name in ("a.mp4", "b.mp4"):
            (there / name).write_text("x")
            (there / f"{name}.prompts.json").write_text(json.dumps(BOX))
        (tmp_path / folder / "m.csv").write_text("uri\ncam1/a.mp4\ncam1/b.mp4\n")
        return [j.spec.stream_id for j in load_manifest(f"{tmp_path}/{folder}{source}", ids="relative")]

    first = stream_ids("old", "")
    assert first == stream_ids("new/place", "") == stream_ids("new/place", "/**/*.mp4")
    assert first == stream_ids("old", "/m.csv")
    assert first[0].startswith("a-")
    assert len(set(first)) == 2
    assert stream_ids("old", "/cam1") == stream_ids("new/place", "/cam1") != first
    assert relative_stream_id("cam1/a.mp4") == relative_stream_id("./cam1//a.mp4") == first[0]


def test_ids_of_names_alone_must_be_unique(tmp_path: Path) -> None:
    for name in ("x/a.mp4", "y/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = load_manifest(tmp_path, ids="name", detector="motion")
    assert [job.spec.stream_id for job in found] == ["a", "b"]
    (tmp_path / "y" / "a.avi").write_text("x")
    with pytest.raises(UsageError, match=r"stream id a appears twice \(.*x/a.mp4 and .*\); .*--ids relative"):
        load_manifest(tmp_path, ids="name", detector="motion")


def test_columns_of_ones_own_go_along(tmp_path: Path) -> None:
    rows = [{"uri": "a.mp4", "prompts": BOX, "site": "north", "lane": 3, "url": "ftp://u:secret@h/x"}]
    (job,) = load_manifest(manifest(tmp_path, *rows))
    assert job.spec.extra == {"site": "north", "lane": 3, "url": "ftp://h/x"}
    (tmp_path / "m.csv").write_text("uri,site\na.mp4,north\nb.mp4,\n")
    first, second = load_manifest(tmp_path / "m.csv", detector="motion")
    assert (first.spec.extra, second.spec.extra) == ({"site": "north"}, None)
    times = pa.table({"uri": ["a.mp4"], "at": [datetime(2026, 1, 2, tzinfo=UTC)], "n": [2**40]})
    pq.write_table(times, tmp_path / "m.parquet")
    (job,) = load_manifest(tmp_path / "m.parquet", detector="motion")
    assert job.spec.extra == {"at": "2026-01-02T00:00:00+00:00", "n": 2**40}


@pytest.mark.parametrize("name", ["prompt", "Priority", "stream-id", "streamid", "URI"])
def test_columns_that_are_almost_ours_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.csv").write_text(f"uri,{name}\na.mp4,x\n")
    assert f"column '{name}' is unknown: did you mean " in refused(tmp_path / "m.csv")


def test_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    good = {"uri": "a.mp4", "prompts": BOX}
    source = manifest(tmp_path, {"uri": 1}, good, "nonsense", {**good, "priority": 0}, good)
    errors: list[str] = []
    jobs = load_manifest(source, errors=errors)
    assert [Path(job.spec.uri).name for job in jobs] == ["a.mp4", "a.mp4"]
    assert [error.partition("m.jsonl ")[2].partition(":")[0] for error in errors] == [
        "line 1", "line 3", "line 4", "lines 2 and 5"
    ]  # fmt: skip


def test_rows_of_a_sequence_are_one_stream(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"uri": "10.mp4", "sequence": "yard", "prompts": BOX, "priority": 2, "site": "north"},
        {"uri": "other.mp4", "prompts": BOX},
        {"uri": "9.mp4", "sequence": "gate", "prompts": "gate.json"},
        {"uri": "11;a.mp4", "sequence": "yard"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    other, yard, gate = load_manifest(manifest)
    assert yard.spec.stream_id == "yard"
    assert joined_parts(yard.spec.uri) == [f"{tmp_path}/10.mp4", f"{tmp_path}/11;a.mp4"]
    assert (yard.spec.prompts, yard.priority, yard.spec.extra) == (BOX, 2, {"site": "north"})
    assert (gate.spec.stream_id, gate.spec.uri) == ("gate", f"{tmp_path}/9.mp4")
    assert other.spec.uri == f"{tmp_path}/other.mp4"
    # As a report names it, for a later run.
    manifest.write_text(json.dumps({"uri": yard.spec.uri, "stream_id": "yard", "prompts": BOX}))
    assert load_manifest(manifest)[0].spec.uri == yard.spec.uri


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"sequence": "a b"}], "sequence 'a b' is not allowed: use 1 to 128 of the characters"),
        (
            [{"sequence": "yard", "stream_id": "gate"}],
            "stream of a sequence has its name; leave stream_id out",
        ),
        ([{"sequence": "yard"}, {"sequence": "yard", "prompts": BOX}], "its prompts belong to its first row"),
        ([{"sequence": "yard"}, {"sequence": "yard", "uri": "0.mp4"}], "0.mp4 is given twice"),
    ],
)
def test_a_wrong_sequence_is_named(tmp_path: Path, rows: list[dict[str, Any]], complaint: str) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps({"uri": f"{i}.mp4", **row}) for i, row in enumerate(rows)))
    assert complaint in refused(manifest, detector="motion")
    errors: list[str] = []
    load_manifest(manifest, detector="motion", errors=errors)
    assert any(complaint in error for error in errors)
