"""oneDNN's primitive cache: its limit, and what users may set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xmem_core.onednn import keep_few_primitives

ROOT = Path(__file__).parents[2]
SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")

# oneDNN reports each kernel that it compiles, and whether it was in the cache.
PROGRAM = """
import sys
import xmem_core
import torch
for _ in range(2):
    for size in range(300):
        torch.nn.functional.conv2d(torch.zeros(1, 32, 40 + size, 32), torch.zeros(32, 32, 3, 3))
"""


def compiled(**given: str) -> tuple[int, int]:
    """How many kernels oneDNN compiled, and how many it found in its cache."""
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    environment = kept | {"PYTHONPATH": str(ROOT), "ONEDNN_VERBOSE": "profile_create"} | given
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if ",convolution," in line]
    return sum("cache_miss" in line for line in lines), sum("cache_hit" in line for line in lines)


def test_fewer_kernels_are_kept_than_300_sizes_need() -> None:
    misses, hits = compiled()
    assert (misses, hits) == (600, 0)
    misses, hits = compiled(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert (misses, hits) == (300, 300)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_set_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in SETTINGS:
        monkeypatch.delenv(each, raising=False)
    keep_few_primitives()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "512"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv(name, "5")
    keep_few_primitives()
    assert {each: os.environ[each] for each in SETTINGS if each in os.environ} == {name: "5"}
