"""Crowd scenes: cut-out people, often look-alikes, who walk, cross and occlude each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xmem_core.training.compose import (
    Image,
    Pose,
    Rng,
    Sprite,
    bend,
    cut_out,
    pose_matrix,
    recolour,
    shrink_to,
)
from xmem_core.training.library import Library


def crowd_scene(
    library: Library,
    rng: Rng,
    count: int,
    size: int,
    camera: Sequence[Pose],
    pace: float = 1.0,
    *,
    small: bool = False,
    leave: bool = False,
    together: bool = False,
) -> tuple[list[Sprite], frozenset[int]]:
    """Compose three to six people (sometimes with a large occluder), and choose the ones that may be
    labelled.

    `camera`: the background's poses; people stand on its ground, so they move with it. `pace`: factor on
        their
    walking speed; `small`: they are about a quarter as tall; `leave`: some walk out of the frame, and others,
    absent at first, enter after them; `together`: there are more people, some stay so close that they partly
    occlude each other all the time, and some turn round; then sometimes only the close group may be labelled.
    Those who leave or enter are not members of the group.
    """
    number = int(rng.integers(4, 9) if together else rng.integers(3, 7))
    cast = _cast(library, rng, number)
    horizon, eye = rng.uniform(0.0, 0.45) * size, rng.uniform(0.9, 1.6)
    common = float(np.exp(rng.uniform(np.log(0.25), np.log(0.65)))) * size
    least = 0.15
    if small:
        common, least = max(common * rng.uniform(0.15, 0.5), 0.05 * size), 0.05
    heights = np.clip(common * np.exp(rng.normal(0, 0.2, number)), least * size, 0.75 * size)
    starts = rng.uniform(0.05, 0.95, number) * size
    # From small steps between neighbouring frames, where position tells look-alikes apart (which only the
    # sensory memory knows), to large steps between distant frames, where only appearance does.
    speeds = rng.normal(0, 1.0, number) * float(np.exp(rng.uniform(np.log(0.006), np.log(0.12)))) * size
    speeds *= pace
    if rng.random() < 0.45:
        # Two of them swap sides about half-way: they cross, and one occludes the other.
        a, b = 0, 1
        gap = rng.uniform(0.2, 0.7) * size
        starts[a], starts[b] = np.array([0.5, 0.5]) * size + [-gap / 2, gap / 2] + rng.normal(0, 0.05 * size)
        speeds[a] = gap / max(1, count - 1) * rng.uniform(0.8, 1.3)
        speeds[b] = -speeds[a] * rng.uniform(0.6, 1.1)
        heights[b] = heights[a] * rng.uniform(0.85, 1.15)
    passing: frozenset[int] = frozenset()
    if leave and count > 2:
        passing = _come_and_go(rng, count, size, heights, starts, speeds)
    people = frozenset(range(1, number + 1))
    turns = [count] * number
    if together:
        group = _flock(rng, count, heights, starts, speeds, passing)
        if group and rng.random() < 0.6:
            people = frozenset(i + 1 for i in (*group, *passing))
        turns = [
            int(rng.integers(1, count)) if i not in passing and rng.random() < 0.35 else count
            for i in range(number)
        ]
    sprites = []
    for i in range(number):
        feet = horizon + heights[i] * eye + rng.normal(0, 0.04 * size)
        feet = float(np.clip(feet, 0.3 * size, 1.15 * size))
        depth = feet if rng.random() < 0.85 else float(rng.uniform(0, size))
        walk = starts[i] + speeds[i] * _until(turns[i], count)
        sprites.append(
            _walker(rng, cast[i], i + 1, size, heights[i], walk, feet, speeds[i], turns[i], depth, camera)
        )
    if count > 2 and rng.random() < 0.25:
        target = int(rng.integers(number))
        if rng.random() < 0.5:
            sprites.append(occluder(library, rng, sprites[target], 1, count, size, identity=200))
        else:
            sprites[target] = _away(rng, sprites[target], count)
    return sprites, people


def _come_and_go(
    rng: Rng,
    count: int,
    size: int,
    heights: NDArray[np.float64],
    starts: NDArray[np.float64],
    speeds: NDArray[np.float64],
) -> frozenset[int]:
    """Let one or two people leave the frame before the clip ends, and others enter from outside later.

    Changes `starts` and `speeds`; returns the indices of both. Those who left have no mask any more, although
    others look much like them, and some of these go to where they were.
    """
    order = rng.permutation(len(starts))
    leavers = order[: int(rng.integers(1, 3))]
    comers = order[len(leavers) : len(leavers) + int(rng.integers(1, 3))]
    places: list[tuple[float, int]] = []
    for i in leavers:
        side = float(rng.choice([-1.0, 1.0]))
        starts[i] = size * (0.5 + side * rng.uniform(0.0, 0.42))
        gone = int(rng.integers(1, max(2, count - 1)))
        places.append((float(starts[i]), gone))
        outside = size * (0.5 + side * 0.5) + side * 0.35 * heights[i]
        speeds[i] = (outside - starts[i]) / gone * rng.uniform(1.0, 1.3)
    for i in comers:
        side = float(rng.choice([-1.0, 1.0]))
        if rng.random() < 0.5:
            # Enters about when somebody leaves, to the same place, as in a queue or a doorway.
            place, gone = places[int(rng.integers(len(places)))]
            outside = size * (0.5 + side * 0.5) + side * 0.35 * heights[i]
            enters = gone * rng.uniform(0.5, 1.0)
            speeds[i] = (place - outside) / max(1.0, rng.uniform(0.4, 1.0) * (count - 1 - enters))
            starts[i] = outside - speeds[i] * enters
            continue
        starts[i] = size * (0.5 + side * 0.5) + side * rng.uniform(0.35, 0.6) * heights[i]
        seen = int(rng.integers(1, max(2, count - 1)))
        inside = size * (0.5 + side * rng.uniform(0.15, 0.45))
        speeds[i] = (inside - starts[i]) / max(seen, count // 2)
    return frozenset(int(i) for i in (*leavers, *comers))


def _flock(
    rng: Rng,
    count: int,
    heights: NDArray[np.float64],
    starts: NDArray[np.float64],
    speeds: NDArray[np.float64],
    passing: frozenset[int] = frozenset(),
) -> list[int]:
    """Move two to four people to one place, to walk on from there close together; returns their indices.

    People in `passing` are not chosen; if that leaves fewer than two, there is no group. Changes `heights`,
    `starts` and `speeds`. A person is about 0.4 heights wide: with these gaps and this drift someone is
    partly hidden on most frames, and some slowly change sides.
    """
    order = rng.permutation(len(starts))
    most = int(rng.integers(2, 5))
    group = [int(i) for i in order if int(i) not in passing][:most]
    if len(group) < 2:
        return []
    tall = float(heights[group].mean() * rng.uniform(1.0, 1.4))
    # Equal heights mean equal distance: small differences decide who occludes whom.
    heights[group] = np.clip(
        tall * np.exp(rng.normal(0, 0.06, len(group))), heights.min(), 1.2 * heights.max()
    )
    starts[group] = starts[group].mean() + rng.normal(0, 0.22, len(group)) * tall
    drift = rng.normal(0, 0.35, len(group)) * tall / max(1, count - 1)
    speeds[group] = speeds[group].mean() * 0.5 + drift
    return group


def _until(turn: int, count: int) -> NDArray[np.float64]:
    """Steps (count,) walked from the start, with walking back from step `turn` on."""
    steps = np.arange(count, dtype=float)
    walked: NDArray[np.float64] = np.where(steps <= turn, steps, 2 * turn - steps)
    return walked


def _cast(library: Library, rng: Rng, number: int) -> list[Image]:
    """Choose cut-outs of people.

    In two of three scenes some are the same person in slightly different colours.
    """
    stills = library.stills["people"]
    cast: list[Image] = []
    double = rng.random() < 0.65
    while len(cast) < number:
        if cast and double and rng.random() < 0.5:
            # At least this different in colour, so that they can be told apart.
            cast.append(recolour(rng, cast[int(rng.integers(len(cast)))], rng.uniform(0.4, 1.0)))
            continue
        picture, labels = library.still("people", int(rng.integers(len(stills))))
        piece = cut_out(picture, labels > 0)
        if piece is None:
            continue
        if rng.random() < 0.2:
            # From the knees or the waist up: people are often cut off by cars and by the frame.
            piece = piece[: max(12, int(piece.shape[0] * rng.uniform(0.45, 0.8)))]
        cast.append(recolour(rng, piece, 0.5))
    order = rng.permutation(number)
    return [cast[i] for i in order]


def _walker(
    rng: Rng,
    picture: Image,
    identity: int,
    size: int,
    height: float,
    walk: NDArray[np.float64],
    feet: float,
    speed: float,
    turn: int,
    depth: float,
    camera: Sequence[Pose],
) -> Sprite:
    """Make a walking sprite; `walk` (T,): x of the feet; after step `turn` the person faces the other way."""
    count = len(walk)
    picture = shrink_to(picture, height * 1.15)
    source_height, source_width = picture.shape[:2]
    flip = bool(rng.random() < 0.5)
    walks = abs(speed) > 0.01 * size
    phase, stride = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2.4)
    nearer = rng.normal(0, 0.03)
    upright, lean = rng.normal(0, 0.03), rng.normal(0, 0.06)
    first = np.vstack([camera[0], [0, 0, 1]])
    poses: list[Pose] = []
    pictures: list[Image] = []
    for t in range(count):
        swing = float(np.sin(phase + stride * t)) if walks else 0.0
        zoom = float(np.exp(nearer * t))
        x = walk[t] + rng.normal(0, 0.008 * size)
        y = feet + (zoom - 1) * height + abs(swing) * 0.01 * size
        pose = pose_matrix(
            (source_height, source_width),
            (x, y),
            height / source_height * zoom,
            upright + rng.normal(0, 0.01),
            lean * swing,
            1.0 + 0.1 * swing * (1 if walks else 0),
            flip != (t > turn),
            anchor=(source_width / 2, source_height),
        )
        # People on the ground follow the camera's motion since the first frame.
        since = np.vstack([camera[t], [0, 0, 1]]) @ np.linalg.inv(first)
        poses.append(since[:2] @ np.vstack([pose, [0, 0, 1]]))
        pictures.append(bend(picture, _gait(rng, swing)) if walks else picture)
    return Sprite(tuple(pictures), tuple(poses), (depth,) * count, identity)


def _gait(rng: Rng, swing: float) -> NDArray[np.float32]:
    """Shifts that open and close the legs and swing the arms: opposite on both sides, larger further down."""
    grid = rng.normal(0, 0.006, (5, 3, 2))
    grid[3:, 0, 0] += 0.035 * swing
    grid[3:, 2, 0] -= 0.035 * swing
    grid[4:, :, 0] *= 1.4
    grid[2, 0, 0] -= 0.02 * swing
    grid[2, 2, 0] += 0.02 * swing
    return grid.astype(np.float32)


def _away(rng: Rng, sprite: Sprite, count: int) -> Sprite:
    """Return the sprite hidden on some middle frames, and visible again on the last."""
    poses: list[Pose | None] = list(sprite.poses)
    for t in range(1, int(rng.integers(2, count))):
        poses[t] = None
    return Sprite(sprite.pictures, tuple(poses), sprite.depths, sprite.identity)


def occluder(
    library: Library, rng: Rng, target: Sprite, when: int, count: int, size: int, identity: int
) -> Sprite:
    """Make a larger object that covers `target` at frame `when`, entering and leaving sideways."""
    kind = "ecssd" if library.stills["ecssd"] and rng.random() < 0.5 else "people"
    piece: Image | None = None
    while piece is None:
        picture, labels = library.still(kind, int(rng.integers(len(library.stills[kind]))))
        piece = cut_out(picture, labels > 0)
        kind = "people"
    pose = next(p for p in (target.poses[when], *target.poses) if p is not None)
    height, width = target.pictures[0].shape[:2]
    corners = pose @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]], float)
    middle = corners.mean(axis=1)
    tall = float(np.ptp(corners[1])) * rng.uniform(1.1, 1.6)
    tall = min(max(tall, float(np.ptp(corners[0])) * 1.2 * piece.shape[0] / piece.shape[1]), 1.3 * size)
    piece = recolour(rng, shrink_to(piece, tall), 0.5)
    speed = float(rng.choice([-1.0, 1.0])) * rng.uniform(0.5, 1.5) * (tall * piece.shape[1] / piece.shape[0])
    poses = tuple(
        pose_matrix(piece.shape[:2], (middle[0] + speed * (t - when), middle[1]), tall / piece.shape[0])
        for t in range(count)
    )
    return Sprite((piece,), poses, (1e6,) * count, identity)
