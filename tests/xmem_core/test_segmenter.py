"""One step of a segmenter: input, output, and an unchanged state after errors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from support.recorded import recorded
from support.small_net import MODELS, SMALL, SMALL_MEMORY, frame_at, small_model, square

from xmem_core import (
    EncodedFrame,
    MemoryConfig,
    PoisonedStateError,
    Prompt,
    TrackerState,
    VideoSegmenter,
    network,
)
from xmem_core import segmenter as segmenter_module
from xmem_core import steps as steps_module
from xmem_core.corrections import contradicted
from xmem_core.fingerprint import model_fingerprint
from xmem_core.joint import Work
from xmem_core.memory import Memory
from xmem_core.segmenter import StepResult
from xmem_core.steps import XMemSteps, padding

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 48, 64
FRAME = frame_at(0)
MASK = square(HEIGHT, WIDTH, 4, 6, 14)
OTHER = square(HEIGHT, WIDTH, 24, 30, 16)


@pytest.fixture(scope="module", params=MODELS)
def segmenter(request: pytest.FixtureRequest) -> VideoSegmenter:
    return VideoSegmenter(MODELS[request.param](), SMALL_MEMORY)


@pytest.fixture(scope="module")
def xmem() -> VideoSegmenter:
    return VideoSegmenter(small_model(), SMALL_MEMORY)


def follow(
    segmenter: VideoSegmenter, prompts: dict[int, Prompt], frames: int, state: TrackerState | None = None
) -> tuple[TrackerState, list[StepResult]]:
    state = segmenter.new_state() if state is None else state
    return state, [segmenter.step(state, frame_at(t), prompts.get(t)) for t in range(frames)]


def test_only_very_many_elements_are_searched_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, dtype=torch.bfloat16)
    read, coarse = Memory.read, []

    def noted(self: Memory, *arguments: Any, **options: Any) -> Any:
        coarse.append(options["coarse"])
        return read(self, *arguments, **options)

    monkeypatch.setattr(Memory, "read", noted)
    follow(segmenter, {0: Prompt({1: MASK})}, 3)
    assert coarse == [False, False]
    monkeypatch.setattr(steps_module, "_COARSE_FROM", 2 * 12)  # two frames of 3 x 4 cells
    follow(segmenter, {0: Prompt({1: MASK})}, 4)
    assert coarse[2:] == [False, False, True]


# --- prompts -------------------------------------------------------------------------------------------


def test_where_masks_overlap_the_later_one_has_the_pixel(segmenter: VideoSegmenter) -> None:
    lower, upper = square(HEIGHT, WIDTH, 0, 0, 20), square(HEIGHT, WIDTH, 10, 10, 20)
    prompt = Prompt({5: lower, 3: upper})
    assert not (prompt.masks[5] & prompt.masks[3]).any()
    labels = segmenter.step(segmenter.new_state(), FRAME, prompt).label_map.numpy()
    expected = np.where(upper, 3, np.where(lower, 5, 0))
    assert np.array_equal(labels, expected)
    assert labels.dtype == np.int32


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({}, "without masks"),
        ({1: np.zeros((4, 4), bool)}, "mask of object 1 is empty"),
        ({1: MASK, 2: MASK}, "mask of object 1 is empty, or covered"),
        ({0: MASK}, "object id 0 is not a whole number in 1"),
        ({-1: MASK}, "object id -1"),
        ({2**31: MASK}, "object id 2147483648"),
        ({True: MASK}, "object id True"),
        ({1.5: MASK}, r"object id 1\.5"),
        ({"7": MASK}, "object id '7'"),
        ({1: MASK[None]}, "need H x W"),
        ({1: MASK * 255}, "values other than 0 and 1"),
        ({1: MASK.astype(np.float32) / 2}, "values other than 0 and 1"),
        ({1: MASK, 2: OTHER[:-1]}, "different sizes"),
    ],
)
def test_a_prompt_that_means_nothing_is_refused(masks: dict[Any, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Prompt(masks)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.astype(np.uint8),
        lambda m: m.astype(np.int64),
        lambda m: m.astype(np.float32),
        torch.from_numpy,
        lambda m: np.flipud(np.flipud(m).copy()),
        np.asfortranarray,
        lambda m: np.repeat(m, 2, 1)[:, ::2],
    ],
)
def test_a_mask_may_come_in_any_form(make: Callable[[Any], Any]) -> None:
    object_id: Any = np.int64(4)
    assert np.array_equal(Prompt({object_id: make(MASK.copy())}).masks[4].numpy(), MASK)


def test_a_prompt_keeps_no_hold_on_the_callers_arrays() -> None:
    mask = MASK.copy()
    prompt = Prompt({1: mask})
    mask[:] = False
    assert np.array_equal(prompt.masks[1].numpy(), MASK)
    mask.flags.writeable = False
    with pytest.raises(ValueError, match="empty"):
        Prompt({1: mask})


def test_more_than_255_objects_with_any_ids(segmenter: VideoSegmenter) -> None:
    height, width = 64, 80
    cells = np.kron(np.arange(320).reshape(16, 20), np.ones((4, 4), np.int64))
    ids = {cell: 1000 + 7 * cell for cell in range(300)} | {299: 2**31 - 1}
    prompt = Prompt({object_id: cells == cell for cell, object_id in ids.items()})
    state = segmenter.new_state()
    result = segmenter.step(state, frame_at(0, height, width), prompt)
    expected = np.vectorize(lambda cell: ids.get(cell, 0))(cells)
    assert np.array_equal(result.label_map.numpy(), expected)
    result = segmenter.step(state, frame_at(1, height, width))
    assert result.probabilities.shape == (301, height, width)
    assert result.object_ids == tuple(ids.values())
    torch.testing.assert_close(result.probabilities.sum(0), torch.ones(height, width), rtol=0, atol=1e-4)
    assert set(np.unique(result.label_map.numpy())) <= {0, *ids.values()}


def test_a_correction_replaces_what_was_predicted(segmenter: VideoSegmenter) -> None:
    state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER})}, 3)
    corrected = square(HEIGHT, WIDTH, 20, 40, 12)
    result = segmenter.step(state, frame_at(3), Prompt({2: corrected}))
    assert result.object_ids == (1, 2)
    labels = result.label_map.numpy()
    assert np.array_equal(labels == 2, corrected)
    assert result.probabilities[1][torch.from_numpy(corrected)].max() < 1e-5
    assert state.memory is not None
    assert state.memory.frames[-1].given == (2,)
    assert state.last_memory_time == 3


def test_a_given_mask_takes_its_pixels_from_every_prediction(
    xmem: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = follow(xmem, {0: Prompt({1: MASK, 2: OTHER})}, 3)
    blob = state.to_bytes()
    predicted = xmem.step(state, frame_at(3)).probabilities
    joint: list[torch.Tensor] = []

    def aggregate(probabilities: torch.Tensor) -> torch.Tensor:
        joint.append(probabilities[0].clone())
        return network.aggregate(probabilities)

    monkeypatch.setattr(segmenter_module, "aggregate", aggregate)
    corrected = torch.from_numpy(square(HEIGHT, WIDTH, 20, 40, 12))
    xmem.step(TrackerState.from_bytes(blob), frame_at(3), Prompt({2: corrected}))
    assert len(joint) == 1
    assert torch.equal(joint[0][1], corrected.float())
    assert joint[0][0][corrected].max() == 0
    assert torch.equal(joint[0][0][~corrected], predicted[1][~corrected])


def test_a_prompt_for_all_objects_needs_no_reading_where_nothing_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, forget_contradicted=False))
    state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER})}, 2)
    monkeypatch.setattr(segmenter._network, "decode", None)
    result = segmenter.step(
        state, frame_at(2), Prompt({2: OTHER, 1: MASK, 9: square(HEIGHT, WIDTH, 0, 50, 4)})
    )
    assert result.object_ids == (1, 2, 9)


def make_it_show(
    monkeypatch: pytest.MonkeyPatch, segmenter: VideoSegmenter, masks: dict[int, NDArray[np.bool_]]
) -> None:
    """Makes the network return these masks for any frame, and nothing for other objects."""
    decode = segmenter._steps.decode

    def painted(state: TrackerState, *args: Any, **options: Any) -> Work[torch.Tensor]:
        planes = torch.full_like((yield from decode(state, *args, **options)), 0.01)
        for k, i in enumerate(state.object_ids, 1):
            if i in masks:
                planes[k][torch.from_numpy(masks[i])] = 0.9
        planes[0] = 1 - planes[1:].amax(0)
        return planes

    monkeypatch.setattr(segmenter._steps, "decode", painted)


@pytest.mark.parametrize(
    "masks", [{3: MASK}, {1: OTHER}, {1: OTHER, 2: MASK}], ids=["by another", "by itself", "both"]
)
@pytest.mark.parametrize("forget", [True, False])
def test_what_a_prompt_contradicts_is_forgotten(
    masks: dict[int, NDArray[np.bool_]], forget: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another label moves to the position of 1, or 1 is prompted elsewhere, or both swap places."""
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, forget_contradicted=forget))
    make_it_show(monkeypatch, segmenter, {1: MASK, 2: OTHER})
    state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER})}, 6)
    assert state.memory is not None
    assert state.sure == {1: 0, 2: 0}
    newest = state.memory.frames[-1].time
    wrong = {1, 2} if 1 in masks else {1}  # where 1 is given, 2 was shown
    segmenter.step(state, frame_at(6), Prompt(masks))
    assert state.memory.doubted == ({i: [(1, newest)] for i in wrong} if forget else {})
    assert state.memory.frames[-1].time == 6
    # Given, or with nothing left.
    assert state.sure == {1: 6, 2: 6 if 1 in masks else 0} | dict.fromkeys(masks, 6)
    assert TrackerState.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()


