"""Capacity of oneDNN's primitive cache.

oneDNN, which computes torch's convolutions and matrix products on CPUs, compiles a kernel for each
combination of shapes and keeps the last 1,024. While a video's memory fills, its size changes at almost every
memory frame, and kernels that are never used again pile up: with bfloat16 a process tracking one object in
176 x 144 pixels grew from 493 to 1,145 MB in 2,000 frames, with a limit of 128 to 824 MB.

A limit below the number of kernels of one frame is worse: each is then compiled for every frame. With a
detector and several objects in windows a frame has more than 128: 50 frames of eight people took 25.5 s of
CPU time with that limit and 16.1 s with 512, which adds about 100 MB.
"""

from __future__ import annotations

import os

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_SETTINGS = (CAPACITY, "DNNL_PRIMITIVE_CACHE_CAPACITY")
_KEPT = 512


def keep_few_primitives() -> None:
    """Limit the kernels that oneDNN keeps in this process and its children, unless the user set a limit.

    oneDNN reads the variable at its first computation.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ[CAPACITY] = str(_KEPT)
