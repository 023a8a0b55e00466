"""Ray Data stage: a class for `map_batches` that tracks a dataset's videos. Does not import Ray.

    ds = ray.data.from_items([{"uri": "s3://bucket/a.mp4", "prompts": "s3://bucket/a.prompts.json"}, ...])
    done = ds.map_batches(
        TrackVideos,
        fn_constructor_kwargs={"out": "s3://bucket/tracks", "device": "cuda"},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=8),   # or concurrency=(1, 8), before Ray 2.51
        num_gpus=1,
        batch_size=1,
    )
    done.write_parquet("s3://bucket/results")

Rows go to the output folder, as with `xmem batch`; the resulting dataset has one row per video. Batches of
one video balance the load best. A second run does what is unfinished: finished videos are only looked up. Ray
Data replaces a process or machine that dies, and its video continues from its last commit. `xmem batch`
additionally offers several videos in turns on one device, priorities, and setting aside a video that kills
its process every time.

`examples/ray_data.py` is a complete program.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.base.backoff import Backoff
from pipeline.base.errors import PromptError, UsageError
from pipeline.base.records import FrameChunk
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import generate_stream_id
from pipeline.distributed.messages import ChunkReport, StreamSpec, StreamStatus, WorkerSettings
from pipeline.distributed.worker import Worker
from pipeline.prompts.resolving import PromptSet
from pipeline.storage.failures import Failure

logger = logging.getLogger(__name__)

RESULT_COLUMNS = ("stream_id", "uri", "state", "frames", "rows", "losses", "seconds", "cause")
FINISHED = "finished"
FAILED = "failed"
_INPUT_COLUMNS = ("uri", "stream_id", "prompts")
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0


class TrackVideos:
    """Tracks the videos of a batch, one after another; the model is loaded once.

    A call takes a batch (a dict of columns of equal length) and returns one. Input columns:

    * `uri`: path or fsspec URI of a video or a folder of images.
    * `stream_id`: name in the output folder. Without the column, or if null or "": derived from the URI.
    * `prompts`: URI or path of a prompts file (.json) or of an index PNG, or the content of a prompts file,
      as JSON text or as a dict. Null or "": the prompts given for all videos.

    Output columns: the other columns of the batch, then `RESULT_COLUMNS`. `state` is "finished" or "failed".
    `frames`, `rows` and `losses` are totals of the video in the output folder; for a failed one, as far as
    this call knows them. `seconds` is the time that this call took. `cause` is a one-line reason if a video
    failed, otherwise "". No column has credentials; they are removed from `uri`.

    A failing video is reported in its row and does not raise. Temporary failures (storage, network) are
    retried.

    Args:
        out: output folder, path or fsspec URI.
        prompts: prompts for videos without their own, in any form that the column accepts.
        tries: maximum number of attempts per video.
        settings: any option of tracking by its name (model, device, threads, detect_every, mem_every, ...;
            see `pipeline.tracking.settings`), memory, storage_options, out_storage_options.

    Raises:
        UsageError: the settings are invalid, or a batch has no column `uri`. XmemError: the model cannot be
            loaded.
    """

    def __init__(self, out: str, *, prompts: Any = None, tries: int = 3, **settings: Any) -> None:
        if tries < 1:
            raise UsageError(f"tries={tries} is not allowed: at least 1")
        self._settings = WorkerSettings.of(out, **settings)
        self._prompts = _prompts(prompts)
        self._tries = tries
        self._worker = Worker(self._settings)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Track a batch; see the class. Returns when all its videos have finished or failed."""
        if "uri" not in batch:
            columns = ", ".join(batch) or "none"
            raise UsageError(f"the dataset has no column 'uri'; its columns are: {columns}")
        uris = batch["uri"]
        count = len(uris)
        ids = batch["stream_id"] if "stream_id" in batch else [None] * count
        prompts = batch["prompts"] if "prompts" in batch else [None] * count
        lines = [self._video(*given) for given in zip(uris, ids, prompts, strict=True)]
        results: dict[str, Any] = {
            name: column for name, column in batch.items() if name not in (*_INPUT_COLUMNS, *RESULT_COLUMNS)
        }
        for i, name in enumerate(RESULT_COLUMNS):
            results[name] = np.array([line[i] for line in lines], dtype=_TYPES[name])
        return results

    def _video(self, uri: Any, stream_id: Any, prompts: Any) -> tuple[Any, ...]:
        begun = time.monotonic()
        address = "" if _nothing(uri) else str(uri)
        shown = redacted(address)
        name = generate_stream_id(address) if _nothing(stream_id) else str(stream_id)
        status = StreamStatus(name)
        failure: Failure | None
        try:
            if not address:
                raise UsageError("a row has no uri: it must be a path or a URI such as s3://bucket/clip.mp4")
            wanted = self._prompts if _nothing(prompts) else _prompts(prompts)
            kind = "prompts_uri" if isinstance(wanted, str) else "prompts"
            status, failure = self._finish(StreamSpec(name, address, **{kind: wanted}))  # type: ignore[arg-type]
        except UsageError as error:
            failure = Failure.of(error)
        seconds = time.monotonic() - begun
        state, cause = (FINISHED, "") if failure is None else (FAILED, failure.message)
        if failure is not None:
            logger.warning("video %s: %s", shown, cause)
        frames = max(0, status.next_frame - status.offset)
        return status.stream_id, shown, state, frames, status.rows, status.losses, seconds, cause

    def _finish(self, spec: StreamSpec) -> tuple[StreamStatus, Failure | None]:
        """Track a video to its end, with several attempts if needed; returns its final status."""
        backoff = Backoff(_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS)
        status = StreamStatus(spec.stream_id)
        for tries in range(1, self._tries + 1):
            status, failure = self._try(spec, status)
            if failure is None or failure.permanent or tries == self._tries:
                break
            logger.warning("stream %s: try %d of %d: %s", spec.stream_id, tries, self._tries, failure.message)
            time.sleep(backoff.next_seconds())
        return status, failure

    def _try(self, spec: StreamSpec, before: StreamStatus) -> tuple[StreamStatus, Failure | None]:
        status = self._worker.open(spec)
        if status.failure is not None:
            return before, status.failure
        chunk = self._settings.tracking.commit.chunk_frames
        while not status.finished:
            first = status.next_frame
            report = self._worker.track(FrameChunk(spec.stream_id, first, first - first % chunk + chunk - 1))
            if report.outcome not in ("tracked", "finished"):
                self._worker.close(spec.stream_id)
                refused = Failure("XmemError", f"frame {first} is not the next frame here", permanent=False)
                return _later(status, report), report.failure or refused
            status = _later(status, report)
        return status, None


