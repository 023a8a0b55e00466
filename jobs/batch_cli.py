"""`xmem batch`: many videos on a Ray, here or on a cluster, and as a job submitted to one."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jobs import options as opt
from jobs import ray_token
from jobs.terminal import console, duration, fetch_model, say
from pipeline.errors import UsageError
from pipeline.redact import redacted

if TYPE_CHECKING:
    from jobs.report import BatchReport

_BATCH = "Batch"
_MOST_LISTED = 20


class _RunByDefault(TyperGroup):
    """A group whose first argument is taken for `run`'s where it is no command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Track many videos on Ray. `xmem batch VIDEOS ...` is short for `xmem batch run VIDEOS ...`.",
)

VideosArgument = Annotated[
    str,
    typer.Argument(
        help="A folder, a glob (quoted), a video, or a manifest (.jsonl, .csv, .parquet with columns uri, "
        "stream_id, prompts, priority): a path or any fsspec URI."
    ),
]
OutOption = Annotated[str, typer.Option(help="Output folder: a path or any fsspec URI.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(help="Prompts file (.json) or masks (.png) for videos that have none of their own."),
]
JobsAddressOption = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, http://host:8265. Default: RAY_API_SERVER_ADDRESS or "
                      "RAY_ADDRESS, else this machine's."),
]  # fmt: skip
JobArgument = Annotated[str, typer.Argument(help="The job's id, as `xmem batch submit` printed it.")]