def test_the_sensory_memory_of_who_is_contradicted_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the frame is decoded again without the doubted elements: two reads with them, one without."""
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY)
    make_it_show(monkeypatch, segmenter, {1: MASK, 2: OTHER})
    seen: list[torch.Tensor] = []
    painted = segmenter._steps.decode

    def spy(state: TrackerState, *args: Any, **options: Any) -> Work[torch.Tensor]:
        assert state.hidden is not None
        seen.append(state.hidden.clone())
        return (yield from painted(state, *args, **options))

    monkeypatch.setattr(segmenter._steps, "decode", spy)
    state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER})}, 6)
    seen.clear()
    segmenter.step(state, frame_at(6), Prompt({3: MASK}))
    before, after = seen
    assert before[0].abs().max() > 0
    assert after[0].abs().max() == 0
    assert torch.equal(before[1], after[1])


def test_what_a_prompt_confirms_or_leaves_alone_is_not_forgotten() -> None:
    """Looking leaves no trace, in use counts or in the sensory memory."""
    keeping = VideoSegmenter(small_model(), replace(SMALL_MEMORY, forget_contradicted=False))
    asking = VideoSegmenter(small_model(), SMALL_MEMORY)
    state, _ = follow(asking, {0: Prompt({1: MASK, 2: OTHER})}, 6)
    labels = asking.step(TrackerState.from_bytes(state.to_bytes()), frame_at(6)).label_map.numpy()
    assert (labels == 1).any()
    assert (labels == 2).any()
    later = square(HEIGHT, WIDTH, 0, 60, 4) & (labels == 0)
    for masks in ({1: labels == 1, 2: labels == 2}, {1: labels == 1}, {1: labels == 1, 4: later}):
        ends = []
        for segmenter in (asking, keeping):
            state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER})}, 6)
            segmenter.step(state, frame_at(6), Prompt(masks))
            assert state.memory is not None
            assert state.memory.doubted == {}
            ends.append(state)
        assert ends[0].hidden is not None
        assert ends[1].hidden is not None
        assert torch.equal(ends[0].hidden, ends[1].hidden)
        assert ends[0].memory is not None
        assert ends[1].memory is not None
        for one, two in zip(
            ends[0].memory.export()[0].values(), ends[1].memory.export()[0].values(), strict=True
        ):
            assert torch.equal(one, two)


def test_a_frame_without_a_prompt_contradicts_nobody_at_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(segmenter_module, "contradicted", recorded(contradicted, asked))
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY)
    follow(segmenter, {0: Prompt({1: MASK}), 3: Prompt({2: OTHER})}, 6)
    assert len(asked) == 1


def test_an_object_is_doubted_since_it_was_last_given_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY)
    make_it_show(monkeypatch, segmenter, {1: MASK, 2: OTHER})
    state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER}), 3: Prompt({2: OTHER})}, 5)
    assert state.sure == {1: 0, 2: 3}
    make_it_show(monkeypatch, segmenter, {2: OTHER})
    for t in range(5, 9):
        segmenter.step(state, frame_at(t))
    assert state.last_memory_time > 5
    assert state.sure == {1: state.last_memory_time, 2: 3}
    state.remove_objects([2])
    assert state.sure == {1: state.last_memory_time}
    assert TrackerState.from_bytes(state.to_bytes()).sure == state.sure


def test_a_late_object_leaves_the_others_prediction_where_its_mask_is_not(segmenter: VideoSegmenter) -> None:
    prompts = {0: Prompt({1: MASK})}
    _, alone = follow(segmenter, prompts, 4)
    _, joined = follow(segmenter, prompts | {3: Prompt({2: OTHER})}, 4)
    outside = ~torch.from_numpy(OTHER)
    # Aggregated twice, so not to the bit: p -> p^2 / (p^2 + (1 - p)^2).
    p = alone[3].probabilities[1][outside].double()
    expected = p**2 / (p**2 + (1 - p) ** 2)
    torch.testing.assert_close(joined[3].probabilities[1][outside].double(), expected, rtol=0, atol=1e-5)
    assert np.array_equal(joined[3].label_map.numpy() == 2, OTHER)


@pytest.mark.parametrize("covered", [False, True])
def test_a_mask_too_small_for_the_network_does_not_vanish(covered: bool) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=16)
    dot = np.zeros((160, 160), bool)
    dot[23, 23] = True
    masks = {2: dot}
    if covered:  # in the middle of another object
        around = square(160, 160, 0, 0, 100)
        masks = {1: around & ~dot, 2: dot}
    result = segmenter.step(segmenter.new_state(), frame_at(0, 160, 160), Prompt(masks))
    labels = result.label_map.numpy()
    assert labels[23, 23] == 2
    assert 1 <= (labels == 2).sum() <= 400
    if covered:
        assert (labels == 1).sum() > 0.9 * 100 * 100


# --- frames --------------------------------------------------------------------------------------------


def read_only(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    frame = frame.copy()
    frame.flags.writeable = False
    return frame


FORMS: dict[str, Callable[[NDArray[np.uint8]], Any]] = {
    "tensor": torch.from_numpy,
    "view of BGR": lambda f: f[..., ::-1].copy()[..., ::-1],
    "upside down": lambda f: f[::-1].copy()[::-1],
    "cut out": lambda f: np.pad(f, ((3, 2), (1, 4), (0, 1)))[3:-2, 1:-4, :3],
    "every second column": lambda f: np.repeat(f, 2, 1)[:, ::2],
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "read-only view of BGR": lambda f: read_only(f[..., ::-1])[..., ::-1],
    "from bytes": lambda f: np.frombuffer(f.tobytes(), np.uint8).reshape(f.shape),
    "channels first in memory": lambda f: torch.from_numpy(f.transpose(2, 0, 1).copy()).permute(1, 2, 0),
}


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("form", FORMS)
def test_the_frames_memory_layout_does_not_matter(form: str, size: int | None) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=size)
    seen = []
    for make in (np.ascontiguousarray, FORMS[form]):
        state = segmenter.new_state()
        segmenter.step(state, make(frame_at(0)), Prompt({1: MASK}))
        seen.append(segmenter.step(state, make(frame_at(1))).probabilities)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("height", "width"), [(48, 64), (45, 61), (33, 17), (5, 7), (1, 1), (1, 40)])
def test_any_size_is_tracked_at_its_own(segmenter: VideoSegmenter, height: int, width: int) -> None:
    state = segmenter.new_state()
    mask = np.zeros((height, width), bool)
    mask[: (height + 1) // 2, : (width + 1) // 2] = True
    first = segmenter.step(state, frame_at(0, 48, 64)[:height, :width], Prompt({1: mask}))
    assert np.array_equal(first.label_map.numpy() == 1, mask)
    for t in range(1, 12):  # fewer elements than top_k at first, then more
        result = segmenter.step(state, frame_at(t, 48, 64)[:height, :width])
        assert result.probabilities.shape == (2, height, width)
        assert torch.isfinite(result.probabilities).all()


def test_padding_puts_the_smaller_half_left_and_above(xmem: VideoSegmenter) -> None:
    image = xmem._prepare(np.full((45, 61, 3), 200, np.uint8), (45, 61))
    assert image.shape == (1, 3, 48, 64)
    seen = (image[0] != 0).all(0)
    assert seen[1:46, 1:62].all()
    assert seen.sum() == 45 * 61


def test_frames_are_normalised_as_published(segmenter: VideoSegmenter) -> None:
    frame = np.zeros((16, 16, 3), np.uint8)
    frame[..., 0] = 255
    image = segmenter._prepare(frame, (16, 16))[0, :, 0, 0]
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    torch.testing.assert_close(image, torch.tensor(expected))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (45, 61), (16, 17), (50, 16)])
def test_frames_are_normalised_to_the_last_bit(height: int, width: int, xmem: VideoSegmenter) -> None:
    """In the order of the published model's operations."""
    rng = np.random.default_rng(height)
    frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean, std = (t.view(1, 3, 1, 1) for t in (xmem._steps.mean, xmem._steps.std))
    for given in (frame, frame[:, ::-1], np.asfortranarray(frame)):
        image = torch.from_numpy(given.copy()).permute(2, 0, 1)[None].float() / 255
        wanted = F.pad((image - mean) / std, padding((height, width)))
        own = xmem._prepare(given, (height, width))
        assert torch.equal(own, wanted)
        assert own.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(97, 131), (480, 640), (333, 64), (50, 50)])
