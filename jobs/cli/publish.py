"""The `xmem publish` command."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.terminal import say
from pipeline.base.errors import UsageError, XmemError


def publish(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    fmt: Annotated[str, typer.Option("--to", help="Table format: delta, iceberg or ducklake.")] = "delta",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the tables `tracks` and `events`. Default: FOLDER/<format>.",
        ),
    ] = None,
) -> None:
    """Write the rows as Delta Lake, Iceberg or DuckLake tables; each further run appends what is new."""
    from pipeline.analytics.publishing.publish import FORMATS
    from pipeline.analytics.publishing.publish import publish as run

    if fmt not in FORMATS:
        raise UsageError(f"--to {fmt!r} is not a table format: {', '.join(FORMATS)}")

    done = run(folder, output, to=fmt)
    again = f"; older rows of {len(done.replaced)} streams deleted" if done.replaced else ""
    say(
        f"{done.rows} rows and {done.events} events added to {done.destination} "
        f"in {done.commits} commits{again}"
    )
    if done.skipped:
        raise XmemError(
            f"not published, since files are missing or damaged: {', '.join(sorted(done.skipped))}"
        )
