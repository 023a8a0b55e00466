"""Batches on a cluster: a real Ray head with dashboard and token, to which the code is shipped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.ray_head import TOKEN, RayHead, ray_head
from support.servers import S3Server
from support.tiny import tiny_weights
from support.videos import make_video

from jobs.batch.submit import Jobs, JobStatus, _shipped_manifest, _shipped_options, check_paths
from jobs.cli.app import main
from jobs.cluster import auth_token as ray_token
from pipeline.base.errors import UsageError
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track

# Ray's client calls aiohttp so.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")

ROOT = Path(__file__).parents[3]
PACKAGES = ("xmem_core", "pipeline", "jobs")
BOX = {"version": 1, "objects": [{"frame": 0, "id": 1, "box": [10, 10, 30, 30]}]}


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as on another machine: in another place, and with a marker."""
    folder = tmp_path_factory.mktemp("away")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "pipeline" / "__init__.py").open("a") as file:
        file.write('\nMARK = "these very packages"\n')
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a", 9), ("b", 17)):
        make_video(folder / f"{name}.mp4", frames, width=64, height=48)
    (folder / "a.prompts.json").write_text(json.dumps(BOX))
    (folder / "shared.json").write_text(json.dumps(BOX))
    (folder / "list.csv").write_text("uri,stream_id\na.mp4,first\nb.mp4,second\n")
    tiny_weights(folder)
    return folder


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Xmem = Callable[..., Done]


