"""`make bench`: where the time of a step goes, against the plain reference path and the machine's ceiling.

The plain path of `tests/reference` and the production paths take turns on the same frames in one process,
once with a memory that has just been started and once with full long-term memory. Times are CPU time, summed
over threads, which other processes disturb less than the clock on the wall; that is given too.

A step's mean is that of `mem_every=5`: four parts an ordinary frame, one part a memory frame. The ceilings
are the fastest of a few 3x3 convolutions by oneDNN and a matrix product. Operations are those of the network
on whole frames, so the share of the ceiling exceeds what is computed where windows or Winograd's algorithm
save some. The published network has random weights here: how far masks agree says something only of
xmem-lite. The defaults are small; `--height 480 --threads 2` measures the published size.
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

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
from golden.weights import fill
from numpy.typing import NDArray
from reference.plain_network import PlainXMem, plain_segmenter
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from xmem_core import MemoryConfig, Prompt, TrackerState, VideoSegmenter, XMem, load_model
from xmem_core.memory import Memory
from xmem_core.weights import build_network

# Channels in and out, height and width of 3x3 convolutions: the wide ones of the published network.
_SHAPES = ((256, 256, 120, 214), (512, 512, 30, 54), (1024, 512, 30, 54), (512, 256, 60, 107))
_PARTS = ("encode_key", "read", "decode", "encode_value", "add_frame")
_EVERY = 5
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


def _fastest(function: Callable[[], object], repeats: int = 4) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


def clip(count: int, objects: int, height: int, width: int) -> tuple[list[NDArray[np.uint8]], Prompt]:
    """Discs that move over blocks of noise, and the masks of the first frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    back = np.kron(coarse, np.ones((16, 16, 1), np.uint8))[:height, :width]
    y, x = np.mgrid[:height, :width]
    frames, masks = [], {}
    for t in range(count):
        frame = back.copy()
        for k in range(objects):
            left, top = width * (k % 5 + 0.5) / 5 + 2 * t, height * (0.25 if k < 5 else 0.75)
            disc = (x - left) ** 2 + (y - top) ** 2 < (height / 11) ** 2
            frame[disc] = (25 * k, 200, 255 - 25 * k)
            if t == 0:
                masks[k + 1] = disc
        frames.append(frame)
    return frames, Prompt(masks)


def fill_memory(state: TrackerState) -> None:
    """Fill long-term memory with slightly changed copies of what is remembered."""
    memory = state.memory
    assert isinstance(memory, Memory)
    region = memory.long_term
    rng = torch.Generator().manual_seed(0)
    kept = memory._rows([memory.working.used])
    rows = kept[torch.arange(region.capacity - region.size) % len(kept)]
    key = memory._columns["key"][rows]
    columns = {name: memory._columns[name][rows] for name in ("shrinkage", "selection")}
    columns["key"] = key + 0.1 * key.std() * torch.randn(key.shape, generator=rng)
    memory._append(
        region,
        columns,
        memory._columns["time"][rows],
        {i: value[rows] for i, value in memory._values.items()},
        (torch.rand(len(rows), generator=rng), torch.ones(len(rows))),
    )
    memory._readable = None


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
            state.last_memory_time = 0 if t <= frames else t - _EVERY  # the last frame is a memory frame
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
                own.agree.append(_iou(labels, first, objects))
                own.weights.append(1 if t > frames else (_EVERY - 1) / max(frames - 1, 1))
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


def _iou(a: NDArray[np.int32], b: NDArray[np.int32], objects: int) -> float:
    """Mean over the objects; 1 for one that is in neither."""
    found = []
    for i in range(1, objects + 1):
        union = int(((a == i) | (b == i)).sum())
        found.append(int(((a == i) & (b == i)).sum()) / union if union else 1.0)
    return statistics.mean(found)


def gflop(model: XMem, plain: bool, objects: int, height: int, width: int, elements: int) -> float:
    """Operations of a step on a whole frame, in 10^9, a fifth of a memory frame's included.

    Args:
        plain: of the reference path, which convolves what objects share once for each.
        height, width: of the network's input, padded.
        elements: of memory.
    """
    config = model.config
    with torch.device("meta"):
        network = build_network(config)
        assert isinstance(network, XMem)
        network.__class__ = PlainXMem if plain else XMem
        image, h, w = torch.empty(1, 3, height, width), height // 16, width // 16
        read = torch.empty(1, objects, config.value_dim, h, w)
        hidden = torch.empty(1, objects, config.hidden_dim, h, w) if config.hidden_dim else None
        masks = torch.empty(1, objects, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as every:
        keys = network.encode_key(image)
        network.decode(keys.scales, read, hidden)
    with torch.no_grad(), FlopCounterMode(display=False) as some:
        network.encode_value(image, keys.f16, hidden, masks)
    chosen = elements if plain else MemoryConfig().top_k
    reading = 4 * config.key_dim * elements + 2 * objects * config.value_dim * chosen
    network_flops: float = every.get_total_flops() + some.get_total_flops() / _EVERY
    return (network_flops + reading * h * w) / 1e9


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


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=("published", "xmem-lite"))
    parser.add_argument("--objects", type=int, action="append", help="default: 1, 3 and 10")
    parser.add_argument("--frames", type=int, default=3, help="frames measured, one of them a memory frame")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--height", type=int, default=240, help="of the frames, which are 16:9; default: 240")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    height, width = options.height, round(options.height * _WIDE)
    ceiling = ceilings()
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "frame": [height, width],
        "GFLOP a second of CPU time": ceiling,
        "steps": [],
    }
    console = Console(width=160)
    console.print("GFLOP per second of CPU time: " + ", ".join(f"{n} {v:.0f}" for n, v in ceiling.items()))
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
