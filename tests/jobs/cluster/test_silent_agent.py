"""The program in place of the dashboard's agent: what the raylet reads of it, and when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import _raylet
from ray._private import node, services

from jobs.cluster import connection, silent_agent
from pipeline.base.errors import XmemError

RAYS: Any = _raylet
STARTER = """
import subprocess, sys
print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True)
sys.stdin.read()
"""


def test_it_writes_the_files_that_rays_agent_writes(tmp_path: Path) -> None:
    theirs = {"METRICS_AGENT_PORT_NAME", "METRICS_EXPORT_PORT_NAME", "DASHBOARD_AGENT_LISTEN_PORT_NAME"}
    assert {getattr(RAYS, name) for name in theirs} == set(silent_agent.PORTS)
    name_of_node = "0a1b" * 14
    silent_agent.report(str(tmp_path), name_of_node)
    ours = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for name in silent_agent.PORTS:
        (tmp_path / f"{name}_{name_of_node}").unlink()
        RAYS.persist_port(str(tmp_path), name_of_node, name, -1)
    assert ours == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(ours) == 3


def test_it_ends_with_its_raylet(tmp_path: Path) -> None:
    options = [f"--session-dir={tmp_path}", "--node-id=7f", "--head", "--listen-port=0"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_RAYLET_PID"}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, silent_agent.__file__, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as raylet:
        assert raylet.stdout is not None
        agent = int(raylet.stdout.readline())
        until(lambda: len([f for f in tmp_path.iterdir() if f.suffix != ".new"]) == 3)
        assert Path(f"/proc/{agent}").exists()
        raylet.kill()
    until(lambda: not Path(f"/proc/{agent}").exists())


def test_a_ray_that_does_not_start_with_it_gets_its_own_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Path(ray.__file__).parent / "dashboard" / "agent.py"
    nodes: Any = node
    theirs: Any = services
    given: list[str] = []

    def start_process(command: list[str]) -> None:
        given.extend(command)
        raise RuntimeError("the raylet ended while it started")

    def start_raylet(started: object) -> None:
        theirs.start_ray_process(["raylet", f"--dashboard_agent_command=python {agent} --head"])

    def init(**options: object) -> None:
        nodes.Node.start_raylet(SimpleNamespace(_ray_params=SimpleNamespace()))

    monkeypatch.setattr(theirs, "start_ray_process", start_process)
    monkeypatch.setattr(nodes.Node, "start_raylet", start_raylet)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connection, "_START_WAITS", (0.0, 0.0))
    with pytest.raises(XmemError, match="the raylet ended while it started"), connection.connected():
        pass
    started = [part for part in given if part != "raylet"]
    assert started == [
        f"--dashboard_agent_command=python {program} --head"
        for program in (silent_agent.__file__, agent, agent)
    ]
    assert theirs.start_ray_process is start_process


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
