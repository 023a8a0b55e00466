"""A local Ray started by xmem: listening addresses and authentication."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from support.ray_head import _session as processes_of
from support.served import served
from support.sockets import is_loopback, listeners

from jobs.cluster import auth_token as ray_token
from jobs.cluster import local_ray
from jobs.cluster.connection import connected
from pipeline.base.errors import XmemError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ROOT = Path(__file__).parents[3]
STARTER = """
import sys

import ray

from jobs.cluster.connection import connected

with connected():
    ray.get(ray.remote(num_cpus=0)(lambda: 1).remote())
    print("ready", flush=True)
    sys.stdin.read()
"""
JOINER = """
import pathlib, sys

import ray

ray.init(address=sys.argv[1], log_to_driver=False)
ray.get(ray.remote(num_cpus=0)(lambda path: pathlib.Path(path).touch()).remote(sys.argv[2]))
"""
REFUSED_SECONDS = 5.0


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a user without a token, with the weakest protection that Ray offers."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **more}


@contextlib.contextmanager
def joining(address: str, mark: Path, home: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that connects to a Ray and runs a task there that touches a file."""
    command = [sys.executable, "-c", JOINER, address, str(mark)]
    silent = subprocess.DEVNULL
    # Without this variable a client would not even try 127.0.0.1.
    more = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **more}
    process = subprocess.Popen(command, env=environment(home, **more), stdout=silent, stderr=silent)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def assert_guarded(pids: list[int], folder: Path) -> None:
    """These processes listen on loopback only, and only clients with the token can run a task."""
    found = listeners(pids)
    assert len(found) > 6, found  # GCS, raylet, object manager, agents, workers
    assert [one for one in found if not is_loopback(one[1])] == []
    (gcs,) = (pid for pid in pids if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text())
    (address,) = (f"{host}:{port}" for name, host, port in listeners([gcs]))
    told = re.search(rb"RAY_AUTH_TOKEN=(\w+)", Path(f"/proc/{gcs}/environ").read_bytes())
    without, wrong, right = folder / "without", folder / "wrong", folder / "right"
    others = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ours = others | {"RAY_AUTH_TOKEN": told[1].decode() if told else "none"}
    begun = time.monotonic()
    with (
        joining(address, without, folder) as first,
        joining(address, wrong, folder, **others) as second,
        joining(address, right, folder, **ours) as third,
    ):
        assert third.wait(90) == 0  # a task of who is let in is done in this time
        # The others began before it: they have as long again, and some seconds more.
        end = time.monotonic() + (time.monotonic() - begun) + REFUSED_SECONDS
        for process in (first, second):
            with contextlib.suppress(subprocess.TimeoutExpired):  # Ray goes on trying for a minute
                assert process.wait(max(0.0, end - time.monotonic())) != 0
    assert right.exists()
    assert not without.exists()
    assert not wrong.exists()


def test_a_ray_of_ours_is_on_loopback_and_lets_nobody_in_without_its_token(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        env=environment(tmp_path),
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert_guarded(processes_of(process.pid), tmp_path)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_so_is_that_of_xmem_serve(tmp_path: Path) -> None:
    with served(tmp_path, RAY_AUTH_MODE="disabled") as service:
        service.until(lambda: service.get("/readyz"))
        assert any("ServeReplica" in name for name, _, _ in listeners(service.pids()))
        assert_guarded(service.pids(), tmp_path)
        assert service.stop() == 0, service.log.read_text(errors="replace")[-3000:]


def test_what_is_set_for_a_ray_of_ours_is_taken_back() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        before = dict(os.environ)
        with local_ray.protected():
            first = os.environ["RAY_AUTH_TOKEN"]
            assert os.environ["RAY_AUTH_MODE"] == "token"
        with local_ray.protected():
            assert os.environ["RAY_AUTH_TOKEN"] != first
        assert dict(os.environ) == before
    with local_ray.protected():
        pass  # Ray reads the variables again: the next test's Ray must not find tokens disabled


@pytest.mark.parametrize("version", ["2.49.2", "2.58.1", "1.13.0"])
def test_an_older_ray_is_not_started(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    with pytest.raises(XmemError, match=rf"Ray {version} is not safe .*ray\[serve\]>=2\.59"), connected():
        pass
    monkeypatch.setattr(ray, "__version__", "3.0.0.dev0")
    local_ray.check_version()


def test_rays_token_file_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ray_token.make_private()  # there is none
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("own\n")
    file.chmod(0o644)
    with local_ray.protected():
        pass
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "own\n"
