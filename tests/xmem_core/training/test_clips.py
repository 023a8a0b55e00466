from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from support.pictures import CLIP_LENGTH, flat, flat_sprite, write_pictures

from xmem_core.training.clips import (
    ClipOptions,
    _camera_path,
    _exposure,
    _hide_some,
    _varied,
    _video_layer,
    choose_objects,
    make_batch,
    make_clip,
    relabel,
    still_scene,
)
from xmem_core.training.compose import (
    Background,
    Pose,
    Sprite,
    bend,
    cut_out,
    degrade,
    pose_matrix,
    render,
    smooth_path,
)
from xmem_core.training.crowd import _come_and_go, _flock, crowd_scene, occluder
from xmem_core.training.library import Library, paint_over

REAL = Path(__file__).parents[4] / "shared" / "data" / "train"
STAY = np.array([[1.0, 0, 0], [0, 1, 0]])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(write_pictures(tmp_path_factory.mktemp("pictures")), held_out_people=2)


def empty_scene(count: int, size: int = 64, colour: tuple[int, int, int] = (10, 20, 30)) -> Background:
    nobody = np.zeros((size, size), np.uint8)
    return Background((flat(size, size, colour),) * count, (nobody,) * count, (STAY,) * count)


# The library


def test_held_out_people_are_never_listed(tmp_path: Path) -> None:
    root = write_pictures(tmp_path)
    names = [p.name for p in Library(root, held_out_people=2).stills["people"]]
    assert names == ["0000.jpg", "0001.jpg", "0002.jpg", "0003.jpg"]
    assert len(Library(root, held_out_people=0).stills["people"]) == 6


def test_labels_take_the_size_of_their_picture_and_large_ones_shrink(tmp_path: Path) -> None:
    folder = tmp_path / "stills" / "coco"
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / "a.jpg"), np.full((300, 450, 3), 99, np.uint8))
    labels = np.zeros((301, 449), np.uint8)
    labels[:, 225:] = 3
    cv2.imwrite(str(folder / "a.png"), labels)
    picture, read = Library(tmp_path, longest=150).still("coco", 0)
    assert picture.shape == (100, 150, 3)
    assert read.shape == (100, 150)
    assert set(np.unique(read)) == {0, 3}
    assert read[:, 77:].min() == 3
    assert read[:, :73].max() == 0


def test_pictures_are_rgb(library: Library) -> None:
    picture, labels = library.clip_frame(0, 3)
    assert picture[labels > 0].mean(axis=0) == pytest.approx([220, 220, 20], abs=12)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training pictures under"):
        Library(tmp_path)


def test_painting_over_removes_the_object_and_touches_nothing_else(library: Library) -> None:
    picture, labels = library.still("people", 0)
    emptied = library.emptied_still("people", 0)
    # Objects are strongly red (200, 40, 40), their surroundings gray.
    assert np.abs(emptied.astype(int) - 110).max() < 60
    far = cv2.dilate((labels > 0).astype(np.uint8), np.ones((11, 11), np.uint8)) == 0
    assert np.array_equal(emptied[far], picture[far])


@pytest.mark.parametrize("columns", [slice(0, 64), slice(4, 60)])
def test_painting_over_a_hole_as_wide_as_the_picture(columns: slice) -> None:
    picture = flat(64, 64, (50, 100, 150))
    hole = np.zeros((64, 64), bool)
    hole[:, columns] = True
    assert paint_over(picture, hole).shape == picture.shape
    assert np.array_equal(paint_over(picture, np.zeros((64, 64), bool)), picture)


# Layers


