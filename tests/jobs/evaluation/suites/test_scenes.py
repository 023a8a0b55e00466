"""Composed scenes: exact truth, reproducible by seed, and the properties of each kind."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.pictures import flat, flat_sprite, write_pictures

from jobs.evaluation.suites.crowd import FAR, WHOLE, crowd_scene, crowd_scenes
from jobs.evaluation.suites.measures import Tally
from jobs.evaluation.suites.pictures import HELD_OUT_PEOPLE, Pictures, look
from jobs.evaluation.suites.stage import Actor, Scene, compose, compressed, filmed, walk_phases
from jobs.evaluation.suites.synthetic import KINDS, synthetic_scene, synthetic_scenes
from pipeline.base.errors import UsageError
from xmem_core.training.library import Library

HEIGHT = 48
TROUBLED = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), people=12, clips=0)


@pytest.fixture(scope="module")
def pictures(root: Path) -> Pictures:
    return Pictures(root)


def still(
    identity: int, colour: tuple[int, int, int], x: float, y: float, depth: float, side: int = 8
) -> Actor:
    """An opaque square on two frames, standing at (x, y)."""
    return Actor(
        identity=identity,
        pictures=(flat_sprite(side, side, colour),),
        feet=np.array([[x, y]] * 2),
        heights=np.full(2, float(side)),
        phases=np.zeros(2),
        mirrored=np.zeros(2, np.bool_),
        turns=np.zeros(2),
        depths=np.full(2, depth),
        present=np.ones(2, np.bool_),
    )


def digest(scene: Scene) -> str:
    return hashlib.sha256(scene.frames.tobytes() + scene.truth.tobytes()).hexdigest()


# --- composing -----------------------------------------------------------------------------------


def test_composing_is_exact() -> None:
    backdrop = np.stack([flat(20, 30, (9, 9, 9))] * 2)
    red, blue = still(1, (200, 0, 0), 10, 16, 1.0), still(3, (0, 0, 200), 14, 14, 2.0)
    frames, truth, own, overlap = compose(backdrop, [blue, red])
    assert backdrop.max() == 9
    expected = np.zeros((20, 30), np.uint8)
    expected[8:16, 6:14] = 1
    expected[6:14, 10:18] = 3  # nearer, whatever order they are given in
    assert (truth == expected).all()
    assert (frames[0][expected == 1] == (200, 0, 0)).all()
    assert (frames[0][expected == 3] == (0, 0, 200)).all()
    assert (frames[0][expected == 0] == 9).all()
    assert own.tolist() == [[0, 64, 0, 64]] * 2
    assert overlap[0, 1].tolist() == [0, 64, 0, 24]
    assert (overlap[0] == overlap[0].T).all()


def test_what_is_outside_counts_as_its_own_but_not_as_visible() -> None:
    backdrop = np.stack([flat(20, 30, (9, 9, 9))] * 2)
    cut, beyond = still(1, (200, 0, 0), 1, 16, 1.0), still(2, (0, 200, 0), 60, 16, 1.0)
    absent = replace(still(3, (0, 0, 200), 15, 16, 1.0), present=np.array([True, False]))
    _, truth, own, overlap = compose(backdrop, [cut, beyond, absent])
    assert own.tolist() == [[0, 64, 64, 64], [0, 64, 64, 0]]
    scene = Scene("", "", backdrop, truth, own, overlap, {})
    assert scene.visible[:, 1:].tolist() == [[40, 0, 64], [40, 0, 0]]
    assert overlap[0, 1, 1] == 40


def test_nobody_hides_somebody() -> None:
    backdrop = np.stack([flat(20, 30, (9, 9, 9))] * 2)
    pillar = still(0, (90, 90, 90), 10, 18, 1e6, side=12)
    frames, truth, own, _ = compose(backdrop, [pillar, still(1, (200, 0, 0), 10, 16, 1.0)])
    assert not truth.any()
    assert own[0].tolist() == [0, 64]
    assert (frames[0, 8:16, 6:14] == 90).all()


def test_motion_blur_smears_along_the_way_only() -> None:
    backdrop = np.stack([flat(40, 80, (0, 0, 0))] * 2)
    actor = replace(
        still(1, (200, 200, 200), 0, 30, 1.0, side=16), feet=np.array([[20.0, 30.0], [44.0, 30.0]])
    )
    sharp, truth, _, _ = compose(backdrop, [actor])
    smeared, smeared_truth, _, _ = compose(backdrop, [actor], blur_motion=True)
    assert (smeared[0] == sharp[0]).all()
    assert set(np.unique(sharp)) == {0, 200}
    row = smeared[1, 22, :, 0].astype(int)
    assert row[44] == pytest.approx(200, abs=3)
    assert 20 < row[36] < 180
    assert row[38] > row[33] > 0
    assert not smeared[1, :13].any()
    assert not smeared[1, 32:].any()
    # Half covered is the same place as before it was smeared, to a pixel.
    assert abs(int((smeared_truth[1] == 1).sum()) - int((truth[1] == 1).sum())) <= 32


def test_a_gait_moves_feet_and_keeps_the_head() -> None:
    person = flat_sprite(100, 40, (50, 60, 70), edge=4)
    phases = walk_phases(person)
    solid = [p[..., 3] > 127 for p in phases]
    heads = [s[10:20] for s in solid]
    assert all((h == heads[0]).all() for h in heads)
    feet = [np.flatnonzero(s[92]) for s in solid]
    widths = {int(f[-1] - f[0]) for f in feet}
    assert max(widths) - min(widths) >= 10
    areas = [int(s.sum()) for s in solid]
    assert min(areas) > 0.75 * max(areas)


def test_filming_changes_pixels_a_little_and_compression_more() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8).repeat(32, axis=1).repeat(32, axis=2)
    seen = filmed(np.random.default_rng(1), frames)
    off = np.abs(seen.astype(int) - frames)
    assert 1 < off.mean() < 12
    assert (seen == filmed(np.random.default_rng(1), frames)).all()
    noisy = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert np.abs(compressed(noisy, 6).astype(int) - noisy).mean() > 30


# --- pictures ------------------------------------------------------------------------------------


def test_people_measured_are_never_those_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pictures(tmp_path, people=55, clips=0)
    (root / "stills" / "people" / "0050.png").unlink()
    monkeypatch.setattr("jobs.evaluation.suites.pictures.HELD_OUT_PEOPLE", 51)
    trained = set(Library(root, held_out_people=51).stills["people"])
    measured, others = Pictures(root).people, Pictures(root, held_out=False).people
    assert len(measured) == 50
    assert inspect.signature(Library).parameters["held_out_people"].default == HELD_OUT_PEOPLE
    assert not trained & set(measured)
    assert set(others) == trained


def test_the_folder_above_train_will_do(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", people=3, clips=0)
    assert len(Pictures(tmp_path).people) == 3


def test_folders_without_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path} has no pictures to compose scenes from"):
        Pictures(tmp_path)
    write_pictures(tmp_path, people=3, clips=0)
    (tmp_path / "stills" / "people" / "0001.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"0001\.jpg or its mask cannot be decoded"):
        Pictures(tmp_path).person(1)


def test_cut_outs_and_backgrounds(pictures: Pictures) -> None:
    person = pictures.person(2)
    assert person.shape[2] == 4
    solid = person[person[..., 3] > 250][:, :3].astype(int)
    assert np.abs(solid.mean(axis=0) - (202, 40, 40)).max() < 12
    assert np.linalg.norm(look(person) - look(pictures.person(3))) < 20
    place = pictures.background(np.random.default_rng(0), (48, 64))
    assert place.shape == (48, 64, 3)


# --- crowds --------------------------------------------------------------------------------------


def test_crowds_are_the_same_for_a_seed_however_many_there_are(pictures: Pictures, root: Path) -> None:
    three = [digest(s) for s in crowd_scenes(pictures, 3, 7, HEIGHT)]
    assert digest(crowd_scene(Pictures(root), 7, 2, HEIGHT)) == three[2]
    assert digest(crowd_scene(pictures, 8, 2, HEIGHT)) != three[2]
    assert len(set(three)) == 3


def test_crowds_hold_what_they_promise(pictures: Pictures) -> None:
    scenes = list(crowd_scenes(pictures, 6, 0, HEIGHT))
    left = crossed = 0
    for scene in scenes:
        count, people = len(scene.frames), scene.own.shape[1] - 1
        assert 60 <= count <= 100
        assert 3 <= people <= 8
        assert people / 2 - 1.5 <= len(scene.given) <= (people + 1) / 2
        assert scene.frames.shape == (count, HEIGHT, HEIGHT * 4 // 3, 3)
        visible = scene.visible
        assert (visible[:, 1:] <= scene.own[:, 1:]).all()
        assert (scene.overlap.diagonal(axis1=1, axis2=2)[:, 1:] >= visible[:, 1:]).all()
        for identity, first in scene.given.items():
            shares = visible[:, identity] / scene.own[:, identity]
            assert shares[first] >= WHOLE
            assert (shares[:first] < WHOLE).all()
            left += bool((visible[first:, identity] == 0).any())
        crossed += int((scene.overlap[:, 1, 2:] > 0).any())
    assert left >= 3
    assert crossed >= 3
    assert len({s.own.shape[1] for s in scenes}) > 3


def test_people_of_far_crowds_are_a_tenth_to_a_fifth_of_the_picture_and_cross(pictures: Pictures) -> None:
    crossed = 0
    for scene in crowd_scenes(pictures, 3, 0, 240, FAR):
        assert (scene.kind, scene.name[:4]) == ("far", "far-")
        assert len(scene.given) >= 1
        for identity in range(1, scene.own.shape[1]):
            whole = np.flatnonzero(scene.visible[:, identity] >= WHOLE * scene.own[:, identity].max())
            for t in whole:
                rows = np.flatnonzero((scene.truth[t] == identity).any(1))
                assert 0.09 * 240 <= rows[-1] - rows[0] + 1 <= 0.22 * 240
        crossed += int((scene.overlap[:, 1, 2:] > 0).any())
    assert crossed >= 2


# --- troubles ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def troubles(pictures: Pictures) -> dict[str, Scene]:
    return {s.kind: s for s in synthetic_scenes(pictures, 1, 3, TROUBLED)}


def test_every_kind_gives_its_target_whole_on_the_first_frame(
    pictures: Pictures, troubles: dict[str, Scene]
) -> None:
    assert list(troubles) == list(KINDS)
    things = {k: synthetic_scene(pictures, k, 3, 1, TROUBLED) for k in KINDS}
    for scene in (*troubles.values(), *things.values()):
        assert scene.given == {1: 0}
        assert scene.visible_of(1)[0] >= 0.95 * scene.own[0, 1] > 0, scene.name


def test_only_three_kinds_hide_their_target_and_they_show_it_again(troubles: dict[str, Scene]) -> None:
    for kind, scene in troubles.items():
        hidden = scene.visible_of(1) == 0
        if kind in ("occlusion", "cut", "reappear"):
            assert hidden.sum() >= 15, kind
            assert not hidden[-5:].any(), kind
            tally = Tally(scene)
            for t, truth in enumerate(scene.truth):
                tally.add(t, (truth == 1).astype(np.int32))
            assert (tally.measure(1).returns, tally.measure(1).recoveries) == (1, 1), kind
        else:
            assert not hidden.any(), kind


def test_troubles_are_there(troubles: dict[str, Scene]) -> None:
    brightness = {k: float(s.frames.mean()) for k, s in troubles.items()}
    assert brightness["night"] < 0.3 * brightness["plain"]
    assert troubles["small"].own[0, 1] < 0.05 * troubles["plain"].own[0, 1]

    def step(scene: Scene) -> float:
        middles = [np.nonzero(t == 1)[1].mean() for t in scene.truth]
        return float(np.median(np.abs(np.diff(middles))))

    assert step(troubles["fast"]) > 3 * step(troubles["plain"])

    def sharpness(frame: np.ndarray) -> float:
        return float(cv2.Laplacian(frame, cv2.CV_64F).std())

    blurred = troubles["blur"].frames
    assert sharpness(blurred[15]) < 0.7 * sharpness(blurred[0])
    cut = troubles["cut"].frames.astype(int)
    jumps = np.abs(np.diff(cut, axis=0)).mean(axis=(1, 2, 3))
    assert set(np.argsort(jumps)[-2:]) == {19, 39}
    similar = troubles["similar"]
    assert similar.own.shape[1] == 5
    assert (similar.overlap[:, 1, 3:] > 0).any()


def test_troubles_are_the_same_for_a_seed(pictures: Pictures, troubles: dict[str, Scene]) -> None:
    assert digest(synthetic_scene(pictures, "occlusion", 3, 0, TROUBLED)) == digest(troubles["occlusion"])
    assert digest(synthetic_scene(pictures, "occlusion", 4, 0, TROUBLED)) != digest(troubles["occlusion"])
    only = list(synthetic_scenes(pictures, 2, 3, TROUBLED, ["fast"]))
    assert [s.name for s in only] == ["fast-00", "fast-01"]
    assert digest(only[0]) == digest(troubles["fast"])
