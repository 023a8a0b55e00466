"""Streams that advance in one batch: masks are those of each stream alone, and failures each stream's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.small_net import MODELS, SMALL, SMALL_MEMORY, frame_at, small_model, square

from xmem_core import EncodedFrame, PoisonedStateError, Prompt, StepResult, TrackerState, VideoSegmenter
from xmem_core import segmenter as segmenter_module
from xmem_core.joint import Caller, Decode
from xmem_core.network import XMem
from xmem_core.segmenter import Frame
from xmem_core.steps import ModelSteps

FRAMES = 14
# Pixels whose label may differ, as rounding does: convolutions of a batch are computed in another order.
DIFFERENT = 1e-4
SIZES = ((48, 64), (48, 64), (96, 64), (48, 64), (80, 112))

Step = tuple[TrackerState, Frame | EncodedFrame, Prompt | None]


class Stream:
    """Stream k of a scene: size, objects, and the frames with prompts differ from stream to stream."""

    def __init__(self, k: int, segmenter: VideoSegmenter, scale: int = 1) -> None:
        self.k, self.state, self.segmenter = k, segmenter.new_state(), segmenter
        height, width = SIZES[k % len(SIZES)]
        self.size = height * scale, width * scale

    def mask(self, place: int) -> Any:
        return square(*self.size, 4 + 9 * (place % 4), 3 + 11 * (place % 5), 10 + 2 * (place % 3))

    def prompt(self, t: int) -> Prompt | None:
        k = self.k
        if k == 3:
            return None  # without objects throughout
        if t == k % 3:
            return Prompt({i + 1: self.mask(i + k) for i in range(1 + k % 4)})
        if t == 6 and k % 2:
            return Prompt({1: self.mask(k + 1), 9: self.mask(k + 2)})  # one is corrected, one is new
        return None

    def step(self, t: int) -> Step:
        if t == 9 and self.k == 4 and self.state.object_ids:
            self.state.remove_objects([self.state.object_ids[0]])
        if t == 8 and self.k == 5:  # its objects are out of sight for a while
            return self.state, np.zeros((*self.size, 3), np.uint8), None
        frame = frame_at(t + 20 * self.k, *self.size)
        if self.k == 6:
            return self.state, self.segmenter.encode(frame, self.state.network_size), self.prompt(t)
        return self.state, frame, self.prompt(t)


def segmenters(model: Callable[[], Any], **settings: Any) -> tuple[VideoSegmenter, VideoSegmenter]:
    memory = replace(SMALL_MEMORY, **settings)
    return tuple(VideoSegmenter(model(), memory, batch_streams=joint) for joint in (False, True))  # type: ignore[return-value]


def track(segmenter: VideoSegmenter, count: int, *, at_once: bool, scale: int = 1) -> list[list[StepResult]]:
    streams = [Stream(k, segmenter, scale) for k in range(count)]
    found: list[list[StepResult]] = []
    for t in range(FRAMES):
        steps = [stream.step(t) for stream in streams]
        found.append(segmenter.step_many(steps) if at_once else [segmenter.step(*step) for step in steps])
    return found


def compare(alone: list[list[StepResult]], joint: list[list[StepResult]]) -> None:
    """Labels of all streams and frames agree but for `DIFFERENT` of the pixels."""
    differ = pixels = 0
    for own, together in zip(alone, joint, strict=True):
        for a, b in zip(own, together, strict=True):
            assert a.object_ids == b.object_ids
            assert a.frame_size == b.frame_size
            differ += int((a.label_map != b.label_map).sum())
            pixels += a.label_map.numel()
    assert differ <= DIFFERENT * pixels


@pytest.mark.parametrize(("kind", "count"), [("xmem", 2), ("xmem", 5), ("xmem", 8), ("cutie", 8)])
def test_masks_in_a_batch_are_those_of_each_stream_alone(kind: str, count: int) -> None:
    separate, joint = segmenters(MODELS[kind])
    calls: list[int] = []
    decode = joint._network.decode

    def noted(*given: Any, **options: Any) -> Any:
        calls.append(int(given[0][0].shape[0] if kind == "xmem" else given[0].shape[0]))
        return decode(*given, **options)

    joint._network.decode = noted  # type: ignore[method-assign]
    alone = track(separate, count, at_once=False)
    compare(alone, track(joint, count, at_once=True))
    assert alone[-1][0].label_map.any()
    # Cutie's streams share a batch where they have equally many objects.
    assert max(calls) == {("xmem", 2): 2, ("xmem", 5): 2, ("xmem", 8): 4, ("cutie", 8): 2}[kind, count]


def test_a_stream_that_is_alone_in_a_batch_has_the_same_bits() -> None:
    separate, joint = segmenters(small_model)
    for own, together in zip(track(separate, 1, at_once=False), track(joint, 1, at_once=True), strict=True):
        assert torch.equal(own[0].probabilities, together[0].probabilities)


def test_in_search_windows_too() -> None:
    separate, joint = segmenters(small_model, search_window=64)
    alone = track(separate, 3, at_once=False, scale=3)
    compare(alone, track(joint, 3, at_once=True, scale=3))


def test_a_model_without_sensory_memory_too() -> None:
    separate, joint = segmenters(lambda: small_model(replace(SMALL, hidden_dim=0)))
    compare(track(separate, 5, at_once=False), track(joint, 5, at_once=True))


@pytest.mark.parametrize("every", [-1, 3])
def test_sensory_memories_follow_each_stream_s_own_rhythm(every: int) -> None:
    """Of streams in one batch, some have a deep update on a frame and some keep the decoder's."""
    separate, joint = segmenters(small_model, deep_update_every=every, mem_every=3)
    one, other = ([Stream(k, s) for k in (0, 1, 2, 4)] for s in (separate, joint))
    for t in range(FRAMES):
        for stream in one:
            separate.step(*stream.step(t))
        joint.step_many([stream.step(t) for stream in other])
        for a, b in zip(one, other, strict=True):
            if a.state.hidden is None:
                assert b.state.hidden is None
                continue
            assert b.state.hidden is not None
            torch.testing.assert_close(a.state.hidden, b.state.hidden, rtol=1e-3, atol=1e-3)
            # Not a view of what all streams have.
            assert b.state.hidden.untyped_storage().nbytes() == b.state.hidden.nbytes