@pytest.mark.parametrize("at", [32, 3, 61])  # also where it is half outside
def test_what_moves_is_smeared_along_its_way(at: float) -> None:
    """A square moves 12 pixels per frame with the shutter open half the time: 6 pixels, 3 to each side."""
    poses = tuple(pose_matrix((20, 20), (at + 12.0 * t, 30.0), 1) for t in (-1, 0, 1))
    red = Sprite((flat_sprite(20, 20, (255, 0, 0)),), poses, (1.0,) * 3, 7)
    sharp, own = render(empty_scene(3), [red], (64, 64))
    smeared, wide = render(empty_scene(3), [red], (64, 64), [0.5] * 3)
    again, _ = render(empty_scene(3), [red], (64, 64), [0.0] * 3)
    assert np.array_equal(sharp, again)
    row, faded = sharp[1][30, :, 0].astype(float), smeared[1][30, :, 0].astype(float)
    inner = np.flatnonzero(np.convolve(row == 255, np.ones(9), "same") == 9)
    assert np.all(faded[inner] >= 250)
    changed = np.flatnonzero(np.abs(row - faded) > 12)
    assert 2 <= len(changed) <= 14
    edges = np.array([at - 10, at + 10])
    assert np.abs(changed[:, None] - edges).min(axis=1).max() <= 4.5
    column = int(np.clip(at, 0, 63))
    assert np.array_equal(sharp[1][:, column], smeared[1][:, column])  # nothing to above or below
    assert abs(int((own[1] == 7).sum()) - int((wide[1] == 7).sum())) <= 22


def test_what_rests_or_comes_and_goes_is_smeared_as_far_as_is_known() -> None:
    here, there = pose_matrix((20, 20), (20.0, 30.0), 1), pose_matrix((20, 20), (40.0, 30.0), 1)
    picture = (flat_sprite(20, 20, (255, 0, 0)),)

    def shown(*poses: Pose | None) -> list[bool]:
        sprite = [Sprite(picture, poses, (1.0,) * len(poses), 7)]
        size = (64, 64)
        sharp, _ = render(empty_scene(len(poses)), sprite, size)
        smeared, _ = render(empty_scene(len(poses)), sprite, size, [0.5] * len(poses))
        return [not np.array_equal(a, b) for a, b in zip(sharp, smeared, strict=True)]

    assert shown(here, here) == [False, False]
    assert shown(here, there) == [True, True]
    assert shown(here, None, there) == [False, False, False]
    assert shown(None, here, there, None) == [False, True, True, False]


def test_a_share_of_clips_is_smeared_half_of_these_from_the_first_frame_on() -> None:
    drawn = [
        _exposure(np.random.default_rng(seed), ClipOptions(size=64, frames=4, smeared=0.5))
        for seed in range(400)
    ]
    shutters = [s for s in drawn if s is not None]
    assert 150 < len(shutters) < 250
    assert {len(s) for s in shutters} == {4}
    assert all(0.2 <= s[1] == s[2] == s[3] <= 0.8 and s[0] in (0.0, s[1]) for s in shutters)
    assert 0.4 < np.mean([s[0] == 0 for s in shutters]) < 0.6
    assert _exposure(np.random.default_rng(0), ClipOptions(smeared=0.0)) is None


def test_the_nearer_sprite_is_drawn_and_labelled_on_top() -> None:
    red = Sprite(
        (flat_sprite(20, 20, (255, 0, 0)),), (pose_matrix((20, 20), (30, 32), 1),) * 2, (1.0, 3.0), 7
    )
    blue = Sprite(
        (flat_sprite(20, 20, (0, 0, 255)),), (pose_matrix((20, 20), (40, 32), 1),) * 2, (2.0, 2.0), 9
    )
    frames, identities = render(empty_scene(2), [red, blue], (64, 64))
    # x 30..40 is covered by both; who is nearer changes between the frames.
    for t, (who, colour) in enumerate([(9, (0, 0, 255)), (7, (255, 0, 0))]):
        assert set(np.unique(identities[t, 25:40, 32:38])) == {who}
        assert np.array_equal(np.unique(frames[t, 25:40, 32:38].reshape(-1, 3), axis=0), [colour])
    assert (identities[0] == 7).sum() == 200
    assert (identities[0] == 9).sum() == 400
    assert identities[0, 0, 0] == 0
    assert tuple(frames[0, 0, 0]) == (10, 20, 30)


