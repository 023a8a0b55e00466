"""Read-ahead: correct bytes, few requests when in order, little waste when out of order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import read_ahead
from pipeline.storage.read_ahead import KEPT, LEAST_BYTES, ReadAhead

DATA = bytes(i * 7 % 251 for i in range(1000))


class Fetches:
    """Returns bytes of a file and records which; fails where specified."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.spans: list[tuple[int, int]] = []
        self.failures = 0

    def __call__(self, start: int, end: int) -> bytes:
        assert 0 <= start < end <= len(self.data)
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError("reset")
        self.spans.append((start, end))
        return self.data[start:end]


@given(
    st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 400), st.booleans()), max_size=40),
    st.integers(1, 300),
    st.integers(1, 64),
)
def test_it_gives_the_files_bytes_whatever_was_read_before(
    reads: list[tuple[int, int, bool]], most: int, least: int
) -> None:
    fetches = Fetches(DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "LEAST_BYTES", least)
        cache = ReadAhead(fetches, len(DATA), most)
        for start, length, fails in reads:
            expected = DATA[start : start + length]
            fetches.failures = int(fails)
            try:
                assert cache.read(start, start + length) == expected
            except ConnectionResetError:
                assert cache.read(start, start + length) == expected
            fetches.failures = 0


def test_spans_double_in_order_and_begin_small_after_a_seek() -> None:
    size = 40 * LEAST_BYTES
    fetches = Fetches(bytes(size))
    cache = ReadAhead(fetches, size, 8 * LEAST_BYTES)
    for start in range(0, 22 * LEAST_BYTES, 10_000):
        assert len(cache.read(start, start + 10_000)) == 10_000
    assert [(end - start) // LEAST_BYTES for start, end in fetches.spans] == [1, 2, 4, 8, 8]
    cache.read(30 * LEAST_BYTES, 30 * LEAST_BYTES + 5)
    cache.read(31 * LEAST_BYTES, 31 * LEAST_BYTES + 5)
    assert [(end - start) // LEAST_BYTES for start, end in fetches.spans[5:]] == [1, 2]


def test_the_last_spans_are_kept_and_no_more() -> None:
    size = 100 * LEAST_BYTES
    fetches = Fetches(bytes(size))
    cache = ReadAhead(fetches, size, LEAST_BYTES)
    for i in range(KEPT):
        cache.read(20 * i * LEAST_BYTES, 20 * i * LEAST_BYTES + 9)
    for i in range(KEPT):
        cache.read(20 * i * LEAST_BYTES, 20 * i * LEAST_BYTES + 9)
    assert len(fetches.spans) == KEPT
    cache.read(90 * LEAST_BYTES, 90 * LEAST_BYTES + 9)
    cache.read(0, 9)
    assert len(fetches.spans) == KEPT + 2


def test_too_few_bytes_are_never_taken_for_all() -> None:
    cache = ReadAhead(lambda start, end: DATA[start : end - 1], len(DATA), 100)
    with pytest.raises(EOFError, match="received 99 bytes instead of 100"):
        cache.read(0, 10)
