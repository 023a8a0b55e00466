"""Runs a suite: composes each scene, tracks the given objects, and measures the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.evaluation.davis import Segmenter
from jobs.evaluation.suites.crowd import FAR, NEAR, crowd_scenes
from jobs.evaluation.suites.measures import SceneMeasure, Tally
from jobs.evaluation.suites.pictures import Pictures
from jobs.evaluation.suites.presence import Observations
from jobs.evaluation.suites.report import CROWD_GOALS, Goal, SuiteReport
from jobs.evaluation.suites.stage import Scene
from jobs.evaluation.suites.synthetic import KINDS, synthetic_scenes
from pipeline.base.errors import UsageError
from xmem_core import Prompt
from xmem_core.presence import FEATURES, presence_features

CROWDS = {"crowd": NEAR, "far": FAR}
SUITES = (*CROWDS, "synthetic")
DEFAULT_SCENES = {"crowd": 12, "far": 12, "synthetic": 4}
"""Scenes of the crowd suites, and scenes of each kind of the synthetic suite."""
MIN_HEIGHT = 48

OnFrame = Callable[[Scene, int, NDArray[np.int32]], None]


def run_suite(
    suite: str,
    data: str | Path,
    segmenter: Segmenter,
    *,
    scenes: int | None = None,
    seed: int = 0,
    height: int = 480,
    kinds: Sequence[str] | None = None,
    held_out: bool = True,
    progress: Callable[[str], None] | None = None,
    on_frame: OnFrame | None = None,
) -> SuiteReport:
    """Compose scenes and measure a segmenter; the same seed and pictures always give the same scenes.

    Args:
        suite: "crowd", "far" or "synthetic".
        data: folder of the stills, see `jobs.evaluation.suites.pictures`.
        segmenter: tracks the objects; gets a new state per scene.
        scenes: number of scenes; for "synthetic", of each kind. None: `DEFAULT_SCENES`.
        height: height of the scenes in pixels; their width is 4/3 of it.
        kinds: for "synthetic", only these kinds.
        held_out: False uses people that are trained on: to fit something, not to measure.
        progress: called with a line of text per scene.
        on_frame: called with every predicted label map, H x W int32.

    Raises:
        UsageError: no such suite or kind, too few scenes, or the folder lacks what they need.
    """
    if suite not in SUITES:
        raise UsageError(f"no suite {suite!r}; available: {', '.join(SUITES)}")
    count = DEFAULT_SCENES[suite] if scenes is None else scenes
    if count < 1:
        raise UsageError(f"{count} scenes leave nothing to measure: use at least 1")
    if height < MIN_HEIGHT:
        raise UsageError(f"scenes of {height} pixels are too small: use a height of at least {MIN_HEIGHT}")
    wanted = tuple(kinds or KINDS)
    for kind in wanted:
        if kind not in KINDS:
            raise UsageError(f"no kind {kind!r} of synthetic scene; available: {', '.join(KINDS)}")
    pictures = Pictures(data, held_out)
    made: Iterator[Scene]
    if suite in CROWDS:
        made, total = crowd_scenes(pictures, count, seed, height, CROWDS[suite]), count
    else:
        made, total = synthetic_scenes(pictures, count, seed, height, wanted), count * len(wanted)
    measured: list[SceneMeasure] = []
    observed: list[Observations] = []
    for number, scene in enumerate(made, 1):
        measure, observations = run_scene(scene, segmenter, on_frame)
        measured.append(measure)
        if observations is not None:
            observed.append(observations)
        if progress is not None:
            js = ", ".join(f"{o.identity}: {100 * o.j:.1f}" for o in measure.objects)
            rate = scene.frames.shape[0] / max(measure.seconds, 1e-9)
            progress(f"{number}/{total} {scene.name}: J {js} ({measure.frames} frames at {rate:.1f}/s)")
    goals: dict[str, Goal] = dict(CROWD_GOALS) if suite in CROWDS else {}
    joined = Observations.joined(observed) if observed else None
    return SuiteReport(suite, seed, height, tuple(measured), joined, goals)


def check_options(
    root: str | None,
    suite: str | None,
    data: str | None,
    scenes: int | None,
    kinds: Sequence[str] | None,
    clips: Sequence[str] | None,
    max_frames: int | None,
    of_data_set: Mapping[str, object] | None = None,
) -> None:
    """Check that the options of `xmem evaluate` fit together: a labelled data set, or a suite and its stills.

    Raises:
        UsageError: they do not; the message says what to omit or to add.
    """
    if suite is None:
        given: dict[str, object] = {"--data": data, "--scenes": scenes, "--kind": kinds or None}
        if root is None:
            raise UsageError("nothing to evaluate: give a labelled data set, or --suite and --data")
    else:
        given = {"a data set": root, "--clip": clips or None, "--max-frames": max_frames}
        given |= of_data_set or {}
        if suite != "synthetic":
            given["--kind"] = kinds or None
        if data is None:
            raise UsageError(f"--suite {suite} needs --data, the folder with the stills to compose from")
    strays = [name for name, value in given.items() if value is not None]
    if strays:
        where = "without --suite" if suite is None else f"with --suite {suite}"
        raise UsageError(f"{', '.join(strays)} {where} has no effect: omit it")


def run_scene(
    scene: Scene, segmenter: Segmenter, on_frame: OnFrame | None = None
) -> tuple[SceneMeasure, Observations | None]:
    """Run one scene.

    Returns its measures, and the masks with the model's scores if there are probabilities.
    """
    tally = Tally(scene)
    state = segmenter.new_state()
    rows: list[tuple[int, int, NDArray[np.float64], float]] = []
    known: set[int] = set()
    seconds, told = 0.0, False
    for t, frame in enumerate(scene.frames):
        new = [i for i, first in scene.given.items() if first == t]
        prompt = Prompt({i: scene.truth[t] == i for i in new}) if new else None
        started = time.perf_counter()
        result = segmenter.step(state, frame, prompt)
        labels = _array(result.label_map)
        seconds += time.perf_counter() - started
        if labels.shape != scene.truth.shape[1:]:
            raise UsageError(f"the segmenter returned labels of {labels.shape} for {scene.truth.shape[1:]}")
        tally.add(t, labels.astype(np.int32))
        if on_frame is not None:
            on_frame(scene, t, labels.astype(np.int32))
        probabilities = getattr(result, "network_probabilities", None)
        if probabilities is not None and known:
            told = True
            presence = getattr(result, "presence", None)
            rows += _scored(probabilities, presence, tuple(getattr(result, "object_ids", ())), known, t)
        known.update(new)
    objects = tuple(tally.measure(i) for i in sorted(scene.given))
    measure = SceneMeasure(scene.name, scene.kind, objects, len(scene.frames), seconds)
    if not told:
        return measure, None
    ious = {i: tally.iou(i) for i in scene.given}
    # A mask of one pixel may exist only at the network's size or only at the frame's size.
    rows = [r for r in rows if tally.onto[r[0], r[1]].sum() > 0]
    return measure, Observations(
        np.array([r[2] for r in rows]).reshape(-1, len(FEATURES)),
        np.array([r[3] for r in rows]),
        np.array([ious[i][t] for t, i, _, _ in rows]),
    )


def _scored(
    probabilities: torch.Tensor,
    presence: torch.Tensor | None,
    object_ids: tuple[int, ...],
    known: set[int],
    t: int,
) -> list[tuple[int, int, NDArray[np.float64], float]]:
    """(frame, object, features, score) of every object with a mask that was not given on this frame."""
    features = presence_features(probabilities).cpu().numpy().astype(np.float64)
    scores = np.full(len(features), np.nan) if presence is None else presence.cpu().numpy()
    return [
        (t, i, features[k], float(scores[k]))
        for k, i in enumerate(object_ids)
        if i in known and features[k, 0] > 0
    ]


def _array(labels: Any) -> NDArray[Any]:
    return labels if isinstance(labels, np.ndarray) else np.asarray(labels.cpu().numpy())