def test_colours_and_identities_agree_everywhere_for_moving_turning_sprites() -> None:
    rng = np.random.default_rng(3)
    colours = {5: (250, 0, 0), 6: (0, 250, 0), 7: (0, 0, 250)}
    sprites = [
        Sprite(
            (flat_sprite(30, 18, colour, edge=2),),
            tuple(
                pose_matrix((30, 18), (20 + 9 * t + 6 * i, 30 + 5 * i), 1.2, 0.3 * t, 0.1 * t)
                for t in range(4)
            ),
            tuple(rng.random(4)),
            number,
        )
        for i, (number, colour) in enumerate(colours.items())
    ]
    frames, identities = render(empty_scene(4, colour=(0, 0, 0)), sprites, (64, 64))
    # The strongest channel tells whose colour it is; under half of full strength it is the black behind.
    mapped = np.where(frames.max(axis=3) >= 125, frames.argmax(axis=3) + 5, 0)
    assert set(np.unique(identities)) == {0, 5, 6, 7}
    # Pixels blended half and half at an edge may fall to either side.
    strengths = np.sort(frames.astype(int), axis=3)
    clear = (strengths[..., 2] - strengths[..., 1] > 8) & (np.abs(strengths[..., 2] - 125) > 8)
    assert (clear | (frames.max(axis=3) == 0)).mean() > 0.95
    assert (mapped != identities)[clear].mean() < 0.001


def test_a_sprite_out_of_the_scene_or_out_of_frame_leaves_no_trace() -> None:
    gone = Sprite(
        (flat_sprite(20, 20, (255, 0, 0)),), (None, pose_matrix((20, 20), (-40, 10), 1)), (1.0, 1.0), 7
    )
    frames, identities = render(empty_scene(2), [gone], (64, 64))
    assert identities.max() == 0
    assert np.array_equal(frames, np.stack([flat(64, 64, (10, 20, 30))] * 2))


def test_the_background_carries_its_identities_along() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[10:20, 10:20] = 4
    poses = (STAY, np.array([[1.0, 0, 15], [0, 1, 5]]))
    _, identities = render(Background((flat(64, 64, (1, 2, 3)),) * 2, (labels,) * 2, poses), [], (64, 64))
    assert (identities[0][10:20, 10:20] == 4).all()
    assert (identities[1][15:25, 25:35] == 4).all()
    assert (identities == 4).sum() == 200


def test_pose_puts_the_anchor_in_place_and_flips_about_it() -> None:
    pose = pose_matrix((30, 20), (50, 60), 2.0, 0.4, 0.1, 1.1, anchor=(3, 28))
    assert pose @ [3, 28, 1] == pytest.approx([50, 60])
    flipped = pose_matrix((30, 20), (50, 60), 2.0, flip=True)
    assert flipped @ [20, 15, 1] == pytest.approx([30, 60])


def test_bending_by_nothing_changes_nothing_and_shifts_are_in_heights() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    assert np.array_equal(bend(picture, np.zeros((4, 4, 2), np.float32)), picture)
    down = np.zeros((4, 4, 2), np.float32)
    down[..., 1] = 0.1
    assert np.array_equal(bend(picture, down)[:36], picture[4:])


def test_cut_out_is_tight_opaque_inside_and_clear_outside() -> None:
    mask = np.zeros((60, 60), bool)
    mask[10:50, 20:40] = True
    piece = cut_out(flat(60, 60, (9, 8, 7)), mask)
    assert piece is not None
    assert piece.shape == (44, 24, 4)
    assert piece[22, 12, 3] == 255
    assert piece[:, :2, 3].max() == 0
    assert cut_out(flat(60, 60, (0, 0, 0)), mask & (np.arange(60) < 25)) is None


