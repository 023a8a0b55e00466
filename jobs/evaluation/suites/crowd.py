"""The crowd suites: 3 to 8 people walk, cross, occlude each other, leave and return; half are labelled.

In the suite `crowd` they are 0.3 to 0.68 of the picture's height, in `far` a tenth to a fifth of it: 40 to 80
pixels at xmem-lite's size of 384.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.suites.pictures import Pictures, look
from jobs.evaluation.suites.stage import Actor, Image, Rng, Scene, compose, filmed

WHOLE = 0.97
"""A person is complete if this share of it is within the picture and not occluded."""


@dataclass(frozen=True)
class Crowd:
    """What people of a suite look like.

    Args:
        name: of the suite.
        middle: the least and greatest mean height of a scene's people, as shares of the picture's height.
        sizes: the smallest and the tallest person, likewise; on their way they grow and shrink a little.
        bounds: their heights never leave these shares.
        step: distance that a person walks per frame at normal pace, in own heights.
    """

    name: str
    middle: tuple[float, float]
    sizes: tuple[float, float]
    bounds: tuple[float, float]
    step: float


NEAR = Crowd("crowd", (0.38, 0.58), (0.3, 0.68), (0.2, 0.75), 0.042)  # 15 frames per second
FAR = Crowd(
    "far", (0.125, 0.175), (0.104, 0.208), (0.104, 0.208), 0.08
)  # 8 frames per second, as cameras send


def crowd_scenes(
    pictures: Pictures, count: int, seed: int, height: int = 480, crowd: Crowd = NEAR
) -> Iterator[Scene]:
    """`count` scenes of 60 to 100 frames of (height, 4/3 height); a seed always gives the same ones."""
    for index in range(count):
        yield crowd_scene(pictures, seed, index, height, crowd)


def crowd_scene(pictures: Pictures, seed: int, index: int, height: int = 480, crowd: Crowd = NEAR) -> Scene:
    """The index-th scene of a seed; it does not depend on the number of scenes."""
    for attempt in range(20):
        rng = np.random.default_rng([seed, index, attempt])
        frames = int(rng.integers(60, 101))
        people = 3 + (index + int(rng.integers(2))) % 6
        scene = _scene(pictures, rng, crowd, index, people, frames, height)
        if scene is not None:
            return scene
    raise RuntimeError(
        f"scene {index} of seed {seed}: no attempt placed two labelled people completely in view"
    )


def _scene(
    pictures: Pictures, rng: Rng, crowd: Crowd, index: int, people: int, count: int, height: int
) -> Scene | None:
    width, leaves = height * 4 // 3, index % 3 != 2
    labelled = (people + int(rng.integers(2))) // 2
    cast = _cast(pictures, rng, people)
    camera = _camera(rng, count, height)
    backdrop = _backdrop(pictures, rng, camera, (height, width))
    horizon = rng.uniform(0.1, 0.3) * height
    # People lower in the picture are nearer and larger; neighbouring lanes are so close that people of about
    # the same size cross.
    middle = rng.uniform(*crowd.middle)
    sizes = np.clip(middle * np.exp(rng.normal(0, 0.14, people)), *crowd.sizes) * height
    starts = (rng.permutation(people) + rng.uniform(0.25, 0.75, people)) / people * width
    actors = []
    for i in range(people):
        pace = crowd.step * sizes[i] * float(np.exp(rng.normal(0, 0.3)))
        away = leaves and (i == 0 or rng.random() < 0.25)
        x = _way(rng, count, float(starts[i]), pace, width, 0.45 * sizes[i], away)
        most = (crowd.bounds[0] * height, crowd.bounds[1] * height)
        actors.append(_walker(rng, pictures.walker(cast[i]), i + 1, x, sizes[i], horizon, most, camera))
    frames, truth, own, overlap = compose(backdrop, actors)
    whole = np.stack([np.bincount(t.ravel(), minlength=people + 1)[: people + 1] for t in truth])
    given: dict[int, int] = {}
    for identity in range(1, labelled + 1):
        shown = np.flatnonzero(whole[:, identity] >= WHOLE * np.maximum(own[:, identity], 1))
        if len(shown) and shown[0] < count // 2:
            given[identity] = int(shown[0])
    if len(given) < max(1, labelled - 1) or 1 not in given:
        return None
    return Scene(f"{crowd.name}-{index:02d}", crowd.name, filmed(rng, frames), truth, own, overlap, given)


def _cast(pictures: Pictures, rng: Rng, people: int) -> list[int]:
    """Choose the people of a scene: any, or, in every other scene, people who look like the first."""
    order = [int(i) for i in rng.permutation(len(pictures.people))]
    if rng.random() < 0.5:
        first = look(pictures.person(order[0]))
        order.sort(key=lambda i: float(np.linalg.norm(look(pictures.person(i)) - first)))
    return [order[i % len(order)] for i in range(people)]


def _camera(rng: Rng, count: int, height: int) -> NDArray[np.float64]:
    """(T, 2) camera displacement since the first frame: none, or slow hand motion."""
    if rng.random() < 0.5:
        return np.zeros((count, 2))
    drift = rng.normal(0, 0.0012, 2) * height * np.arange(count)[:, None]
    shake = np.cumsum(rng.normal(0, 0.0012, (count, 2)) * height, axis=0)
    path: NDArray[np.float64] = drift + shake
    path -= path[0]
    return np.clip(path, -0.12 * height, 0.12 * height)


def _backdrop(
    pictures: Pictures, rng: Rng, camera: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """(T, H, W, 3): a real picture, viewed by a camera that moves over it."""
    height, width = size
    margin = int(np.ceil(np.abs(camera).max()))
    picture = pictures.background(rng, (height + 2 * margin, width + 2 * margin))
    frames = np.empty((len(camera), height, width, 3), np.uint8)
    for t, (x, y) in enumerate(np.round(camera).astype(int)):
        frames[t] = picture[margin - y : margin - y + height, margin - x : margin - x + width]
    return frames


def _way(
    rng: Rng, count: int, start: float, pace: float, width: int, half: float, away: bool
) -> NDArray[np.float64]:
    """(T,) a person's horizontal position: walks, pauses, turns; `away`: leaves the picture and returns."""
    x = [start]
    if away:
        x += [start] * int(rng.integers(4, 12))
        side = -1 if start < width / 2 else 1
        outside = -half if side < 0 else width + half
        # Fast enough that walking out, a pause and walking back fit into the scene.
        pace = max(pace, abs(outside - start) / (0.3 * count))
        x += _leg(x[-1], outside, pace)
        x += [outside] * int(rng.integers(5, max(6, count // 4)))
        if rng.random() < 0.3:
            # Returns from the other side.
            x.append(width + half if side < 0 else -half)
        x += _leg(x[-1], width * float(rng.uniform(0.3, 0.7)), pace)
    while len(x) < count:
        if rng.random() < 0.3:
            x += [x[-1]] * int(rng.integers(3, 13))
        target = float(rng.uniform(-0.05, 1.05)) * width
        if abs(target - x[-1]) > 0.25 * width:
            x += _leg(x[-1], target, pace)
    return np.array(x[:count])


def _leg(start: float, end: float, pace: float) -> list[float]:
    """Positions of a walk from a start (not included) to an end."""
    steps = max(1, round(abs(end - start) / pace))
    return [float(v) for v in np.linspace(start, end, steps + 1)[1:]]


def _walker(
    rng: Rng,
    phases: tuple[Image, ...],
    identity: int,
    x: NDArray[np.float64],
    tall: float,
    horizon: float,
    bounds: tuple[float, float],
    camera: NDArray[np.float64],
) -> Actor:
    count = len(x)
    # People come nearer or move away, and their ground line follows their size.
    nearer = np.exp(np.linspace(0, rng.normal(0, 0.08), count))
    heights = np.clip(tall * nearer, *bounds)
    ground = horizon + heights * rng.uniform(1.22, 1.3)
    steps = np.diff(x, prepend=x[0])
    jumps = np.abs(steps) > 0.5 * tall
    steps = np.where(jumps, 0.0, steps)
    turns = np.cumsum(np.abs(steps)) / (0.8 * tall)
    facing = np.zeros(count, np.bool_)
    for t in range(1, count):
        facing[t] = facing[t - 1] if abs(steps[t]) < 0.5 else steps[t] < 0
    facing[0] = facing[1] if count > 1 else False
    bob = 0.012 * tall * np.abs(np.sin(2 * np.pi * turns))
    feet = np.stack([x, ground - bob], axis=1) + camera
    sway = 0.015 * np.sin(2 * np.pi * turns + rng.uniform(0, 6))
    return Actor(
        identity=identity,
        pictures=phases,
        feet=feet,
        heights=heights,
        phases=(turns + rng.uniform()) % 1.0,
        mirrored=facing,
        turns=sway,
        depths=ground,
        present=np.ones(count, np.bool_),
        shadow=True,
    )
