"""Allocator settings, in separate processes."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

from pipeline.base.malloc import keep_freed_memory

# Real steps: how many page faults do they cost once all is warm?
SCRIPT = """
import json, resource, sys
from pipeline.base.malloc import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
import numpy as np
from xmem_core import Prompt, VideoSegmenter, load_model
rng = np.random.default_rng(0)
segmenter = VideoSegmenter(load_model("xmem-lite"), size=384)
state = segmenter.new_state()
frame = rng.integers(0, 256, (480, 640, 3), np.uint8)
mask = np.zeros((480, 640), bool)
mask[200:300, 250:300] = True
def step(prompt=None):
    segmenter.step(state, np.roll(frame, 3 * state.time, 1), prompt).label_map
step(Prompt({1: mask}))
for _ in range(11):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""

# Page faults of the main thread and of another one that allocate and free 40 MB three times each, in units of
# the pages of 40 MB.
TWO_THREADS = """
import numpy, resource, threading
from pipeline.base.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        numpy.empty(40 << 20, numpy.uint8).fill(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * 4096 / (40 << 20)

keep_freed_memory()
found = [faults()]
thread = threading.Thread(target=lambda: found.append(faults()))
thread.start()
thread.join()
print(*found)
"""

# Free blocks in fastbins after many small blocks were freed: `fsmblks` of glibc's mallinfo2.
FASTBINS = """
import ctypes, sys
from pipeline.base.malloc import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
if sys.argv[1] == "kept":
    keep_freed_memory()
allocate, free, about = libc.malloc, libc.free, libc.mallinfo2
about.restype, allocate.restype, free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
about()
blocks = [allocate(40) for _ in range(1000)]
for block in blocks:
    free(block)
print(about().fsmblks)
"""


def faults(how: str, **environment: str) -> tuple[bool, int]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    kept, count = json.loads(done.stdout)
    return kept, count


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is where Linux is")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, count = faults("kept")
    assert kept
    # As glibc begins. Where blocks happen to be freed in a lucky order it raises its thresholds by itself,
    # and then nothing is left to gain: seen in one run of five.
    beginning = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    assert count < 0.5 * faults("plain", **beginning)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is where Linux is")
def test_all_threads_have_one_heap() -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    # Huge pages, where the system gives them, would hide faults.
    environment = plain | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", TWO_THREADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    main, other = map(float, done.stdout.split())
    assert 0.9 < main < 1.5
    assert other < 0.5


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc 2.33 and later")
def test_small_freed_blocks_are_not_kept_apart() -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    apart = []
    for how in ("plain", "kept"):
        command = [sys.executable, "-c", FASTBINS, how]
        done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True, timeout=120)
        apart.append(int(done.stdout))
    assert apart[0] > 20_000
    assert apart[1] < 1000


def test_the_environment_has_the_last_word() -> None:
    assert not faults("kept", MALLOC_ARENA_MAX="2")[0]


@pytest.mark.parametrize("missing", [OSError("no such library"), AttributeError("mallopt")])
def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch, missing: Exception) -> None:
    def library(_: object) -> object:
        raise missing

    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("pipeline.base.malloc.ctypes.CDLL", library)
    assert not keep_freed_memory()
    monkeypatch.setattr("pipeline.base.malloc.sys.platform", "darwin")
    assert not keep_freed_memory()
