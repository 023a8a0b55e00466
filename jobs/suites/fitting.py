"""Fits the presence score of a model on scenes that nobody measures with.

    segmenter = pipeline.executor.open_segmenter("xmem-lite")
    constants, observations = fit_presence("../shared/data", segmenter)

People from stills that are trained on, other seeds than the suites' own: what comes of it can be checked with
`xmem evaluate --suite crowd` and `--suite synthetic`, whose people it has not seen. To be repeated for new
weights, and the constants written into `xmem_core.presence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jobs.evaluate import Segmenter
from jobs.suites.presence import Observations, fit
from jobs.suites.runner import run_suite
from pipeline.errors import UsageError
from xmem_core.presence import FEATURES, PresenceConstants

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
    """Run `crowds` crowd scenes and `troubles` of each kind, and fit the score to what was right.

    `use`: the features that get a weight, the others get 0. On few scenes more of them rank other people's
    masks worse than these two.

    Returns:
        the constants, and the masks they were fitted on.

    Raises:
        UsageError: the folder doesn't hold what scenes need, the segmenter gives no probabilities, or all of
            its masks are right, or none is: nothing can be learnt from that.
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
        raise UsageError("the segmenter tells no probabilities: there is nothing to fit a score to")
    seen = Observations.joined(parts)
    right = seen.right
    if right.all() or not right.any():
        which = "all" if len(right) and right.all() else "none"
        raise UsageError(f"{which} of {len(right)} masks are right: a score cannot be fitted to that")
    chosen = [FEATURES.index(name) for name in use]
    weights = np.zeros(len(FEATURES))
    weights[chosen], intercept = fit(seen.features[:, chosen], right)
    return PresenceConstants(tuple(np.round(weights, 4).tolist()), round(intercept, 4)), seen
