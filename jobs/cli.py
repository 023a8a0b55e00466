"""The `xmem` command: a thin layer over the pipeline. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jobs import batch_cli, serve_cli
from jobs.options import SAID_BY_SIZE, tracking_options
from jobs.terminal import SPEAK_EVERY_S, console, fetch_model, say, short_name, version
from pipeline.errors import UsageError, XmemError
from pipeline.picture_size import MAX_PIXELS
from pipeline.redact import redacted
from pipeline.settings import TrackSettings, track_options

app = typer.Typer(
    name="xmem",
    help="Follow objects through very long or live video, and query their mask tracks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(batch_cli.app, name="batch")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"xmem {version()}")
        raise typer.Exit


@app.callback()
def _common(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


app.command()(serve_cli.serve)

logger = logging.getLogger("xmem")

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 2: the request is wrong; 1: it failed; 130: interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # Wherever it stands: nobody remembers on which side of the command it belongs.
    arguments = [a for a in arguments if a != "--debug"]
    _set_up_logging(debug)
    try:
        code = app(arguments, standalone_mode=False)
    except KeyboardInterrupt:  # outside Typer, which makes a code of those inside
        code = _INTERRUPTED
    except Exception as error:
        if debug and not hasattr(error, "format_message"):
            raise
        if hasattr(error, "format_message"):  # what Typer itself found wrong with the command line
            _fail(
                error.format_message() or "give a command; --help lists them", getattr(error, "exit_code", 2)
            )
        if type(error).__name__ == "Abort":
            _fail("aborted", _INTERRUPTED)
        if isinstance(error, XmemError):
            _fail(str(error), error.exit_code)
        # Anything else is a fault of ours, or of the machine; what the user got wrong has been said by now.
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    if code == _INTERRUPTED:
        _fail("interrupted" + _how_to_go_on(arguments), _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[:1] not in (["track"], ["batch"]):
        return ""
    again = "the same command without --restart" if "--restart" in arguments else "the same command"
    return f"; {again} goes on from the last committed chunk"


def _fail(message: str, code: int) -> None:
    line = " ".join(redacted(str(message)).split())
    sys.stderr.write(f"xmem: error: {line}\n")
    sys.exit(code)


class _ConsoleHandler(logging.Handler):
    """Messages above the bar, each on one line however narrow the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        say(redacted(self.format(record)))


def _set_up_logging(debug: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s" if debug else "xmem: %(message)s",
        handlers=[_ConsoleHandler()],
        force=True,
    )
    if debug:
        for noisy in ("fsspec", "s3fs", "botocore", "aiobotocore", "matplotlib", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.INFO)


