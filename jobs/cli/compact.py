"""The `xmem compact` command."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.terminal import say


def compact(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    megabytes: Annotated[
        int, typer.Option("--megabytes", help="Size of the chunk files that one compacted file replaces.")
    ] = 128,
) -> None:
    """Copy many small files into few large ones, for faster queries; more may be written meanwhile."""
    from pipeline.base.errors import XmemError
    from pipeline.tracks.compaction import compact as run

    done = run(folder, file_bytes=megabytes << 20)
    merged = f"; {done.merged} smaller ones of earlier runs merged" if done.merged else ""
    say(f"{done.chunks} files with {done.rows} rows compacted into {done.files}{merged}")
    if done.skipped:
        raise XmemError(
            f"not compacted, since files are missing or damaged: {', '.join(sorted(done.skipped))}"
        )
