"""A hub's bookkeeping of a stream: retries, times, and distrusted requests."""

from __future__ import annotations

import pytest
from support.small_net import SMALL_MEMORY, small_model

from pipeline.base.errors import StoreError, UsageError
from pipeline.live.hub.settings import HubSettings
from pipeline.live.hub.stream import HubStream
from pipeline.live.spec import LiveSettings, LiveSpec
from xmem_core import VideoSegmenter


@pytest.fixture(scope="module")
def segmenter() -> VideoSegmenter:
    return VideoSegmenter(small_model(), SMALL_MEMORY)


def stream_of(segmenter: VideoSegmenter, **settings: int) -> HubStream:
    spec = LiveSpec("cam", "fake://cam", settings=LiveSettings.from_dict(settings))
    return HubStream.of(spec, HubSettings("out", first_backoff_seconds=2), segmenter)


def test_a_size_of_its_own_shares_the_weights(segmenter: VideoSegmenter) -> None:
    assert stream_of(segmenter).segmenter is segmenter
    own = stream_of(segmenter, size=64).segmenter
    assert own.size == 64 != segmenter.size
    assert vars(own) == vars(segmenter) | {"size": 64}  # modules are equal only to themselves


def test_it_is_tried_again_later_if_there_is_hope(segmenter: VideoSegmenter) -> None:
    stream = stream_of(segmenter)
    assert stream.may_open(0.0)
    assert stream.failed(StoreError("the disk is full"), 10.0).message == "the disk is full"
    assert not stream.may_open(10.9)
    assert stream.may_open(12.0)
    stream.failed(UsageError("it never will"), 12.0)
    assert not stream.may_open(1e9)
    assert stream.failures == 2


def test_failures_are_forgotten_once_it_is_stable(segmenter: VideoSegmenter) -> None:
    stream = stream_of(segmenter)
    stream.failed(StoreError("the disk is full"), 0.0)
    stream.opened_at = 5.0
    for _ in range(2):  # a first frame may take much longer than those after it
        stream.tracked(5000.0, 34.0)
    unmeasured: float | None = stream.ms_per_frame
    assert unmeasured is None
    stream.tracked(100.0, 35.0)
    assert (stream.ms_per_frame, stream.failures, stream.backoff.tries) == (100.0, 1, 1)
    stream.tracked(200.0, 35.1)
    assert stream.ms_per_frame == pytest.approx(105.0)
    assert (stream.failures, stream.backoff.tries) == (0, 0)
    assert stream.failure is not None


def test_a_request_is_distrusted_at_its_third_failure(segmenter: VideoSegmenter) -> None:
    stream = stream_of(segmenter)
    stream.suspect((4,), "RuntimeError: one")
    stream.suspect((4, 5), "RuntimeError: two")
    assert not stream.distrusted
    stream.suspect((4, 5), "RuntimeError: three")
    assert stream.distrusted == {
        4: "tracking failed 3 times on the frame that it came in at, last with RuntimeError: three"
    }
