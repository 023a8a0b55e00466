"""Checks that a Ray listens on loopback only and runs tasks only for clients with its token."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support.sockets import is_loopback, listeners

ROOT = Path(__file__).parents[2]
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
    programs = [Path(name.split()[0]).name for name, _, _ in found]
    assert {"gcs_server", "raylet", "ray::RuntimeEnvAgent"} < set(programs), found
    assert programs.count("raylet") == 2  # itself and its object manager
    assert len(found) > 5, found  # the driver and a worker, too
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