@app.command()
def run(
    videos: VideosArgument,
    out: OutOption,
    prompts: PromptsOption = None,
    detect: Annotated[
        str | None, typer.Option(help="Detector that finds objects; videos need no prompts then.")
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(help="Write the report (JSON) here too; `-`: stdout. It always goes to OUT/batches/."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what OUT holds of these videos and start over.")
    ] = False,
    max_frames: Annotated[int | None, typer.Option(help="Stop each video after so many frames.")] = None,
    chunk_frames: Annotated[
        int, typer.Option("--chunk-frames", "--chunk", help="Frames per commit, and of a unit of work.")
    ] = 100,
    box_segmenter: Annotated[str, typer.Option(help="Who turns boxes into masks.")] = "grabcut",
    sink: Annotated[
        list[str] | None, typer.Option(help="Plugin that gets the rows too, by name; repeatable.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster: auto, host:6379 or ray://host:10001. Default: a Ray of this machine's own.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(help="Processes that track. Default: as many as fit.", rich_help_panel=_BATCH),
    ] = None,
    gpu_fraction: Annotated[
        float, typer.Option(help="Part of a GPU for each of them.", rich_help_panel=_BATCH)
    ] = 1.0,
    priority: Annotated[
        float, typer.Option(help="Of videos that the manifest gives none.", rich_help_panel=_BATCH)
    ] = 1.0,
    max_tries: Annotated[
        int, typer.Option(help="Tries without progress until a video is given up.", rich_help_panel=_BATCH)
    ] = 4,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: environment variable of the workers, for instance credentials; repeatable.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    model: opt.ModelOption = "xmem-lite",
    size: opt.SizeOption = None,
    device: opt.DeviceOption = "cpu",
    dtype: opt.DtypeOption = "auto",
    threads: opt.ThreadsOption = None,
    mem_every: opt.MemEveryOption = None,
    deep_update_every: opt.DeepUpdateOption = None,
    top_k: opt.TopKOption = None,
    min_mid_term_frames: opt.MinMidTermOption = None,
    max_mid_term_frames: opt.MaxMidTermOption = None,
    num_prototypes: opt.PrototypesOption = None,
    max_long_term_elements: opt.LongTermElementsOption = None,
    max_permanent_frames: opt.PermanentOption = None,
    long_term: opt.LongTermOption = None,
    search_window: opt.SearchWindowOption = None,
) -> int:
    """Track all videos of a folder, glob or manifest and write their mask tracks to Parquet.

    What to track in `a.mp4` is in `a.prompts.json` or `a.masks.png` beside it, in the manifest, or in
    --prompts for all. Run again it tracks only what is unfinished. A video that fails stops no other one.
    Exit code: 0 all finished; 1 some failed (they are listed); 2 the request is wrong; 130 interrupted.
    """
    debug = logging.getLogger().isEnabledFor(logging.DEBUG)
    if address is not None:
        ray_token.enable()

    from jobs.batch import BatchOptions, run_batch
    from jobs.listing import Skipped
    from jobs.manifest import load_manifest
    from jobs.progress import BatchDisplay
    from pipeline.work import WorkerSettings

    memory = opt.memory_config(
        mem_every=mem_every,
        deep_update_every=deep_update_every,
        top_k=top_k,
        min_mid_term_frames=min_mid_term_frames,
        max_mid_term_frames=max_mid_term_frames,
        num_prototypes=num_prototypes,
        max_long_term_elements=max_long_term_elements,
        max_permanent_frames=max_permanent_frames,
        enable_long_term=long_term,
        search_window=search_window,
    )
    settings = WorkerSettings(
        out,
        model=model,
        memory=memory,
        size=size or None,
        full_size=size == 0,
        device=device,
        dtype=dtype,
        chunk_frames=chunk_frames,
        max_frames=max_frames,
        box_segmenter=box_segmenter,
        sinks=tuple(sink or ()),
        detector=detect,
    )
    options = BatchOptions(
        address=address,
        actors=actors,
        threads=threads,
        gpu_fraction=gpu_fraction,
        max_tries=max_tries,
        debug=debug,
        env=_variables(env),
    )
    skipped = Skipped()
    jobs = load_manifest(
        videos,
        prompts=prompts,
        detector=detect,
        priority=priority,
        restart=restart,
        inline_prompts=address is not None,
        skipped=skipped,
    )
    if address is None:
        fetch_model(model)
    with BatchDisplay(console()) as display:
        result = run_batch(
            jobs, settings, options, on_progress=display, on_stop=_say_stopping, skipped=skipped
        )
    _summarize(result, on_cluster=address is not None)
    if report is not None:
        result.write(report)
    return result.exit_code


def _say_stopping() -> None:
    say("xmem: stopping; what is being tracked is committed first (again: at once)")


def _summarize(result: BatchReport, *, on_cluster: bool) -> None:
    """The end of a batch on stderr: the videos that failed with their causes, the totals, the report."""
    totals = result.totals()
    listed = 0
    for job, video in result.bad():
        listed += 1
        if listed <= _MOST_LISTED:
            cause = redacted(video.cause.message) if video.cause else "no cause is known"
            tries = f" after {video.tries} tries" if video.state == "quarantined" else ""
            uri = redacted(job.spec.uri)
            say(f"{video.state}{tries}: {cause if cause.startswith(uri) else f'{uri}: {cause}'}")
    if listed > _MOST_LISTED:
        say(f"... and {listed - _MOST_LISTED} more, see the report")
    lacking = sum(video.cause is not None and video.cause.access for _, video in result.bad())
    if lacking and on_cluster:
        say(
            f"{lacking} of them for lack of credentials or rights on the workers, which have none of this "
            "machine's: give them with --env NAME=VALUE, or set them up on the cluster's machines"
        )
    others = [f"{totals[s]} {s}" for s in ("failed", "quarantined", "cancelled", "pending") if totals[s]]
    done = ", ".join([f"{totals['finished']} of {totals['videos']} videos finished", *others])
    rate = result.frames / result.seconds if result.seconds > 0 else 0.0
    say(f"{done}; {totals['rows']} rows in {redacted(result.out)}")
    say(f"{result.frames} frames tracked in {duration(result.seconds)} ({rate:.1f} frames/s)")
    say(f"report: {redacted(result.location)}")


# --- as a job on a cluster -----------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    videos: VideosArgument,
    out: OutOption,
    prompts: PromptsOption = None,
    address: JobsAddressOption = None,
    job_id: Annotated[str | None, typer.Option("--id", help="The job's id. Default: made up.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: environment variable of the job's processes, to be seen by all who see the "
            "dashboard; repeatable."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show what it prints, until it has ended.")
    ] = False,
) -> int:
    """Run a batch as a Ray Job; further options are those of `xmem batch run`.

    The code travels with the job, and so do a manifest and a prompts file that lie here. Prints the job's id.
    """
    from jobs.submit import Jobs

    arguments = _checked(list(context.args))
    variables = _variables(env)
    jobs = Jobs(address)
    job_id = jobs.submit(videos, arguments, out=out, prompts=prompts, job_id=job_id, env=variables)
    typer.echo(job_id)
    if follow:
        return _follow(jobs, job_id)
    where = f" --address {address}" if address else ""
    say(f"submitted; `xmem batch logs {job_id} --follow{where}` shows how it gets on")
    return 0


def _variables(given: list[str] | None) -> dict[str, str]:
    """The variables of --env; UsageError if one is not NAME=VALUE."""
    variables = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"--env {item.partition('=')[0]!r} is not allowed: give NAME=VALUE")
        variables[name] = value
    return variables


def _checked(arguments: list[str]) -> list[str]:
    """Options for `run`, parsed here so that a wrong one is not found out on the cluster."""
    from typer.main import get_command

    command: Any = get_command(app)
    context = command.commands["run"].make_context(
        "xmem batch submit", ["VIDEOS", "--out", "OUT", *arguments]
    )
    if context.params["address"] is not None:
        raise UsageError(
            "--address twice is not allowed: the job runs on the cluster that it is submitted to"
        )
    return arguments


@app.command()
def status(
    job_id: JobArgument,
    address: JobsAddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """How a job stands: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    from jobs.submit import Jobs

    found = Jobs(address).status(job_id)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        typer.echo(found.state)
        say(f"{job_id}: {found.message}" + (f"; output in {found.out}" if found.out else ""))
    return 0


@app.command()
def logs(
    job_id: JobArgument,
    address: JobsAddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
) -> int:
    """What a job has printed."""
    from jobs.submit import Jobs

    jobs = Jobs(address)
    if follow:
        return _follow(jobs, job_id)
    sys.stdout.write(jobs.logs(job_id))
    sys.stdout.flush()
    return 0


@app.command()
def cancel(job_id: JobArgument, address: JobsAddressOption = None) -> int:
    """Stop a job. What is committed stays; the same batch, submitted again, goes on from there."""
    from jobs.submit import Jobs

    stopped = Jobs(address).cancel(job_id)
    say(f"{job_id} is being stopped" if stopped else f"{job_id} had ended already")
    return 0


def _follow(jobs: Any, job_id: str) -> int:
    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    ended = jobs.follow(job_id, show)
    say(f"{job_id}: {ended.state}" + (f", {ended.message}" if ended.state != "SUCCEEDED" else ""))
    return 0 if ended.state == "SUCCEEDED" else 1
