"""Layouts of labelled data sets: which one a folder is, its clips, and which of them can be scored.

| data set | recognised by |
| --- | --- |
| DAVIS 2016, 2017 | `ImageSets/`, or `JPEGImages/480p` and the like |
| YouTube-VOS | `meta.json` beside `JPEGImages/`; parts `train`, `valid`, ... |
| LVOS | `<part>_meta.json`, or `lvos` in the folder's name; parts as above |
| MOSE | `mose` in the folder's name; parts as above |
| BURST | `<part>/all_classes.json`, also below `annotations/`; see `jobs.evaluation.burst` |
| Long-time Video | clips `blueboy`, `dressage`, `rat` (1x and 3x) |
| folders | images and masks per clip, in any of three orders |

All are scored on annotated frames after an object's first; YouTube-VOS where `meta.json` lists the object.
The last frame counts in YouTube-VOS, BURST and Long-time Video.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.burst import BurstFile, RleAnnotation, find_burst
from jobs.evaluation.pictures import read_annotation
from pipeline.base.errors import UsageError

VOID = 255
"""Value of pixels that count for nobody, where there are other values."""

_IMAGES = ("JPEGImages", "frames", "images")
_MASKS = ("Annotations", "masks", "annotations")
_SUFFIXES = (".jpg", ".jpeg", ".png")
_RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
# In the order in which they are tried; all that can be scored first.
_PARTS = ("valid", "val", "train", "test", "valid_all_frames", "train_all_frames", "test_all_frames")
_LISTS = ("2017/val", "2016/val", "480p/val", "val", "2017/test-dev", "2017/test-challenge", "test-dev")
# DAVIS-2016 has one object per clip, whatever the annotations of a later release distinguish.
_MERGED = ("2016/", "480p/")
_LONG_TIME = ("blueboy", "dressage", "rat")
# Clips of the validation parts.
_YOUTUBE_YEARS = {474: " 2018", 507: " 2019"}
_ALL_FRAMES = "_all_frames"


Annotation = Path | RleAnnotation
"""An index PNG, or masks of BURST."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip's files.

    Args:
        name: its folder's name.
        frames: pictures to track, in order.
        annotations: masks by the frame's name.
        asked: names of the frames whose masks a server wants; None: all.
        listed: names of the frames on which an object is labelled, by object; None: on every annotated one.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: Mapping[str, Annotation]
    asked: frozenset[str] | None = None
    listed: Mapping[int, frozenset[str]] | None = None

    def cut(self, most: int | None) -> Clip:
        """The clip as if it ended after so many frames."""
        frames = self.frames[:most]
        names = {path.stem for path in frames}
        kept = {n: p for n, p in self.annotations.items() if n in names}
        return replace(self, frames=frames, annotations=kept)


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set, or the part of one that a split names.

    Args:
        name: what it was recognised as.
        origin: file or folder that says which clips it has.
        clips: sorted by name, except those of a list.
        skips_last: the last frame of a clip is not scored, as in DAVIS.
        merged: all of a clip's objects are one.
        wrapped: a server wants the clips' folders in a folder Annotations.
        burst: the JSON file that BURST's evaluation wants with other masks.
    """

    name: str
    origin: Path
    clips: tuple[Clip, ...]
    skips_last: bool = True
    merged: bool = False
    wrapped: bool = False
    burst: Path | None = None


@dataclass(frozen=True, slots=True)
class Truth:
    """What a clip's annotations hold.

    Args:
        shown: objects on each annotated frame, by the frame's name.
        binary: the value 255 is object 1.
        unscorable: why it cannot be scored; None if it can.
    """

    shown: Mapping[str, frozenset[int]]
    binary: bool
    unscorable: str | None

    @property
    def objects(self) -> frozenset[int]:
        """All objects of the clip."""
        return frozenset().union(*self.shown.values())


def find_data_set(
    root: str | Path,
    *,
    split: str | None = None,
    clips: Sequence[str] | None = None,
    resolution: str | None = None,
    all_frames: bool = False,
) -> DataSet:
    """Recognise a folder's layout and list its clips.

    Args:
        root: the data set's folder, or that of one of its parts or clips.
        split: list under ImageSets/ (`2017/val`, `val`, `test-dev`), a part (`valid`), or a file of names.
        clips: only these, whatever a list says.
        resolution: folder under JPEGImages/ (`480p`, `Full-Resolution`).
        all_frames: track the frames of `<part>_all_frames/`.

    Raises:
        UsageError: there is no known layout, or a split, a clip or a resolution is not there.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder: no folder JPEGImages can be in it")
    top = root
    burst = find_burst(root, split)
    if burst is not None:
        if resolution is not None:
            raise UsageError(f"--resolution {resolution}: BURST has its frames in one resolution")
        return _burst(burst, clips)
    if _layer(root, _IMAGES) is None:
        parts = [name for name in _PARTS if _layer(root / name, _IMAGES) is not None]
        if parts:
            part = split if split is not None else parts[0]
            if part not in parts:
                raise UsageError(f"{root} has no part {part!r}; it has {', '.join(parts)}")
            root, split = root / part, None
        else:
            return _folders(root, split, clips)
    images, masks = _layers(root, resolution)
    if any(p.suffix.lower() in _SUFFIXES for p in images.iterdir() if p.is_file()):
        return DataSet("a clip", root, (_clip(root.resolve().name, images, masks),), skips_last=False)
    names = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    if not names:
        raise UsageError(f"{images} holds no clip: need a folder of .jpg files per clip")
    for name in clips or ():
        if name not in names:
            raise UsageError(f"no clip {name!r} in {images}; there are: {', '.join(names)}")
    found = _list(root, split) if not clips or split is not None else None
    origin, chosen = root, names
    if found is not None:
        origin, listed = found
        missing = [name for name in listed if name not in names]
        if missing and not clips:
            raise UsageError(
                f"{origin} names clip {missing[0]!r}, which is not in {images}: complete the data set, or "
                "name clips with --clip"
            )
        chosen = listed
    if clips:
        chosen = [name for name in chosen if name in clips] or sorted(set(clips))
    meta = _meta(root / "meta.json")
    if all_frames:
        images = _every_frame(root)
    asked = _given_frames(root, resolution) if meta is not None else None
    made = tuple(
        _clip(n, images / n, masks / n, asked=None if asked is None else asked / n, meta=meta) for n in chosen
    )
    return _named(DataSet("folders", origin, made), root, top, found is not None, split, meta)


