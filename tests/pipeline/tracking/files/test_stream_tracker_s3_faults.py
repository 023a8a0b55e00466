"""From bucket to bucket over a faulty network: the same frames, rows and bytes."""

from __future__ import annotations

import logging
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from support.faults import Answer, Proxy, Rule, faulty, storm
from support.servers import ACCESS_KEY, SECRET_KEY, S3Server
from support.small_net import SMALL_MEMORY
from support.videos import make_images, make_video, scene

from pipeline.base.errors import AnotherWriterError, SourceError, StoreError, XmemError
from pipeline.base.records import Frame
from pipeline.base.stream_ids import generate_stream_id
from pipeline.distributed.messages import StreamSpec, WorkerSettings
from pipeline.prompts.files import load_prompts
from pipeline.prompts.resolving import PromptSet
from pipeline.storage import filesystems, retries
from pipeline.storage.failures import Failure
from pipeline.storage.locations import locate
from pipeline.storage.opening import open_files
from pipeline.storage.retries import Attempts
from pipeline.tracking.files.track import track
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import VideoSource, open_source

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 1 << 13
FRAMES = 150
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 0, "id": 1, "category": "square", "polygons": [[2, 58, 54, 58, 54, 110, 2, 110]]},
        {"frame": 4, "id": 2, "box": [120, 80, 60, 60]},
    ],
}
FAULTS = {
    "500": Rule("drop", 500, method="GET", skip=1, count=2),
    "503": Rule("drop", 503, method="GET", skip=1, count=5),
    "cut": Rule("drop", "cut", method="GET", skip=1, count=3),
    "reset": Rule("lose", "reset", method="GET", skip=1, count=3),
    "hangs": Rule("drop", "hang", method="GET", skip=1),
    "cut body": Rule("truncate", method="GET", skip=1, count=3),
    "body stops": Rule("stall", method="GET", skip=1),
    "short body": Rule("shorten", method="GET", skip=1, count=3),
    "slow body": Rule("slow", method="GET", skip=1, seconds=0.5),
    "every second": Rule("drop", 500, count=None, share=0.5),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", Attempts(9, 0.01, 0.05))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    # Coded by CAVLC: as many bytes with CABAC take three times as long to decode.
    options = {"coder": "0"}
    make_video(folder / "clip.mp4", noisy(FRAMES), b_frames=2, gop=10, quality=10, options=options)
    assert (folder / "clip.mp4").stat().st_size > 6_000_000
    make_images(folder / "pictures", 4)
    return folder


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, made: Path) -> str:
    """A folder of the bucket with the clip and the images."""
    folder = s3_server.uri("faulty-sources")
    fs = fsspec.filesystem("s3", **s3_server.options)
    fs.pipe_file(f"{folder}/clip.mp4", (made / "clip.mp4").read_bytes())
    for path in (made / "pictures").iterdir():
        fs.pipe_file(f"{folder}/pictures/{path.name}", path.read_bytes())
    return folder


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with faulty(s3_server.endpoint) as running:
        yield running


def noisy(count: int) -> list[NDArray[np.uint8]]:
    """Pictures that compress poorly: FFmpeg reads 256 KiB at a time, and a test needs many reads."""
    rng = np.random.default_rng(1)
    pictures = [scene(i, 320, 240).astype(np.int16) for i in range(count)]
    return [np.clip(p + rng.integers(-30, 30, p.shape), 0, 255).astype(np.uint8) for p in pictures]


def seen(source: VideoSource, start: int = 0, previous: float | None = None) -> list[Any]:
    """Number, time, pixels and losses of each frame; then the losses at the end."""
    frames = source.frames(start, previous_pts_seconds=previous)
    found: list[Any] = [(f.frame_index, f.pts_seconds, f.image.tobytes(), f.losses) for f in frames]
    return [*found, source.trailing_losses]


@pytest.fixture(scope="module")
def whole(made: Path) -> list[Any]:
    """What is `seen` of the clip on the disk."""
    with open_source(str(made / "clip.mp4")) as local:
        found = seen(local)
    assert len(found) == FRAMES + 1
    return found


