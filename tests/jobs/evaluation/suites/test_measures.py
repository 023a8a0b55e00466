"""The suites' measures on label maps and scenes with known results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import pytest

from jobs.evaluation.suites.measures import FOUND_WITHIN, ObjectMeasure, Tally, runs, summarise
from jobs.evaluation.suites.presence import Observations, fit, ranking, reliability
from jobs.evaluation.suites.stage import Scene

H, W = 20, 60
SIDE = 6


def squares(ways: Mapping[int, Sequence[int | None]], top: dict[int, int] | None = None) -> Scene:
    """Squares of 6 x 6 whose left edges go along the ways; later identities are nearer. All are given at 0.

    A left edge may lie outside the picture; None: it isn't there.
    """
    frames = len(next(iter(ways.values())))
    count = max(ways) + 1
    truth = np.zeros((frames, H, W), np.uint8)
    own = np.zeros((frames, count), np.int64)
    overlap = np.zeros((frames, count, count), np.int64)
    for t in range(frames):
        planes = np.zeros((count, H, W), np.int64)
        for i, way in ways.items():
            if (x := way[t]) is None:
                continue
            y = (top or {}).get(i, 5)
            planes[i, y : y + SIDE, max(x, 0) : max(x + SIDE, 0)] = 1
            own[t, i] = SIDE * SIDE
            truth[t][planes[i] > 0] = i
        flat = planes.reshape(count, -1)
        overlap[t] = flat @ flat.T
    return Scene("made", "made", np.zeros((frames, H, W, 3), np.uint8), truth, own, overlap, {1: 0})


def tally_of(scene: Scene, predicted: dict[int, np.ndarray] | None = None) -> Tally:
    """The truth of identity 1 as prediction, except on frames for which another mask is given."""
    tally = Tally(scene)
    for t, truth in enumerate(scene.truth):
        mask = (predicted or {}).get(t, truth == 1)
        tally.add(t, mask.astype(np.int32))
    return tally


def square(x: int, y: int = 5) -> np.ndarray:
    mask = np.zeros((H, W), np.bool_)
    mask[y : y + SIDE, x : x + SIDE] = True
    return mask


NOTHING = np.zeros((H, W), np.bool_)
CROSSING = {1: list(range(2, 42, 2)), 2: list(range(40, 0, -2))}


def test_the_truth_as_prediction_is_perfect() -> None:
    away = [10, 4, -2, *[-8] * 6, *range(-4, 40, 4)]
    scene = squares({1: away, 2: [30] * len(away)}, top={2: 12})
    measure = tally_of(scene).measure(1)
    assert measure == ObjectMeasure(
        identity=1,
        j=1.0,
        predicted=int((scene.truth[1:] == 1).sum()),
        leaked=0,
        crossings=0,
        swaps=0,
        lost=0,
        returns=1,
        recoveries=1,
        hidden=6,
        false=0,
        false_area=0.0,
    )


def test_j_counts_frames_in_sight_after_the_one_given() -> None:
    scene = squares({1: [0, 10, 20, 54 + 5, None]})  # at 59 a column of six shows: more than a tenth
    # Nothing on the given frame: not counted. Half of it, then all, then all of the part that shows.
    half = square(10)
    half[8:] = False
    tally = tally_of(scene, {0: NOTHING, 1: half})
    assert tally.measure(1).j == pytest.approx((0.5 + 1 + 1) / 3)
    shifted = squares({1: [0, 10, 20, 59, None]})
    shifted.own[3, 1] = 61  # the same six pixels are less than a tenth of something larger
    assert tally_of(shifted, {3: NOTHING}).measure(1).j == 1.0


def test_leakage_is_the_share_of_the_mask_on_visible_pixels_of_others() -> None:
    scene = squares({1: [0, 0, 0], 2: [20, 20, 20]})
    both = square(0) | square(20)
    beside = square(0) | square(40)
    measure = tally_of(scene, {1: both, 2: beside}).measure(1)
    assert (measure.predicted, measure.leaked) == (4 * 36, 36)
    assert summarise([measure]).leakage == 0.25


@pytest.mark.parametrize(
    ("after", "outcome"),
    [("kept", (1, 0, 0)), ("other", (1, 1, 0)), ("nothing", (1, 0, 1)), ("background", (1, 0, 1))],
)
def test_what_becomes_of_a_mask_at_a_crossing(after: str, outcome: tuple[int, int, int]) -> None:
    scene = squares(CROSSING)
    apart = int(np.flatnonzero(scene.overlap[:, 1, 2])[-1]) + 1
    masks: dict[int, np.ndarray] = {}
    for t in range(apart, len(scene.truth)):
        if after == "other":
            masks[t] = scene.truth[t] == 2
        elif after == "nothing":
            masks[t] = NOTHING
        elif after == "background":
            masks[t] = square(0, 14)
    measure = tally_of(scene, masks).measure(1)
    assert (measure.crossings, measure.swaps, measure.lost) == outcome


def test_a_mask_half_on_each_is_no_swap() -> None:
    scene = squares(CROSSING)
    masks = {t: (scene.truth[t] > 0) for t in range(len(scene.truth))}
    measure = tally_of(scene, masks).measure(1)
    assert (measure.crossings, measure.swaps, measure.lost) == (1, 0, 0)


def test_who_was_on_the_other_before_has_not_been_swapped_by_the_meeting() -> None:
    scene = squares(CROSSING)
    masks = {t: scene.truth[t] == 2 for t in range(len(scene.truth))}
    measure = tally_of(scene, masks).measure(1)
    assert (measure.crossings, measure.swaps, measure.lost) == (1, 0, 1)


def test_passing_far_or_without_parting_is_no_crossing() -> None:
    assert tally_of(squares(CROSSING, top={2: 12})).measure(1).crossings == 0
    # One row of six touches: less than a fifth.
    assert tally_of(squares(CROSSING, top={2: 10})).measure(1).crossings == 0
    together = {1: [10] * 12, 2: [30, 24, 18, *[12] * 9]}
    assert tally_of(squares(together)).measure(1).crossings == 0


@pytest.mark.parametrize(("late", "found"), [(FOUND_WITHIN - 1, 1), (FOUND_WITHIN, 0)])
def test_recovery_is_in_time_or_not(late: int, found: int) -> None:
    scene = squares({1: [10, *[None] * 5, *[30] * 20]})
    masks = dict.fromkeys(range(6, 6 + late), NOTHING)
    measure = tally_of(scene, masks).measure(1)
    assert (measure.returns, measure.recoveries) == (1, found)


@pytest.mark.parametrize(
    "way",
    [
        [10, *[None] * 4, *[30] * 20],  # away too shortly
        [10, *[None] * 5, *[30] * (FOUND_WITHIN - 1)],  # back too late for anybody to tell
        [10, *[None] * 20],  # never back
        [10, *[None] * 5, -4, None, None, None, None, None, *[-4] * 20],  # a third of it shows
    ],
)
def test_no_return(way: list[int | None]) -> None:
    assert tally_of(squares({1: way})).measure(1).returns == 0


def test_masks_of_what_is_out_of_sight() -> None:
    scene = squares({1: [10, None, None, None, None]})
    measure = tally_of(scene, {2: square(0), 3: square(0) | square(20)}).measure(1)
    assert (measure.hidden, measure.false) == (4, 2)
    assert measure.false_area == pytest.approx((36 + 72) / 4 / 36)
    assert np.isnan(measure.j)
    whole = summarise([measure])
    assert np.isnan(whole.j)
    assert whole.false_share == 0.5


def test_summaries_add_counts_before_they_divide() -> None:
    def one(j: float, **counts: float) -> ObjectMeasure:
        names = {f.name for f in fields(ObjectMeasure)} - {"identity", "j", "false_area"}
        values = {n: int(counts.get(n, 0)) for n in names}
        return ObjectMeasure(identity=1, j=j, false_area=counts.get("false_area", 0.0), **values)

    total = summarise(
        [
            one(0.5, predicted=100, leaked=10, crossings=1, swaps=1, hidden=10, false_area=0.2),
            one(1.0, predicted=300, leaked=0, crossings=3, lost=1, returns=4, recoveries=1),
            one(float("nan"), hidden=30, false=30, false_area=1.0),
        ]
    )
    assert (total.j, total.leakage) == (0.75, 0.025)
    assert (total.swap_share, total.lost_share, total.recovery) == (0.25, 0.25, 0.25)
    assert total.false_share == 0.75
    assert total.false_area == pytest.approx((10 * 0.2 + 30) / 40)


def test_runs() -> None:
    assert runs(np.array([True, False, True, True])) == [(0, 1), (2, 4)]
    assert runs(np.array([False, False])) == []


# --- presence ------------------------------------------------------------------------------------


def test_reliability_by_hand() -> None:
    scores = np.array([0.05, 0.65, 0.65, 0.65, 0.65, 1.0])
    iou = np.array([0.0, 0.9, 0.9, 0.5, 0.1, 0.8])  # 0.5 itself is not over 0.5
    found = reliability(scores, iou)
    assert [(b.low, b.masks, b.right) for b in found.bins] == [(0.0, 1, 0.0), (0.6, 4, 0.5), (0.9, 1, 1.0)]
    assert found.bins[1].iou == pytest.approx(0.6)
    assert found.error == pytest.approx((0.05 + 4 * 0.15 + 0) / 6)
    assert found.brier == pytest.approx((0.05**2 + 2 * 0.35**2 + 2 * 0.65**2) / 6)
    assert found.ranking == ranking(scores, iou > 0.5)


def test_ranking_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 6, 40) / 6
    right = rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert ranking(scores, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(ranking(scores, np.ones(40, np.bool_)))


def test_the_fit_finds_the_weights_it_was_made_with_and_is_calibrated() -> None:
    rng = np.random.default_rng(4)
    features = rng.normal([0.5, -3.0], [0.2, 5.0], (40000, 2))
    chance = 1 / (1 + np.exp(-(features @ [6.0, -0.3] - 2.5)))
    right = rng.random(40000) < chance
    weights, intercept = fit(features, right)
    assert weights == pytest.approx([6.0, -0.3], abs=0.2)
    assert intercept == pytest.approx(-2.5, abs=0.15)
    scores = 1 / (1 + np.exp(-(features @ weights + intercept)))
    assert reliability(scores, right.astype(float)).error < 0.015


def test_observations_join() -> None:
    one = Observations(np.ones((2, 6)), np.array([0.1, 0.2]), np.array([0.4, 0.6]))
    none = Observations(np.zeros((0, 6)), np.zeros(0), np.zeros(0))
    joined = Observations.joined([one, none, one])
    assert joined.features.shape == (4, 6)
    assert joined.right.tolist() == [False, True, False, True]
