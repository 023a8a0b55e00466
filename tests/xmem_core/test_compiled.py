"""Compiled networks: one function per shape, results that nothing overwrites, none where it is impossible."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.small_net import MODELS, SMALL, SMALL_MEMORY, frame_at, small_model, square
from torch import Tensor

from xmem_core import MemoryConfig, Prompt, TrackerState, VideoSegmenter, compiled
from xmem_core.compiled import MOST_OBJECTS, CompiledPart, compile_options, compile_parts
from xmem_core.fused import FusedConv2d
from xmem_core.winograd import WinogradConv2d

pytestmark = pytest.mark.usefixtures("one_thread")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler, and here is none"
)
CPU = torch.device("cpu")
FRAMES = 9
Run = Callable[..., Sequence[Tensor]]


class Backend:
    """Compiles nothing, and writes all results of a function into the same memory, as CUDA graphs do."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Run]] = []

    def __call__(self, graph: Callable[..., Sequence[Tensor]], _: object) -> Run:
        kept: list[Tensor] = []

        def run(*given: Tensor) -> Sequence[Tensor]:
            found = graph(*given)
            if not kept:
                kept.extend(tensor.clone() for tensor in found)
            for place, tensor in zip(kept, found, strict=True):
                place.copy_(tensor)
            return tuple(kept)

        self.made.append(weakref.ref(run))
        return run


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    made = Backend()
    use(monkeypatch, made)
    return made


