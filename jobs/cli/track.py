"""The `xmem track` command: tracks one video, with a progress bar and a summary table."""

from __future__ import annotations

import gc
import time
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from jobs.cli.options import tracking_options
from jobs.cli.terminal import SPEAK_EVERY_S, console, fetch_model, frame_bar, say, short_name
from pipeline.base.errors import UsageError
from pipeline.base.garbage import no_collection
from pipeline.base.redaction import redacted
from pipeline.tracking.settings import TrackSettings


@tracking_options()
def track(
    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO...",
            help="A video file or a folder of images: a path or any fsspec URI. With --join several files.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Output folder: a path or any fsspec URI.")],
    masks: Annotated[
        list[str] | None,
        typer.Option(help="Masks of the first frame: an index or palette PNG with one value per object."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts file (JSON) with masks (RLE), polygons or boxes on any frame; see `xmem schema`."
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="Box on the first frame, in pixels: x,y,w,h[:id[:category]]; repeatable."),
    ] = None,
    from_state: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Output folder of another video's run: its objects are sought here, without masks.",
        ),
    ] = None,
    from_stream: Annotated[
        str | None, typer.Option(help="With --from-state: its stream. Default: the only one.")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="A click on an object, in pixels: frame,x,y[:id[:category]]; repeatable. Clicks of one id "
            "on one frame add up."
        ),
    ] = None,
    not_at: Annotated[
        list[str] | None,
        typer.Option(help="A click beside the object of --at: frame,x,y[:id]; repeatable."),
    ] = None,
    click_segmenter: Annotated[
        str | None,
        typer.Option(
            help="What makes masks of clicks: xmem-click (the default), grabcut, or a plugin's name."
        ),
    ] = None,
    stream_id: Annotated[
        str | None,
        typer.Option(help="Name of the stream in the output folder. Default: derived from the video's URI."),
    ] = None,
    join: Annotated[
        bool,
        typer.Option("--join", help="The videos are the pieces of one recording, in this order: one stream."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete this stream's rows and start over.")
    ] = False,
    *,
    tracking: TrackSettings,
) -> None:
    """Track objects through a video and write their mask tracks to Parquet.

    An interrupted stream is resumed by the same command; a finished stream is left unchanged.
    """
    with no_collection():
        from pipeline.base.joined_uris import joined_uri
        from pipeline.base.malloc import keep_freed_memory
        from pipeline.prompts.pointing import add_clicks
        from pipeline.prompts.resolving import gather_prompts
        from pipeline.tracking.files.stream_tracker import FINISHED, StreamTracker
        from pipeline.tracking.files.track import track as track_video
        from pipeline.tracking.snapshots.object_states import prompts_from_state

    if len(videos) > 1 and not join:
        raise UsageError(
            f"{len(videos)} videos: --join tracks them as one stream, `xmem batch` each as its own"
        )
    video = joined_uri(videos)
    keep_freed_memory()
    shown = redacted(videos[0]) + (f" and {len(videos) - 1} more" if len(videos) > 1 else "")
    asked = gather_prompts(
        masks=masks or [], files=prompts or [], boxes=box or [], max_pixels=tracking.commit.max_pixels
    )
    if from_state is not None:
        asked = prompts_from_state(from_state, from_stream).combined(asked)
    elif from_stream is not None:
        raise UsageError("--from-stream goes with --from-state FOLDER")
    if at or not_at:
        asked = add_clicks(
            asked,
            video,
            at or [],
            not_at or [],
            segmenter=click_segmenter,
            max_pixels=tracking.commit.max_pixels,
        )
    started = spoke = time.monotonic()
    already_done = False
    fetch_model(tracking.model.name)
    with frame_bar(short_name(videos[0])) as (progress, task):

        def on_open(stream: StreamTracker) -> None:
            nonlocal already_done, started
            started = time.monotonic()  # excludes loading and opening from the frame rate
            # The garbage collector looks at all modules and weights again and again otherwise.
            gc.freeze()
            already_done = stream.summary.state == FINISHED
            total = stream.frame_count
            if total is not None:
                total += stream.backward_frames
            progress.update(task, total=total, completed=done(stream))

        def done(stream: StreamTracker) -> int:
            """Frames tracked so far, those of both passes."""
            return stream.next_frame + (0 if stream.goes_backward else stream.backward_frames)

        def on_frame(stream: StreamTracker) -> None:
            nonlocal spoke
            now = time.monotonic()
            rate = f"{stream.summary.tracked / max(now - started, 1e-9):.1f} frames/s"
            progress.update(task, completed=done(stream), rate=rate)
            if progress.disable and now - spoke > SPEAK_EVERY_S:
                spoke = now
                of = f" of {total}" if (total := progress.tasks[0].total) else ""
                say(f"{shown}: {done(stream)}{of} frames, {rate}")

        try:
            summary = track_video(
                video,
                out,
                asked,
                stream_id=stream_id,
                settings=tracking,
                restart=restart,
                on_open=on_open,
                on_frame=on_frame,
            )
        finally:
            gc.unfreeze()
    if already_done:
        say(
            f"{summary.stream_id} is finished: {summary.frames} frames, {summary.rows} rows in "
            f"{redacted(out)}; nothing to do."
        )
        return
    _print_summary(out, summary, time.monotonic() - started)


def _print_summary(out: str, summary: Any, seconds: float) -> None:
    from pipeline.analytics.query import query

    rows = query(
        out,
        "select object_id, any_value(category) as category, min(frame_index) as first_frame, "
        "max(frame_index) filter (area > 0) as last_seen, count(*) filter (area > 0) as seen, "
        "count(*) as frames, avg(score) filter (area > 0) as score "
        f"from tracks where stream_id = '{summary.stream_id}' group by object_id order by object_id",
    ).to_pylist()
    title = f"{summary.stream_id}: {summary.frames} frames, {summary.rows} rows in {redacted(out)}"
    table = Table(title=Text(title))
    for name in ("object", "category", "first frame", "last seen", "seen on", "mean score"):
        table.add_column(name, justify="left" if name == "category" else "right")
    for row in rows:
        last = "never" if row["last_seen"] is None else str(row["last_seen"])
        score = "" if row["score"] is None else f"{row['score']:.2f}"
        table.add_row(
            str(row["object_id"]),
            Text(row["category"] or ""),
            str(row["first_frame"]),
            last,
            f"{row['seen']} of {row['frames']}",
            score,
        )
    console().print(table)
    rate = summary.tracked / seconds if seconds > 0 else 0.0
    notes = [f"{summary.tracked} frames tracked in {seconds:.1f} s ({rate:.1f} frames/s)"]
    if summary.resumed_at is not None:
        notes.append(f"resumed at frame {summary.resumed_at}")
    if summary.losses:
        notes.append(f"{summary.losses} frames or packets lost in the input, see the events")
    say("; ".join(notes))
