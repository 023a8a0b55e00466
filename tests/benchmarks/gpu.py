"""What `xmem_core` does on a GPU, in one command of less than four minutes: goldens first, then speed.

    python tests/benchmarks/gpu.py --out gpu.jsonl

A machine with torch, numpy and safetensors is enough; neither Ray nor a network is used. Each measurement is
a line of JSON in the output file, written as soon as it is done. Called again with the same file, it measures
only what is missing. Failures are lines too, and are tried again.

`--device cpu --quick` tries all of it in small on a CPU. The networks of the published architecture have the
random weights of the goldens.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import xmem_core  # noqa: E402, F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from golden.weights import fill  # noqa: E402
from support.moving_discs import clip, fill_memory, mean_iou  # noqa: E402
from support.step_flops import gflop  # noqa: E402
from torch import Tensor  # noqa: E402

from xmem_core import (  # noqa: E402
    MemoryConfig,
    ModelConfig,
    Prompt,
    StepResult,
    TrackerState,
    VideoSegmenter,
    XMem,
    load_model,
)

GOLDEN = ROOT / "tests" / "golden"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STREAMS = 8


class OutOfTimeError(Exception):
    """The budget is used up."""


@dataclass
class Bench:
    """Where and how much is measured.

    Args:
        device: device of the networks.
        quick: tiny sizes, to try the program itself.
        deadline: time of `time.monotonic` at which no measurement begins, and loops end.
    """

    device: torch.device
    quick: bool
    deadline: float

    @property
    def frame(self) -> tuple[int, int]:
        """(height, width) of the published network's frames."""
        return (64, 112) if self.quick else (480, 854)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check(self, needed: float = 0) -> None:
        """Raise OutOfTimeError unless so many seconds are left."""
        if time.monotonic() + needed > self.deadline:
            raise OutOfTimeError

    def seconds(self, function: Callable[[], object]) -> float:
        """Seconds of a call, until the device has done all of it."""
        self.sync()
        started = time.perf_counter()
        function()
        self.sync()
        return time.perf_counter() - started

    def cost(self, function: Callable[[], object]) -> float:
        """Seconds of a call; on a CPU those of its threads, which other processes disturb less."""
        if self.device.type == "cuda":
            return self.seconds(function)
        started = time.process_time()
        function()
        return time.process_time() - started

    def memory_mb(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None


@cache
def published(device: torch.device, hidden: int = 64) -> XMem:
    """The published architecture with the goldens' weights."""
    model = XMem(ModelConfig(hidden_dim=hidden)).eval()
    model.load_state_dict(fill(model.state_dict()))
    return model.to(device)


@cache
def lite(device: torch.device) -> XMem:
    """The bundled model."""
    model = load_model("xmem-lite", device)
    assert isinstance(model, XMem)
    return model


class Stream:
    """A stream over a clip there and back, its frames on the device.

    Args:
        shift: number of frames by which the clip is turned, so that streams differ.
    """

    def __init__(self, bench: Bench, segmenter: VideoSegmenter, objects: int, shift: int = 0) -> None:
        images, self.prompt = _frames(bench, objects)
        self.images = images[shift:] + images[:shift]
        self.segmenter, self.state, self.t = segmenter, segmenter.new_state(), 0

    def input(self) -> tuple[TrackerState, Tensor, Prompt | None]:
        step = self.state, self.images[self.t % len(self.images)], None if self.t else self.prompt
        self.t += 1
        return step

    def step(self) -> StepResult:
        return self.segmenter.step(*self.input())


def _frames(bench: Bench, objects: int) -> tuple[list[Tensor], Prompt]:
    frames, prompt = clip(4 if bench.quick else 16, objects, *bench.frame)
    images = [torch.as_tensor(frame).to(bench.device) for frame in frames]
    return images + images[::-1], prompt


def _planes(result: StepResult) -> None:
    """Bring labels and probabilities of all pixels to the host, and presence: more than rows need."""
    result.label_map.cpu()
    result.label_probabilities.cpu()
    if result.presence is not None:
        result.presence.cpu()


def _runs(result: StepResult) -> None:
    """Bring what rows need to the host."""
    if result.runs is None:  # on a CPU
        _planes(result)


# --- measurements -------------------------------------------------------------------------------------


def golden(bench: Bench, case: str, dtype: str) -> dict[str, Any]:
    """Differences from the authors' results on the goldens' frames, as `tests/xmem_core/test_golden.py`."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        wanted = {name: file[name] for name in file.files}
    options = json.loads(str(wanted["config"]))
    names = {field.name for field in fields(MemoryConfig)}
    settings = MemoryConfig(**{name: value for name, value in options.items() if name in names})
    network = published(bench.device, options["hidden_dim"])
    segmenter = VideoSegmenter(network, settings, dtype=DTYPES[dtype])
    state = segmenter.new_state()
    given, shown = wanted["given_t"].tolist(), wanted["prob_t"].tolist()
    differences, labels, sizes = [], [], []
    frames = wanted["frames"][: 3 if bench.quick else None]
    for t, frame in enumerate(frames):
        prompt = None
        if t in given:
            mask = wanted[f"given_mask_{t}"]
            prompt = Prompt({int(i): mask == i for i in wanted[f"given_labels_{t}"]})
        result = segmenter.step(state, frame, prompt)
        labels.append(float((result.label_map.cpu().numpy() != wanted["labels"][t]).mean()))
        if t in shown:
            planes = wanted["prob"][shown.index(t)]
            planes = planes[planes[:, 0, 0] >= 0]
            differences.append(np.abs(result.probabilities.float().cpu().numpy() - planes).ravel())
        assert state.memory is not None
        sizes.append(list(state.memory.sizes))
    found = np.concatenate(differences)
    return {
        "mean": float(found.mean()),
        "0.9999 quantile": float(np.quantile(found, 0.9999)),
        "largest": float(found.max()),
        "labels that differ": statistics.mean(labels),
        "memory sizes as published": sizes == wanted["sizes"].tolist()[: len(frames)],
    }


def ceiling(bench: Bench, dtype: str) -> dict[str, Any]:
    """TFLOP/s of 3x3 convolutions with the network's widths, and of a matrix product."""
    shapes = ((32, 32, 8, 8),) if bench.quick else ((256, 256, 120, 214), (512, 512, 60, 107))
    size, repeats = (128, 2) if bench.quick else (4096, 20)
    nhwc, kind, rates = torch.channels_last, DTYPES[dtype], []

    def rate(function: Callable[[], object], flop: float) -> float:
        def many() -> None:
            for _ in range(repeats):
                function()

        many()
        return flop * repeats / min(bench.seconds(many) for _ in range(3)) / 1e12

    for inputs, outputs, height, width in shapes:
        x = torch.randn(1, inputs, height, width, device=bench.device, dtype=kind)
        x = x.contiguous(memory_format=nhwc)
        weight = torch.randn(outputs, inputs, 3, 3, device=bench.device, dtype=kind)
        weight = weight.contiguous(memory_format=nhwc)
        flop = 18.0 * inputs * outputs * height * width
        rates.append(rate(partial(F.conv2d, x, weight, None, 1, 1), flop))
    square = torch.randn(size, size, device=bench.device, dtype=kind)
    product = rate(partial(torch.matmul, square, square), 2.0 * size**3)
    return {"convolution TFLOP/s": max(rates), "matrix product TFLOP/s": product}


def speed(bench: Bench, model: str, dtype: str, objects: int) -> dict[str, Any]:
    """Milliseconds a frame with new and with full long-term memory: free-running, and with the runs of labels
    that rows need; with new memory also with runs of the frame before, as files are tracked, and with planes.
    """
    network, size = (published(bench.device), None) if model == "published" else (lite(bench.device), 384)
    segmenter = VideoSegmenter(network, size=size, dtype=DTYPES[dtype])
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    stream = Stream(bench, segmenter, objects)
    per, found = (5 if bench.quick else 25), {}

    def run(fetch: Callable[[StepResult], None] | None, late: bool = False) -> None:
        before: StepResult | None = None
        for _ in range(per):
            result = stream.step()
            if late:
                result.begin_runs()
            wanted = before if late else result
            if fetch is not None and wanted is not None:
                fetch(wanted)
            before = result

    ways: dict[str, tuple[Callable[[StepResult], None] | None, bool]] = {
        "free": (None, False),
        "runs": (_runs, False),
        "runs of the frame before": (_runs, True),
        "planes": (_planes, False),
    }

    for memory in ("new", "full"):
        if memory == "full":
            fill_memory(stream.state)
        run(_runs)  # the device warms up
        asked = ways if memory == "new" else {name: ways[name] for name in ("free", "runs")}
        spent: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(1 if bench.quick else 3):  # in turns
            for name, way in asked.items():
                bench.check()
                spent[name].append(bench.seconds(partial(run, *way)) / per)
        for name, rounds in spent.items():
            found[f"ms, {memory} memory, {name}"] = 1e3 * statistics.median(rounds)
    free = {memory: found[f"ms, {memory} memory, free"] for memory in ("new", "full")}
    found |= {"frames/s": 1e3 / free["new"], "full over new": free["full"] / free["new"]}
    assert stream.state.memory is not None
    elements = sum(stream.state.memory.sizes)
    scale = 1.0 if size is None else min(1.0, size / min(bench.frame))
    height, width = (-(-round(side * scale) // 16) * 16 for side in bench.frame)
    work = gflop(network, False, objects, height, width, elements)
    found |= {"GFLOP": work, "TFLOP/s": work / found["ms, full memory, free"]}
    return found | {"elements": elements, "peak MB": bench.memory_mb()}


def streams(bench: Bench, model: str, dtype: str, objects: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """Streams by `step_many` against one after another, in turns, with rows; and whether masks agree.

    Args:
        objects: numbers of objects of the streams, in turn.
    """
    network, size = (published(bench.device), None) if model == "published" else (lite(bench.device), 384)
    segmenter = VideoSegmenter(network, size=size, dtype=DTYPES[dtype], batch_streams=True)
    count = 2 if bench.quick else STREAMS
    alone, together = (
        [Stream(bench, segmenter, objects[shift % len(objects)], shift) for shift in range(count)]
        for _ in range(2)
    )
    per, agree = (2 if bench.quick else 10), []

    def one_by_one() -> list[StepResult]:
        for _ in range(per):
            results = []
            for stream in alone:
                results.append(stream.step())
                _runs(results[-1])
        return results

    def at_once() -> list[StepResult]:
        for _ in range(per):
            results = segmenter.step_many([stream.input() for stream in together])
            for result in results:
                result.begin_runs()
            for result in results:
                _runs(result)
        return results

    one_by_one(), at_once()
    spent: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(1 if bench.quick else 3):
        bench.check()
        results: list[list[StepResult]] = []
        spent["alone"].append(bench.seconds(lambda r=results: r.append(one_by_one())))  # type: ignore[misc]
        spent["together"].append(bench.seconds(lambda r=results: r.append(at_once())))  # type: ignore[misc]
        agree += [float((a.label_map == b.label_map).float().mean()) for a, b in zip(*results, strict=True)]
    rates = {name: count * per / statistics.median(own) for name, own in spent.items()}
    return {
        "streams": count,
        "objects": [objects[k % len(objects)] for k in range(count)],
        "frames/s one after another": rates["alone"],
        "frames/s together": rates["together"],
        "ratio": rates["together"] / rates["alone"],
        "equal labels": min(agree),
    }


def precision(bench: Bench, dtype: str) -> dict[str, Any]:
    """Mean IoU of the bundled model's masks with those in float32, on the made-up clip."""
    count = 6 if bench.quick else 60
    # In 96 x 128, discs of 170 pixels differ in IoU by 0.02 when 8 pixels of their outlines do.
    height, width = (240, 320) if bench.quick else (480, 640)
    frames, prompt = clip(count, 3, height, width)
    labels = {}
    for name in ("float32", dtype):
        segmenter = VideoSegmenter(lite(bench.device), size=None if bench.quick else 384, dtype=DTYPES[name])
        state = segmenter.new_state()
        labels[name] = [
            segmenter.step(state, frame, None if t else prompt).label_map.cpu().numpy()
            for t, frame in enumerate(frames)
        ]
    agree = [mean_iou(a, b, 3) for a, b in zip(labels["float32"], labels[dtype], strict=True)]
    return {"mean IoU with float32": statistics.mean(agree), "least": min(agree), "frames": count}


def compiled(bench: Bench, model: str, dtype: str, objects: int) -> dict[str, Any]:
    """Milliseconds of each part and of a step, as it is and compiled, in turns; and what compiling takes.

    On a CPU milliseconds of CPU time, and whole frames are searched either way.
    """
    network, size = (published(bench.device), None) if model == "published" else (lite(bench.device), 384)
    settings = MemoryConfig(search_window=0)
    ways = {
        name: VideoSegmenter(network, settings, size=size, dtype=DTYPES[dtype], compile=name == "compiled")
        for name in ("eager", "compiled")
    }
    if not ways["compiled"].compiled:
        return {"skipped": "torch.compile does not work here, see the warning"}
    found: dict[str, Any] = {}
    repeats, rounds = (2, 2) if bench.quick else (4, 3) if bench.device.type == "cpu" else (50, 3)

    def compare(name: str, calls: Mapping[str, Callable[[], object]], each: int) -> None:
        results = {}
        for way, call in calls.items():
            # Compiling cannot be interrupted, and the long video needs a minute after it.
            bench.check(0 if bench.quick else 100)
            seconds = bench.seconds(lambda c=call, w=way: results.update({w: c()}))  # type: ignore[misc]
            if way == "compiled":
                found[f"s to compile, {name}"] = seconds
        gc.collect()  # what compiling left, so that it is not collected during a measurement
        spent: dict[str, list[float]] = {way: [] for way in calls}
        for _ in range(rounds):
            for way, call in calls.items():
                call()
                spent[way].append(bench.cost(lambda c=call: [c() for _ in range(each)]) / each)  # type: ignore[misc]
        for way, seconds_each in spent.items():
            found[f"ms, {name}, {way}"] = 1e3 * statistics.median(seconds_each)
        found[f"ratio, {name}"] = found[f"ms, {name}, eager"] / found[f"ms, {name}, compiled"]
        pairs = zip(_tensors(results["eager"]), _tensors(results["compiled"]), strict=True)
        found[f"largest difference, {name}"] = max(float((a - b).abs().max()) for a, b in pairs)

    with torch.no_grad():
        inputs = _inputs(bench, ways["eager"], objects)
        for part, (given, flags) in inputs.items():
            calls = {way: partial(_called, ways[way], part, given, flags) for way in ways}
            compare(part, calls, repeats)
    streams = {way: Stream(bench, segmenter, objects) for way, segmenter in ways.items()}

    def steps(stream: Stream, count: int) -> Tensor:
        for _ in range(count):
            result = stream.step()
        return result.network_probabilities

    # One part a memory frame, four parts ordinary ones.
    calls = {way: partial(steps, stream, 5) for way, stream in streams.items()}
    compare("five steps", calls, 1 if bench.device.type == "cpu" else 5)
    return found


def _called(segmenter: VideoSegmenter, part: str, given: tuple[Any, ...], flags: dict[str, bool]) -> Any:
    with segmenter._steps.autocast():
        return getattr(segmenter._network, part)(*given, **flags)


def _inputs(
    bench: Bench, segmenter: VideoSegmenter, objects: int
) -> dict[str, tuple[tuple[Any, ...], dict[str, bool]]]:
    """Arguments and flags of each part of the network, for the first frame of the clip."""
    images, _ = _frames(bench, objects)
    image = segmenter.encode(images[0]).image
    keys = _called(segmenter, "encode_key", (image,), {})
    config, (h, w), (height, width) = segmenter.config, keys.key.shape[2:], image.shape[2:]
    rng = torch.Generator().manual_seed(0)
    read = torch.randn(1, objects, config.value_dim, h, w, generator=rng).to(bench.device)
    hidden = torch.randn(1, objects, config.hidden_dim, h, w, generator=rng).to(bench.device)
    masks = torch.rand(1, objects, height, width, generator=rng).to(bench.device) / objects
    return {
        "encode_key": ((image,), {}),
        "decode": ((keys.scales, read, hidden), {"update_hidden": True}),
        "encode_value": ((image, keys.f16, hidden, masks), {"deep_update": True}),
    }


def _tensors(found: Any) -> list[Tensor]:
    """The tensors in what a part returns."""
    if isinstance(found, Tensor):
        return [found.float()]
    parts = (
        found if isinstance(found, tuple) else (found.key, found.shrinkage, found.selection, *found.scales)
    )
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]


def state_bytes(bench: Bench, dtype: str) -> dict[str, Any]:
    """Seconds to serialise a full state of one object and to restore it, and its size."""
    segmenter = VideoSegmenter(published(bench.device), dtype=DTYPES[dtype])
    stream = Stream(bench, segmenter, 1)
    for _ in range(6):
        stream.step()
    fill_memory(stream.state)
    blobs: list[bytes] = []
    saving = bench.seconds(lambda: blobs.append(stream.state.to_bytes()))
    restored: list[TrackerState] = []
    loading = bench.seconds(lambda: restored.append(TrackerState.from_bytes(blobs[0], bench.device)))
    return {
        "s to bytes": saving,
        "s from bytes": loading,
        "s together": saving + loading,
        "MB": len(blobs[0]) / 1e6,
        "equal": restored[0].to_bytes() == blobs[0],
    }


def long_video(bench: Bench, model: str, dtype: str) -> dict[str, Any]:
    """Milliseconds a frame around frame 2,500 and around frame 10,000, or the last that there is time for."""
    network, size = (published(bench.device), None) if model == "published" else (lite(bench.device), 384)
    segmenter = VideoSegmenter(network, size=size, dtype=DTYPES[dtype])
    stream = Stream(bench, segmenter, 1)
    last, span = (20, 5) if bench.quick else (10_000, 250)
    early, found, seconds = last // 4, {}, 0.0

    def run() -> None:
        for _ in range(span):
            stream.step()

    while stream.t < last:
        try:
            bench.check()
        except OutOfTimeError:
            break
        seconds = bench.seconds(run)
        if stream.t == early:
            found["ms at a quarter"] = 1e3 * seconds / span
    if "ms at a quarter" not in found:
        raise OutOfTimeError
    found |= {"ms at the end": 1e3 * seconds / span, "last frame": stream.t}
    return found | {"end over quarter": found["ms at the end"] / found["ms at a quarter"]}


def measurements(quick: bool) -> Iterator[tuple[str, Callable[[Bench], dict[str, Any]]]]:
    """Names and functions of all measurements, in the order in which they are made."""
    cases = sorted(path.stem for path in GOLDEN.glob("*.npz"))
    for dtype in ("float32",) if quick else DTYPES:
        for case in ["late_object"] if quick else cases:
            yield f"golden {case}, {dtype}", partial(golden, case=case, dtype=dtype)
    half = ("bfloat16",) if quick else ("float16", "bfloat16")
    for dtype in (*half, "float32"):
        yield f"ceiling, {dtype}", partial(ceiling, dtype=dtype)
    for objects in (1,) if quick else (1, 3, 10):
        for dtype in (*half[:1], "float32"):
            run = partial(speed, model="published", dtype=dtype, objects=objects)
            yield f"published, {objects} objects, {dtype}", run
    yield f"published, {STREAMS} streams, {half[0]}", partial(streams, model="published", dtype=half[0])
    yield f"xmem-lite, {STREAMS} streams, {half[0]}", partial(streams, model="xmem-lite", dtype=half[0])
    mixed = partial(streams, model="published", dtype=half[0], objects=(1, 3, 2))
    yield f"published, {STREAMS} streams of 1 to 3 objects, {half[0]}", mixed
    for dtype in half:
        yield f"xmem-lite against float32, {dtype}", partial(precision, dtype=dtype)
    yield f"state of one object, {half[0]}", partial(state_bytes, dtype=half[0])
    for objects in (1,) if quick else (1, 3):
        run = partial(speed, model="xmem-lite", dtype=half[0], objects=objects)
        yield f"xmem-lite, {objects} objects, {half[0]}", run
    for model, objects in (("xmem-lite", 1),) if quick else (("published", 1), ("xmem-lite", 3)):
        run = partial(compiled, model=model, dtype="float32" if quick else half[0], objects=objects)
        yield f"compiled, {model}, {objects} objects", run
    yield f"long video, xmem-lite, {half[0]}", partial(long_video, model="xmem-lite", dtype=half[0])


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Measure what the output file lacks; exit code 0 if it then has everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--budget", type=float, default=225, help="seconds for everything (default: 225)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.jsonl")
    options = parser.parse_args()
    device = torch.device(options.device)
    bench = Bench(device, options.quick, time.monotonic() + options.budget)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"device": machine, "torch": torch.__version__, "quick": options.quick}
    done = set()
    if options.out.exists():
        for line in options.out.read_text().splitlines():
            entry = json.loads(line)
            if "failed" not in entry and about.items() <= entry.items():
                done.add(entry["name"])
    missing = 0
    for name, measure in measurements(options.quick):
        if name in done:
            continue
        started, found = time.monotonic(), dict[str, Any]()
        try:
            bench.check()
            found = measure(bench)
        except OutOfTimeError:
            missing += 1
            say(f"{name}: no time left")
            continue
        except Exception:
            missing += 1
            found = {"failed": traceback.format_exc()}
        took = round(time.monotonic() - started, 2)
        say(f"{name} ({took} s): {json.dumps(found)}")
        with options.out.open("a") as file:
            file.write(json.dumps({"name": name, **about, "took": took, **found}) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
