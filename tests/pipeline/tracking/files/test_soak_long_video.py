"""10,000 frames in a batch: the process does not grow after memory is full."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import long_video


def test_figures_compare_the_end_with_the_time_when_memory_was_full() -> None:
    seconds = [(0.01, 0.02)] * 9 + [(0.01, 0.5)]
    found = long_video.figures(seconds, [10**8] * 10, [10**8 + 10**6] * 10)
    assert (found["time_ratio"], found["memory_ratio"]) == (2.0, 1.01)
    assert (found["early_ms"], found["late_ms"]) == (10.0, 20.0)


def test_too_short_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3900 frames are too few to compare: at least 4000"):
        long_video.course(tmp_path / "none.mp4", 3900, tmp_path, {}, threads=1)


@pytest.mark.soak
def test_ten_thousand_frames_take_no_more_memory_at_the_end() -> None:
    found = long_video.measure(10_000, threads=2)
    assert found["memory_ratio"] < 1.02, found