@pytest.fixture
def xmem(videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Xmem:
    """The command in this process, which is quick."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.chdir(videos)

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capsys.readouterr())

    return run


def xmem_alone(
    *arguments: str | Path, away: Path, cwd: Path, token: str | None = TOKEN, **variables: str
) -> Done:
    """The command in a separate process, since Ray keeps its token for the life of a process."""
    return python("-m", "jobs.cli", *arguments, away=away, cwd=cwd, token=token, **variables)


def python(
    *arguments: str | Path, away: Path, cwd: Path, token: str | None = TOKEN, **variables: str
) -> Done:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # A home of its own: this machine's own Ray keeps its token there.
    environment |= {"PYTHONPATH": str(away), "HOME": str(away), "OMP_NUM_THREADS": "1", **variables}
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
    return Done(done.returncode, done.stdout, done.stderr)


def rows_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("*/stream_id=*/*.parquet"))}


def states(out: Path) -> list[dict[str, str]]:
    found = []
    for path in sorted((out / "batches").glob("*.json")):
        found.append({v["stream_id"]: v["state"] for v in json.loads(path.read_text())["videos"]})
    return found


WHERE = """
import json, sys
import ray
from pathlib import Path
from jobs.cluster import auth_token
from jobs.cli.app import main
auth_token.enable()
from jobs.cluster.connection import connected

with connected(sys.argv[1]):
    @ray.remote(num_cpus=1)
    def where():
        import jobs.batch.report, pipeline.distributed.messages, xmem_core
        from xmem_core import load_model
        model = load_model("xmem-lite")
        files = [m.__file__ for m in (xmem_core, pipeline.distributed.messages, jobs.batch.report)]
        return pipeline.MARK, files, sum(p.numel() for p in model.parameters())
    print(json.dumps(ray.get(where.remote())))
"""


def test_workers_of_a_cluster_import_the_packages_that_were_sent(
    head: RayHead, away: Path, tmp_path: Path
) -> None:
    script = tmp_path / "where.py"
    script.write_text(WHERE.replace("import ray\n", "", 1).replace("    @ray", "    import ray\n    @ray"))
    done = python(script, head.address, away=away, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mark, files, parameters = json.loads(done.stdout)
    assert mark == "these very packages"
    for file in files:
        assert "runtime_resources/py_modules_files" in file
        assert str(away) not in file
    assert parameters > 1_000_000  # of the bundled checkpoint: it travels with its package


def test_a_batch_is_submitted_followed_and_asked_about(
    head: RayHead, xmem: Xmem, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = xmem(
        "batch", "submit", "list.csv", "--out", os.path.relpath(out), "--prompts", "shared.json",
        "--address", head.dashboard, "--follow", "--id", "my-batch", "--model", "tiny-0.safetensors",
        "--chunk", "8", "--report", "report.json", "--env", "XMEM_TEST=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, log = done.stdout.partition("\n")
    assert first == "my-batch"
    assert "2 of 2 videos finished; 26 rows" in log
    assert "my-batch: SUCCEEDED" in done.stderr
    assert states(out) == [{"first": "finished", "second": "finished"}]
    # The job has a folder of its own; relative paths are those of this one.
    assert json.loads((videos / "report.json").read_text())["totals"]["finished"] == 2
    (videos / "report.json").unlink()
    # `retry` finds the manifest where it is here, not in the job's folder.
    (report,) = (json.loads(p.read_text()) for p in (out / "batches").glob("*.json"))
    assert report["request"][0] == str(videos / "list.csv")
    request = dict(zip(report["request"][1::2], report["request"][2::2], strict=True))
    assert request["--prompts"] == str(videos / "shared.json")
    assert request["--out"] == str(out)
    assert "--address" not in request
    status = xmem("batch", "status", "my-batch", "--address", head.dashboard, "--json")
    answer = json.loads(status.stdout)
    assert (answer["job_id"], answer["state"], answer["out"]) == ("my-batch", "SUCCEEDED", str(out))
    assert answer["started"] < answer["ended"]
    plain = xmem("batch", "status", "my-batch", "--address", head.dashboard)
    assert plain.stdout == "SUCCEEDED\n"
    logs = xmem("batch", "logs", "my-batch", "--address", head.dashboard)
    assert "2 of 2 videos finished" in logs.stdout
    again = xmem("batch", "submit", "list.csv", "--out", out, "--id", "my-batch", "--address", head.dashboard)
    assert again.returncode == 2
    assert "a job of this id exists already" in again.stderr
    over = xmem("batch", "cancel", "my-batch", "--address", head.dashboard)
    assert (over.returncode, "had ended already" in over.stderr) == (0, True)


def test_a_job_is_cancelled_and_the_same_batch_goes_on(
    head: RayHead, xmem: Xmem, videos: Path, tmp_path: Path
) -> None:
    make_video(tmp_path / "long.mp4", 400, width=64, height=48)
    (tmp_path / "long.prompts.json").write_text(json.dumps(BOX))
    out = tmp_path / "out"
    batch = [tmp_path / "long.mp4", "--out", out, "--model", videos / "tiny-0.safetensors"]
    done = xmem("batch", "submit", *batch, "--chunk", "4", "--address", head.dashboard, "--id", "to-cancel")
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 300
    while len(list(out.glob("tracks/*/*.parquet"))) < 2:
        assert time.monotonic() < deadline, xmem("batch", "logs", "to-cancel", "--address", head.dashboard)
        time.sleep(0.1)
    assert "is being stopped" in xmem("batch", "cancel", "to-cancel", "--address", head.dashboard).stderr
    while (state := xmem("batch", "status", "to-cancel", "--address", head.dashboard).stdout) == "RUNNING\n":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert state == "STOPPED\n"
    assert xmem("batch", "logs", "to-cancel", "--follow", "--address", head.dashboard).returncode == 1
    committed = rows_of(out)
    assert 2 <= len([name for name in committed if name.startswith("tracks/")]) < 400 / 4
    again = xmem(
        "batch", "submit", *batch, "--chunk", "4", "--address", head.dashboard, "--follow", "--id", "again"
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 1 videos finished; 400 rows" in again.stdout
    assert "400 frames tracked" not in again.stdout
    assert states(out)[-1].popitem()[1] == "finished"
    finished = rows_of(out)
    assert {name: finished[name] for name in committed} == committed
    (record,) = (json.loads(p.read_text()) for p in (out / "streams").iterdir())
    undisturbed = tmp_path / "undisturbed"
    track(
        tmp_path / "long.mp4",
        undisturbed,
        PromptSet.from_record(BOX),
        model=str(videos / "tiny-0.safetensors"),
        threads=record["settings"]["threads"],
        dtype=record["settings"]["dtype"],
        chunk_frames=4,
    )
    assert finished == rows_of(undisturbed)
    assert not (out / "running").exists()
    listed = xmem("batch", "list", "--address", head.dashboard)
    jobs = [line.split()[:2] for line in listed.stdout.splitlines()]
    assert jobs[:2] == [["again", "SUCCEEDED"], ["to-cancel", "STOPPED"]]


def test_workers_without_credentials_are_named_and_env_gives_them_some(
    head: RayHead, away: Path, videos: Path, tmp_path: Path, s3_server: S3Server
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3_server.options, use_listings_cache=False)
    root = s3_server.uri("on-workers")
    fs.put_file(str(videos / "a.mp4"), f"{root}/a.mp4")
    fs.put_file(str(videos / "a.prompts.json"), f"{root}/a.prompts.json")
    batch: list[str | Path] = ["batch", root, "--out", tmp_path / "out"]
    batch += ["--model", videos / "tiny-0.safetensors"]
    batch += ["--chunk", "8", "--max-tries", "1", "--address", head.address]
    ours = s3_server.environment
    lacking = xmem_alone(*batch, away=away, cwd=tmp_path, **ours)
    assert lacking.returncode == 1, lacking.stderr
    address = head.address.partition(":")[0]
    assert f"(on the worker at {address})" in lacking.stderr
    assert "1 of them for lack of credentials or rights on the workers" in lacking.stderr
    given = [word for name, value in ours.items() for word in ("--env", f"{name}={value}")]
    done = xmem_alone(*batch, *given, away=away, cwd=tmp_path, **ours)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 videos finished; 9 rows" in done.stderr
    written = [p.read_bytes() for p in (tmp_path / "out").rglob("*.json")]
    assert written
    assert not any(ours["AWS_SECRET_ACCESS_KEY"].encode() in data for data in written)


def test_a_job_whose_set_up_fails_says_so_in_a_line(head: RayHead, xmem: Xmem) -> None:
    from jobs.batch.submit import Jobs

    Jobs(head.dashboard)._client.submit_job(
        entrypoint="true",
        submission_id="no-set-up",
        runtime_env={"working_dir": "https://127.0.0.1:1/no.zip"},
    )
    status = Jobs(head.dashboard).wait("no-set-up")
    assert status.state == "FAILED"
    assert "Max retries exceeded with url: /no.zip" in status.message
    shown = xmem("batch", "status", "no-set-up", "--address", head.dashboard)
    assert len(shown.stderr.splitlines()) == 1
    assert len(shown.stderr) < 400


@pytest.mark.parametrize("arguments", [("status", "x"), ("logs", "x"), ("cancel", "x")])
def test_an_unknown_job_is_a_usage_error(head: RayHead, xmem: Xmem, arguments: tuple[str, ...]) -> None:
    done = xmem("batch", *arguments, "--address", head.dashboard)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"xmem: error: there is no job x at {head.dashboard}\n"


@pytest.mark.parametrize(
    ("token", "said"), [(None, "requires a token"), ("wrong-token", "rejects this token")]
)
def test_a_missing_or_wrong_token_gives_one_clear_line(
    head: RayHead, away: Path, videos: Path, token: str | None, said: str, tmp_path: Path
) -> None:
    submit = ("batch", "submit", "list.csv", "--out", tmp_path, "--address", head.dashboard)
    done = xmem_alone(*submit, away=away, cwd=videos, token=token)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"xmem: error: {head.dashboard} {said}: {ray_token.HOW}\n"


def test_a_wrong_token_of_a_driver_gives_one_clear_line(
    head: RayHead, away: Path, videos: Path, tmp_path: Path
) -> None:
    batch = ("batch", "list.csv", "--out", tmp_path, "--prompts", "shared.json", "--address", head.address)
    done = xmem_alone(*batch, away=away, cwd=videos, token="wrong-token")
    assert done.returncode == 1
    assert done.stderr == (
        f"xmem: error: the Ray cluster at {head.address} requires its token: {ray_token.HOW}\n"
    )


def test_addresses_where_no_ray_answers(head: RayHead, xmem: Xmem, tmp_path: Path) -> None:
    batch = ("list.csv", "--out", tmp_path, "--prompts", "shared.json", "--address")
    for command, address, said in [
        ("run", "127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("run", head.dashboard.removeprefix("http://"), ", perhaps the dashboard: give the head"),
        ("run", head.dashboard, "give auto, host:6379 or ray://host:10001"),
        ("submit", "http://127.0.0.1:1", "no Ray cluster answers at http://127.0.0.1:1"),
        ("submit", head.address, "give the dashboard's"),
    ]:
        done = xmem("batch", command, *batch, address)
        assert done.returncode in (1, 2), address
        assert said in done.stderr, address
        assert len(done.stderr.splitlines()) == 1


# --- without a cluster ---------------------------------------------------------------------------


def test_when_a_token_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_token.header(this_machine=True) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("own\n")
    assert ray_token.header(this_machine=True) == {"Authorization": "Bearer own"}
    assert ray_token.header(this_machine=False) is None  # another's machine has no business with it
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert ray_token.header(this_machine=False) == {"Authorization": "Bearer own"}
    (tmp_path / "other").write_text("other")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert ray_token.header(this_machine=False) == {"Authorization": "Bearer other"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert ray_token.header(this_machine=False) == {"Authorization": "Bearer given"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert ray_token.header(this_machine=True) is None
    ray_token.enable()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.delenv("RAY_AUTH_MODE")
    ray_token.enable()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert ray_token.header(this_machine=True) is None


class Cluster:
    """A fake of Ray's client that records what is submitted."""

    def __init__(self, address: str, **options: Any) -> None:
        self.given: dict[str, Any] = {}

    def submit_job(self, **given: Any) -> str:
        self.given = given
        return "the-id"


def _jobs(monkeypatch: pytest.MonkeyPatch, address: str) -> tuple[Jobs, Cluster]:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Cluster)
    jobs = Jobs(address)
    return jobs, jobs._client


