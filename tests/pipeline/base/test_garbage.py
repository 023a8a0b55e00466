"""Pauses of the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from pathlib import Path

from pipeline.base.garbage import no_collection

# What `xmem track` says of a missing file, and how often garbage of the oldest objects was collected.
TRACK = """
import gc
from jobs.cli.app import main
found = []
gc.callbacks.append(lambda phase, about: found.append(about["generation"]))
try:
    main(["track", "nowhere.mp4", "--out", "out"])
except SystemExit as ended:
    print(ended.code, gc.isenabled(), found.count(2))
"""


def test_nothing_is_collected_inside_and_all_is_as_before_outside() -> None:
    assert gc.isenabled()
    with no_collection():
        with contextlib.suppress(KeyError), no_collection():
            raise KeyError
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_command_collects_no_garbage_while_it_imports(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRACK], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    code, enabled, collections = done.stdout.split()
    assert (code, enabled) == ("2", "True"), done.stderr
    assert int(collections) <= 2
