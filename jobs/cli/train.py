"""The `xmem train` command: trains small models."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from jobs.cli.terminal import say


def train(
    data: Annotated[str, typer.Option(help="Folder with stills/ and davis/.")],
    out: Annotated[str, typer.Option(help="Folder of the run: log, checkpoints, weights.")],
    config: Annotated[
        str | None,
        typer.Option(help="JSON file of training settings. Default: those in OUT, else those of xmem-lite."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: override one setting; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    init: Annotated[
        list[str] | None, typer.Option(help="Initial weights; if repeated, the mean of the files.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.")] = None,
    max_hours: Annotated[
        float | None, typer.Option(help="Write a checkpoint and stop after this time.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore existing checkpoints in OUT.")] = False,
) -> None:
    """Train a small model. The same command resumes from the last checkpoint."""
    from jobs.cli.training import parse_settings, run

    given = {"steps": steps, "seed": seed, "max_hours": max_hours, "threads": threads, "init": init or None}
    overrides = parse_settings(setting or []) | {k: v for k, v in given.items() if v is not None}
    logging.getLogger().setLevel(logging.INFO)
    say(f"averaged weights: {run(config, data, out, overrides | {'resume': not fresh})}")