def _named(
    data: DataSet, root: Path, top: Path, listed: bool, split: str | None, meta: Mapping[str, Any] | None
) -> DataSet:
    """The data set with its name and its conventions."""
    names = [clip.name for clip in data.clips]
    words = f"{top.resolve().name} {root.resolve().name}".lower()
    folders = {root, root.parent, top}
    part = "" if root == top and root.name not in _PARTS else f" {root.name}"
    if "lvos" in words or any(next(f.glob("*_meta.json"), None) is not None for f in folders):
        return replace(data, name=f"LVOS{part}", wrapped=True)
    if meta is not None:
        year = _YOUTUBE_YEARS.get(len(names), "") if root.name.startswith("val") else ""
        return replace(data, name=f"YouTube-VOS{year}{part}", skips_last=False, wrapped=True)
    if "mose" in words:
        return replace(data, name=f"MOSE{part}")
    if names and all(name.startswith(_LONG_TIME) for name in names):
        size = " 3x" if "x3" in words or any("x3" in name for name in names) else ""
        return replace(data, name=f"Long-time Video{size}", skips_last=False)
    if listed or any((root / layer / r).is_dir() for layer in _IMAGES for r in _RESOLUTIONS):
        list_name = "/".join(data.origin.with_suffix("").parts[-2:]) if listed else ""
        merged = list_name.startswith(_MERGED)
        year = " 2016" if merged else " 2017" if list_name.startswith("2017/") else ""
        return replace(data, name=f"DAVIS{year}", merged=merged)
    return data


# --- folders -------------------------------------------------------------------------------------