@torch.no_grad()
@pytest.mark.parametrize("counts", [(1, 3, 2), (2, 2, 2)])
def test_objects_of_several_images_are_decoded_and_encoded_like_those_of_each(
    counts: tuple[int, ...],
) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY)  # its convolutions are split and fused
    for network in (small_model(), segmenter._network):
        assert isinstance(network, XMem)
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(3, 3, 64, 96, generator=generator)
        keys = network.encode_key(images.contiguous(memory_format=torch.channels_last))
        sizes = {"read": SMALL.value_dim, "hidden": SMALL.hidden_dim}
        made = {
            name: [torch.randn(1, n, dim, 4, 6, generator=generator) for n in counts]
            for name, dim in sizes.items()
        }
        calls = [
            Decode(keys.at(k).scales, made["read"][k], made["hidden"][k], True) for k in range(len(counts))
        ]
        for own, found in zip(calls, Decode.together(network, calls), strict=True):
            for wanted, got in zip(own.alone(network), found, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


# --- failures -------------------------------------------------------------------------------------------


def tracked(segmenter: VideoSegmenter, count: int, frames: int = 4) -> list[Stream]:
    streams = [Stream(k, segmenter) for k in (0, 1, 7)[:count]]
    for t in range(frames):
        segmenter.step_many([stream.step(t) for stream in streams])
    return streams


@pytest.mark.parametrize("joint", [True, False])
def test_what_fails_in_a_stream_fails_in_no_other(joint: bool) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, batch_streams=joint)
    streams = tracked(segmenter, 3)
    times = [stream.state.time for stream in streams]
    memory: Any = streams[1].state.memory

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a damaged memory")

    memory.choose = broken
    first, second, third = segmenter.step_each([stream.step(4) for stream in streams])
    assert isinstance(first, StepResult)
    assert isinstance(second, RuntimeError)
    assert isinstance(third, StepResult)
    assert [stream.state.time for stream in streams] == [t + 1 for t in times]
    with pytest.raises(PoisonedStateError, match="a damaged memory"):
        streams[1].state.to_bytes()
    again = segmenter.step_each([stream.step(5) for stream in streams])
    assert [type(result) for result in again] == [StepResult, PoisonedStateError, StepResult]


