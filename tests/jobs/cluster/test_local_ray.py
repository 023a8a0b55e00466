"""A local Ray started by xmem: listening addresses and authentication."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from support.guarded import assert_guarded, environment
from support.ray_head import _session as processes_of

from jobs.cluster import auth_token as ray_token
from jobs.cluster import local_ray
from jobs.cluster.connection import connected
from pipeline.base.errors import XmemError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STARTER = """
import sys

import ray

from jobs.cluster.connection import connected

class One:
    def one(self):
        return 1

with connected():
    actor = ray.remote(num_cpus=0)(One).remote()
    ray.get(actor.one.remote())
    print("ready", flush=True)
    sys.stdin.read()
"""


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
        pids = processes_of(process.pid)
        running = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
        assert any("gcs_server" in line for line in running)
        assert any(line.startswith("ray::One") for line in running)
        assert any("silent_agent.py" in line for line in running)
        for unneeded in (
            "monitor.py",
            "dashboard.py",
            "ray::DashboardAgent",
            "ray::IDLE",
        ):  # and log_monitor.py
            assert not [line for line in running if unneeded in line], unneeded
        assert_guarded(pids, tmp_path)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


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