# Reading


@pytest.mark.parametrize("fault", FAULTS)
def test_a_video_is_read_in_spite_of_faults(
    fault: str, s3_server: S3Server, proxy: Proxy, whole: list[Any], bucket: str
) -> None:
    options = proxy.options(s3_server.options, read_timeout=1 if fault in ("hangs", "body stops") else 15)
    rule = FAULTS[fault]
    proxy.set(rule)
    with open_source(f"{bucket}/clip.mp4", storage_options=options, block_size=BLOCK) as remote:
        opened = proxy.happened.count()
        assert opened > 0
        proxy.set(rule)
        assert seen(remote) == whole
        read = proxy.happened.count()
        assert read > opened
        assert not remote.damaged
    # A new start in the middle: an index of packets, a seek, and on from there.
    with open_source(f"{bucket}/clip.mp4", storage_options=options, block_size=BLOCK) as remote:
        proxy.set(rule)
        assert seen(remote, 100, whole[99][1]) == whole[100:]
        assert proxy.happened.count() > read
        assert not remote.damaged
        assert remote._index is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", [500, "cut", "hang"])
def test_a_video_that_cannot_be_read_on_has_not_ended(
    answer: int | Answer,
    s3_server: S3Server,
    proxy: Proxy,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", Attempts(3, 0.01))
    timeout = 1 if answer == "hang" else 15
    options = proxy.options(s3_server.options, timeout)
    with open_source(f"{bucket}/clip.mp4", storage_options=options, block_size=BLOCK) as source:
        frames = source.frames()
        first = [next(frames) for _ in range(10)]
        before = proxy.happened.count()
        proxy.set(Rule("drop", answer, count=None))
        rest: list[Frame] = []
        with pytest.raises(SourceError, match=r"clip.mp4: reading failed \(.*then try again$") as caught:
            rest.extend(frames)
        assert "\n" not in str(caught.value)
        assert not Failure.of(caught.value).permanent
        assert 0 < len(rest) < FRAMES - 20
        assert [f.losses for f in first + rest] == [()] * len(first + rest)
        # aiohttp by itself asks once more where a connection that it had kept is gone.
        assert 3 <= proxy.happened.count() - before <= (6 if answer == "cut" else 3)
        proxy.set()
        again = list(source.frames(10 + len(rest)))
        assert [f.frame_index for f in again] == list(range(10 + len(rest), FRAMES))


def test_wherever_a_new_start_fails_it_says_so(
    s3_server: S3Server, proxy: Proxy, whole: list[Any], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening, indexing, seeking and decoding do not take a failing network for a damaged video."""
    monkeypatch.setattr(retries, "ATTEMPTS", Attempts(2, 0.01))
    options = proxy.options(s3_server.options)
    with open_source(f"{bucket}/clip.mp4", storage_options=options, block_size=BLOCK) as source:
        assert seen(source) == whole
        before = len(proxy.happened.requests)
        assert seen(source, 100, whole[99][1]) == whole[100:]
        needed = len(proxy.happened.requests) - before
    for reads in range(0, 8, 2):
        with open_source(f"{bucket}/clip.mp4", storage_options=options, block_size=BLOCK) as source:
            proxy.set(Rule("drop", 500, skip=needed * reads // 8, count=None))
            with pytest.raises(SourceError, match=r"reading failed .* then try again$"):
                seen(source, 100, whole[99][1])
            assert not source.damaged
            proxy.set()
            assert seen(source, 100, whole[99][1]) == whole[100:]


def test_a_video_that_is_replaced_while_it_is_read(
    s3_server: S3Server, proxy: Proxy, made: Path, tmp_path: Path
) -> None:
    uri = f"{s3_server.uri('faulty-changing')}/clip.mp4"
    fs = fsspec.filesystem("s3", **s3_server.options)
    fs.pipe_file(uri, (made / "clip.mp4").read_bytes())
    with open_source(uri, storage_options=proxy.options(s3_server.options), block_size=BLOCK) as source:
        frames = source.frames()
        next(frames)
        fs.pipe_file(uri, make_video(tmp_path / "other.mp4", noisy(FRAMES), quality=20).read_bytes())
        with pytest.raises(SourceError, match="was replaced while being read"):
            list(frames)


@pytest.mark.parametrize("fault", ["500", "reset", "hangs", "cut body", "body stops", "short body"])
def test_a_video_on_a_web_server_is_read_in_spite_of_faults(
    fault: str,
    s3_server: S3Server,
    proxy: Proxy,
    whole: list[Any],
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault in ("hangs", "body stops"):
        monkeypatch.setattr(filesystems, "READ_SECONDS", 1)
    url = fsspec.filesystem("s3", **proxy.options(s3_server.options)).sign(f"{bucket}/clip.mp4")
    with open_source(url, block_size=BLOCK) as remote:
        proxy.set(FAULTS[fault])
        assert seen(remote) == whole
        assert proxy.happened.count() > 0


def test_images_are_read_in_spite_of_faults(
    s3_server: S3Server, proxy: Proxy, made: Path, bucket: str
) -> None:
    proxy.set(
        Rule("shorten", method="GET", path="frame2"),
        Rule("truncate", method="GET", path="frame1"),
        Rule("drop", 500, count=None, share=0.3),
    )
    with open_source(f"{bucket}/pictures", storage_options=proxy.options(s3_server.options)) as remote:
        with open_source(str(made / "pictures")) as local:
            assert seen(remote) == seen(local)
        assert proxy.happened.count("shorten") == proxy.happened.count("truncate") == 1
        assert proxy.happened.count("drop") > 0


# Tracking


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("short") / "short.mp4", noisy(30), b_frames=2, gop=8)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, short: Path, model: str) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    run(str(short), str(out), model)
    return contents(str(out))


def run(video: str, out: str, model: str, **more: Any) -> Any:
    return track(
        video,
        out,
        PromptSet.from_record(PROMPTS),
        stream_id="cam",
        model=model,
        memory=SMALL_MEMORY,
        threads=1,
        snapshot_chunks=2,
        **{"chunk_frames": 4, **more},
    )


def contents(out: str, options: Any = None) -> dict[str, bytes]:
    files = open_files(out, options)
    return {
        name: files.read(name)
        for folder in ("tracks", "events")
        for name in files.names(folder, recursive=True)
    }


@pytest.mark.parametrize("seed", range(3))
def test_tracked_through_a_storm_it_is_byte_for_byte_the_undisturbed_run(
    seed: int,
    s3_server: S3Server,
    proxy: Proxy,
    short: Path,
    model: str,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "pipeline.tracking.files.track.open_source", partial(open_source, block_size=4 * BLOCK)
    )
    folder = s3_server.uri(f"storm-{seed}")
    fsspec.filesystem("s3", **s3_server.options).pipe_file(f"{folder}/short.mp4", short.read_bytes())
    proxy.seed = seed
    proxy.set(*storm(0.2, hang=seed == 0))
    options = proxy.options(s3_server.options, read_timeout=2 if seed == 0 else 15)
    both = {"storage_options": options, "out_storage_options": options}
    # Stopped in the middle once, so that it also resumes in the storm.
    stopped = False

    def on_frame(stream: Any) -> None:
        nonlocal stopped
        if stream.summary.frames >= 14 and not stopped:
            stopped = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(f"{folder}/short.mp4", f"{folder}/out", model, on_frame=on_frame, **both)
    summary = run(f"{folder}/short.mp4", f"{folder}/out", model, **both)
    assert summary.state == "finished"
    assert summary.losses == 0
    proxy.settle()
    assert contents(f"{folder}/out", s3_server.options) == undisturbed
    happened = proxy.happened
    assert happened.count() > 15
    assert {name.split()[0] for name in happened.faults} >= {"drop", "lose"}
    struck = sum(n for name, n in happened.faults.items() if name.endswith("GET"))
    assert struck > 3, happened.faults
    proxy.set()
    assert run(f"{folder}/short.mp4", f"{folder}/out", model, **both).tracked == 0


def test_of_two_runs_on_one_stream_one_stops(
    s3_server: S3Server, proxy: Proxy, short: Path, model: str, undisturbed: dict[str, bytes]
) -> None:
    """Both have opened the stream before either commits; their settings differ."""
    out = s3_server.uri("faulty-two-runs")
    options = proxy.options(s3_server.options)
    proxy.set(*storm(0.2))
    both = threading.Barrier(2)
    outcomes: dict[int, Any] = {}

    def work(chunk: int) -> None:
        more = {"chunk_frames": chunk, "out_storage_options": options}
        try:
            outcomes[chunk] = run(str(short), out, model, on_open=lambda _: both.wait(60), **more).state
        except Exception as error:
            outcomes[chunk] = error

    threads = [threading.Thread(target=work, args=(chunk,)) for chunk in (4, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.settle()
    stopped = {chunk: error for chunk, error in outcomes.items() if error != "finished"}
    assert len(stopped) >= 1, outcomes
    assert all(isinstance(error, AnotherWriterError) for error in stopped.values()), outcomes
    proxy.set()
    record = StreamStore(out, "cam", options).read_record()
    assert record is not None
    winner = record["settings"]["chunk_frames"]
    assert winner not in stopped or len(stopped) == 2
    assert run(str(short), out, model, chunk_frames=winner, out_storage_options=options).frames == 30
    found = contents(out, s3_server.options)
    whole = [pq.read_table(pa.BufferReader(d)) for n, d in sorted(found.items()) if n.startswith("tracks")]
    calm = [
        pq.read_table(pa.BufferReader(d)) for n, d in sorted(undisturbed.items()) if n.startswith("tracks")
    ]
    assert pa.concat_tables(whole).to_pylist() == pa.concat_tables(calm).to_pylist()
    assert len(whole) == -(-30 // winner)
    assert proxy.happened.count() > 5


def test_when_the_store_goes_away_what_was_committed_stays(
    s3_server: S3Server,
    proxy: Proxy,
    short: Path,
    model: str,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", Attempts(3, 0.01))
    out = s3_server.uri(secrets.token_hex(6))
    options = proxy.options(s3_server.options)
    proxy.set(Rule("drop", 503, method="PUT", path="tracks/", skip=3, count=None))
    with pytest.raises(StoreError, match=r"^cannot write") as caught:
        run(str(short), out, model, out_storage_options=options)
    assert "\n" not in str(caught.value)
    kept = contents(out, s3_server.options)
    tracks = [name for name in kept if name.startswith("tracks")]
    assert len(tracks) == 3
    assert {name: undisturbed[name] for name in kept} == kept
    proxy.set()
    run(str(short), out, model, out_storage_options=options)
    assert contents(out, s3_server.options) == undisturbed


# Credentials


SECRETS = (
    ACCESS_KEY,
    SECRET_KEY,
    "hidden-user-1",
    "hidden-password-2",
    "HIDDENKEYID3",
    "hidden/secret+key/4",
)


def test_credentials_are_nowhere(
    s3_server: S3Server,
    proxy: Proxy,
    short: Path,
    model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The keys, a signed URL and an endpoint with a password: in no file, log, repr or traceback."""
    for name in ("pipeline", "jobs", "xmem_core"):
        caplog.set_level(logging.DEBUG, name)
    texts: list[str] = []
    fs = fsspec.filesystem("s3", **s3_server.options)
    folder = s3_server.uri("faulty-secrets")
    fs.pipe_file(f"{folder}/short.mp4", short.read_bytes())
    fs.pipe_file(f"{folder}/no.mp4", b"no video")
    options = proxy.options(s3_server.options)

    def signed(name: str) -> str:
        url = fsspec.filesystem("s3", **options).sign(f"{folder}/{name}")
        return str(url)

    def fails(work: Callable[[], object]) -> None:
        with pytest.raises(XmemError) as caught:
            work()
        assert "\n" not in str(caught.value)
        texts.append("".join(traceback.format_exception(caught.value)))
        texts.append(repr(Failure.of(caught.value)))

    def note(stream: Any) -> None:
        texts.extend(map(repr, (stream, stream.store, stream.summary)))

    # All goes well, but for faults that are overcome.
    proxy.set(Rule("drop", 500, count=None, share=0.2))
    out = f"{folder}/out"
    url = signed("short.mp4")
    signature = dict(parse_qsl(urlsplit(url).query))
    secrets_ = {*SECRETS, *(v for k, v in signature.items() if len(v) > 12)}
    secrets_ |= {quote(text, safe="") for text in secrets_}
    assert len(secrets_) > 8
    monkeypatch.setattr(
        "pipeline.tracking.files.track.open_source", partial(open_source, block_size=4 * BLOCK)
    )
    run(url, out, model, out_storage_options=options, on_open=note)
    run(f"{folder}/short.mp4", f"{out}2", model, storage_options=options, out_storage_options=options)
    assert proxy.happened.count() > 3
    source = open_source(url)
    texts += [repr(source), repr(locate(url)), repr(open_files(out, options))]
    assert source.frame_count == 30
    settings = WorkerSettings.of(out, storage_options=options, out_storage_options=options)
    texts += [repr(settings), repr(StreamSpec("cam", url, prompts_uri=url))]

    # And what goes wrong.
    monkeypatch.setattr(retries, "ATTEMPTS", Attempts(3, 0.01))
    proxy.set()
    fails(lambda: open_source(signed("no.mp4")))
    fails(lambda: open_source(signed("absent.mp4")))
    fails(lambda: load_prompts(signed("absent.json")))
    fails(lambda: load_prompts(signed("no.mp4")))
    wrong = options | {"key": "HIDDENKEYID3", "secret": "hidden/secret+key/4"}
    fails(lambda: open_source(f"{folder}/short.mp4", storage_options=wrong))
    fails(lambda: run(str(short), f"{folder}/wrong", model, out_storage_options=wrong))
    userinfo = proxy.endpoint.replace("://", "://hidden-user-1:hidden-password-2@")
    into = options | {"client_kwargs": {"endpoint_url": userinfo}}
    fails(lambda: open_source(f"{folder}/short.mp4", storage_options=into))
    fails(lambda: run(str(short), f"{folder}/wrong", model, out_storage_options=into))
    with_password = url.replace("://", "://hidden-user-1:hidden-password-2@")
    fails(lambda: open_source(with_password.replace("/short", "/absent")))
    frames = source.frames()
    next(frames)
    for answer in (500, "cut", "reset"):
        proxy.set(Rule("drop", answer, count=None))
        fails(lambda: list(source.frames()))
        fails(lambda: open_source(url))
        fails(lambda: load_prompts(url))
        fails(lambda: run(str(short), out, model, out_storage_options=options))

    stored = {name: fs.cat_file(name) for name in fs.find(f"{folder}/out") + fs.find(f"{folder}/out2")}
    assert any(name.endswith("cam.json") for name in stored)
    assert any(name.endswith(".safetensors") for name in stored)
    tables = [pq.read_table(pa.BufferReader(d)) for n, d in stored.items() if n.endswith(".parquet")]
    texts += [str(table.to_pylist()) for table in tables]
    ours = [r for r in caplog.records if r.name.partition(".")[0] in ("pipeline", "jobs", "xmem_core")]
    assert len(ours) > 10
    texts += [logging.Formatter("%(name)s %(message)s").format(record) for record in ours]
    for secret in secrets_:
        assert [text for text in texts if secret in text] == []
        assert [name for name, data in stored.items() if secret.encode() in data or secret in name] == []


def test_a_freshly_signed_url_is_the_same_stream() -> None:
    ids = [
        generate_stream_id(f"https://host/clip.mp4?X-Amz-Date={i}&X-Amz-Signature=0{i}&part=1")
        for i in (1, 2)
    ]
    assert ids[0] == ids[1]
    assert ids[0] != generate_stream_id("https://host/clip.mp4?X-Amz-Date=1&X-Amz-Signature=01&part=2")