def test_an_object_cut_by_the_pictures_border_stays_opaque_there() -> None:
    mask = np.zeros((60, 60), bool)
    mask[30:, 20:40] = True
    piece = cut_out(flat(60, 60, (9, 8, 7)), mask)
    assert piece is not None
    assert piece[-1, 12, 3] == 255


def test_paths_start_at_zero_and_a_speed_of_zero_stays() -> None:
    path = smooth_path(np.random.default_rng(0), 5, 2.0)
    assert path[0] == 0
    assert np.abs(path[1:]).min() > 0
    assert not smooth_path(np.random.default_rng(0), 5, 0.0).any()


def test_a_camera_that_stands_still_has_one_pose() -> None:
    poses = _camera_path(np.random.default_rng(1), (60, 80), (20, 30), 1.5, 64, 4, False, speed=0.0)
    assert all(np.array_equal(p, poses[0]) for p in poses)
    assert poses[0] @ [20, 30, 1] == pytest.approx([32, 32])


def test_degrading_leaves_its_input_alone_and_keeps_the_scene() -> None:
    frames = np.random.default_rng(1).integers(60, 190, (3, 64, 64, 3), dtype=np.uint8)
    frames[:, :, 32:] //= 3
    before = frames.copy()
    for seed in range(40):
        result = degrade(np.random.default_rng(seed), frames)
        assert result.shape == frames.shape
        assert result[:, :, :28].mean() > result[:, :, 36:].mean() + 5
    assert np.array_equal(frames, before)


# Which objects are labelled


def test_small_or_ineligible_objects_are_not_chosen() -> None:
    identities = np.zeros((2, 64, 64), np.uint8)
    identities[0, :20, :20] = 5
    identities[0, 30:50, :20] = 6
    identities[0, 60:62, 60:62] = 7
    identities[1, :40] = 8
    options = ClipOptions(size=64, max_objects=3)
    seen = {n for s in range(50) for n in choose_objects(np.random.default_rng(s), identities, options, None)}
    assert seen == {5, 6}
    only = choose_objects(np.random.default_rng(0), identities, options, frozenset({6, 7, 8}))
    assert only == [6]
    assert choose_objects(np.random.default_rng(0), identities, options, frozenset()) == []


def test_objects_are_shuffled_and_never_more_than_allowed() -> None:
    identities = np.zeros((1, 64, 64), np.uint8)
    for i in range(6):
        identities[0, 10 * i : 10 * i + 10] = i + 1
    options = ClipOptions(size=64, max_objects=2)
    chosen = [tuple(choose_objects(np.random.default_rng(s), identities, options, None)) for s in range(200)]
    assert {len(c) for c in chosen} == {1, 2}
    assert {c[0] for c in chosen} == {1, 2, 3, 4, 5, 6}
    assert any(c[0] > c[-1] for c in chosen)


def test_relabel_numbers_the_chosen_and_makes_all_others_background() -> None:
    identities = np.array([[0, 3, 200], [9, 3, 1]], np.uint8)
    assert relabel(identities, [200, 3]).tolist() == [[0, 2, 1], [0, 2, 0]]


# Whole clips


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_clip_has_its_objects_on_the_first_frame(library: Library, kind: int) -> None:
    mixture = tuple(float(i == kind) for i in range(3))
    options = ClipOptions(size=64, frames=3, max_objects=3, mixture=mixture)  # type: ignore[arg-type]
    counts = set()
    for seed in range(30):
        clip = make_clip(library, options, np.random.default_rng(seed))
        assert clip.kind == ("stills", "video", "crowd")[kind]
        assert clip.frames.shape == (3, 64, 64, 3)
        assert clip.labels.shape == (3, 64, 64)
        areas = np.bincount(clip.labels[0].ravel(), minlength=256)
        assert (areas[1 : clip.objects + 1] >= options.min_area * 64**2).all()
        assert clip.labels.max() == clip.objects
        assert 1 <= clip.objects <= 3
        counts.add(clip.objects)
    assert len(counts) > 1


