"""Executor: owns a segmenter and advances one or several streams; `track` processes a whole video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.tracking.files.stream_tracker import StepInput, StreamSummary, StreamTracker
from pipeline.tracking.look_ahead import help_steps, threads_of_step
from pipeline.tracking.settings import AUTO, DTYPES, ModelSettings
from pipeline.tracks.store import StreamStore
from xmem_core import StepResult, VideoSegmenter

OnFrame = Callable[[StreamTracker], None]


class Executor:
    """Runs streams on one device in this process.

    Args:
        segmenter: shared by all streams.
        threads: CPU threads that a stream may use; those of a step are set for the whole process.
    """

    def __init__(self, segmenter: VideoSegmenter, threads: int | None = None) -> None:
        self.segmenter = segmenter
        if threads is not None:
            torch.set_num_threads(threads_of_step(segmenter, threads))
            help_steps(segmenter, threads)

    def advance(self, streams: Sequence[StreamTracker]) -> list[StreamTracker]:
        """Track one frame of every stream; return the streams that have not ended.

        Raises the error of the first stream that fails. The other streams are unaffected: call again without
        the failed stream to continue them. The failed stream would raise the same error again.
        """
        inputs = [(stream, step) for stream in streams if (step := stream.next_input()) is not None]
        results = self.segmenter.step_many([(s.state, s.image, s.prompt) for _, s in inputs])
        failure: Exception | None = None
        for (stream, _), result in zip(inputs, results, strict=True):
            try:
                stream.accept(result)
            except Exception as error:
                # The step has advanced all states by a frame, so every stream must accept its result.
                failure = failure or error
        if failure is not None:
            raise failure
        return [stream for stream, _ in inputs]

    def run(self, stream: StreamTracker, on_frame: OnFrame | None = None) -> StreamSummary:
        """Track one stream to its end."""
        while self.advance([stream]):
            if on_frame is not None:
                on_frame(stream)
        return stream.summary


def step_inputs(segmenter: VideoSegmenter, inputs: Sequence[StepInput]) -> list[StepResult | Exception]:
    """Step several streams of one segmenter, together where it batches them; errors stay each stream's own.

    Returns:
        of each stream its result or its error. On a GPU, what rows are made of is on its way for all of them,
        before the rows of the first wait for it.
    """
    steps = [(step.state, step.image, step.prompt) for step in inputs]
    outcomes: list[StepResult | Exception]
    try:
        outcomes = [segmenter.step(*steps[0])] if len(steps) == 1 else segmenter.step_each(steps)
    except Exception as error:
        outcomes = [error] * len(steps)
    for outcome in outcomes:
        if isinstance(outcome, StepResult):
            outcome.begin_runs()
    return outcomes


@dataclass(frozen=True)
class Begun:
    """Settings of a stream's first run that later runs keep by default; None: the stream is new."""

    threads: int | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Begun:
        """Read them from the settings of a stream record."""
        threads, dtype = settings.get("threads"), settings.get("dtype")
        return cls(
            threads if type(threads) is int and threads > 0 else None, dtype if dtype in DTYPES else None
        )

    def keep(self, model: ModelSettings, *, threads: bool = False) -> ModelSettings:
        """Return model settings in which options left open have the values of the first run.

        Args:
            threads: keep the stream's number of threads even if the settings name another.
        """
        dtype = self.dtype if model.dtype == AUTO and self.dtype is not None else model.dtype
        number = self.threads or model.threads if threads else model.threads or self.threads
        return replace(model, dtype=dtype, threads=number)


def begun_with(store: StreamStore) -> Begun:
    """Return the thread count and precision of a stream's first run."""
    settings = (store.read_record() or {}).get("settings")
    return Begun.of(settings) if isinstance(settings, dict) else Begun()