def test_frames_are_shrunk_with_antialiasing(height: int, width: int) -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=48)
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = 48 / min(height, width)
    size = (round(height * scale), round(width * scale))
    state = segmenter.new_state()
    segmenter.step(state, frame)
    assert state.network_size == size
    exact = F.interpolate(
        torch.from_numpy(frame).permute(2, 0, 1)[None].double(), size, mode="bilinear", antialias=True
    )
    mean, std = (t.view(1, 3, 1, 1).double() for t in (segmenter._steps.mean, segmenter._steps.std))
    padded = segmenter._prepare(frame, size).double()
    top, left = (-size[0] % 16) // 2, (-size[1] % 16) // 2
    got = (padded[..., top : top + size[0], left : left + size[1]] * std + mean) * 255
    # In fixed point on bytes: each of two passes rounds to a whole level (measured bias: 0.08 of one).
    assert (got - exact).abs().max() <= 1.01
    assert abs(float((got - exact).mean())) < 0.15


def test_frames_are_never_enlarged(segmenter: VideoSegmenter) -> None:
    large = VideoSegmenter(small_model(), SMALL_MEMORY, size=400)
    state = large.new_state()
    large.step(state, FRAME)
    assert state.network_size == (HEIGHT, WIDTH)


def test_later_frames_of_another_size_are_resized_and_answered_at_their_own() -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=32)
    state = segmenter.new_state()
    segmenter.step(state, FRAME, Prompt({1: MASK}))
    assert state.network_size == (32, 43)
    larger = segmenter.step(state, frame_at(1, 100, 90))
    assert larger.label_map.shape == (100, 90)
    assert larger.network_probabilities.shape == (2, 32, 43)
    smaller = segmenter.step(state, frame_at(2, 20, 30), Prompt({2: square(20, 30, 5, 5, 10)}))
    assert smaller.probabilities.shape == (3, 20, 30)
    assert smaller.label_map[10, 10] == 2
    assert state.network_size == (32, 43)