def test_a_batch_is_a_function_of_seed_and_step(library: Library) -> None:
    options = ClipOptions(size=64, frames=3)
    fresh = Library(library.root, held_out_people=2)
    first = make_batch(library, options, 4, 11, 6)
    again = make_batch(fresh, options, 4, 11, 6)
    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.objects, again.objects)
    assert first.kinds == again.kinds
    for seed, step in ((5, 11), (4, 12)):
        assert not np.array_equal(first.frames, make_batch(library, options, seed, step, 6).frames)
    # A larger batch begins with the same clips: the batch size is no part of their seed.
    assert np.array_equal(first.frames[:2], make_batch(library, options, 4, 11, 2).frames)


def test_the_mixture_leaves_out_what_has_no_weight_or_no_pictures(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "all")
    kinds = set(make_batch(Library(root, 0), ClipOptions(size=64, mixture=(1, 1, 0)), 0, 0, 20).kinds)
    assert kinds == {"stills", "video"}
    few = Library(root, held_out_people=6)
    assert "crowd" not in make_batch(few, ClipOptions(size=64), 0, 0, 30).kinds
    with pytest.raises(ValueError, match="needs pictures that"):
        make_clip(few, ClipOptions(size=64, mixture=(0, 0, 1)), np.random.default_rng(0))


@pytest.mark.parametrize(
    "values",
    [{"size": 50}, {"size": 16}, {"frames": 1}, {"max_gap": 0}, {"max_objects": 0}, {"mixture": (0, 0, 0)}],
)
def test_impossible_options_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|a clip needs"):
        ClipOptions(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"pace": 0},
        {"pace": 5},
        {"pace_spread": 0.5},
        {"pace_spread": 9},
        {"small": 1.5},
        {"leaving": -0.1},
        {"together": 1.1},
        {"smeared": 2},
    ],
)
def test_paces_and_shares_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}.* must be"):
        ClipOptions(**values)  # type: ignore[arg-type]


def test_video_frames_keep_to_the_largest_gap_and_run_both_ways(library: Library) -> None:
    options = ClipOptions(size=64, frames=4)
    gaps = []
    for seed in range(60):
        pictures, identities, _ = _video_layer(library, options, np.random.default_rng(seed), 6)
        numbers = [round(float(np.median(p[:8])) / 4) for p in pictures]
        assert min(numbers) >= 0
        assert max(numbers) < CLIP_LENGTH
        gaps += np.diff(numbers).tolist()
        for number, mask in zip(numbers, identities, strict=True):
            assert np.flatnonzero(mask.any(axis=0))[0] == 10 + number
    assert {abs(g) for g in gaps} == {1, 2, 3, 4, 5, 6}
    assert min(gaps) < 0 < max(gaps)


def test_a_gap_beyond_the_clips_length_is_cut(library: Library) -> None:
    options = ClipOptions(size=64, frames=4)
    for seed in range(20):
        pictures, _, _ = _video_layer(library, options, np.random.default_rng(seed), 1000)
        assert len(pictures) == 4


def test_a_crowd_labels_people_and_nothing_else(library: Library) -> None:
    for seed in range(20):
        sprites, people = crowd_scene(library, np.random.default_rng(seed), 4, 64, (STAY,) * 4)
        walkers = {s.identity for s in sprites if s.identity in people}
        assert walkers == people == frozenset(range(1, len(people) + 1))
        assert 3 <= len(people) <= 6
        others = [s for s in sprites if s.identity not in people]
        assert len(others) <= 1


