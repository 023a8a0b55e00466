"""OpenMP's wait policy as reported by libgomp when torch loads it, and the user's own settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xmem_core.openmp import passive_environment, wait_passively

ROOT = Path(__file__).parents[2]
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
gnu_only = pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP runtime on Linux only")


def python(program: str, **given: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose"} | given
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )


def spin_count(done: subprocess.CompletedProcess[str]) -> str:
    """Number of times libgomp's threads spin before they sleep, as reported when it was loaded."""
    found = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    assert len(found) == 1, done.stderr
    return str(found[0])


@gnu_only
@pytest.mark.parametrize(
    "program",
    [
        "from xmem_core import load_model",
        "from pipeline.tracking.files.track import track",
        "import pipeline.tracking.memory_plan",
        "import jobs.evaluation.suites.runner",
        "import jobs.cli.app, torch",
    ],
)
def test_threads_sleep_whichever_module_is_imported_first(program: str) -> None:
    assert spin_count(python(program)) == "0"


@gnu_only
def test_a_user_decides_otherwise() -> None:
    assert spin_count(python("import xmem_core.memory", GOMP_SPINCOUNT="77")) == "77"


@gnu_only
def test_torch_imported_before_is_said() -> None:
    done = python("import torch, xmem_core, os; print(os.environ['OMP_WAIT_POLICY'])")
    assert spin_count(done) != "0"
    assert "torch was imported before xmem_core" in done.stderr
    assert "OMP_WAIT_POLICY=PASSIVE" in done.stderr
    assert done.stdout == "PASSIVE\n"  # for child processes


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_set_beside_what_the_user_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in SETTINGS:
        monkeypatch.delenv(each, raising=False)
    assert passive_environment() == {"OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setenv(name, "5")
    assert wait_passively()
    assert {each: os.environ[each] for each in SETTINGS if each in os.environ} == {name: "5"}
    assert passive_environment() == {name: "5"}


def test_the_public_names_are_had_without_torch_being_loaded_before() -> None:
    program = """
import sys, xmem_core, pipeline.analytics.query, pipeline.tracking.settings, pipeline.live.spec
import jobs.batch.manifest
from xmem_core import MemoryConfig, ModelConfig
assert not {"torch", "ray"} & set(sys.modules)
assert set(xmem_core.__all__) <= set(dir(xmem_core))
assert all(getattr(xmem_core, name).__name__ == name for name in xmem_core.__all__)
assert not hasattr(xmem_core, "Tracker")
"""
    python(program)
