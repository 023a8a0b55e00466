"""Search windows around objects' last positions: their placement, and that nothing else is affected."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_net import SMALL, SMALL_MEMORY, frame_at, small_model, square
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xmem_core import MemoryConfig, Prompt, TrackerState, VideoSegmenter, XMem, windows
from xmem_core.joint import Caller
from xmem_core.memory import Memory
from xmem_core.network import aggregate
from xmem_core.windows import (
    STRIDE,
    Window,
    aggregated_within,
    covered,
    looked_for,
    next_window,
    union,
    whole,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (24, 32)
WHOLE = whole(GRID)
HEIGHT, WIDTH = 192, 256


def plane(*boxes: tuple[int, int, int, int], value: float = 0.9) -> Tensor:
    """Probabilities on 24 x 32 cells, from boxes in pixels: top, left, height, width."""
    found = torch.zeros(GRID[0] * STRIDE, GRID[1] * STRIDE)
    for top, left, height, width in boxes:
        found[top : top + height, left : left + width] = value
    return found


# --- where ---------------------------------------------------------------------------------------------


def test_a_small_object_gets_the_least_window_around_it() -> None:
    # It covers row 10 and columns 15 and 16.
    assert next_window(plane((162, 244, 12, 20)), WHOLE, 12) == Window(4, 10, 12, 12)


def test_the_margin_is_half_of_a_large_objects_extent_and_at_least_four_cells() -> None:
    # 10 rows and 5 more on each side; 4 columns and 4 more on each side.
    assert next_window(plane((112, 224, 160, 64)), WHOLE, 8) == Window(2, 10, 20, 12)


def test_at_a_border_the_window_keeps_its_size() -> None:
    assert next_window(plane((0, 480, 32, 32)), WHOLE, 12) == Window(0, 20, 12, 12)


def test_an_object_that_fills_the_frame_is_looked_for_everywhere() -> None:
    assert next_window(plane((64, 64, 256, 320)), Window(2, 2, 12, 12), 12) == WHOLE


def test_a_speckle_does_not_widen_the_window_and_anything_larger_does() -> None:
    object_ = (160, 240, 32, 32)
    alone = next_window(plane(object_), WHOLE, 12)
    assert alone == Window(5, 10, 12, 12)
    assert next_window(plane(object_, (0, 0, 1, 3)), WHOLE, 12) == alone
    assert next_window(plane(object_, (160, 144, 2, 2)), WHOLE, 12) == Window(5, 5, 12, 16)


def test_what_may_be_the_object_counts() -> None:
    assert next_window(plane((160, 240, 32, 32), value=0.3), WHOLE, 12) != WHOLE
    assert next_window(plane((160, 240, 32, 32), value=0.1), WHOLE, 12) == replace(WHOLE, lost=1)


def test_the_window_of_an_object_out_of_sight_grows_to_the_whole_frame() -> None:
    window, sizes = Window(12, 20, 12, 12), []
    while window != WHOLE:
        window = next_window(plane(), window, 12)
        sizes.append(window.size)
        assert len(sizes) < 20
    assert sizes[:2] == [(14, 14), (16, 16)]


def test_an_object_that_is_not_found_on_the_whole_frame_is_lost_until_it_is_seen() -> None:
    nowhere, grown = plane(), next_window(plane(), Window(0, 0, 22, 30), 12)
    assert grown == WHOLE  # it was not looked for everywhere yet
    lost = next_window(nowhere, grown, 12)
    assert lost == replace(WHOLE, lost=1)
    assert next_window(nowhere, lost, 12) == replace(WHOLE, lost=2)
    assert not next_window(plane((160, 240, 32, 32)), lost, 12).lost
    assert next_window(plane((0, 0, 384, 512)), lost, 12) == WHOLE  # it fills the frame
    assert [Window.from_json(w.to_json()) for w in (grown, lost)] == [grown, lost]
    assert Window.from_json([1, 2, 3, 4]) == Window(1, 2, 3, 4)  # of a state from before


def test_what_is_counted_of_a_lost_object_has_an_end() -> None:
    lost = WHOLE
    for _ in range(100):
        lost = next_window(plane(), lost, 12)
    assert lost == replace(WHOLE, lost=30)


def test_lost_objects_take_turns() -> None:
    ids = (3, 4, 5, 8)
    windows = {i: replace(WHOLE, lost=29 * (i != 8)) for i in ids}
    looked = [looked_for(windows, ids, time) for time in range(6)]
    assert all(3 in places for places in looked)  # the one that is not lost
    assert [sum(k in places for places in looked) for k in range(3)] == [2, 2, 2]
    assert [len(places) for places in looked] == [2] * 6
    assert looked[:3] == looked[3:]
    assert looked_for({}, ids, 1) == [0, 1, 2, 3]


def test_what_is_lost_for_long_is_looked_for_less_often() -> None:
    ids = (3, 4, 5, 8)
    windows = {i: replace(WHOLE, lost=30) for i in ids}
    looked = [looked_for(windows, ids, time) for time in range(12)]
    assert [sum(k in places for places in looked) for k in range(4)] == [2, 2, 2, 2]
    assert max(len(places) for places in looked) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 370), st.integers(0, 500), st.integers(8, 300), st.integers(8, 400), st.integers(4, 20))
def test_a_window_holds_its_object_and_lies_in_the_frame(
    top: int, left: int, height: int, width: int, least: int
) -> None:
    probability = plane((top, left, height, width))
    window = next_window(probability, WHOLE, least)
    assert 0 <= window.top <= window.top + window.height <= GRID[0]
    assert 0 <= window.left <= window.left + window.width <= GRID[1]
    assert window.height >= min(least, GRID[0])
    assert window.width >= min(least, GRID[1])
    # All of it, but for a rim too thin to count in its cells.
    assert window.cut(probability, STRIDE).sum() >= 0.8 * probability.sum()


def test_a_cut_is_the_windows_part_at_every_scale() -> None:
    image = torch.arange(8 * 12).view(1, 8, 12)
    assert Window(1, 2, 2, 3).cut(image[:, ::2, ::2], 1).tolist() == image[:, 2:6:2, 4:10:2].tolist()
    assert Window(1, 2, 2, 3).cut(image, 2).tolist() == image[:, 2:6, 4:10].tolist()


def test_the_cells_of_any_window_in_order() -> None:
    assert covered([Window(0, 0, 2, 2), Window(1, 1, 1, 2)], (3, 4)).tolist() == [0, 1, 4, 5, 6]


# --- decoding ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> XMem:
    return small_model()


@pytest.fixture(scope="module")
def inputs(model: XMem) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Features of an image of 8 x 10 cells, with readouts and sensory memories of three objects."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scales = model.encode_key(torch.randn(1, 3, 8 * STRIDE, 10 * STRIDE, generator=g)).scales
    read = torch.randn(3, SMALL.value_dim, 8, 10, generator=g)
    return scales, read, torch.randn(3, SMALL.hidden_dim, 8, 10, generator=g)


def decoded(model: XMem, *given: Any, update_hidden: bool) -> tuple[Tensor | None, Tensor]:
    work = windows.decode_in_windows(*given, update_hidden=update_hidden)
    return Caller(model, nullcontext, {}).alone(work)


@torch.no_grad()
def test_windows_of_the_whole_frame_change_nothing(
    model: XMem, inputs: tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]
) -> None:
    scales, read, hidden = inputs
    expected_hidden, logits = model.decode(scales, read[None], hidden[None])
    got = decoded(model, scales, read, hidden, dict.fromkeys(range(3), whole((8, 10))), update_hidden=True)
    assert got[0] is not None
    assert expected_hidden is not None
    torch.testing.assert_close(got[0], expected_hidden[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], torch.sigmoid(logits)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("update", [True, False])
def test_each_object_is_decoded_as_if_its_window_were_the_image(
    model: XMem, inputs: tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor], update: bool
) -> None:
    scales, read, hidden = inputs
    windows = [Window(1, 2, 4, 6), Window(0, 0, 8, 10), Window(4, 4, 4, 6)]  # two of them of one size
    before = hidden.clone()
    looked = dict(enumerate(windows))
    renewed, found = decoded(model, scales, read, hidden, looked, update_hidden=update)
    assert renewed is not None
    assert torch.equal(hidden, before)
    for k, window in enumerate(windows):
        f16, f8, f4 = (window.cut(f, s) for f, s in zip(scales, (1, 2, 4), strict=True))
        own, sensed = window.cut(read[k])[None, None], window.cut(hidden[k])[None, None]
        after, logits = model.decode((f16, f8, f4), own, sensed, update_hidden=update)
        assert after is not None
        inside = window.cut(found[k], STRIDE)
        torch.testing.assert_close(inside, torch.sigmoid(logits)[0, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(window.cut(renewed[k]), after[0, 0], rtol=1e-4, atol=1e-5)
        assert found[k].count_nonzero() == inside.count_nonzero()
        outside = renewed[k] - hidden[k]
        window.cut(outside).fill_(0)
        assert outside.count_nonzero() == 0


@torch.no_grad()
def test_without_sensory_memory_too() -> None:
    model = small_model(replace(SMALL, hidden_dim=0))
    scales = model.encode_key(torch.zeros(1, 3, 96, 96)).scales
    read = torch.randn(1, SMALL.value_dim, 6, 6)
    renewed, found = decoded(model, scales, read, None, {0: Window(1, 1, 4, 4)}, update_hidden=True)
    assert renewed is None
    assert found.shape == (1, 96, 96)


# --- tracking ------------------------------------------------------------------------------------------


def prompt() -> Prompt:
    return Prompt({1: square(HEIGHT, WIDTH, 20, 24, 40), 7: square(HEIGHT, WIDTH, 120, 190, 30)})


def track(
    memory: MemoryConfig, frames: int, *, through_bytes: bool = False
) -> tuple[TrackerState, list[tuple[bytes, Tensor]]]:
    segmenter = VideoSegmenter(small_model(), memory)
    state, seen = segmenter.new_state(), []
    for t in range(frames):
        if through_bytes:
            state = TrackerState.from_bytes(state.to_bytes())
        result = segmenter.step(state, frame_at(t, HEIGHT, WIDTH), prompt() if t == 0 else None)
        seen.append((result.network_probabilities.numpy().tobytes(), result.network_probabilities))
    return state, seen


def test_a_window_larger_than_the_frame_is_tracking_on_the_whole_frame() -> None:
    _, everywhere = track(SMALL_MEMORY, 5)
    state, windowed = track(replace(SMALL_MEMORY, search_window=256), 5)
    assert set(state.windows.values()) == {whole((HEIGHT // STRIDE, WIDTH // STRIDE))}
    for (_, a), (_, b) in zip(everywhere, windowed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_outside_its_window_an_object_is_not_found() -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, search_window=64))
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0, HEIGHT, WIDTH), prompt())
    windows = dict(state.windows)
    assert windows[1] != windows[7]
    result = segmenter.step(state, frame_at(1, HEIGHT, WIDTH))
    for k, i in enumerate((1, 7), 1):
        inside = windows[i].cut(result.network_probabilities[k], STRIDE)
        assert inside.max() > 1e-3
        assert (result.network_probabilities[k] > 1e-5).sum() == (inside > 1e-5).sum()


def test_only_windows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, search_window=64))
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0, HEIGHT, WIDTH), Prompt({7: square(HEIGHT, WIDTH, 120, 190, 30)}))
    cells = covered(state.windows.values(), (HEIGHT // STRIDE, WIDTH // STRIDE))
    assert isinstance(state.memory, Memory)
    read, asked = state.memory.read, []

    def spy(key: Tensor, selection: Tensor, **how: Any) -> Tensor:
        asked.append(key.shape[1])
        return read(key, selection, **how)

    monkeypatch.setattr(state.memory, "read", spy)
    segmenter.step(state, frame_at(1, HEIGHT, WIDTH))
    assert asked == [len(cells)]
    assert len(cells) < HEIGHT * WIDTH // STRIDE**2


def test_a_lost_object_rests_and_is_looked_for_everywhere_in_turn() -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, search_window=64, mem_every=100))
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0, HEIGHT, WIDTH), prompt())
    grid = (HEIGHT // STRIDE, WIDTH // STRIDE)
    lost = replace(whole(grid), lost=1)
    for t in range(1, 7):
        state.windows[7] = lost
        assert state.hidden is not None
        before, own = state.hidden.clone(), state.windows[1]
        result = segmenter.step(state, frame_at(t, HEIGHT, WIDTH))
        rests = (t + 7) % 3 != 0
        assert (result.network_probabilities[2].max() < 1e-5) == rests
        assert torch.equal(state.hidden[1], before[1]) == rests
        assert not torch.equal(state.hidden[0], before[0])
        if rests:
            assert state.windows[7] == replace(lost, lost=2)
        assert own != whole(grid)


def test_where_every_object_rests_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = VideoSegmenter(small_model(), replace(SMALL_MEMORY, search_window=64, mem_every=100))
    state = segmenter.new_state()
    segmenter.step(state, frame_at(0, HEIGHT, WIDTH), Prompt({7: square(HEIGHT, WIDTH, 120, 190, 30)}))
    state.windows[7] = replace(whole((HEIGHT // STRIDE, WIDTH // STRIDE)), lost=1)
    monkeypatch.setattr(state.memory, "read", None)
    result = segmenter.step(state, frame_at(1, HEIGHT, WIDTH))
    assert not bool(result.label_map.any())
    assert result.object_ids == (7,)


@pytest.mark.slow
def test_windows_survive_as_bytes() -> None:
    memory = replace(SMALL_MEMORY, search_window=64)
    state, seen = track(memory, 12)
    again, seen_again = track(memory, 12, through_bytes=True)
    assert [b for b, _ in seen] == [b for b, _ in seen_again]
    assert again.windows == state.windows
    assert again.to_bytes() == state.to_bytes()


def test_a_removed_objects_window_goes_with_it() -> None:
    state, _ = track(replace(SMALL_MEMORY, search_window=64), 2)
    state.remove_objects([1])
    assert set(state.windows) == {7}


def test_a_model_may_have_a_window_of_its_own() -> None:
    model = small_model()
    plain = VideoSegmenter(model, SMALL_MEMORY)
    model.config = replace(model.config, default_search_window=64)
    assert VideoSegmenter(model, SMALL_MEMORY).memory_config == replace(SMALL_MEMORY, search_window=64)
    for window in (0, 96):
        memory = replace(SMALL_MEMORY, search_window=window)
        assert VideoSegmenter(model, memory).memory_config == memory
    # How it is used by default is no part of which model it is.
    assert VideoSegmenter(model).fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match="search_window=10"):
        replace(model.config, default_search_window=10)


def test_no_window_is_the_whole_frame() -> None:
    model = small_model()
    model.config = replace(model.config, default_search_window=64)
    segmenter = VideoSegmenter(model, replace(SMALL_MEMORY, search_window=0))
    state = segmenter.new_state()
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)
    segmenter.step(state, frame, Prompt({1: np.eye(160, dtype=bool)}))
    assert state.windows == {}


@pytest.mark.parametrize("value", [-1, 1, 63, 64.0, True])
def test_a_search_window_has_a_least_size(value: object) -> None:
    with pytest.raises(ValueError, match="search_window"):
        MemoryConfig(search_window=value)  # type: ignore[arg-type]


def test_the_union_of_windows_holds_them_and_no_more() -> None:
    assert union([Window(2, 3, 4, 5), Window(1, 6, 2, 7)]) == Window(1, 3, 5, 10)
    assert union([]).size == (0, 0)


@pytest.mark.parametrize("objects", [1, 3])
def test_aggregation_within_a_window_is_that_of_the_frame(objects: int) -> None:
    window = Window(1, 2, 2, 3)
    probabilities = torch.zeros(objects, 5 * STRIDE, 7 * STRIDE)
    generator = torch.Generator().manual_seed(0)
    part = window.cut(probabilities, STRIDE)
    part.copy_(torch.rand(part.shape, generator=generator))
    own = aggregated_within(probabilities, window)
    everywhere = torch.softmax(aggregate(probabilities.unsqueeze(0)), 1)[0]
    assert torch.allclose(own, everywhere, rtol=1e-6, atol=1e-7)
    assert torch.allclose(
        aggregated_within(torch.zeros_like(probabilities), union([])),
        torch.softmax(aggregate(torch.zeros_like(probabilities).unsqueeze(0)), 1)[0],
        rtol=1e-6,
        atol=1e-7,
    )


class Sizes(TorchDispatchMode):
    """Notes how many elements the results of operations have that are in new memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            given = {
                x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
            }
            if out.untyped_storage().data_ptr() not in given:
                self.found.append(out.numel())
        return out


