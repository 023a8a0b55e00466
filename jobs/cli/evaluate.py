"""The `xmem evaluate` command: scores a model on a labelled data set or on composed scenes."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from jobs.cli.options import SAID_BY_SIZE, tracking_options
from jobs.cli.terminal import console, fetch_model
from pipeline.tracking.settings import TrackSettings, track_options

_NOT_EVALUATED = SAID_BY_SIZE | {
    option.name: "evaluation starts from given masks and writes no output folder"
    for option in track_options()
    if option.path[0] in ("commit", "detector")
}


@tracking_options(without=_NOT_EVALUATED, defaults={"dtype": "float32"})  # figures comparable between CPUs
def evaluate(
    root: Annotated[
        str | None, typer.Argument(help="Folder with JPEGImages/ and Annotations/ in the layout of DAVIS.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Evaluate on composed scenes with exact ground truth instead of a data set: crowd "
            "(identities of 3 to 8 people) or synthetic (one difficulty per scene)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --suite: folder with stills/ (or train/stills/) from which scenes are composed."
        ),
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(help="With --suite: number of scenes; for synthetic, per kind.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --suite: random seed of the scenes.")] = 0,
    kind: Annotated[
        list[str] | None, typer.Option(help="With --suite synthetic: only these kinds; repeatable.")
    ] = None,
    clip: Annotated[list[str] | None, typer.Option(help="Only these clips; repeatable.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Maximum number of frames per clip.")] = None,
    height: Annotated[int, typer.Option(help="With --suite: height of the scenes in pixels.")] = 480,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    *,
    tracking: TrackSettings,
) -> None:
    """Evaluate a model: J and F on a labelled data set, or a suite of composed scenes."""
    from jobs.evaluation.davis import EvaluationReport, run
    from jobs.evaluation.suites.report import SuiteReport
    from jobs.evaluation.suites.runner import check_options, run_suite
    from pipeline.tracking.segmenters import open_segmenter

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
