"""`make bench`: where the time of a step goes, against the plain reference path and the machine's ceiling.

The plain path of `tests/reference` and the production paths take turns on the same frames in one process,
once with a memory that has just been started and once with full long-term memory. Times are CPU time, summed
over threads, which other processes disturb less than the clock on the wall; that is given too.

A step's mean is that of `mem_every=5`: four parts an ordinary frame, one part a memory frame. The ceilings
are the fastest of a few 3x3 convolutions by oneDNN and a matrix product. Operations are those of the network
on whole frames, so the share of the ceiling exceeds what is computed where windows or Winograd's algorithm
save some. The published network has random weights here: how far masks agree says something only of
xmem-lite. The defaults are small; `--height 480 --threads 2` measures the published size, and
`--markdown FILE` prints README's table of the JSON of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Paths that take turns would drop each other's compiled kernels, see xmem_core.onednn.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
from golden.weights import fill
from numpy.typing import NDArray
from reference.plain_network import plain_segmenter
from rich.console import Console
from rich.table import Table
from support.moving_discs import clip, fill_memory, mean_iou
from support.step_flops import EVERY, gflop

from xmem_core import MemoryConfig, TrackerState, VideoSegmenter, XMem, load_model
from xmem_core.memory import Memory

# Channels in and out, height and width of 3x3 convolutions: the wide ones of the published network.
_SHAPES = ((256, 256, 120, 214), (512, 512, 30, 54), (1024, 512, 30, 54), (512, 256, 60, 107))
_PARTS = ("encode_key", "read", "decode", "encode_value", "add_frame")
_WIDE = 854 / 480


def ceilings() -> dict[str, float]:
    """GFLOP per second of CPU time: convolutions and a matrix product, in float32 and bfloat16."""
    found = {}
    nhwc = torch.channels_last
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for inputs, outputs, height, width in _SHAPES:
            x = torch.randn(1, inputs, height, width).to(dtype).contiguous(memory_format=nhwc)
            weight = torch.randn(outputs, inputs, 3, 3).to(dtype).contiguous(memory_format=nhwc)
            seconds = _fastest(partial(F.conv2d, x, weight, None, 1, 1))
            rates.append(18e-9 * inputs * outputs * height * width / seconds)
        square = torch.randn(2048, 2048).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"convolution, {name}"] = max(rates)
        found[f"matrix product, {name}"] = 2e-9 * 2048**3 / _fastest(partial(torch.matmul, square, square))
    return found


def scaling() -> dict[str, float]:
    """GFLOP per second by the clock on the wall of a convolution in float32, with one thread and with all.

    Where two cores share a physical one, two threads are hardly faster than one, whatever the network does.
    """
    inputs, outputs, height, width = _SHAPES[0]
    x = torch.randn(1, inputs, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3).contiguous(memory_format=torch.channels_last)
    before, found = torch.get_num_threads(), {}
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        seconds = _fastest(partial(F.conv2d, x, weight, None, 1, 1), time.perf_counter)
        found[f"{threads} threads"] = 18e-9 * inputs * outputs * height * width / seconds
    torch.set_num_threads(before)
    return found


def _fastest(
    function: Callable[[], object], clock: Callable[[], float] = time.process_time, repeats: int = 4
) -> float:
    seconds = []
    for _ in range(repeats):
        started = clock()
        function()
        seconds.append(clock() - started)
    return min(seconds)


@contextmanager
def timed_parts(segmenter: VideoSegmenter, state: TrackerState, spent: Counter[str]) -> Iterator[None]:
    """Add the CPU time of a step's parts to `spent`."""
    names = ("encode_key", "decode", "encode_value")
    places: list[tuple[Any, str]] = [(segmenter._network, name) for name in names]
    if state.memory is not None:
        places += [(state.memory, "read"), (state.memory, "add_frame")]

    def timed(function: Callable[..., object], name: str) -> Callable[..., object]:
        def inner(*args: object, **kwargs: object) -> object:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - started  # type: ignore[assignment]

        return inner

    for owner, name in places:
        owner.__dict__[name] = timed(getattr(owner, name), name)
    try:
        yield
    finally:
        for owner, name in places:
            del owner.__dict__[name]