def test_relative_paths_are_made_absolute_for_a_cluster_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.safetensors").touch()
    for address in ("http://127.0.0.1:8265", "http://localhost:8265", f"http://{socket.gethostname()}:8265"):
        jobs, cluster = _jobs(monkeypatch, address)
        options = ["--report", "r.json", "--model=own.safetensors", "--sink", "out"]
        assert jobs.submit("in", options, out="out", prompts="there.json") == "the-id"
        assert shlex.split(cluster.given["entrypoint"])[5:] == [
            f"{tmp_path}/in", "--out", f"{tmp_path}/out", "--address", "auto", "--report",
            f"{tmp_path}/r.json", f"--model={tmp_path}/own.safetensors", "--sink", "out",
            "--prompts", f"{tmp_path}/there.json",
        ]  # fmt: skip
        assert cluster.given["metadata"] == {"xmem_out": f"{tmp_path}/out"}
        variables = cluster.given["runtime_env"]["env_vars"]
    # Where 127.0.0.1 is a forwarded port, the job finds it out.
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_paths()
    monkeypatch.setattr("socket.gethostname", lambda: "head-0")
    with pytest.raises(
        UsageError, match="are not valid on head-0, where the job runs: give an absolute path"
    ):
        check_paths()


def test_relative_paths_are_refused_for_a_cluster_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pth").touch()
    address = "http://192.0.2.1:8265"  # nobody's
    jobs, cluster = _jobs(monkeypatch, address)
    for options, changes in [
        ([], {"out": "out"}),
        ([], {"videos": "in/*.mp4"}),
        ([], {"prompts": "there.json"}),
        (["--report", "r.json"], {}),
        (["--report=~/r.json"], {}),
        (["--model", "own.pth"], {}),
    ]:
        given: dict[str, Any] = {"videos": "s3://b/in", "out": "/shared/out", **changes}
        with pytest.raises(
            UsageError, match=rf"is relative to this machine, but the job runs at {address}: g"
        ):
            jobs.submit(given.pop("videos"), options, **given)
    assert cluster.given == {}
    options = ["--report", "-", "--model", "xmem", "--sink", "out"]
    jobs.submit("/shared/in", options, out="s3://b/out", prompts=str(tmp_path / "no.json"))
    assert shlex.split(cluster.given["entrypoint"])[5:] == [
        "/shared/in", "--out", "s3://b/out", "--address", "auto", *options, "--prompts",
        f"{tmp_path}/no.json",
    ]  # fmt: skip
    assert "env_vars" not in cluster.given["runtime_env"]


