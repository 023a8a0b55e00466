"""The synthetic suite: one difficulty per scene (occlusion, cuts, fast, small, similar objects).

Kinds: `plain` has no difficulty and is the baseline of the others. In all kinds the target is given on the
first frame, and a bystander walks further back. Scenes alternate between people, kept out of training, and
other objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.suites.pictures import Pictures
from jobs.evaluation.suites.stage import Actor, Image, Rng, Scene, compose, compressed, filmed

FRAMES = 60
_TARGET = 1
_BYSTANDER = 2
_TWINS = (3, 4)


@dataclass(frozen=True)
class _Set:
    """Material that the scenes of a kind are made from."""

    pictures: Pictures
    rng: Rng
    size: tuple[int, int]
    phases: tuple[Image, ...]
    person: bool

    @property
    def tall(self) -> float:
        """Height of the target in pixels: nearly half the picture, unless that is too wide."""
        height, width = self.size
        shape = self.phases[0].shape
        return float(min(0.46 * height, 0.3 * width * shape[0] / shape[1]))

    def backdrop(self, count: int = FRAMES) -> NDArray[np.uint8]:
        """(T, H, W, 3): one still picture, repeated."""
        return np.repeat(self.pictures.background(self.rng, self.size)[None], count, axis=0)


def synthetic_scenes(
    pictures: Pictures, count: int, seed: int, height: int = 480, kinds: Iterable[str] | None = None
) -> Iterator[Scene]:
    """`count` scenes of each kind, of (height, 4/3 height); a seed always gives the same ones."""
    for kind in KINDS if kinds is None else kinds:
        for index in range(count):
            yield synthetic_scene(pictures, kind, seed, index, height)


def synthetic_scene(pictures: Pictures, kind: str, seed: int, index: int, height: int = 480) -> Scene:
    """The index-th scene of a kind. Scenes of the same index have the same target in every kind."""
    casting = np.random.default_rng([seed, index])
    person = index % 2 == 0
    if person:
        phases = pictures.walker(int(casting.integers(len(pictures.people))))
    else:
        phases = (pictures.objects_like(casting),)
    rng = np.random.default_rng([seed, index, 1 + list(KINDS).index(kind)])
    stage = _Set(pictures, rng, (height, height * 4 // 3), phases, person)
    frames, truth, own, overlap = KINDS[kind](stage)
    if not truth[0].any() or own[0, _TARGET] == 0:
        raise RuntimeError(f"scene {kind}-{index:02d} of seed {seed}: its target is not visible at the start")
    return Scene(f"{kind}-{index:02d}", kind, frames, truth, own, overlap, {_TARGET: 0})


Made = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


# --- the kinds -----------------------------------------------------------------------------------


def _plain(stage: _Set) -> Made:
    return _filmed(stage, compose(stage.backdrop(), [_target(stage), _bystander(stage)]))


def _occlusion(stage: _Set) -> Made:
    """The target walks behind a pillar, stays there for over a second, and comes out on the other side."""
    width = stage.size[1]
    target = _target(stage)
    wide = 1.3 * float(max(target.width(t) for t in range(FRAMES))) + 8
    middle = width * stage.rng.uniform(0.45, 0.55)
    side = float(stage.rng.choice([-1, 1]))
    reach = max(0.5 * wide + 0.6 * target.width(0), 0.3 * width)
    legs = [np.linspace(-reach, 0, 14), np.zeros(14), np.linspace(0, reach, 14), np.full(FRAMES - 42, reach)]
    x = np.clip(middle + side * np.concatenate(legs), 0.5 * target.width(0), width - 0.5 * target.width(0))
    target = _moved(stage, target, x)
    return _filmed(
        stage, compose(stage.backdrop(), [target, _bystander(stage), _pillar(stage, middle, wide)])
    )


def _cut(stage: _Set) -> Made:
    """Another place without the target for a while, then the first one again, from another viewpoint."""
    third = FRAMES // 3
    elsewhere, target = stage.backdrop(third), _target(stage)
    backdrop = stage.backdrop()
    backdrop[third : 2 * third] = elsewhere
    backdrop[2 * third :] = backdrop[2 * third :, :, ::-1]
    shift = np.zeros(FRAMES)
    shift[2 * third :] = stage.size[1] - target.feet[2 * third, 0] - target.feet[third - 1, 0]
    x = np.clip(target.feet[:, 0] + shift, 0.15 * stage.size[1], 0.85 * stage.size[1])
    present = np.ones(FRAMES, np.bool_)
    present[third : 2 * third] = False
    heights = target.heights * np.where(np.arange(FRAMES) < third, 1.0, stage.rng.uniform(0.8, 1.2))
    target = replace(_moved(stage, target, x), present=present, heights=heights)
    return _filmed(stage, compose(backdrop, [target, _bystander(stage)]))


def _fast(stage: _Set) -> Made:
    """The target crosses the picture in about ten frames, repeatedly, with motion blur."""
    target = _target(stage, pace=float(stage.rng.uniform(0.07, 0.11)))
    return _filmed(stage, compose(stage.backdrop(), [target, _bystander(stage)], blur_motion=True))


def _small(stage: _Set) -> Made:
    """The target is a twentieth of the picture's height."""
    tall = max(8.0, stage.size[0] * float(stage.rng.uniform(0.05, 0.065)))
    target = _target(stage, tall=tall, pace=0.006)
    return _filmed(stage, compose(stage.backdrop(), [target, _bystander(stage, tall=0.06)]))