@app.command()
@tracking_options()
def track(
    video: Annotated[
        str, typer.Argument(help="A video file or a folder of images: a path or any fsspec URI.")
    ],
    out: Annotated[str, typer.Option(help="Output folder: a path or any fsspec URI.")],
    masks: Annotated[
        list[str] | None, typer.Option(help="Index or palette PNG of the first frame: one value per object.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="JSON with masks (RLE), polygons or boxes at any frame; see `xmem schema`."),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="x,y,w,h[:id[:category]] on the first frame, in pixels; repeatable."),
    ] = None,
    stream_id: Annotated[str | None, typer.Option(help="Name of the stream in the output folder.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop this stream's rows and start over.")
    ] = False,
    *,
    tracking: TrackSettings,
) -> None:
    """Track objects through a video and write their mask tracks to Parquet.

    Run again it goes on where it was interrupted; a finished stream is left as it is.
    """
    from pipeline.allocation import keep_freed_memory
    from pipeline.executor import track as track_video
    from pipeline.prompts import gather_prompts
    from pipeline.stream import FINISHED, StreamTracker

    keep_freed_memory()
    shown = redacted(video)
    asked = gather_prompts(
        masks=masks or [], files=prompts or [], boxes=box or [], max_pixels=tracking.commit.max_pixels
    )
    started = spoke = time.monotonic()
    already_done = False
    fetch_model(tracking.model.name)
    max_frames = tracking.commit.max_frames
    with _frame_bar(short_name(video)) as (progress, task):

        def on_open(stream: StreamTracker) -> None:
            nonlocal already_done, started
            started = time.monotonic()  # from here on it is frames that take the time
            already_done = stream.summary.state == FINISHED
            total = stream.source.frame_count
            if max_frames is not None:
                total = max_frames if total is None else min(total, max_frames)
            progress.update(task, total=total, completed=stream.next_frame)

        def on_frame(stream: StreamTracker) -> None:
            nonlocal spoke
            now = time.monotonic()
            rate = f"{stream.summary.tracked / max(now - started, 1e-9):.1f} frames/s"
            progress.update(task, completed=stream.next_frame, rate=rate)
            if progress.disable and now - spoke > SPEAK_EVERY_S:
                spoke = now
                of = f" of {total}" if (total := progress.tasks[0].total) else ""
                say(f"{shown}: {stream.next_frame}{of} frames, {rate}")

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
    if already_done:
        say(
            f"{summary.stream_id} is finished: {summary.frames} frames, {summary.rows} rows in "
            f"{redacted(out)}; nothing to do."
        )
        return
    _print_summary(out, summary, time.monotonic() - started)


def _print_summary(out: str, summary: Any, seconds: float) -> None:
    from pipeline.query import query

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


@app.command()
def query(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track` or `xmem batch`.")],
    sql: Annotated[str, typer.Argument(help="SQL over the views tracks, events and streams.")],
    fmt: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    output: Annotated[str | None, typer.Option("--output", "-o", help="File; default: stdout.")] = None,
) -> None:
    """Ask an output folder with SQL (DuckDB)."""
    from pipeline.query import format_result
    from pipeline.query import query as ask

    if fmt not in ("table", "csv", "json", "parquet"):
        raise UsageError(f"--format {fmt!r} is not allowed: table, csv, json or parquet")
    result = ask(folder, sql)
    if output is None:
        binary = fmt == "parquet"
        if binary and sys.stdout.isatty():
            raise UsageError("parquet is binary: redirect it, or give --output FILE")
        try:
            format_result(result, fmt, sys.stdout.buffer if binary else sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has gone (`| head`): not worth a word. Nor is what Python flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        with open(
            output, "wb" if fmt == "parquet" else "w", encoding=None if fmt == "parquet" else "utf-8"
        ) as file:
            format_result(result, fmt, file)
    except OSError as error:
        raise XmemError(f"{output} cannot be written: {error.strerror or error}") from error


@app.command()
def render(
    video: Annotated[str, typer.Argument(help="The video that was tracked.")],
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The overlay video: .mp4, .mkv, .webm, ...")],
    stream_id: Annotated[str | None, typer.Option(help="Which stream, if it cannot be told.")] = None,
    first: Annotated[int, typer.Option(help="First frame.")] = 0,
    last: Annotated[int | None, typer.Option(help="Last frame.")] = None,
    alpha: Annotated[float, typer.Option(help="Opacity of the masks, 0 to 1.")] = 0.5,
    sheet: Annotated[str | None, typer.Option(help="Also write a contact sheet (PNG).")] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Refuse pictures with more pixels than this, without decoding them.")
    ] = MAX_PIXELS,
) -> None:
    """Draw masks, outlines and ids over the video."""
    from pipeline.render import render as render_tracks

    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha {alpha} is not allowed: from 0 to 1")
    with _frame_bar(short_name(output)) as (progress, task):
        count = render_tracks(
            video,
            folder,
            output,
            stream_id=stream_id,
            first=first,
            last=last,
            alpha=alpha,
            sheet=sheet,
            max_pixels=max_pixels,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    say(
        f"{count} frames written to {redacted(output)}"
        + (f", contact sheet to {redacted(sheet)}" if sheet else "")
    )


_NOT_EVALUATED = SAID_BY_SIZE | {
    option.name: "evaluation starts from given masks and writes no output folder"
    for option in track_options()
    if option.path[0] in ("commit", "detector")
}


@app.command()
@tracking_options(without=_NOT_EVALUATED, defaults={"dtype": "float32"})  # figures comparable between CPUs
def evaluate(
    root: Annotated[
        str | None, typer.Argument(help="Folder with JPEGImages/ and Annotations/ as DAVIS lays them out.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Instead of a data set, composed scenes with exact truth: crowd (identities among 3 to 8 "
            "people) or synthetic (one trouble at a time)."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --suite: folder with stills/ (or train/stills/) to compose from.")
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(help="With --suite: scenes; for synthetic, of each kind.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --suite: another seed makes other scenes.")] = 0,
    kind: Annotated[
        list[str] | None, typer.Option(help="With --suite synthetic: only these kinds; repeatable.")
    ] = None,
    clip: Annotated[list[str] | None, typer.Option(help="Only these clips; repeatable.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames per clip.")] = None,
    height: Annotated[int, typer.Option(help="With --suite: height of the scenes in pixels.")] = 480,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    *,
    tracking: TrackSettings,
) -> None:
    """Measure a model: J and boundary accuracy F on a labelled data set, or a suite of composed scenes."""
    from jobs.evaluate import EvaluationReport, run
    from jobs.suites.report import SuiteReport
    from jobs.suites.runner import check_options, run_suite
    from pipeline.executor import open_segmenter

    check_options(root, suite, data, scenes, kind, clip, max_frames)
    fetch_model(tracking.model.name)
    segmenter = open_segmenter(tracking.model, tracking.memory)
    shared = console()

    def progress(text: str) -> None:
        shared.print(text, style="dim", markup=False)

    report: EvaluationReport | SuiteReport
    if suite is not None and data is not None:
        report = run_suite(
            suite, data, segmenter, scenes=scenes, seed=seed, height=height, kinds=kind, progress=progress
        )
    else:
        assert root is not None
        report = run(root, segmenter, clips=clip, max_frames=max_frames, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        Console(highlight=False).print(report.table())


@app.command()
def train(
    data: Annotated[str, typer.Option(help="Folder with stills/ and davis/.")],
    out: Annotated[str, typer.Option(help="Folder of the run: log, checkpoints, weights.")],
    config: Annotated[
        str | None,
        typer.Option(help="JSON of training settings. Default: the run's own, else those of xmem-lite."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="name=value: replaces one of the settings; repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    init: Annotated[
        list[str] | None, typer.Option(help="Weights to start from; repeatable: the mean of all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.")] = None,
    max_hours: Annotated[float | None, typer.Option(help="Stop with a checkpoint after so long.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from the run's checkpoint.")] = False,
) -> None:
    """Train a small model; run again, it goes on from its last checkpoint."""
    from jobs.train import parse_settings, run

    given = {"steps": steps, "seed": seed, "max_hours": max_hours, "threads": threads, "init": init or None}
    overrides = parse_settings(setting or []) | {k: v for k, v in given.items() if v is not None}
    logging.getLogger().setLevel(logging.INFO)
    say(f"averaged weights: {run(config, data, out, overrides | {'resume': not fresh})}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a prompts file."""
    from pipeline.prompts import prompts_schema

    typer.echo(json.dumps(prompts_schema(), indent=2))


@contextmanager
def _frame_bar(name: str) -> Iterator[tuple[Progress, TaskID]]:
    shared = console()
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=shared,
        disable=not shared.is_terminal,
    )
    with progress:
        yield progress, progress.add_task(name, total=None, rate="")


if __name__ == "__main__":
    main()
