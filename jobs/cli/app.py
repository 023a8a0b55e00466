"""The `xmem` command: a thin layer over the packages. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Annotated, Any

import typer

from jobs.cli import annotate as annotate_cli
from jobs.cli import batch as batch_cli
from jobs.cli import compact as compact_cli
from jobs.cli import evaluate as evaluate_cli
from jobs.cli import exchange as exchange_cli
from jobs.cli import memory as memory_cli
from jobs.cli import plot as plot_cli
from jobs.cli import publish as publish_cli
from jobs.cli import query as query_cli
from jobs.cli import render as render_cli
from jobs.cli import serve as serve_cli
from jobs.cli import track as track_cli
from jobs.cli import train as train_cli
from jobs.cli import zones as zones_cli
from jobs.cli.terminal import say, version
from pipeline.base.errors import XmemError
from pipeline.base.redaction import redacted

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


for command in (
    track_cli.track,
    annotate_cli.annotate,
    query_cli.query,
    zones_cli.zones,
    compact_cli.compact,
    publish_cli.publish,
    render_cli.render,
    plot_cli.plot,
    memory_cli.memory,
    evaluate_cli.evaluate,
    train_cli.train,
    query_cli.schema,
    serve_cli.serve,
):
    takes_sql = command in (query_cli.query, zones_cli.zones)
    app.command(cls=query_cli.QueryCommand if takes_sql else None)(command)
app.command()(exchange_cli.export)
app.command(name="import")(exchange_cli.import_tracks)


_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 2 for a usage error, 1 for a failure, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # Accepted before and after the subcommand.
    arguments = [a for a in arguments if a != "--debug"]
    _set_up_logging(debug)
    try:
        code = _command()(arguments, standalone_mode=False)
    except KeyboardInterrupt:  # outside Typer, which converts those inside to an exit code
        code = _INTERRUPTED
    except Exception as error:
        if debug and not hasattr(error, "format_message"):
            raise
        if hasattr(error, "format_message"):  # a usage error that Typer found
            _fail(
                error.format_message() or "give a command; --help lists them", getattr(error, "exit_code", 2)
            )
        if type(error).__name__ == "Abort":
            _fail("aborted", _INTERRUPTED)
        if isinstance(error, XmemError):
            _fail(str(error), error.exit_code)
        # Usage errors are handled above: anything else is a bug or a fault of the machine.
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    if code == _INTERRUPTED:
        _fail("interrupted" + _how_to_go_on(arguments), _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


@functools.cache
def _command() -> Any:
    """The command with its subcommands; `app` would put them together anew for every call."""
    return typer.main.get_command(app)


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
    """Prints log messages above the progress bar, one line each, whatever the terminal's width."""

    def emit(self, record: logging.LogRecord) -> None:
        say(redacted(self.format(record)))


def _set_up_logging(debug: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s" if debug else "xmem: %(message)s",
        handlers=[_ConsoleHandler()],
        force=True,
    )
    # Their own level is set in both cases: a command before this one in the process may have had --debug.
    for noisy in ("fsspec", "s3fs", "botocore", "aiobotocore", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.INFO if debug else logging.NOTSET)


if __name__ == "__main__":
    main()
