"""10,000 frames as a batch tracks them: the process is as large at the end as when memory was full."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import long_video


def test_figures_compare_the_end_with_the_time_when_memory_was_full() -> None:
    chunks = [(n, 1.0 + (n > 9100), 10**8 + 10**6 * (n > 9100)) for n in range(100, 10_101, 100)]
    found = long_video.figures(chunks)
    assert (found["time_ratio"], found["memory_ratio"]) == (2.0, 1.01)
    assert (found["early_ms"], found["frames"]) == (10.0, 10_100)


@pytest.mark.soak
def test_ten_thousand_frames_take_no_more_memory_at_the_end() -> None:
    found = long_video.measure(10_100, threads=2)
    assert found["memory_ratio"] < 1.02, found
