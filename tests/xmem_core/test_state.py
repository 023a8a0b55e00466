"""Serialised tracker states: complete at any frame, and never silently damaged."""

from __future__ import annotations

import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_net import MODELS, SMALL_MEMORY, frame_at, square

from xmem_core import MemoryConfig, PoisonedStateError, Prompt, TrackerState, VideoSegmenter, load_model
from xmem_core import state as state_module

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 32, 48
IDS = (1, 2, 2**31 - 1)

EVENTS = st.one_of(
    st.just(("", frozenset[int]())),
    st.tuples(st.just("prompt"), st.frozensets(st.sampled_from(IDS), min_size=1, max_size=2)),
    st.tuples(st.just("remove"), st.frozensets(st.sampled_from(IDS), min_size=1)),
)


@pytest.fixture(scope="module", params=MODELS)
def segmenter(request: pytest.FixtureRequest) -> VideoSegmenter:
    return VideoSegmenter(MODELS[request.param](), SMALL_MEMORY)


def prompt_for(ids: frozenset[int], frame: int) -> Prompt:
    return Prompt(
        {i: square(HEIGHT, WIDTH, (5 * k + frame) % 20, 15 * k, 10) for k, i in enumerate(sorted(ids))}
    )


def play(
    segmenter: VideoSegmenter, script: list[tuple[str, frozenset[int]]], *, through_bytes: bool
) -> list[tuple[bytes, bytes]]:
    """Label map and probabilities of every frame, as bytes."""
    state = segmenter.new_state()
    seen = []
    for t, (event, ids) in enumerate(script):
        if through_bytes:
            state = TrackerState.from_bytes(state.to_bytes())
        prompt = None
        if event == "prompt":
            prompt = prompt_for(ids, t)
        elif event == "remove":
            state.remove_objects(sorted(ids & set(state.object_ids)))
        result = segmenter.step(state, frame_at(t, HEIGHT, WIDTH), prompt)
        seen.append((result.label_map.numpy().tobytes(), result.probabilities.numpy().tobytes()))
    return seen


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EVENTS, min_size=8, max_size=24), st.integers(0, 4))
def test_a_state_that_went_through_bytes_before_every_frame_gives_the_same_bytes(
    segmenter: VideoSegmenter, script: list[tuple[str, frozenset[int]]], start: int
) -> None:
    script = [("", frozenset())] * start + [("prompt", frozenset({1})), *script]
    assert play(segmenter, script, through_bytes=True) == play(segmenter, script, through_bytes=False)


def tracked(segmenter: VideoSegmenter, frames: int) -> TrackerState:
    """A state after some frames with two objects and some consolidations."""
    state = segmenter.new_state()
    for t in range(frames):
        ids = {0: frozenset({1}), 3: frozenset({7})}.get(t)
        prompt = None if ids is None else prompt_for(ids, t)
        segmenter.step(state, frame_at(t, HEIGHT, WIDTH), prompt)
    return state


def test_equal_states_have_equal_bytes(segmenter: VideoSegmenter) -> None:
    state = tracked(segmenter, 14)
    assert state.memory is not None
    assert state.memory.sizes[1] > 0
    blob = state.to_bytes()
    assert {state.to_bytes() for _ in range(10)} == {blob}
    assert TrackerState.from_bytes(blob).to_bytes() == blob
    assert tracked(segmenter, 14).to_bytes() == blob


def test_all_that_a_state_knows_comes_back(segmenter: VideoSegmenter) -> None:
    state = tracked(segmenter, 14)
    again = TrackerState.from_bytes(state.to_bytes())
    for name in ("memory_config", "model_fingerprint", "size", "network_size", "object_ids"):
        assert getattr(again, name) == getattr(state, name), name
    for name in ("time", "last_memory_time", "last_deep_time"):
        assert getattr(again, name) == getattr(state, name), name
    assert state.hidden is not None
    assert again.hidden is not None
    assert torch.equal(state.hidden, again.hidden)
    assert state.memory is not None
    assert again.memory is not None
    assert state.memory.frames == again.memory.frames
    assert state.memory.permanent_frames == again.memory.permanent_frames
    assert again.memory.capacity == state.memory.capacity
    assert repr(again) == repr(state)


def test_a_state_without_a_frame_or_without_an_object_is_stored_too(segmenter: VideoSegmenter) -> None:
    fresh = TrackerState.from_bytes(segmenter.new_state().to_bytes())
    assert fresh.memory is None
    assert fresh.time == -1
    emptied = tracked(segmenter, 6)
    emptied.remove_objects([1, 7])
    again = TrackerState.from_bytes(emptied.to_bytes())
    assert again.object_ids == ()
    assert again.time == 5
    result = segmenter.step(again, frame_at(6, HEIGHT, WIDTH), prompt_for(frozenset({7}), 6))
    assert result.object_ids == (7,)


# --- damage --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blob(segmenter: VideoSegmenter) -> bytes:
    return tracked(segmenter, 8).to_bytes()


def test_every_truncation_is_a_value_error(blob: bytes) -> None:
    for length in [*range(0, 4000), *range(4000, len(blob), 101), len(blob) - 1]:
        with pytest.raises(ValueError, match="tracker state"):
            TrackerState.from_bytes(blob[:length])


