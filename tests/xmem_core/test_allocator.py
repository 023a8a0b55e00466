"""glibc's allocator: freed memory is kept, unless the user set it otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xmem_core.allocator
from xmem_core.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]
PAGE = 4096
glibc_only = pytest.mark.skipif(not xmem_core.allocator._has_glibc(), reason="the C library is not glibc")

# Page faults of the main thread and of another one, that allocate and free 40 MB three times each.
FAULTS = """
import xmem_core, numpy, resource, threading

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        numpy.empty(40 << 20, numpy.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults()]
thread = threading.Thread(target=lambda: found.append(faults()))
thread.start()
thread.join()
print(*found)
"""


def faults(**given: str) -> list[float]:
    """Of main and other thread, in units of the pages of 40 MB."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    # Huge pages, where the system gives them, would hide faults.
    environment = kept | {"PYTHONPATH": str(ROOT), "NUMPY_MADVISE_HUGEPAGE": "0"} | given
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    return [int(number) * PAGE / (40 << 20) for number in done.stdout.split()]


@glibc_only
def test_freed_memory_is_used_again_by_all_threads() -> None:
    main, other = faults()
    assert 0.9 < main < 1.5
    assert other < 0.5


@glibc_only
def test_a_user_decides_otherwise() -> None:
    main, other = faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert main > 2.5
    assert other > 2.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")],
)
def test_nothing_is_set_beside_what_the_user_set(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in [k for k in os.environ if k.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(each)
    assert keep_freed_memory() == xmem_core.allocator._has_glibc()
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)
    assert not keep_freed_memory()