# --- results -------------------------------------------------------------------------------------------


def test_before_the_first_prompt_all_is_background(segmenter: VideoSegmenter) -> None:
    state = segmenter.new_state()
    for t in range(3):
        result = segmenter.step(state, frame_at(t))
        assert result.object_ids == ()
        assert result.label_map.shape == (HEIGHT, WIDTH)
        assert not result.label_map.any()
        assert torch.equal(result.probabilities, torch.ones(1, HEIGHT, WIDTH))
    assert state.time == -1
    _, late = follow(segmenter, {0: Prompt({1: MASK})}, 4, state)
    _, at_once = follow(segmenter, {0: Prompt({1: MASK})}, 4)
    assert all(torch.equal(a.probabilities, b.probabilities) for a, b in zip(late, at_once, strict=True))


def test_the_label_map_is_the_argmax_at_the_frames_size() -> None:
    network = torch.tensor([[[0.2, 0.6]], [[0.5, 0.1]], [[0.3, 0.3]]])
    result = StepResult((9, 4), (1, 4), network)
    full = F.interpolate(network[None], (1, 4), mode="bilinear", align_corners=False)[0]
    assert torch.equal(result.probabilities, full)
    assert result.label_map.tolist() == [[9, 9, 0, 0]]
    assert result.label_map.dtype == torch.int32
    assert torch.equal(result.label_probabilities, full.max(0).values)
    assert "9, 4" in repr(result)


