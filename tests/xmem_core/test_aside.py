"""A step whose parts are shared with another thread gives the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic

import pytest
import torch
from support.beside import Beside
from support.small_net import SMALL_MEMORY, small_model, square
from support.threads import torch_threads

from xmem_core import MemoryConfig, Prompt, VideoSegmenter
from xmem_core.aside import each, helper, shared_with


def test_results_are_in_order_and_both_threads_work() -> None:
    met = threading.Barrier(2, timeout=30)

    def name() -> str:
        met.wait()
        return threading.current_thread().name

    with ThreadPoolExecutor(1, "beside") as pool:
        assert each([name, name], pool) == ["MainThread", "beside_0"]
        assert each([partial(pow, 2, n) for n in range(9)], pool) == [2**n for n in range(9)]
    assert each([partial(pow, 2, n) for n in range(9)], None) == [2**n for n in range(9)]


def test_a_busy_thread_is_not_waited_for_and_calls_may_be_divided_again() -> None:
    free = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(free.wait)
        names = each([lambda: threading.current_thread().name] * 5, pool)
        free.set()
        assert names == ["MainThread"] * 5

        def divided(n: int) -> list[int]:
            return each([partial(int, n), partial(int, n + 1)], pool)

        began = monotonic()
        assert each([partial(divided, n) for n in range(4)], pool) == [[n, n + 1] for n in range(4)]
        assert monotonic() - began < 30


def test_an_error_is_raised_once_nothing_runs_any_more() -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        threading.Event().wait(0.2)
        ended.set()

    def fails() -> None:
        assert begun.wait(30)
        raise LookupError("of a part")

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(LookupError, match="of a part"):
            each([fails, slow], pool)
        assert ended.is_set()
        with pytest.raises(LookupError, match="of a part"):
            each([begun.set, fails], pool)


def test_the_other_thread_computes_without_gradients_and_under_the_same_autocast() -> None:
    def seen() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.no_grad():
        assert each([seen] * 3, Beside()) == [(False, False)] * 3
        with torch.autocast("cpu", torch.bfloat16):
            assert each([seen] * 3, Beside()) == [(False, True)] * 3


def test_a_helper_is_the_threads_own_as_far_as_a_block_goes() -> None:
    beside = Beside()
    with shared_with(beside):
        assert helper() is beside
        with shared_with(None):
            assert helper() is None
        assert helper() is beside
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(helper).result() is None
    assert helper() is None


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 64), (torch.float32, 0), (torch.bfloat16, 64)])
def test_states_are_equal_to_the_bit(
    dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of queries, windows, and objects are shared."""
    monkeypatch.setattr("xmem_core.attention._CPU_BLOCK", 16)
    monkeypatch.setattr("xmem_core.aside._LEAST_ENTRY", 0)
    settings = MemoryConfig(**{**SMALL_MEMORY.__dict__, "search_window": window})
    made: Callable[[], VideoSegmenter] = partial(
        VideoSegmenter, small_model(), settings, size=None, dtype=dtype
    )
    masks = {n: square(160, 192, 16 + 40 * n, 8 + 50 * n, 24 + 12 * n).astype(bool) for n in (1, 2)}
    masks[3] = square(160, 192, 4, 140, 20)
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (7, 160, 192, 3), dtype=torch.uint8)
    with torch_threads(1):
        alone, shared = made(), made()
        shared.aside = beside = Beside()
        states = alone.new_state(), shared.new_state()
        for at, frame in enumerate(frames):
            prompt = None if at else Prompt(masks)
            own, other = (s.step(t, frame, prompt) for s, t in zip((alone, shared), states, strict=True))
            assert torch.equal(own.network_probabilities, other.network_probabilities)
    assert states[0].to_bytes() == states[1].to_bytes()
    assert beside.done > 10