def use(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    monkeypatch.setattr(compiled, "compile_options", lambda device: {"backend": backend})


def segmenter_of(kind: str = "xmem", **options: Any) -> VideoSegmenter:
    return VideoSegmenter(MODELS[kind](), SMALL_MEMORY, **{"compile": True, **options})


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings; torch's own loggers say a lot below that."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def prompt_at(t: int) -> Prompt | None:
    """Two objects, the second from frame 3 on."""
    given = {0: {1: square(48, 64, 0, 4, 14)}, 3: {2: square(48, 64, 8, 21, 12)}}
    return Prompt(given[t]) if t in given else None


def tracked(segmenter: VideoSegmenter, state: TrackerState, times: range = range(FRAMES)) -> list[Tensor]:
    """Probabilities of every frame. As files are tracked, the next frame is encoded before a frame's step."""
    found, encoded = [], segmenter.encode(frame_at(times[0]))
    for t in times:
        now, encoded = encoded, segmenter.encode(frame_at(t + 1))
        # A copy, as something else may write into it.
        found.append(segmenter.step(state, now, prompt_at(t)).probabilities.clone())
    return found


def masks(segmenter: VideoSegmenter) -> list[Tensor]:
    return tracked(segmenter, segmenter.new_state())


@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_right_and_nothing_that_is_kept_is_overwritten(
    kind: str, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = masks(segmenter_of(kind))
    assert said(caplog) == []  # each part was compiled as a whole
    assert len(backend.made) > 4
    for probabilities, own in zip(found, masks(segmenter_of(kind, compile=False)), strict=True):
        assert (probabilities - own).abs().max() < 1e-4
    # The backend computes with torch's own operators: no bit may differ from a run that keeps its results.
    use(monkeypatch, "eager")
    wanted = masks(segmenter_of(kind))
    assert all(map(torch.equal, found, wanted))
    use(monkeypatch, backend)
    monkeypatch.setattr(compiled, "_copied", lambda x: x)
    assert not all(map(torch.equal, masks(segmenter_of(kind)), wanted))  # so the test would show it


def test_each_part_is_compiled_once_for_each_shape(backend: Backend) -> None:
    segmenter = segmenter_of()
    assert len(backend.made) == 1  # a trial
    state = segmenter.new_state()
    tracked(segmenter, state, range(3))
    # The key encoder, the value encoder, and the decoder with and without an update of sensory memory.
    assert len(backend.made) == 1 + 4
    tracked(segmenter, state, range(3, FRAMES))
    # Of two objects; on frame 3, a memory frame, only the first one is decoded.
    assert len(backend.made) == 1 + 4 + 3
    masks(segmenter)
    tracked(segmenter, segmenter.new_state(), range(3))
    assert len(backend.made) == 1 + 4 + 3
    segmenter.step(segmenter.new_state(), frame_at(0, 64, 64), Prompt({1: square(64, 64, 0, 4, 14)}))
    assert len(backend.made) == 1 + 4 + 3 + 2


def part(backend: Backend, messages: list[str], function: Callable[..., Any] | None = None) -> CompiledPart:
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    def warn(message: str, *values: object) -> None:
        messages.append(message % values)

    return CompiledPart("encode_key", function or twice, {"backend": backend}, warn)


def test_more_shapes_than_torch_allows_a_function(backend: Backend) -> None:
    messages: list[str] = []
    double = part(backend, messages)
    for size in range(1, 21):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert len(backend.made) == 20  # recompile_limit is 8
    assert messages == []


def test_the_shape_not_used_for_the_longest_time_makes_room(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 2)
    messages: list[str] = []
    double = part(backend, messages)
    for size in (1, 2, 1):
        double(torch.ones(size))
    assert (len(backend.made), messages) == (2, [])
    double(torch.ones(3))  # in place of 2
    double(torch.ones(1))
    assert len(backend.made) == 3
    assert "compiled for 2 shapes" in messages[0]
    assert "--no-compile" in messages[0]
    gc.collect()
    assert [made() is None for made in backend.made] == [False, True, False]  # its memory is free
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert len(backend.made) == 4


def test_the_layout_is_part_of_the_shape(backend: Backend) -> None:
    double = part(backend, [])
    x = torch.rand(2, 3, 4, 5)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        found = double(given)
        assert torch.equal(found, 2 * x)
        assert found.stride() == given.stride()
    assert len(backend.made) == 2


def test_many_objects_and_streams_with_different_numbers_are_not_compiled(backend: Backend) -> None:
    network = small_model()
    network.requires_grad_(False)
    assert compile_parts(network, CPU)
    keys = network.encode_key(torch.rand(2, 3, 48, 64))
    before = len(backend.made)
    config = network.config
    for objects, ragged in ((MOST_OBJECTS + 1, None), (1, [1, 2])):
        rows = (2, objects) if ragged is None else (sum(ragged), 1)
        read = torch.rand(*rows, config.value_dim, 3, 4)
        hidden = torch.rand(*rows, config.hidden_dim, 3, 4)
        flags: dict[str, Any] = {} if ragged is None else {"counts": ragged}
        with torch.no_grad():
            renewed, logits = network.decode(keys.scales, read, hidden, **flags)
            value, _ = network.encode_value(
                torch.rand(2, 3, 48, 64), keys.f16, hidden, torch.rand(*rows, 48, 64), **flags
            )
        assert renewed is not None
        assert (logits.shape[:2], value.shape[:2], renewed.shape[:2]) == (rows, rows, rows)
    assert len(backend.made) == before


def test_where_nothing_can_be_compiled_it_says_so_once_and_tracks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fails(graph: object, given: object) -> Run:
        tried.append(graph)
        raise RuntimeError("no working C++ compiler\nand a page of advice")

    use(monkeypatch, fails)
    segmenter = segmenter_of()
    (message,) = said(caplog)
    assert "no working C++ compiler" in message
    assert "a page of advice" not in message
    assert "g++" in message
    assert not segmenter.compiled
    wanted = masks(segmenter_of(compile=False))
    for found, own in zip(masks(segmenter), wanted, strict=True):
        assert (found - own).abs().max() < 1e-4
    assert (len(tried), len(said(caplog))) == (1, 1)


def test_a_shape_that_cannot_be_compiled_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, failed = Backend(), []

    def fails_for_decoders(graph: torch.fx.GraphModule, given: object) -> Run:
        if "interpolate" in graph.code:
            failed.append(graph)
            raise RuntimeError("this operation is not supported")
        return made(graph, given)

    use(monkeypatch, fails_for_decoders)
    segmenter = segmenter_of()
    found = masks(segmenter)
    (message,) = said(caplog)
    assert "decode runs without being compiled" in message
    assert "not supported" in message
    assert segmenter.compiled
    assert len(failed) == 4  # one for each shape, not one for each frame
    assert len(made.made) == 1 + 1 + 2
    for probabilities, wanted in zip(found, masks(segmenter_of(compile=False)), strict=True):
        assert (probabilities - wanted).abs().max() < 1e-4


def test_want_of_memory_is_no_failure_of_compiling(backend: Backend) -> None:
    def full(x: Tensor) -> Tensor:
        return 2 * x

    messages: list[str] = []
    double = part(backend, messages, full)
    double(torch.ones(1))
    known = double._known

    def out_of_memory(*given: object) -> object:
        raise torch.OutOfMemoryError("no memory")

    (shape,) = known
    works, known[shape] = known[shape], out_of_memory
    with pytest.raises(torch.OutOfMemoryError):  # so that batches are divided
        double(torch.ones(1))
    known[shape] = works
    double(torch.ones(1))
    assert (len(backend.made), messages) == (1, [])


def test_the_special_paths_of_a_cpu_are_left_out(backend: Backend) -> None:
    special = (FusedConv2d, WinogradConv2d)
    assert not any(isinstance(m, special) for m in segmenter_of()._network.modules())
    plain = segmenter_of(compile=False)
    assert any(isinstance(m, special) for m in plain._network.modules())


def test_whole_frames_are_searched(backend: Backend) -> None:
    config = replace(SMALL, default_search_window=64)
    small_model()  # it has the same network, so weights are shared
    model = small_model(config)
    assert VideoSegmenter(model, SMALL_MEMORY).memory_config.search_window == 64
    assert VideoSegmenter(model, SMALL_MEMORY, compile=True).memory_config.search_window == 0
    with pytest.raises(ValueError, match=r"search_window=96 is not allowed with compile"):
        VideoSegmenter(model, MemoryConfig(search_window=96), compile=True)
    assert segmenter_of("cutie").memory_config.search_window is None


def test_a_gpu_gets_cuda_graphs() -> None:
    assert compile_options(torch.device("cuda")) == {"mode": "reduce-overhead"}
    assert compile_options(CPU) == {}


@pytest.mark.soak  # Inductor and the C++ compiler take half a minute of CPU time
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
def test_by_inductor_masks_hold_and_a_restart_gives_the_same_bits(caplog: pytest.LogCaptureFixture) -> None:
    first, times = segmenter_of(), range(3)
    assert first.compiled
    found = tracked(first, first.new_state(), times)
    whole = segmenter_of(compile=False)
    for probabilities, wanted in zip(found, tracked(whole, whole.new_state(), times), strict=True):
        assert (probabilities - wanted).abs().max() < 1e-4
    state = first.new_state()
    tracked(first, state, times[:1])
    # As in a new process: other code objects, and a state that was bytes.
    second, restored = segmenter_of(), TrackerState.from_bytes(state.to_bytes(), "cpu")
    assert all(map(torch.equal, tracked(second, restored, times[1:]), found[1:]))
    assert said(caplog) == []