def _layer(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _layers(root: Path, resolution: str | None) -> tuple[Path, Path]:
    """The folders of images and masks."""
    images, masks = _layer(root, _IMAGES), _layer(root, _MASKS)
    if images is None or masks is None:
        wanted = _IMAGES if images is None else _MASKS
        raise UsageError(
            f"{root} is laid out as no known data set is: it has no folder {wanted[0]} (or "
            f"{', '.join(wanted[1:])}), nor have its folders"
        )
    return _resolved(images, resolution), _resolved(masks, resolution)


def _resolved(layer: Path, resolution: str | None) -> Path:
    there = [name for name in _RESOLUTIONS if (layer / name).is_dir()]
    if resolution is None:
        return layer / there[0] if there else layer
    if not (layer / resolution).is_dir():
        raise UsageError(f"{layer} has no folder {resolution!r}; it has {', '.join(there) or 'the clips'}")
    return layer / resolution


def _folders(root: Path, split: str | None, wanted: Sequence[str] | None) -> DataSet:
    """A folder of clips that have folders of images and masks each."""
    places = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and _layer(p, _IMAGES) is not None}
    if not places:
        _layers(root, None)
    if split is not None:
        raise UsageError(f"--split {split}: {root} has neither ImageSets/ nor parts, but clips; see --clip")
    for name in wanted or ():
        if name not in places:
            raise UsageError(f"no clip {name!r} in {root}; there are: {', '.join(places)}")
    clips = tuple(_clip(n, *_layers(p, None)) for n, p in places.items() if not wanted or n in wanted)
    return DataSet("folders", root, clips, skips_last=False)


def _burst(annotations: BurstFile, wanted: Sequence[str] | None) -> DataSet:
    names = annotations.names
    for name in wanted or ():
        if name not in names:
            some = ", ".join(names[:5])
            raise UsageError(f"no clip {name!r} in {annotations.path}; it has {len(names)}, such as {some}")
    videos = [annotations.video(name) for name in names if not wanted or name in wanted]
    clips = tuple(Clip(v.name, v.frames, v.annotations, v.annotated) for v in videos)
    return DataSet(
        f"BURST {annotations.part}", annotations.path, clips, skips_last=False, burst=annotations.path
    )


def _every_frame(root: Path) -> Path:
    """The images of a part's every frame, beside those that it gives."""
    if root.name.endswith(_ALL_FRAMES):
        return _layers(root, None)[0]
    beside = root.with_name(root.name + _ALL_FRAMES)
    images = _layer(beside, _IMAGES)
    if images is None:
        raise UsageError(
            f"--all-frames: there is no folder {beside}; the frames given are all that are tracked"
        )
    return images


def _given_frames(root: Path, resolution: str | None) -> Path | None:
    """The images that a part gives, whose masks its server wants."""
    if not root.name.endswith(_ALL_FRAMES):
        return _layers(root, resolution)[0]
    return _layer(root.with_name(root.name.removesuffix(_ALL_FRAMES)), _IMAGES)


def _clip(
    name: str,
    images: Path,
    masks: Path,
    *,
    asked: Path | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Clip:
    if not images.is_dir():
        raise UsageError(f"clip {name} has no folder {images}")
    frames = _pictures(images)
    if len(frames) < 3:
        raise UsageError(f"{images} has {len(frames)} .jpg files; a clip needs at least 3 frames")
    annotations = {p.stem: p for p in sorted(masks.glob("*.png"))}
    if not annotations:
        raise UsageError(f"{masks} has no .png file: clip {name} has no annotation")
    strays = sorted(set(annotations) - {p.stem for p in frames})
    if strays:
        raise UsageError(f"{annotations[strays[0]]} has no frame of that name in {images}")
    wanted = None
    if asked is not None and asked.is_dir():
        wanted = frozenset(p.stem for p in _pictures(asked))
    return Clip(name, frames, annotations, wanted, _labelled(meta, name))


def _pictures(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES))


# --- lists ---------------------------------------------------------------------------------------


def _list(root: Path, split: str | None) -> tuple[Path, list[str]] | None:
    """The list of clips that a split names, or the first of the usual ones; None without ImageSets/."""
    folder = root / "ImageSets"
    if split is not None and split.endswith(".txt") and Path(split).is_file():
        return Path(split), _names(Path(split))
    if not folder.is_dir():
        if split is not None:
            raise UsageError(f"--split {split}: {root} has no ImageSets/ and no part of that name")
        return None
    there = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.txt"))
    ends = [name for name in _LISTS if name == split or (split and name.endswith(f"/{split}"))]
    wanted = _LISTS if split is None else [split, *ends]
    for name in [*wanted, *([n for n in there if split and n.endswith(f"/{split}")])]:
        if name in there:
            path = folder / f"{name}.txt"
            return path, _names(path)
    what = "no list of the usual names" if split is None else f"no list {split!r}"
    raise UsageError(f"{folder} has {what}; it has {', '.join(there) or 'none'}: see --split, or --clip")