def test_people_stand_on_ground_that_moves_with_the_camera(library: Library) -> None:
    moved = np.array([[1.0, 0, 12], [0, 1, -7]])
    still, _ = crowd_scene(library, np.random.default_rng(2), 2, 64, (STAY, STAY))
    panned, _ = crowd_scene(library, np.random.default_rng(2), 2, 64, (STAY, moved))
    for a, b in zip(still, panned, strict=True):
        assert a.poses[0] is not None
        assert b.poses[0] is not None
        assert np.array_equal(a.poses[0], b.poses[0])
        assert a.poses[1] is not None
        assert b.poses[1] is not None
        assert b.poses[1] - a.poses[1] == pytest.approx(np.array([[0, 0, 12], [0, 0, -7]]))


def test_crowds_cross_hide_and_come_back(library: Library) -> None:
    """Over many scenes: people are occluded in the middle and seen again; others only enter later."""
    returned = newcomers = 0
    for seed in range(60):
        sprites, people = crowd_scene(library, np.random.default_rng(seed), 4, 64, (STAY,) * 4)
        _, identities = render(empty_scene(4), sprites, (64, 64))
        areas = np.array([[(identities[t] == p).sum() for t in range(4)] for p in sorted(people)])
        hidden = (areas[:, 1:3] < 0.1 * areas[:, :1]).any(axis=1)
        returned += int((hidden & (areas[:, 0] > 40) & (areas[:, 3] > 0.5 * areas[:, 0])).sum())
        newcomers += int(((areas[:, 0] == 0) & (areas[:, 1:].max(axis=1) > 20)).sum())
    assert returned >= 5
    assert newcomers >= 5


def test_some_leave_a_crowd_and_others_come_after_them(library: Library) -> None:
    """Over many scenes at the pace of neighbouring frames, in which otherwise nearly all stay."""
    left, came = [], []
    for leave in (False, True):
        gone = new = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            sprites, people = crowd_scene(library, rng, 8, 64, (STAY,) * 8, 0.1, leave=leave)
            areas = []
            for person in sorted(people):  # alone, so that nobody hides another
                own = [s for s in sprites if s.identity == person]
                _, identities = render(empty_scene(8), own, (64, 64))
                areas.append([(identities[t] == person).sum() for t in range(8)])
            counted = np.array(areas)
            gone += int(((counted[:, 0] > 10) & (counted[:, -1] == 0)).sum())
            new += int(((counted[:, 0] < 3) & (counted[:, -1] > 10)).sum())
        left.append(gone)
        came.append(new)
    assert left[1] > left[0] + 30  # one or two in each scene
    assert came[1] > came[0] + 30


