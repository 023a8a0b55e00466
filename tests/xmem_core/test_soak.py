"""An endless stream: memory stays within its caps, and the process does not grow."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import pytest
from support.measured import resident_bytes
from support.small_net import frame_at, small_model, square

from xmem_core import MemoryConfig, Prompt, TrackerState, VideoSegmenter
from xmem_core.memory import Memory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
logger = logging.getLogger(__name__)

HEIGHT, WIDTH = 64, 96
POSITIONS = (HEIGHT // 16) * (WIDTH // 16)
# The published rhythm, with caps that a short run reaches too.
CONFIG = MemoryConfig(mem_every=5, num_prototypes=16, max_long_term_elements=200, max_permanent_frames=3)
LATE = {40: 2, 90: 3, 160: 4}  # frame -> object that appears
REMOVED = {130: 2}
SNAPSHOT_EVERY = 500


@dataclass
class Course:
    """Results of a run."""

    resident: dict[int, int]  # frame -> bytes
    seconds: list[float]
    most: tuple[int, int]
    allocated: set[int]
    state: TrackerState


def run(frames: int) -> Course:
    segmenter = VideoSegmenter(small_model(), CONFIG)
    state = segmenter.new_state()
    course = Course({}, [], (0, 0), set(), state)
    for t in range(frames):
        prompt = None
        if t == 0:
            prompt = Prompt({1: square(HEIGHT, WIDTH, 4, 4, 20)})
        elif t in LATE:
            prompt = Prompt({LATE[t]: square(HEIGHT, WIDTH, 30, t % 60, 16)})
        if t in REMOVED:
            state.remove_objects([REMOVED[t]])
        if t and t % SNAPSHOT_EVERY == 0:
            state = TrackerState.from_bytes(state.to_bytes())
        frame = frame_at(t, HEIGHT, WIDTH)
        start = time.perf_counter()
        result = segmenter.step(state, frame, prompt)
        result.label_map.max()
        course.seconds.append(time.perf_counter() - start)
        memory = state.memory
        assert isinstance(memory, Memory)
        assert memory.working.size <= (CONFIG.max_mid_term_frames or 0) * POSITIONS
        assert memory.permanent.size <= (CONFIG.max_permanent_frames - 1) * POSITIONS
        assert memory.long_term.size <= CONFIG.max_long_term_elements
        course.most = (max(course.most[0], memory.sizes[0]), max(course.most[1], memory.sizes[1]))
        if t > max(LATE):
            course.allocated.add(memory.nbytes)
        if t % 1000 == 999:
            course.resident[t + 1] = resident_bytes()
    course.state = state
    return course


def check(course: Course) -> None:
    assert len(course.allocated) == 1
    # Long-term memory was full: eviction went on all the time, up to one consolidation below the cap.
    assert course.most[1] > CONFIG.max_long_term_elements - CONFIG.num_prototypes
    assert course.most[0] > CONFIG.min_mid_term_frames * POSITIONS
    assert course.state.object_ids == (1, 3, 4)
    assert course.state.memory is not None
    assert len(course.state.memory.permanent_frames) == CONFIG.max_permanent_frames - 1


def test_three_hundred_and_more_frames_stay_within_the_caps() -> None:
    check(run(400))


@pytest.mark.soak
def test_ten_thousand_frames_cost_no_more_than_two_thousand() -> None:
    course = run(10_000)
    check(course)

    def milliseconds(first: int, last: int) -> float:
        return 1000 * sorted(course.seconds[first:last])[(last - first) // 2]

    logger.info("resident MB: %s", {t: round(b / 1e6, 1) for t, b in course.resident.items()})
    logger.info(
        "median ms per frame: %.2f over frames 2000-3000, %.2f over the last 1000",
        milliseconds(2000, 3000),
        milliseconds(9000, 10_000),
    )
    logger.info("most elements: %s, memory %.2f MB", course.most, course.state.memory.nbytes / 1e6)  # type: ignore[union-attr]
    assert course.resident[10_000] <= 1.02 * course.resident[2000]