_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("stream_id", "uri", "state", "cause"), object),
    **dict.fromkeys(("frames", "rows", "losses"), np.int64),
    "seconds": np.float64,
}


def _later(status: StreamStatus, report: ChunkReport) -> StreamStatus:
    """Return the status of a stream after a chunk."""
    if report.outcome == "unknown":
        return status
    finished = report.outcome == "finished"
    return replace(
        status, next_frame=report.next_frame, rows=report.rows, losses=report.losses, finished=finished
    )


def _prompts(given: Any) -> str | Mapping[str, Any] | None:
    """Return a URI, or the content of a prompts file, checked; None if there are no prompts."""
    if _nothing(given):
        return None
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        return given
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise PromptError(f"prompts {given[:40]!r}... are not JSON: {error}") from error
    if not isinstance(given, Mapping):
        raise PromptError(f"prompts of type {type(given).__name__}: give a URI, JSON text or a dict")
    content: Mapping[str, Any] = _without_nulls(given)
    PromptSet.from_record(content)
    return content


def _without_nulls(value: Any) -> Any:
    """Undo Arrow's conversion: it adds absent fields as nulls and turns lists into arrays."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nulls(v) for v in value]
    return value


def _nothing(value: Any) -> bool:
    """Whether a value is null, in any form that a column may have it, or an empty text."""
    return value is None or value == "" or (isinstance(value, float | np.floating) and math.isnan(value))
