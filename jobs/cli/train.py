"""The `xmem train` command: trains XMem's published stages, or a small model."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from jobs.cli.terminal import say
from pipeline.base.errors import UsageError


def train(
    data: Annotated[
        str,
        typer.Option(
            help="Folder with stills/ and davis/; with --stage static/, BL30K/, DAVIS/ and YouTube/."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the run: log, checkpoints, weights.")],
    stage: Annotated[
        str | None,
        typer.Option(
            help="Published stages of XMem, one after another, each from the last one's weights, such as 03: "
            "0 stills, 1 BL30K, 2 DAVIS and YouTube-VOS, 3 the same, shorter.",
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON file of training settings. Default: those in OUT, else those of xmem-lite. Several "
            "files of stages are trained one after another."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: override one setting; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    init: Annotated[
        list[str] | None,
        typer.Option(help="Initial weights; if repeated, the mean of the files (not for stages)."),
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="With --stage: ImageNet weights of torchvision (resnet50-*.pth, resnet18-*.pth); repeatable."
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="With --stage: data set of `xmem evaluate`; J&F is measured every validate_every steps."
        ),
    ] = None,
    validation_split: Annotated[str | None, typer.Option(help="Its list of clips, such as 2017/val.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1. With torchrun, cuda is a GPU per process.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="With --stage: train in processes of a Ray cluster: auto, host:6379 or ray://host:10001. "
            "All its machines must have DATA and OUT at the same path."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="With --stage: processes of Ray, which share each batch. Default with --address: one per "
            "GPU, or one on CPUs."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.")] = None,
    max_hours: Annotated[
        float | None, typer.Option(help="Write a checkpoint and stop after this time.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore existing checkpoints in OUT.")] = False,
) -> None:
    """Train a model. The same command resumes from the last checkpoint.

    `torchrun --nproc-per-node N -m jobs.cli train --stage 03 ...` trains stages with N processes, and so does
    `--processes N`, with Ray Train.
    """
    from jobs.training.lite import parse_settings, run
    from jobs.training.settings import StageConfig, is_stage_file, load_stages, published_stages
    from jobs.training.stages import StageRun, train_stages, with_overrides

    if stage is not None and config:
        raise UsageError("--stage and --config exclude each other: give one of them")
    stages: list[StageConfig] = []
    if stage is not None:
        stages = published_stages(stage)
    elif config and any(is_stage_file(each) for each in config):
        stages = load_stages(config)
    given: dict[str, Any] = {"steps": steps, "seed": seed, "threads": threads, "device": device}
    overrides = parse_settings(setting or []) | {k: v for k, v in given.items() if v is not None}
    logging.getLogger().setLevel(logging.INFO)
    if stages:
        if init and len(init) > 1:
            raise UsageError("--init may be given once with stages")
        how = StageRun(
            init=init[0] if init else None,
            backbones=tuple(backbone or ()),
            resume=not fresh,
            max_hours=max_hours or 0.0,
            validation=validation,
            validation_split=validation_split,
        )
        stages = with_overrides(stages, overrides)
        if address is None and processes is None:
            weights = train_stages(stages, data, out, how)
        else:
            from jobs.training.ray_processes import train_on_ray

            weights = train_on_ray(stages, data, out, how, address=address, processes=processes)
        say(f"weights: {weights}" if weights else "stopped; the same command continues")
        return
    if backbone or validation or validation_split:
        raise UsageError("--backbone, --validation and --validation-split are for stages: see --stage")
    if address is not None or processes is not None:
        raise UsageError("--address and --processes are for stages: see --stage")
    if config and len(config) > 1:
        raise UsageError("--config may be given several times for stages only")
    more = {"init": init or None, "max_hours": max_hours}
    overrides |= {k: v for k, v in more.items() if v is not None}
    overrides["resume"] = not fresh
    say(f"averaged weights: {run(config[0] if config else None, data, out, overrides)}")