def test_tracking_answers_to_the_frame(segmenter: VideoSegmenter) -> None:
    """Neither constant nor blind: different frames give different masks, equal ones the same."""
    state, _ = follow(segmenter, {0: Prompt({1: MASK})}, 5)
    blob = state.to_bytes()
    a, b, c = (
        segmenter.step(TrackerState.from_bytes(blob), frame).probabilities
        for frame in (frame_at(5), frame_at(5), frame_at(40))
    )
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 1e-3


def test_after_all_objects_left_everything_is_background_until_the_next_prompt(
    segmenter: VideoSegmenter,
) -> None:
    state, _ = follow(segmenter, {0: Prompt({1: MASK, 2: OTHER})}, 5)
    state.remove_objects([2, 1])
    result = segmenter.step(state, frame_at(5))
    assert result.object_ids == ()
    assert not result.label_map.any()
    result = segmenter.step(state, frame_at(6), Prompt({2: OTHER}))
    assert result.object_ids == (2,)
    assert np.array_equal(result.label_map.numpy() == 2, OTHER)
    assert state.memory is not None
    assert state.memory.frames[0].anchor
    # From here on it is a new stream's tracking, whatever was tracked before.
    fresh = segmenter.new_state()
    segmenter.step(fresh, frame_at(6), Prompt({2: OTHER}))
    for t in range(7, 12):
        a, b = (segmenter.step(s, frame_at(t)).probabilities for s in (state, fresh))
        assert torch.equal(a, b)


def test_step_many_equals_step_by_step(segmenter: VideoSegmenter) -> None:
    large = square(96, 64, 20, 20, 30)
    streams = [
        [(frame_at(t), Prompt({1: MASK}) if t == 0 else None) for t in range(6)],
        [(frame_at(t + 9, 96, 64), Prompt({4: large}) if t == 2 else None) for t in range(6)],
        [(frame_at(t + 30), Prompt({1: OTHER, 2: MASK}) if t == 0 else None) for t in range(6)],
    ]
    alone = []
    for stream in streams:
        state = segmenter.new_state()
        alone.append([segmenter.step(state, frame, prompt).probabilities for frame, prompt in stream])
    states = [segmenter.new_state() for _ in streams]
    for t in range(6):
        results = segmenter.step_many([(s, *stream[t]) for s, stream in zip(states, streams, strict=True)])
        for k, result in enumerate(results):
            assert torch.equal(result.probabilities, alone[k][t])
    assert segmenter.step_many([]) == []


