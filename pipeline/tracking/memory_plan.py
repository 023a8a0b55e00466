"""Predicted device memory of a stream, used for admission before it is opened.

Two numbers, because they add up differently. The state of a stream stays as long as the stream is open, so
the states of all streams on a device add up. The workspace is what one step needs while it runs; streams that
step one after another share it, and only the largest counts.

The state is a formula: memory is preallocated to its caps. The workspace is found by running the network's
own code on tensors without data (see `pipeline.tracking.shapes`) and counting the bytes alive at the same
time, so that no table of layers has to follow the network's changes; memory's part of it is a formula again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline.base.errors import UsageError
from pipeline.base.setting_fields import MIN_SIZE
from pipeline.tracking.look_ahead import AHEAD
from pipeline.tracking.settings import DTYPES
from pipeline.tracking.shapes import Shapes
from xmem_core import Cutie, CutieConfig, MemoryConfig, XMem
from xmem_core.backbones import fold_batch_norms
from xmem_core.config import AnyModelConfig
from xmem_core.network import aggregate
from xmem_core.weights import build_network

_STRIDE = 16
_FLOAT, _LONG = 4, 8
# Initial allocation of unlimited working memory; it doubles from there.
_FIRST_FRAMES = 16
# Queries per block when memory is searched on a CPU.
_CPU_QUERIES = 128
# Convolutions need scratch memory and reorder their inputs; how much depends on kernel and processor. On a
# CPU, a copy of the widest weights (counted separately) and up to a tenth of the rest was measured.
_SCRATCH = 0.25


def network_grid(height: int, width: int, size: int | None) -> tuple[int, int, int, int]:
    """The size at which the network sees a frame, and that size padded to the network's stride.

    Args:
        height, width: of the frame, pixels.
        size: shorter side that the network sees; None: frames as they are.

    Returns:
        height, width, padded height, padded width.
    """
    seen = (height, width)
    if size is not None and min(seen) > size:
        scale = size / min(seen)
        seen = (max(1, round(height * scale)), max(1, round(width * scale)))
    return (*seen, *(-(-side // _STRIDE) * _STRIDE for side in seen))  # type: ignore[return-value]


def predict_state_bytes(
    model: AnyModelConfig,
    memory: MemoryConfig,
    height: int,
    width: int,
    objects: int,
    size: int | None = None,
    dtype: str = "float32",
    *,
    frames: int | None = None,
    copied: int = 0,
) -> int:
    """Device memory of one stream's `TrackerState` at its largest, in bytes.

    An upper bound of the size of its tensors with all objects present and memory read at its fullest. On a
    GPU the allocator also rounds each tensor up, which adds less than a percent at any useful size.

    Args:
        model: the network's shape.
        memory: memory settings.
        height, width: of the source's frames, pixels.
        objects: number of objects tracked at the same time.
        size: shorter side that the network sees; None: frames as they are.
        dtype: precision of the network; states are float32 in any case.
        frames: length of the video. Needed only for unlimited memory (`max_mid_term_frames=None`).
        copied: number of elements that are copied from other streams' states.

    Raises:
        UsageError: a number is out of range, or memory is unlimited and `frames` is not given.
    """
    _check(height, width, objects, size, dtype)
    if objects == 0:
        return 0
    positions = _positions(height, width, size)
    elements = _capacity(memory, positions, frames) + copied
    # key and selection; shrinkage, use and life; the time is a 64-bit integer.
    own = 2 * model.key_dim * _FLOAT + 3 * _FLOAT + _LONG
    value = model.value_dim * _FLOAT
    # Between two memory frames the prepared keys are cached, with their rows and times.
    prepared = 2 * model.key_dim * _FLOAT + _FLOAT + 2 * _LONG + (2 if dtype == "bfloat16" else 0)
    each = elements * value + model.hidden_dim * positions * _FLOAT
    groups = 1
    if isinstance(model, CutieConfig):
        # Objects that arrive one by one have keys of their own; summaries, now and when last prompted; masks.
        groups = objects
        each += 2 * model.queries * (model.dim + 1) * _FLOAT + positions * _FLOAT
    return groups * elements * (own + prepared) + objects * each


def predict_workspace_bytes(
    model: AnyModelConfig,
    memory: MemoryConfig,
    height: int,
    width: int,
    objects: int,
    size: int | None = None,
    dtype: str = "float32",
    *,
    device: str = "cpu",
    frames: int | None = None,
    copied: int = 0,
) -> int:
    """Device memory that one step takes beside the states and the network's weights, in bytes: its peak.

    An upper estimate with room for the scratch memory of convolutions: above what was measured on a CPU, and
    mostly within half of it. Reduced precision is counted like float32, plus the cast weights.

    Args:
        device: "cpu" or a GPU's name: memory is searched in blocks on a CPU, at once on a GPU.
        Others as for `predict_state_bytes`.

    Raises:
        UsageError: as there.
    """
    _check(height, width, objects, size, dtype)
    if objects == 0:
        return 0
    seen_h, seen_w, padded_h, padded_w = network_grid(height, width, size)
    positions = padded_h * padded_w // _STRIDE**2
    on_cpu = torch.device(device).type == "cpu"
    at_once = _CPU_QUERIES if on_cpu else positions
    network, prepared, weights, widest = _network_peaks(model, padded_h, padded_w, objects)
    elements = _capacity(memory, positions, frames) + copied
    reading = _reading_peak(model, memory, elements, positions, objects, at_once)
    keeping = _keeping_peak(model, memory, positions, objects)
    # A frame as bytes and as floats; then the masks and probabilities of a result at the frame's own size.
    frame = 3 * height * width
    arriving = frame + (frame + 3 * seen_h * seen_w) * _FLOAT + prepared
    planes = (objects + 1) * (height * width + seen_h * seen_w)
    masks = objects * (height * width + padded_h * padded_w)
    leaving = planes * _FLOAT + height * width * (_LONG + _FLOAT)
    if not on_cpu:
        leaving += height * width * (3 * _LONG + 4 * _FLOAT)  # runs of labels are found there
    given = masks + (height * width + 2 * padded_h * padded_w) * _FLOAT
    # Prompted masks, as given and merged with the network's output.
    joined = masks + 2 * objects * padded_h * padded_w * _FLOAT
    stepping = max(network, reading + prepared, keeping + prepared) + frame + joined
    cast = weights // 2 if dtype != "float32" else 0
    peak = max(stepping, arriving, arriving - 3 * height * width * _FLOAT + given, leaving + frame)
    computing = round(peak * (1 + _SCRATCH))
    # On a CPU the first step at a size lays weights out (`FusedConv2d`), from a second copy, which is freed
    # before they are used. Cutie's convolutions are not fused.
    if on_cpu and not isinstance(model, CutieConfig):
        computing = max(computing, peak + widest)
    return computing + widest + cast


def predict_ahead_bytes(
    model: AnyModelConfig, height: int, width: int, size: int | None = None, dtype: str = "float32"
) -> int:
    """Device memory that encoding frames ahead takes, in bytes: added to a stream's state.

    It is that of the encoded frames that wait, and the peak of encoding one, which happens beside the steps
    of other streams. See `pipeline.tracking.look_ahead`. Arguments and errors are those of
    `predict_state_bytes`.
    """
    _check(height, width, 0, size, dtype)
    _, _, padded_h, padded_w = network_grid(height, width, size)
    peak, kept = _encoding_peaks(model, padded_h, padded_w)
    # A frame as bytes and as floats while it is resized.
    arriving = 3 * height * width * (1 + _FLOAT)
    return AHEAD * (3 * height * width + kept) + round((peak - kept + arriving) * (1 + _SCRATCH))


# --- memory --------------------------------------------------------------------------------------


def _positions(height: int, width: int, size: int | None) -> int:
    _, _, padded_h, padded_w = network_grid(height, width, size)
    return padded_h * padded_w // _STRIDE**2


def _working_frames(memory: MemoryConfig, frames: int | None) -> int:
    """Number of frames that working memory is allocated for."""
    if memory.max_mid_term_frames is not None:
        return memory.max_mid_term_frames
    if frames is None:
        raise UsageError(
            "unlimited memory (max_mid_term_frames=None) grows with the length of the video, which is "
            "not known: give a limit"
        )
    needed, allocated = -(-frames // memory.mem_every), _FIRST_FRAMES
    while allocated < needed:
        allocated *= 2
    return allocated


def _capacity(memory: MemoryConfig, positions: int, frames: int | None) -> int:
    """Number of elements that the pool is allocated for."""
    long_term = memory.max_long_term_elements if memory.enable_long_term else 0
    frames_kept = memory.max_permanent_frames - 1 + _working_frames(memory, frames)
    return long_term + frames_kept * positions


def _reading_peak(
    model: AnyModelConfig, memory: MemoryConfig, elements: int, positions: int, objects: int, at_once: int
) -> int:
    """Peak of reading a full memory: prepared keys, one block's scores, each query's selection and result."""
    chosen = min(memory.top_k, elements)
    # The keys in use, doubled and squared; row numbers and times.
    prepared = elements * (3 * model.key_dim * _FLOAT + 4 * _FLOAT + 3 * _LONG)
    queries = at_once * 4 * model.key_dim * _FLOAT
    # A product, its accumulator, and a copy that masks elements older than an object.
    scores = 3 * at_once * elements * _FLOAT
    # Objects that started at different times have separate read weights.
    weights = (2 * objects + 1) * positions * chosen * (_FLOAT + _LONG)
    got = 2 * objects * positions * model.value_dim * _FLOAT
    return prepared + queries + max(scores, got) + weights


def _keeping_peak(model: AnyModelConfig, memory: MemoryConfig, positions: int, objects: int) -> int:
    """Peak of compacting rows and, with long-term memory, of consolidating working memory into prototypes."""
    value = model.value_dim * _FLOAT
    moved = (memory.max_mid_term_frames or 0) * positions * max(value, model.key_dim * _FLOAT)
    flat = 2 * objects * positions * value
    if not memory.enable_long_term:
        return flat + moved
    candidates = (memory.max_mid_term_frames or 0) * positions
    prototypes = min(memory.num_prototypes, candidates)
    scores = 5 * candidates * prototypes * _FLOAT
    keys = 5 * candidates * model.key_dim * _FLOAT
    made = objects * prototypes * value
    long_term = memory.max_long_term_elements * max(value, model.key_dim * _FLOAT)
    return flat + max(scores + keys + made + candidates * 2 * value, moved, long_term)


# --- the network ---------------------------------------------------------------------------------


class _Alive(Shapes):
    """Counts the bytes of the tensors that are created in this mode and alive at the same time.

    Args:
        network: its weights, and views of them, are not counted.
    """

    def __init__(self, network: XMem | Cutie) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self._weights = {t.untyped_storage()._cdata for t in network.state_dict().values()}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._weights:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _without_data(model: AnyModelConfig) -> XMem | Cutie:
    """The network as it is when it tracks, on the meta device."""
    with Shapes(), torch.device("meta"):  # type: ignore[no-untyped-call]
        network = build_network(model).eval().requires_grad_(False)
        if not model.published:
            fold_batch_norms(network)
    return network


@cache
def _network_peaks(model: AnyModelConfig, height: int, width: int, objects: int) -> tuple[int, int, int, int]:
    """Bytes of one network step with all objects present: the peak, the tensors kept across stages (image,
    features, probabilities), the network's weights, and the largest weight tensor.
    """
    network = _without_data(model)
    weights = [p.nbytes for p in network.parameters()]
    with torch.no_grad(), _Alive(network) as alive:
        image = _empty(1, 3, height, width)
        step = _cutie_step if isinstance(network, Cutie) else _xmem_step
        kept = step(network, image, objects, alive)  # type: ignore[arg-type]
    return alive.peak, kept, sum(weights), max(weights)


@cache
def _encoding_peaks(model: AnyModelConfig, height: int, width: int) -> tuple[int, int]:
    """Bytes of encoding a frame: the peak, and the network's input and features that are kept."""
    network = _without_data(model)
    with torch.no_grad(), _Alive(network) as alive:
        image = _empty(1, 3, height, width)
        keys = network.encode_key(image)
        kept = alive.bytes
        del keys
    return alive.peak, kept


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _xmem_step(network: XMem, image: Tensor, objects: int, alive: _Alive) -> int:
    """One step on the meta device; the bytes that are kept across its stages."""
    model = network.config
    keys = network.encode_key(image)
    grid = keys.key.shape[2:]
    read = _empty(1, objects, model.value_dim, *grid)
    hidden = _empty(1, objects, model.hidden_dim, *grid) if model.hidden_dim else None
    hidden, logits = network.decode(keys.scales, read, hidden)
    final = F.softmax(aggregate(torch.sigmoid(logits)), 1)[0]
    del logits, read
    kept = alive.bytes
    network.encode_value(image, keys.f16, hidden, final[1:].unsqueeze(0))
    return kept