def test_a_manifest_that_lies_here_travels_with_absolute_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"uri": "a.mp4", "prompts": BOX, "priority": 2}, {"uri": "s3://b/c.mp4", "prompts": "p.json"}]
    (tmp_path / "in" / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    ship = tmp_path / "ship"
    ship.mkdir()
    assert _shipped_manifest("in/m.jsonl", ship) == "videos.jsonl"
    lines = [json.loads(line) for line in (ship / "videos.jsonl").read_text().splitlines()]
    assert lines == [
        {"uri": f"{tmp_path}/in/a.mp4", "prompts": BOX, "priority": 2},
        {"uri": "s3://b/c.mp4", "prompts": f"{tmp_path}/in/p.json"},
    ]
    # What does not lie here is the cluster's to read.
    assert _shipped_manifest("s3://b/m.jsonl", ship) == "s3://b/m.jsonl"
    assert _shipped_manifest("in/*.mp4", ship) == f"{tmp_path}/in/*.mp4"


def test_storage_options_travel_in_a_file_and_not_in_the_command(tmp_path: Path) -> None:
    given = [
        "--actors",
        "2",
        "--storage-options",
        "secret=hush",
        "--chunk",
        "8",
        "--storage-options",
        "key=k",
    ]
    assert _shipped_options(given, tmp_path) == [
        "--actors", "2", "--chunk", "8", "--storage-options", "@storage-options.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "storage-options.json").read_text()) == {"secret": "hush", "key": "k"}


def test_a_status_as_json() -> None:
    status = JobStatus("i", "PENDING", "waits", None, None, None)
    assert status.to_json() == {
        "job_id": "i", "state": "PENDING", "message": "waits", "out": None, "started": None, "ended": None
    }  # fmt: skip
