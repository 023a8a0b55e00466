"""The `xmem batch` commands: run here or on a cluster, submit as a Ray Job, follow, cancel."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jobs.batch.durations import duration
from jobs.cli.options import tracking_options
from jobs.cli.terminal import console, fetch_model, say
from jobs.cluster import auth_token as ray_token
from pipeline.base.errors import UsageError, XmemError, one_line
from pipeline.base.garbage import no_collection
from pipeline.base.redaction import redacted
from pipeline.tracking.settings import TrackSettings

if TYPE_CHECKING:
    from jobs.batch.listing import Skipped
    from jobs.batch.report import BatchReport
    from pipeline.distributed.messages import WorkerSettings

_BATCH = "Batch"
_MOST_LISTED = 20


class _RunByDefault(TyperGroup):
    """A command group that runs `run` if the first argument is not a subcommand."""

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
    list[str],
    typer.Argument(
        help="A folder, a glob, a video or a manifest, as path or fsspec URI; repeatable. A manifest is a "
        ".jsonl, .csv or .parquet file with columns uri, stream_id, prompts, priority and direction; further "
        "columns are shown in the view `streams`."
    ),
]
OutOption = Annotated[str, typer.Option(help="Output folder: a path or any fsspec URI.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(help="Prompts file (.json) or masks (.png) for videos without their own."),
]
JobsAddressOption = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, http://host:8265. Default: RAY_API_SERVER_ADDRESS or "
                      "RAY_ADDRESS, else localhost."),
]  # fmt: skip
JobArgument = Annotated[str, typer.Argument(help="The job's id, as `xmem batch submit` printed it.")]


@app.command()
@tracking_options()
def run(
    context: typer.Context,
    videos: VideosArgument,
    out: OutOption,
    prompts: PromptsOption = None,
    report: Annotated[
        str | None,
        typer.Option(
            help="Also write the report (JSON) to this file; `-`: stdout. OUT/batches/ always gets it."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Track nothing: print what would be tracked, the estimated time and all errors found.",
        ),
    ] = False,
    ids: Annotated[
        str,
        typer.Option(
            help="How stream ids are derived: uri (the whole URI), relative (the path below VIDEOS, which "
            "stays the same if the archive is moved), or name (the file's name)."
        ),
    ] = "uri",
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete these videos' rows in OUT and start over.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: auto, host:6379 or ray://host:10001. Default: a local Ray for this batch.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(help="Number of tracker processes. Default: as many as fit.", rich_help_panel=_BATCH),
    ] = None,
    gpu_fraction: Annotated[
        float, typer.Option(help="Share of a GPU per tracker process.", rich_help_panel=_BATCH)
    ] = 1.0,
    priority: Annotated[
        float,
        typer.Option(help="Priority of videos for which the manifest has none.", rich_help_panel=_BATCH),
    ] = 1.0,
    max_tries: Annotated[
        int,
        typer.Option(
            help="Failed tries without progress before a video is quarantined.", rich_help_panel=_BATCH
        ),
    ] = 4,
    storage_options: Annotated[
        list[str] | None,
        typer.Option(
            help="fsspec options: JSON, @FILE with JSON, or key=value (client_kwargs.endpoint_url=...); "
            "repeatable. Passed to the workers; never written to records or logs.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    out_storage_options: Annotated[
        list[str] | None,
        typer.Option(help="fsspec options of OUT, if they differ.", rich_help_panel=_BATCH),
    ] = None,
    retry_of: Annotated[str | None, typer.Option(hidden=True)] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Ignore the lease of another run on these videos in OUT. Only if that run is dead.",
            rich_help_panel=_BATCH,
        ),
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: environment variable for the workers, such as credentials; repeatable.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    *,
    tracking: TrackSettings,
) -> int:
    """Track all videos of a folder, glob or manifest and write their mask tracks to Parquet.

    Prompts of `a.mp4` are read from the manifest, from `a.prompts.json` or `a.masks.png` in the same folder,
    or from --prompts. The same command, run again, tracks unfinished videos only. A failed video does not
    stop the others. Exit code: 0: all finished; 1: some failed (they are listed); 2: usage error; 130:
    interrupted.
    """
    debug = logging.getLogger().isEnabledFor(logging.DEBUG)
    if address is not None:
        ray_token.enable()
        from jobs.batch.submit import check_paths

        check_paths()

    with no_collection():
        from jobs.batch.listing import Skipped
        from jobs.batch.manifest import load_manifest
        from jobs.batch.run import BatchOptions, run_batch
        from jobs.batch.storage_options import parse_storage_options
        from jobs.cli.progress import BatchDisplay
        from pipeline.distributed.messages import WorkerSettings
        from pipeline.storage.locations import scheme_of

    if ids not in ("uri", "relative", "name"):
        raise UsageError(f"--ids {ids!r} is not allowed: uri, relative or name")
    access = parse_storage_options(storage_options)
    out_access = parse_storage_options(out_storage_options, "--out-storage-options")
    if out_access is None and scheme_of(out) not in ("file", "local"):
        out_access = access
    settings = WorkerSettings(out, tracking, access, out_access)
    options = BatchOptions(
        address=address,
        actors=actors,
        gpu_fraction=gpu_fraction,
        max_tries=max_tries,
        debug=debug,
        take_over=take_over,
        env=_variables(env),
    )
    skipped = Skipped()
    errors: list[str] | None = [] if dry_run else None
    jobs = load_manifest(
        videos,
        prompts=prompts,
        detector=tracking.detector.name,
        priority=priority,
        restart=restart,
        inline_prompts=address is not None,
        storage_options=access,
        skipped=skipped,
        ids=ids,  # type: ignore[arg-type]
        errors=errors,
        out=out,
    )
    if retry_of is not None:
        wanted = _Earlier.read(retry_of, out_access).bad
        jobs = [job for job in jobs if job.spec.stream_id in wanted]
        if not jobs:
            raise UsageError(f"{retry_of}: none of its failed videos is among {', '.join(videos[:3])}")
    if errors is not None:
        return _forecast(jobs, settings, errors, skipped)
    if address is None:
        fetch_model(tracking.model.name)
    with BatchDisplay(console()) as display:
        result = run_batch(
            jobs,
            settings,
            options,
            on_progress=display,
            on_stop=_say_stopping,
            skipped=skipped,
            request=_request(context),
        )
    _summarize(result, on_cluster=address is not None)
    if report is not None:
        result.write(report)
    if result.stopped is not None:
        again = "the same command without --restart" if restart else "the same command"
        raise XmemError(
            f"the batch was stopped: {result.stopped.message}; {again} goes on from the last committed chunks"
        )
    return result.exit_code


def _forecast(jobs: Any, settings: WorkerSettings, errors: list[str], skipped: Skipped) -> int:
    """Print the forecast of a dry run to stdout; exit code 2 if it has errors."""
    from jobs.batch.dry_run import forecast

    found = forecast(jobs, settings, errors=errors, skipped=skipped)
    for line in found.lines():
        typer.echo(line)
    return 2 if found.wrong else 0


# Never in a report: options that may hold credentials or apply to a single run.
_ONCE = frozenset(
    {"env", "storage_options", "out_storage_options", "report", "restart", "dry_run", "take_over", "retry_of"}
)
_NAMES_FILES = frozenset({"videos", "out", "prompts", "model"})


def _tokens(context: Any, without: frozenset[str] = frozenset()) -> list[str]:
    """The options given on the command line, as tokens."""
    tokens = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        given = source is not None and source.name == "COMMANDLINE"
        if parameter.param_type_name != "option" or not given or parameter.name in without:
            continue
        value = context.params[parameter.name]
        if getattr(parameter, "is_flag", False):
            tokens.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                tokens += [parameter.opts[0], str(one)]
    return tokens


def _request(context: Any) -> list[str]:
    """The command line of `run`, for a later `retry` in another folder; without credentials.

    That of a submitted job names the files on the machine that submitted it, and no address: `auto` is the
    cluster on which the job runs.
    """
    from jobs.batch.submit import original
    from jobs.cluster.shipping import is_submitted_job

    tokens = [original(video) for video in context.params["videos"]]
    names = {p.opts[0]: p.name for p in context.command.params}
    options = _tokens(context, _ONCE | {"address"} if is_submitted_job() else _ONCE)
    for before, token in zip(["", *options], options, strict=False):
        name = names.get(before)
        is_file = name in _NAMES_FILES and (name != "model" or os.path.exists(token))
        tokens.append(original(token) if is_file else token)
    return [redacted(token) for token in tokens]


def _say_stopping() -> None:
    say("xmem: stopping; what is being tracked is committed first (again: at once)")


def _summarize(result: BatchReport, *, on_cluster: bool) -> None:
    """Print a batch's summary to stderr: failed videos with causes, totals, the report's location."""
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
    if ellipses := totals["ellipses"]:
        say(
            f"{ellipses} {'box' if ellipses == 1 else 'boxes'} of prompts could not be told from the "
            "surroundings: an ellipse was taken instead; give masks or polygons there"
        )
    say(f"{done}; {totals['rows']} rows in {redacted(result.out)}")
    say(f"{result.frames} frames tracked in {duration(result.seconds)} ({rate:.1f} frames/s)")
    say(f"report: {redacted(result.location)}")


@dataclass(frozen=True)
class _Earlier:
    """What `retry` reads from a report.

    Args:
        bad: stream ids of the failed and quarantined videos.
        request: that run's command line.
    """

    bad: frozenset[str]
    request: list[str]

    @classmethod
    def read(cls, uri: str, storage_options: Mapping[str, Any] | None = None) -> _Earlier:
        """Read a report; UsageError if it is missing or not a report."""
        from pipeline.storage.locations import locate

        try:
            report = json.loads(locate(uri, storage_options).read_bytes())
            bad = [v["stream_id"] for v in report["videos"] if v["state"] in ("failed", "quarantined")]
            return cls(frozenset(bad), [str(token) for token in report.get("request") or []])
        except FileNotFoundError as error:
            raise UsageError(
                f"{uri}: no such report; `xmem batch list --out OUT` names those there are"
            ) from error
        except (ValueError, TypeError, LookupError, OSError) as error:
            raise UsageError(
                f"{uri} is no report of a batch, or cannot be read: {one_line(error)}"
            ) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def retry(
    context: typer.Context,
    report: Annotated[str, typer.Argument(help="Report of a batch (OUT/batches/*.json): a path or URI.")],
) -> int:
    """Track the failed and quarantined videos of a report again, with the settings of that run.

    Options of `xmem batch run` can be added and override that run's. Credentials (--env, --storage-options)
    are not stored in reports and must be given again, and --address if the run was a submitted job.
    """
    earlier = _Earlier.read(report, _access_in(context.args))
    if not earlier.bad:
        say(f"{report}: no video failed, nothing to do")
        return 0
    if not earlier.request or any("***" in token for token in earlier.request):
        raise UsageError(
            f"{report} does not say how that run was started: run the same command again instead"
        )
    arguments = [*earlier.request, *context.args, "--retry-of", report]
    return int(_run_command().main(arguments, prog_name="xmem batch retry", standalone_mode=False) or 0)


def _access_in(arguments: list[str]) -> dict[str, Any] | None:
    """The storage options among further options of `run`."""
    from jobs.batch.storage_options import parse_storage_options

    context = _run_command().make_context("xmem batch retry", ["VIDEOS", "--out", "OUT", *arguments])
    return parse_storage_options(context.params["out_storage_options"] or context.params["storage_options"])


def _run_command() -> Any:
    from typer.main import get_command

    group: Any = get_command(app)
    return group.commands["run"]


@app.command("list")
def list_batches(
    address: JobsAddressOption = None,
    out: Annotated[
        str | None, typer.Option(help="List the batches of this output folder instead of a cluster's jobs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """List the batches on a cluster, or finished and running ones of an output folder, newest first."""
    if out is not None:
        from jobs.batch.report import batches_in

        found = batches_in(out)
    else:
        from jobs.batch.submit import Jobs

        found = [job.to_json() for job in Jobs(address).list()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return 0
    for line in found:
        typer.echo("  ".join("" if value is None else str(value) for value in line.values()).rstrip())
    if not found:
        say("no batches" + (f" in {redacted(out)}" if out else ""))
    return 0


# --- as a job on a cluster -----------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    videos: VideosArgument,
    out: OutOption,
    prompts: PromptsOption = None,
    address: JobsAddressOption = None,
    job_id: Annotated[str | None, typer.Option("--id", help="The job's id. Default: generated.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: environment variable for the job's processes; repeatable. Visible to everyone "
            "with access to the dashboard."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log until it ends.")] = False,
) -> int:
    """Submit a batch as a Ray Job; accepts the options of `xmem batch run`.

    The code and local manifest and prompts files are uploaded with the job. Prints the job's id.
    """
    from jobs.batch.submit import Jobs

    # Unknown options end up in VIDEOS and the extra arguments; `run`'s parser separates them again.
    videos, arguments = _checked([*videos, *context.args])
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


def _checked(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Videos and options for `run`, parsed before submission so that usage errors show at once."""
    context = _run_command().make_context("xmem batch submit", [*arguments, "--out", "OUT"])
    if context.params["address"] is not None:
        raise UsageError(
            "--address twice is not allowed: the job runs on the cluster that it is submitted to"
        )
    return list(context.params["videos"]), _tokens(context, frozenset({"out"}))


@app.command()
def status(
    job_id: JobArgument,
    address: JobsAddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Print a job's state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    from jobs.batch.submit import Jobs

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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
) -> int:
    """Print a job's log."""
    from jobs.batch.submit import Jobs

    jobs = Jobs(address)
    if follow:
        return _follow(jobs, job_id)
    sys.stdout.write(jobs.logs(job_id))
    sys.stdout.flush()
    return 0


@app.command()
def cancel(job_id: JobArgument, address: JobsAddressOption = None) -> int:
    """Stop a job. Committed rows are kept; the same batch, submitted again, resumes from there."""
    from jobs.batch.submit import Jobs

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