def _cutie_step(network: Cutie, image: Tensor, objects: int, alive: _Alive) -> int:
    """One step on the meta device, all objects in one group; the bytes that are kept across its stages."""
    model = network.config
    keys = network.encode_key(image)
    grid = keys.key.shape[2:]
    hidden = _empty(1, objects, model.hidden_dim, *grid)
    summaries = _empty(1, objects, model.queries, model.dim + 1)
    masks = _empty(1, objects, *grid)
    read = _empty(1, objects, model.value_dim, *grid)
    read = network.read_objects(keys.p16, read, hidden, masks, summaries)
    hidden, logits = network.decode(keys.s8, keys.s4, read, hidden)
    joint = aggregate(torch.sigmoid(logits))
    final = F.softmax(F.interpolate(joint, scale_factor=4, mode="bilinear", align_corners=False), 1)[0]
    del logits, joint, read
    kept = alive.bytes
    network.encode_value(image, keys.p16, hidden, final[1:].unsqueeze(0))
    return kept


def _check(height: int, width: int, objects: int, size: int | None, dtype: str) -> None:
    for name, value, least in (("height", height, 1), ("width", width, 1), ("objects", objects, 0)):
        if value < least:
            raise UsageError(f"{name}={value} is not allowed: at least {least}")
    if size is not None and size < MIN_SIZE:
        raise UsageError(f"size={size} is not allowed: at least {MIN_SIZE} pixels, or None")
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not allowed: choose one of {', '.join(DTYPES)}")


def device_bytes(device: torch.device) -> int:
    """Memory of a device, in bytes; of this machine or its container for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total