def _similar(stage: _Set) -> Made:
    """The target walks between two look-alikes, and one of them crosses over."""
    width = stage.size[1]
    tall = min(stage.tall, 0.2 * width * stage.phases[0].shape[0] / stage.phases[0].shape[1])
    target = _target(stage, tall=tall)
    gap = max(1.15 * target.width(0), 0.2 * width)
    sway = 0.12 * width * np.sin(np.linspace(0, 2 * np.pi, FRAMES) + stage.rng.uniform(0, 6))
    x = width / 2 + sway - sway[0]
    actors = [_moved(stage, target, x)]
    crossing = np.interp(np.arange(FRAMES), [20, 45], [1.0, -1.0])
    for identity, offset in zip(_TWINS, (np.full(FRAMES, -1.6), crossing), strict=True):
        phases = tuple(_tinted(stage.rng, stage.phases))
        twin = replace(target, identity=identity, pictures=phases)
        nearer = float(stage.rng.choice([-1.0, 1.0])) * 0.01 * stage.size[0]
        twin = _moved(stage, twin, x + offset * gap, nearer)
        actors.append(twin)
    return _filmed(stage, compose(stage.backdrop(), actors))


def _reappear(stage: _Set) -> Made:
    """The target leaves the picture for over a second, and returns, sometimes on the other side."""
    width = stage.size[1]
    target = _target(stage)
    half = 0.6 * float(max(target.width(t) for t in range(FRAMES))) + 0.02 * width
    near, far = (-half, width + half) if stage.rng.random() < 0.5 else (width + half, -half)
    back = far if stage.rng.random() < 0.5 else near
    start, end = width * stage.rng.uniform(0.4, 0.6), width * stage.rng.uniform(0.35, 0.65)
    legs = [np.full(5, start), np.linspace(start, near, 14), np.full(22, near), np.linspace(back, end, 15)]
    x = np.concatenate([*legs, np.full(FRAMES, end)])[:FRAMES]
    return _filmed(stage, compose(stage.backdrop(), [_moved(stage, target, x), _bystander(stage)]))


def _blur(stage: _Set) -> Made:
    """The lens loses focus and regains it, twice."""
    frames, *truth = _plain(stage)
    strength = 0.014 * stage.size[0] * np.sin(np.linspace(0, 2 * np.pi, FRAMES)) ** 2
    for t, sigma in enumerate(strength):
        if sigma > 0.3:
            frames[t] = cv2.GaussianBlur(frames[t], (0, 0), float(sigma))
    return (frames, *truth)  # type: ignore[return-value]


def _night(stage: _Set) -> Made:
    """A sixth of the light, with the noise of an underexposed sensor."""
    frames, *truth = _plain(stage)
    for t, frame in enumerate(frames):
        dark = frame.astype(np.float32) / 6
        dark += stage.rng.normal(0, 1, dark.shape).astype(np.float32) * np.sqrt(4 + 0.5 * dark)
        frames[t] = np.clip(dark, 0, 255).astype(np.uint8)
    return (frames, *truth)  # type: ignore[return-value]


def _compression(stage: _Set) -> Made:
    """JPEG at a twentieth of the usual quality."""
    frames, *truth = _plain(stage)
    for t, frame in enumerate(frames):
        frames[t] = compressed(frame, 6)
    return (frames, *truth)  # type: ignore[return-value]


KINDS: dict[str, Callable[[_Set], Made]] = {
    "plain": _plain,
    "occlusion": _occlusion,
    "cut": _cut,
    "fast": _fast,
    "small": _small,
    "similar": _similar,
    "reappear": _reappear,
    "blur": _blur,
    "night": _night,
    "compression": _compression,
}


# --- actors ---------------------------------------------------------------------------------------


