"""Click segmenters on pictures kept out of training: mean IoU after 1, 3 and 5 clicks, NoC@85, NoC@90, time.

Clicks are simulated as in the literature: each goes to the centre of the largest error, at most 20. NoC is
the mean number of clicks until that IoU is reached, 20 where it is not. Run it by hand:

    python tests/benchmarks/clicks.py DATA --stills 60 --segmenter xmem-click --segmenter grabcut

With `--boxes` the box segmenters of these names instead: each object in one box whose sides are off by 5 % of
its size (standard deviation), on people and clips scaled so that the object is 60 to 160 pixels long, as on a
camera. Where nothing is found the ellipse in the box counts, as in tracking.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.prompts.box_segmenters import BoxSegmenter, inscribed_ellipse, load_box_segmenter
from pipeline.prompts.click_segmenters import Click, ClickSegmenter, load_click_segmenter
from xmem_core.training.clicks.samples import held_out_clips, held_out_still
from xmem_core.training.clicks.simulated import next_click

Image = NDArray[np.uint8]
MOST = 20
_LEAST_AREA = 150


def objects(picture: Path, labels: Path) -> Iterator[tuple[Image, NDArray[np.bool_]]]:
    """A picture with each of its objects of at least 150 pixels."""
    bgr, values = cv2.imread(str(picture), cv2.IMREAD_COLOR), cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
    if bgr is None or values is None:
        raise OSError(f"cannot decode {picture} or {labels}")
    values = values[..., 0] if values.ndim == 3 else values
    if values.max() == 255 and set(np.unique(values)) == {0, 255}:
        values = values // 255
    values = cv2.resize(values, bgr.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    image = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
    for value in np.unique(values):
        mask = np.asarray(values == value)
        if value not in (0, 255) and mask.sum() >= _LEAST_AREA:
            yield image, mask


def pairs(data: Path, stills: int, every: int) -> dict[str, list[tuple[Path, Path]]]:
    """Pictures and labels by set: stills held out, clips held out, the part of DAVIS-2016 val."""
    found: dict[str, list[tuple[Path, Path]]] = {}
    for kind in ("ecssd", "people", "coco"):
        all_of_kind = sorted((data / "train/stills" / kind).glob("*.jpg"))
        away = [p for p in all_of_kind if held_out_still(kind, p.stem)]
        step = max(1, len(away) // stills) if stills else 1
        found[kind] = [(p, p.with_suffix(".png")) for p in away[::step][: stills or None]]
    davis = data / "train/davis"
    names = held_out_clips([p.name for p in sorted((davis / "JPEGImages").glob("*"))])
    found["clips"] = _frames(davis, names, every)
    part = data / "davis2016-val-part"
    names = [f"480p/{p.name}" for p in sorted((part / "JPEGImages/480p").glob("*"))]
    found["davis val part"] = _frames(part, names, every)
    return found


def _frames(root: Path, names: list[str], every: int) -> list[tuple[Path, Path]]:
    return [
        (p, root / "Annotations" / name / f"{p.stem}.png")
        for name in names
        for p in sorted((root / "JPEGImages" / name).glob("*.jpg"))[every // 4 :: every]
    ]


def run(segmenter: ClickSegmenter, image: Image, truth: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """IoU after each click, up to 20 or until it is over 0.9, at least 5; and seconds a click."""
    found = np.zeros_like(truth)
    clicks: list[Click] = []
    ious: list[float] = []
    seconds: list[float] = []
    while len(ious) < MOST and (len(ious) < 5 or max(ious) < 0.9):
        following = next_click(found, truth)
        if following is None:
            ious.append(1.0)
            continue
        clicks.append(Click(*following))
        started = time.perf_counter()
        found = segmenter.segment(image, clicks, None)
        seconds.append(time.perf_counter() - started)
        ious.append(float((found & truth).sum() / (found | truth).sum()))
    return ious, seconds


def in_boxes(
    segmenter: BoxSegmenter, files: dict[str, list[tuple[Path, Path]]], most: int = 45
) -> Iterator[tuple[str, list[float], list[float]]]:
    """For each set, the IoU and the seconds of up to `most` objects in boxes."""
    random = np.random.default_rng(0)
    for kind, pictures in files.items():
        ious: list[float] = []
        seconds: list[float] = []
        for image, mask in (pair for picture, labels in pictures for pair in objects(picture, labels)):
            if len(ious) == most:
                break
            long = max(np.ptp(np.flatnonzero(mask.any(1))), np.ptp(np.flatnonzero(mask.any(0)))) + 1
            scale = random.uniform(60, 160) / long if kind not in ("ecssd", "coco") else 1.0
            if scale < 1:
                image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
                soft = cv2.resize(mask.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_AREA)
                mask = np.asarray(soft) > 0.5
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if not len(rows):
                continue
            sides = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
            sides += random.normal(0, 0.05, 4) * np.tile(sides[2:] - sides[:2], 2)
            height, width = mask.shape
            limits = (width, height, width, height)
            left, top, right, bottom = (int(v) for v in np.clip(np.round(sides), 0, limits))
            if right - left < 6 or bottom - top < 6:
                continue
            box = (left, top, right - left, bottom - top)
            started = time.perf_counter()
            found = segmenter.segment(np.ascontiguousarray(image), box)
            seconds.append(time.perf_counter() - started)
            if not found.any():
                found = inscribed_ellipse(mask.shape, box)
            ious.append(float((found & mask).sum() / (found | mask).sum()))
        yield kind, ious, seconds


def clicks_to(ious: list[float], target: float) -> int:
    """How many clicks it took to reach an IoU; 20 if it was not reached."""
    return next((n for n, iou in enumerate(ious, 1) if iou >= target), MOST)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--stills", type=int, default=0, help="of each kind; 0: all held out")
    parser.add_argument("--every", type=int, default=20, help="one frame in so many of the clips")
    parser.add_argument("--segmenter", action="append")
    parser.add_argument("--boxes", action="store_true", help="one box for each object instead of clicks")
    arguments = parser.parse_args()
    if arguments.boxes:
        _say(
            f"{'segmenter':<12}{'set':<16}" + "".join(f"{c:>8}" for c in ("objects", "IoU", "below 50", "ms"))
        )
        for name in arguments.segmenter or ["xmem-click", "grabcut"]:
            all_of_them: list[float] = []
            sets = pairs(arguments.data, arguments.stills, arguments.every)
            for kind, found, took in in_boxes(load_box_segmenter(name), sets):
                all_of_them += found
                _say_boxes(name, kind, found, 1000 * float(np.median(took)))
            _say_boxes(name, "all", all_of_them, float("nan"))
        return
    columns = ("objects", "IoU@1", "IoU@3", "IoU@5", "NoC@85", "NoC@90", "ms")
    _say(f"{'segmenter':<12}{'set':<16}" + "".join(f"{column:>8}" for column in columns))
    for name in arguments.segmenter or ["xmem-click", "grabcut"]:
        every: list[tuple[list[float], list[float]]] = []
        for kind, files in pairs(arguments.data, arguments.stills, arguments.every).items():
            rows = [
                run(load_click_segmenter(name), image, mask)
                for picture, labels in files
                for image, mask in objects(picture, labels)
            ]
            every += rows
            _print(name, kind, rows)
        _print(name, "all", every)


def _print(name: str, kind: str, rows: list[tuple[list[float], list[float]]]) -> None:
    if not rows:
        return
    ious = [100 * np.mean([each[n - 1] for each, _ in rows]) for n in (1, 3, 5)]
    noc = [np.mean([clicks_to(each, target) for each, _ in rows]) for target in (0.85, 0.9)]
    ms = 1000 * np.median([s for _, seconds in rows for s in seconds])
    figures = (*(f"{iou:.1f}" for iou in ious), *(f"{n:.2f}" for n in noc), f"{ms:.0f}")
    _say(f"{name:<12}{kind:<16}{len(rows):>8}" + "".join(f"{figure:>8}" for figure in figures))


def _say_boxes(name: str, kind: str, ious: list[float], ms: float) -> None:
    figures = (f"{100 * np.mean(ious):.1f}", f"{sum(iou < 0.5 for iou in ious)}", f"{ms:.0f}")
    _say(f"{name:<12}{kind:<16}{len(ious):>8}" + "".join(f"{figure:>8}" for figure in figures))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