@pytest.mark.parametrize("joint", [True, False])
def test_bad_input_of_a_stream_is_its_own_failure(joint: bool) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, batch_streams=joint)
    streams = tracked(segmenter, 2)
    blob = streams[1].state.to_bytes()
    steps = [streams[0].step(4), (streams[1].state, frame_at(1)[..., :2], None)]
    first, second = segmenter.step_each(steps)
    assert isinstance(first, StepResult)
    assert isinstance(second, ValueError)
    assert streams[1].state.to_bytes() == blob
    with pytest.raises(ValueError, match="the same state twice"):
        segmenter.step_each([streams[0].step(5), streams[0].step(5)])


@pytest.mark.parametrize("where", ["encode_key", "decode", "encode_value"])
def test_a_batch_that_memory_does_not_suffice_for_is_done_in_parts(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    separate, joint = segmenters(small_model, mem_every=1)
    alone, streams = tracked(separate, 3), tracked(joint, 3)
    method, sizes = getattr(joint._network, where), []

    def scarce(first: Any, *others: Any, **options: Any) -> Any:
        size = len(first) if isinstance(first, torch.Tensor) else len(first[0])
        sizes.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(first, *others, **options)

    monkeypatch.setattr(joint._network, where, scarce)
    for t in (4, 5):
        wanted = [separate.step(*stream.step(t)) for stream in alone]
        got = joint.step_many([stream.step(t) for stream in streams])
        compare([wanted], [got])
    assert sizes[0] == 2  # of the third, frames have another size
    assert sizes.count(2) == 1  # it is not tried again with as many


def test_an_interrupt_spoils_every_state_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, batch_streams=True)
    streams = tracked(segmenter, 2)

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(segmenter._network, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        segmenter.step_each([stream.step(4) for stream in streams])
    for stream in streams:
        with pytest.raises(PoisonedStateError):
            stream.state.check_usable()


def test_a_batch_waits_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's `meta` device, whatever would wait for a GPU raises an error, see `test_host_syncs`."""
    monkeypatch.setattr(segmenter_module, "model_fingerprint", lambda _: "0" * 32)
    monkeypatch.setattr(ModelSteps, "autocast", lambda _: nullcontext())
    settings = replace(SMALL_MEMORY, forget_contradicted=False)
    segmenter = VideoSegmenter(small_model().to("meta"), settings)
    assert segmenter.batches_streams
    made: list[int] = []
    decode = segmenter._network.decode

    def noted(scales: Any, *others: Any, **options: Any) -> Any:
        made.append(len(scales[0]))
        return decode(scales, *others, **options)

    monkeypatch.setattr(segmenter._network, "decode", noted)
    states = [segmenter.new_state() for _ in range(3)]
    for t in range(12):
        prompts = [Prompt({i: square(48, 64, 8, 6 * i, 9) for i in range(1, k + 2)}) for k in range(3)]
        steps = [(s, frame_at(t), p if t == 0 else None) for s, p in zip(states, prompts, strict=True)]
        results = segmenter.step_many(steps)
    assert made == [3] * 11
    assert [len(result.object_ids) for result in results] == [1, 2, 3]


def test_a_failed_batch_leaves_nothing_of_what_it_computed() -> None:
    """When it is tried again, the exception, which holds the failed call's tensors, is gone."""
    held: list[weakref.ref[Any]] = []

    class Large:
        pass

    class Failing(Decode):
        @classmethod
        def together(cls, network: Any, calls: Any) -> Any:
            large = Large()
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")

        def alone(self, network: Any) -> Any:
            assert held[0]() is None
            return 1

    nothing = torch.zeros(1, 1, 1, 1)
    calls = [Failing((nothing,) * 3, nothing.unsqueeze(0), None, False) for _ in range(2)]
    assert Caller(None, nullcontext, {}).made(calls) == [1, 1]
    assert len(held) == 1
