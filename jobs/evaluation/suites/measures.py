"""Measures of predicted label maps against a scene's truth, per object. All shares are 0 to 1.

An object is *in sight* on a frame if at least a tenth of it is visible, and *out of sight* if nothing is;
frames in between count as neither. Only frames after the one on which its mask was given count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.suites.stage import Scene

IN_SIGHT = 0.1
"""Visible share from which an object counts as in sight."""
FOUND_WITHIN = 10
"""Number of frames within which a tracker must find an object that came back."""
FOUND_IOU = 0.5
_APART = 5
"""Number of frames after a crossing over which the prediction is examined."""
_MET = 0.2
"""Two people meet if one occludes this share of the other."""
_AWAY = 5
"""An object has come back if it is half visible after this many frames out of sight."""


@dataclass(frozen=True, slots=True)
class ObjectMeasure:
    """One labelled object of one scene.

    Attributes:
        j: mean intersection over union where in sight; nan if it never is again.
        predicted, leaked: pixels of its masks, and those of them on visible pixels of other objects.
        crossings, swaps, lost: number of crossings with another object; of those after which the mask lay
            mostly on the other; and of those after which it did not touch its own object (swaps not counted).
        returns, recoveries: number of returns into sight, and of those on which it was found in time.
        hidden, false: number of frames out of sight, and of those with a mask.
        false_area: mean area of the masks on all frames out of sight, as a share of the object's own size.
    """

    identity: int
    j: float
    predicted: int
    leaked: int
    crossings: int
    swaps: int
    lost: int
    returns: int
    recoveries: int
    hidden: int
    false: int
    false_area: float


@dataclass(frozen=True, slots=True)
class SceneMeasure:
    """The measures of a scene's objects, and the segmentation time."""

    name: str
    kind: str
    objects: tuple[ObjectMeasure, ...]
    frames: int
    seconds: float


@dataclass
class Tally:
    """Per-frame overlap of predicted masks with the truth. Fed frame by frame, so that no mask is kept.

    Attributes:
        onto: (T, N + 1, N + 1) pixels predicted as identity i (given ones only) that belong to j.
    """

    scene: Scene
    onto: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.onto = np.zeros_like(self.scene.overlap)

    def add(self, t: int, labels: NDArray[np.int32]) -> None:
        """Add frame t; `labels`: H x W prediction, object ids as in the scene's `given`."""
        count = self.onto.shape[1]
        pairs = labels.astype(np.int64) * count + self.scene.truth[t]
        self.onto[t] = np.bincount(pairs.ravel(), minlength=count * count)[: count * count].reshape(
            count, count
        )

    def iou(self, identity: int) -> NDArray[np.float64]:
        """(T,) intersection over union; 1 if both are empty."""
        both = self.onto[:, identity, identity]
        union = self.onto[:, identity].sum(axis=1) + self.scene.visible_of(identity) - both
        return np.where(union > 0, both / np.maximum(union, 1), 1.0)

    def measure(self, identity: int) -> ObjectMeasure:
        """All measures of one given object."""
        scene, since = self.scene, self.scene.given[identity] + 1
        visible, own = scene.visible_of(identity), scene.own[:, identity]
        after = np.arange(len(visible)) >= since
        shown = visible / np.maximum(own, 1)
        in_sight = after & (shown >= IN_SIGHT)
        out = after & (visible == 0)
        iou, area = self.iou(identity), self.onto[:, identity].sum(axis=1)
        others = area - self.onto[:, identity, identity] - self.onto[:, identity, 0]
        size = float(own[own > 0].mean()) if own.any() else 1.0
        met = [
            self._after(identity, other, since) for other in range(1, own_count(scene)) if other != identity
        ]
        crossings = [outcome for outcomes in met for outcome in outcomes]
        returns = self._returns(visible, shown, since)
        return ObjectMeasure(
            identity=identity,
            j=float(iou[in_sight].mean()) if in_sight.any() else float("nan"),
            predicted=int(area[after].sum()),
            leaked=int(others[after].sum()),
            crossings=len(crossings),
            swaps=crossings.count("swapped"),
            lost=crossings.count("lost"),
            returns=len(returns),
            recoveries=sum(bool((iou[t : t + FOUND_WITHIN] > FOUND_IOU).any()) for t in returns),
            hidden=int(out.sum()),
            false=int((area[out] > 0).sum()),
            false_area=float(area[out].mean()) / size if out.any() else 0.0,
        )

    def _after(self, one: int, other: int, since: int) -> list[str]:
        """Outcome of each crossing of `one` with `other` for the mask of `one`: kept, swapped or lost."""
        overlap = self.scene.overlap[:, one, other]
        smaller = np.minimum(self.scene.overlap[:, one, one], self.scene.overlap[:, other, other])
        visible = np.stack([self.scene.visible_of(one), self.scene.visible_of(other)])
        outcomes = []
        for first, last in runs(overlap > 0):
            if first < since or (overlap[first:last] / np.maximum(smaller[first:last], 1)).max() < _MET:
                continue
            until = min(last + _APART, len(overlap))
            # Both must be visible to be told apart, for the whole time before the next meeting.
            if (
                until - last < _APART
                or (overlap[last:until] > 0).any()
                or (visible[:, last:until] == 0).any()
            ):
                continue
            before = self._lies_on(one, other, max(since - 1, first - _APART), first)
            now = self._lies_on(one, other, last, until)
            # A mask that was already on the other object was not swapped by this crossing.
            outcomes.append("lost" if now == "swapped" and before == "swapped" else now)
        return outcomes

    def _lies_on(self, one: int, other: int, first: int, last: int) -> str:
        onto = self.onto[first:last, one].sum(axis=0)
        if 2 * onto[other] > onto.sum():
            return "swapped"
        return "kept" if onto[one] > 0 else "lost"

    @staticmethod
    def _returns(visible: NDArray[np.int64], shown: NDArray[np.float64], since: int) -> list[int]:
        """Frames on which the object came back: it is half visible after some time out of sight."""
        found = []
        for first, last in runs(visible == 0):
            if first < since or last - first < _AWAY or last >= len(visible):
                continue
            back = last + int(np.argmax(shown[last:] >= 0.5))
            gone = visible[last : back + 1] == 0
            if shown[back] >= 0.5 and not gone.any() and back + FOUND_WITHIN <= len(visible):
                found.append(back)
        return found