def _names(path: Path) -> list[str]:
    # A line is a clip's name or, in DAVIS-2016, /JPEGImages/480p/<clip>/<frame>.jpg and its annotation.
    lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [line.strip("/").split("/")[-2] if "/" in line.strip("/") else line for line in lines]
    if not names:
        raise UsageError(f"{path} names no clip")
    return list(dict.fromkeys(names))


def _meta(path: Path) -> Mapping[str, Any] | None:
    """The `videos` of a YouTube-VOS meta.json; None without the file."""
    if not path.is_file():
        return None
    try:
        videos = json.loads(path.read_text(encoding="utf-8"))["videos"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is no meta.json of YouTube-VOS: {type(error).__name__}: {error}") from None
    if not isinstance(videos, dict):
        raise UsageError(f"{path} is no meta.json of YouTube-VOS: its videos are no object")
    return videos


def _labelled(meta: Mapping[str, Any] | None, name: str) -> Mapping[int, frozenset[str]] | None:
    if meta is None:
        return None
    try:
        objects = meta.get(name, {}).get("objects", {})
        return {int(i): frozenset(entry["frames"]) for i, entry in objects.items() if "frames" in entry}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"meta.json: objects of clip {name} cannot be read: {error}") from None


# --- what can be scored --------------------------------------------------------------------------


def read_labels(annotation: Annotation) -> NDArray[np.int32]:
    """H x W indices of an annotation; UsageError if it cannot be read."""
    return annotation.labels() if isinstance(annotation, RleAnnotation) else read_annotation(annotation)


def read_truth(clip: Clip, data: DataSet) -> Truth:
    """Read a clip's annotations, and say whether they allow a score.

    Raises:
        UsageError: an annotation cannot be read, or shows nothing.
    """
    names = [path.stem for path in clip.frames if path.stem in clip.annotations]
    values = {
        name: frozenset(np.unique(read_labels(clip.annotations[name])).tolist()) - {0} for name in names
    }
    everything = frozenset().union(*values.values())
    binary = data.burst is None and (data.merged or everything == {VOID})
    if data.burst is not None:
        shown: Mapping[str, frozenset[int]] = values
    elif binary:
        shown = {name: frozenset({1}) if here else here for name, here in values.items()}
    else:
        shown = {name: here - {VOID} for name, here in values.items()}
    if not frozenset().union(*shown.values()):
        raise UsageError(f"clip {clip.name}: no annotated object is left to track")
    given: set[int] = set()
    again = False  # whether an object is annotated on a later frame than the one it is given on
    later = False  # whether an object is given after others
    for here in shown.values():
        again |= bool(here & given)
        later |= bool(given and here - given)
        given |= here
    unscorable = None
    if len(values) == 1:
        unscorable = (
            f"clip {clip.name} cannot be scored: one of its {len(clip.frames)} frames has an annotation, as "
            "in DAVIS test-dev and the validation part of other benchmarks; those of later frames are needed"
        )
    elif later and not again:
        unscorable = (
            f"clip {clip.name} cannot be scored: each annotation holds only the objects that are new on its "
            "frame, as in the validation part of YouTube-VOS; those of all objects are needed"
        )
    return Truth(shown, binary, unscorable)


def scored_objects(clip: Clip, data: DataSet, truth: Truth) -> dict[str, frozenset[int]]:
    """The objects to score on each frame, by the frame's name; frames on which none is are left out."""
    if truth.unscorable is not None:
        return {}
    found: dict[str, frozenset[int]] = {}
    given: set[int] = set()
    for number, path in enumerate(clip.frames):
        here = truth.shown.get(path.stem)
        if here is None:
            continue
        last = number == len(clip.frames) - 1 and data.skips_last
        wanted = frozenset(given)
        if clip.listed is not None:
            # An annotation of new objects only says nothing of those before.
            fresh = bool(here - given) and not here & given
            wanted = frozenset() if fresh else frozenset(i for i in given if _is_listed(clip, i, path, here))
        if wanted and not last:
            found[path.stem] = wanted
        given |= here
    return found


def _is_listed(clip: Clip, object_id: int, path: Path, here: frozenset[int]) -> bool:
    names = None if clip.listed is None else clip.listed.get(object_id)
    return object_id in here if names is None else path.stem in names
