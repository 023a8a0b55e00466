"""The command line: exit codes, one-line errors, stdout and stderr; on a tiny network."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.tiny import tiny_weights
from support.videos import make_images, make_video, scene, truncate

from jobs.cli.app import main
from pipeline.analytics.query import query


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a video, and one finished output of it."""
    folder = tmp_path_factory.mktemp("made")
    os.rename(tiny_weights(folder), folder / "tiny.safetensors")
    make_video(folder / "clip.mp4", 12)
    return folder


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def track(made: Path, out: Path, *more: str | Path, video: str | Path = "clip.mp4", box: bool = True) -> int:
    given = ["--box", "20,20,40,40:3:shape"] if box else []
    return call(
        "track",
        made / video,
        "--out",
        out,
        "--model",
        made / "tiny.safetensors",
        "--threads",
        "1",
        *given,
        *more,
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("xmem: error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_track_query_render(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert track(made, out, "--stream-id", "cam", "--chunk", "5") == 0
    summary = capsys.readouterr()
    assert summary.out == ""
    assert "cam: 12 frames, 12 rows" in summary.err
    assert "shape" in summary.err

    assert (
        call("query", out, "select object_id, count(*) as n from tracks group by all", "--format", "json")
        == 0
    )
    assert json.loads(capsys.readouterr().out) == [{"object_id": 3, "n": 12}]
    assert call("query", out, "select stream_id, frame_index from tracks", "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["stream_id,frame_index", "cam,0"]
    assert call("query", out, "from tracks", "--format", "parquet", "-o", tmp_path / "rows.parquet") == 0
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 12

    capsys.readouterr()
    assert (
        call(
            "render",
            made / "clip.mp4",
            out,
            "-o",
            tmp_path / "o.mp4",
            "--sheet",
            tmp_path / "sheet.png",
            "--last",
            "7",
            "--overlay",
            "fade",
            "--colour",
            "3:#ff8800",
            "--no-ids",
        )
        == 0
    )
    assert "8 frames written" in capsys.readouterr().err
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None
    capture = cv2.VideoCapture(str(tmp_path / "o.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 8
    capture.release()

    assert track(made, out, "--stream-id", "cam", "--chunk", "5") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert track(made, out, "--stream-id", "cam", "--chunk", "6") == 2
    assert "chunk_frames was 5, now 6" in error_line(capsys)
    assert track(made, out, "--stream-id", "cam", "--chunk", "6", "--restart") == 0
    names = sorted(p.name for p in (out / "tracks/stream_id=cam").iterdir())
    assert names == ["frames-000000000000.parquet", "frames-000000000006.parquet"]


def test_masks_and_prompts_files_together(made: Path, tmp_path: Path) -> None:
    index = np.zeros((120, 160), np.uint8)
    index[10:40, 10:50], index[60:90, 80:120] = 1, 7
    cv2.imwrite(str(tmp_path / "first.png"), index)
    (tmp_path / "more.json").write_text(
        json.dumps({"version": 1, "objects": [{"frame": 4, "category": "late", "box": [100, 10, 40, 40]}]})
    )
    code = track(
        made, tmp_path / "out", "--masks", tmp_path / "first.png", "--prompts", tmp_path / "more.json"
    )
    assert code == 0
    rows = query(
        tmp_path / "out", "select object_id, min(frame_index) as f from tracks group by all order by 1"
    )
    # The late object took the lowest free id: 1, 7 and 3 were given.
    assert rows.to_pylist() == [
        {"object_id": 1, "f": 0},
        {"object_id": 2, "f": 4},
        {"object_id": 3, "f": 0},
        {"object_id": 7, "f": 0},
    ]


def _mask(path: Path, height: int, width: int, value: int) -> Path:
    cv2.imwrite(str(path), np.full((height, width), value, np.uint8))
    return path


def _json(path: Path, *objects: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": 1, "objects": list(objects)}))
    return path


BOX = [10, 10, 30, 30]
BAD_PROMPTS = [
    (lambda t: ["--masks", _mask(t / "m.png", 60, 80, 1)], "80x60, the frame 160x120"),
    (lambda t: ["--masks", _mask(t / "m.png", 120, 160, 0)], "shows no object"),
    (lambda t: ["--masks", t / "absent.png"], "absent.png cannot be read"),
    (
        lambda t: ["--prompts", _json(t / "p.json", {"id": 4, "box": BOX}, {"id": 4, "box": BOX})],
        "twice on frame 0",
    ),
    (lambda t: ["--prompts", _json(t / "p.json", {"id": 0, "box": BOX})], "object id 0 is out of range"),
    (lambda t: ["--prompts", _json(t / "p.json", {"id": 2**31, "box": BOX})], "2147483648 is out of range"),
    (lambda t: ["--prompts", _json(t / "p.json", {"id": 4, "boxx": BOX})], "unknown key 'boxx'"),
    (lambda t: ["--box", "1,2,3"], "needs four numbers"),
    (lambda t: ["--box", "1,2,3,four"], "is not x,y,w,h"),
    (lambda t: ["--box", "500,500,20,20"], "no pixel inside the frame of 160x120"),
    (lambda t: ["--box", "5,5,0,9"], "has no area"),
    (lambda t: ["--box", "1,1,9,9:3"], "twice on frame 0"),
    (lambda t: [], "nothing to track"),
]


@pytest.mark.parametrize(("given", "said"), BAD_PROMPTS)
def test_bad_prompts_are_usage_errors(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Any, said: str
) -> None:
    arguments = given(tmp_path)
    boxed = arguments == ["--box", "1,1,9,9:3"]
    assert track(made, tmp_path / "out", *arguments, box=boxed) == 2
    assert said in error_line(capsys)
    assert not list((tmp_path / "out").rglob("*.parquet"))


BAD_OPTIONS = [
    (["--size", "7"], "size=7"),
    (["--size", "-3"], "size=-3"),
    (["--chunk", "0"], "chunk_frames=0"),
    (["--chunk", "many"], "--chunk"),
    (["--max-frames", "0"], "max_frames=0"),
    (["--threads", "0"], "threads=0 is not allowed"),
    (["--dtype", "int8"], "'int8' is not allowed"),
    (["--device", "tpu9"], "device 'tpu9' cannot be used here"),
    (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
    (["--mem-every", "0"], "mem_every=0"),
    (["--max-mid-term-frames", "3"], "max_mid_term_frames=3"),
    (["--model", "xmem-huge"], "no model 'xmem-huge'"),
    (["--stream-id", "a/b"], "stream id 'a/b' is not allowed"),
    (["--box-segmenter", "sam9"], "no box segmenter 'sam9'; available: xmem-click, grabcut"),
    (["--colour"], "--colour"),
]


@pytest.mark.parametrize(("given", "said"), BAD_OPTIONS)
def test_bad_options_are_usage_errors(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert track(made, tmp_path / "out", *given) == 2
    assert said in error_line(capsys)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def _not_a_video(t: Path, made: Path) -> Path:
    (t / "notes.mp4").write_text("not a video at all\n" * 100)
    return t / "notes.mp4"


def _empty(t: Path, made: Path) -> Path:
    (t / "empty.mp4").touch()
    return t / "empty.mp4"


def _without_end(t: Path, made: Path) -> Path:
    return truncate(made / "clip.mp4", t / "half.mp4", 0.6)


def _no_images(t: Path, made: Path) -> Path:
    (t / "folder").mkdir()
    (t / "folder" / "readme.txt").touch()
    return t / "folder"


def test_a_missing_video_is_a_wrong_request(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert track(made, tmp_path / "out", video=tmp_path / "absent.mp4") == 2
    assert f"{tmp_path}/absent.mp4: no such file or folder" in error_line(capsys)
    assert call("batch", tmp_path / "absent.mp4", "--out", tmp_path / "out") == 2
    assert f"{tmp_path}/absent.mp4: no such file or folder" in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [_not_a_video, _empty, _without_end, _no_images])
def test_what_is_no_video_is_a_failure(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any
) -> None:
    path = make(tmp_path, made)
    assert track(made, tmp_path / "out", video=path) == 1
    assert path.name in error_line(capsys)
    assert not (tmp_path / "out" / "tracks").exists()


def test_a_truncated_video_tracks_what_is_there(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_video(tmp_path / "clip.avi", 40, codec="mpeg4")
    half = truncate(whole, tmp_path / "half.avi", 0.6)
    assert track(made, tmp_path / "out", video=half) == 0
    assert "lost in the input" in capsys.readouterr().err
    frames = query(tmp_path / "out", "select count(*) as n from tracks").to_pylist()[0]["n"]
    assert 10 < frames < 40
    lost = query(tmp_path / "out", "select reason, count from events where kind = 'corrupt'").to_pylist()
    # The picture that was cut through is there, patched up; those behind it are not.
    assert [e["reason"] for e in lost] == ["damaged picture", "file ends early"]
    assert frames + lost[1]["count"] == 40


def test_an_output_that_cannot_be_written(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert track(made, tmp_path / "file") == 1
    assert "file" in error_line(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_ends_with_one_line_and_a_later_run_goes_on(made: Path, tmp_path: Path) -> None:
    """A file size limit of the process stands for a full disk: the same failing write, on any machine."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from jobs.cli.app import main\nmain(sys.argv[1:])\n"
    )
    arguments = ["track", str(made / "clip.mp4"), "--out", str(tmp_path / "out"), "--box", "20,20,40,40"]
    arguments += ["--model", str(made / "tiny.safetensors"), "--threads", "1", "--chunk", "4"]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[3]), PYTHONDONTWRITEBYTECODE="1")
    failed = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    assert [line for line in failed.stderr.splitlines() if line.startswith("xmem: error: ")]
    assert call(*arguments) == 0
    assert query(tmp_path / "out", "select count(*) as n from tracks").to_pylist() == [{"n": 12}]


def test_queries_that_cannot_be_answered(
    tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("query", tmp_path, "select 1") == 2
    assert str(tmp_path) in error_line(capsys)
    assert call("query", tmp_path / "absent", "select 1") == 2
    error_line(capsys)
    assert track(made, tmp_path / "out") == 0
    capsys.readouterr()
    assert call("query", tmp_path / "out", "select nonsense from tracks") == 2
    assert "nonsense" in error_line(capsys)
    assert call("query", tmp_path / "out", "from tracks", "--format", "xml") == 2
    assert "'xml' is not allowed" in error_line(capsys)
    assert call("query", tmp_path / "out", "from tracks", "-o", tmp_path / "no" / "file.csv") == 1
    assert "file.csv" in error_line(capsys)


def test_renders_that_cannot_be_made(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert track(made, tmp_path / "out", "--stream-id", "one") == 0
    assert track(made, tmp_path / "out", "--stream-id", "two") == 0
    capsys.readouterr()
    clip = made / "clip.mp4"
    assert call("render", clip, tmp_path / "out", "-o", tmp_path / "o.mp4") == 2
    assert "one, two: choose one with --stream-id" in error_line(capsys)
    assert call("render", clip, tmp_path / "out", "-o", tmp_path / "o.gif", "--stream-id", "one") == 2
    assert "o.gif" in error_line(capsys)
    assert (
        call(
            "render", clip, tmp_path / "out", "-o", tmp_path / "o.mp4", "--stream-id", "one", "--first", "99"
        )
        == 2
    )
    assert "up to frame 11" in error_line(capsys)
    assert (
        call(
            "render", clip, tmp_path / "out", "-o", tmp_path / "o.mp4", "--stream-id", "one", "--opacity", "2"
        )
        == 2
    )
    assert "opacity 2" in error_line(capsys)
    assert (
        call(
            "render",
            clip,
            tmp_path / "out",
            "-o",
            tmp_path / "o.mp4",
            "--stream-id",
            "one",
            "--colour",
            "red",
        )
        == 2
    )
    assert "id:#rrggbb" in error_line(capsys)


def test_overlapping_boxes_are_one_warning(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    polygons = [
        {"id": 1, "polygons": [[10, 10, 60, 10, 60, 60, 10, 60]]},
        {"id": 2, "polygons": [[40, 40, 90, 40, 90, 90, 40, 90]]},
    ]
    assert track(made, tmp_path / "out", "--prompts", _json(tmp_path / "p.json", *polygons), box=False) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert words.count("the later entry gets the pixels") == 1
    again: list[str | Path] = ["--prompts", tmp_path / "p.json", "--restart"]
    assert track(made, tmp_path / "out", *again, box=False) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert words.count("the later entry gets the pixels") == 1


def test_debug_shows_the_traceback_wherever_it_stands(made: Path, tmp_path: Path) -> None:
    from pipeline.base.errors import SourceError

    with pytest.raises(SourceError):
        main(["track", "/absent.mp4", "--out", str(tmp_path), "--box", "1,1,9,9", "--debug"])
    with pytest.raises(SourceError):
        main(["--debug", "track", "/absent.mp4", "--out", str(tmp_path), "--box", "1,1,9,9"])


def test_debug_ends_with_its_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Output of a command must not depend on what the same process ran before."""
    from pipeline.base.errors import SourceError

    with pytest.raises(SourceError):
        main(["track", "/absent.mp4", "--out", str(tmp_path), "--box", "1,1,9,9", "--debug"])
    logging.getLogger("aiobotocore.credentials").info("Found credentials")
    assert "Found credentials" in capsys.readouterr().err
    assert call("track", "/absent.mp4", "--out", tmp_path, "--box", "1,1,9,9") == 2
    logging.getLogger("aiobotocore.credentials").info("Found credentials")
    assert "Found credentials" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"xmem {importlib.metadata.version('xmem-pipeline')}\n"


def test_help_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    helped = capsys.readouterr().out
    assert all(name in helped for name in ("track", "query", "render", "evaluate", "train"))
    assert call("schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Prompts of xmem track"
    assert call() == 2


def test_names_with_spaces_brackets_and_letters_of_all_kinds(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich would treat [/b] as markup, and fail after all the work."""
    folder = tmp_path / "ein [/b] Ördner"
    folder.mkdir(parents=True)
    video = folder / "clip [bold] 走.mp4"
    video.write_bytes((made / "clip.mp4").read_bytes())
    out = folder / "out [/x]"
    box = f"20,20,40,40:{2**31 - 1}:Läufer [/red] 走"
    assert track(made, out, "--box", box, video=video, box=False) == 0
    printed = capsys.readouterr().err
    assert f"{2**31 - 1}" in printed
    assert all(part in printed for part in ("Läufer", "[/red]", "走"))
    assert call("query", out, "select distinct category, object_id from tracks", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == [{"category": "Läufer [/red] 走", "object_id": 2**31 - 1}]
    assert call("render", video, out, "-o", folder / "over [/i].mp4") == 0
    assert "over [/i].mp4" in " ".join(capsys.readouterr().err.split())
    assert track(made, out, "--box", box, video=video, box=False) == 0
    assert "out [/x]; nothing to do" in capsys.readouterr().err


def test_a_folder_of_images_at_its_own_size_and_only_partly_tracked(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tracking.files import executor

    make_images(tmp_path / "images", 9)
    advance, steps = executor.Executor.advance, 0

    def interrupted(self: Any, streams: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        frozen.append(gc.get_freeze_count())
        return advance(self, streams)

    frozen: list[int] = []
    before = gc.get_freeze_count()
    monkeypatch.setattr(executor.Executor, "advance", interrupted)
    arguments = ["--size", "0", "--chunk", "3"]
    assert track(made, tmp_path / "out", *arguments, video=tmp_path / "images") == 130
    assert min(frozen) > before + 10_000  # the garbage collector leaves out what is loaded
    assert gc.get_freeze_count() <= before
    assert "interrupted; the same command goes on" in error_line(capsys)
    monkeypatch.undo()
    assert call("render", tmp_path / "images", tmp_path / "out", "-o", tmp_path / "o.mp4") == 0
    assert "6 frames written" in capsys.readouterr().err
    assert track(made, tmp_path / "out", *arguments, video=tmp_path / "images") == 0
    assert "resumed at frame 6" in capsys.readouterr().err
    settings = query(tmp_path / "out", "select settings from streams").to_pylist()[0]["settings"]
    assert json.loads(settings)["size"] is None


def test_a_reader_that_goes_is_no_failure(made: Path, tmp_path: Path) -> None:
    assert track(made, tmp_path / "out") == 0
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[3]), PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jobs.cli.app",
            "query",
            str(tmp_path / "out"),
            "from range(100000)",
            "--format",
            "csv",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"range\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=120) == 0


def test_interrupted_while_starting_over_it_does_not_advise_to_start_over(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.tracking.files.executor.Executor.advance", interrupted)
    assert track(made, tmp_path / "out", "--restart") == 130
    assert "the same command without --restart goes on" in error_line(capsys)


@pytest.mark.parametrize("wrong", [["--chunk", "0"], ["--masks", "absent.png"], ["--size", "5"]])
def test_starting_over_with_a_wrong_option_removes_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    out = tmp_path / "out"
    assert track(made, out) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert track(made, out, "--restart", *wrong) == 2
    error_line(capsys)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_starting_over_mends_a_damaged_record_and_damaged_rows(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert track(made, out, "--stream-id", "cam", "--chunk", "5") == 0
    (out / "streams/cam.json").write_text("{")
    (out / "tracks/stream_id=cam/frames-000000000010.parquet").write_text("PAR1")
    capsys.readouterr()
    assert track(made, out, "--stream-id", "cam", "--chunk", "5") == 1
    error_line(capsys)
    assert track(made, out, "--stream-id", "cam", "--chunk", "5", "--restart") == 0
    assert query(out, "select count(*) as n from tracks").to_pylist() == [{"n": 12}]


def test_prompts_that_were_wrong_can_be_given_again(made: Path, tmp_path: Path) -> None:
    assert track(made, tmp_path / "out", "--masks", _mask(tmp_path / "m.png", 60, 80, 1)) == 2
    assert track(made, tmp_path / "out", "--masks", _mask(tmp_path / "m.png", 120, 160, 1), box=False) == 0


def test_a_fault_of_ours_is_not_called_a_wrong_request(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("operands could not be\nbroadcast together")

    monkeypatch.setattr("pipeline.tracks.masks.mean_probability", broken)
    assert track(made, tmp_path / "out") == 1
    assert "ValueError: operands could not be broadcast together (--debug" in error_line(capsys)


def test_credentials_are_not_printed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "ftpx://user:secret@host/clip.mp4?sig=alsosecret"
    assert (
        call(
            "track", uri, "--out", tmp_path / "out", "--box", "1,1,9,9", "--model", made / "tiny.safetensors"
        )
        == 1
    )
    line = error_line(capsys)
    assert "ftpx://host/clip.mp4" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--threads", "0"], "threads=0 is not allowed"),
        (["--size", "3"], "size=3"),
        (["--dtype", "int4"], "'int4' is not allowed"),
        (["--device", "tpu9"], "device 'tpu9'"),
        (["--model", "xmem-huge"], "no model 'xmem-huge'"),
    ],
)
def test_evaluate_checks_its_options_too(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert call("evaluate", tmp_path, "--model", made / "tiny.safetensors", *given) == 2
    assert said in error_line(capsys)


def test_weights_that_are_none_are_a_usage_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.safetensors").write_text("not weights")
    assert track(made, tmp_path / "out", "--model", tmp_path / "fake.safetensors") == 2
    assert "fake.safetensors cannot be read as weights" in error_line(capsys)


def test_render_from_python_is_what_the_command_does(made: Path, tmp_path: Path) -> None:
    from pipeline.draw.render import render

    assert track(made, tmp_path / "out") == 0
    seen: list[tuple[int, int]] = []
    count = render(
        made / "clip.mp4",
        tmp_path / "out",
        tmp_path / "python.mp4",
        first=2,
        last=99,
        sheet=tmp_path / "sheet.png",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (count, seen[-1]) == (10, (10, 10))
    assert (
        call("render", made / "clip.mp4", tmp_path / "out", "-o", tmp_path / "cli.mp4", "--first", "2") == 0
    )
    assert (tmp_path / "python.mp4").read_bytes() == (tmp_path / "cli.mp4").read_bytes()
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None


def test_pieces_of_a_recording_are_one_stream(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [make_video(tmp_path / f"{name}.mp4", [scene(i) for i in range(8 * at, 8 * at + 8)])
              for at, name in enumerate(("a", "b;c"))]  # fmt: skip
    assert track(made, tmp_path / "no", pieces[1], video=pieces[0]) == 2
    assert "2 videos: --join tracks them as one stream, `xmem batch` each as its own" in error_line(capsys)
    assert track(made, tmp_path / "out", pieces[1], "--join", "--max-frames", "11", video=pieces[0]) == 0
    assert track(made, tmp_path / "out", pieces[1], "--join", video=pieces[0]) == 0  # goes on
    capsys.readouterr()
    assert (
        call("query", tmp_path / "out", "SELECT frame_index FROM frames ORDER BY ALL", "--format", "csv") == 0
    )
    assert capsys.readouterr().out.split() == ["frame_index", *map(str, range(16))]
    video = "join:" + ";".join(str(p).replace(";", "%3B") for p in pieces)
    assert call("render", video, tmp_path / "out", "-o", tmp_path / "overlay.mp4") == 0
    assert "16 frames written" in capsys.readouterr().err
