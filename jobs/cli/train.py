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
    from jobs.cli.training import parse_settings, run

    given = {"steps": steps, "seed": seed, "max_hours": max_hours, "threads": threads, "init": init or None}
    overrides = parse_settings(setting or []) | {k: v for k, v in given.items() if v is not None}
    logging.getLogger().setLevel(logging.INFO)
    say(f"averaged weights: {run(config, data, out, overrides | {'resume': not fresh})}")