def own_count(scene: Scene) -> int:
    """One more than the scene's largest identity."""
    return int(scene.own.shape[1])


def runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Stretches in which flags are set: (first, one past the last) of each."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True, slots=True)
class Summary:
    """Aggregated measures of many objects: counts are added before shares are taken."""

    objects: int
    j: float
    leakage: float
    crossings: int
    swaps: int
    lost: int
    returns: int
    recoveries: int
    hidden: int
    false: int
    false_area: float

    @property
    def swap_share(self) -> float:
        """Swaps per crossing."""
        return self.swaps / max(self.crossings, 1)

    @property
    def lost_share(self) -> float:
        """Crossings after which the mask did not touch its object and was not mostly on the other."""
        return self.lost / max(self.crossings, 1)

    @property
    def recovery(self) -> float:
        """Returns on which the object was found again in time."""
        return self.recoveries / max(self.returns, 1)

    @property
    def false_share(self) -> float:
        """Share of the frames out of sight that had a mask."""
        return self.false / max(self.hidden, 1)


def summarise(objects: Sequence[ObjectMeasure]) -> Summary:
    """Aggregate all objects; J is the mean over the objects that were in sight."""
    js = [o.j for o in objects if not np.isnan(o.j)]
    hidden = sum(o.hidden for o in objects)
    return Summary(
        objects=len(objects),
        j=float(np.mean(js)) if js else float("nan"),
        leakage=sum(o.leaked for o in objects) / max(sum(o.predicted for o in objects), 1),
        crossings=sum(o.crossings for o in objects),
        swaps=sum(o.swaps for o in objects),
        lost=sum(o.lost for o in objects),
        returns=sum(o.returns for o in objects),
        recoveries=sum(o.recoveries for o in objects),
        hidden=hidden,
        false=sum(o.false for o in objects),
        false_area=sum(o.false_area * o.hidden for o in objects) / max(hidden, 1),
    )