# --- when memory and sensory memory are written ---------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "encoded", "updated"),
    [
        # Synchronised: every memory frame is a deep update, and the decoder's own is left out there.
        (-1, {0: True, 2: True, 3: True, 5: True, 7: True, 9: True}, {1, 4, 6, 8}),
        # Every 3: due frames wait for the next memory frame; the decoder's own update is kept on all.
        (3, {0: True, 2: False, 3: True, 5: False, 7: True, 9: False}, {1, 2, 3, 4, 5, 6, 7, 8, 9}),
    ],
)
def test_updates_follow_the_published_rhythm(
    every: int, encoded: dict[int, bool], updated: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL_MEMORY, mem_every=2, deep_update_every=every)
    segmenter = VideoSegmenter(small_model(), config)
    encode: Any = segmenter._network.encode_value
    decode = segmenter._network.decode
    seen_encoded: dict[int, bool] = {}
    seen_updated: set[int] = set()
    now = 0

    def spy_encode(*args: Any, deep_update: bool) -> Any:
        seen_encoded[now] = deep_update
        return encode(*args, deep_update=deep_update)

    def spy_decode(*args: Any, update_hidden: bool) -> Any:
        if update_hidden:
            seen_updated.add(now)
        return decode(*args, update_hidden=update_hidden)

    monkeypatch.setattr(segmenter._network, "encode_value", spy_encode)
    monkeypatch.setattr(segmenter._network, "decode", spy_decode)
    state = segmenter.new_state()
    prompts = {0: Prompt({1: MASK}), 3: Prompt({2: OTHER})}
    for now in range(10):
        segmenter.step(state, frame_at(now), prompts.get(now))
    assert seen_encoded == encoded
    assert seen_updated == updated


def test_a_new_object_starts_with_an_empty_sensory_memory(
    xmem: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = follow(xmem, {0: Prompt({1: MASK})}, 3)
    given = []
    encode: Any = xmem._network.encode_value

    def spy(image: Any, f16: Any, hidden: Any, masks: Any, *, deep_update: bool) -> Any:
        given.append(hidden.clone())
        return encode(image, f16, hidden, masks, deep_update=deep_update)

    monkeypatch.setattr(xmem._network, "encode_value", spy)
    xmem.step(state, frame_at(3), Prompt({2: OTHER}))
    assert given[0].shape[:2] == (1, 2)
    assert given[0][0, 0].abs().max() > 0
    assert given[0][0, 1].abs().max() == 0


@pytest.mark.slow
def test_a_model_without_sensory_memory_tracks(segmenter: VideoSegmenter) -> None:
    plain = VideoSegmenter(small_model(replace(SMALL, hidden_dim=0)), SMALL_MEMORY)
    state, results = follow(plain, {0: Prompt({1: MASK}), 4: Prompt({2: OTHER})}, 12)
    assert state.hidden is None
    assert torch.isfinite(results[-1].probabilities).all()
    again = TrackerState.from_bytes(state.to_bytes())
    a, b = (plain.step(s, frame_at(12)).probabilities for s in (state, again))
    assert torch.equal(a, b)


def test_in_bfloat16_memory_and_results_stay_fp32() -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, dtype=torch.bfloat16)
    state, results = follow(segmenter, {0: Prompt({1: MASK})}, 4)
    assert results[-1].probabilities.dtype == torch.float32
    assert torch.isfinite(results[-1].probabilities).all()
    assert isinstance(state.memory, Memory)
    assert state.memory.value_dtype == torch.float32
    assert state.hidden is not None
    assert state.hidden.dtype == torch.float32


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "prompt", "says"),
    [
        (FRAME[0], None, r"frame of shape \(64, 3\) and type uint8: need H x W x 3 uint8"),
        (FRAME[..., :2], None, "need H x W x 3"),
        (FRAME.astype(np.float32), None, "type float32: need H x W x 3 uint8"),
        (torch.zeros(3, 48, 64, dtype=torch.uint8), None, r"shape \(3, 48, 64\)"),
        (FRAME[:0], None, r"shape \(0, 64, 3\)"),
        ([[1, 2, 3]], None, "frame is a list: need H x W x 3 uint8"),
        (FRAME, Prompt({1: MASK[:-1]}), r"prompt masks are \(47, 64\), the frame is \(48, 64\)"),
        (FRAME, {1: MASK}, "prompt is a dict"),
    ],
)
def test_input_that_does_not_fit_leaves_the_state_as_it_was(
    segmenter: VideoSegmenter, frame: Any, prompt: Any, says: str
) -> None:
    state, _ = follow(segmenter, {0: Prompt({1: MASK})}, 3)
    before = state.to_bytes()
    with pytest.raises(ValueError, match=says):
        segmenter.step(state, frame, prompt)
    neighbour = segmenter.new_state()
    empty = neighbour.to_bytes()
    with pytest.raises(ValueError, match=says):
        segmenter.step_many([(neighbour, FRAME, Prompt({3: MASK})), (state, frame, prompt)])
    assert state.to_bytes() == before
    assert neighbour.to_bytes() == empty