def test_aggregation_takes_no_memory_but_for_its_result_and_changes_no_bit() -> None:
    window = Window(1, 2, 7, 5)
    probabilities = torch.zeros(4, 9 * STRIDE, 8 * STRIDE)
    part = window.cut(probabilities, STRIDE)
    part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(0)))
    with Sizes() as sizes:
        own = aggregated_within(probabilities, window)
    at_once = torch.softmax(aggregate(part.unsqueeze(0)), 1)[0]
    assert torch.equal(window.cut(own, STRIDE), at_once)
    *others, result = sorted(sizes.found)
    assert result == own.numel()
    assert max(others) <= at_once.numel() / 3


@pytest.mark.parametrize("seed", range(6))
def test_cells_of_an_object_are_those_with_enough_probable_pixels(seed: int) -> None:
    """The window is the same as from all cells of the frame, although only a part is looked at."""
    generator = torch.Generator().manual_seed(seed)
    grid = (12, 17)
    probability = torch.zeros(grid[0] * STRIDE, grid[1] * STRIDE)
    top, left = (int(torch.randint(0, n * STRIDE - 30, (), generator=generator)) for n in grid)
    probability[top : top + 30, left : left + 25] = torch.rand(30, 25, generator=generator)
    probability[3, 5] = probability[-1, -1] = 1  # single pixels do not count
    counts = (probability > 0.2).view(grid[0], STRIDE, grid[1], STRIDE).sum((1, 3))
    cells = counts >= 4
    rows, columns = cells.any(1).nonzero().flatten().tolist(), cells.any(0).nonzero().flatten().tolist()
    window = next_window(probability, whole(grid), 2)
    assert window.top <= rows[0]
    assert window.top + window.height > rows[-1]
    assert window.left <= columns[0]
    assert window.left + window.width > columns[-1]
    # A margin of four cells on each side, limited by the frame and rounded up to two.
    assert window.height <= min(grid[0], rows[-1] + 1 - rows[0] + 8 + 1)
    assert window.width <= min(grid[1], columns[-1] + 1 - columns[0] + 8 + 1)
