"""Compares identities with SORT, ByteTrack and OC-SORT on the same detections. Prints a table, or JSON.

The rivals are those of the PyPI package `trackers`, with their defaults and the video's frame rate, in an
environment of their own that is made on first use. All are scored by `jobs.evaluation.identities` on the
frames that the truth covers. McByte of the same package is left out: it downloads weights of SAM and Cutie.

    PYTHONPATH=.:tests python tests/benchmarks/rivals.py VIDEO TRUTH --detections det.txt --people people.csv

VIDEO is tracked with `--detect file:...`, the detector running on every frame, as the rivals see every frame.
`--people` adds the detections of the detector `people` on all tiles of every frame, kept in that file.
`--json` prints JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from jobs.evaluation.identities import evaluate_tracking, read_truth, score_boxes
from pipeline.base.records import Frame
from pipeline.detect.file_detector import FileDetector
from pipeline.detect.people import PeopleDetector, PeopleSettings
from pipeline.tracking.files.track import track
from pipeline.video.sources import open_source

TRACKERS = ("SORT", "ByteTrack", "OC-SORT")
PACKAGE = "trackers==2.6.1"
WORKER = Path(__file__).parents[1] / "support" / "rivals_worker.py"
COLUMNS = {
    "idf1": "IDF1",
    "hota": "HOTA",
    "mota": "MOTA",
    "recall": "recall",
    "precision": "precision",
    "id_switches": "ID switches",
    "fragmentations": "fragmentations",
    "tracks": "tracks",
}
Scores = dict[str, float | int]
Boxes = dict[int, dict[int, tuple[float, float, float, float]]]


def environment(folder: Path) -> Path:
    """The Python of an environment that has the rivals; made if it is not there yet."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE)
        subprocess.run(install, check=True)
        (folder / "complete").touch()
    return python


def detections_of(path: str, video: str) -> list[list[list[float]]]:
    """By frame, x, y, w, h and score of a file's detections, as the tracker gets them."""
    source = open_source(video)
    detector = FileDetector(path)
    blank = np.zeros((source.height, source.width, 3), np.uint8)
    count = source.frame_count or 0
    return [
        [[*map(float, d.bounds), d.score] for d in detector.detect(Frame(blank, index, None))]
        for index in range(count)
    ]


def rivals(python: Path, frames: list[list[list[float]]], rate: float) -> dict[str, Boxes]:
    """The tracks of each rival on each frame."""
    asked = json.dumps({"rate": rate, "trackers": TRACKERS, "frames": frames})
    done = subprocess.run((python, WORKER), input=asked, stdout=subprocess.PIPE, text=True, check=True)
    results: dict[str, list[dict[str, list[float]]]] = json.loads(done.stdout)
    return {
        name: {
            index: {int(i): (b[0], b[1], b[2], b[3]) for i, b in on_frame.items()}
            for index, on_frame in enumerate(found)
        }
        for name, found in results.items()
    }


def write_people(video: str, path: Path) -> None:
    """Write the detections of the detector `people` as CSV, all tiles searched on every frame."""
    detector = PeopleDetector(PeopleSettings(pictures=0))
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("frame_index", "x", "y", "w", "h", "score", "category"))
        for frame in open_source(video).frames():
            for found in detector.detect(frame):
                out.writerow((frame.frame_index, *found.bounds, found.score, found.category))


def scores_of(
    video: str, truth: str, detections: str, python: Path, options: argparse.Namespace
) -> dict[str, Scores]:
    """Scores of all trackers on one file of detections."""
    true = {
        frame: boxes
        for frame, boxes in read_truth(truth).items()
        if options.frames is None or frame < options.frames
    }
    frames = detections_of(detections, video)[: options.frames]
    rate = options.rate or float(open_source(video).rate or 25)
    found = {name: score_boxes(true, boxes).to_json() for name, boxes in rivals(python, frames, rate).items()}
    everything: Boxes = {
        index: {at: (d[0], d[1], d[2], d[3]) for at, d in enumerate(of_frame)}
        for index, of_frame in enumerate(frames)
    }
    alone = score_boxes(true, everything).to_json()
    # They have no identities.
    found["detections alone"] = {key: alone[key] for key in ("recall", "precision", "frames", "boxes")}
    if options.ours:
        with tempfile.TemporaryDirectory() as folder:
            track(
                video,
                folder,
                detector=f"file:{detections}",
                detect_every=options.detect_every,
                max_objects=options.max_objects,
                max_frames=options.frames,
            )
            last = None if options.frames is None else options.frames - 1
            found["ours"] = evaluate_tracking(truth, folder, last=last).to_json()
    return found


def table(all_scores: Mapping[str, Mapping[str, Scores]]) -> str:
    """The scores as Markdown."""
    columns = ("detections", "tracker", *COLUMNS.values())
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for source, by_tracker in all_scores.items():
        for name, scores in by_tracker.items():
            values = [scores.get(key, "") for key in COLUMNS]
            shown = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
            lines.append("| " + " | ".join((source, name, *shown)) + " |")
    return "\n".join(lines)


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("video")
    parser.add_argument("truth")
    parser.add_argument("--detections", action="append", default=[], help="MOT text or CSV; repeatable")
    parser.add_argument("--people", type=Path, help="CSV of the detector people; written if it is missing")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "xmem-rivals")
    parser.add_argument("--rate", type=float, help="frames per second; default: the video's")
    parser.add_argument("--frames", type=int, help="only the first ones")
    parser.add_argument("--detect-every", type=int, default=1)
    parser.add_argument("--max-objects", type=int, default=16)
    parser.add_argument("--no-ours", dest="ours", action="store_false", help="rivals only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    files = {Path(path).name: path for path in options.detections}
    if options.people is not None:
        if not options.people.exists():
            write_people(options.video, options.people)
        files["people"] = str(options.people)
    python = environment(options.environment)
    found = {
        name: scores_of(options.video, options.truth, path, python, options) for name, path in files.items()
    }
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        Console(highlight=False, width=200).print(table(found), markup=False)


if __name__ == "__main__":
    main()
