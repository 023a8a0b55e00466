"""Calibrates a model's presence score on scenes that no suite measures with.

    python -m jobs.evaluation.suites.fitting --data ../shared/data/train weights.safetensors

writes the result into that file; `fit_presence` does the same for any segmenter and returns the result. It
uses people from training stills and other seeds than the suites, so the result can be checked with `xmem
evaluate --suite crowd` and `--suite synthetic`, whose people it has not seen.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jobs.evaluation.davis import Segmenter
from jobs.evaluation.suites.presence import Observations, fit
from jobs.evaluation.suites.runner import run_suite
from pipeline.base.errors import UsageError, XmemError
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import ModelSettings
from xmem_core import load_model
from xmem_core.presence import FEATURES, PresenceConstants
from xmem_core.weights import save_weights

log = logging.getLogger(__name__)

FIT_SEED = 1000


def fit_presence(
    data: str | Path,
    segmenter: Segmenter,
    *,
    seed: int = FIT_SEED,
    crowds: int = 8,
    troubles: int = 2,
    height: int = 480,
    kinds: Sequence[str] | None = None,
    use: Sequence[str] = ("mean", "size"),
    progress: Callable[[str], None] | None = None,
) -> tuple[PresenceConstants, Observations]:
    """Run `crowds` crowd scenes and `troubles` scenes of each kind, and fit the score to which masks are
    right.

    `use`: the features that get a weight; the others get 0. With few scenes, more features rank masks of
        other
    people worse than these two.

    Returns:
        The constants, and the masks they were fitted on.

    Raises:
        UsageError: the folder lacks what scenes need, the segmenter returns no probabilities, or all or none
            of its masks are right, so nothing can be fitted.
    """
    reports = [
        run_suite(
            suite,
            data,
            segmenter,
            scenes=scenes,
            seed=seed,
            height=height,
            kinds=kinds if suite == "synthetic" else None,
            held_out=False,
            progress=progress,
        )
        for suite, scenes in (("crowd", crowds), ("synthetic", troubles))
        if scenes
    ]
    parts = [r.observations for r in reports if r.observations is not None]
    if not parts:
        raise UsageError("the segmenter returns no probabilities: there is nothing to fit a score to")
    seen = Observations.joined(parts)
    right = seen.right
    if right.all() or not right.any():
        which = "all" if len(right) and right.all() else "none"
        raise UsageError(f"{which} of {len(right)} masks are right: no score can be fitted")
    chosen = [FEATURES.index(name) for name in use]
    weights = np.zeros(len(FEATURES))
    weights[chosen], intercept = fit(seen.features[:, chosen], right)
    return PresenceConstants(tuple(np.round(weights, 4).tolist()), round(intercept, 4)), seen


def main() -> None:
    """Fit the presence score of a model and store it in the file: `python -m jobs.evaluation.suites.fitting
    --data ROOT WEIGHTS`."""
    parser = argparse.ArgumentParser(prog="jobs.evaluation.suites.fitting", description=main.__doc__)
    parser.add_argument("weights", help=".safetensors file; only its metadata is changed")
    parser.add_argument("--data", required=True, help="the folder with stills/")
    parser.add_argument("--crowds", type=int, default=8)
    parser.add_argument("--troubles", type=int, default=2)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--dtype", default="auto", help="as for xmem track")
    args = parser.parse_args()
    if Path(args.weights).suffix != ".safetensors":
        parser.error(f"the score is stored in a .safetensors file, which {args.weights} is not")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        model = load_model(args.weights)
        constants, seen = fit_presence(
            args.data,
            open_segmenter(ModelSettings(args.weights, dtype=args.dtype)),
            crowds=args.crowds,
            troubles=args.troubles,
            height=args.height,
            progress=log.info,
        )
        model.config = replace(model.config, presence=tuple(constants.to_list()))
        save_weights(model, args.weights)
    except (XmemError, ValueError) as error:
        parser.exit(getattr(error, "exit_code", 2), f"{error}\n")
    log.info("%s, from %d masks, %.1f %% of them right", constants, len(seen.iou), 100 * seen.right.mean())


if __name__ == "__main__":
    main()