def test_frames_encoded_ahead_in_another_thread_give_the_same_bits(segmenter: VideoSegmenter) -> None:
    prompts = {0: Prompt({1: MASK}), 3: Prompt({2: OTHER})}
    plain, results = follow(segmenter, prompts, 9)
    state = segmenter.new_state()
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(segmenter.encode, frame_at(0))
        for t, wanted in enumerate(results):
            encoded, ahead = (
                ahead.result(),
                pool.submit(segmenter.encode, frame_at(t + 1), state.network_size),
            )
            assert isinstance(encoded, EncodedFrame)
            result = segmenter.step(state, encoded, prompts.get(t))
            assert torch.equal(result.network_probabilities, wanted.network_probabilities)
    assert state.to_bytes() == plain.to_bytes()


def test_a_frame_encoded_at_another_size_is_encoded_again(xmem: VideoSegmenter) -> None:
    large = np.repeat(np.repeat(frame_at(1), 2, 0), 2, 1)
    results = []
    for frame in (large, xmem.encode(large)):
        state, _ = follow(xmem, {0: Prompt({1: MASK})}, 1)
        results.append(xmem.step(state, frame))
    first, second = results
    assert second.frame_size == large.shape[:2]
    assert torch.equal(first.network_probabilities, second.network_probabilities)


def test_what_was_encoded_is_not_used_where_nothing_is_tracked(segmenter: VideoSegmenter) -> None:
    state = segmenter.new_state()
    result = segmenter.step(state, segmenter.encode(FRAME))
    assert result.object_ids == ()
    assert state.to_bytes() == follow(segmenter, {}, 1)[0].to_bytes()


def test_a_frame_that_another_model_encoded_is_refused(xmem: VideoSegmenter) -> None:
    changed = small_model()
    changed.decoder.pred.weight.data.mul_(2)
    other = VideoSegmenter(changed, SMALL_MEMORY)
    state, _ = follow(xmem, {0: Prompt({1: MASK})}, 1)
    before = state.to_bytes()
    with pytest.raises(ValueError, match="encoded by another model"):
        xmem.step(state, other.encode(FRAME))
    assert state.to_bytes() == before
    with pytest.raises(ValueError, match="need H x W x 3 uint8"):
        xmem.encode(FRAME[0])


def test_one_state_twice_in_a_call_is_refused(segmenter: VideoSegmenter) -> None:
    state, _ = follow(segmenter, {0: Prompt({1: MASK})}, 2)
    before = state.to_bytes()
    with pytest.raises(ValueError, match="the same state twice"):
        segmenter.step_many([(state, FRAME, None), (state, FRAME, None)])
    assert state.to_bytes() == before


def test_a_state_of_other_settings_or_another_model_is_refused(xmem: VideoSegmenter) -> None:
    state, _ = follow(xmem, {0: Prompt({1: MASK})}, 2)
    changed = small_model()
    with torch.no_grad():
        bias = changed.decoder.pred.bias
        assert bias is not None
        bias += 1e-3
    others = {
        "model": VideoSegmenter(changed, SMALL_MEMORY),
        "memory settings": VideoSegmenter(small_model(), MemoryConfig()),
        "size": VideoSegmenter(small_model(), SMALL_MEMORY, size=32),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"state of another {name}: it has "):
            other.step(state, FRAME)
    VideoSegmenter(small_model(), SMALL_MEMORY).step(state, FRAME)


@pytest.mark.parametrize("options", [{"size": 15}, {"dtype": torch.float64}])
def test_a_segmenter_checks_its_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        VideoSegmenter(small_model(), SMALL_MEMORY, **options)


def test_the_callers_model_is_left_alone() -> None:
    model = small_model().train()
    before = model_fingerprint(model)
    follow(VideoSegmenter(model, SMALL_MEMORY), {0: Prompt({1: MASK})}, 3)
    assert model.training
    assert model_fingerprint(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_is_given_away_is_not_copied_and_tracks_the_same() -> None:
    kept, given = small_model(), small_model()
    prompts = {0: Prompt({1: MASK})}
    segmenter = VideoSegmenter(given, SMALL_MEMORY, keep_model=False)
    assert segmenter._network is given
    _, expected = follow(VideoSegmenter(kept, SMALL_MEMORY), prompts, 4)
    _, found = follow(segmenter, prompts, 4)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.probabilities, other.probabilities)


