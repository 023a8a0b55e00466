"""The `xmem evaluate` command: scores a model on a labelled data set or on composed scenes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from jobs.cli.options import SAID_BY_SIZE, tracking_options
from jobs.cli.terminal import console, fetch_model
from pipeline.base.errors import UsageError
from pipeline.tracking.settings import TrackSettings, dtype_name, track_options

_NOT_EVALUATED = SAID_BY_SIZE | {
    option.name: "evaluation starts from given masks and writes no output folder"
    for option in track_options()
    if option.path[0] in ("commit", "detector", "direction")
}
_NOT_EVALUATED["size"] = "--size may be given several times here"
_NOT_EVALUATED["small_size"] = "every clip is seen at the sizes that --size gives"


@tracking_options(without=_NOT_EVALUATED, defaults={"dtype": "float32"})  # figures comparable between CPUs
def evaluate(
    root: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a data set: DAVIS, YouTube-VOS, Long-time Video, LVOS, MOSE, BURST, or clips "
            "with frames and masks. Which one it is follows from its layout."
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            "--tracking",
            metavar="TRUTH",
            help="Score the committed tracks of the output folder given as the argument against true boxes, "
            "MOT text or CSV (frame,id,x,y,w,h with frames from 1), or true masks: MOTS text, COCO JSON or a "
            "folder of index PNGs. Frames without any are not scored.",
        ),
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="With --tracking: the stream, where the folder has several.")
    ] = None,
    first_frame: Annotated[int, typer.Option(help="With --tracking: first frame_index to score.")] = 0,
    last_frame: Annotated[
        int | None, typer.Option(help="With --tracking: last frame_index to score.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Evaluate on composed scenes with exact ground truth instead of a data set: crowd "
            "(identities of 3 to 8 people), far (the same, a tenth to a fifth of the picture high) "
            "or synthetic (one difficulty per scene)."
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
    split: Annotated[
        str | None,
        typer.Option(
            help="List under ImageSets/ (2017/val, val, test-dev), part (valid, train) or file with names of "
            "clips. Default: the validation list or part."
        ),
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Folder under JPEGImages/: 480p or Full-Resolution. Default: 480p.")
    ] = None,
    all_frames: Annotated[
        bool,
        typer.Option(
            "--all-frames", help="YouTube-VOS: track every frame (valid_all_frames/), not only those given."
        ),
    ] = False,
    masks_out: Annotated[
        str | None,
        typer.Option(
            help="Folder to write masks to, as palette PNGs. A run that was interrupted goes on there."
        ),
    ] = None,
    as_zip: Annotated[
        bool, typer.Option("--zip", help="With --masks-out: pack the masks for the benchmark's server.")
    ] = False,
    save_scores: Annotated[
        bool, typer.Option("--save-scores", help="With --masks-out: write probabilities too, as npz.")
    ] = False,
    flip: Annotated[
        bool, typer.Option("--flip", help="Track mirrored frames too, and average the probabilities.")
    ] = False,
    size: Annotated[
        list[int] | None,
        typer.Option(
            help="Shorter side of the network's input, in pixels; 0: frames are not resized; repeatable: the "
            "probabilities are averaged. Default: the model's."
        ),
    ] = None,
    clip: Annotated[list[str] | None, typer.Option(help="Only these clips; repeatable.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Maximum number of frames per clip.")] = None,
    height: Annotated[int, typer.Option(help="With --suite: height of the scenes in pixels.")] = 480,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    *,
    tracking: TrackSettings,
) -> None:
    """Evaluate a model (J and F on a labelled data set, a suite of composed scenes), or committed tracks."""
    if truth is not None:
        _tracks(truth, root, suite or data, stream, first_frame, last_frame, as_json)
        return
    from jobs.evaluation.davis import EvaluationReport, Segmenter, run
    from jobs.evaluation.ensemble import Ensemble
    from jobs.evaluation.suites.report import SuiteReport
    from jobs.evaluation.suites.runner import check_options, run_suite
    from pipeline.tracking.segmenters import open_segmenter

    of_data_set = {
        "--split": split,
        "--resolution": resolution,
        "--all-frames": all_frames or None,
        "--masks-out": masks_out,
        "--zip": as_zip or None,
        "--save-scores": save_scores or None,
    }
    check_options(root, suite, data, scenes, kind, clip, max_frames, of_data_set)
    fetch_model(tracking.model.name)
    sides: list[int | None] = [*dict.fromkeys(size)] if size else [None]
    segmenters = [
        open_segmenter(replace(tracking.model, size=side, full_size=False), tracking.memory) for side in sides
    ]
    segmenter: Segmenter = segmenters[0]
    if flip or len(segmenters) > 1:
        segmenter = Ensemble(segmenters, flip=flip)
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
        report = run(
            root,
            segmenter,
            clips=clip,
            max_frames=max_frames,
            split=split,
            resolution=resolution,
            all_frames=all_frames,
            masks_out=masks_out,
            save_scores=save_scores,
            zipped=as_zip,
            settings={
                "model": segmenters[0].fingerprint,
                "dtype": dtype_name(segmenters[0]),
                "sizes": [s.size for s in segmenters],
                "memory": segmenters[0].memory_config.to_dict(),
                "flip": flip,
            },
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        Console(highlight=False).print(report.table())


def _tracks(
    truth: str,
    out: str | None,
    stray: str | None,
    stream: str | None,
    first: int,
    last: int | None,
    as_json: bool,
) -> None:
    from jobs.evaluation.identities import evaluate_tracking

    if out is None or stray is not None:
        raise UsageError(
            "--tracking TRUTH needs the output folder of tracking, and neither --suite nor --data"
        )
    scores = evaluate_tracking(truth, out, stream_id=stream, first=first, last=last)
    if as_json:
        typer.echo(json.dumps(scores.to_json(), indent=2))
    else:
        Console(highlight=False).print(scores.table())