@dataclass
class Measured:
    """Times of one path's frames; a frame of weight 2 counts twice in the mean."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    parts: list[Counter[str]] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def mean(self, values: list[float]) -> float:
        return float(np.average(values, weights=self.weights))

    def part(self, name: str) -> float:
        return self.mean([float(spent[name]) for spent in self.parts])


def measure(
    variants: dict[str, VideoSegmenter], objects: int, frames: int, height: int, width: int, full: bool
) -> dict[str, dict[str, Any]]:
    """Times of a step of every path, by part; the first path is the plain one.

    The prompted frame is not counted, nor the first after long-term memory was filled.

    Args:
        frames: frames measured, the last of which is a memory frame.
        full: fill long-term memory first.
    """
    images, prompt = clip(frames + 2, objects, height, width)
    states = {name: segmenter.new_state() for name, segmenter in variants.items()}
    found = {name: Measured() for name in variants}
    for t, image in enumerate(images):
        first: NDArray[np.int32] | None = None
        for name, segmenter in variants.items():
            state, own, parts = states[name], found[name], Counter[str]()
            # Only the last frame is a memory frame, however many there are.
            state.last_memory_time = max(0, t - 1) if t <= frames else t - EVERY
            with timed_parts(segmenter, state, parts):
                cpu, wall = time.process_time(), time.perf_counter()
                labels = segmenter.step(state, image, None if t else prompt).label_map.numpy()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if t == 0 and full:
                fill_memory(state)
            first = labels if first is None else first
            if t > 1:
                own.cpu.append(cpu)
                own.wall.append(wall)
                own.parts.append(parts)
                own.agree.append(mean_iou(labels, first, objects))
                own.weights.append(1 if t > frames else (EVERY - 1) / max(frames - 1, 1))
    base = next(iter(found.values()))
    report = {}
    for name, own in found.items():
        memory = states[name].memory
        assert isinstance(memory, Memory)
        report[name] = {
            "CPU seconds": own.mean(own.cpu),
            "wall seconds": own.mean(own.wall),
            "speedup in CPU time": base.mean(base.cpu) / own.mean(own.cpu),
            "speedup": base.mean(base.wall) / own.mean(own.wall),
            "CPU seconds by part": {part: own.part(part) for part in _PARTS},
            "mean IoU with the plain path": statistics.mean(own.agree),
            "elements": sum(memory.sizes),
            "memory MB": memory.nbytes / 2**20,
        }
    return report


def paths(model: XMem, size: int | None) -> dict[str, VideoSegmenter]:
    """The plain path and the production paths of a model."""
    return {
        "plain": plain_segmenter(model, MemoryConfig(search_window=0, least_area=0), size=size),
        "float32": VideoSegmenter(model, size=size),
        "bfloat16": VideoSegmenter(model, size=size, dtype=torch.bfloat16),
    }


def network_of(name: str) -> tuple[XMem, int | None]:
    """A model, and the shorter side at which it sees a frame; None: the frame's own."""
    if name == "xmem-lite":
        lite = load_model(name)
        assert isinstance(lite, XMem)
        return lite, lite.config.default_size
    published = XMem().eval()
    published.load_state_dict(fill(published.state_dict()))
    return published, None


