"""Classes of Ray actors: they have the methods of what they hold, and need no torch to be named."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from pipeline.distributed.actors import Live, Tracker
from pipeline.distributed.worker import Worker
from pipeline.live.hub.hub import LiveHub


@pytest.mark.parametrize(("actor", "held"), [(Tracker, Worker), (Live, LiveHub)])
def test_an_actor_has_all_public_methods_of_what_it_holds(actor: type, held: type) -> None:
    public = {name for name, _ in inspect.getmembers(held, inspect.isfunction) if not name.startswith("_")}
    assert len(public) > 5
    assert public <= {name for name, _ in inspect.getmembers(actor, inspect.isfunction)}


@pytest.mark.parametrize("module", ["pipeline.distributed.serve", "jobs.batch.run"])
def test_drivers_and_replicas_import_no_torch(module: str) -> None:
    program = f"import {module}, sys; print('ray' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_what_drivers_check_before_they_start_needs_no_torch() -> None:
    program = """
import sys
from jobs.cli.terminal import fetch_model
from pipeline.tracking.plugins import check_plugins
from pipeline.tracking.settings import TrackSettings
fetch_model("xmem-lite")
check_plugins(TrackSettings(), ["motion"])
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