def _target(stage: _Set, tall: float | None = None, pace: float = 0.014) -> Actor:
    """The labelled target, walking back and forth in the picture; `pace` in picture widths per frame."""
    height, width = stage.size
    rng = stage.rng
    tall = stage.tall if tall is None else tall
    half = 0.55 * tall * stage.phases[0].shape[1] / stage.phases[0].shape[0] / width
    room = max(1 - 2 * half, 0.1)
    way = rng.uniform(0, 2) + float(rng.choice([-1, 1])) * pace / room * np.arange(FRAMES)
    x = width * (half + room * (1 - np.abs(way % 2 - 1)))
    steady = np.ones(FRAMES)
    actor = Actor(
        identity=_TARGET,
        pictures=stage.phases,
        feet=np.stack([x, 0.88 * height * steady], axis=1),
        heights=tall * np.exp(0.12 * np.sin(np.linspace(0, rng.uniform(2, 6), FRAMES))),
        phases=np.zeros(FRAMES),
        mirrored=np.zeros(FRAMES, np.bool_),
        turns=np.zeros(FRAMES),
        depths=0.88 * height * steady,
        present=np.ones(FRAMES, np.bool_),
        shadow=stage.person,
    )
    return _moved(stage, actor, x)


def _moved(stage: _Set, actor: Actor, x: NDArray[np.float64], lower: float = 0.0) -> Actor:
    """The actor on another path across the picture.

    People step and face forward, other objects float and turn.
    """
    tall, rng = float(actor.heights.mean()), stage.rng
    steps = np.diff(x, prepend=x[0])
    steps = np.where(np.abs(steps) > 3 * tall, 0.0, steps)
    y = np.full(len(x), 0.88 * stage.size[0] + lower)
    if stage.person:
        turns = np.cumsum(np.abs(steps)) / (0.8 * tall)
        facing = np.zeros(len(x), np.bool_)
        for t in range(1, len(x)):
            facing[t] = facing[t - 1] if abs(steps[t]) < 0.5 else steps[t] < 0
        y -= 0.012 * tall * np.abs(np.sin(2 * np.pi * turns))
        return replace(
            actor,
            feet=np.stack([x, y], axis=1),
            phases=turns % 1.0,
            mirrored=facing,
            depths=actor.depths + lower,
        )
    swing = np.linspace(0, 4 * np.pi, len(x))
    y -= 0.12 * stage.size[0] * (1 + np.sin(swing / 2 + rng.uniform(0, 6)))
    return replace(
        actor,
        feet=np.stack([x, y], axis=1),
        turns=0.2 * np.sin(swing + rng.uniform(0, 6)),
        depths=actor.depths + lower,
    )


def _bystander(stage: _Set, tall: float = 0.26) -> Actor:
    """Another person further back, who walks across slowly and is not labelled."""
    height, width = stage.size
    rng = stage.rng
    tall *= height
    start, end = rng.permutation([rng.uniform(0.05, 0.35), rng.uniform(0.65, 0.95)]) * width
    x = np.linspace(start, end, FRAMES)
    turns = np.abs(x - start) / (0.8 * tall)
    return Actor(
        identity=_BYSTANDER,
        pictures=stage.pictures.walker(int(rng.integers(len(stage.pictures.people)))),
        feet=np.stack([x, np.full(FRAMES, 0.7 * height)], axis=1),
        heights=np.full(FRAMES, tall),
        phases=turns % 1.0,
        mirrored=np.full(FRAMES, end < start),
        turns=np.zeros(FRAMES),
        depths=np.full(FRAMES, 0.7 * height),
        present=np.ones(FRAMES, np.bool_),
        shadow=True,
    )


def _pillar(stage: _Set, middle: float, wide: float) -> Actor:
    """A strip of another background in front of everything; its pixels belong to no object."""
    height = stage.size[0]
    strip = stage.pictures.background(stage.rng, (height, max(16, round(wide))))
    opaque = np.full((*strip.shape[:2], 1), 255, np.uint8)
    return Actor(
        identity=0,
        pictures=(np.ascontiguousarray(np.concatenate([strip, opaque], axis=2)),),
        feet=np.tile([middle, float(height)], (FRAMES, 1)),
        heights=np.full(FRAMES, float(height)),
        phases=np.zeros(FRAMES),
        mirrored=np.zeros(FRAMES, np.bool_),
        turns=np.zeros(FRAMES),
        depths=np.full(FRAMES, 1e6),
        present=np.ones(FRAMES, np.bool_),
    )


def _tinted(rng: Rng, phases: tuple[Image, ...]) -> Iterator[Image]:
    """Yield copies in a slightly different colour, so that the two can be told apart."""
    gains = 1 + rng.choice([-1.0, 1.0], 3) * rng.uniform(0.08, 0.16, 3)
    for picture in phases:
        rgb = np.clip(picture[..., :3] * gains, 0, 255).astype(np.uint8)
        yield np.dstack([rgb, picture[..., 3]])


def _filmed(stage: _Set, made: Made) -> Made:
    frames, truth, own, overlap = made
    return filmed(stage.rng, frames), truth, own, overlap