def padded(height: int, width: int, size: int | None) -> tuple[int, int]:
    """The network's input for a frame of that size."""
    scale = 1.0 if size is None else min(1.0, size / min(height, width))
    return tuple(-(-round(side * scale) // 16) * 16 for side in (height, width))  # type: ignore[return-value]


def markdown(report: dict[str, Any]) -> str:
    """README's table: wall seconds of the plain path, and by how much the others are faster in CPU time."""
    rows = [
        "| model, objects, memory | plain | float32 | over plain | of ceiling | bfloat16 | over plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[object, ...], dict[str, dict[str, Any]]] = {}
    for row in report["steps"]:
        groups.setdefault((row["model"], row["objects"], row["memory"]), {})[row["path"]] = row
    for what, paths in groups.items():
        seconds = {name: f"{row['wall seconds']:.2f} s" for name, row in paths.items()}
        faster = {name: f"{row['speedup in CPU time']:.2f}" for name, row in paths.items()}
        share = f"{paths['float32']['share of the ceiling']:.2f}"
        cells = [seconds["plain"], seconds["float32"], faster["float32"], share, seconds["bfloat16"]]
        rows.append(f"| {', '.join(map(str, what))} | {' | '.join(cells)} | {faster['bfloat16']} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=("published", "xmem-lite"))
    parser.add_argument("--objects", type=int, action="append", help="default: 1, 3 and 10")
    parser.add_argument("--frames", type=int, default=3, help="frames measured, one of them a memory frame")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--height", type=int, default=240, help="of the frames, which are 16:9; default: 240")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="only print README's table of this JSON file")
    options = parser.parse_args()
    if options.markdown:
        Console(width=200).out(markdown(json.loads(options.markdown.read_text())), highlight=False)
        return
    torch.set_num_threads(options.threads)
    height, width = options.height, round(options.height * _WIDE)
    ceiling = ceilings()
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "frame": [height, width],
        "GFLOP a second of CPU time": ceiling,
        "GFLOP a second by the clock": scaling(),
        "steps": [],
    }
    console = Console(width=160)
    console.print("GFLOP per second of CPU time: " + ", ".join(f"{n} {v:.0f}" for n, v in ceiling.items()))
    clock = report["GFLOP a second by the clock"]
    console.print("By the clock, convolution: " + ", ".join(f"{n} {v:.0f}" for n, v in clock.items()))
    table = Table(title=f"A step on {width}x{height}, {options.threads} threads: ms, the parts of CPU time")
    for name in ("model, objects, memory", "path"):
        table.add_column(name, no_wrap=True)
    for name in ("wall", "CPU", "speedup", "GFLOP", "share of ceiling", *_PARTS, "rest", "MB", "IoU"):
        table.add_column(name, justify="right")
    for model in options.model or ("published", "xmem-lite"):
        network, size = network_of(model)
        variants = paths(network, size)
        for objects in options.objects or (1, 3, 10):
            for full in (False, True):
                found = measure(variants, objects, options.frames, height, width, full)
                for name, row in found.items():
                    dtype = "bfloat16" if name == "bfloat16" else "float32"
                    seen = padded(height, width, size)
                    work = gflop(network, name == "plain", objects, *seen, row["elements"])
                    share = work / row["CPU seconds"] / ceiling[f"convolution, {dtype}"]
                    memory = "full" if full else "new"
                    row |= {"GFLOP": work, "share of the ceiling": share}
                    what = {"model": model, "objects": objects, "memory": memory, "path": name}
                    report["steps"].append(what | row)
                    parts = list(row["CPU seconds by part"].values())
                    times = [row["wall seconds"], row["CPU seconds"], *parts, row["CPU seconds"] - sum(parts)]
                    wall, cpu, *others = [f"{1e3 * value:.0f}" for value in times]
                    table.add_row(
                        f"{model}, {objects}, {memory}", name, wall, cpu, f"{row['speedup in CPU time']:.2f}",
                        f"{work:.1f}", f"{share:.2f}", *others, f"{row['memory MB']:.0f}",
                        f"{row['mean IoU with the plain path']:.3f}",
                    )  # fmt: skip
    report["resident MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(table)
    console.print(f"Peak memory of the process: {report['resident MB']:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