def test_people_who_keep_together_stay_within_reach_of_one_another() -> None:
    """At first they are all over the frame; later a group is as wide as one or two people are tall."""
    before, after = [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        heights = rng.uniform(0.3, 0.5, 6) * 64
        starts, speeds = rng.uniform(0, 64, 6), rng.normal(0, 8, 6)
        bounds = heights.min(), 1.2 * heights.max()
        old = starts[:, None] + speeds[:, None] * np.arange(8)
        group = _flock(rng, 8, heights, starts, speeds)
        new = starts[:, None] + speeds[:, None] * np.arange(8)
        assert 2 <= len(set(group)) == len(group) <= 4
        assert bounds[0] <= heights[group].min() <= heights[group].max() <= bounds[1]
        others = np.setdiff1d(np.arange(6), group)
        assert np.array_equal(old[others], new[others])
        tall = heights[group].mean()
        before.append(np.ptp(old[group], axis=0).max() / tall)
        after.append(np.ptp(new[group], axis=0).max() / tall)
    assert np.median(after) < 1 < 2 < np.median(before)
    assert max(after) < 3


def test_those_who_pass_are_not_of_the_group() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        starts, speeds = rng.uniform(0, 64, 5), rng.normal(0, 8, 5)
        before = starts.copy(), speeds.copy()
        group = _flock(rng, 8, rng.uniform(20, 30, 5), starts, speeds, frozenset({0, 2, 3}))
        assert sorted(group) == [1, 4]
        assert np.array_equal(before[0][[0, 2, 3]], starts[[0, 2, 3]])
        assert np.array_equal(before[1][[0, 2, 3]], speeds[[0, 2, 3]])
        assert not np.array_equal(before[0][[1, 4]], starts[[1, 4]])
    assert _flock(rng, 8, rng.uniform(20, 30, 2), starts[:2], speeds[:2], frozenset({0})) == []


def test_some_come_to_where_somebody_left() -> None:
    """They enter about when another leaves, to the same place; others enter anywhere."""
    taken = came = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        starts, speeds = rng.uniform(0, 64, 5), np.zeros(5)
        passing = sorted(_come_and_go(rng, 8, 64, np.full(5, 24.0), starts, speeds))
        assert 2 <= len(passing) <= 4
        walks = starts[:, None] + speeds[:, None] * np.arange(8)
        outside = (walks < -8.3) | (walks > 64 + 8.3)  # by 0.35 of a height
        comers = [i for i in passing if outside[i, 0]]
        leavers = [i for i in passing if not outside[i, 0]]
        assert leavers
        assert outside[leavers, -1].all()
        for i in comers:
            came += 1
            taken += any(np.ptp(np.sign(walks[i] - walks[k, 0])) == 2 for k in leavers)
    assert came > 200
    assert 0.65 < taken / came < 0.9  # of those who go anywhere, half come past such a place


def test_crowds_that_keep_together_are_larger(library: Library) -> None:
    for together, sizes in ((False, {3, 4, 5, 6}), (True, {4, 5, 6, 7, 8})):
        seen, labelled = set(), []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            sprites, people = crowd_scene(library, rng, 2, 64, (STAY,) * 2, together=together)
            everybody = {s.identity for s in sprites if s.identity < 200}
            assert people <= everybody
            seen.add(len(everybody))
            labelled.append(len(people) / len(everybody))
        assert seen == sizes
        assert (min(labelled) < 1) == together  # at times only those of the group may be labelled


def test_some_of_those_who_keep_together_turn_round(library: Library) -> None:
    turned = stayed = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sprites, _ = crowd_scene(library, rng, 8, 64, (STAY,) * 8, together=True)
        for s in sprites:
            if s.identity < 200 and all(p is not None for p in s.poses):
                faces = [np.sign(np.linalg.det(p[:, :2])) for p in s.poses if p is not None]
                changes = int((np.diff(faces) != 0).sum())
                assert changes <= 1  # round once, and not back
                turned += changes
                stayed += 1 - changes
    assert 0.15 < turned / (turned + stayed) < 0.45


def test_small_people_are_small(library: Library) -> None:
    heights = []
    for small in (False, True):
        seen = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            sprites, people = crowd_scene(library, rng, 1, 256, (STAY,), small=small)
            for s in sprites:
                if s.identity in people and s.poses[0] is not None:
                    seen.append(s.pictures[0].shape[0] * float(np.linalg.norm(s.poses[0][:, 1])))
        heights.append(seen)
    assert min(heights[0]) > 0.14 * 256
    assert 0.04 * 256 < min(heights[1]) < 0.08 * 256
    assert np.median(heights[1]) < 0.5 * np.median(heights[0])


def test_small_stills_are_layers_of_their_own_and_small(library: Library) -> None:
    areas = []
    for small in (0.0, 1.0):
        options = ClipOptions(size=128, frames=2, small=small)
        scenes = [still_scene(library, options, np.random.default_rng(s)) for s in range(40)]
        rendered = [render(s.background, s.sprites, (128, 128))[1][0] for s in scenes]
        areas.append(np.median([((i > 0) & (i < 100)).mean() for i in rendered]))
    assert areas[1] < 0.25 * areas[0]


def test_what_options_vary_is_drawn_for_each_clip_and_nothing_else_is() -> None:
    plain = ClipOptions(pace=0.5, max_gap=4)
    rng = np.random.default_rng(0)
    assert _varied(plain, rng) is plain
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn: old recipes stay the same
    spread = ClipOptions(pace=0.5, max_gap=4, pace_spread=3, small=0.3)
    drawn = [_varied(spread, rng) for _ in range(300)]
    paces = np.array([d.pace for d in drawn])
    assert 0.5 / 3 <= paces.min() < 0.2 < 1.2 < paces.max() <= 1.5
    assert {d.max_gap for d in drawn} == set(range(1, 13))
    assert {d.small for d in drawn} == {0.0, 1.0}
    assert 60 < sum(d.small for d in drawn) < 120
    assert {d.min_area for d in drawn if d.small} == {spread.min_area / 6}


def test_an_occluder_covers_its_target_at_its_frame_and_not_before(library: Library) -> None:
    covered = []
    for seed in range(20):
        target = Sprite(
            (flat_sprite(20, 10, (9, 9, 9)),), (pose_matrix((20, 10), (32, 32), 1),) * 3, (1.0,) * 3, 5
        )
        over = occluder(library, np.random.default_rng(seed), target, 1, 3, 64, identity=200)
        _, identities = render(empty_scene(3), [target, over], (64, 64))
        areas = (identities == 5).sum(axis=(1, 2))
        covered.append((areas[1] < 0.2 * 200, areas[0] + areas[2] > 0.5 * 400))
    assert np.mean(covered, axis=0) == pytest.approx([1.0, 1.0], abs=0.2)


def test_hidden_sprites_vanish_only_from_middle_frames(library: Library) -> None:
    options = ClipOptions(size=64, frames=4)
    sprite = Sprite((flat_sprite(9, 9, (1, 1, 1)),), (STAY,) * 4, (0.0,) * 4, 3)
    patterns = set()
    for seed in range(200):
        result = _hide_some(library, np.random.default_rng(seed), options, [sprite])
        patterns.add((len(result), *(p is None for p in result[0].poses)))
    assert patterns == {
        (1, False, False, False, False),
        (1, False, True, False, False),
        (1, False, True, True, False),
        (2, False, False, False, False),
    }


def test_newcomers_stay_background(library: Library) -> None:
    """Objects that are not on frame 0 are unlabelled, even if they enter later."""
    late = Sprite((flat_sprite(30, 30, (250, 0, 0)),), (None, STAY, STAY), (1.0,) * 3, 2)
    there = Sprite(
        (flat_sprite(12, 12, (0, 0, 250)),), (pose_matrix((12, 12), (50, 50), 1),) * 3, (0.0,) * 3, 1
    )
    _, identities = render(empty_scene(3), [late, there], (64, 64))
    chosen = choose_objects(np.random.default_rng(0), identities, ClipOptions(size=64), None)
    assert chosen == [1]
    labels = relabel(identities, chosen)
    assert labels[1][:30, :30].max() == 0
    assert (labels[1] == 1).sum() == 144


def test_an_object_that_is_its_own_layer_starts_where_it_was(library: Library) -> None:
    found = 0
    for seed in range(40):
        scene = still_scene(library, ClipOptions(size=64), np.random.default_rng(seed))
        own = [s for s in scene.sprites if s.identity < 100]
        if own:
            found += 1
            assert all(i.max() == 0 for i in scene.background.identities)
            # The red object (RGB 200, 40, 40) is gone from the picture behind it.
            red = scene.background.pictures[0].astype(int)
            assert (red[..., 0] - red[..., 1]).max() < 100
    assert found >= 5


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared training pictures are not on this machine")
def test_real_pictures_give_clips_of_every_kind() -> None:
    library = Library(REAL)
    assert len(library.stills["people"]) == 904
    assert len(library.clips) == 30
    batch = make_batch(library, ClipOptions(size=128, frames=3), 0, 0, 12)
    assert set(batch.kinds) == {"stills", "video", "crowd"}
    assert (batch.objects >= 1).all()