@pytest.mark.slow
def test_every_flipped_bit_is_a_value_error(blob: bytes) -> None:
    header = 8 + int.from_bytes(blob[:8], "little")
    places = [(at, bit) for at in range(header) for bit in (0, 1, 4, 7)]
    places += [(at, at % 8) for at in range(header, len(blob), 97)]
    for at, bit in places:
        damaged = bytearray(blob)
        damaged[at] ^= 1 << bit
        with pytest.raises(ValueError, match="tracker state"):
            TrackerState.from_bytes(bytes(damaged))


def test_bytes_too_many_are_a_value_error(blob: bytes) -> None:
    with pytest.raises(ValueError, match="damaged tracker state"):
        TrackerState.from_bytes(blob + b"\0")


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"1234567",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        pickle.dumps({"time": 3}),
        b"\x02\0\0\0\0\0\0\0[]",
        b'\x16\0\0\0\0\0\0\0{"__metadata__": [10]}',
        safetensors.torch.save({"a": torch.zeros(3)}),
        safetensors.torch.save({"a": torch.zeros(3)}, {"format": "pt"}),
        safetensors.torch.save({"a": torch.zeros(3)}, {"xmem-tracker-state": "[1]"}),
        safetensors.torch.save({"a": torch.zeros(3)}, {"xmem-tracker-state": "{"}),
        safetensors.torch.save({"a": torch.zeros(3)}, {"xmem-tracker-state": '{"version": 1}'}),
    ],
)
def test_other_formats_are_a_value_error(foreign: bytes) -> None:
    with pytest.raises(ValueError, match="tracker state"):
        TrackerState.from_bytes(foreign)


def test_a_newer_version_is_named(segmenter: VideoSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "_VERSION", 3)
    newer = segmenter.new_state().to_bytes()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 3: this release reads versions 1 and 2"):
        TrackerState.from_bytes(newer)


# --- removal and poison --------------------------------------------------------------------------------


def test_removal_of_an_unknown_object_changes_nothing(segmenter: VideoSegmenter) -> None:
    state = tracked(segmenter, 5)
    before = state.to_bytes()
    with pytest.raises(ValueError, match=r"cannot remove objects \[9\]: living are \[1, 7\]"):
        state.remove_objects([1, 9])
    assert state.to_bytes() == before
    state.remove_objects([])
    assert state.to_bytes() == before


def test_removal_takes_the_right_sensory_memory(segmenter: VideoSegmenter) -> None:
    state = tracked(segmenter, 8)
    assert state.hidden is not None
    kept = state.hidden[1].clone()
    state.remove_objects([1, 1])
    assert state.object_ids == (7,)
    assert state.hidden is not None
    assert torch.equal(state.hidden, kept.unsqueeze(0))
    state.remove_objects([7])
    assert state.hidden is None


def test_a_poisoned_state_refuses_everything(segmenter: VideoSegmenter) -> None:
    state = tracked(segmenter, 3)
    state.poisoned = "RuntimeError: out of memory"
    for use in (
        state.to_bytes,
        lambda: state.remove_objects([1]),
        lambda: segmenter.step(state, frame_at(3)),
    ):
        with pytest.raises(PoisonedStateError, match=r"out of memory.*from_bytes"):
            use()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 64])
def test_the_bundled_model_computes_the_same_bits_after_bytes(dtype: torch.dtype, window: int) -> None:
    """The memory layout of tensors (channels first or last) changes the last bits of convolutions."""
    segmenter = VideoSegmenter(load_model(), MemoryConfig(mem_every=2, search_window=window), dtype=dtype)
    height, width = 96, 144
    prompt = Prompt({i: square(height, width, 8, 12 + 50 * (i - 1), 30) for i in (1, 2)})
    one, two = segmenter.new_state(), segmenter.new_state()
    for t in range(7):
        frame = frame_at(t, height, width)
        # The one that goes on is never read from bytes, the other before every frame.
        two = TrackerState.from_bytes(two.to_bytes())
        results = [segmenter.step(s, frame, prompt if t == 0 else None) for s in (one, two)]
        assert torch.equal(results[0].network_probabilities, results[1].network_probabilities), t
        assert one.hidden is not None
        assert one.hidden.is_contiguous()
    assert one.to_bytes() == two.to_bytes()


def test_half_precision_takes_half_the_bytes_and_hardly_changes_masks() -> None:
    segmenter = VideoSegmenter(load_model(), MemoryConfig(mem_every=2, search_window=0))
    height, width = 96, 144
    prompt = Prompt({i: square(height, width, 8, 12 + 50 * (i - 1), 30) for i in (1, 2)})
    exact = segmenter.new_state()
    for t in range(4):
        segmenter.step(exact, frame_at(t, height, width), prompt if t == 0 else None)
    whole, small = exact.to_bytes(), exact.to_bytes(half=True)
    assert len(small) < 0.6 * len(whole)  # of so small a network counts and times are a tenth
    halved = TrackerState.from_bytes(small)
    assert halved.hidden is not None
    assert halved.hidden.dtype == torch.float32
    one, two = (segmenter.step(state, frame_at(4, height, width)) for state in (exact, halved))
    assert 0 < (one.probabilities - two.probabilities).abs().mean() < 1e-3
    assert (one.label_map == two.label_map).float().mean() > 0.999
    assert len(halved.to_bytes()) > 0.9 * len(whole)  # what it goes on with is float32 again


def test_values_out_of_the_range_of_half_precision_stay_as_they_are() -> None:
    large = torch.ones(3, 4096)
    assert state_module._halved(large).dtype == torch.float16
    large[1, 2] = 1e5
    assert torch.equal(state_module._halved(large), large)
    times = torch.arange(8192).view(2, -1)
    assert torch.equal(state_module._halved(times), times)
