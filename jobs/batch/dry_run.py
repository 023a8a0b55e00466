"""`xmem batch --dry-run`: what a batch would do, without doing it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jobs.batch.durations import duration
from jobs.batch.listing import Skipped
from jobs.batch.report import FOLDER
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import StoreError, XmemError
from pipeline.base.redaction import redacted
from pipeline.distributed.messages import WorkerSettings
from pipeline.prompts.resolving import PromptSet, load_mask_png, load_prompts
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracking.files.backward import BackwardPlan
from pipeline.tracking.settings import BACKWARD
from pipeline.tracking.stream_record import FINISHED
from pipeline.tracks.layout import load_record
from pipeline.video.sources import open_source

_MOST_OPENED = 200
_THREADS = 16
_MOST_LISTED = 50


@dataclass
class Forecast:
    """Forecast of a batch.

    Args:
        videos, finished, begun: number of all videos, of finished ones, and of unfinished ones begun before.
        prompts: number of videos by source of their prompts.
        opened: number of videos that were opened as a check.
        frames: estimated frames to track in this run; None: unknown.
        frames_per_second: speed in the newest report in the output folder, which `measured_by` names.
        skipped: files that are not videos.
        wrong: errors found, a line each.
    """

    videos: int = 0
    finished: int = 0
    begun: int = 0
    prompts: Counter[str] = field(default_factory=Counter)
    opened: int = 0
    frames: int | None = None
    frames_per_second: float | None = None
    measured_by: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The forecast as text lines."""
        left = self.videos - self.finished
        lines = [
            f"{self.videos} videos: {left} to track ({self.begun} begun before), {self.finished} finished"
        ]
        lines.append(
            "prompts: " + (", ".join(f"{n} {what}" for what, n in self.prompts.most_common()) or "none")
        )
        if self.frames is not None:
            sample = "" if self.opened >= left else f", by {self.opened} videos that were opened"
            lines.append(f"frames: about {self.frames} to track{sample}")
            if self.frames_per_second:
                time = duration(self.frames / self.frames_per_second)
                rate = f"{self.frames_per_second:.1f} frames/s"
                lines.append(f"time: about {time} at {rate}, as in {redacted(self.measured_by)}")
            else:
                lines.append("time: unknown; no earlier report in the output folder gives the speed")
        if self.skipped.count:
            lines.append(str(self.skipped))
        lines += [f"wrong: {redacted(text)}" for text in self.wrong[:_MOST_LISTED]]
        if len(self.wrong) > _MOST_LISTED:
            lines.append(f"... and {len(self.wrong) - _MOST_LISTED} more errors")
        return lines


def forecast(
    jobs: Sequence[VideoJob],
    settings: WorkerSettings,
    *,
    errors: Sequence[str] = (),
    skipped: Skipped | None = None,
) -> Forecast:
    """Forecast a batch of these videos. Nothing is written; if there are many, only some are opened.

    Args:
        errors: errors in the manifest.

    Raises:
        StoreError: the output folder cannot be read.
    """
    found = Forecast(len(jobs), skipped=skipped or Skipped(), wrong=list(errors))
    files = open_files(settings.out, settings.out_storage_options)
    there = set(files.names("streams"))
    left: list[tuple[VideoJob, int]] = []
    for job, record in zip(jobs, _each(lambda job: _record(files, there, job), jobs), strict=True):
        if record.get("state") == FINISHED:
            found.finished += 1
            continue
        done = int(record.get("frames") or 0)
        found.begun += done > 0
        found.prompts[_origin(job, bool(record), settings.tracking.detector.name)] += 1
        left.append((job, done))
    step = -(-len(left) // _MOST_OPENED) or 1
    sample = left[::step]
    lengths: list[int] = []
    for (_, done), answer in zip(sample, _each(lambda one: _opened(one[0], settings), sample), strict=True):
        if isinstance(answer, str):
            found.wrong.append(answer)
            continue
        found.opened += 1
        if answer is not None:
            lengths.append(max(0, answer - done))
    if lengths:
        found.frames = round(sum(lengths) / len(lengths) * (len(left) - len(sample) + len(lengths)))
    elif not left:
        found.frames = 0
    _take_rate(files, found)
    return found


def _each(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, items))


def _record(files: Files, there: set[str], job: VideoJob) -> Mapping[str, Any]:
    stream_id = job.spec.stream_id
    if job.spec.restart or f"streams/{stream_id}.json" not in there:
        return {}
    return load_record(files, stream_id) or {}


def _origin(job: VideoJob, begun: bool, detector: str | None) -> str:
    if job.spec.prompts is not None:
        return "in the manifest or from --prompts"
    if job.spec.prompts_uri is not None:
        return "in files"
    if begun:
        return "as begun before"
    return f"found by {detector}" if detector is not None else "none: nothing to track"


def _opened(job: VideoJob, settings: WorkerSettings) -> int | str | None:
    """Number of frames to track of a video, None if unknown; or an error message."""
    spec, options = job.spec, settings.storage_options
    limit = settings.tracking.commit.max_pixels
    direction = spec.direction or settings.tracking.direction
    try:
        prompts = PromptSet() if spec.prompts is None else PromptSet.from_record(spec.prompts)
        if spec.prompts_uri is not None:
            if spec.prompts_uri.partition("?")[0].lower().endswith(".png"):
                prompts = load_mask_png(spec.prompts_uri, storage_options=options, max_pixels=limit)
            else:
                prompts = load_prompts(spec.prompts_uri, options)
        source = open_source(spec.uri, threads=1, storage_options=options, max_pixels=limit)
    except XmemError as error:
        text = str(error)
        return text if spec.uri in text else f"{spec.uri}: {text}"
    try:
        plan = BackwardPlan.of(prompts, direction)
        lengths = [source.frame_count, settings.tracking.commit.max_frames]
        if plan is not None and direction == BACKWARD:
            lengths.append(plan.frames)
        forward = min((n for n in lengths if n is not None), default=None)
        return forward if forward is None or plan is None else forward + plan.frames
    finally:
        source.close()


def _take_rate(files: Files, found: Forecast) -> None:
    """Set the speed from the newest report that has one."""
    for name in sorted((n for n in files.names(FOLDER) if n.endswith(".json")), reverse=True):
        try:
            report = json.loads(files.read(name))
            frames, seconds = int(report["frames_tracked"]), float(report["seconds"])
        except (StoreError, FileNotFoundError, ValueError, KeyError, TypeError):
            continue
        if frames > 0 and seconds > 0:
            found.frames_per_second, found.measured_by = frames / seconds, files.uri(name)
            return