# --- failures half-way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decode", "encode_value"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_fails_half_way_poisons_its_state_and_no_other(
    segmenter: VideoSegmenter, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = follow(segmenter, {0: Prompt({1: MASK})}, 4)
    neighbour, _ = follow(segmenter, {0: Prompt({1: MASK})}, 4)
    blob = state.to_bytes()

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(segmenter._network, where, fail)
    with pytest.raises(type(error)):
        segmenter.step_many([(state, frame_at(4), None), (neighbour, frame_at(4), None)])
    monkeypatch.undo()
    with pytest.raises(PoisonedStateError, match=type(error).__name__):
        segmenter.step(state, frame_at(4))
    with pytest.raises(PoisonedStateError):
        state.to_bytes()
    assert neighbour.to_bytes() == blob
    expected = segmenter.step(neighbour, frame_at(4)).probabilities
    got = segmenter.step(TrackerState.from_bytes(blob), frame_at(4)).probabilities
    assert torch.equal(got, expected)


def test_a_failure_before_anything_changed_poisons_nothing(
    segmenter: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = follow(segmenter, {0: Prompt({1: MASK})}, 3)
    before = state.to_bytes()

    def fail(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(segmenter._network, "encode_key", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        segmenter.step(state, frame_at(3))
    assert state.to_bytes() == before


# --- hidden objects ------------------------------------------------------------------------------------


def planes_of(*areas: int) -> torch.Tensor:
    """(O + 1, 20, 20) probabilities in which each object has so many pixels."""
    planes = torch.zeros(len(areas) + 1, 400)
    for k, area in enumerate(areas, 1):
        planes[k, :area] = 0.9
    return planes.view(-1, 20, 20)


def hidden(segmenter: VideoSegmenter, state: TrackerState, given: set[int], *areas: int) -> list[int]:
    steps = segmenter._steps
    assert isinstance(steps, XMemSteps)
    ids, planes = tuple(range(1, len(areas) + 1)), planes_of(*areas)[1:]
    steps.look_next(state, ids, planes)
    return steps.hidden_objects(state, ids, planes, given)


def test_an_object_is_hidden_while_its_mask_has_lost_a_share_of_its_usual_area() -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, least_area=0.7))
    state = segmenter.new_state()
    assert hidden(segmenter, state, {1, 2}, 100, 50) == []
    assert hidden(segmenter, state, set(), 71, 50) == []
    assert hidden(segmenter, state, set(), 60, 0) == [1, 2]
    assert state.areas[2] == 50  # out of sight
    # A smaller mask that stays becomes the usual one; a prompt says at once what is usual.
    assert [hidden(segmenter, state, set(), 60) for _ in range(40)][-1] == []
    assert hidden(segmenter, state, {1}, 20) == []
    assert state.areas[1] == 20


def test_a_large_object_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "_LARGE", 100)
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, least_area=0.7))
    state = segmenter.new_state()
    assert hidden(segmenter, state, {1, 2}, 105, 99) == []
    assert hidden(segmenter, state, set(), 9, 9) == [2]


def test_a_hidden_object_learns_nothing_and_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {0: Prompt({1: MASK, 2: OTHER})}

    def tracked(hidden: list[int]) -> TrackerState:
        segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, least_area=0.5))
        monkeypatch.setattr(
            segmenter._steps, "hidden_objects", lambda state, *rest: hidden if state.time else []
        )
        return follow(segmenter, prompts, 3)[0]

    learnt, blind = tracked([]), tracked([1])
    assert isinstance(learnt.memory, Memory)
    assert isinstance(blind.memory, Memory)
    assert learnt.memory.doubted == {}
    assert blind.memory.doubted == {1: [(2, 2)]}
    assert learnt.hidden is not None
    assert blind.hidden is not None
    assert not torch.equal(learnt.hidden[0], blind.hidden[0])
    assert torch.equal(learnt.hidden[1], blind.hidden[1])


def test_hidden_objects_are_the_same_ones_after_bytes() -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, least_area=0.95))
    prompt = Prompt({1: MASK, 2: OTHER})
    one, two = segmenter.new_state(), segmenter.new_state()
    barred = False
    for t in range(12):
        two = TrackerState.from_bytes(two.to_bytes())
        for state in (one, two):
            segmenter.step(state, frame_at(t), prompt if t == 0 else None)
        assert isinstance(one.memory, Memory)
        barred = barred or bool(one.memory.doubted)
    assert barred
    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize(("given", "default", "used"), [(None, 0.7, 0.7), (0, 0.7, None), (0.5, None, 0.5)])
def test_a_models_least_area_is_the_default(
    given: float | None, default: float | None, used: float | None
) -> None:
    model = small_model()
    model.config = replace(model.config, default_least_area=default)
    assert VideoSegmenter(model, MemoryConfig(least_area=given)).memory_config.least_area == used


@pytest.mark.parametrize("value", [1, -0.1, True, "0.7"])
def test_a_least_area_is_a_share(value: object) -> None:
    with pytest.raises(ValueError, match="least_area"):
        MemoryConfig(least_area=value)  # type: ignore[arg-type]
